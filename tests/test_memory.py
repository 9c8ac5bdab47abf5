"""The edit memory's variants and its behaviour as a value, against explicit loops over canvases and the files' own bytes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import build_toy
from remask.backbones import MaskedDiffusionLM, Site
from remask.editfile import read_edit, write_edit
from remask.editing import EditMemory, MemoryConfig, preset
from remask.editing.build import fact_hash
from remask.editing.capture import capture_keys
from remask.editing.retained import Retained, pooled
from remask.editing.steering import mean_delta
from remask.errors import RemaskError
from remask.experiments.edits import build_edit
from remask.experiments.tuning import build_tuned
from remask.experiments.tuningbench import Setting
from remask.facts import Fact
from test_anchor_capture import canvas_of, hooked

SITE = Site(1)
IDS = torch.arange(20, 50).view(2, 15)
MANY = ("default", "ridge", "paper", "softmax")  # presets that hold several facts
REFUSAL = "I don't know."


def build(lm: MaskedDiffusionLM, facts: list[Fact], retain: list[Fact], config: MemoryConfig, **options: Any) -> EditMemory:
    return EditMemory.build(lm, facts, SITE, retain=retain if config.needs_retain else (), config=config, **options)


def any_preset(lm: MaskedDiffusionLM, facts: list[Fact], name: str, **options: Any) -> EditMemory:
    changes = {"mu": 0.0} if name == "ridge" else {}
    return build(lm, facts[: 1 if name == "gated" else 3], facts[4:], preset(name, **changes), **options)


def data_of(memory: EditMemory, folder: Path) -> bytes:
    memory.save(folder / "bytes.safetensors")
    return (folder / "bytes.safetensors").read_bytes()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max())


def by_hand(keys: Tensor, deltas: Tensor, config: MemoryConfig, retained: Retained | None = None) -> EditMemory:
    names = tuple(f"f{i:03}" for i in range(len(keys)))
    return EditMemory(config, SITE, names, keys, deltas, torch.arange(len(keys)), "model", 1.0, retained)


def alike(memory: EditMemory) -> Tensor:
    """Weights [n] under which every fact counts as much as a fact of mean size does."""
    sizes = [int((memory.owner == i).sum()) for i in range(len(memory.fact_ids))]
    return torch.tensor([sum(sizes) / len(sizes) / sizes[i] for i in memory.owner], dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ what is captured
def object_mean(lm: MaskedDiffusionLM, site: Site, fact: Fact, answer: str | None = None, *, masked: bool = False) -> Tensor:
    """Equations 7 and 8: the mean residual at the object's positions, one canvas and one hook."""
    row = lm.encode(fact, answer=answer) if answer else lm.encode(fact)
    hidden = canvas_of(lm, row, np.full(len(row.answer_ids), masked))
    return hooked(lm, site, hidden)[len(row.prompt_ids) :].mean(0)


@pytest.mark.parametrize("site", [Site(0), Site(1, "attn"), Site(2, "mlp")], ids=lambda site: site.module)
@pytest.mark.parametrize("pooling", ["mean", "last", "all"])
def test_subject_keys_are_read_on_the_revealed_canvas(toy, facts, pooling: str, site: Site) -> None:
    config = preset("paper", keys=f"subject-{pooling}")
    memory = EditMemory.build(toy, facts[:3], site, config=config)
    for index, fact in enumerate(facts[:3]):
        row = toy.encode(fact)
        hidden = hooked(toy, site, row.ids)
        first, last = row.subject
        assert last - first > 1
        subject = [hidden[i] for i in range(first, last)]
        mean = torch.stack(subject).sum(0) / len(subject)
        keys = {"mean": [mean], "last": subject[-1:], "all": subject}[pooling]
        own = memory.owner == index
        delta = object_mean(toy, site, fact, REFUSAL) - object_mean(toy, site, fact)
        assert close(memory.keys[own], torch.stack(keys))
        assert close(memory.deltas[own], delta.expand(len(keys), -1))


TARGETS: dict[str, Callable[[MaskedDiffusionLM, Fact, list[Fact]], Tensor]] = {
    "refusal": lambda lm, fact, _: object_mean(lm, SITE, fact, "No idea."),
    "object": lambda lm, fact, _: object_mean(lm, SITE, fact, f"not {fact.answer}"),
    "mask": lambda lm, fact, _: object_mean(lm, SITE, fact, masked=True),
    "other": lambda lm, fact, _: object_mean(lm, SITE, fact, "onion soup" if len(fact.answer) > 8 else "Arles"),
    "mean": lambda lm, _, retain: torch.stack([object_mean(lm, SITE, fact) for fact in retain]).mean(0),
}


