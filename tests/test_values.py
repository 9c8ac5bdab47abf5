"""Keys and values at the last subject token against explicit loops and a plain optimisation of one fact at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import FACTS
from remask.backbones import MaskedDiffusionLM, Site
from remask.editing.lookups import Lookups, key_states, read_subjects
from remask.editing.values import ValueConfig, optimise_values
from remask.errors import RemaskError
from remask.facts import Fact
from test_covariance import keys_of

TOLD = [dataclasses.replace(FACTS[0], target="Varna"), dataclasses.replace(FACTS[3], target="a tame crow"), FACTS[4]]


def canvas(lm: MaskedDiffusionLM, prompt: tuple[int, ...], answer: tuple[int, ...], mask: np.ndarray) -> Tensor:
    return torch.tensor([*prompt, *(lm.spec.mask_id if hidden else i for i, hidden in zip(answer, mask, strict=True))])


def logits_with(lm: MaskedDiffusionLM, ids: Tensor, layer: int, position: int, delta: Tensor) -> Tensor:
    """Logits [L, V] with delta added to the MLP's output at one position, by running the blocks by hand."""

    def hook(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :position], output[:, position : position + 1] + delta, output[:, position + 1 :]], dim=1)

    handle = lm.model.model.layers[layer].mlp.register_forward_hook(hook)
    try:
        return lm.logits(ids[None])[0]
    finally:
        handle.remove()


def norms(lm: MaskedDiffusionLM, lookups: Lookups, config: ValueConfig, layer: int) -> Tensor:
    return read_subjects(lm, lookups, key_states(lookups, config), [], Site(layer))[1].norm(dim=1)


def reference(lm: MaskedDiffusionLM, fact: Fact, layer: int, norm: float, config: ValueConfig) -> Tensor:
    """The optimisation of one fact, canvas by canvas."""
    lookups = Lookups.of(lm, [fact], config)
    (row,) = lookups.rows
    last, start = row.subject[1] - 1, len(row.prompt_ids)
    asked = lm.encode(fact, prompt=f"{fact.subject} is a")
    slot = torch.tensor([*asked.prompt_ids, lm.spec.mask_id])
    where = asked.subject[1] - 1
    clean = lm.logits(slot[None])[0, -1].log_softmax(-1).detach()
    unit = torch.zeros(32, requires_grad=True)
    adam = torch.optim.Adam([unit], lr=config.learning_rate)
    for step in range(config.steps):
        delta, nats = unit * norm / 32**0.5, torch.zeros(())
        (masks,) = lookups.states(config, step)
        for mask in masks:
            logprobs = logits_with(lm, canvas(lm, row.prompt_ids, row.answer_ids, mask), layer, last, delta).log_softmax(-1)
            hidden = [i for i, masked in enumerate(mask) if masked]
            nats = nats - sum(logprobs[start + i, row.answer_ids[i]] for i in hidden) / len(hidden) / len(masks)
        edited = logits_with(lm, slot, layer, where, delta)[-1].log_softmax(-1)
        kl = (edited.exp() * (edited - clean)).sum()
        loss = nats + config.kl_factor * kl + config.weight_decay * delta.square().sum() / norm**2
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            length = unit.norm() / 32**0.5
            if length > config.clamp:
                unit *= config.clamp / length
    return (unit * norm / 32**0.5).detach()


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_factor": 0.0, "weight_decay": 0.0},
        {"kl_factor": 2.0, "weight_decay": 0.0},
        {"weight_decay": 3.0},
        {"states": "full-mask", "ends": 0},
        {"clamp": 0.15},
    ],
)
def test_all_facts_at_once_are_each_alone(toy: MaskedDiffusionLM, changes: dict[str, object]) -> None:
    config = ValueConfig(**{"steps": 4, "learning_rate": 0.1, "stop": 0.0, "draws": 3, "seed": 2, **changes})
    lookups = Lookups.of(toy, TOLD, config)
    norm = norms(toy, lookups, config, 1)
    values = optimise_values(toy, TOLD, Site(1, "mlp"), norm, lookups, config)
    for index, fact in enumerate(TOLD):
        expected = reference(toy, fact, 1, float(norm[index]), config)
        torch.testing.assert_close(values.delta[index], expected, rtol=2e-3, atol=2e-3 * float(expected.norm()))
    assert values.steps == [4, 4, 4]


