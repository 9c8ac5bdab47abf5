"""Diagnostics of unlearning against explicit loops over single canvases in float64, closed forms and numbers by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from conftest import FACTS, GOLDEN_OPTIONS, GOLDENS, build_toy
from remask.backbones import Encoded, MaskedDiffusionLM, Site, load, save_pretrained
from remask.backbones.intervention import Intervention, add_shift
from remask.cli.diagnose import diagnose
from remask.diffusion.masks import MaskBank
from remask.diffusion.sampler import SamplerConfig, generate
from remask.editing.steering import SteeringVector
from remask.errors import RemaskError
from remask.facts import save_facts
from remask.reporting.diagnostics import BIN_NAMES, convergence_curves, signal_map, trajectory_map
from remask.tracing.plots import NO_DATA
from remask.unlearning.diagnostics import Convergence, Trajectory, anchors, convergence, trajectory
from remask.unlearning.diagnostics.convergence import QUANTILES, _by_noise

LONG = FACTS[1]  # "a tame crow"
TIGHT = 2e-5  # fp32 against float64


class Push(Intervention):
    """Adds a fixed vector to one layer."""

    kind = "push"

    def __init__(self, site: Site) -> None:
        self.site = site

    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        vector = torch.linspace(-1, 1, lm.hidden_size)
        return add_shift(lm, self.site, lambda hidden: vector.expand_as(hidden))

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def dream() -> MaskedDiffusionLM:
    return load(GOLDENS / "dream", **GOLDEN_OPTIONS["dream"])


@pytest.fixture(scope="module")
def toy_pair() -> tuple[MaskedDiffusionLM, MaskedDiffusionLM]:
    return build_toy(0), build_toy(1)


# ------------------------------------------------------------------ the loops that the library is compared with
def distributions(lm: MaskedDiffusionLM, canvas: list[int]) -> np.ndarray:
    """Log-probabilities [L, V] in float64, the shift undone here: row i is what position i - 1 emits."""
    with torch.inference_mode():
        hidden = lm.run_to(lm.num_layers - 1, torch.tensor([canvas]))
        raw = lm.stack.head(hidden)[0].double()
    if lm.spec.shift:
        raw = raw[[0, *range(len(canvas) - 1)]]
    return raw.log_softmax(dim=-1).numpy()


def kl(policy: np.ndarray, anchor: np.ndarray, tau: float) -> float:
    tempered = tau * anchor - np.logaddexp.reduce(tau * anchor)
    return float((np.exp(policy) * (policy - tempered)).sum())


def by_loop(
    lm: MaskedDiffusionLM, frozen: MaskedDiffusionLM, row: Encoded, tau: float, forced: bool
) -> tuple[np.ndarray, list[int], list[int]]:
    """Series [4, S, L], commit steps and committed ids of greedy one-token-a-step decoding."""
    start, length = len(row.prompt_ids), len(row.answer_ids)
    canvas = [*row.prompt_ids, *[lm.spec.mask_id] * length]
    series = np.full((4, length, length), np.nan)
    commit = [-1] * length
    for step in range(length):
        policy = distributions(lm, canvas)
        blind = distributions(frozen, [lm.spec.mask_id] * start + canvas[start:])
        masked = [i for i in range(length) if canvas[start + i] == lm.spec.mask_id]
        for i in masked:
            here, gold = policy[start + i], row.answer_ids[i]
            values = (
                kl(here, blind[start + i], tau),
                np.exp(here[gold]),
                np.exp(blind[start + i][gold]),
                -(np.exp(here) * here).sum(),
            )
            series[:, step, i] = values
        best = max(masked, key=lambda i: policy[start + i].max())
        commit[best] = step
        canvas[start + best] = row.answer_ids[best] if forced else int(policy[start + best].argmax())
    return series, commit, canvas[start:]


def series_of(found: Trajectory) -> np.ndarray:
    return np.stack([found.kl, found.policy, found.anchor, found.entropy])


# ------------------------------------------------------------------ D1
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["generated", "teacher-forced"])
@pytest.mark.parametrize("family", ["toy", "dream"])
def test_trajectory_equals_explicit_loops(family: str, mode: Any, tau: float, request: pytest.FixtureRequest) -> None:
    if family == "toy":
        lm, frozen = request.getfixturevalue("toy_pair")
        row = lm.encode(LONG)
    else:
        lm = frozen = request.getfixturevalue("dream")
        row = Encoded("row", (222, 47, 217), (69, 318, 10, 9, 244), (0, 1))
    config = SamplerConfig(gen_length=len(row.answer_ids))
    found = trajectory(lm, row, anchor=frozen, tau=tau, mode=mode, config=config)
    series, commit, ids = by_loop(lm, frozen, row, tau, mode == "teacher-forced")
    np.testing.assert_allclose(series_of(found), series, atol=TIGHT, rtol=1e-4)
    assert found.commit.tolist() == commit
    assert list(found.ids) == ids
    assert found.gold == row.answer_ids
    if mode == "teacher-forced":
        assert found.ids == row.answer_ids
    if tau == 0:
        np.testing.assert_allclose(found.kl, math.log(lm.embedding.num_embeddings) - found.entropy, atol=TIGHT, rtol=1e-5)
    last = [series[0, step, i] for i, step in enumerate(commit)]
    np.testing.assert_allclose(found.at_commit, last, atol=TIGHT, rtol=1e-4)
    np.testing.assert_allclose(found.masked_mean, np.nanmean(series[0], axis=1), atol=TIGHT, rtol=1e-4)


@pytest.mark.parametrize("family", list(GOLDEN_OPTIONS))
def test_generated_trajectory_commits_what_the_family_sampler_commits(family: str) -> None:
    lm = load(GOLDENS / family, **GOLDEN_OPTIONS[family])
    prompt = tuple(range(20, 29))
    config = SamplerConfig.default(lm, gen_length=16, block_length=8, steps=8, seed=3)
    found = trajectory(lm, Encoded("row", prompt, (40, 41, 42), (0, 1)), config=config)
    result = generate(lm, [prompt], config, keys=["row"], history=True)[0]
    assert list(found.ids) == result.response
    states = np.array([state[len(prompt) : len(prompt) + 16] for state in result.history]) == lm.spec.mask_id
    for i, step in enumerate(found.commit):
        assert states[step, i]
        assert not states[step + 1 :, i].any() or states[-1, i]
    assert np.array_equal(np.isnan(found.kl), ~states[: len(found.kl)])
    assert np.isnan(found.policy[:, 3:]).all()
    assert not np.isnan(found.policy[0, :3]).any()
    assert found.gold == (40, 41, 42) + (None,) * 13


def test_steps_of_the_readings_are_those_of_the_sampler(tiny: MaskedDiffusionLM) -> None:
    """Blocks that end early leave gaps in the sampler's clock; step-limited edits must see the same clock in the readings."""
    row = Encoded("row", tiny.encode_prompt("Tell me in one sentence where Zora Yates was born."), (5, 6), (0, 1))
    config = SamplerConfig(gen_length=16, block_length=4, schedule="threshold", threshold=0.3)
    clock: list[int | None] = []
    handle = tiny.embedding.register_forward_hook(lambda *_: clock.append(tiny.clock.step))
    try:
        generate(tiny, [row.prompt_ids], config, keys=["row"])
        alone = list(clock)
        clock.clear()
        trajectory(tiny, row, config=config)
    finally:
        handle.remove()
    assert alone != list(range(len(alone)))
    assert clock == alone + [step for step in alone for _ in ("policy", "anchor")]
    assert tiny.clock.step is None