@pytest.mark.parametrize("target", TARGETS)
def test_deltas_lead_to_the_target(toy, facts, target: str) -> None:
    chosen = [dataclasses.replace(fact, target=f"not {fact.answer}") for fact in facts[1:4]]
    retain = facts[4:7]  # Arles, rye bread, onion soup; "a blind cat" is as long as "a tame crow" but is to be forgotten too
    config = preset("paper", target=target, refusal="No idea.")
    memory = EditMemory.build(toy, chosen, SITE, retain=retain, config=config)
    for fact, delta in zip(chosen, memory.deltas, strict=True):
        assert close(delta, TARGETS[target](toy, fact, retain) - object_mean(toy, SITE, fact))


def test_other_object_may_be_one_of_the_facts_own_wrong_answers(toy, facts) -> None:
    fact = dataclasses.replace(facts[0], perturbed=("a very long wrong answer", "Varna", "Lucca"))
    memory = EditMemory.build(toy, [fact], SITE, config=preset("paper", target="other"))
    assert close(memory.deltas[0], object_mean(toy, SITE, fact, "Varna") - object_mean(toy, SITE, fact))


def test_answer_keys_with_the_mean_target(toy, facts) -> None:
    config = MemoryConfig(target="mean", states=3, compress=0)

    def states(fact: Fact) -> Tensor:
        row = toy.encode(fact)
        found = []
        for mask in np.unique(config.bank.masks(row.id, len(row.answer_ids)), axis=0):
            found += list(hooked(toy, SITE, canvas_of(toy, row, mask))[len(row.prompt_ids) :][torch.from_numpy(mask)])
        return torch.stack(found)

    memory = build(toy, facts[:2], facts[4:], config)
    mean = torch.cat([states(fact) for fact in facts[4:]]).double().mean(0)
    assert close(memory.keys, torch.cat([states(fact) for fact in facts[:2]]))
    assert close(memory.keys + memory.deltas, mean.expand(len(memory.keys), -1))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"keys": "answer", "target": name}, f"answer keys.*{name!r}") for name in ("refusal", "mask", "other")),
        *(({"keys": f"subject-{name}", "target": "anchor"}, "subject keys.*'anchor'") for name in ("mean", "last", "all")),
        ({"keys": "subject-first"}, "keys 'subject-first'.*subject-last"),
        ({"target": "nothing"}, "target 'nothing'.*refusal"),
        ({"readout": "nearest"}, "readout 'nearest'.*softmax"),
        ({"anchor": "answer"}, "anchor 'answer'.*prompt"),
        ({"readout": "gated"}, "one key"),
        ({"readout": "gated", "keys": "subject-all", "target": "mask", "mu": 0.0}, "one key"),
        ({"readout": "gated", "keys": "subject-mean", "target": "mask", "mu": 0.0, "centre": True}, "centre=False"),
        ({"readout": "softmax"}, "mu=0"),
        *(({"readout": name, "mu": 0.0, "q": 0.5}, "q=1") for name in ("kernel", "softmax")),
        *(({"balance": value}, "balance") for value in (float("nan"), -0.1, 1.1)),
        *(({name: value}, name) for name, value in (("landmarks", 1), ("retain_keys", 0), ("compress", -1))),
        *(({name: value}, name) for name in ("ridge", "beta", "cap", "mu") for value in (float("nan"), float("inf"), -1.0)),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RemaskError, match=named):
        MemoryConfig(**changes)


# ------------------------------------------------------------------ the gated edit
def test_gated_edit_by_hand(toy, facts) -> None:
    """Equation 10, token by token; the cap is set so that some gates are closed, some open and some cut off."""
    alpha, ridge = 1.3, 0.7
    key = EditMemory.build(toy, facts[:1], SITE, config=preset("gated")).keys[0].double()
    hidden = toy.run_to(1, IDS)
    gates = [float(key @ token.double()) / (float(key @ key) + ridge) for token in hidden.flatten(0, 1)]
    cap = float(np.median([gate for gate in gates if gate > 0]))
    assert min(gates) < 0 < cap < max(gates)
    memory = EditMemory.build(toy, facts[:1], SITE, config=preset("gated", ridge=ridge, cap=cap), alpha=alpha)
    with memory.attached(toy):
        shift = (toy.run_to(1, IDS) - hidden).flatten(0, 1)
    expected = torch.stack([alpha * min(max(gate, 0.0), cap) * memory.deltas[0].double() for gate in gates])
    assert close(shift, expected, 1e-4)


