"""Mask banks and the likelihood estimators, against enumerations and slow loops over transformers' own forward."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remask.backbones import Encoded, MaskedDiffusionLM
from remask.diffusion.likelihood import bernoulli, chain, elbo, elbo_exact, pll
from remask.diffusion.masks import MAX_ANSWER, MIN_SHARE, MaskBank
from remask.errors import RemaskError

keys = st.text(min_size=1, max_size=8)


# ------------------------------------------------------------------ masks
@given(row=keys, length=st.integers(1, 40), multiple=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_with_draws_a_multiple_of_the_length_every_count_occurs_equally_often(row, length, multiple, seed) -> None:
    """Systematic sampling leaves nothing to chance then, within every single replicate."""
    masks = MaskBank(draws=multiple * length, replicates=2, seed=seed).masks(row, length)
    assert masks.shape == (2 * multiple * length, length)
    for replicate in np.split(masks.sum(axis=1), 2):
        assert Counter(replicate.tolist()) == dict.fromkeys(range(1, length + 1), multiple)


@given(row=keys, length=st.integers(1, 40), draws=st.integers(1, 12), replicates=st.integers(1, 3))
def test_counts_are_spread_evenly_over_the_range(row, length, draws, replicates) -> None:
    counts = MaskBank(draws, replicates).masks(row, length).sum(axis=1).reshape(replicates, draws)
    assert counts.min() >= 1
    assert counts.max() <= length
    assert (np.abs(np.diff(counts[:, : (draws + 1) // 2], axis=1) - length / draws) < 1).all()  # strata are length/draws apart
    pairs = counts + counts[:, ::-1]
    assert (np.delete(pairs, draws // 2, axis=1) if draws % 2 else pairs).tolist() == [
        [length + 1] * (draws // 2 * 2)
    ] * replicates


@given(row=keys, length=st.integers(1, 40), draws=st.integers(1, 12))
def test_each_half_of_a_replicate_treats_all_tokens_alike(row, length, draws) -> None:
    """Few hidden: every token is hidden equally often, up to one. Few visible: every token is visible equally often."""
    masks = MaskBank(draws, 3).masks(row, length).reshape(3, draws, length)
    lower = (draws + 1) // 2
    assert np.ptp(masks[:, :lower].sum(axis=1), axis=1).max() <= 1
    assert np.ptp((~masks[:, lower:]).sum(axis=1), axis=1).max() <= 1


def test_counts_and_positions_are_uniform_in_expectation() -> None:
    length, rows = 7, 3000
    masks = np.concatenate([MaskBank(draws=3, replicates=1).masks(f"row{i}", length) for i in range(rows)])
    counts = Counter(masks.sum(axis=1).tolist())
    n = len(masks)
    for count in range(1, length + 1):
        share = 1 / length
        assert abs(counts[count] / n - share) < 5 * math.sqrt(share * (1 - share) / n)
    hidden = (length + 1) / (2 * length)  # E[count] / length
    assert np.abs(masks.mean(axis=0) - hidden).max() < 5 * math.sqrt(0.25 / n)


def test_given_the_count_every_subset_is_equally_likely() -> None:
    pairs = Counter()
    for i in range(3000):
        for mask in MaskBank(draws=4, replicates=1).masks(f"r{i}", 4):
            if mask.sum() == 2:
                pairs[tuple(np.nonzero(mask)[0].tolist())] += 1
    n = sum(pairs.values())
    assert n == 3000
    assert len(pairs) == 6
    assert max(abs(v / n - 1 / 6) for v in pairs.values()) < 5 * math.sqrt(5 / 36 / n)


@given(row=keys, short=st.integers(1, 20), more=st.integers(0, 20))
def test_one_draw_of_answers_of_different_lengths_is_nested(row, short, more) -> None:
    """Same levels, same ranking of positions: restricted to the shorter answer, one mask of each pair contains the other."""
    bank = MaskBank(draws=1, replicates=5)
    small, large = bank.masks(row, short), bank.masks(row, short + more)
    for a, b in zip(small, large[:, :short], strict=True):
        assert (a <= b).all() or (b <= a).all()
    assert np.abs(small.mean(axis=1) - large.mean(axis=1)).max() < 1 / short + 1e-12


@pytest.mark.parametrize(("short", "more"), [(8, 1), (8, 4), (20, 2), (40, 5)])
def test_answers_of_different_lengths_share_their_randomness(short: int, more: int) -> None:
    """Balanced draws of two lengths are no longer nested, but nearly the same; those of two rows agree on 67 %."""
    same, other = [], []
    for i in range(60):
        masks = MaskBank(4, 1).masks(f"row{i}", short)
        same.append(masks == MaskBank(4, 1).masks(f"row{i}", short + more)[:, :short])
        other.append(masks == MaskBank(4, 1).masks(f"row{i + 1}", short))
    assert np.mean(same) > 0.88
    assert np.mean(other) < 0.75


def test_bank_is_a_function_of_its_keys_alone() -> None:
    names = [("a", 5), ("b", 3), ("c", 12)]
    first = {name: MaskBank(seed=3).masks(*name) for name in names}
    np.random.seed(99)
    torch.manual_seed(99)
    bank = MaskBank(seed=3)
    for name in reversed(names):
        np.testing.assert_array_equal(bank.masks(*name), first[name])
    assert not np.array_equal(first["a", 5], MaskBank(seed=4).masks("a", 5))
    assert not np.array_equal(first["a", 5], MaskBank(seed=3).masks("b", 5))


def test_replicates_are_independent_prefixes() -> None:
    """More replicates extend a bank; they do not change the masks that it had."""
    np.testing.assert_array_equal(MaskBank(4, 2).masks("x", 9), MaskBank(4, 5).masks("x", 9)[:8])
    assert not np.array_equal(MaskBank(4, 2).masks("x", 9)[:4], MaskBank(4, 2).masks("x", 9)[4:])


def test_fingerprint_follows_every_input() -> None:
    lengths = {"a": 4, "b": 9}
    base = MaskBank().fingerprint(lengths)
    assert MaskBank().fingerprint(list(lengths.items())) == base
    others = [
        MaskBank(seed=1).fingerprint(lengths),
        MaskBank(draws=5).fingerprint(lengths),
        MaskBank(replicates=5).fingerprint(lengths),
        MaskBank().fingerprint({"a": 4, "b": 8}),
        MaskBank().fingerprint({"a": 4, "c": 9}),
    ]
    assert len({base, *others}) == 6


def test_masks_are_the_same_on_every_machine() -> None:
    """Pinned: results on record depend on these bits, and Philox does not change between numpy versions."""
    packed = ["".join("x" if hidden else "." for hidden in mask) for mask in MaskBank(3, 2, seed=7).masks("pin", 6)]
    assert packed == ["x...x.", ".xxx.x", ".xxxxx", "x..x..", ".xx.xx", "xxxx.x"]


@given(row=keys, length=st.integers(1, 20), more=st.integers(0, 20), draws=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_bernoulli_masks_are_stratified_and_shared_between_lengths(row, length, more, draws, seed) -> None:
    bank = MaskBank(draws, 2, seed)
    masks, shares = bank.bernoulli(row, length)
    longer, same = bank.bernoulli(row, length + more)
    np.testing.assert_array_equal(masks, longer[:, :length])
    np.testing.assert_array_equal(shares, same)
    for replicate in np.split(shares, 2):  # one share in each of `draws` equal parts of [MIN_SHARE, 1]
        assert np.floor((replicate - MIN_SHARE) / (1 - MIN_SHARE) * draws + 1e-9).tolist() == list(range(draws))
    np.testing.assert_array_equal(masks[:draws], MaskBank(draws, 1, seed).bernoulli(row, length)[0])


def test_bernoulli_masks_hide_each_token_with_their_probability() -> None:
    drawn = [MaskBank(draws=5, replicates=1).bernoulli(f"row{i}", 6) for i in range(3000)]
    masks, shares = np.concatenate([m for m, _ in drawn]), np.concatenate([p for _, p in drawn])
    for low in np.arange(0, 1, 0.25):
        chosen = (low <= shares) & (shares < low + 0.25)
        spread = math.sqrt(0.25 / chosen.sum())
        assert np.abs(masks[chosen].mean(axis=0) - shares[chosen].mean()).max() < 5 * spread
        expected = np.mean(shares[chosen] ** 2)  # two tokens of one mask are independent given its share
        assert abs((masks[chosen, 1] & masks[chosen, 4]).mean() - expected) < 5 * spread


def test_bernoulli_masks_are_the_same_on_every_machine() -> None:
    masks, shares = MaskBank(3, 1, seed=7).bernoulli("pin", 6)
    assert ["".join("x" if hidden else "." for hidden in mask) for mask in masks] == ["......", ".xx.x.", "xxx.xx"]
    assert shares.round(6).tolist() == [0.283012, 0.616012, 0.949012]


def test_bad_banks_are_refused() -> None:
    for draws, replicates in [(0, 1), (1, 0), (-3, 2)]:
        with pytest.raises(RemaskError, match="draws >= 1"):
            MaskBank(draws, replicates)
    for masks in (MaskBank().masks, MaskBank().bernoulli):
        with pytest.raises(RemaskError, match=r"'long'.*2048"):
            masks("long", MAX_ANSWER + 1)


# ------------------------------------------------------------------ likelihood
def conditional(lm: MaskedDiffusionLM, row: Encoded, hidden: set[int], blind: bool = False) -> torch.Tensor:
    """log p(answer token | visible) at every answer position, fp64, one row alone through transformers' own forward."""
    start = len(row.prompt_ids)
    places = {start + i for i in hidden} | (set(range(start)) if blind else set())
    return raw_logits(lm, row, places).log_softmax(-1)[range(start, len(row.ids)), list(row.answer_ids)]