def test_teacher_forced_steps_share_the_tokens(toy_pair: tuple[MaskedDiffusionLM, MaskedDiffusionLM]) -> None:
    lm, _ = toy_pair
    row = Encoded("row", lm.encode(LONG).prompt_ids, (40, 41, 42, 43, 44), (0, 1))
    found = trajectory(lm, row, mode="teacher-forced", config=SamplerConfig(gen_length=5, steps=2))
    assert np.bincount(found.commit).tolist() == [3, 2]
    whole = distributions(lm, [*row.prompt_ids, *[lm.spec.mask_id] * 5])[len(row.prompt_ids) :]
    assert set(np.argsort(-whole.max(axis=1))[:3]) == set(np.flatnonzero(found.commit == 0))


def test_a_proposed_mask_token_does_not_stop_teacher_forcing() -> None:
    lm = build_toy()
    with torch.no_grad():
        lm.embedding.weight[lm.spec.mask_id] *= 1000
    row = lm.encode(LONG)
    whole = distributions(lm, [*row.prompt_ids, *[lm.spec.mask_id] * len(row.answer_ids)])[len(row.prompt_ids) :]
    assert lm.spec.mask_id in whole.argmax(axis=1)
    assert trajectory(lm, row, mode="teacher-forced").ids == row.answer_ids