@given(d=st.integers(1, 12), ridge=st.floats(1e-3, 10), relative=st.booleans(), seed=st.integers(0, 2**31))
def test_gated_edit_is_the_ridge_memory_of_one_key_where_it_is_not_clipped(d, ridge, relative, seed) -> None:
    key, delta, hidden = draw(seed, 1, d), draw(seed + 1, 1, d), 2 * draw(seed + 2, 40, d)
    settings = {"ridge": ridge, "relative": relative}
    gated = by_hand(key, delta, preset("gated", cap=1.0, **settings)).shift()(hidden)
    ridged = by_hand(key, delta, preset("paper", **settings)).shift()(hidden)
    share = float(key.square().sum()) if relative else 1.0
    gate = hidden @ key[0] / (key.square().sum() + ridge * share)
    inside = (gate >= 0) & (gate <= 1)
    scale = max(1.0, float(ridged.abs().max()))
    assert ((gated - ridged).abs() <= 1e-5 * scale)[inside].all()
    assert not gated[gate < 0].any()
    assert ((gated - delta).abs() <= 1e-5 * scale)[gate > 1].all()


def test_gated_edit_holds_one_fact(toy, facts) -> None:
    with pytest.raises(RemaskError, match=r"one key, not 2.*preset 'paper'"):
        EditMemory.build(toy, facts[:2], SITE, config=preset("gated"))
    one, two = (EditMemory.build(toy, [fact], SITE, config=preset("gated")) for fact in facts[:2])
    for attempt in (lambda: one + two, lambda: one.add(toy, [facts[1]])):
        with pytest.raises(RemaskError, match="one key, not 2"):
            attempt()


# ------------------------------------------------------------------ the softmax readout
@pytest.mark.parametrize("centre", [False, True])
def test_softmax_readout_equals_a_loop(toy, facts, centre: bool) -> None:
    """Forget keys bring their deltas, retain keys bring nothing but take their share of the weight; facts count alike."""
    beta, alpha = 6.0, 1.7
    config = preset("softmax", beta=beta, centre=centre)
    memory = build(toy, facts[:3], facts[4:], config, alpha=alpha)
    forget = memory.keys.double()
    retain = capture_keys(toy, SITE, [toy.encode(fact) for fact in facts[4:]], config.bank).double()
    middle = retain.mean(0) if centre else torch.cat([forget, retain]).mean(0)
    shares = torch.cat([alike(memory), torch.ones(len(retain), dtype=torch.float64)])

    def weight(key: Tensor, token: Tensor) -> Tensor:
        one, other = key - middle, token - middle
        return (beta * (one @ other) / (one.norm() * other.norm())).exp()

    hidden = toy.run_to(1, IDS)
    with memory.attached(toy):
        shift = (toy.run_to(1, IDS) - hidden).flatten(0, 1)
    for token, found in zip(hidden.double().flatten(0, 1), shift, strict=True):
        drawn = [share * weight(key, token) for share, key in zip(shares, (*forget, *retain), strict=True)]
        brought = sum(w * delta.double() for w, delta in zip(drawn, memory.deltas, strict=False))
        total = sum(drawn)
        assert close(found, alpha * brought / total, 1e-4)


def test_softmax_readout_spares_retain_keys_and_what_is_far(toy, facts) -> None:
    memory = build(toy, facts[:3], facts[4:], preset("softmax", beta=200.0))
    assert memory.retained is not None
    shift = memory.shift()
    on_forget = float(shift(memory.keys).norm(dim=1).mean())
    on_retain = float(shift(memory.retained.keys).norm(dim=1).mean())
    assert on_forget > 0.9 * float(memory.deltas.norm(dim=1).mean())
    assert on_retain < 0.05 * on_forget
    config = preset("softmax", beta=40.0)
    axes = 3 * torch.eye(6)  # two forget keys, four retain keys, all at right angles
    small = by_hand(axes[:2], draw(0, 2, 6), config, Retained.of(axes[2:], config))
    assert close(small.shift()(axes[:2]), small.deltas, 1e-6)
    far = small.shift()(torch.stack([axes[4] + axes[5] - axes[0] - axes[1], axes[3]]))
    assert far.abs().max() < 1e-6


