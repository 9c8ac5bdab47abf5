"""Tuning an edit: splits, the order under a budget, numbers against the edit attached to the whole model, the objective."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import remask.backbones as backbones
from conftest import FACTS
from remask.backbones import MaskedDiffusionLM, Site, native, save_pretrained
from remask.diffusion.likelihood import elbo
from remask.editing import EditMemory, preset
from remask.editing.calibrate import anchor_level, calibrate, mean_logprob
from remask.editing.steering import mean_delta
from remask.errors import NothingToForgetError, RemaskError
from remask.experiments.tuning import TuneJob, averaged, choose, first_pass, merit, pareto, run_tune, second_pass
from remask.experiments.tuningbench import AXES, BANK, LADDER, Bench, Resumed, Setting, closed, deal, grid, logprobs, split
from remask.facts import Fact, save_facts
from remask.reporting.frontier import frontier_figure
from test_cli import Remask, assert_refused, remask, snapshot

__all__ = ["remask"]  # a fixture

GROUPED = [replace(fact, group=fact.subject) for fact in FACTS]
FORGET, RETAIN = GROUPED[:4], GROUPED[4:]


def people(sizes: dict[str, int]) -> list[Fact]:
    return [
        Fact(f"{name}/{i}", f"What is {i} of {name}?", name, f"{name} {i}", group="" if name == "alone" else name)
        for name, count in sizes.items()
        for i in range(count)
    ]


def deep(layers: int = 6) -> MaskedDiffusionLM:
    """A random model of six blocks."""
    tokenizer = native.train_tokenizer([f"{fact.prompt} {fact.answer}" for fact in FACTS], 320)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "heads": 2, "mlp_size": 48, "max_length": 96, "gen_length": 16, "block_length": 8}
        model, spec = native.new_model(tokenizer, layers=layers, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return MaskedDiffusionLM(model, tokenizer, spec, "deep")


def bench_of(lm: MaskedDiffusionLM, gap: float) -> Bench:
    """One fold, whose facts are to lose `gap` nats a row in the mean: the first twice as much, the last nothing."""
    bench = Bench(lm, split(FORGET, RETAIN, folds=1), None, "prompt-masked")
    before = logprobs(lm, [lm.encode(fact) for fact in bench.parts.folds[0]])
    bench.level_of = lambda fold: (before - gap * np.linspace(2, 0, len(before)), before)  # type: ignore[method-assign]
    return bench


# ------------------------------------------------------------------ splits
@pytest.mark.parametrize("seed", range(4))
def test_groups_stay_whole_and_every_row_is_dealt_once(seed: int) -> None:
    facts = people({"Ada": 5, "Bruno": 3, "Cleo": 4, "Farid": 1, "alone": 3})
    parts = deal(facts, 2, seed, "retain")
    assert sorted(fact.id for part in parts for fact in part) == sorted(fact.id for fact in facts)
    named = [{fact.group for fact in part if fact.group} for part in parts]
    assert not named[0] & named[1]
    assert abs(len(parts[0]) - len(parts[1])) <= 5  # no more than the largest group
    assert parts == deal(facts[::-1], 2, seed, "retain")


def test_facts_without_a_group_are_dealt_one_by_one_and_the_seed_deals() -> None:
    lone = people({"alone": 6})
    assert [len(part) for part in deal(lone, 2, 0, "retain")] == [3, 3]
    assert len({str(deal(lone, 2, seed, "retain")) for seed in range(8)}) > 1
    assert len(deal(people({"Ada": 3}), 4, 0, "facts")) == 1  # one group is one fold


def test_nothing_that_is_scored_as_retained_is_read_by_a_memory(
    monkeypatch: pytest.MonkeyPatch, toy: MaskedDiffusionLM
) -> None:
    parts = split(FORGET, RETAIN)
    read: list[set[str]] = []
    build = EditMemory.build.__func__  # type: ignore[attr-defined]

    def spy(cls: Any, lm: Any, facts: Any, site: Any, *, retain: Any = (), **options: Any) -> Any:
        read.append({fact.id for fact in (*facts, *retain)})
        return build(cls, lm, facts, site, retain=retain, **options)

    monkeypatch.setattr(EditMemory, "build", classmethod(spy))
    bench = Bench(toy, parts, None, "prompt-masked")
    for setting, fold in itertools.product(grid(3, ("default", "ridge", "softmax", "mean-delta"), (1,)), (0, 1)):
        bench.edit(setting, fold)
    scored = {fact.id for fact in parts.validation}
    assert scored and scored.isdisjoint(set.union(*read))
    assert set.union(*read) == {fact.id for fact in (*FORGET, *parts.fit)}
    assert len(read) == 8  # one capture a preset and fold, not one a setting


def test_settings_that_share_a_capture_are_solved_as_if_built_alone(toy: MaskedDiffusionLM) -> None:
    bench = Bench(toy, split(FORGET, RETAIN), None, "prompt-masked")
    values = {"mu": (1.0, 30.0), "beta": (1.0, 5.0), "ridge": (0.01,), "balance": (0.0, 1.0), "q": (0.5, 1.0)}
    settings = grid(3, ("default", "ridge"), (1,), values)
    assert len(settings) == 8 + 8
    for setting in settings:
        alone = EditMemory.build(toy, bench.parts.folds[0], Site(1), retain=bench.parts.fit, config=setting.config)
        assert bench.edit(setting, 0).fingerprint() == alone.fingerprint()


def test_splits_that_cannot_be_are_refused() -> None:
    with pytest.raises(RemaskError, match=r"cleo/city.*among the facts and among the retain rows"):
        split([*FORGET, RETAIN[0]], RETAIN)
    with pytest.raises(RemaskError, match=r"'copy'.*among the facts"):
        split(FORGET, [*RETAIN, replace(FORGET[0], id="copy")])
    with pytest.raises(RemaskError, match="at least two people"):
        split(FORGET, [fact for fact in RETAIN if fact.group == "Cleo Pell"])


# ------------------------------------------------------------------ which settings, in which order
def test_the_grid_is_layers_by_values_and_marks_the_middle() -> None:
    settings = grid(4, ("ridge",), (3, 1))
    assert [(s.layer, s.changes["mu"], s.middle) for s in settings] == [
        (layer, mu, mu == 10.0) for layer in (1, 3) for mu in (1.0, 10.0, 100.0)
    ]
    smooth = grid(4, ("default",), (2,))
    assert [(s.changes["mu"], s.changes["beta"], s.middle) for s in smooth] == [
        (mu, beta, (mu, beta) == (30.0, 4.0)) for mu in (10.0, 30.0, 100.0) for beta in (2.0, 4.0, 8.0)
    ]
    assert len(grid(4, ("default", "ridge", "softmax", "paper", "mean-delta"))) == 4 * (9 + 3 + 3 + 3 + 1)
    names = ("Nobody", "No One")
    anchored = grid(1, ("softmax",), values={"anchor": ("prompt", "unknown"), "beta": (5.0,)}, unknown=names)
    assert [s.config for s in anchored] == [
        preset("softmax", anchor="prompt", beta=5.0),
        preset("softmax", anchor="unknown", unknown=names, beta=5.0),
    ]
    assert [s.config for s in grid(1, ("mean-delta",))] == [preset("ridge", mu=0.0)]
    with pytest.raises(RemaskError, match=r"layer 4 is outside the model, which has layers 0\.\.3"):
        grid(4, ("default",), (0, 4))
    with pytest.raises(RemaskError, match="anchor 'unknown' needs names"):
        grid(1, ("default",), values={"anchor": ("unknown",)})


def test_a_budget_buys_layers_first_and_then_values_of_the_best_ones() -> None:
    settings = grid(6, ("ridge",))
    first = first_pass(settings, 9)
    assert [(s.layer, s.changes["mu"]) for s in first] == [(layer, 10.0) for layer in range(6)]
    ranked = [first[i] for i in (4, 1, 0, 2, 3, 5)]
    second = second_pass(settings, ranked, 3)
    assert [(s.layer, s.changes["mu"]) for s in second] == [(4, 1.0), (4, 100.0), (1, 1.0)]
    rest = second_pass(settings, ranked, 99)
    assert len(rest) == 12 and not any(s in first for s in rest)


def test_a_budget_below_the_layers_spreads_over_them() -> None:
    settings = grid(9, ("default",))
    assert [s.layer for s in first_pass(settings, 3)] == [1, 4, 7]
    assert [s.layer for s in first_pass(settings, 1)] == [4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"presets": ("gated",)}, "preset 'gated' cannot be tuned"),
        ({"values": {"q": (1.0,)}}, "no preset among default has a 'q'"),
        ({"values": {"beta": (1.0,)}, "presets": ("ridge", "paper")}, "no preset among ridge, paper has a 'beta'"),
        ({"budget": 0}, "budget"),
        ({"folds": 0}, "folds"),
        ({"retain_budget": -1.0}, "retain budget"),
        ({"retain_budget": math.nan}, "retain budget"),
        ({"level": "low"}, "level 'low' is unknown"),
    ],
)
def test_jobs_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RemaskError, match=words):
        TuneJob("tiny", Path("f"), Path("r"), **changes)


# ------------------------------------------------------------------ numbers
def slowly(
    lm: MaskedDiffusionLM, setting: Setting, facts: Any, fit: Any, kept: Any, levels: np.ndarray
) -> list[tuple[float, ...]]:
    """Every strength with the edit attached to the whole model: alpha, facts, share of their gaps that is closed, mean and
    standard error of the retain change."""
    memory = EditMemory.build(
        lm, facts, Site(setting.layer), retain=fit if setting.config.needs_retain else (), config=setting.config
    )
    edit = mean_delta(memory) if setting.preset == "mean-delta" else memory
    rows, others = [lm.encode(fact) for fact in facts], [lm.encode(fact) for fact in kept]
    edit = calibrate(lm, edit, rows, sum(levels) / len(levels), BANK)
    before, found = [score.logprob for score in elbo(lm, others, BANK)], []
    known = [score.logprob for score in elbo(lm, rows, BANK)]
    for factor in LADDER:
        with edit.with_alpha(edit.alpha * factor).attached(lm):
            after = [score.logprob for score in elbo(lm, others, BANK)]
            changes = [a - b for a, b in zip(after, before, strict=True)]
            mean = sum(changes) / len(changes)
            spread = math.sqrt(sum((c - mean) ** 2 for c in changes) / (len(changes) - 1) / len(changes))
            told = [score.logprob for score in elbo(lm, rows, BANK)]
            gaps = [(a - c) / (a - b) for a, b, c in zip(known, levels, told, strict=True) if a > b]
            share = sum(min(max(gap, 0.0), 1.0) for gap in gaps) / len(gaps)
            found.append((edit.alpha * factor, sum(told) / len(told), share, mean, spread))
    return found


def test_measuring_equals_the_edit_on_the_whole_model_with_fewer_blocks() -> None:
    lm = deep()
    bench = bench_of(lm, 0.3)
    parts, (levels, before) = bench.parts, bench.level_of(0)
    level = float(levels.mean())
    settings = grid(6, ("default", "ridge", "softmax", "mean-delta"), (4,), {"mu": (1.0, 10.0), "beta": (8.0,)})
    assert len(settings) == 6
    start = lm.counters.sequence_blocks
    found = [bench.measure(setting, 0) for setting in settings]
    shared = lm.counters.sequence_blocks - start
    start = lm.counters.sequence_blocks
    expected = [slowly(lm, setting, parts.folds[0], parts.fit, parts.validation, levels) for setting in settings]
    assert lm.counters.sequence_blocks - start >= 1.5 * shared
    for measured, points in zip(found, expected, strict=True):
        keys = ("alpha", "forget", "closed", "retain_change", "retain_stderr")
        numbers = [[point[key] for key in keys] for point in measured["points"]]
        np.testing.assert_allclose(numbers, points, rtol=0, atol=1e-5)
        assert [point["factor"] for point in measured["points"]] == [0.5, 0.75, 1.0, 1.25]
        assert measured["alpha"] == measured["points"][2]["alpha"]
        assert (measured["level"], measured["before"], measured["note"]) == (level, before.mean(), "")
        assert abs(measured["points"][2]["forget"] - level) <= 0.01 * 0.3 + 1e-4  # the tolerance of the calibration


def test_each_fact_closes_its_own_gap() -> None:
    """Half of one gap, all of another although it is far below, none of a third that rose; the fourth had none."""
    before, level = np.array([-2.0, -1.0, -3.0, -9.0]), np.array([-6.0, -5.0, -4.0, -8.0])
    assert closed(np.array([-4.0, -50.0, -1.0, -9.0]), level, before) == pytest.approx((0.5 + 1 + 0) / 3)
    assert closed(before, level, before) == 0
    assert closed(level, level, before) == 1


def test_a_resumed_model_runs_blocks_below_the_site_once(toy: MaskedDiffusionLM, facts: list[Fact]) -> None:
    rows = [toy.encode(fact) for fact in facts[:3]]
    plain = mean_logprob(toy, rows, BANK)
    here = Resumed(toy, 1, toy.fingerprint())
    counts = []
    for _ in range(2):
        start = toy.counters.sequence_blocks
        assert mean_logprob(here, rows, BANK) == pytest.approx(plain, abs=1e-6)
        counts.append(toy.counters.sequence_blocks - start)
    assert counts[0] == 3 * counts[1] > 0
    assert not toy.attached and not toy.blocks[1]._forward_hooks


def test_a_setting_that_cannot_reach_the_level_says_so_and_is_measured_as_built() -> None:
    bench = bench_of(deep(), 2.0)
    found = bench.measure(Setting("default", 4, {"ridge": 1e9}), 0)
    assert found["alpha"] is None and "above the level" in found["note"]
    assert [point["alpha"] for point in found["points"]] == list(LADDER)


def test_facts_that_are_at_the_level_are_refused(toy: MaskedDiffusionLM) -> None:
    bench = Bench(toy, split(FORGET, RETAIN), toy, "never-trained")
    with pytest.raises(NothingToForgetError, match=r"nothing to forget: the facts of fold 1 .* at or below the level"):
        bench.measure(Setting("default", 1, {}), 0)


# ------------------------------------------------------------------ choosing
def point(distance: float, loss: float, *, at_level: bool = False, closed: float = 0.5) -> dict[str, Any]:
    given = {"distance": distance, "retain_loss": loss, "at_level": at_level, "closed": closed}
    return {"factor": 1.0, "alpha": 1.0, **given}


def at(loss: float, closed: float) -> dict[str, Any]:
    """A calibrated point; its distance is what calibration leaves."""
    return point(0.01 * closed, loss, at_level=True, closed=closed)


def setting(*points: dict[str, Any], name: str = "default", note: str = "") -> dict[str, Any]:
    return {"preset": name, "points": list(points), "folds": [{"note": note}]}


@pytest.mark.parametrize(
    ("points", "budget", "best"),
    [
        ([at(0.3, 0.6), at(0.9, 0.8), at(1.1, 1.0), point(0.0, 0.1, closed=0.9)], 1.0, 1),  # most of each gap, at the level
        ([at(0.9, 0.6), point(0.0, 0.1), at(0.2, 0.6)], 1.0, 0),  # what it costs within the budget does not count
        ([at(3.0, 1.0), at(2.0, 0.1), point(5.0, 1.5, closed=0.0)], 1.0, 2),
        ([point(0.0, 3.0, at_level=True), point(4.0, 0.8), point(-2.0, 0.9), point(6.0, 0.1)], 1.0, 2),  # nearest, either side
        ([point(0.0, 3.0, at_level=True), point(4.0, 2.0), point(9.0, 2.5)], 1.0, 1),  # nothing within: smallest loss
        ([point(0.0, 1.0, at_level=True), point(1.0, 0.1)], 1.0, 0),  # the budget itself is within it
    ],
)
def test_the_objective(points: list[dict[str, Any]], budget: float, best: int) -> None:
    found = choose([setting(p) for p in points], budget)
    assert found["chosen"]["setting"] == best
    assert found["within_budget"] == sum(p["retain_loss"] <= budget for p in points)
    assert min(range(len(points)), key=lambda i: merit(points[i], budget)) == best


def test_controls_and_settings_without_points_are_never_chosen() -> None:
    control = setting(point(0.0, 0.0, at_level=True), name="mean-delta")
    found = choose([control, setting(note="singular"), setting(point(3.0, 0.5))], 1.0)
    assert found["chosen"]["setting"] == 2
    assert [end["setting"] for end in found["frontier"]] == [2]
    with pytest.raises(RemaskError, match="no setting could be measured: singular"):
        choose([setting(note="singular")], 1.0)
    with pytest.raises(RemaskError, match="only controls"):
        choose([control], 1.0)


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(places: list[tuple[int, int]]) -> None:
    found = [places[i] for i in pareto([point(x, y) for x, y in places])]
    beaten = {(x, y) for x, y in places for a, b in places if a <= x and b <= y and (a, b) != (x, y)}
    assert found == sorted(set(places) - beaten)


def test_averages_over_folds() -> None:
    def fold(alpha: float | None, changes: tuple[float, ...], shut: float = 0.2) -> dict[str, Any]:
        cells = [
            {"factor": f, "alpha": f * 2, "forget": -10.0 * f, "closed": f * shut, "retain_change": c, "retain_stderr": 0.1}
            for f, c in zip(LADDER, changes, strict=True)
        ]
        return {"alpha": alpha, "level": -9.0, "before": -1.0, "note": "", "points": cells}

    one, other = fold(2.0, (-0.1, -0.2, -0.4, -0.5)), fold(2.0, (0.1, 0.2, 0.2, 0.0), shut=0.8)
    found = averaged([one, other])
    assert [p["retain_loss"] for p in found] == pytest.approx([0.1, 0.2, 0.3, 0.25])  # changes do not cancel between folds
    assert [p["distance"] for p in found] == pytest.approx([4.0, 1.5, -1.0, -3.5])
    assert [p["closed"] for p in found] == pytest.approx([0.25, 0.375, 0.5, 0.625])
    assert [p["at_level"] for p in found] == [False, False, True, False]
    assert found[2]["selectivity"] == pytest.approx((9 / 0.4 + 9 / 0.2) / 2)
    assert found[3]["selectivity"] is None  # no retain change to divide by
    assert found[0]["retain_stderr"] == pytest.approx(0.1)
    assert not any(p["at_level"] for p in averaged([one, fold(None, (0.1, 0.1, 0.1, 0.1))]))
    assert averaged([one, {**other, "points": []}]) == []


# ------------------------------------------------------------------ the whole, and the command
@pytest.fixture(scope="module")
def files(taught: MaskedDiffusionLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows all facts, and the files (read-only)."""
    folder = tmp_path_factory.mktemp("tuning")
    save_pretrained(taught, folder / "model")
    save_facts(FORGET, folder / "facts.jsonl")
    save_facts(RETAIN, folder / "retain.jsonl")
    save_facts(RETAIN[:2], folder / "one.jsonl")
    (folder / "empty.jsonl").write_text("")
    tokenizer = native.train_tokenizer([fact.prompt for fact in FACTS], 290)
    model, spec = native.new_model(
        tokenizer, hidden_size=16, layers=1, heads=2, mlp_size=16, max_length=96, gen_length=8, block_length=8
    )
    save_pretrained(MaskedDiffusionLM(model, tokenizer, spec, "other"), folder / "other")
    return folder