def raw_logits(lm: MaskedDiffusionLM, row: Encoded, hidden: set[int]) -> torch.Tensor:
    """Logits [L, V] in fp64 of the canvas with positions `hidden` masked."""
    ids = [lm.spec.mask_id if i in hidden else token for i, token in enumerate(row.ids)]
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([ids])).logits[0].double()


def cut(row: Encoded, length: int) -> Encoded:
    return Encoded(f"{row.id}:{length}", row.prompt_ids, (row.answer_ids * 3)[:length], row.subject)


@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize("hide_prompt", [False, True])
def test_exact_bound_is_the_mean_chain_over_all_orders(toy, rows, length: int, hide_prompt: bool) -> None:
    row = cut(rows[1], length)
    chains = []
    for order in itertools.permutations(range(length)):
        hidden, total = set(range(length)), 0.0
        for position in order:
            total += float(conditional(toy, row, hidden, hide_prompt)[position])
            hidden.remove(position)
        chains.append(total)
    result = elbo_exact(toy, [row], hide_prompt=hide_prompt)[0]
    assert result.logprob == pytest.approx(np.mean(chains), abs=1e-4)
    assert np.std(chains) > 1e-3  # the orders do differ, so the mean is a real test
    assert (result.id, result.tokens, result.stderr) == (row.id, length, 0.0)