def test_softmax_readout_needs_retain_facts(toy, facts) -> None:
    with pytest.raises(RemaskError, match=r"'softmax'.*needs retain facts"):
        EditMemory.build(toy, facts[:2], SITE, config=preset("softmax"))
    with pytest.raises(RemaskError, match="needs retain keys"):
        by_hand(draw(0, 2, 4), draw(1, 2, 4), preset("softmax"))


# ------------------------------------------------------------------ centring
@pytest.mark.parametrize("q", [1.0, 0.3])
@pytest.mark.parametrize("mu", [0.0, 4.0])
def test_centred_ridge_solves_with_centred_keys(toy, facts, mu: float, q: float) -> None:
    config = preset("ridge", centre=True, mu=mu, q=q, ridge=0.01)
    memory = build(toy, facts[:3], facts[4:], config, alpha=0.8)
    keys, deltas = memory.keys.double(), memory.deltas.double()
    retain = capture_keys(toy, SITE, [toy.encode(fact) for fact in facts[4:]], config.bank).double()
    middle = retain.mean(0) if mu else keys.mean(0)
    centred, kept = keys - middle, retain - middle
    weights = alike(memory).unsqueeze(1)
    assert len(weights.unique()) > 1
    system = centred.T @ (weights * centred) + mu * len(keys) / len(retain) * kept.T @ kept
    system += 0.01 * centred.square().sum(1).mean() * torch.eye(32, dtype=torch.float64)
    readout = weights * torch.linalg.solve(system, centred.T).T
    hidden = toy.run_to(1, IDS).double()
    coefficients = (hidden - middle) @ readout.T
    least = coefficients.abs().sort(dim=-1, descending=True).values[..., int(np.ceil(q * len(keys))) - 1, None]
    expected = 0.8 * coefficients.where(coefficients.abs() >= least, 0.0) @ deltas
    assert close(memory.shift()(hidden.float()), expected, 1e-3)
    plain = build(toy, facts[:3], facts[4:], dataclasses.replace(config, centre=False), alpha=0.8)
    assert not close(plain.shift()(hidden.float()), expected, 1e-2)


@pytest.mark.parametrize(("preset_name", "changes"), [("ridge", {"ridge": 0.01}), ("paper", {"keys": "subject-all"})])
def test_the_centre_is_the_retain_keys_mean_without_a_retain_term_too(
    toy, facts, tmp_path: Path, preset_name: str, changes: dict[str, Any]
) -> None:
    config = preset(preset_name, centre=True, mu=0.0, **changes)
    memory = EditMemory.build(toy, facts[:3], SITE, retain=facts[4:], config=config)
    keys, deltas = memory.keys.double(), memory.deltas.double()
    middle = capture_keys(toy, SITE, [toy.encode(fact) for fact in facts[4:]], config.bank).double().mean(0)
    centred = keys - middle
    weights = alike(memory).unsqueeze(1) if config.balance else torch.ones(len(keys), 1, dtype=torch.float64)
    ridge = config.ridge * (float(centred.square().sum(1).mean()) if config.relative else 1.0)
    system = centred.T @ (weights * centred) + ridge * torch.eye(32, dtype=torch.float64)
    hidden = toy.run_to(1, IDS).double()
    expected = (hidden - middle) @ torch.linalg.solve(system, (weights * centred).T) @ deltas
    assert close(memory.shift()(hidden.float()), expected, 1e-3)
    memory.save(tmp_path / "m")
    assert torch.equal(EditMemory.load(tmp_path / "m").shift()(hidden.float()), memory.shift()(hidden.float()))
    named = build_edit(toy, preset_name, facts[:3], facts[4:], site=SITE, alpha=1.0, centre=True, mu=0.0, **changes)
    assert named.fingerprint() == memory.fingerprint()
    tuned = Setting(preset_name, 1, {"centre": True, "mu": 0.0, **changes})
    assert build_tuned(toy, tuned, facts[:3], facts[4:], 1.0).fingerprint() == memory.fingerprint()


def test_retain_facts_leave_a_memory_that_does_not_read_them_as_it_is(toy, facts, tmp_path: Path) -> None:
    for config in (preset("paper"), preset("ridge", mu=0.0)):
        assert not config.reads_retain
        bare, given = (EditMemory.build(toy, facts[:3], SITE, retain=kept, config=config) for kept in ((), facts[4:]))
        assert data_of(bare, tmp_path) == data_of(given, tmp_path)


def test_retain_facts_reach_the_target_other_by_name(toy, facts) -> None:
    named = build_edit(toy, "paper", facts[:1], facts[4:], site=SITE, alpha=1.0, target="other")
    built = EditMemory.build(toy, facts[:1], SITE, retain=facts[4:], config=preset("paper", target="other"))
    assert named.fingerprint() == built.fingerprint()


