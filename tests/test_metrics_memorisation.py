"""Exact memorisation and extraction strength: Open-Unlearning's vectors, a naive search, and models that know everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import FACTS, build_toy
from remask.diffusion.masks import MaskBank
from remask.diffusion.sampler import SamplerConfig, infill
from remask.errors import RemaskError
from remask.evaluation.metrics.masked import balanced_masks, predictions, shuffled
from remask.evaluation.metrics.memorisation import (
    exact_memorisation,
    extraction_strength,
    matching_share,
    suffix_strength,
)

BANK = MaskBank(draws=2, replicates=2, seed=1)


# ------------------------------------------------------------------ on arrays
def loop_strength(matches: list[bool]) -> float:
    """Open-Unlearning's search: it leaves the loop at the last index without looking whether that one matched."""
    for k in range(len(matches)):
        if all(matches[k:]):
            break
    return 1 - k / len(matches)


def test_extraction_strength_vectors() -> None:
    nothing, two = [False] * 5, [False, True, False, True, True]
    assert loop_strength(nothing) == pytest.approx(0.2)  # the published defect
    assert suffix_strength(nothing) == 0.0
    assert suffix_strength(two) == loop_strength(two) == pytest.approx(0.4)
    assert suffix_strength([True] * 5) == 1.0


def test_extraction_strength_is_the_loops_wherever_the_last_token_matches() -> None:
    for bits in np.random.default_rng(0).random((60, 7)) < 0.6:
        matches = [*map(bool, bits), True]
        assert suffix_strength(matches) == pytest.approx(loop_strength(matches))
        assert suffix_strength([*matches[:-1], False]) == 0.0


def test_matching_share() -> None:
    assert matching_share([1, 2, 3, 4], [1, 9, 3, 9]) == 0.5
    with pytest.raises(RemaskError, match="one prediction a label"):
        matching_share([], [])
    with pytest.raises(RemaskError, match="one prediction a label"):
        matching_share([1, 2], [1])
    with pytest.raises(RemaskError, match="at least one"):
        suffix_strength([])


# ------------------------------------------------------------------ masks
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_balanced_masks_hit_every_token_equally_often(length: int) -> None:
    masks = balanced_masks(length, 3, (1, 2, 4), seed=0, row="a")
    assert (masks.sum(axis=0) == 9).all()
    assert masks.any(axis=1).all()
    assert len(masks) == 3 * sum(min(fold, length) for fold in (1, 2, 4))
    for count in (1, 2, 4):  # sizes within a fold differ by one at most
        first = {1: 0, 2: 1, 4: 1 + min(2, length)}[count]
        sizes = masks[first : first + min(count, length)].sum(axis=1)
        assert sizes.max() - sizes.min() <= 1


def test_masks_depend_on_their_keys_alone() -> None:
    first = balanced_masks(6, 2, (2,), 0, "a")
    assert (balanced_masks(6, 2, (2,), 0, "a") == first).all()
    assert (balanced_masks(6, 3, (2,), 0, "a")[:4] == first).all()
    assert not (balanced_masks(6, 2, (2,), 1, "a") == first).all()
    assert not (balanced_masks(6, 2, (2,), 0, "b") == first).all()
    short = shuffled(4, 0, "p", "a", 0)
    assert [i for i in shuffled(9, 0, "p", "a", 0) if i < 4] == list(short)  # answers of two lengths share the order
    with pytest.raises(RemaskError, match="folds"):
        balanced_masks(6, 1, (0,), 0, "a")
    with pytest.raises(RemaskError, match="answer tokens"):
        shuffled(5000, 0, "p", "a", 0)


def test_predictions_are_the_models_at_masked_positions() -> None:
    lm = build_toy()
    row = lm.encode(FACTS[1])
    mask = np.zeros((1, len(row.answer_ids)), dtype=bool)
    mask[0, 1] = True
    ((_, canvas, logprobs),) = predictions(lm, [row], [mask])
    place = len(row.prompt_ids) + 1
    assert canvas[0, place] == lm.spec.mask_id
    with torch.inference_mode():
        want = lm.logits(canvas)[0, place].log_softmax(-1)
    assert torch.allclose(logprobs[0], want, atol=1e-5)