@pytest.mark.parametrize("hide_prompt", [False, True])
def test_estimator_equals_a_slow_loop_over_the_bank(toy, rows, hide_prompt: bool) -> None:
    bank = MaskBank(draws=3, replicates=2, seed=4)
    for row, score in zip(rows, elbo(toy, rows, bank, hide_prompt=hide_prompt), strict=True):
        length = len(row.answer_ids)
        values = []
        for mask in bank.masks(row.id, length):
            hidden = set(np.nonzero(mask)[0].tolist())
            logp = conditional(toy, row, hidden, hide_prompt)
            values.append(length / len(hidden) * sum(float(logp[i]) for i in hidden))
        halves = [np.mean(values[:3]), np.mean(values[3:])]
        assert score.replicates == pytest.approx(halves, abs=1e-4)
        assert score.logprob == pytest.approx(np.mean(values), abs=1e-4)
        assert score.stderr == pytest.approx(abs(halves[0] - halves[1]) / 2, abs=1e-4)


def test_many_draws_agree_with_the_exact_bound(toy, rows) -> None:
    bank = MaskBank(draws=4, replicates=400, seed=1)
    scored = [row for row in rows if 3 <= len(row.answer_ids) <= 8]
    assert len(scored) >= 4
    for score, exact in zip(elbo(toy, scored, bank), elbo_exact(toy, scored), strict=True):
        assert 0 < score.stderr < 0.5
        assert abs(score.logprob - exact.logprob) < 4 * score.stderr