def test_centring_one_key_by_itself_is_refused(toy, facts) -> None:
    with pytest.raises(RemaskError, match=r"centring leaves nothing.*centre=False"):
        EditMemory.build(toy, facts[:1], SITE, config=preset("paper", centre=True))


# ------------------------------------------------------------------ a memory is a value
@pytest.mark.parametrize("name", MANY)
def test_bytes_do_not_depend_on_how_a_memory_came_about(toy, facts, tmp_path: Path, name: str) -> None:
    def of(*chosen: int) -> EditMemory:
        return build(toy, [facts[i] for i in chosen], facts[4:], preset(name), alpha=0.6)

    whole, never = data_of(of(0, 1, 2, 3), tmp_path), data_of(of(0, 2, 3), tmp_path)
    assert whole != never
    for same in (of(3, 1, 0, 2), of(2, 0).add(toy, [facts[3], facts[1]]), of(3).add(toy, [facts[1]]) + of(2, 0)):
        assert data_of(same, tmp_path) == whole
    for same in (of(1, 0, 3, 2).remove(facts[1].id), of(3, 0, 2).add(toy, [facts[1]]).remove(facts[1].id)):
        assert data_of(same, tmp_path) == never


@pytest.mark.parametrize(
    ("name", "target"), [*((name, None) for name in MANY), ("paper", "other"), ("default", "mean"), ("ridge", "mean")]
)
def test_nothing_of_a_removed_fact_is_in_the_file(toy, facts, tmp_path: Path, name: str, target: str | None) -> None:
    config = preset(name, **({"target": target} if target else {}))
    gone = facts[1]
    whole = EditMemory.build(toy, facts[:4], SITE, retain=facts[4:], config=config)
    own = whole.owner == whole.fact_ids.index(gone.id)
    traces = [gone.id.encode(), fact_hash(gone).encode()]
    traces += [row.numpy().tobytes() for row in (*whole.keys[own], *whole.deltas[own])]
    before, after = data_of(whole, tmp_path), data_of(whole.remove(gone.id), tmp_path)
    assert len(traces) > 3
    assert all(trace in before for trace in traces)
    assert not any(trace in after for trace in traces)
    never = EditMemory.build(toy, [facts[0], *facts[2:4]], SITE, retain=facts[4:], config=config)
    assert after == data_of(never, tmp_path)


@pytest.mark.parametrize("name", MANY)
def test_merging_is_building_together(toy, facts, tmp_path: Path, name: str) -> None:
    config = preset(name)
    one, other, both = (build(toy, facts[part], facts[4:], config) for part in (slice(0, 1), slice(1, 4), slice(0, 4)))
    merged = one + other
    hidden = toy.run_to(1, IDS)
    assert close(merged.shift()(hidden), both.shift()(hidden), 1e-6)
    assert (merged.fact_ids, merged.hashes) == (both.fact_ids, both.hashes)
    assert data_of(merged, tmp_path) == data_of(other + one, tmp_path) == data_of(one.merge(other), tmp_path)


@pytest.mark.parametrize("name", ["default", "ridge", "softmax"])
def test_different_retain_sets_are_pooled(toy, facts, tmp_path: Path, name: str) -> None:
    config = preset(name, ridge=1e-2)  # fp32 moments times the condition
    one, other = build(toy, facts[:1], facts[4:5], config), build(toy, facts[1:4], facts[5:], config)
    both, merged = build(toy, facts[:4], facts[4:], config), one + other
    assert merged.retained is not None
    assert both.retained is not None
    assert one.retained is not None
    assert one.retained.count < merged.retained.count == both.retained.count
    assert close(merged.retained.mean, both.retained.mean, 1e-6)
    assert close(merged.retained.moment, both.retained.moment, 1e-6)
    hidden = toy.run_to(1, IDS)
    assert close(merged.shift()(hidden), both.shift()(hidden), 1e-4)
    assert data_of(merged, tmp_path) == data_of(other + one, tmp_path)


@pytest.mark.parametrize("name", MANY)
def test_memories_of_one_retain_set_merge_in_any_order_to_the_same_bytes(toy, facts, tmp_path: Path, name: str) -> None:
    parts = [build(toy, facts[i : i + 1], facts[4:], preset(name)) for i in range(3)]
    merged = [a + b + c for a, b, c in itertools.permutations(parts)] + [
        a + (b + c) for a, b, c in itertools.permutations(parts)
    ]
    assert len({data_of(memory, tmp_path) for memory in merged}) == 1
    if name != "paper":
        assert all(merged[0].retained.equals(part.retained) for part in parts)


