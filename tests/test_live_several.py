"""Several memories in one model at once: they compose as a loop says, and each is switched, swapped and detached alone."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import remask
from conftest import FACTS, build_toy
from remask.backbones import MaskedDiffusionLM, Site
from remask.editing import EditMemory, preset
from test_attach import blocked, same_bits, thread

__all__ = ["blocked"]  # a fixture

IDS = torch.arange(20, 65).view(3, 15)
SITES = (Site(0), Site(1, "attn"), Site(2, "mlp"), Site(1), Site(1))  # the last two meet at one site


def build(lm: MaskedDiffusionLM, site: Site, number: int, alpha: float = 2.0) -> EditMemory:
    """A memory of two facts of its own; every second one keeps only part of its coefficients."""
    chosen = [FACTS[number % len(FACTS)], FACTS[(number + 3) % len(FACTS)]]
    return EditMemory.build(lm, chosen, site, config=preset("paper", q=0.5 if number % 2 else 1.0), alpha=alpha)


@pytest.fixture(scope="module")
def memories() -> list[EditMemory]:
    lm = build_toy()
    return [build(lm, site, number) for number, site in enumerate(SITES)]


def logits(lm: MaskedDiffusionLM) -> Tensor:
    with torch.inference_mode():
        return lm.logits(IDS).clone()


def written_out(hidden: Tensor, memory: EditMemory) -> Tensor:
    """h + alpha S_q(A h) D, token by token, in fp64."""
    result = hidden.double().clone()
    keep = -(-len(memory.keys) * int(memory.config.q * 100) // 100)
    for index in itertools.product(*map(range, hidden.shape[:-1])):
        coefficients = memory.solution.readout.double() @ hidden[index].double()
        order = sorted(range(len(coefficients)), key=lambda i: -abs(float(coefficients[i])))
        for i in order[:keep]:
            result[index] += memory.alpha * coefficients[i] * memory.deltas[i].double()
    return result.float()


@torch.inference_mode()
def loop(memories: Sequence[EditMemory]) -> Tensor:
    """The forward of the toy's Llama stack written out, with every memory in the order in which they were attached."""
    lm = build_toy()  # nothing is hooked into this one
    body: Any = lm.model.model

    def edited(hidden: Tensor, layer: int, module: str) -> Tensor:
        for memory in memories:
            if (memory.site.layer, memory.site.module) == (layer, module):
                hidden = written_out(hidden, memory)
        return hidden

    hidden = body.embed_tokens(IDS)
    rotary = body.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    for index, block in enumerate(body.layers):
        attended = block.self_attn(block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)[0]
        hidden = hidden + edited(attended, index, "attn")
        hidden = hidden + edited(block.mlp(block.post_attention_layernorm(hidden)), index, "mlp")
        hidden = edited(hidden, index, "resid")
    return lm.model.lm_head(body.norm(hidden))


# ------------------------------------------------------------------ what they compute
def test_memories_at_several_sites_compose_as_the_loop_says(toy, memories) -> None:
    base = logits(toy)
    torch.testing.assert_close(loop([]), base, rtol=1e-4, atol=1e-4)
    for memory in memories:
        remask.attach(toy.model, memory)
    together = logits(toy)
    torch.testing.assert_close(together, loop(memories), rtol=1e-3, atol=1e-3)
    for left_out in range(len(memories)):  # every one of them matters
        rest = [memory for index, memory in enumerate(memories) if index != left_out]
        assert (loop(rest) - together).abs().max() > 0.1


def test_at_one_site_the_second_sees_what_the_first_put_out(toy, memories) -> None:
    one, other = memories[3], memories[4]
    found = []
    for pair in ((one, other), (other, one)):
        lives = [remask.attach(toy.model, memory) for memory in pair]
        found.append(logits(toy))
        torch.testing.assert_close(found[-1], loop(pair), rtol=1e-3, atol=1e-3)
        for live in lives:
            live.detach()
    assert (found[0] - found[1]).abs().max() > 0.01


def test_attached_and_live_memories_are_the_same_bits_in_any_mixture(toy, memories) -> None:
    for memory in memories:
        memory.attach(toy)
    expected = logits(toy)
    assert toy.attached == memories
    for mixture in ((0, 1, 0, 1, 0), (1, 0, 0, 1, 1)):
        lm = build_toy()
        for live, memory in zip(mixture, memories, strict=True):
            remask.attach(lm.model, memory) if live else memory.attach(lm)
        assert same_bits(logits(lm), expected)


