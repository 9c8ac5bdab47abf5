"""MEMIT and AlphaEdit against normal equations by explicit loops, the peers' formulas, and layer by layer by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from conftest import FACTS, build_toy
from remask.backbones import MaskedDiffusionLM, Site
from remask.backbones.weight_edit import LowRank, WeightEdit
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.editing import memit as memit_module
from remask.editing.alphaedit import AlphaEditConfig, alphaedit, alphaedit_readout, null_space
from remask.editing.covariance import ridged, second_moments
from remask.editing.lookups import Lookups, key_states, read_subjects
from remask.editing.memit import MemitConfig, memit, memit_readout
from remask.editing.values import Values
from remask.errors import RemaskError
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.experiments.unlearning import EditorConfig, apply
from remask.facts import Fact
from test_rome import TOLD, text_of


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def fixed_values(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Values are not optimised but given: delta [3, 32]."""
    delta = random(3, 32, seed=9).float()

    def given(_lm: object, facts: list[object], *_rest: object) -> Values:
        start = 0 if facts[0] is TOLD[0] else 1
        n = len(facts)
        return Values(delta[start : start + n], [1.0] * n, [0.5] * n, [0.1] * n, [1] * n)

    monkeypatch.setattr(memit_module, "optimise_values", given)
    return delta


def dense(edit: WeightEdit, layer: int) -> Tensor:
    change = edit.changes[f"model.layers.{layer}.mlp.down_proj.weight"]
    assert isinstance(change, LowRank)
    return change.dense()


def by_hand(
    lm: MaskedDiffusionLM, config: MemitConfig | AlphaEditConfig, goal: Tensor, layers: list[int], solve: Callable[..., Tensor]
) -> list[Tensor]:
    """Each layer's change in turn, added to the weights of `lm` for good; `goal` is what block layers[-1] is to put out."""
    lookups = Lookups.of(lm, TOLD, config)
    states, changes = key_states(lookups, config), []
    for index, layer in enumerate(layers):
        keys, output = read_subjects(lm, lookups, states, [layer], Site(layers[-1]))
        missing = (goal - output) / (len(layers) - index)
        changes.append((missing.T @ solve(layer, keys[layer])).float())
        lm.model.model.layers[layer].mlp.down_proj.weight.data += changes[-1]
    return changes


def test_the_readout_solves_the_normal_equations() -> None:
    """W minimises lambda tr(W C W^T) + sum_i |W k_i - r_i|^2: its gradient, summed token by token, is zero."""
    keys, text, residuals = random(4, 9), random(30, 9, seed=1), random(4, 5, seed=2)
    moment = sum(torch.outer(k, k) for k in text) / 30
    change = residuals.T @ memit_readout(keys, moment, 0.7)
    left, right = torch.zeros(9, 9, dtype=torch.float64), torch.zeros(5, 9, dtype=torch.float64)
    for key in text:
        for i in range(9):
            for j in range(9):
                left[i, j] += 0.7 / 30 * key[i] * key[j]
    for key, residual in zip(keys, residuals, strict=True):
        left += torch.outer(key, key)
        right += torch.outer(residual, key)
    torch.testing.assert_close(change, torch.linalg.solve(left, right.T).T)


def test_memit_layer_by_layer(toy: MaskedDiffusionLM, fixed_values: Tensor) -> None:
    config, text, layers = MemitConfig(layers=(0, 2), ridge=1e-2, draws=3), text_of(toy), [0, 2]
    edit = memit(toy, TOLD, text, config)
    moments = second_moments(toy, layers, text, config)
    lookups = Lookups.of(toy, TOLD, config)
    goal = read_subjects(toy, lookups, key_states(lookups, config), [], Site(2))[1] + fixed_values[:2]

    def solve(layer: int, keys: Tensor) -> Tensor:
        system = config.weight * 48 * ridged(moments[layer], 1e-2) + keys.T @ keys
        return keys @ torch.linalg.inv(system)

    for layer, change in zip(layers, by_hand(build_toy(), config, goal, layers, solve), strict=True):
        torch.testing.assert_close(dense(edit, layer), change, rtol=1e-3, atol=1e-3 * float(change.abs().max()))
    assert edit.preset == "memit" and edit.details["layers"] == layers
    assert not toy.attached


