"""The sampler's rules beyond the goldens: schedules, early stop, noise by keys, configurations that are refused."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remask.backbones import MaskedDiffusionLM
from remask.diffusion.sampler import PRESETS, SamplerConfig, generate, infill, transfer_counts
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


def test_filling_behind_the_end_token_writes_nothing_else(toy, rows) -> None:
    """Step by step: masks behind the first end token are gone at once, everything else commits one a step."""
    eos, mask = toy.spec.eos_id, toy.spec.mask_id
    favour_eos(toy, 2.0)
    config = SamplerConfig(gen_length=16, block_length=8, fill_after_eos=True)
    prompts = prompts_of(rows)
    filled = 0
    for prompt, result in zip(prompts, generate(toy, prompts, config, history=True), strict=True):
        assert mask not in result.response
        for old, new in zip(result.history, result.history[1:], strict=False):
            changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
            ends = [i for i in range(len(prompt), len(new)) if new[i] == eos]
            behind = [i for i in changed if ends and i > ends[0]]
            assert all(new[i] == eos for i in behind if len(changed) > 1)
            assert len(changed) - len(behind) <= 1
            if ends:
                assert mask not in new[ends[0] :]
            filled += len(behind)
    assert filled, "no row ended early: the test shows nothing"


def test_filling_behind_the_end_token_saves_steps(toy, rows) -> None:
    favour_eos(toy, 1e3)
    generate(toy, prompts_of(rows[:1]), SamplerConfig(gen_length=16, fill_after_eos=True))
    assert toy.counters.forwards <= 16
    first = toy.counters.forwards
    generate(toy, prompts_of(rows[:1]), SamplerConfig(gen_length=16))
    assert first < toy.counters.forwards - first == 16


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
@pytest.mark.parametrize(
    "changes",
    [
        {"block_length": 4},
        {"block_length": 4, "confidence": "random"},
        {"schedule": "ratio", "confidence": "margin", "order_temperature": 0.5, "steps": 5},
        {"schedule": "ratio", "confidence": "random", "steps": 5},
        {"schedule": "harmonic", "confidence": "random", "top_p": 0.9},
        {"schedule": "threshold", "threshold": 0.1, "tempered_confidence": True, "top_k": 20},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_noise_is_a_function_of_seed_and_key(toy, rows, changes: dict) -> None:
    settings = {"gen_length": 8, "temperature": 1.0} | changes
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


def test_candidates_are_the_smallest_set_that_holds_top_p(toy, rows) -> None:
    """One slot: what is drawn follows the tempered softmax, renormalised over the nucleus found by adding up."""
    prompt, n, temperature, top_p = rows[1].prompt_ids, 3000, 0.8, 0.7
    canvas = torch.tensor([[*prompt, toy.spec.mask_id]])
    shares = (toy.logits(canvas)[0, -1].double() / temperature).softmax(-1).tolist()
    nucleus: list[int] = []
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        if sum(shares[kept] for kept in nucleus) > top_p:
            break
        nucleus.append(token)
    config = SamplerConfig(gen_length=1, temperature=temperature, top_p=top_p)
    drawn = Counter(r.response[0] for r in generate(toy, [prompt] * n, config, token_budget=60_000))
    assert set(drawn) == set(nucleus)
    assert len(nucleus) > 2
    for token in nucleus:
        p = shares[token] / sum(shares[kept] for kept in nucleus)
        assert abs(drawn[token] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n)
    two = generate(toy, [prompt] * 200, replace(config, top_p=1.0, top_k=2), token_budget=60_000)
    assert {r.response[0] for r in two} == set(sorted(range(len(shares)), key=lambda token: -shares[token])[:2])


def test_order_temperature_draws_positions_by_softmax_of_confidence(toy, rows) -> None:
    prompt, n, slots, temperature = rows[0].prompt_ids, 3000, 4, 0.004
    canvas = torch.tensor([[*prompt, *[toy.spec.mask_id] * slots]])
    sure = toy.logits(canvas)[0, -slots:].double().softmax(-1).amax(-1)
    expected = (sure / temperature).softmax(-1).tolist()
    config = SamplerConfig(gen_length=slots, order_temperature=temperature)
    runs = generate(toy, [prompt] * n, config, history=True, token_budget=100_000)
    first = Counter(next(i for i in range(slots) if run.history[1][len(prompt) + i] != toy.spec.mask_id) for run in runs)
    for i, p in enumerate(expected):
        assert abs(first[i] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("schedule", ["harmonic", "ratio"])
def test_independent_commits_leave_the_share_that_the_schedule_says(toy, rows, schedule: str) -> None:
    """A position is masked after step i with the product of the shares kept, which telescopes to the schedule's time."""
    prompt, n, slots, steps = rows[0].prompt_ids, 600, 6, 4
    config = SamplerConfig(gen_length=slots, steps=steps, schedule=schedule, confidence="random")
    runs = generate(toy, [prompt] * n, config, history=True, token_budget=100_000)
    for i in range(1, steps + 1):
        masked = sum(run.history[min(i, len(run.history) - 1)].count(toy.spec.mask_id) for run in runs) / (n * slots)
        time = 1 - i / steps
        assert abs(masked - time) < 0.002 + 4.5 * math.sqrt(time * (1 - time) / (n * slots))
    counts = Counter(slots - run.history[1].count(toy.spec.mask_id) for run in runs)
    assert len(counts) > 3, "positions are drawn one by one, not a fixed number of them"