# ------------------------------------------------------------------ on models
def test_memorisation_counts_right_predictions() -> None:
    """One canvas at a time, everything masked: the only mask of ratio 1."""
    lm = build_toy()
    rows = [lm.encode(fact) for fact in FACTS]
    result = exact_memorisation(lm, rows, BANK, (0.5, 1.0))
    assert result.shape == (8, 2)
    for row, value in zip(rows, result[:, 1], strict=True):
        ids = torch.tensor([[*row.prompt_ids, *[lm.spec.mask_id] * len(row.answer_ids)]])
        with torch.inference_mode():
            guess = lm.logits(ids)[0, len(row.prompt_ids) :].argmax(-1)
        assert value == pytest.approx(matching_share(guess.numpy(), row.answer_ids))
    again = exact_memorisation(lm, rows[::-1], BANK, (0.5, 1.0), token_budget=64)[::-1]
    assert (again == result).all()  # batches do not matter


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_memorisation_at_a_ratio_is_the_mean_over_single_forwards(taught, ratio: float) -> None:
    row = taught.encode(FACTS[7], answer="a blind cat")
    length, start = len(row.answer_ids), len(row.prompt_ids)
    shares = []
    for draw in range(4):  # of the bank: two draws in each of two replicates
        places = start + shuffled(length, 1, "memorisation", row.id, draw)[: math.ceil(ratio * length)]
        ids = torch.tensor([row.ids])
        ids[0, places] = taught.spec.mask_id
        with torch.inference_mode():
            guess = taught.logits(ids)[0].argmax(-1).numpy()
        shares.append(matching_share(guess[places], np.array(row.ids)[places]))
    assert exact_memorisation(taught, [row], BANK, (ratio, 1.0))[0, 0] == pytest.approx(np.mean(shares))


def test_a_taught_model_is_nearly_memorised_and_extracted(taught) -> None:
    rows = [taught.encode(fact) for fact in FACTS]
    assert exact_memorisation(taught, rows, BANK).mean() > 0.9
    strengths = [row.strength for row in extraction_strength(taught, rows)]
    assert np.mean(strengths) > 0.9
    other = build_toy()  # random
    assert exact_memorisation(other, rows, BANK).mean() < 0.2
    assert np.mean([row.strength for row in extraction_strength(other, rows)]) < 0.2


@pytest.mark.parametrize("reveal", ["prefix", "random"])
def test_extraction_is_the_smallest_success_of_a_naive_search(taught, reveal) -> None:
    """Against one decoding for every row and every k, on answers that the model knows only in part."""
    lm = taught
    rows = [lm.encode(a, answer=b.answer) for a, b in zip(FACTS, FACTS[2:] + FACTS[:2], strict=True)] + [lm.encode(FACTS[1])]
    rows = [type(row)(f"row{i}", row.prompt_ids, row.answer_ids, row.subject) for i, row in enumerate(rows)]
    config = SamplerConfig.default(lm)
    found = extraction_strength(lm, rows, config, reveal=reveal, seed=4)
    for row, result in zip(rows, found, strict=True):
        length = len(row.answer_ids)
        order = range(length) if reveal == "prefix" else shuffled(length, 4, "extraction", row.id, 0)
        for k in range(length + 1):
            shown = set(list(order)[:k])
            canvas = [*row.prompt_ids, *(t if i in shown else lm.spec.mask_id for i, t in enumerate(row.answer_ids))]
            if k == length or tuple(infill(lm, [canvas], config, keys=[row.id])[0].response) == row.ids:
                break
        assert (result.revealed, result.tokens) == (k, length)
        assert result.strength == 1 - k / length
    assert len({result.strength for result in found}) > 1


def test_bad_memorisation_input_is_named() -> None:
    lm = build_toy()
    with pytest.raises(RemaskError, match="mask ratios"):
        exact_memorisation(lm, [lm.encode(FACTS[0])], BANK, (0.0,))
    with pytest.raises(RemaskError, match="prefix or random"):
        extraction_strength(lm, [], reveal="suffix")
    assert extraction_strength(lm, []) == []