def test_anchor_of_the_bare_model_under_an_edit(toy_pair: tuple[MaskedDiffusionLM, MaskedDiffusionLM]) -> None:
    """A second copy, and a function that switches the edit off, give one anchor; by default the edit acts on it too."""
    lm, bare = build_toy(0), toy_pair[0]
    row, push = lm.encode(LONG), Push(Site(1))
    handle = push.attach(lm)

    def switched(ids: Tensor, positions: Tensor) -> Tensor:
        nonlocal handle
        handle.detach()
        try:
            return lm.logits(ids, positions=positions)
        finally:
            handle = push.attach(lm)

    config = SamplerConfig(gen_length=len(row.answer_ids))
    series, commit, _ = by_loop(lm, bare, row, 1.0, forced=False)
    for anchor in (bare, switched):
        found = trajectory(lm, row, anchor=anchor, config=config)
        np.testing.assert_allclose(series_of(found), series, atol=TIGHT, rtol=1e-4)
        assert found.commit.tolist() == commit
    here = trajectory(lm, row, config=config)
    np.testing.assert_allclose(here.kl, by_loop(lm, lm, row, 1.0, forced=False)[0][0], atol=TIGHT, rtol=1e-4)
    assert np.nanmax(np.abs(here.kl - series[0])) > 0.1


def test_kl_is_exactly_zero_where_the_prompt_is_masked_already(toy_pair: tuple[MaskedDiffusionLM, MaskedDiffusionLM]) -> None:
    lm, _ = toy_pair
    row = lm.encode(LONG)
    hidden = Encoded(row.id, (lm.spec.mask_id,) * len(row.prompt_ids), row.answer_ids, row.subject)
    found = trajectory(lm, hidden, mode="teacher-forced")
    assert np.array_equal(found.kl, np.where(np.isnan(found.kl), np.nan, 0.0), equal_nan=True)
    assert np.array_equal(found.policy, found.anchor, equal_nan=True)
    bank = MaskBank(draws=4, replicates=1)
    assert convergence(lm, [hidden], bank).kl.values == (0.0,)
    assert trajectory(lm, row, mode="teacher-forced").kl[0].min() > 0


