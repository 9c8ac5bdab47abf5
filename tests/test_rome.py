"""ROME against the KKT system of its constrained least squares, explicit keys, and one fact after the other by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import FACTS, GOLDEN_OPTIONS, GOLDENS, build_toy
from remask.backbones import Encoded, MaskedDiffusionLM, Site, capture, load
from remask.backbones.weight_edit import LowRank, WeightEdit
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.editing.covariance import ridged, second_moments
from remask.editing.lookups import Lookups, key_states
from remask.editing.mlp import mlp_keys
from remask.editing.rome import RomeConfig, rank_one, rome
from remask.errors import RemaskError
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.facts import Fact
from test_covariance import keys_of
from test_values import canvas

TOLD = [dataclasses.replace(FACTS[0], target="Varna"), dataclasses.replace(FACTS[3], target="a tame crow")]
QUICK = RomeConfig(layer=1, steps=4, draws=3, ridge=1e-2)


def text_of(lm: MaskedDiffusionLM) -> list[Encoded]:
    return [lm.encode(fact) for fact in FACTS[4:]]


def only_change(edit: WeightEdit) -> tuple[Tensor, Tensor]:
    (change,) = edit.changes.values()
    assert isinstance(change, LowRank)
    return change.left.double(), change.right.double()


def mean_key(lm: MaskedDiffusionLM, fact: Fact, config: RomeConfig) -> Tensor:
    """The key k* [m] by a loop over states."""
    lookups = Lookups.of(lm, [fact], config)
    (row,), (masks,) = lookups.rows, key_states(lookups, config)
    last = row.subject[1] - 1
    canvases = [canvas(lm, row.prompt_ids, row.answer_ids, mask) for mask in masks]
    return torch.stack([keys_of(lm, config.layer or 0, ids)[last] for ids in canvases]).mean(0)


@pytest.mark.parametrize("seed", range(3))
def test_the_update_solves_the_constrained_least_squares(seed: int) -> None:
    """min tr(D C D^T) subject to D k = delta: for each row r of D, [[2 C, -k], [k^T, 0]] [r; mu] = [0; delta_r]."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    moment = text.T @ text / 40
    key, delta = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (9, 5))
    left, right = rank_one(delta, key, key, moment)
    system = torch.zeros(10, 10, dtype=torch.float64)
    system[:9, :9], system[:9, 9], system[9, :9] = 2 * moment, -key, key
    for row in range(5):
        solved = torch.linalg.solve(system, torch.cat([torch.zeros(9, dtype=torch.float64), delta[row : row + 1]]))
        torch.testing.assert_close((left @ right)[row], solved[:9])
    torch.testing.assert_close((left @ right) @ key, delta)
    plain = rank_one(delta, key, key, None)
    torch.testing.assert_close(plain[0] @ plain[1], torch.outer(delta, key) / key.dot(key))


def test_the_edited_matrix_maps_the_key_to_the_value(toy: MaskedDiffusionLM) -> None:
    fact = TOLD[0]
    edit = rome(toy, [fact], text_of(toy), QUICK)
    assert list(edit.changes) == ["model.layers.1.mlp.down_proj.weight"] and edit.preset == "rome"
    left, right = only_change(edit)
    assert left.shape == (32, 1) and right.shape == (1, 48)
    key = mean_key(toy, fact, QUICK)
    weight = toy.model.model.layers[1].mlp.down_proj.weight
    old = weight.detach().double() @ key
    with edit.attached(toy):
        new = weight.detach().double() @ key
    torch.testing.assert_close(new, old + left[:, 0], rtol=1e-5, atol=1e-5 * float(left.norm()))
    report = edit.details["facts"]["ada/city"]
    assert report["nats_after"] < report["nats_before"] and report["steps"] == 4
    moment = ridged(second_moments(toy, [1], text_of(toy), QUICK)[1], QUICK.ridge)
    direction = torch.linalg.solve(moment, key)
    torch.testing.assert_close(right[0], direction / (direction @ key), rtol=1e-3, atol=1e-3 * float(right.norm()))


