"""Likelihoods against numbers from the originals' own code, on the originals' own masks (goldens/*/NOTES.md)."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import GOLDEN_OPTIONS, GOLDENS
from remask.backbones import Encoded, MaskedDiffusionLM, load
from remask.diffusion.likelihood import bernoulli, chain, elbo, elbo_exact, pll
from remask.diffusion.masks import MaskBank
from remask.errors import RemaskError

CASES = {
    name: json.loads((GOLDENS / name / "likelihood.json").read_text())["cases"] for name in ("llada", "llada_moe", "dream")
}
PARTS = {"ftb": "answer", "btf": "prompt", "union": "all"}  # Dream's names
LLADA = [pytest.param(name, case, id=f"{name}-{case['name']}") for name in ("llada", "llada_moe") for case in CASES[name]]
DREAM = {kind: [case for case in CASES["dream"] if case["args"]["nll_type"].startswith(kind)] for kind in ("mc", "ar")}
ROUNDING = 1e-3  # absolute: the originals sum in fp32, losses reach 400


@pytest.fixture(scope="module")
def models() -> dict[str, MaskedDiffusionLM]:
    return {name: load(GOLDENS / name, **options) for name, options in GOLDEN_OPTIONS.items()}


def by_name(cases: list[dict]) -> list:
    return [pytest.param(case, id=case["name"]) for case in cases]


def stored_masks(case: dict, mask_id: int, start: int, stop: int) -> np.ndarray:
    return np.array([row[start:stop] for batch in case["perturbed_ids"] for row in batch]) == mask_id


def flat(batches: list[list[float]]) -> np.ndarray:
    return np.array([value for batch in batches for value in batch])


# ------------------------------------------------------------------ LLaDA: get_log_likelihood.py
@pytest.mark.parametrize(("family", "case"), LLADA)
def test_elbo_on_the_originals_masks(models, family: str, case: dict) -> None:
    """Every sample's loss (as a replicate) and the result, with and without classifier-free guidance."""
    lm, start = models[family], len(case["prompt_ids"])
    masks = stored_masks(case, lm.spec.mask_id, start, start + len(case["answer_ids"]))
    bank = SimpleNamespace(draws=1, replicates=len(masks), masks=lambda key, length: masks)
    row = Encoded("case", tuple(case["prompt_ids"]), tuple(case["answer_ids"]), (0, 1))
    score = elbo(lm, [row], bank, cfg_scale=case["args"]["cfg_scale"])[0]
    np.testing.assert_allclose(score.replicates, -flat(case["per_sample_loss"]), atol=ROUNDING)
    assert score.logprob == pytest.approx(case["result"], abs=ROUNDING)


def test_guidance_is_not_inert(models) -> None:
    case = next(case for case in CASES["llada"] if case["args"]["cfg_scale"])
    row = Encoded("case", tuple(case["prompt_ids"]), tuple(case["answer_ids"]), (0, 1))
    plain, guided = (elbo(models["llada"], [row], MaskBank(), cfg_scale=scale)[0].logprob for scale in (0.0, 0.5))
    assert abs(plain - guided) > 0.1


# ------------------------------------------------------------------ Dream: eval/eval.py
def dream_row(case: dict) -> Encoded:
    return Encoded(case["name"], tuple(case["prefix_ids"]), tuple(case["target_ids"]), (0, 1))


def dream_span(case: dict) -> tuple[int, int]:
    prefix, whole = len(case["prefix_ids"]), len(case["prefix_ids"]) + len(case["target_ids"])
    return {"ftb": (prefix, whole), "btf": (0, prefix), "union": (0, whole)}[case["args"]["log_type"]]


@pytest.mark.parametrize("case", by_name(DREAM["mc"]))
def test_bernoulli_on_the_originals_masks(models, case: dict) -> None:
    lm = models["dream"]
    masks, shares = stored_masks(case, lm.spec.mask_id, *dream_span(case)), flat(case["p_mask"])
    bank = SimpleNamespace(draws=1, replicates=len(masks), bernoulli=lambda key, length: (masks, shares))
    score = bernoulli(lm, [dream_row(case)], bank, part=PARTS[case["args"]["log_type"]])[0]
    np.testing.assert_allclose(score.replicates, -flat(case["per_sample_loss"]), atol=ROUNDING)
    assert score.logprob == pytest.approx(-case["nll"], abs=ROUNDING)


@pytest.mark.parametrize("case", by_name(DREAM["ar"]))
def test_chain_in_the_originals_orders(models, case: dict) -> None:
    """Dream also scores position 0, from the mask that stands there itself; that term is computed here and put aside."""
    lm, (start, stop) = models["dream"], dream_span(case)
    canvases = torch.tensor([row for batch in case["perturbed_ids"] for row in batch])
    forward = case["args"]["nll_type"] == "ar_ftb"
    untaught = 0.0
    if start == 0:
        with torch.inference_mode():
            logits = lm.model(input_ids=canvases[:1]).logits[0, 0]
        untaught = float(logits.log_softmax(-1)[case["prefix_ids"][0]])
    order, part = "forward" if forward else "backward", PARTS[case["args"]["log_type"]]
    score = chain(lm, [dream_row(case)], order=order, part=part)[0]
    assert score.logprob + untaught == pytest.approx(-case["nll"], abs=ROUNDING)
    assert score.tokens == stop - max(start, 1)


def test_a_one_token_answer_has_a_score_unlike_the_originals(models) -> None:
    case = next(case for case in DREAM["mc"] if len(case["target_ids"]) == 1)
    assert case["loglikelihood"] == 0.0
    row = dream_row(case)
    exact = elbo_exact(models["dream"], [row])[0].logprob
    assert exact < -1
    estimate = bernoulli(models["dream"], [row], MaskBank(draws=8, replicates=200))[0]
    assert abs(estimate.logprob - exact) < 4 * estimate.stderr