def test_a_row_scores_the_same_alone_and_in_company(toy, rows) -> None:
    bank = MaskBank()
    together = elbo(toy, rows, bank)
    backwards = elbo(toy, rows[::-1], bank)[::-1]
    for row, score, other in zip(rows, together, backwards, strict=True):
        alone = elbo(toy, [row], bank)[0]
        assert alone.logprob == pytest.approx(score.logprob, abs=1e-5)
        assert other.replicates == pytest.approx(score.replicates, abs=1e-5)


def test_one_token_answers_are_exact(toy, rows) -> None:
    row = cut(rows[0], 1)
    truth = float(conditional(toy, row, {0})[0])
    for result in (*elbo(toy, [row], MaskBank()), *elbo_exact(toy, [row])):
        assert result.logprob == pytest.approx(truth, abs=1e-5)
        assert result.stderr == 0.0


def test_hidden_prompts_cannot_be_told_apart(toy, rows) -> None:
    a = rows[0]
    b = Encoded(a.id, tuple(reversed(a.prompt_ids)), a.answer_ids, a.subject)
    bank = MaskBank()
    assert elbo(toy, [a], bank, hide_prompt=True) == elbo(toy, [b], bank, hide_prompt=True)
    assert elbo(toy, [a], bank) != elbo(toy, [b], bank)


def test_equal_keys_share_masks(toy, rows) -> None:
    a = rows[1]
    twin = Encoded("another id", a.prompt_ids, a.answer_ids, a.subject)
    bank = MaskBank(draws=1, replicates=1)
    plain = elbo(toy, [a, twin], bank)
    shared = elbo(toy, [a, twin], bank, keys=["k", "k"])
    assert shared[0].logprob == pytest.approx(shared[1].logprob, abs=1e-6)
    assert plain[0].logprob != pytest.approx(plain[1].logprob, abs=1e-6)
    assert math.isnan(shared[0].stderr)  # one replicate has no spread


def test_too_long_for_enumeration_is_refused_by_fact(toy, rows) -> None:
    with pytest.raises(RemaskError, match=r"ada/pet:13.*13 answer tokens.*at most 12"):
        elbo_exact(toy, [cut(rows[1], 13)])


# ------------------------------------------------------------------ the other estimators
@pytest.mark.parametrize("part", ["answer", "prompt", "all"])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_chain_equals_a_slow_loop_in_any_order(toy, rows, part: str, scale: float) -> None:
    """Each token given what precedes it in the order; guidance mixes in the logits with all that is given hidden."""
    rng = np.random.default_rng(3)
    rows = [rows[1], rows[0], rows[5]]
    spans = {"answer": [row.answer for row in rows], "prompt": [(0, len(row.prompt_ids)) for row in rows]}
    spans["all"] = [(0, len(row.ids)) for row in rows]
    orders = [rng.permutation(stop - start).tolist() for start, stop in spans[part]]
    for row, (start, stop), order, score in zip(
        rows, spans[part], orders, chain(toy, rows, order=orders, part=part, cfg_scale=scale), strict=True
    ):
        hidden, outside, total = set(range(start, stop)), set(range(len(row.ids))) - set(range(start, stop)), 0.0
        for place in order:
            free = raw_logits(toy, row, hidden | outside)
            logits = free + (scale + 1) * (raw_logits(toy, row, hidden) - free)
            total += float(logits[start + place].log_softmax(-1)[row.ids[start + place]])
            hidden.remove(start + place)
        assert score.logprob == pytest.approx(total, abs=1e-3)
        assert (score.tokens, score.stderr, score.replicates) == (stop - start, 0.0, (score.logprob,))