# ------------------------------------------------------------------ switched, changed and detached alone
def test_rows_of_each_are_switched_alone(toy, memories) -> None:
    """Rows do not mix, so a row is that of a model in which only its own memories are attached."""
    chosen = [memories[0], memories[2], memories[3]]
    masks = [torch.tensor(flags) for flags in ([True, False, True], [True, True, False], [False, True, True])]
    expected = []
    for row in range(3):
        with contextlib.ExitStack() as stack:
            for memory, mask in zip(chosen, masks, strict=True):
                if mask[row]:
                    stack.enter_context(memory.attached(toy))
            expected.append(logits(toy)[row])
    lives = [remask.attach(toy.model, memory, batch_capacity=4) for memory in chosen]
    everywhere = logits(toy)
    with contextlib.ExitStack() as stack:
        for live, mask in zip(lives, masks, strict=True):
            stack.enter_context(live.rows(mask))
        mixed = logits(toy)
    assert all(same_bits(mixed[row], expected[row]) for row in range(3))
    assert not any(same_bits(mixed[row], everywhere[row]) for row in range(3))
    assert same_bits(logits(toy), everywhere)


def test_strengths_versions_and_switches_are_each_their_own(toy, memories) -> None:
    one, other = (remask.attach(toy.model, memories[i]) for i in (0, 2))
    versions = one.version, other.version
    assert versions[0] != versions[1]
    one.strength = 0.5
    assert (one.strength, other.strength, other.version) == (0.5, 1.0, versions[1])
    torch.testing.assert_close(logits(toy), loop([0.5 * memories[0], memories[2]]), rtol=1e-3, atol=1e-3)
    one.enabled = False
    fresh = build_toy()
    remask.attach(fresh.model, memories[2])
    assert same_bits(logits(toy), logits(fresh)) and other.enabled


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_detached_in_any_order_bit_for_bit(toy, memories, order) -> None:
    """After every step the model is the one that never had those that are gone."""
    chosen = memories[1:]
    base = logits(toy)
    handles = [remask.attach(toy.model, m) if i % 2 else m.attach(toy) for i, m in enumerate(chosen)]
    left = list(range(4))
    for index in order:
        handles[index].detach()
        left.remove(index)
        fresh = build_toy()
        for other in left:
            chosen[other].attach(fresh)
        assert same_bits(logits(toy), logits(fresh))
    assert same_bits(logits(toy), base) and not toy.attached
    assert not any(module._forward_hooks for module in toy.model.modules())


# ------------------------------------------------------------------ threads
def test_one_is_swapped_while_another_is_held(toy, memories) -> None:
    """A generation that holds one memory does not keep the other from changing; its next forward runs the new one."""
    kept, swapped = remask.attach(toy.model, memories[0]), remask.attach(toy.model, memories[3])
    replacement = memories[3].with_alpha(5.0)
    version, seen = swapped.version, []
    started, changed = threading.Event(), threading.Event()

    def generate() -> None:
        with kept.hold():
            seen.append(logits(toy))
            started.set()
            assert changed.wait(30)
            seen.append(logits(toy))

    with thread(generate):
        assert started.wait(30)
        swapped.update(replacement)
        changed.set()
    fresh = build_toy()
    for index, second in enumerate((memories[3], replacement)):
        with memories[0].attached(fresh), second.attached(fresh):
            assert same_bits(seen[index], logits(fresh))
    assert swapped.version > version and not same_bits(*seen)


def test_a_generation_that_holds_both_sees_neither_change(toy, memories, blocked) -> None:
    lives = [remask.attach(toy.model, memories[i]) for i in (0, 3)]
    before, versions = logits(toy), [live.version for live in lives]
    changes: tuple[Callable[[], object], ...] = (lives[0].detach, lambda: lives[1].update(memories[3].with_alpha(5.0)))
    with contextlib.ExitStack() as end, lives[0].hold(), lives[1].hold():
        for change in changes:
            blocked.clear()
            end.enter_context(thread(change))
            assert blocked.wait(30)
        assert same_bits(logits(toy), before) and [live.version for live in lives] == versions
    fresh = build_toy()
    memories[3].with_alpha(5.0).attach(fresh)
    assert same_bits(logits(toy), logits(fresh))


def test_rows_of_one_hold_up_only_who_holds_that_one(toy, memories, blocked) -> None:
    one, other = (remask.attach(toy.model, memories[i], batch_capacity=3) for i in (0, 2))
    passed: list[str] = []

    def holds(live: Any, name: str) -> Callable[[], None]:
        def work() -> None:
            with live.hold():
                passed.append(name)

        return work

    with contextlib.ExitStack() as end, one.rows(torch.tensor([True, False, True])):
        with thread(holds(other, "other")):
            pass
        end.enter_context(thread(holds(one, "one")))
        assert blocked.wait(30) and passed == ["other"]
    assert passed == ["other", "one"]