# ------------------------------------------------------------------ every family
def family_rows(lm: MaskedDiffusionLM) -> list[Encoded]:
    rng = np.random.default_rng(7)
    ids = [int(i) for i in rng.integers(1, 190, size=60)]
    return [
        Encoded("a", tuple(ids[0:9]), tuple(ids[9:13]), (0, 1)),
        Encoded("b", tuple(ids[13:16]), tuple(ids[16:19]), (0, 1)),
        Encoded("c", tuple(ids[20:27]), tuple(ids[27:28]), (0, 1)),
        Encoded("d", tuple(ids[30:36]), tuple(ids[36:42]), (0, 1)),
    ]


def raw_logits(lm: MaskedDiffusionLM, canvas: list[int]) -> torch.Tensor:
    """Logits [L, V] of one row alone; the shift is undone here, by hand, wherever transformers' own forward applies."""
    ids = torch.tensor([canvas])
    with torch.inference_mode():
        if lm.spec.attention_block:
            return lm.logits(ids)[0]
        logits = lm.model(input_ids=ids).logits[0]
    return torch.cat([logits[:1], logits[:-1]]) if lm.spec.shift else logits


def slow_chain(lm: MaskedDiffusionLM, row: Encoded, order: tuple[int, ...], scale: float) -> float:
    start, total = len(row.prompt_ids), 0.0
    answer = [lm.spec.mask_id] * len(row.answer_ids)
    for place in order:
        logits = raw_logits(lm, [*row.prompt_ids, *answer])
        if scale:
            free = raw_logits(lm, [lm.spec.mask_id] * start + answer)
            logits = free + (scale + 1) * (logits - free)
        total += float(logits[start + place].double().log_softmax(-1)[row.answer_ids[place]])
        answer[place] = row.answer_ids[place]
    return total


@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize("family", GOLDEN_OPTIONS)
def test_exact_bound_is_the_mean_over_every_order(models, family: str, scale: float) -> None:
    lm = models[family]
    row = family_rows(lm)[1]
    orders = list(itertools.permutations(range(len(row.answer_ids))))
    slow = [slow_chain(lm, row, order, scale) for order in orders]
    fast = [score.logprob for score in chain(lm, [row] * len(orders), order=orders, cfg_scale=scale)]
    assert fast == pytest.approx(slow, abs=1e-4)
    assert elbo_exact(lm, [row], cfg_scale=scale)[0].logprob == pytest.approx(np.mean(slow), abs=1e-4)
    assert np.std(slow) > 1e-3


@pytest.mark.parametrize("family", GOLDEN_OPTIONS)
def test_batches_of_rows_and_budgets_change_nothing(models, family: str) -> None:
    lm, bank = models[family], MaskBank(draws=2, replicates=2)
    rows = family_rows(lm)
    estimators = [
        lambda rows, **kw: elbo(lm, rows, bank, **kw),
        lambda rows, **kw: bernoulli(lm, rows, bank, part="all", **kw),
        lambda rows, **kw: chain(lm, rows, order="backward", **kw),
        lambda rows, **kw: pll(lm, rows, cfg_scale=0.5, **kw),
    ]
    for estimator in estimators:
        together = [score.logprob for score in estimator(rows)]
        alone = [estimator([row], token_budget=1)[0].logprob for row in rows]
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "side"),
    [
        (family, side)
        for family, options in GOLDEN_OPTIONS.items()
        for side in ("left", "right")
        if side == "right" or "attention_block" not in options  # padding on the left moves the borders of its blocks
    ],
)
def test_padded_batches_give_the_same_pll(models, family: str, side: str) -> None:
    """All canvases of all rows in one padded batch: what a code that pads would compute."""
    lm = models[family]
    rows = family_rows(lm)
    jobs = [(r, i) for r, row in enumerate(rows) for i in range(len(row.answer_ids))]
    width = max(len(row.ids) for row in rows) + 2
    ids = torch.full((len(jobs), width), lm.spec.pad_id)
    real = torch.zeros(len(jobs), width, dtype=torch.bool)
    places = []
    for job, (r, i) in enumerate(jobs):
        offset = width - len(rows[r].ids) if side == "left" else 0
        ids[job, offset : offset + len(rows[r].ids)] = torch.tensor(rows[r].ids)
        real[job, offset : offset + len(rows[r].ids)] = True
        places.append(offset + len(rows[r].prompt_ids) + i)
        ids[job, places[-1]] = lm.spec.mask_id
    with torch.inference_mode():
        logits = lm.logits(ids, real).double().log_softmax(-1)
    expected = np.zeros(len(rows))
    for job, (r, i) in enumerate(jobs):
        expected[r] += float(logits[job, places[job], rows[r].answer_ids[i]])
    assert [score.logprob for score in pll(lm, rows)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["dream", "diffullama"])
def test_an_answer_at_position_0_is_refused_where_logits_are_shifted(models, family: str) -> None:
    lm = models[family]
    row = Encoded("bare", (), (5, 6, 7), (0, 1))
    for estimator in (elbo, bernoulli):
        with pytest.raises(RemaskError, match=r"'bare' has no prompt.*BOS"):
            estimator(lm, [row], MaskBank())
    for estimator in (elbo_exact, chain, pll):
        with pytest.raises(RemaskError, match=r"'bare' has no prompt.*BOS"):
            estimator(lm, [row])
    assert elbo_exact(models["llada"], [row])[0].tokens == 3  # unshifted families predict it
