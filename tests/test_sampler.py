"""The sampler's rules beyond the goldens: schedules, early stop, noise by keys, configurations that are refused."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remask.backbones import MaskedDiffusionLM
from remask.diffusion.sampler import SamplerConfig, generate, transfer_counts
from remask.errors import RemaskError


def prompts_of(rows) -> list[tuple[int, ...]]:
    return [row.prompt_ids for row in rows]


# ------------------------------------------------------------------ schedule
@pytest.mark.parametrize(
    ("masks", "steps", "expected"),
    [(10, 4, [3, 3, 2, 2]), (3, 5, [1, 1, 1, 0, 0]), (8, 4, [2, 2, 2, 2]), (0, 3, [0, 0, 0]), (7, 1, [7])],
)
def test_transfer_counts_by_hand(masks: int, steps: int, expected: list[int]) -> None:
    row = torch.zeros(1, 12, dtype=torch.bool)
    row[0, :masks] = True
    assert transfer_counts(row, steps).tolist() == [expected]


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 12))
def test_transfer_counts_spend_every_mask_evenly(masks: list[list[bool]], steps: int) -> None:
    counts = transfer_counts(torch.tensor(masks), steps)
    assert counts.sum(1).tolist() == [sum(row) for row in masks]
    for row in counts.tolist():
        assert row == sorted(row, reverse=True)
        assert max(row) - min(row) <= 1


# ------------------------------------------------------------------ early stop
def favour_eos(lm: MaskedDiffusionLM, amount: float) -> None:
    """Raise the end token's logit, so that some rows end early."""

    def hook(_module, _inputs, logits):
        logits = logits.clone()
        logits[..., lm.spec.eos_id] += amount
        return logits

    lm.model.lm_head.register_forward_hook(hook)


