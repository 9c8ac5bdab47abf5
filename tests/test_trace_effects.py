"""Raw effects: files that keep them bit for bit, sums of equation 4 by hand, joining, and the difference of two traces."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remask.backbones import Site
from remask.editing import EditMemory, MemoryConfig
from remask.errors import RemaskError
from remask.tensorfile import write_tensors
from remask.tracing import PRESETS, Trace, TraceConfig, Weights, aggregate, join, largest_difference, preset

CONFIG = TraceConfig(steps=3, draws=2, modules=("resid", "mlp"), corruption="replace", view="last", seed=4)
TENSORS = ("effects", "squares", "clean", "corrupted", "placed", "tokens")
NAN = math.nan


def made(names: str = "ab", steps: int = 3, seed: int = 0, **changes: Any) -> Trace:
    """Random effects of one row a letter, [row, 4 layers, 2 modules, steps, steps]; row i says so in `tokens`."""
    draw = torch.Generator().manual_seed(seed)
    rows = len(names)
    effects = torch.randn(rows, 4, 2, steps, steps, generator=draw)
    effects[:, :, :, torch.ones(steps, steps).tril(-1).bool()] = NAN
    blank = Trace(
        effects,
        effects**2 * 2,
        torch.randn(rows, steps, generator=draw),
        torch.randn(rows, steps, generator=draw),
        torch.rand(rows, 2, steps, generator=draw),
        torch.tensor([ord(name) for name in names]),
        tuple(names),
        tuple(names),
        (),
        CONFIG,
        "exact",
        "0123456789abcdef",
    )
    return replace(blank, **changes)


def same_bits(one: Trace, other: Trace) -> bool:
    return all(
        getattr(one, name).dtype == getattr(other, name).dtype
        and getattr(one, name).numpy().tobytes() == getattr(other, name).numpy().tobytes()
        for name in TENSORS
    )


# ------------------------------------------------------------------ files
def test_a_saved_trace_comes_back_whole(tmp_path: Path) -> None:
    given = made("ab", facts=("a", "a"), unknown=("x", "y"), mode="sweep", precision="bf16 autocast")
    given.save(tmp_path / "deep" / "trace.safetensors")
    for path in (tmp_path / "deep" / "trace.safetensors", str(tmp_path / "deep")):  # the file, or its folder
        found = Trace.load(path, model="0123456789abcdef")
        assert same_bits(found, given)
        for field in fields(Trace):
            if field.name not in TENSORS:
                assert getattr(found, field.name) == getattr(given, field.name), field.name
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["trace.safetensors"]


def test_a_view_is_saved_as_its_values(tmp_path: Path) -> None:
    """Tensors that are not contiguous hold the same numbers."""
    given = made("ab")
    turned = replace(given, effects=given.effects.transpose(1, 2).contiguous().transpose(1, 2))
    turned.save(tmp_path / "t.safetensors")
    assert same_bits(Trace.load(tmp_path / "t.safetensors"), given)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    made().save(tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(RemaskError, match=r"t\.safetensors: no readable trace .*make it again"):
        Trace.load(tmp_path / "t.safetensors")


def test_a_missing_file_is_named_with_the_command_that_writes_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "trace.safetensors"):
        with pytest.raises(RemaskError, match=r"trace\.safetensors: no such trace"):
            Trace.load(path)


def test_a_trace_of_another_model_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    made().save(tmp_path / "t.safetensors")
    with pytest.raises(RemaskError, match="another model: 0123456789abcdef, this one is fedcba9876543210"):
        Trace.load(tmp_path / "t.safetensors", model="fedcba9876543210")


def test_files_of_another_kind_are_refused(tmp_path: Path, toy, facts) -> None:
    path = tmp_path / "f.safetensors"
    memory = EditMemory.build(toy, facts[:2], Site(1), config=MemoryConfig(readout="ridge", mu=0.0), alpha=1.0)
    for write in (memory.save, lambda file: save_file({"effects": torch.zeros(2)}, file)):
        write(path)
        with pytest.raises(RemaskError, match=r"f\.safetensors: this is no trace of format 2"):
            Trace.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 1},
        {"format": 3},
        {"kind": "position trace"},
        {"config": {"steps": 3, "colour": "red"}},
        {"ids": None},
        {"model": None},
        None,
    ],
)
def test_headers_of_other_versions_are_refused(tmp_path: Path, changes: dict[str, Any] | None) -> None:
    """None stands for something that is left out, or for no object at all."""
    path = tmp_path / "t.safetensors"
    made().save(path)
    header = made().header()
    for name, value in (changes or {}).items():
        header = {key: old for key, old in header.items() if key != name} | ({} if value is None else {name: value})
    if changes is None:
        save_file(load_file(path), path, {"remask": "[]"})
    else:
        write_tensors(path, header, load_file(path))
    with pytest.raises(RemaskError, match=r"t\.safetensors: this is no trace of format 2; make it again"):
        Trace.load(path)


def test_a_file_without_one_of_the_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    made().save(path)
    tensors = load_file(path)
    del tensors["placed"]
    write_tensors(path, made().header(), tensors)
    with pytest.raises(RemaskError, match="this is no trace of format 2"):
        Trace.load(path)


def test_header_says_what_the_numbers_are() -> None:
    header = made(mode="sweep").header()
    assert (header["unit"], header["axes"][-1]) == ("nats", "later step")
    assert header["estimand"].startswith("fixed trajectory")
    assert made().header()["estimand"].startswith("free-running")
    assert json.loads(json.dumps(header))["config"]["seed"] == 4


# ------------------------------------------------------------------ equation 4
def one_cell(effects: list[list[float]], tokens: int = 1) -> Trace:
    """One row, one layer, one module."""
    steps = len(effects)
    tensor, blank = torch.tensor(effects).view(1, 1, 1, steps, steps), torch.zeros(1, steps)
    config = TraceConfig(steps=steps, modules=("resid",))
    sides = torch.zeros(1, 2, steps)
    return Trace(tensor, tensor**2, blank, blank, sides, torch.tensor([tokens]), ("a",), ("a",), (), config, "exact", "m")


def summed(effects: list[list[float]], tokens: int = 1, **weights: Any) -> list[float]:
    return aggregate(one_cell(effects, tokens), Weights(**{"gamma": 0.5, **weights})).flatten().tolist()


FULL = [[1.0, 2.0, -4.0], [NAN, 6.0, 3.0], [NAN, NAN, 5.0]]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, [(1 + 1 - 1) / 1.75, (6 + 1.5) / 1.5, 5.0]),
        ({"normalise": False}, [1.0, 7.5, 5.0]),
        ({"gamma": 0.0}, [1.0, 6.0, 5.0]),
        ({"gamma": 1.0, "normalise": False}, [-1.0, 9.0, 5.0]),
        ({"strict": True}, [(1 - 1) / 0.75, 3.0, NAN]),
        ({"strict": True, "normalise": False}, [0.0, 1.5, NAN]),
        ({"strict": True, "gamma": 0.0}, [NAN, NAN, NAN]),
    ],
)
def test_aggregate_by_hand(weights: dict[str, Any], expected: list[float]) -> None:
    assert summed(FULL, **weights) == pytest.approx(expected, nan_ok=True, abs=1e-7)


def test_default_weights_by_hand() -> None:
    found = aggregate(one_cell(FULL, tokens=2)).flatten().tolist()
    assert found == pytest.approx([(1 + 0.9 * 2 - 0.81 * 4) / 2.71 / 2, (6 + 0.9 * 3) / 1.9 / 2, 2.5])


def test_a_fact_with_fewer_steps_carries_no_weight_there() -> None:
    short = [[8.0, 4.0, NAN], [NAN, 3.0, NAN], [NAN, NAN, NAN]]
    assert summed(short) == pytest.approx([10 / 1.5, 3.0, NAN], nan_ok=True)


def test_per_token_divides_by_the_objects_length() -> None:
    assert summed(FULL, tokens=4, normalise=False) == pytest.approx([0.25, 1.875, 1.25])
    assert summed(FULL, tokens=4, normalise=False, per_token=False) == pytest.approx([1.0, 7.5, 5.0])
    both = made("ab", tokens=torch.tensor([1, 5]))
    plain, divided = (aggregate(both, Weights(per_token=each)) for each in (False, True))
    assert torch.allclose(divided, plain / torch.tensor([1.0, 5.0]).view(2, 1, 1, 1))


@pytest.mark.parametrize("gamma", [-0.1, 1.1, NAN])
def test_impossible_weights_are_refused(gamma: float) -> None:
    with pytest.raises(RemaskError, match="must lie in 0"):
        Weights(gamma=gamma)


def test_the_papers_preset_is_the_literal_reading() -> None:
    config, weights = preset("paper")
    assert (config.draws, config.readout, config.steps, config.view, config.corruption) == (10, "raw", 8, "subject", "add")
    assert (weights.normalise, weights.per_token, weights.strict, weights.gamma) == (False, False, False, 0.9)
    assert aggregate(one_cell(FULL, tokens=3), weights).flatten().tolist() == pytest.approx([1 + 1.8 - 3.24, 6 + 2.7, 5.0])


def test_presets_take_changes_and_unknown_ones_name_the_choice() -> None:
    config, _ = preset("paper", draws=2, corruption="replace")
    assert (config.draws, config.readout, config.corruption) == (2, "raw", "replace")
    assert preset("default") == (TraceConfig(), Weights())
    with pytest.raises(RemaskError, match=f"'papre' is unknown; choose one of {', '.join(PRESETS)}"):
        preset("papre")


# ------------------------------------------------------------------ noise draws
def test_standard_error_by_hand() -> None:
    """Draws of 1, 2 and 6 nats: mean 3, variance (4 + 1 + 9) / 2."""
    given = one_cell([[3.0]])
    given = replace(given, squares=torch.tensor([1.0 + 4 + 36]).view(1, 1, 1, 1, 1), config=replace(given.config, draws=3))
    assert given.standard_error().item() == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(replace(given, config=replace(given.config, draws=1)).standard_error().item())


def test_equal_draws_have_no_error_and_undefined_effects_none() -> None:
    given = made()  # its squares are those of two equal draws
    found = given.standard_error()
    assert torch.equal(found.isnan(), given.effects.isnan())
    assert found.nan_to_num().max() < 1e-3


# ------------------------------------------------------------------ rows
def test_take_selects_and_repeats_rows() -> None:
    given = made("abc", facts=("p", "q", "q"), unknown=("z",))
    found = given.take([2, 0, 2])
    assert (found.ids, found.facts, found.unknown) == (("c", "a", "c"), ("q", "p", "q"), ("z",))
    for name in TENSORS:
        mine, theirs = getattr(found, name), getattr(given, name)
        assert [row.nan_to_num().tolist() for row in mine] == [theirs[i].nan_to_num().tolist() for i in (2, 0, 2)]
    assert given.take([]).ids == ()


def test_join_pads_orders_and_collects() -> None:
    short = made("db", steps=2, seed=1, facts=("D", "B"), unknown=("f",))
    long = made("ca", steps=3, seed=2, facts=("C", "A"), unknown=("e", "g"))
    empty = made("", steps=1, unknown=("h",))
    whole = join([short, empty, long], list("abcdefgh"))
    assert (whole.ids, whole.facts, whole.unknown) == (tuple("abcd"), tuple("ABCD"), tuple("efgh"))
    assert whole.tokens.tolist() == [ord(name) for name in "abcd"]
    for source, row, place, steps in [(long, 1, 0, 3), (short, 1, 1, 2), (long, 0, 2, 3), (short, 0, 3, 2)]:
        for name in ("effects", "squares"):
            mine, theirs = getattr(whole, name)[place], getattr(source, name)[row]
            assert mine.shape[-2:] == (3, 3)
            assert torch.equal(mine[..., :steps, :steps].nan_to_num(9), theirs.nan_to_num(9))
            assert mine[..., steps:, :].isnan().all()
            assert mine[..., :, steps:].isnan().all()
        for name in ("clean", "corrupted", "placed"):
            mine, theirs = getattr(whole, name)[place], getattr(source, name)[row]
            assert torch.equal(mine[..., :steps], theirs)
            assert mine[..., steps:].isnan().all()


def test_one_part_joined_is_itself() -> None:
    assert same_bits(join([made("ab")], ["a", "b"]), made("ab"))


@pytest.mark.parametrize(
    "changes", [{"config": TraceConfig()}, {"mode": "sweep"}, {"model": "other"}, {"precision": "bf16 autocast"}]
)
def test_parts_that_do_not_belong_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RemaskError, match="different protocols, modes or models"):
        join([made("a"), made("b", **changes)], ["a", "b"])


def test_nothing_to_join_is_refused() -> None:
    with pytest.raises(RemaskError, match="nothing to join"):
        join([], [])


# ------------------------------------------------------------------ two traces
@pytest.mark.parametrize("name", TENSORS[:-1])
def test_a_difference_made_by_hand_is_found_where_it_is(name: str) -> None:
    one = made()
    tensor = getattr(one, name).clone()
    place = (~tensor.isnan()).nonzero()[7 % int((~tensor.isnan()).sum())]
    tensor[tuple(place)] += 0.25
    found = largest_difference(one, replace(one, **{name: tensor}))
    assert found.pop(name) == pytest.approx(0.25, abs=1e-6)
    assert set(found) == set(TENSORS[:-1]) - {name}
    assert not any(found.values())


def test_a_value_on_one_side_alone_is_an_infinite_difference() -> None:
    one = made()
    effects = one.effects.clone()
    effects[0, 0, 0, 0, 0] = NAN
    found = largest_difference(one, replace(one, effects=effects))
    assert found.pop("effects") == math.inf
    assert not any(found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "fedcba9876543210"}, "model 0123456789abcdef against fedcba9876543210"),
        ({"ids": ("a", "c")}, r"ids \('a', 'b'\) against \('a', 'c'\)"),
        ({"config": replace(CONFIG, noise=1.0)}, "config TraceConfig.*against TraceConfig"),
        ({"mode": "sweep"}, r"exact \(free-running.*against sweep \(fixed trajectory"),
    ],
)
def test_traces_of_different_things_are_not_compared(changes: dict[str, Any], message: str) -> None:
    for pair in ((made(), made(**changes)), (made(**changes), made())):
        with pytest.raises(RemaskError, match="two traces cannot be compared"):
            largest_difference(*pair)
    with pytest.raises(RemaskError, match=message):
        largest_difference(made(), made(**changes))


def test_modes_of_one_estimand_and_precisions_are_compared() -> None:
    assert not any(largest_difference(made(), made(mode="reference", precision="bf16 autocast")).values())
    assert not any(largest_difference(made(mode="sweep"), made(mode="sweep")).values())