def test_positions_are_compared_in_parts(toy_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, other = toy_pair
    row = lm.encode(LONG)
    whole = trajectory(lm, row, anchor=other)
    monkeypatch.setattr(anchors, "POSITIONS", 2)
    np.testing.assert_allclose(series_of(trajectory(lm, row, anchor=other)), series_of(whole), rtol=1e-6)


def test_trajectory_as_json(toy_pair: tuple[MaskedDiffusionLM, MaskedDiffusionLM]) -> None:
    lm, other = toy_pair
    found = trajectory(lm, lm.encode(LONG), anchor=other, mode="teacher-forced")
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["commit"] == found.commit.tolist()
    assert data["mode"] == "teacher-forced"
    kls = np.array(data["kl"], dtype=float)  # None becomes NaN
    np.testing.assert_array_equal(kls, found.kl)
    assert np.isnan(kls).any()
    assert data["at_commit"] == found.at_commit.tolist()
    assert "".join(data["tokens"]) == LONG.answer


# ------------------------------------------------------------------ D2 and D3
@pytest.mark.parametrize("tau", [0.0, 0.7])
@pytest.mark.parametrize("family", ["toy", "dream"])
def test_convergence_equals_direct_computation(family: str, tau: float, request: pytest.FixtureRequest) -> None:
    if family == "toy":
        lm, frozen = request.getfixturevalue("toy_pair")
        rows = [lm.encode(fact) for fact in FACTS[:4]]
    else:
        lm = frozen = request.getfixturevalue("dream")
        rows = [Encoded("a", (222, 47), (69, 318, 10), (0, 1)), Encoded("b", (47, 9, 33), (5, 77, 8, 12), (0, 1))]
    bank = MaskBank(draws=4, replicates=2, seed=9)
    states: list[int] = []
    found = convergence(lm, rows, bank, anchor=frozen, tau=tau, token_budget=40, done=states.append)
    expected = np.array([list(direct(lm, frozen, row, bank, tau)) for row in rows])  # [rows, masks, 3]
    for quantity, values in zip((found.kl, found.leakage, found.leakage_logprob), np.moveaxis(expected, 2, 0), strict=True):
        np.testing.assert_allclose(quantity.values, values.mean(axis=1), atol=TIGHT, rtol=1e-4)
        assert quantity.overall.mean == pytest.approx(values.mean(), abs=TIGHT, rel=1e-4)
        np.testing.assert_allclose(
            quantity.overall.quantiles, np.quantile(values.mean(axis=1), QUANTILES), atol=TIGHT, rtol=1e-4
        )
    assert found.ids == tuple(row.id for row in rows)
    assert sum(states) == len(rows) * 8
    assert found.bank == bank.fingerprint([(row.id, len(row.answer_ids)) for row in rows])
    json.dumps(found.to_dict(), allow_nan=False)


def direct(
    lm: MaskedDiffusionLM, frozen: MaskedDiffusionLM, row: Encoded, bank: Any, tau: float
) -> Iterator[tuple[float, float, float]]:
    """KL, p_u(gold) and log p_u(gold), mean over the masked tokens, of every mask of a row."""
    start = len(row.prompt_ids)
    for mask in bank.masks(row.id, len(row.answer_ids)):
        answer = [lm.spec.mask_id if hide else token for hide, token in zip(mask, row.answer_ids, strict=True)]
        policy = distributions(lm, [*row.prompt_ids, *answer])[start:]
        blind = distributions(frozen, [lm.spec.mask_id] * start + answer)[start:]
        hidden = np.flatnonzero(mask)
        logs = [blind[i][row.answer_ids[i]] for i in hidden]
        yield float(np.mean([kl(policy[i], blind[i], tau) for i in hidden])), np.exp(logs).mean(), np.mean(logs)


def test_each_noise_level_lands_in_its_bin(toy_pair: tuple[MaskedDiffusionLM, MaskedDiffusionLM]) -> None:
    """t = 1/5 ... 5/5 are upper ends; a row of four tokens has t = 1/4 ... 4/4, one of one token t = 1 alone."""
    lm, other = toy_pair
    prompt = lm.encode(LONG).prompt_ids
    rows = [Encoded(str(n), prompt, tuple(range(40, 40 + n)), (0, 1)) for n in (5, 4, 1)]
    masks = {n: np.tril(np.ones((5, n), dtype=bool)) for n in (5, 4, 1)}  # 1, 2, ... tokens hidden, then all
    bank: Any = SimpleNamespace(draws=5, replicates=1, masks=lambda name, n: masks[n], fingerprint=lambda lengths: "hand-made")
    found = convergence(lm, rows, bank, anchor=other)
    five, four, one = (np.array([value[0] for value in direct(lm, other, row, bank, 1.0)]) for row in rows)
    expected = [five[:1], [five[1], four[0]], [five[2], four[1]], [five[3], four[2]], [five[4], four[3], one[0]]]
    assert [spread.rows for spread in found.kl.bins] == [1, 2, 2, 2, 3]
    for spread, values in zip(found.kl.bins, expected, strict=True):
        assert spread.mean == pytest.approx(np.mean(values), rel=1e-4)
        np.testing.assert_allclose(spread.quantiles, np.quantile(values, QUANTILES), rtol=1e-4)


def test_spreads_by_hand() -> None:
    """Rows count alike, whatever the number of their masks in a bin; a bin without rows has no number."""
    found = _by_noise(np.array([[1.0, 3.0, 8.0], [2.0, 7.0, 9.0]]), np.array([[0, 0, 4], [0, 4, 4]]))
    assert found.values == (4.0, 6.0)
    assert (found.overall.mean, found.overall.quantiles) == (5.0, pytest.approx((4.2, 4.5, 5.0, 5.5, 5.8)))
    assert (found.bins[0].rows, found.bins[0].mean) == (2, 2.0)
    assert (found.bins[4].rows, found.bins[4].mean) == (2, 8.0)
    assert [(spread.rows, spread.mean, spread.quantiles) for spread in found.bins[1:4]] == [(0, None, None)] * 3


# ------------------------------------------------------------------ bad input
def test_what_cannot_be_measured_is_refused(toy_pair: Any, dream: MaskedDiffusionLM) -> None:
    lm, _ = toy_pair
    row, bank = lm.encode(LONG), MaskBank()
    cases: list[tuple[str, Callable[[], object]]] = [
        ("no rows", lambda: convergence(lm, [], bank)),
        ("given twice", lambda: convergence(lm, [row, row], bank)),
        ("no answer tokens", lambda: trajectory(lm, Encoded("x", (5,), (), (0, 1)))),
        ("never predicts position 0", lambda: convergence(dream, [Encoded("x", (), (5, 6), (0, 0))], bank)),
        ("tau -1", lambda: trajectory(lm, row, tau=-1)),
        ("tau nan", lambda: convergence(lm, [row], bank, tau=math.nan)),
        ("differ in vocabulary", lambda: trajectory(lm, row, anchor=dream)),
        ("mode 'forced' is unknown", lambda: trajectory(lm, row, mode="forced")),  # type: ignore[arg-type]
        ("none was given", lambda: signal_map({})),
        ("none was given", lambda: convergence_curves({"forget": {}})),
    ]
    for message, call in cases:
        with pytest.raises(RemaskError, match=message):
            call()


# ------------------------------------------------------------------ figures
def texts(figure: Any) -> str:
    found = [figure.get_suptitle()]
    for axis in figure.axes:
        found += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), *(t.get_text() for t in axis.get_xticklabels())]
    return "\n".join(found)