def job(files: Path, **changes: Any) -> TuneJob:
    given = {"layers": (0, 1), "values": {"mu": (1.0, 10.0), "beta": (2.0,)}, "budget": 3, "retain_budget": 5.0}
    return TuneJob(str(files / "model"), files / "facts.jsonl", files / "retain.jsonl", **given | changes)


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    run_tune(job(files), folder)
    return folder


def test_tuning_writes_what_it_did_and_why(done: Path, files: Path) -> None:
    lm = backbones.load(files / "model")
    record = json.loads((done / "tune.json").read_text())
    assert sorted(p.name for p in done.iterdir()) == ["frontier.png", "parts", "tune.json"]
    assert len(list((done / "parts").iterdir())) == 6  # three settings, two folds
    assert record["fingerprint"] == lm.fingerprint()
    assert record["grid"] == {"settings": 4, "measured": 3, "ladder": [0.5, 0.75, 1.0, 1.25]}
    assert [(s["layer"], s["mu"]) for s in record["settings"][:2]] == [(0, 1.0), (1, 1.0)]
    best = min((0, 1), key=lambda i: min(merit(p, 5.0) for p in record["settings"][i]["points"]))
    assert (record["settings"][2]["layer"], record["settings"][2]["mu"]) == (best, 10.0)
    ids = record["split"]
    assert sorted(itertools.chain(*ids["folds"])) == sorted(fact.id for fact in FORGET)
    assert sorted(ids["fit"] + ids["validation"]) == sorted(fact.id for fact in RETAIN)
    everything = [{"setting": i, **p} for i, s in enumerate(record["settings"]) for p in s["points"]]
    chosen = record["chosen"]
    assert merit(chosen, 5.0) == min(merit(p, 5.0) for p in everything)
    assert chosen["build"]["layer"] == record["settings"][chosen["setting"]]["layer"]
    assert "at most 5 nats" in record["objective"]["text"]
    rows = [lm.encode(fact) for fact in FORGET if fact.id in ids["folds"][0]]
    assert record["settings"][0]["folds"][0]["level"] == pytest.approx(anchor_level(lm, rows, BANK), abs=1e-6)