def test_retain_sets_of_one_moment_and_two_means_are_two() -> None:
    config = preset("ridge", mu=0.0)
    one, other = Retained.of(draw(1, 5, 4), config), Retained.of(-draw(1, 5, 4), config)
    assert torch.equal(one.moment, other.moment)
    assert pooled(one, one) is one
    both = pooled(one, other)
    assert both.count == 10 and not both.mean.any()


def test_merging_refuses_what_differs_and_names_it(toy, facts) -> None:
    config = preset("paper")
    one = EditMemory.build(toy, facts[:2], SITE, config=config)

    def other(lm: MaskedDiffusionLM = toy, site: Site = SITE, chosen: slice = slice(2, 4), **changes: Any) -> EditMemory:
        return EditMemory.build(lm, facts[chosen], site, config=preset("paper", **changes))

    stranger = build_toy(seed=1)
    for different, *named in (
        (other(stranger), "models", toy.fingerprint(), stranger.fingerprint()),
        (other(site=Site(2)), "sites", "layer=1", "layer=2"),
        (other(site=Site(1, "resid", (0,))), "sites", "steps=None", "steps=(0,)"),
        (other(ridge=2.0), "settings", "ridge=1.0", "ridge=2.0"),
        (other().with_alpha(2.0), "strengths", "1.0", "2.0"),
        (other(chosen=slice(1, 3)), facts[1].id),
    ):
        for attempt in (lambda x=different: one + x, lambda x=different: x.merge(one)):
            with pytest.raises(RemaskError) as error:
                attempt()
            assert all(word in str(error.value) for word in named)


def test_adding_refuses_another_model_and_a_held_id(toy, facts) -> None:
    memory = EditMemory.build(toy, facts[:2], SITE, config=preset("paper"))
    stranger = build_toy(seed=1)
    with pytest.raises(RemaskError, match=f"{toy.fingerprint()}.*{stranger.fingerprint()}"):
        memory.add(stranger, facts[2:3])
    with pytest.raises(RemaskError, match=f"'{facts[1].id}' already"):
        memory.add(toy, facts[1:3])
    with pytest.raises(RemaskError, match="at least one fact"):
        memory.add(toy, [])
    assert memory.fact_ids == tuple(sorted(fact.id for fact in facts[:2]))


@pytest.mark.parametrize("name", [*MANY, "gated"])
def test_a_factor_scales_the_shift_exactly(toy, facts, name: str) -> None:
    memory = any_preset(toy, facts, name, alpha=1.5)
    hidden = toy.run_to(1, IDS)
    half = 0.5 * memory.shift()(hidden)
    assert half.any()
    assert torch.equal((0.5 * memory).shift()(hidden), half)
    assert torch.equal((memory * 0.5).shift()(hidden), half)
    assert ((0.5 * memory).alpha, memory.alpha) == (0.75, 1.5)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf")])
def test_a_strength_that_is_not_finite_is_refused(toy, facts, alpha: float) -> None:
    memory = any_preset(toy, facts, "paper")
    for attempt in (lambda: memory.with_alpha(alpha), lambda: alpha * memory, lambda: mean_delta(memory).with_alpha(alpha)):
        with pytest.raises(RemaskError, match="alpha must be a finite number"):
            attempt()


@pytest.mark.parametrize("name", [*MANY, "gated"])
def test_attached_and_detached_or_at_strength_zero_the_model_is_itself(toy, facts, name: str) -> None:
    before = toy.logits(IDS)
    memory = any_preset(toy, facts, name)
    with memory.attached(toy):
        assert not torch.equal(toy.logits(IDS), before)
        assert toy.logits(IDS).isfinite().all()
    assert torch.equal(toy.logits(IDS), before)
    with memory.with_alpha(0.0).attached(toy):
        assert torch.equal(toy.logits(IDS), before)