# ------------------------------------------------------------------ schedules
def committed(history: list[list[int]], mask_id: int) -> list[int]:
    left = [canvas.count(mask_id) for canvas in history]
    return [before - after for before, after in pairwise(left)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("equal", [3, 3, 2, 2]),
        ("harmonic", [2, 2, 3, 3]),
        # shares 0.24975, 0.3329, 0.499, 1: floor of 10, 8, 6, 4 times these
        ("ratio", [2, 2, 2, 4]),
    ],
)
def test_schedules_by_hand(toy, rows, schedule: str, expected: list[int]) -> None:
    [run] = generate(toy, prompts_of(rows[:1]), SamplerConfig(gen_length=10, steps=4, schedule=schedule), history=True)
    assert committed(run.history, toy.spec.mask_id) == expected


def test_threshold_takes_all_that_exceed_it_and_else_the_equal_split(toy, rows) -> None:
    """Thresholds 0 and 1 are one step a block and the equal split; between them each step is recomputed from the logits."""
    settings = {"gen_length": 8, "block_length": 4}
    prompt, mask_id = rows[0].prompt_ids, toy.spec.mask_id
    everything = SamplerConfig(**settings, schedule="threshold", threshold=0.0)
    [run] = generate(toy, [prompt], everything, history=True)
    assert committed(run.history, mask_id) == [4, 4]
    assert toy.counters.forwards == 2
    [never] = generate(toy, [prompt], replace(everything, threshold=1.0), history=True)
    assert never == generate(toy, [prompt], SamplerConfig(**settings), history=True)[0]
    sizes = set()
    for row in rows:
        [run] = generate(toy, [row.prompt_ids], replace(everything, threshold=0.035), history=True)
        start = len(row.prompt_ids)
        for before, after in pairwise(run.history):
            block = next(low for low in (start, start + 4) if mask_id in before[low : low + 4])
            open_ = [i for i in range(block, block + 4) if before[i] == mask_id]
            sure, tokens = toy.logits(torch.tensor([before]))[0].softmax(-1).max(-1)
            order = sorted(open_, key=lambda i: -float(sure[i]))
            take = [i for i in order if float(sure[i]) > 0.035] or order[:1]
            assert after == [int(tokens[i]) if i in take else token for i, token in enumerate(before)]
            sizes.add(len(take))
    assert {1, 2, 3} <= sizes


@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy"])
def test_the_most_confident_position_commits_first(toy, rows, confidence: str) -> None:
    def score(shares: list[float]) -> float:
        ordered = sorted(shares, reverse=True)
        if confidence == "entropy":
            return sum(p * math.log(p) for p in shares if p > 0)
        return ordered[0] - (ordered[1] if confidence == "margin" else 0)

    for row in rows[:4]:
        start = len(row.prompt_ids)
        [run] = generate(toy, [row.prompt_ids], SamplerConfig(gen_length=6, confidence=confidence), history=True)
        for before, after in pairwise(run.history):
            shares = toy.logits(torch.tensor([before]))[0].double().softmax(-1).tolist()
            open_ = [i for i in range(start, start + 6) if before[i] == toy.spec.mask_id]
            best = max(open_, key=lambda i: score(shares[i]))
            assert [i for i in open_ if after[i] != toy.spec.mask_id] == [best]


def test_fp64_confidence_tells_apart_what_fp32_rounds_to_one(toy, monkeypatch) -> None:
    """Certainties 1 - e^-18, 1 - e^-19, 1 - e^-20, all 1 in fp32."""

    def logits(ids, attention_mask=None, positions=None):
        rows = torch.full((*ids.shape, 2), 0.0)
        rows[0, -3:, 0] = torch.tensor([18.0, 19.0, 20.0])
        return rows[positions]

    monkeypatch.setattr(toy, "logits", logits)
    config = SamplerConfig.preset("mmada", gen_length=3, block_length=3)
    [run] = generate(toy, [[20]], config, history=True)
    order = [next(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b) for pair in pairwise(run.history)]
    assert order == [3, 2, 1]