def test_trajectory_map_shows_numbers_tokens_and_units() -> None:
    nan = math.nan
    kls = np.array([[1.0, 4.0, 0.5], [2.0, nan, 0.25], [3.0, nan, nan]])
    found = Trajectory(
        "x/y", "generated", 0.5, kls, kls, kls, kls, np.array([2, 0, 1]), (7, 8, 9), (" to$wn", "\n", " of"), (7, 5, None)
    )
    figure = trajectory_map(found)
    middle, above, right = figure.axes[:3]
    shown = middle.images[0].get_array()
    assert np.array_equal(np.ma.getmaskarray(shown), np.isnan(kls))
    np.testing.assert_array_equal(shown.filled(nan), kls)
    assert middle.images[0].get_clim() == (0.0, 4.0)
    assert tuple(middle.images[0].get_cmap().get_bad()[:3]) == pytest.approx((0xB4 / 255,) * 3)
    assert NO_DATA == "#b4b4b4"
    labels = middle.get_xticklabels()
    assert [label.get_text() for label in labels] == ["to$wn", "\\n", "of"]
    assert [label.get_color() for label in labels] == ["black", "#c0392b", "#8a8a8a"]
    assert [bar.get_height() for bar in above.patches] == [3.0, 4.0, 0.25]
    np.testing.assert_allclose(right.lines[0].get_xdata(), [5.5 / 3, 1.125, 3.0])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0, 1, 2])
    frames = {(p.get_x() + 0.5, p.get_y() + 0.5) for p in middle.patches}
    assert frames == {(0, 2), (1, 0), (2, 1)}
    for part in ("denoising step", "nats", "x/y", "tau 0.5", "not gold (1 of 2)"):
        assert part in texts(figure)


def of_values(values: list[list[float]], places: list[list[int]], tau: float = 1.0) -> Convergence:
    quantity = _by_noise(np.array(values), np.array(places))
    return Convergence(tuple(map(str, range(len(values)))), tau, "bank", quantity, quantity, quantity)