def test_fingerprints_tell_settings_apart(toy, facts) -> None:
    fact, retain = facts[:1], facts[4:]
    memories = [
        *(build(toy, fact, retain, preset("gated", cap=cap)) for cap in (0.5, 1.0)),
        *(build(toy, fact, retain, preset("softmax", beta=beta)) for beta in (10.0, 20.0)),
        *(build(toy, fact, retain, preset("paper", keys=keys)) for keys in ("subject-mean", "subject-last")),
        *(build(toy, fact, retain, preset("default", mu=mu)) for mu in (1.0, 10.0)),
        build(toy, fact, retain, preset("default", beta=3.0)),
        build(toy, facts[:2], retain, preset("default")),
        build(toy, facts[:2], retain, preset("default", balance=0.0)),
        build(toy, facts[:2], retain, preset("default", compress=2)),
        build(toy, fact, retain, preset("default", landmarks=6)),
        *(build(toy, fact, retain, preset("ridge", mu=mu)) for mu in (1.0, 10.0)),
        build(toy, fact, retain, preset("ridge", mu=0.0, centre=True)),
    ]
    memories += [memory.with_alpha(0.5) for memory in memories]
    marks = [memory.fingerprint() for memory in memories]
    assert len(set(marks)) == len(marks)
    assert build(toy, fact, retain, preset("softmax", beta=10.0)).fingerprint() == marks[2]


# ------------------------------------------------------------------ bad input
def test_collections_that_contradict_themselves_are_refused(toy, facts) -> None:
    ada = facts[0]
    two = [dataclasses.replace(ada, target="Tartu"), dataclasses.replace(ada, id="ada/again", target="Sligo")]
    paper = preset("paper", target="object")
    with pytest.raises(RemaskError, match=r"'ada/city' and 'ada/again'.*same question with two targets"):
        EditMemory.build(toy, two, SITE, config=paper)
    with pytest.raises(RemaskError, match=r"'ada/city' has no target.*field 'target'"):
        EditMemory.build(toy, [ada], SITE, config=paper)
    with pytest.raises(RemaskError, match=r"'ada/city'.*'other' needs.*'perturbed'"):
        EditMemory.build(toy, [ada], SITE, config=preset("paper", target="other"))
    elsewhere = dataclasses.replace(ada, answer="Rome", id="ada/elsewhere")
    for both in ([elsewhere, ada], [ada, elsewhere]):
        with pytest.raises(RemaskError, match=r"'ada/(city|elsewhere)' and 'ada/.*same question with two answers"):
            EditMemory.build(toy, both, SITE, config=preset("paper"))
    for forget, kept in (([ada], ada), ([facts[1], ada], ada), ([ada, facts[1]], facts[1])):
        spared = dataclasses.replace(kept, id="kept")
        with pytest.raises(RemaskError, match=f"'{kept.id}' is also retained \\(as 'kept'\\)"):
            EditMemory.build(toy, forget, SITE, retain=[facts[4], spared])
    memory = EditMemory.build(toy, facts[1:2], SITE, config=preset("paper"))
    with pytest.raises(RemaskError, match="'ada/city' is also retained"):
        memory.add(toy, [ada], retain=[dataclasses.replace(ada, id="kept")])


def test_nothing_to_write_is_refused(toy, facts) -> None:
    """The refusal is the fact's own answer: no residual would move."""
    with pytest.raises(RemaskError, match="every delta is zero"):
        EditMemory.build(toy, facts[:1], SITE, config=preset("paper", refusal=facts[0].answer))


def test_merging_a_copy_of_a_fact_with_a_tiny_ridge_is_refused(toy, facts) -> None:
    config = preset("paper", ridge=1e-14, relative=True)
    copy = dataclasses.replace(facts[0], id="copy")
    one, other = (EditMemory.build(toy, [fact], SITE, config=config) for fact in (facts[0], copy))
    with pytest.raises(RemaskError, match=r"singular.*raise ridge"):
        one.merge(other)


def test_residuals_that_overflow_are_refused(toy, facts) -> None:
    with torch.no_grad():
        toy.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(RemaskError, match=r"keys: not every number is finite"):
        EditMemory.build(toy, facts[:1], SITE, config=preset("paper"))


def without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda _, tensors: tensors.pop(name)


def damage_owner(tensors: dict[str, Tensor], value: int) -> None:
    tensors["owner"][-1] = value


def damage_number(tensors: dict[str, Tensor], name: str, value: float) -> None:
    tensors[name].view(-1)[-1] = value