def test_a_small_weight_reaches_the_values(toy: MaskedDiffusionLM, fixed_values: Tensor) -> None:
    shares = [
        [
            fact["missing"]
            for fact in memit(toy, TOLD, text_of(toy), MemitConfig(layers=(1,), weight=weight)).details["facts"].values()
        ]
        for weight in (1e3, 1.0, 1e-6)
    ]
    assert min(shares[0]) > 0.8 and max(shares[2]) < 1e-2
    assert all(a > b > c for a, b, c in zip(*shares, strict=True))


def test_the_null_space_by_hand() -> None:
    """C = Q diag(8, 1, 0.5, 0.3, 0.2) Q^T, trace 10: 5 % of it are 0.2 + 0.3, 10 % also hold 0.5."""
    basis = torch.linalg.qr(random(5, 5)).Q
    moment = basis @ torch.diag(torch.tensor([8.0, 1.0, 0.5, 0.3, 0.2], dtype=torch.float64)) @ basis.T
    for config, rank in [
        (AlphaEditConfig(energy=0.0499), 1),
        (AlphaEditConfig(energy=0.0501), 2),
        (AlphaEditConfig(energy=0.1001), 3),
        (AlphaEditConfig(threshold=0.6), 3),
        (AlphaEditConfig(threshold=1.1), 4),
    ]:
        null = null_space(moment, config, 0)
        assert null.shape == (5, rank)
        torch.testing.assert_close(null @ null.T, basis[:, 5 - rank :] @ basis[:, 5 - rank :].T)
    with pytest.raises(RemaskError, match=r"layer 3: no direction .* raise threshold \(0.1; the smallest eigenvalue is 0.2\)"):
        null_space(moment, AlphaEditConfig(threshold=0.1), 3)
    with pytest.raises(RemaskError, match=r"layer 3: .* raise energy \(0.01\)"):
        null_space(moment, AlphaEditConfig(energy=0.01), 3)


def test_the_readout_is_the_peers_formula() -> None:
    keys, before, basis = random(3, 9), random(4, 9, seed=1), torch.linalg.qr(random(9, 6, seed=2)).Q
    projector, residuals = basis @ basis.T, random(3, 5, seed=3)
    scale = 0.3 * float((keys @ projector).square().sum() / 3)
    change = residuals.T @ alphaedit_readout(keys, before, basis, 0.3)
    system = projector @ (keys.T @ keys + before.T @ before) + scale * torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(change, torch.linalg.solve(system, projector @ keys.T @ residuals).T)
    preserved = torch.eye(9, dtype=torch.float64) - projector
    assert float((change @ preserved).abs().max()) < 1e-12


def test_without_a_projector_it_is_ridge_regression() -> None:
    keys, eye = random(3, 9), torch.eye(9, dtype=torch.float64)
    scale = 0.3 * float(keys.square().sum() / 3)
    torch.testing.assert_close(alphaedit_readout(keys, keys[:0], eye, 0.3), memit_readout(keys, eye, scale))


def test_keys_without_a_null_part_are_refused() -> None:
    with pytest.raises(RemaskError, match="no part in the null space; raise energy or threshold"):
        alphaedit_readout(
            torch.eye(4, dtype=torch.float64)[:1], torch.zeros(0, 4), torch.eye(4, dtype=torch.float64)[:, 2:], 0.1
        )