def test_stopping_at_the_end_token_changes_nothing_that_is_kept(toy, rows) -> None:
    block, eos = 4, toy.spec.eos_id
    favour_eos(toy, 2.0)
    config = {"gen_length": 16, "block_length": block, "steps": 16}
    whole = generate(toy, prompts_of(rows), SamplerConfig(**config))
    whole_tokens = toy.counters.tokens
    stopped = generate(toy, prompts_of(rows), SamplerConfig(**config, stop_at_eos=True))
    kept = []
    for full, short in zip(whole, stopped, strict=True):
        ends = full.response.index(eos) if eos in full.response else 15
        kept.append(block * (ends // block + 1))
        assert short.response[: kept[-1]] == full.response[: kept[-1]]
        assert set(short.response[kept[-1] :]) <= {eos}
        assert toy.decode(short.response) == toy.decode(full.response)
    assert min(kept) < 16, "no row ended early: the test shows nothing"
    assert len(set(kept)) > 1, "all rows ended together: the batch never shrank"
    assert toy.counters.tokens - whole_tokens < whole_tokens


def test_no_block_runs_after_every_row_has_ended(toy, rows) -> None:
    favour_eos(toy, 1e3)
    generate(toy, prompts_of(rows[:1]), SamplerConfig(gen_length=16, block_length=4, stop_at_eos=True))
    assert toy.counters.forwards == 4  # the first block only


def test_suppressed_end_token_is_never_written(toy, rows) -> None:
    favour_eos(toy, 1e3)
    for result in generate(toy, prompts_of(rows), SamplerConfig(gen_length=8, suppress_eos=True)):
        assert toy.spec.eos_id not in result.response
        assert toy.spec.mask_id not in result.response


# ------------------------------------------------------------------ canvas
def test_history_commits_once_and_block_by_block(toy, rows) -> None:
    config = SamplerConfig(gen_length=12, block_length=4, steps=6, temperature=0.5)
    prompt = rows[0].prompt_ids
    history = generate(toy, [prompt], config, history=True)[0].history
    assert len(history) == 7
    for step, (before, after) in enumerate(pairwise(history)):
        assert tuple(after[: len(prompt)]) == prompt
        changed = [i - len(prompt) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert len(changed) == 2
        assert all(before[i + len(prompt)] == toy.spec.mask_id for i in changed)
        assert {i // 4 for i in changed} == {step // 2}


def test_clock_tells_the_step_and_is_cleared_even_after_an_error(toy, rows) -> None:
    seen: list[int | None] = []
    hook = toy.blocks[0].register_forward_hook(lambda *_: seen.append(toy.clock.step))
    generate(toy, prompts_of(rows[:1]), SamplerConfig(gen_length=6, block_length=3, steps=4))
    assert seen == [0, 1, 2, 3]
    assert toy.clock.step is None
    hook.remove()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    toy.blocks[0].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(toy, prompts_of(rows[:1]), SamplerConfig(gen_length=6))
    assert toy.clock.step is None


# ------------------------------------------------------------------ noise
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_noise_is_a_function_of_seed_and_key(toy, rows, remasking: str) -> None:
    settings = {"gen_length": 8, "block_length": 4, "temperature": 1.0, "remasking": remasking}
    names = [row.id for row in rows]
    first = generate(toy, prompts_of(rows), SamplerConfig(**settings), keys=names)
    torch.manual_seed(1234)
    again = generate(toy, prompts_of(rows)[::-1], SamplerConfig(**settings), keys=names[::-1], token_budget=40)[::-1]
    assert [r.response for r in first] == [r.response for r in again]
    for row, result in zip(rows, first, strict=True):
        alone = generate(toy, [row.prompt_ids], SamplerConfig(**settings), keys=[row.id])
        assert alone[0].response == result.response
    other = generate(toy, prompts_of(rows), SamplerConfig(**settings, seed=1), keys=names)
    assert [r.response for r in first] != [r.response for r in other]


def test_equal_prompts_under_other_keys_differ(toy, rows) -> None:
    config = SamplerConfig(gen_length=8, temperature=1.0)
    a, b, c = generate(toy, [rows[0].prompt_ids] * 3, config, keys=["a", "b", "a"])
    assert a.response == c.response != b.response


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampled_tokens_follow_the_tempered_softmax(toy, rows, temperature: float) -> None:
    """Gumbel-max with one slot: frequencies are softmax(logits / temperature)."""
    prompt, n = rows[0].prompt_ids, 3000
    canvas = torch.tensor([[*prompt, toy.spec.mask_id]])
    expected = (toy.logits(canvas)[0, -1].double() / temperature).softmax(-1)
    config = SamplerConfig(gen_length=1, temperature=temperature)
    drawn = Counter(r.response[0] for r in generate(toy, [prompt] * n, config, token_budget=60_000))
    likely = [i for i in range(len(expected)) if expected[i] * n >= 30]
    assert len(likely) >= 3
    for token in likely:
        p = float(expected[token])
        assert abs(drawn[token] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n)


# ------------------------------------------------------------------ configuration
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gen_length": 0}, "gen_length"),
        ({"gen_length": -8}, "gen_length"),
        ({"gen_length": 10, "block_length": 4}, "multiple of block_length 4"),
        ({"gen_length": 8, "block_length": 16}, "multiple of block_length 16"),
        ({"gen_length": 8, "block_length": 2, "steps": 6}, "number of blocks 4"),
        ({"gen_length": 8, "block_length": 2, "steps": 2}, "number of blocks 4"),
        ({"gen_length": 8, "steps": -8}, "steps -8"),
        pytest.param(
            {"gen_length": 8, "block_length": -4},
            "block_length -4",
        ),
        pytest.param({"gen_length": 8, "steps": 0}, "steps 0"),
        pytest.param({"gen_length": 8, "block_length": 0}, "block_length 0"),
        ({"temperature": -0.1}, "temperature"),
        ({"remasking": "entropy"}, "remasking"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(RemaskError, match=words):
        SamplerConfig(**changes)


def test_defaults_come_from_the_model(toy) -> None:
    assert SamplerConfig.default(toy) == SamplerConfig(16, 16, 8, stop_at_eos=True)
    shorter = SamplerConfig.default(toy, gen_length=4)
    assert (shorter.gen_length, shorter.steps, shorter.block_length) == (4, 4, 4)
    assert SamplerConfig.default(toy, steps=4).steps == 4


def test_prompt_that_leaves_no_room_is_refused(toy) -> None:
    with pytest.raises(RemaskError, match=r"97 tokens.*96"):
        generate(toy, [[20] * 90], SamplerConfig(gen_length=7))