def test_a_killed_run_goes_on_and_ends_the_same(
    done: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = Bench.measure, []

    def failing(self: Bench, setting: Setting, fold: int) -> dict[str, Any]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((setting, fold))
        return measure(self, setting, fold)

    monkeypatch.setattr(Bench, "measure", failing)
    with pytest.raises(KeyboardInterrupt):
        run_tune(job(files), tmp_path)
    assert len(list((tmp_path / "parts").iterdir())) == 3 and not (tmp_path / "tune.json").exists()
    later: list[tuple[Setting, int]] = []
    monkeypatch.setattr(Bench, "measure", lambda self, *what: later.append(what) or measure(self, *what))
    run_tune(job(files), tmp_path)
    assert len(later) == 3 and not any(what in calls for what in later)
    assert snapshot(tmp_path) == snapshot(done)
    run_tune(job(files, retain_budget=0.0), tmp_path)  # another objective over the same numbers
    assert len(later) == 3
    chosen = json.loads((tmp_path / "tune.json").read_text())["chosen"]
    assert not chosen["within_budget"] and chosen["reason"].startswith("none of 12 points is within the budget")


def test_the_picture_shows_the_frontier_and_the_choice(done: Path) -> None:
    record = json.loads((done / "tune.json").read_text())
    axis = frontier_figure(record).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    ends = [record["settings"][e["setting"]]["points"][LADDER.index(e["factor"])] for e in record["frontier"]]
    assert lines["Pareto frontier"].get_xydata().tolist() == [[e["distance"], e["retain_loss"]] for e in ends]
    assert sum(len(marks.get_offsets()) for marks in axis.collections if hasattr(marks, "get_sizes")) == 12
    assert lines["retain budget, 5 nats"].get_ydata()[0] == 5.0
    star = next(c for c in axis.containers if c.get_label() == "chosen")[0]
    assert star.get_xydata().tolist() == [[record["chosen"]["distance"], record["chosen"]["retain_loss"]]]


def command(files: Path, out: Path, *more: object) -> list[object]:
    return [
        "edit",
        "tune",
        files / "model",
        "--facts",
        files / "facts.jsonl",
        "--retain",
        files / "retain.jsonl",
        "-o",
        out,
        *more,
    ]


def test_the_help_names_every_preset_and_the_default_grid() -> None:
    import inspect

    from remask.cli.edit import edit_tune

    given = inspect.signature(edit_tune, eval_str=True).parameters
    words = {name: parameter.annotation.__metadata__[0].help for name, parameter in given.items() if name != "load_options"}
    assert words["preset"].startswith(f"of {', '.join(AXES)} (control);")
    for axis in ("mu", "ridge", "q", "beta"):
        grids = {name: axes[axis] for name, axes in AXES.items() if axes.get(axis)}
        said = "; ".join(f"{name}: {','.join(f'{value:g}' for value in tried)}" for name, tried in grids.items())
        assert words[axis].endswith(f"({said})") if grids else "(" not in words[axis]


def test_the_command_prints_a_table_and_the_record(remask: Remask, files: Path, tmp_path: Path) -> None:
    words = command(files, tmp_path, "--layers", "1", "--preset", "paper,mean-delta", "--ridge", "0.1,1", "--folds", 1)
    data = remask(*words, "--json").data
    assert data == json.loads((tmp_path / "tune.json").read_text())
    assert [(s["preset"], s.get("ridge")) for s in data["settings"]] == [("paper", 0.1), ("paper", 1.0), ("mean-delta", None)]
    assert data["chosen"]["build"]["preset"] == "paper"
    table = remask(*words)
    assert table.code == 0 and "paper, layer 1, ridge 0.1" in table.out and "chosen:" in table.out


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--layers", "1,x"], "--layers '1,x' is no comma list"),
        (["--layers", "7"], "layer 7 is outside the model"),
        (["--preset", "bold"], "preset 'bold' cannot be tuned"),
        (["--preset", "ridge", "--beta", "3"], "'beta'"),
        (["--level", "never-trained"], "--reference"),
        (["--reference", "{files}/other"], "differ in vocabulary"),
        (["--retain", "{files}/one.jsonl"], "at least two people"),
        (["--retain", "{files}/empty.jsonl"], "holds no facts"),
        (["--retain", "{files}/facts.jsonl"], "among the retain rows"),
        (["--reference", "{files}/model", "--level", "never-trained", "--layers", "1"], "nothing to forget"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(remask: Remask, files: Path, tmp_path: Path, more: list[str], word: str) -> None:
    out = tmp_path / "out"
    assert_refused(remask(*command(files, out, *(text.format(files=files) for text in more))), word)
    assert not out.exists()