def test_keys_and_outputs_are_means_over_wordings_and_states(toy: MaskedDiffusionLM) -> None:
    config = ValueConfig(prefixes=("So it is.", "Yes."), draws=5)
    lookups = Lookups.of(toy, TOLD, config)
    states = key_states(lookups, config)
    keys, outputs = read_subjects(toy, lookups, states, [0, 2], Site(1))
    for index, fact in enumerate(TOLD):
        found: dict[object, list[Tensor]] = {0: [], 2: [], "out": []}
        for prefix in ("", "So it is. ", "Yes. "):
            row = toy.encode(fact, prompt=prefix + fact.prompt, answer=fact.target or "I don't know.")
            answer = (*row.answer_ids, toy.spec.eos_id)
            masks = states[3 * index + ("", "So it is. ", "Yes. ").index(prefix)]
            assert masks.shape == (6, len(answer)) and masks[0].all()
            for mask in masks:
                ids, last = canvas(toy, row.prompt_ids, answer, mask), row.subject[1] - 1
                for layer in (0, 2):
                    found[layer].append(keys_of(toy, layer, ids)[last])
                found["out"].append(toy.run_to(1, ids[None])[0, last].detach().double())
        for layer in (0, 2):
            torch.testing.assert_close(keys[layer][index], torch.stack(found[layer]).mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outputs[index], torch.stack(found["out"]).mean(0), rtol=1e-4, atol=1e-4)


def test_only_the_vector_is_optimised(toy: MaskedDiffusionLM) -> None:
    before = {name: value.clone() for name, value in toy.model.state_dict().items()}
    toy.model.requires_grad_(True)
    config = ValueConfig(steps=3)
    lookups = Lookups.of(toy, TOLD, config)
    first = optimise_values(toy, TOLD, Site(1), norms(toy, lookups, config, 1), lookups, config)
    again = optimise_values(toy, TOLD, Site(1), norms(toy, lookups, config, 1), lookups, config)
    assert torch.equal(first.delta, again.delta) and not first.delta.requires_grad
    assert all(parameter.grad is None for parameter in toy.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in toy.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in toy.model.modules())
    other = ValueConfig(steps=3, seed=1)
    assert not torch.equal(
        optimise_values(toy, TOLD, Site(1), norms(toy, lookups, config, 1), lookups, other).delta, first.delta
    )


def test_the_loss_falls_and_the_clamp_holds(toy: MaskedDiffusionLM) -> None:
    config = ValueConfig(steps=15, clamp=0.5)
    lookups = Lookups.of(toy, TOLD, config)
    norm = norms(toy, lookups, config, 0)
    values = optimise_values(toy, TOLD, Site(0, "mlp"), norm, lookups, config)
    assert all(after < before - 0.05 for before, after in zip(values.before, values.after, strict=True))
    torch.testing.assert_close(values.delta.norm(dim=1), 0.5 * norm.float())
    torch.testing.assert_close(torch.tensor(values.relative), torch.full((3,), 0.5))


def test_kl_holds_the_essence(toy: MaskedDiffusionLM) -> None:
    def drift(factor: float) -> float:
        config = ValueConfig(steps=10, kl_factor=factor)
        lookups = Lookups.of(toy, TOLD[:1], config)
        values = optimise_values(toy, TOLD[:1], Site(1, "mlp"), norms(toy, lookups, config, 1), lookups, config)
        asked = toy.encode(TOLD[0], prompt="Ada Birk is a")
        ids, last = torch.tensor([*asked.prompt_ids, toy.spec.mask_id]), asked.subject[1] - 1
        with torch.no_grad():
            edited = logits_with(toy, ids, 1, last, values.delta[0])[-1].log_softmax(-1)
            return float((edited.exp() * (edited - toy.logits(ids[None])[0, -1].log_softmax(-1))).sum())

    assert drift(100.0) < 0.2 * drift(0.0)


def test_a_value_that_is_reached_is_left_alone(toy: MaskedDiffusionLM) -> None:
    config = ValueConfig(steps=5, stop=1e9)
    lookups = Lookups.of(toy, TOLD, config)
    values = optimise_values(toy, TOLD, Site(1), norms(toy, lookups, config, 1), lookups, config)
    assert values.steps == [0, 0, 0] and not values.delta.any()
    assert values.before == values.after


def test_one_fact_stops_before_the_others(toy: MaskedDiffusionLM) -> None:
    free = ValueConfig(steps=6, stop=0.0, states="full-mask")
    lookups = Lookups.of(toy, TOLD, free)
    norm = norms(toy, lookups, free, 1)
    start = optimise_values(toy, TOLD, Site(1), norm, lookups, free).before
    easiest = int(np.argmin(start))
    stop = 0.5 * (sorted(start)[0] + sorted(start)[1])
    config = free.model_copy(update={"stop": stop, "steps": 1})
    values = optimise_values(toy, TOLD, Site(1), norm, lookups, config)
    assert values.steps == [int(index != easiest) for index in range(3)]
    assert not values.delta[easiest].any()
    assert all(values.delta[index].any() for index in range(3) if index != easiest)


def test_broken_weights_and_objects_without_tokens_name_the_fact(toy: MaskedDiffusionLM) -> None:
    with pytest.raises(RemaskError, match="'cleo/city': the answer has no tokens"):
        Lookups.of(toy, TOLD, ValueConfig(refusal=""))
    config = ValueConfig()
    lookups = Lookups.of(toy, TOLD, config)
    toy.model.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(RemaskError, match="'ada/city': the loss of its value is not finite; lower learning_rate"):
        optimise_values(toy, TOLD, Site(1), torch.ones(3), lookups, config)
