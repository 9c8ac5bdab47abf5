"""Membership attacks: published vectors, other libraries' AUC, and token scores from single forwards."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch

from conftest import FACTS, build_toy
from remask.diffusion.likelihood import elbo, pll
from remask.diffusion.masks import MaskBank
from remask.errors import RemaskError
from remask.evaluation.metrics.masked import balanced_masks
from remask.evaluation.metrics.membership import (
    auc,
    membership_scores,
    min_k,
    privacy_leakage,
    reference_score,
    token_scores,
    zlib_score,
)

BANK = MaskBank(draws=2, replicates=2, seed=1)


# ------------------------------------------------------------------ on arrays
def test_privleak_vector() -> None:
    """Conventional AUC 0.70 against a retrained model's 0.48."""
    assert privacy_leakage(0.70, 0.48) == pytest.approx(-42.308, abs=1e-3)
    assert privacy_leakage(0.48, 0.48) == 0.0
    assert privacy_leakage(1.0, 0.48) == -100.0  # all memorised
    assert privacy_leakage(0.0, 0.48) > 90  # suspiciously unknown


def test_auc_is_the_share_of_ordered_pairs() -> None:
    forget, holdout = [1.0, 2.0, 2.0], [2.0, 3.0]
    pairs = [(h > f) + (h == f) / 2 for f in forget for h in holdout]
    assert auc(forget, holdout) == pytest.approx(np.mean(pairs))
    assert auc([0.0, 0.1], [5.0]) == 1.0
    assert auc([5.0], [0.0, 0.1]) == 0.0
    assert auc([1.0] * 3, [1.0] * 4) == 0.5


def test_auc_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(0, 1, 70).round(1), rng.normal(0.4, 1, 90).round(1)  # with ties
    want = metrics.roc_auc_score([0] * 70 + [1] * 90, np.concatenate([forget, holdout]))
    assert auc(forget, holdout) == pytest.approx(want)


def test_min_k_takes_the_lowest_tokens() -> None:
    scores = [-1.0, -5.0, -3.0, -0.5, -2.0]
    assert min_k(scores, 0.4) == pytest.approx(4.0)
    assert min_k(scores, 0.1) == 5.0  # at least one
    assert min_k(scores, 1.0) == pytest.approx(2.3)
    assert min_k(scores, 0.79) == pytest.approx(10 / 3)  # floor
    assert min_k([-2.0]) == 2.0


def test_zlib_and_reference_scores() -> None:
    text = "the cat sat on the mat, the cat sat on the mat"
    assert zlib_score(2.0, text) == 2.0 / len(zlib.compress(text.encode("utf-8")))
    assert math.isfinite(zlib_score(2.0, ""))
    assert reference_score([2.0, 1.0], [0.5, 3.0]) == pytest.approx([1.5, -2.0])


def test_bad_input_is_named() -> None:
    with pytest.raises(RemaskError, match="never saw the forget set"):
        privacy_leakage(0.7, None)
    with pytest.raises(RemaskError, match="never saw the forget set"):
        reference_score([1.0], None)
    for attack, reference in ((1.2, 0.5), (0.5, 1.0), (math.nan, 0.5)):
        with pytest.raises(RemaskError, match="AUC"):
            privacy_leakage(attack, reference)
    with pytest.raises(RemaskError, match="holdout"):
        auc([1.0], [])
    with pytest.raises(RemaskError, match="share"):
        min_k([-1.0], 40)
    with pytest.raises(RemaskError, match="token"):
        min_k([])


# ------------------------------------------------------------------ on models
@pytest.mark.parametrize("fact", FACTS[:3])
def test_token_scores_are_means_over_single_forwards(fact) -> None:
    """Every mask on its own, with the definitions of mean and variance of log p under p in fp64."""
    lm = build_toy()
    row = lm.encode(fact)
    start = len(row.prompt_ids)
    masks = balanced_masks(len(row.answer_ids), 2, (1, 2, 4), 7, row.id)
    plain, standard = [[] for _ in row.answer_ids], [[] for _ in row.answer_ids]
    for mask in masks:
        ids = torch.tensor([row.ids])
        places = start + np.nonzero(mask)[0]
        ids[0, places] = lm.spec.mask_id
        with torch.inference_mode():
            logprobs = lm.logits(ids)[0].double().log_softmax(-1).numpy()
        for place in places:
            p = np.exp(logprobs[place])
            mean = (p * logprobs[place]).sum()
            deviation = math.sqrt((p * logprobs[place] ** 2).sum() - mean**2)
            value = logprobs[place][row.ids[place]]
            plain[place - start].append(value)
            standard[place - start].append((value - mean) / deviation)
    (score,) = token_scores(lm, [row], draws=2, seed=7)
    assert score.logprobs == pytest.approx([np.mean(values) for values in plain], rel=1e-4)
    assert score.standardised == pytest.approx([np.mean(values) for values in standard], rel=1e-3)


def test_folds_as_many_as_tokens_give_the_pseudo_likelihood() -> None:
    """Every token masked alone: the sum of token scores is `pll`."""
    lm = build_toy()
    rows = [lm.encode(fact) for fact in FACTS]
    for score, want in zip(token_scores(lm, rows, draws=1, folds=(99,)), pll(lm, rows), strict=True):
        assert score.logprobs.sum() == pytest.approx(want.logprob, rel=1e-5)


def test_token_scores_do_not_depend_on_batches() -> None:
    lm = build_toy()
    rows = [lm.encode(fact) for fact in FACTS]
    for one, other in zip(token_scores(lm, rows), token_scores(lm, rows[::-1], token_budget=64)[::-1], strict=True):
        assert one.id == other.id
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    with pytest.raises(RemaskError, match="draw"):
        token_scores(lm, rows, draws=0)


def test_attacks_read_their_definitions() -> None:
    lm, never = build_toy(), build_toy(seed=1)
    facts = FACTS[:4]
    rows, texts = [lm.encode(fact) for fact in facts], [fact.answer for fact in facts]
    scores = membership_scores(lm, rows, texts, BANK, reference=never)
    loss = np.array([-s.logprob / s.tokens for s in elbo(lm, rows, BANK)])
    base = np.array([-s.logprob / s.tokens for s in elbo(never, rows, BANK)])
    tokens = token_scores(lm, rows, draws=2, seed=1)
    assert scores.loss == pytest.approx(loss)
    assert scores.reference == pytest.approx(loss - base)
    assert scores.zlib == pytest.approx([v / len(zlib.compress(f.answer.encode())) for v, f in zip(loss, facts, strict=True)])
    assert scores.min_k == pytest.approx([min_k(s.logprobs) for s in tokens])
    assert scores.min_k_plus_plus == pytest.approx([min_k(s.standardised) for s in tokens])
    assert membership_scores(lm, rows, texts, BANK).reference is None
    assert membership_scores(lm, rows, texts, BANK, reference=lm).reference == pytest.approx([0.0] * 4, abs=0)


def test_every_attack_finds_what_was_taught(taught) -> None:
    """Members are facts of the training set, the others the same questions with one another's answers."""
    swapped = [type(a)(f"{a.id}'", a.prompt, a.subject, b.answer) for a, b in zip(FACTS, FACTS[3:] + FACTS[:3], strict=True)]
    members, others = (
        membership_scores(
            taught, [taught.encode(fact) for fact in facts], [fact.answer for fact in facts], BANK, reference=build_toy()
        )
        for facts in (FACTS, swapped)
    )
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference"):
        assert auc(getattr(members, name), getattr(others, name)) > 0.9, name