def test_convergence_curves_draw_means_and_bands() -> None:
    start, end = of_values([[1.0, 3.0], [3.0, 5.0]], [[0, 4], [0, 4]]), of_values([[0.5, 1.0], [0.5, 3.0]], [[0, 4], [0, 4]])
    figure = convergence_curves({"forget": {0: start, 40: end}, "retain": {0: start}})
    overall, first, empty, last = (figure.axes[i] for i in (0, 1, 2, 5))
    np.testing.assert_allclose(overall.lines[0].get_xydata(), [[0, 3.0], [40, 1.25]])
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[0, 2.0], [40, 0.5]])
    np.testing.assert_allclose(last.lines[0].get_xydata(), [[0, 4.0], [40, 2.0]])
    np.testing.assert_allclose(last.lines[1].get_xydata(), [[0, 4.0]])
    assert not empty.lines
    band = last.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1.2, 4.8))  # 10 % of (1, 3), 90 % of (3, 5)
    assert overall.get_ylim()[0] == 0
    assert overall.get_ylim()[1] >= 4.8
    for part in ("training step", "nats", "forget: 2 rows", "t in 0.8–1 (2 / 2)", "t in 0.2–0.4 (0 / 0)"):
        assert part in texts(figure)
    named = convergence_curves({"forget": {"before": start, "after": end}}, "")
    assert [tick.get_text() for tick in named.axes[3].get_xticklabels()] == ["before", "after"]


def test_signal_map_draws_the_levels() -> None:
    figure = signal_map({"forget": of_values([[0.25, 0.75], [0.5, 0.5]], [[0, 4], [0, 4]])})
    assert len(figure.axes) == 3
    for axis in figure.axes:
        np.testing.assert_allclose(axis.lines[0].get_xydata(), [[0, 0.375], [4, 0.625]])
        assert [tick.get_text().split("\n")[0] for tick in axis.get_xticklabels()] == list(BIN_NAMES)
    assert BIN_NAMES == ("0–0.2", "0.2–0.4", "0.4–0.6", "0.6–0.8", "0.8–1")
    for part in ("E[KL | t]", "nats", "probability", "noise level t", "(2)", "(0)"):
        assert part in texts(figure)


# ------------------------------------------------------------------ the command
def test_command_writes_numbers_and_pictures(tmp_path: Path) -> None:
    save_pretrained(build_toy(), tmp_path / "toy")
    lm, frozen = load(tmp_path / "toy"), load(tmp_path / "toy")
    save_facts(FACTS[:2], tmp_path / "facts.jsonl")
    save_facts(FACTS[2:4], tmp_path / "retain.jsonl")
    vector = SteeringVector(torch.linspace(-1, 1, 32), Site(1), 1.0, preset="mean-delta", model=lm.fingerprint())
    vector.save(tmp_path / "edit.safetensors")
    app = typer.Typer()
    app.command()(diagnose)
    common = [str(tmp_path / "toy"), "--facts", str(tmp_path / "facts.jsonl"), "--draws", "2", "-o", str(tmp_path / "out")]
    edited = [*common, "--retain", str(tmp_path / "retain.jsonl"), "--edit", str(tmp_path / "edit.safetensors"), "--shown", "1"]
    ran = CliRunner().invoke(app, edited, catch_exceptions=False)
    assert ran.exit_code == 0
    assert "retain" in ran.stdout
    record = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    bank, rows = MaskBank(draws=2), [lm.encode(fact) for fact in FACTS[:2]]
    before = convergence(lm, rows, bank)
    with vector.attached(lm):
        after = convergence(lm, rows, bank, anchor=frozen)
        walked = trajectory(lm, rows[0], anchor=frozen)
    found = record["convergence"]["forget"]
    np.testing.assert_allclose(found["before"]["kl"]["values"], before.kl.values, rtol=1e-4)
    np.testing.assert_allclose(found["after"]["kl"]["values"], after.kl.values, rtol=1e-4)
    assert abs(after.kl.overall.mean - before.kl.overall.mean) > 1e-3
    assert [(one["id"], one["mode"]) for one in record["trajectories"]] == [
        (FACTS[0].id, "generated"),
        (FACTS[0].id, "teacher-forced"),
    ]
    np.testing.assert_allclose(np.array(record["trajectories"][0]["kl"], dtype=float), walked.kl, rtol=1e-3, atol=1e-5)
    assert record["rows"] == {"forget": 2, "retain": 2}
    assert record["edit"]["kind"] == vector.kind
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {
        "convergence.png",
        "signal.png",
        "trajectory-1-generated.png",
        "trajectory-1-teacher-forced.png",
    }
    bare = CliRunner().invoke(app, [*common, "--shown", "0", "--json"], catch_exceptions=False)
    assert list(json.loads(bare.stdout)["convergence"]["forget"]) == ["before"]
    assert not list((tmp_path / "out").glob("trajectory-*"))