def test_alphaedit_in_batches(toy: MaskedDiffusionLM, fixed_values: Tensor) -> None:
    config, text = AlphaEditConfig(layers=(1,), batch=1, draws=3, energy=0.1), text_of(toy)
    edit = alphaedit(toy, TOLD, text, config)
    moment = second_moments(toy, [1], text, config)[1]
    values, vectors = torch.linalg.eigh(moment)
    null = vectors[:, values.cumsum(0) <= 0.1 * values.sum()]
    assert edit.details["null_space"] == {"1": {"rank": null.shape[1], "of": 48}} and 0 < null.shape[1] < 48
    projector, seen, total = null @ null.T, torch.zeros(48, 48, dtype=torch.float64), torch.zeros(32, 48)
    for fact, delta in zip(
        TOLD, fixed_values, strict=False
    ):  # layer 1's keys and what its output lacks do not change on the way
        lookups = Lookups.of(toy, [fact], config)
        keys = read_subjects(toy, lookups, key_states(lookups, config), [1], Site(1))[0][1]
        seen += keys.T @ keys
        scale = config.weight * float((keys @ projector).square().sum())
        system = projector @ seen + scale * torch.eye(48, dtype=torch.float64)
        total += torch.linalg.solve(system, projector @ keys.T @ delta.double()[None]).T.float()
    torch.testing.assert_close(dense(edit, 1), total, rtol=1e-3, atol=1e-3 * float(total.abs().max()))
    leak = (dense(edit, 1).double() @ moment @ dense(edit, 1).double().T).trace() / moment.trace()
    assert float(leak) <= 0.1 * float(dense(edit, 1).square().sum())
    once = alphaedit(toy, TOLD, text, config.model_copy(update={"batch": 2}))
    assert not torch.allclose(dense(once, 1), dense(edit, 1), rtol=1e-3)


@pytest.mark.parametrize("method", [memit, alphaedit])
def test_end_to_end_on_the_bundled_model(tiny: MaskedDiffusionLM, method: Callable[..., WeightEdit]) -> None:
    world = load_benchmark("closed-world", None)
    chosen = [fact for fact in world.validation if fact.id.endswith("city/short")][:2]
    facts = [dataclasses.replace(fact, target=fact.perturbed[0]) for fact in chosen]
    text = [tiny.encode(other) for other in world.fit[::8]]
    new, bank = [tiny.encode(fact, answer=fact.target) for fact in facts], MaskBank()
    before, logits = elbo(tiny, new, bank), tiny.logits(torch.tensor([new[0].ids]))
    config = {memit: MemitConfig, alphaedit: AlphaEditConfig}[method](steps=10)
    edit = method(tiny, facts, text, config)
    with edit.attached(tiny):
        after = elbo(tiny, new, bank)
    assert all(new.logprob > old.logprob + 2 for old, new in zip(before, after, strict=True))
    assert torch.equal(tiny.logits(torch.tensor([new[0].ids])), logits)
    assert edit.details["layers"] == [0, 1] and len(edit.changes) == 2


@pytest.mark.parametrize(("name", "config"), [("memit", MemitConfig()), ("alphaedit", AlphaEditConfig())])
def test_errors_name_the_method_not_a_memory(toy: MaskedDiffusionLM, tmp_path: Path, name: str, config: BaseModel) -> None:
    def told(facts: list[Fact]) -> WeightEdit:
        return apply(toy, facts, FACTS[4:], EditorConfig(method=name, options=config), tmp_path)

    with pytest.raises(RemaskError, match=f"^{name} needs at least one fact"):
        told([])
    with pytest.raises(RemaskError, match=f"^{name}: duplicate fact id"):
        told([FACTS[0], FACTS[0]])


@pytest.mark.parametrize("method", [memit, alphaedit])
def test_bad_input(toy: MaskedDiffusionLM, method: Callable[..., WeightEdit]) -> None:
    config = {memit: MemitConfig, alphaedit: AlphaEditConfig}[method]
    with pytest.raises(RemaskError, match="needs at least one fact"):
        method(toy, [], text_of(toy))
    with pytest.raises(RemaskError, match="site layer 4 is outside the model"):
        method(toy, TOLD, text_of(toy), config(layers=(1, 4)))
    with pytest.raises(RemaskError, match="there is none; pass --retain"):
        method(toy, TOLD, [])
    with pytest.raises(RemaskError, match="'ada/pet': the answer has no tokens"):
        method(toy, [FACTS[1]], text_of(toy), config(layers=(1,), refusal=""))