def test_the_original_divides_by_the_bare_prompts_key(toy: MaskedDiffusionLM) -> None:
    config = QUICK.model_copy(update={"asymmetric": True, "covariance": False, "prefixes": ("So it is.",)})
    _, right = only_change(rome(toy, TOLD[:1], [], config))
    row = toy.encode(TOLD[0], answer="Varna")
    masked = torch.tensor(row.prompt_ids + (toy.spec.mask_id,) * (len(row.answer_ids) + 1))
    bare = keys_of(toy, 1, masked)[row.subject[1] - 1]
    torch.testing.assert_close(right[0] @ bare, torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    _, fair = only_change(rome(toy, TOLD[:1], [], config.model_copy(update={"asymmetric": False})))
    torch.testing.assert_close(right / right.norm(), fair / fair.norm(), rtol=1e-5, atol=1e-5)
    assert abs(float(fair[0] @ bare) - 1) > 1e-3


def test_facts_are_told_one_after_the_other(toy: MaskedDiffusionLM) -> None:
    both = only_change(rome(toy, TOLD, text_of(toy), QUICK))
    first = rome(toy, TOLD[:1], text_of(toy), QUICK)
    baked = build_toy()
    with torch.no_grad():
        baked.model.model.layers[1].mlp.down_proj.weight += next(iter(first.changes.values())).dense()
    second = only_change(rome(baked, TOLD[1:], text_of(baked), QUICK))  # keys of a layer do not depend on its own output matrix
    for together, former, latter, axis in zip(both, only_change(first), second, (1, 0), strict=True):
        torch.testing.assert_close(together, torch.cat([former, latter], axis), rtol=1e-3, atol=1e-4)
    assert not toy.attached


def test_matrices_that_are_stored_transposed(toy: MaskedDiffusionLM) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=96, n_embd=32, n_layer=2, n_head=2))
    torch.nn.init.normal_(model.transformer.h[0].mlp.c_proj.bias)
    lm = MaskedDiffusionLM(model, toy.tokenizer, toy.spec, "gpt2")
    edit = rome(lm, TOLD[:1], [], QUICK.model_copy(update={"layer": 0, "covariance": False}))
    change = edit.changes["transformer.h.0.mlp.c_proj.weight"]
    assert change.shape == (128, 32)
    row = lm.encode(TOLD[0], answer="Varna")
    ids = torch.tensor([row.prompt_ids + (lm.spec.mask_id,) * (len(row.answer_ids) + 1)])

    def output() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), mlp_keys(lm, [0]) as keys, capture(lm, [Site(0, "mlp")]) as outputs:
            lm.run_to(0, ids)
        return keys[0][0, row.subject[1] - 1], outputs[Site(0, "mlp")][0, row.subject[1] - 1]

    key, before = output()
    with edit.attached(lm):
        after = output()[1]
    torch.testing.assert_close(after - before, key @ change.dense(), rtol=1e-3, atol=1e-4)
    assert float((after - before).norm()) > 0.1 * float(before.norm())


def test_end_to_end_on_the_bundled_model(tiny: MaskedDiffusionLM, tmp_path: Path) -> None:
    world = load_benchmark("closed-world", None)
    fact = next(fact for fact in world.validation if fact.id.endswith("city/short"))
    fact = dataclasses.replace(fact, target=fact.perturbed[0])
    text = [tiny.encode(other) for other in world.fit[::8]]
    new, bank = [tiny.encode(fact, answer=fact.target)], MaskBank()
    before, logits = elbo(tiny, new, bank)[0].logprob, tiny.logits(torch.tensor([new[0].ids]))
    edit = rome(tiny, [fact], text, RomeConfig(steps=10))
    with edit.attached(tiny):
        assert elbo(tiny, new, bank)[0].logprob > before + 3
    assert torch.equal(tiny.logits(torch.tensor([new[0].ids])), logits)
    assert edit.details["layers"] == [1] and edit.details["cost"]["forwards"] > 0
    edit.save(tmp_path / "edit.safetensors")
    assert WeightEdit.load(tmp_path / "edit.safetensors").fingerprint() == edit.fingerprint()


def test_bad_input(toy: MaskedDiffusionLM) -> None:
    with pytest.raises(RemaskError, match="ROME needs at least one fact"):
        rome(toy, [], text_of(toy), QUICK)
    with pytest.raises(RemaskError, match="ROME: duplicate fact id 'ada/city'"):
        rome(toy, [FACTS[0], FACTS[0]], text_of(toy), QUICK)
    with pytest.raises(RemaskError, match="site layer 3 is outside the model"):
        rome(toy, TOLD, text_of(toy), QUICK.model_copy(update={"layer": 3}))
    with pytest.raises(RemaskError, match="there is none; pass --retain"):
        rome(toy, TOLD, [], QUICK)
    with pytest.raises(RemaskError, match=r"48 dimensions\) is singular: raise ridge, or pass more text"):
        rome(toy, TOLD, text_of(toy)[:1], QUICK.model_copy(update={"ridge": 0.0}))
    experts = load(GOLDENS / "llada_moe", **GOLDEN_OPTIONS["llada_moe"])
    with pytest.raises(RemaskError, match="mixture-of-experts"):
        rome(experts, TOLD, text_of(toy), RomeConfig())
    edit = rome(toy, TOLD[:1], [], QUICK.model_copy(update={"covariance": False}))
    with edit.attached(toy), pytest.raises(RemaskError, match="has a weight edit attached; detach it before ROME"):
        rome(toy, TOLD, [], QUICK)