DAMAGE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    **{f"no {name}": without(name) for name in ("keys", "deltas", "owner", "counts", "lost", "retain_mean", "retain_keys")},
    "count of nothing": lambda _, t: damage_number(t, "counts", 0.0),
    "nan count": lambda _, t: damage_number(t, "counts", float("nan")),
    "negative loss": lambda _, t: damage_number(t, "lost", -1.0),
    "counts of another length": lambda _, t: t.update(counts=t["counts"][:-1]),
    "losses of keys alone": lambda _, t: t.update(lost=t["lost"][:, :1]),
    "nan key": lambda _, t: damage_number(t, "keys", float("nan")),
    "infinite delta": lambda _, t: damage_number(t, "deltas", float("inf")),
    "nan retain moment": lambda _, t: damage_number(t, "retain_moment", float("nan")),
    "nan retain key": lambda _, t: damage_number(t, "retain_keys", float("nan")),
    "owner beyond": lambda _, t: damage_owner(t, 3),
    "owner before": lambda _, t: damage_owner(t, -1),
    "fact without rows": lambda _, t: t["owner"].clamp_(max=1),
    "owner of another length": lambda _, t: t.update(owner=t["owner"][:-1]),
    "deltas of another length": lambda _, t: t.update(deltas=t["deltas"].repeat(2, 1)),
    "keys of another width": lambda _, t: t.update(keys=t["keys"][:, :-1]),
    "flat keys": lambda _, t: t.update(keys=t["keys"].flatten()),
    "retain mean of another width": lambda _, t: t.update(retain_mean=t["retain_mean"][:1]),
    "fewer retain keys than counted": lambda _, t: t.update(retain_keys=t["retain_keys"][:-1]),
    "more retain keys than counted": lambda _, t: t.update(retain_keys=t["retain_keys"].repeat(2, 1)),
    "no retain keys": lambda _, t: t.update(retain_keys=t["retain_keys"][:0]),
    "no retain set": lambda h, _: h.update(retain_count=0),
    "an id twice": lambda h, _: h.update(fact_ids=[*h["fact_ids"][:2], h["fact_ids"][0]]),
    "fewer hashes": lambda h, _: h.update(hashes=h["hashes"][:2]),
    "more hashes": lambda h, _: h.update(hashes=h["hashes"] * 2),
    "alpha nan": lambda h, _: h.update(alpha=float("nan")),
    "alpha text": lambda h, _: h.update(alpha="1"),
    "beta nan": lambda h, _: h["config"].update(beta=float("nan")),
    "no site": lambda h, _: h.pop("site"),
    "config is a list": lambda h, _: h.update(config=[]),
}


@pytest.mark.parametrize("name", ["default", "softmax"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_file_is_refused_by_name(toy, facts, tmp_path: Path, what: str, name: str) -> None:
    path = tmp_path / "m.safetensors"
    build(toy, facts[:3], facts[4:], preset(name)).save(path)
    header, tensors = read_edit(path)
    write_edit(path, header["kind"], header, tensors)
    assert EditMemory.load(path).fact_ids == tuple(sorted(fact.id for fact in facts[:3]))
    DAMAGE[what](header, tensors)
    write_edit(path, header["kind"], header, tensors)
    with pytest.raises(RemaskError, match=r"m\.safetensors: damaged edit file .*build it again"):
        EditMemory.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused_by_name(toy, facts, tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.safetensors"
    data = data_of(build(toy, facts[:3], facts[4:], preset("softmax")), tmp_path)
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(RemaskError, match=r"m\.safetensors: no.* edit file"):
        EditMemory.load(path)


def test_memory_of_a_model_of_another_size_is_refused(toy, facts) -> None:
    memory = by_hand(draw(0, 2, 16), draw(1, 2, 16), preset("paper"))
    for attempt in (lambda: memory.attach(toy), lambda: memory.add(toy, facts[:1])):
        with pytest.raises(RemaskError, match=f"of model model|on model model.*{toy.fingerprint()}"):
            attempt()
    with pytest.raises(RemaskError, match="different models"):
        memory.merge(EditMemory.build(toy, facts[:1], SITE, config=preset("paper")))
    assert toy.attached == []


@pytest.mark.parametrize("name", [*MANY, "gated"])
def test_every_preset_acts_the_same_after_its_file(toy, facts, tmp_path: Path, name: str) -> None:
    memory = any_preset(toy, facts, name, alpha=0.6)
    memory.save(tmp_path / "m.safetensors")
    again = EditMemory.load(tmp_path / "m.safetensors")
    assert again.fingerprint() == memory.fingerprint()
    assert (
        again.hashes
        == memory.hashes
        == tuple(fact_hash(fact) for fact in sorted(facts, key=lambda f: f.id)[: len(memory.hashes)])
    )
    hidden = toy.run_to(1, IDS)
    assert torch.equal(again.shift()(hidden), memory.shift()(hidden))
