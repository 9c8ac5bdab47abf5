"""States: the law of their noise levels, their masks, their weights, and what a batch must not change."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import remask.backbones as backbones
from conftest import GOLDENS
from remask.backbones import BackboneSpec, Encoded, MaskedDiffusionLM
from remask.diffusion.likelihood import elbo_exact, target_logprobs
from remask.errors import RemaskError
from remask.unlearning.states import Noise, States, draw_states, roll_out

SPEC = BackboneSpec(family="llada", mask_id=1, eos_id=2, pad_id=2, max_length=64)
FIXED = Noise(law="fixed-count")


def row(name: str, prompt: int, answer: int) -> Encoded:
    return Encoded(name, tuple(range(10, 10 + prompt)), tuple(range(30, 30 + answer)), (0, prompt))


def masks(states: States) -> list[tuple[bool, ...]]:
    """Which response tokens are hidden, for every state."""
    starts = states.prompt.sum(dim=1).tolist()
    lengths = states.length[states.row].tolist()
    return [tuple(m[s : s + n].tolist()) for m, s, n in zip(states.scored, starts, lengths, strict=True)]


# ------------------------------------------------------------------ what a state is
def test_a_state_by_hand() -> None:
    rows = [row("a", 3, 1), row("b", 2, 4)]
    states = draw_states(SPEC, rows, Noise(law="high-noise", low=1.0, draws=2), (0, 5), tail=2)
    m, e = SPEC.mask_id, SPEC.eos_id
    assert states.clean.tolist() == [[10, 11, 12, 30, e, e, e, e, e]] * 2 + [[10, 11, 30, 31, 32, 33, e, e, e]] * 2
    assert states.ids.tolist() == [[10, 11, 12, m, m, m, m, e, e]] * 2 + [[10, 11, m, m, m, m, m, m, m]] * 2
    assert states.scored.int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1, 1, 1, 0, 0]] * 2
    assert states.prompt.int().tolist() == [[1, 1, 1] + [0] * 6] * 2 + [[1, 1] + [0] * 7] * 2
    assert states.attention is not None
    assert states.attention.tolist() == [[1] * 7 + [0, 0]] * 2 + [[1] * 9] * 2
    assert states.row.tolist() == [0, 0, 1, 1]
    assert states.length.tolist() == [2, 5]
    assert states.weight.tolist() == [1.0] * 4
    assert states.weight.dtype == torch.float32
    assert draw_states(SPEC, rows[:1], FIXED, (0,), 0).attention is None


@given(
    law=st.sampled_from(["uniform", "high-noise", "fixed-count"]),
    answer=st.integers(1, 12),
    draws=st.integers(1, 5),
    tail=st.integers(0, 6),
    step=st.integers(0, 1000),
)
def test_hidden_tokens_are_the_scored_ones_and_some_of_the_tail(law, answer, draws, tail, step) -> None:
    rows = [row("a", 2, answer), row("b", 3, 5)]
    states = draw_states(SPEC, rows, Noise(law=law, draws=draws), (7, step), tail)
    masked = states.ids == SPEC.mask_id
    assert (states.scored <= masked).all()
    assert torch.equal(torch.where(masked, states.clean, states.ids), states.clean)
    for s, r in enumerate(states.row.tolist()):
        start, length = len(rows[r].prompt_ids), len(rows[r].answer_ids) + 1
        count = int(states.scored[s].sum())
        assert 1 <= count == int(states.scored[s, start : start + length].sum())
        assert float(states.weight[s]) == pytest.approx(length / count)
        assert not masked[s, :start].any()
        assert not masked[s, start + length + tail :].any()


def test_tail_tokens_are_hidden_with_the_same_level() -> None:
    """Over many states the share of hidden tail tokens follows the share of hidden response tokens."""
    noise = Noise(law="fixed-count", draws=4)
    states = draw_states(
        BackboneSpec("llada", 1, 2, 2, max_length=400), [row(f"r{i}", 1, 19) for i in range(100)], noise, (0,), tail=100
    )
    hidden = (states.ids == 1)[:, 21:].float().mean(dim=1)
    shown = 20 / 20 / states.weight  # scored / length
    assert (hidden - shown).abs().max() < 0.05 + 5 * 0.5 / math.sqrt(100)
    assert abs(float((hidden - shown).mean()) + 0.5 / 20) < 0.02  # ceil(20 t) / 20 exceeds t by 1 / 40 in the mean
    low = draw_states(SPEC, [row("x", 1, 3)], Noise(law="uniform", low=0.001, high=0.001), (0,), tail=40)
    assert int((low.ids == 1)[:, 5:].sum()) <= 1


def test_a_tail_is_cut_at_the_context() -> None:
    states = draw_states(SPEC, [row("a", 30, 30)], FIXED, (0,), tail=20)
    assert states.ids.shape[1] == 64


@pytest.mark.parametrize(
    ("spec", "bad", "words"),
    [
        (SPEC, row("long", 40, 24), "'long'.*exceed the context of 64"),
        (BackboneSpec("dream", 1, 2, 2, shift=True), Encoded("bare", (), (5,), (0, 0)), "'bare' has no prompt"),
    ],
)
def test_rows_that_cannot_be_drawn(spec: BackboneSpec, bad: Encoded, words: str) -> None:
    with pytest.raises(RemaskError, match=words):
        draw_states(spec, [row("fine", 2, 2), bad], FIXED, (0,), 0)


# ------------------------------------------------------------------ noise levels
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 0.1, 1.0),
        ({"law": "uniform", "low": 0.3, "high": 0.8}, 0.3, 0.8),
        ({"law": "high-noise"}, 0.9, 1.0),
        ({"law": "fixed-count"}, 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("draws", [1, 3, 4])
def test_every_count_has_its_expected_share(options: dict, low: float, high: float, draws: int) -> None:
    """P(count = k) is the share of (low, high] inside ((k - 1) / L, k / L]."""
    length, keys = 7, 800
    noise = Noise(**options, draws=draws)
    counts = np.array(
        [[sum(mask) for mask in masks(draw_states(SPEC, [row("a", 1, 6)], noise, (0, k), 0))] for k in range(keys)]
    )
    seen = Counter(counts.ravel().tolist())
    for k in range(1, length + 1):
        share = max(0.0, min(high, k / length) - max(low, (k - 1) / length)) / (high - low)
        assert abs(seen[k] / counts.size - share) <= 5 * math.sqrt(share * (1 - share) / keys), k


def test_levels_are_stratified_and_mirrored() -> None:
    for k in range(50):
        counts = [sum(mask) for mask in masks(draw_states(SPEC, [row("a", 1, 11)], Noise(law="fixed-count", draws=4), (k,), 0))]
        assert [(3 * s < c <= 3 * s + 3) for s, c in enumerate(counts)] == [True] * 4  # one in each quarter of 1..12
        assert counts[0] + counts[3] == counts[1] + counts[2] == 13
    twelve = draw_states(SPEC, [row("a", 1, 11)], Noise(law="fixed-count", draws=12), (3,), 0)
    assert sorted(sum(mask) for mask in masks(twelve)) == list(range(1, 13))


def test_masks_of_a_count_are_uniform_subsets() -> None:
    length, keys = 4, 3000
    for draws, draw in ((1, 0), (4, 1), (4, 3)):
        seen = Counter(
            masks(draw_states(SPEC, [row("a", 1, length - 1)], Noise(law="fixed-count", draws=draws), (1, k), 0))[draw]
            for k in range(keys)
        )
        for count in range(1, length + 1):
            group = {mask: n for mask, n in seen.items() if sum(mask) == count}
            total = sum(group.values())
            if total:
                expected = total / math.comb(length, count)
                assert len(group) == math.comb(length, count)
                assert all(abs(n - expected) <= 5 * math.sqrt(expected) for n in group.values())


def test_each_half_of_the_draws_hides_all_tokens_alike() -> None:
    for draws in (2, 5, 8):
        for k in range(20):
            drawn = np.array(masks(draw_states(SPEC, [row("a", 1, 8)], Noise(law="high-noise", low=0.3, draws=draws), (k,), 0)))
            lower = (draws + 1) // 2
            assert np.ptp(drawn[:lower].sum(axis=0)) <= 1
            assert np.ptp(drawn[lower:].sum(axis=0)) <= 1


def test_tokens_hidden_at_low_levels_are_not_the_visible_ones_of_high_levels() -> None:
    """The halves have orders of their own: a token visible in the second draw is hidden in the first as often as any."""
    hidden, expected = 0.0, 0.0
    for k in range(600):
        first, second = np.array(masks(draw_states(SPEC, [row("a", 1, 7)], Noise(law="fixed-count", draws=2), (k,), 0)))
        hidden += (first & ~second).sum()
        expected += first.mean() * (~second).sum()
    assert hidden == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"law": "uniform", "low": 0.0}, "low must be above 0"),
        ({"law": "high-noise", "high": 0.5}, "low 0.9 is above high 0.5"),
        ({"law": "fixed-count", "low": 0.2}, "fixed-count covers every noise level"),
        ({"draws": 0}, "draws"),
        ({"lwo": 0.2}, "lwo"),
        ({"law": "cosine"}, "law"),
    ],
)
def test_noise_refuses(options: dict, words: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=words):
        Noise(**options)


def test_noise_survives_json() -> None:
    for law in ("uniform", "high-noise", "fixed-count"):
        noise = Noise(law=law, draws=3)
        assert Noise.model_validate_json(noise.model_dump_json()) == noise


# ------------------------------------------------------------------ what masks depend on
def test_masks_of_a_row_do_not_depend_on_its_batch_or_tail() -> None:
    noise = Noise(law="uniform", draws=3)
    rows = [row("a", 3, 6), row("b", 2, 9), row("c", 5, 2)]
    together = masks(draw_states(SPEC, rows, noise, (4, 17), tail=3))
    alone = [mask for r in rows for mask in masks(draw_states(SPEC, [r], noise, (4, 17), tail=0))]
    assert together == alone
    assert masks(draw_states(SPEC, rows[::-1], noise, (4, 17), tail=9))[-3:] == alone[:3]


def test_masks_depend_on_seed_step_and_row() -> None:
    drawn = {
        tuple(masks(draw_states(SPEC, [row(name, 2, 20)], Noise(), key, 0)))
        for name in "ab"
        for key in ((0, 1), (1, 1), (0, 2))
    }
    assert len(drawn) == 6


def test_another_answer_of_the_same_row_has_the_same_levels() -> None:
    """Counts of answers of 39 and 19 tokens under one key: ceil(40 t) and ceil(20 t), so half of it, rounded up."""
    for k in range(40):
        noise = Noise(law="uniform", draws=4)
        long, short = (draw_states(SPEC, [row("a", 2, n)], noise, (0, k), 0) for n in (39, 19))
        assert [math.ceil(sum(mask) / 2) for mask in masks(long)] == [sum(mask) for mask in masks(short)]


# ------------------------------------------------------------------ weights and the bound
@torch.no_grad()
def state_bounds(lm: MaskedDiffusionLM, states: States) -> list[float]:
    """weight * summed cross-entropy of every state, in nats, one state a forward."""
    values = []
    for s in range(len(states.ids)):
        scored = states.scored[s : s + 1]
        logits = lm.logits(states.ids[s : s + 1], positions=scored)
        values.append(-float(states.weight[s]) * float(target_logprobs(logits, states.clean[s][scored[0]]).sum()))
    return values


def short_fact(tiny: MaskedDiffusionLM, facts_row: str, tokens: int) -> tuple[Encoded, float]:
    """A row of `tiny` with that many answer tokens, and the exact bound of its answer and end token."""
    prompt = tiny.encode_prompt(facts_row)
    answer = tiny._tokenizer()(tiny.spec.answer_prefix + "Tartu, close to the river", add_special_tokens=False)["input_ids"]
    made = Encoded("short", prompt, tuple(answer[:tokens]), (0, 1))
    ended = Encoded("short", prompt, (*made.answer_ids, tiny.spec.eos_id), (0, 1))
    return made, -elbo_exact(tiny, [ended])[0].logprob


def test_fixed_counts_average_to_the_exact_bound(tiny) -> None:
    """Every mask with its probability 1 / (L C(L, count)), weights as drawn."""
    made, exact = short_fact(tiny, "In which city was Zora Yates born?", 2)
    known: dict[tuple[bool, ...], float] = {}
    for step in itertools.count():
        states = draw_states(tiny.spec, [made], Noise(law="fixed-count", draws=8), (0, step), tail=0)
        new = {mask: s for s, mask in enumerate(masks(states)) if mask not in known}
        if new:
            values = state_bounds(tiny, states)
            known |= {mask: values[s] for mask, s in new.items()}
        if len(known) == 7:
            break
    assert sum(value / (3 * math.comb(3, sum(mask))) for mask, value in known.items()) == pytest.approx(exact, abs=2e-4)


def test_four_balanced_draws_of_two_tokens_are_the_exact_bound(tiny) -> None:
    """Each token hidden alone once and both hidden twice: stratified, balanced draws leave nothing to chance here."""
    made, exact = short_fact(tiny, "In which city was Zora Yates born?", 1)
    for step in range(3):
        states = draw_states(tiny.spec, [made], Noise(law="fixed-count", draws=4), (0, step), tail=0)
        assert np.mean(state_bounds(tiny, states)) == pytest.approx(exact, abs=1e-4)


# ------------------------------------------------------------------ padding and prompts in a model
@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.no_grad()
def test_padding_never_changes_another_rows_numbers(family: str) -> None:
    lm = backbones.load(GOLDENS / family)
    rows = [row("a", 3, 2), row("b", 6, 9)]
    noise = Noise(law="uniform", draws=2)
    together = draw_states(lm.spec, rows, noise, (0,), tail=2)
    batch = lm.logits(together.ids, together.attention, together.scored)
    alone = [draw_states(lm.spec, [r], noise, (0,), tail=2) for r in rows]
    assert [s.attention for s in alone] == [None, None]
    single = torch.cat([lm.logits(s.ids, None, s.scored) for s in alone])
    torch.testing.assert_close(batch, single, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompt_removed_by_mask_and_by_attention(toy) -> None:
    rows = [row("a", 3, 2), row("b", 6, 9)]
    other = [Encoded(r.id, tuple(token + 40 for token in r.prompt_ids), r.answer_ids, r.subject) for r in rows]
    one, two = (draw_states(toy.spec, chosen, Noise(draws=2), (0,), tail=1) for chosen in (rows, other))
    mask = one.anchored(toy.spec.mask_id)
    assert torch.equal(mask, two.anchored(toy.spec.mask_id))
    assert torch.equal(mask[one.prompt], torch.full((int(one.prompt.sum()),), toy.spec.mask_id))
    assert torch.equal(mask[~one.prompt], one.ids[~one.prompt])  # padding is not masked

    hidden = one.anchored(toy.spec.mask_id, "attention")
    assert one.attention is not None
    assert torch.equal(hidden, one.attention * (~one.prompt).long())
    with_one, with_two = (toy.logits(s.ids, hidden, s.scored) for s in (one, two))
    torch.testing.assert_close(with_one, with_two, atol=1e-5, rtol=1e-5)
    # Rotary positions are relative: a hidden prompt is no prompt at all.
    start, stop = len(rows[1].prompt_ids), len(rows[1].ids) + 2
    cut = [part[2:, start:stop] for part in (one.ids, one.scored)]
    torch.testing.assert_close(toy.logits(cut[0], None, cut[1]), with_one[one.scored[:2].sum() :], atol=2e-4, rtol=1e-4)
    unpadded = draw_states(toy.spec, rows[:1], Noise(), (0,), 0)
    assert torch.equal(unpadded.anchored(toy.spec.mask_id, "attention"), (~unpadded.prompt).long())


def test_states_move_as_a_whole() -> None:
    states = draw_states(SPEC, [row("a", 3, 2), row("b", 2, 4)], Noise(), (0,), 0)
    assert {value.device.type for value in vars(states.to("meta")).values()} == {"meta"}


# ------------------------------------------------------------------ states of the model's own
def test_roll_out_one_token_at_a_time_by_hand(toy) -> None:
    rows = [row("a", 3, 5), row("b", 4, 7)]
    drawn = draw_states(toy.spec, rows, Noise(low=0.3, draws=2), (0, 1), tail=3)
    rolled = roll_out(toy, drawn, steps=16)
    assert torch.equal(rolled.scored.sum(dim=1), drawn.scored.sum(dim=1))
    for s, r in enumerate(drawn.row.tolist()):
        start, length = len(rows[r].prompt_ids), int(drawn.length[r])
        canvas = drawn.ids[s].clone()
        canvas[start : start + length] = toy.spec.mask_id
        for _ in range(length - int(drawn.scored[s].sum())):
            real = None if drawn.attention is None else drawn.attention[s : s + 1]
            logits = toy.logits(canvas[None], real)[0].double()
            logits[:, toy.spec.mask_id] = -torch.inf
            open_ = [i for i in range(start, start + length) if canvas[i] == toy.spec.mask_id]
            sure = max(open_, key=lambda i: float(logits[i].softmax(dim=-1).max()))
            canvas[sure] = logits[sure].argmax()
        assert rolled.ids[s].tolist() == canvas.tolist()
        assert rolled.scored[s].tolist() == [
            start <= i < start + length and int(canvas[i]) == toy.spec.mask_id for i in range(len(canvas))
        ]
    assert not torch.equal(rolled.ids, drawn.ids)
    assert torch.equal(rolled.clean, drawn.clean)


def test_roll_out_in_one_step_reads_the_fully_masked_response_once(toy) -> None:
    drawn = draw_states(toy.spec, [row("a", 3, 9)], Noise(low=0.4, high=0.6), (0,), tail=0)
    before = toy.counters.forwards
    rolled = roll_out(toy, drawn, steps=1)
    assert toy.counters.forwards == before + 1
    blank = drawn.ids.masked_fill(~drawn.prompt, toy.spec.mask_id)
    logits = toy.logits(blank)[0]
    logits[:, toy.spec.mask_id] = -torch.inf
    shown = (rolled.ids != toy.spec.mask_id) & ~drawn.prompt
    assert torch.equal(rolled.ids[shown], logits.argmax(dim=-1)[shown[0]])
    full = draw_states(toy.spec, [row("a", 3, 9)], Noise(law="high-noise", low=1.0), (0,), tail=0)
    assert torch.equal(roll_out(toy, full, steps=4).ids, full.ids)


def test_roll_out_never_commits_the_mask_token(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, mask = toy.logits, toy.spec.mask_id

    def eager(*args: object) -> torch.Tensor:
        logits = genuine(*args)
        logits[:, mask] += 1e4
        return logits

    drawn = draw_states(toy.spec, [row("a", 3, 9)], Noise(low=0.4, high=0.6), (0,), tail=0)
    expected = roll_out(toy, drawn, steps=3)
    monkeypatch.setattr(toy, "logits", eager)
    assert torch.equal(roll_out(toy, drawn, steps=3).ids, expected.ids)