def test_named_orders_are_permutations(toy, rows) -> None:
    steps = [list(range(len(row.answer_ids))) for row in rows]
    assert chain(toy, rows) == chain(toy, rows, order=steps)
    assert chain(toy, rows, order="backward") == chain(toy, rows, order=[step[::-1] for step in steps])
    assert chain(toy, rows, order="backward") != chain(toy, rows)


def test_pll_masks_every_token_alone(toy, rows) -> None:
    for row, score in zip(rows, pll(toy, rows), strict=True):
        slow = sum(float(conditional(toy, row, {i})[i]) for i in range(len(row.answer_ids)))
        assert score.logprob == pytest.approx(slow, abs=1e-4)


def test_bernoulli_estimates_its_bound(toy, rows) -> None:
    """Against the integral over p in [MIN_SHARE, 1] of all masks' probability times sum / p, by quadrature over p."""
    row = cut(rows[1], 3)
    nodes, weights = np.polynomial.legendre.leggauss(8)  # the integrand is a polynomial in p
    expected = 0.0
    for mask in itertools.product([False, True], repeat=3):
        hidden = {i for i in range(3) if mask[i]}
        if hidden:
            total = float(conditional(toy, row, hidden)[list(hidden)].sum())
            shares = MIN_SHARE + (1 - MIN_SHARE) * (nodes + 1) / 2
            expected += total * float(weights @ (shares ** (len(hidden) - 1) * (1 - shares) ** (3 - len(hidden)))) / 2
    score = bernoulli(toy, [row], MaskBank(draws=8, replicates=500))[0]
    assert 0 < score.stderr < 0.5
    assert abs(score.logprob - expected) < 4 * score.stderr
    assert expected == pytest.approx(elbo_exact(toy, [row])[0].logprob, rel=5 * MIN_SHARE)  # the same bound


def test_bernoulli_equals_a_slow_loop_over_the_bank(toy, rows) -> None:
    bank = MaskBank(draws=6, replicates=1, seed=2)
    for row, score in zip(rows, bernoulli(toy, rows, bank), strict=True):
        values = []
        for mask, share in zip(*bank.bernoulli(row.id, len(row.answer_ids)), strict=True):
            hidden = set(np.nonzero(mask)[0].tolist())
            values.append(sum(float(conditional(toy, row, hidden)[i]) for i in hidden) / share)
        assert score.logprob == pytest.approx(np.mean(values), rel=1e-5, abs=1e-4)


def test_guidance_mixes_logits_of_the_hidden_prompt(toy, rows) -> None:
    row = cut(rows[0], 2)
    start, both = len(row.prompt_ids), {len(row.prompt_ids), len(row.prompt_ids) + 1}
    expected = 0.0
    for hidden in ({start}, {start + 1}, both):
        free = raw_logits(toy, row, hidden | set(range(start)))
        logp = (free + 3.0 * (raw_logits(toy, row, hidden) - free)).log_softmax(-1)
        expected += sum(float(logp[i, row.ids[i]]) for i in hidden) / 2
    assert elbo_exact(toy, [row], cfg_scale=2.0)[0].logprob == pytest.approx(expected, abs=1e-4)
    assert abs(expected - elbo_exact(toy, [row])[0].logprob) > 1e-2


def test_estimators_agree_on_one_token(toy, rows) -> None:
    row = cut(rows[0], 1)
    truth = float(conditional(toy, row, {0})[0])
    for scores in (chain(toy, [row]), chain(toy, [row], order="backward"), pll(toy, [row]), elbo_exact(toy, [row])):
        assert scores[0].logprob == pytest.approx(truth, abs=1e-5)


def test_bad_orders_and_empty_parts_are_refused(toy, rows) -> None:
    for order in ("sideways", [[0, 0, 1]], [[0, 1]]):
        with pytest.raises(RemaskError, match=r"ada/city:3.*permutation of 0\.\.2"):
            chain(toy, [cut(rows[0], 3)], order=order)
    bare = Encoded("bare", (), (5, 6), (0, 1))
    with pytest.raises(RemaskError, match="'bare' has no prompt tokens"):
        chain(toy, [bare], part="prompt")
    with pytest.raises(RemaskError, match="'bare' has no prompt tokens"):
        bernoulli(toy, [bare], MaskBank(), part="prompt")