def test_steps_at_which_nothing_commits_cost_no_forward(toy, rows) -> None:
    config = SamplerConfig(gen_length=8, steps=16, schedule="ratio")
    [run] = generate(toy, prompts_of(rows[:1]), config, history=True)
    busy = sum(count > 0 for count in committed(run.history, toy.spec.mask_id))
    assert toy.counters.forwards == busy < 16


# ------------------------------------------------------------------ infilling
def holes(lm: MaskedDiffusionLM, rows, every: int) -> list[list[int]]:
    return [[lm.spec.mask_id if i % every == 1 else token for i, token in enumerate(row.ids)] for row in rows]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=5), st.sampled_from([None, 1, 3]))
def test_infilling_fills_every_mask_and_keeps_every_token(toy, patterns: list[list[bool]], block: int | None) -> None:
    canvases = [[toy.spec.mask_id if hole else 20 + i for i, hole in enumerate(pattern)] for pattern in patterns]
    results = infill(toy, canvases, SamplerConfig(block_length=block, gen_length=block or 128), history=True)
    for canvas, result in zip(canvases, results, strict=True):
        assert toy.spec.mask_id not in result.response
        assert [b for a, b in zip(canvas, result.response, strict=True) if a != toy.spec.mask_id] == [
            a for a in canvas if a != toy.spec.mask_id
        ]
        assert len(result.history) == canvas.count(toy.spec.mask_id) + 1
        filled = [next(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b) for pair in pairwise(result.history)]
        if block is not None:  # consecutive masks, a block at a time
            slots = [i for i, token in enumerate(canvas) if token == toy.spec.mask_id]
            assert [slots.index(i) // block for i in filled] == sorted(slots.index(i) // block for i in filled)


def test_a_single_hole_takes_the_likeliest_token(toy, rows) -> None:
    for row in rows:
        canvas = list(row.ids)
        canvas[3] = toy.spec.mask_id
        expected = int(toy.logits(torch.tensor([canvas]))[0, 3].argmax())
        assert infill(toy, [canvas], SamplerConfig())[0].response[3] == expected


def test_infilling_does_not_depend_on_batching(toy, rows) -> None:
    canvases = holes(toy, rows, 3) + holes(toy, rows, 4)
    config = SamplerConfig(block_length=2, gen_length=2, temperature=0.8, confidence="random")
    names = [str(i) for i in range(len(canvases))]
    together = infill(toy, canvases, config, keys=names)
    for canvas, name, result in zip(canvases, names, together, strict=True):
        assert infill(toy, [canvas], config, keys=[name])[0].response == result.response


def test_infilling_that_stops_fills_masks_only(toy) -> None:
    favour_eos(toy, 1e3)
    mask_id, eos = toy.spec.mask_id, toy.spec.eos_id
    canvas = [20, mask_id, 21, mask_id, mask_id, 22]
    [result] = infill(toy, [canvas], SamplerConfig(gen_length=1, block_length=1, stop_at_eos=True))
    assert result.response == [20, eos, 21, eos, eos, 22]
    assert toy.counters.forwards == 1


def test_generating_is_infilling_the_end(toy, rows) -> None:
    config = SamplerConfig(gen_length=8, block_length=4, steps=4)
    for row in rows[:3]:
        [whole] = infill(toy, [[*row.prompt_ids, *[toy.spec.mask_id] * 8]], config, history=True)
        [end] = generate(toy, [row.prompt_ids], config, history=True)
        assert whole.response == [*row.prompt_ids, *end.response]
        assert whole.history == end.history


def test_canvas_without_masks_comes_back_as_it_is(toy, rows) -> None:
    [result] = infill(toy, [rows[0].ids], SamplerConfig(), history=True)
    assert result.response == list(rows[0].ids)
    assert result.history == [list(rows[0].ids)]
    assert toy.counters.forwards == 0
    assert infill(toy, [], SamplerConfig()) == []


def test_aligned_blocks_lie_on_the_grid_of_the_canvas(toy) -> None:
    """A prompt of 6 tokens and blocks of 4: the first block holds two slots, and the canvas ends with a block."""
    config = SamplerConfig(gen_length=7, block_length=4, aligned=True)
    [run] = generate(toy, [[20, 21, 22, 23, 24, 25]], config, history=True)
    assert len(run.response) == 7
    assert {len(canvas) for canvas in run.history} == {16}
    filled = [next(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b) for pair in pairwise(run.history)]
    assert [i // 4 for i in filled] == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


# ------------------------------------------------------------------ configuration
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gen_length": 0}, "gen_length 0"),
        ({"gen_length": -8}, "gen_length -8"),
        ({"gen_length": 10, "block_length": 4}, "multiple of block_length 4"),
        ({"gen_length": 8, "block_length": 16}, "multiple of block_length 16"),
        ({"gen_length": 8, "block_length": 2, "steps": 6}, "number of blocks 4"),
        ({"gen_length": 8, "block_length": 2, "steps": 2}, "number of blocks 4"),
        ({"gen_length": 9, "block_length": 4, "aligned": True, "steps": 4}, "number of blocks 3"),
        ({"gen_length": 8, "steps": -8}, "steps -8"),
        ({"gen_length": 8, "steps": 0}, "steps 0"),
        ({"gen_length": 8, "block_length": -4}, "block_length -4"),
        ({"gen_length": 8, "block_length": 0}, "block_length 0"),
        ({"aligned": True}, "aligned blocks need a block_length"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"order_temperature": -1.0}, "order_temperature -1.0"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"confidence": "low_confidence"}, "confidence 'low_confidence' is unknown; choose one of probability, margin"),
        ({"schedule": "cosine"}, "schedule 'cosine' is unknown; choose one of equal, ratio"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(RemaskError, match=words):
        SamplerConfig(**changes)


def test_presets_refuse_what_the_originals_refuse() -> None:
    with pytest.raises(RemaskError, match="preset 'lladaa' is unknown; choose one of llada, mmada, dream"):
        SamplerConfig.preset("lladaa")
    for name in ("llada", "mmada"):
        with pytest.raises(RemaskError, match="gen_length 100 must be a multiple of block_length 32"):
            SamplerConfig.preset(name, gen_length=100, block_length=32)
    assert SamplerConfig.preset("llada2", gen_length=100).num_blocks == 4
    assert SamplerConfig.preset("dream", gen_length=100).num_blocks == 1


def test_defaults_come_from_the_model(toy) -> None:
    assert SamplerConfig.default(toy) == SamplerConfig(gen_length=16, block_length=8, fill_after_eos=True)
    shorter = SamplerConfig.default(toy, gen_length=4)
    assert (shorter.gen_length, shorter.num_blocks, shorter.block_steps(4)) == (4, 1, 4)
    assert SamplerConfig.default(toy, gen_length=24).num_blocks == 3
    assert SamplerConfig.default(toy, steps=4).steps == 4


@pytest.mark.parametrize("name", PRESETS)
def test_default_of_every_preset_is_deterministic_and_ends_with_a_full_canvas(toy, rows, name: str) -> None:
    toy.spec = replace(toy.spec, sampler=name)
    config = SamplerConfig.default(toy)
    assert config.gen_length == 16
    first = generate(toy, prompts_of(rows), config)
    assert first == generate(toy, prompts_of(rows), replace(config, seed=7))
    assert all(len(result.response) == 16 and toy.spec.mask_id not in result.response for result in first)
    if config != SamplerConfig.preset(name, gen_length=16, block_length=config.block_length):
        assert (config.temperature, config.order_temperature) == (0.0, 0.0)
        assert config.confidence != "random"


# ------------------------------------------------------------------ refused rows
def test_prompt_that_leaves_no_room_is_refused(toy) -> None:
    with pytest.raises(RemaskError, match=r"97 tokens.*96"):
        generate(toy, [[20] * 90], SamplerConfig(gen_length=7))
    assert toy.counters.forwards == 0


def test_guidance_needs_a_prompt(toy) -> None:
    guided = SamplerConfig(gen_length=4, cfg_scale=1.0)
    with pytest.raises(RemaskError, match=r"row '1' has no prompt to guide by; give one, or set cfg_scale=0"):
        generate(toy, [[20], []], guided)
    assert len(generate(toy, [[]], replace(guided, cfg_scale=0.0))[0].response) == 4


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[20, 21]], {"gen_lengths": [4, 4]}, "2 entries for 1 prompts"),
        ([[20, 21]], {"gen_lengths": [3]}, "gen_length 3 must be a multiple of block_length 4"),
        ([[20, 21]], {"gen_lengths": [0]}, "gen_length 0"),
        ([[20, 21], [20]], {"attention_mask": torch.ones(2, 2)}, "prompts of 2 tokens"),
        ([[20, 21], [20, 21]], {"attention_mask": torch.ones(1, 2)}, "does not fit 2 rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(toy, prompts: list, options: dict, words: str) -> None:
    with pytest.raises(RemaskError, match=words):
        generate(toy, prompts, SamplerConfig(gen_length=8, block_length=4), **options)


def test_mask_token_in_a_prompt_is_refused(toy) -> None:
    with pytest.raises(RemaskError, match=r"prompt 0 contains the mask token.*infill"):
        generate(toy, [[20, toy.spec.mask_id]], SamplerConfig(gen_length=2))
