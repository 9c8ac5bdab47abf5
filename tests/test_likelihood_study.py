"""The likelihood estimators estimate the bound they say they do: exactly by orders, and within noise over many replicates."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.special import betainc, gammaln
from scipy.stats import chi2

from conftest import GOLDEN_OPTIONS, GOLDENS
from remask.backbones import Encoded, MaskedDiffusionLM, load
from remask.diffusion.likelihood import bernoulli, chain, elbo, elbo_exact
from remask.diffusion.masks import MIN_SHARE, MaskBank

REPLICATES = 400
Z = 4.0  # of a mean over REPLICATES; the seeds are fixed, so the tests do not flicker


@pytest.fixture(scope="module")
def models() -> dict[str, MaskedDiffusionLM]:
    return {name: load(GOLDENS / name, **options) for name, options in GOLDEN_OPTIONS.items()}


def answer_of(length: int) -> Encoded:
    ids = [int(i) for i in np.random.default_rng(11).integers(1, 190, size=40)]
    return Encoded(f"row{length}", tuple(ids[:7]), tuple(ids[10 : 10 + length]), (0, 1))


def conditionals(lm: MaskedDiffusionLM, row: Encoded) -> dict[frozenset[int], np.ndarray]:
    """log p(answer token | the visible ones), [L], for every set of hidden answer positions: one batch, no estimator."""
    start, length = len(row.prompt_ids), len(row.answer_ids)
    hidden = [frozenset(c) for size in range(1, length + 1) for c in itertools.combinations(range(length), size)]
    canvas = torch.tensor([row.ids] * len(hidden))
    for i, places in enumerate(hidden):
        canvas[i, [start + place for place in places]] = lm.spec.mask_id
    with torch.inference_mode():
        logp = lm.logits(canvas).double().log_softmax(-1)[:, start : start + length]
    return dict(zip(hidden, logp[:, range(length), list(row.answer_ids)].numpy(), strict=True))


# ------------------------------------------------------------------ the bound is the mean over orders
@pytest.mark.parametrize("length", [2, 5, 6])
@pytest.mark.parametrize("family", GOLDEN_OPTIONS)
def test_exact_bound_is_the_mean_chain_over_all_orders(models, family: str, length: int) -> None:
    """Up to 720 orders, each summed on its own from the model's conditionals."""
    lm, row = models[family], answer_of(length)
    table = conditionals(lm, row)
    orders = list(itertools.permutations(range(length)))
    nll = [-sum(table[frozenset(order[k:])][order[k]] for k in range(length)) for order in orders]
    assert len(nll) == math.factorial(length)
    assert np.std(nll) > 1e-3  # the orders differ
    assert -elbo_exact(lm, [row])[0].logprob == pytest.approx(np.mean(nll), abs=1e-3)
    some = list(range(0, len(orders), 7))[:20]
    scores = chain(lm, [row] * len(some), order=[orders[i] for i in some])
    assert [-score.logprob for score in scores] == pytest.approx([nll[i] for i in some], abs=1e-3)


# ------------------------------------------------------------------ estimates are unbiased
def z_value(replicates: np.ndarray, truth: float) -> float:
    return float((replicates.mean() - truth) / (replicates.std(ddof=1) / math.sqrt(len(replicates))))


@pytest.mark.parametrize("draws", [1, 3, 4])
@pytest.mark.parametrize("family", GOLDEN_OPTIONS)
def test_stratified_estimates_are_unbiased(models, family: str, draws: int) -> None:
    lm, row = models[family], answer_of(6)
    score = elbo(lm, [row], MaskBank(draws, REPLICATES, seed=5))[0]
    assert len(score.replicates) == REPLICATES
    assert abs(z_value(np.array(score.replicates), elbo_exact(lm, [row])[0].logprob)) < Z


@pytest.mark.parametrize("family", GOLDEN_OPTIONS)
def test_the_z_test_sees_wrong_weights(models, family: str) -> None:
    """Same masks, same conditionals, other weights: the test above would reject each of them."""
    lm, row, bank = models[family], answer_of(6), MaskBank(4, REPLICATES, seed=5)
    table, masks, length = conditionals(lm, row), bank.masks(row.id, 6), 6
    counts = masks.sum(axis=1)
    sums = np.array([table[frozenset(np.nonzero(mask)[0].tolist())][mask].sum() for mask in masks])
    truth = elbo_exact(lm, [row])[0].logprob
    z = lambda weights: z_value((weights * sums).reshape(REPLICATES, 4).mean(axis=1), truth)  # noqa: E731
    assert abs(z(length / counts)) < Z
    for wrong in (np.ones(len(counts)), length / (counts + 1), (length + 1) / (counts + 1), 1 / counts):
        assert abs(z(wrong)) > Z


@pytest.mark.parametrize("family", GOLDEN_OPTIONS)
def test_bernoulli_estimates_are_unbiased(models, family: str) -> None:
    """Against its own expectation, with p in [MIN_SHARE, 1]: k of L tokens hidden have the weight of an incomplete beta."""
    lm, row, length = models[family], answer_of(6), 6
    truth = 0.0
    for hidden, logp in conditionals(lm, row).items():
        k = len(hidden)
        beta = math.exp(gammaln(k) + gammaln(length - k + 1) - gammaln(length + 1))
        truth += beta * (1 - betainc(k, length - k + 1, MIN_SHARE)) / (1 - MIN_SHARE) * logp[list(hidden)].sum()
    assert truth == pytest.approx(elbo_exact(lm, [row])[0].logprob, rel=5 * MIN_SHARE)  # the same bound but for p < MIN_SHARE
    score = bernoulli(lm, [row], MaskBank(4, REPLICATES, seed=5))[0]
    assert abs(z_value(np.array(score.replicates), truth)) < Z


# ------------------------------------------------------------------ why: every draw alone is a fair one
@pytest.mark.parametrize("draws", [1, 2, 5])
def test_every_draw_alone_hides_a_uniform_subset(draws: int) -> None:
    """Whatever ties the draws of a replicate together, each one given its count is uniform over subsets of that size."""
    length, banks = 5, 1500
    masks = np.stack([MaskBank(draws, 1).masks(f"row{i}", length) for i in range(banks)])
    for draw in range(draws):
        packed = Counter(map(tuple, masks[:, draw].tolist()))
        for count in range(1, length + 1):
            sizes = [packed[mask] for mask in itertools.product([False, True], repeat=length) if sum(mask) == count]
            total, cells = sum(sizes), len(sizes)
            if cells == 1 or total < 5 * cells:
                continue
            statistic = sum((size - total / cells) ** 2 for size in sizes) / (total / cells)
            assert statistic < chi2.ppf(1 - 1e-5, cells - 1)


@pytest.mark.parametrize("draws", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_every_count_is_equally_likely(draws: int, length: int) -> None:
    """The replicate's expected share of each count is 1 / L; a replicate is one observation, its draws are not."""
    banks = 1000
    masks = np.stack([MaskBank(draws, 1).masks(f"row{i}", length) for i in range(banks)])
    shares = (masks.sum(axis=2)[:, :, None] == np.arange(1, length + 1)).mean(axis=1)  # [banks, length]
    spread = shares.std(axis=0, ddof=1) / math.sqrt(banks)
    assert (np.abs(shares.mean(axis=0) - 1 / length) <= Z * spread + 1e-12).all()
