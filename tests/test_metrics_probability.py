"""Truth ratio, model utility and forget quality: published vectors, real logs of two models, and exact small cases."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import FACTS, build_toy
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.errors import RemaskError
from remask.evaluation.benchmarks.tofu import load_tofu
from remask.evaluation.metrics.probability import (
    SplitUtility,
    answer_scores,
    closer_to_one,
    length_normalised,
    log_truth_ratio,
    measure_utility,
    model_utility,
    normalised_probability,
    preference,
    split_utility,
    true_better,
    truth_ratio,
)
from remask.evaluation.metrics.reference import (
    critical_difference,
    distance,
    forget_quality,
    prediction_divergence,
)
from remask.facts import Fact
from test_tofu import DATA, real

LOGS = DATA.parent / "tofu_logs"
logged = pytest.mark.skipif(
    not (LOGS / "EXPECTED.json").is_file(),
    reason=f"no TOFU logs at {LOGS}: they are not part of the repository; set REMASK_DATA to a folder that holds tofu_logs",
)
SPLITS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
MODELS = ("phi_full", "phi_retain90")
VARIANTS = ("geometric", "arithmetic")


# ------------------------------------------------------------------ published vectors
def test_truth_ratio_vectors() -> None:
    assert truth_ratio(1.0, [2.0, 3.0, 4.0]) == pytest.approx(0.135335, abs=1e-6)
    assert truth_ratio(1.0, [2.0, 3.0, 4.0], "arithmetic") == pytest.approx(0.184333, abs=1e-6)
    assert normalised_probability(1.0, [2.0, 3.0, 4.0]) == pytest.approx(0.643914, abs=1e-6)


def test_model_utility_vector() -> None:
    nine = (0.9, 0.8, 0.7), (0.6, 0.5, 0.9), (0.8, 0.7, 0.6)
    assert model_utility(*(SplitUtility(*three) for three in nine)) == pytest.approx(0.6969883, abs=1e-7)


def test_any_zero_makes_model_utility_zero() -> None:
    fine = SplitUtility(0.9, 0.8, 0.7)
    assert model_utility(fine, SplitUtility(0.5, 0.0, 0.5), fine) == 0.0


@pytest.mark.parametrize(("n", "pvalue"), [(40, 1.8603e-23), (200, 1.9426e-119), (400, 1.0636e-239)])
def test_forget_quality_of_disjoint_samples(n: int, pvalue: float) -> None:
    quality = forget_quality(np.arange(1, n + 1), np.arange(1, n + 1) + n)
    assert quality.statistic == 1.0
    assert quality.pvalue == pytest.approx(pvalue, rel=1e-4)
    assert quality.log10 == pytest.approx(math.log10(pvalue), abs=1e-4)


@pytest.mark.parametrize(("n", "shift", "statistic", "pvalue"), [(40, 20, 0.5, 6.5769e-05), (400, 40, 0.1, 0.036570)])
def test_forget_quality_of_shifted_samples(n: int, shift: int, statistic: float, pvalue: float) -> None:
    quality = forget_quality(1.0 + np.arange(n), 1.0 + np.arange(n) + shift)
    assert quality.statistic == pytest.approx(statistic)
    assert quality.pvalue == pytest.approx(pvalue, rel=1e-4)
    assert (quality.statistic >= quality.critical) == (quality.pvalue <= 0.05)


def test_forget_quality_of_a_model_with_itself_is_one() -> None:
    ratios = np.random.default_rng(0).lognormal(size=40)
    assert forget_quality(ratios, ratios).pvalue == 1.0


def test_forget_quality_is_of_either_ratio() -> None:
    a, b = np.random.default_rng(1).lognormal(size=(2, 60))
    assert forget_quality(1 / a, 1 / b).pvalue == pytest.approx(forget_quality(a, b).pvalue)


# ------------------------------------------------------------------ real logs
@pytest.fixture(scope="module")
def logs() -> dict:
    return {model: json.loads((LOGS / f"{model}.json").read_text()) for model in MODELS}


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((LOGS / "EXPECTED.json").read_text())


def column(logs: dict, model: str, split: str, field: str) -> np.ndarray:
    values = logs[model][SPLITS[split]][field]
    return np.array([values[str(index)] for index in range(len(values))])


def utility(logs: dict, model: str, split: str, variant) -> SplitUtility:
    fields = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
    return split_utility(
        *(column(logs, model, split, field) for field in fields), normalised=split != "retain", variant=variant
    )


@logged
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_split_numbers_of_the_logs(logs, expected, model: str, split: str, variant) -> None:
    answer = column(logs, model, split, "avg_gt_loss")
    right = column(logs, model, split, "avg_paraphrased_loss")
    wrong = column(logs, model, split, "average_perturb_loss")
    want = expected["models"][model][split]
    assert wrong.shape == (want["n"], 5 if split in ("retain", "forget") else 3)
    ratio = truth_ratio(right, wrong, variant)
    assert ratio.mean() == pytest.approx(want[f"truth_ratio_mean_{variant}"], abs=1e-9)
    aggregate = closer_to_one if split == "forget" else true_better
    assert aggregate(ratio).mean() == pytest.approx(want[f"truth_ratio_aggregate_{variant}"], abs=1e-9)
    tokens = column(logs, model, split, "num_token_gt")
    assert length_normalised(-answer * tokens, tokens).mean() == pytest.approx(want["probability_raw"], abs=1e-9)
    if variant == "geometric":
        assert preference(ratio).mean() == pytest.approx(want["truth_ratio_prob_mean"], abs=1e-9)
        assert ratio == pytest.approx(column(logs, model, split, "truth_ratio"), rel=2e-6)  # stored in single precision
    if "probability_normalised" in want:
        assert normalised_probability(answer, wrong).mean() == pytest.approx(want["probability_normalised"], abs=1e-9)


@logged
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_utility_of_the_logs(logs, expected, model: str, variant) -> None:
    parts = [utility(logs, model, split, variant) for split in ("retain", "real_authors", "world_facts")]
    assert model_utility(*parts) == pytest.approx(expected["models"][model]["model_utility"][variant], abs=1e-9)


@logged
@pytest.mark.parametrize("variant", VARIANTS)
def test_forget_quality_of_the_logs(logs, expected, variant) -> None:
    want = expected["forget_quality"][0][variant]
    ratios = [
        truth_ratio(
            column(logs, m, "forget", "avg_paraphrased_loss"), column(logs, m, "forget", "average_perturb_loss"), variant
        )
        for m in MODELS
    ]
    quality = forget_quality(*ratios)
    assert quality.n == want["n1"]
    assert quality.statistic == pytest.approx(want["ks_statistic"], abs=1e-12)
    assert quality.pvalue == pytest.approx(want["p_value"], rel=1e-6)
    assert quality.log10 == pytest.approx(want["log10_p"], abs=1e-6)
    for model, sample in zip(MODELS, ratios, strict=True):
        first = expected["first_items"][model][f"forget_truth_ratio_{variant}"]
        assert sample[:3] == pytest.approx(first, rel=1e-9)


# ------------------------------------------------------------------ properties
def test_arithmetic_ratio_is_never_the_smaller_one() -> None:
    rng = np.random.default_rng(2)
    right, wrong = rng.exponential(2, 100), rng.exponential(3, (100, 3))
    assert (truth_ratio(right, wrong, "arithmetic") >= truth_ratio(right, wrong)).all()


def test_one_wrong_answer_has_one_ratio() -> None:
    assert truth_ratio(1.5, [2.0]) == pytest.approx(truth_ratio(1.5, [2.0], "arithmetic")) == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_equal_answers_are_at_chance(count: int) -> None:
    assert normalised_probability(2.0, [2.0] * count) == pytest.approx(1 / (1 + count))
    for variant in VARIANTS:
        assert truth_ratio(2.0, [2.0] * count, variant) == pytest.approx(1.0)


def test_ratios_stay_finite_where_probabilities_underflow() -> None:
    assert log_truth_ratio(2000.0, [2001.0, 2003.0], "geometric") == pytest.approx(-2.0)
    assert log_truth_ratio(2000.0, [2001.0, 2001.0], "arithmetic") == pytest.approx(-1.0)
    assert normalised_probability(2000.0, [2000.0]) == pytest.approx(0.5)


def test_aggregates_at_the_ends() -> None:
    assert closer_to_one([0.0, 0.5, 1.0, 2.0, math.inf]) == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert true_better([0.0, 0.5, 1.0, 3.0, math.inf]) == pytest.approx([1, 0.5, 0, 0, 0])
    assert preference([0.0, 1.0, math.inf]) == pytest.approx([1, 0.5, 0])


def test_correction_takes_off_the_bias_of_the_exponential() -> None:
    rng = np.random.default_rng(3)
    noisy = -12.0 + rng.normal(0, 1.2, 400_000)  # six tokens: a standard error of 0.2 per token
    truth = math.exp(-2.0)
    plain, corrected = length_normalised(noisy, 6).mean(), length_normalised(noisy, 6, 1.2).mean()
    assert plain - truth == pytest.approx(truth * 0.02, rel=0.1)
    assert abs(corrected - truth) < 0.05 * (plain - truth)


def test_bad_ratio_input_is_named() -> None:
    with pytest.raises(RemaskError, match="geometric or arithmetic"):
        truth_ratio(1.0, [2.0], "harmonic")
    with pytest.raises(RemaskError, match="wrong answer"):
        truth_ratio([1.0], np.zeros((1, 0)))


# ------------------------------------------------------------------ what n questions can show
def lattice_pvalue(n: int, steps: int) -> float:
    """P(D >= steps / n) for two samples of n, by counting the orders in which they can interleave."""
    hit = 0
    for first in itertools.combinations(range(2 * n), n):
        walk = np.cumsum([1 if place in first else -1 for place in range(2 * n)])
        hit += np.abs(walk).max() >= steps
    return hit / math.comb(2 * n, n)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7])
def test_critical_difference_is_exact(n: int) -> None:
    rejecting = [steps / n for steps in range(1, n + 1) if lattice_pvalue(n, steps) <= 0.05]
    assert critical_difference(n) == (min(rejecting) if rejecting else math.inf)


def test_critical_difference_of_forget01() -> None:
    """About 0.304 by the asymptotic formula; D moves in steps of 1 / 40."""
    asymptotic = stats.kstwobign.isf(0.05) * math.sqrt(2 / 40)
    assert asymptotic == pytest.approx(0.304, abs=5e-4)
    assert critical_difference(40) * 40 == pytest.approx(round(critical_difference(40) * 40))
    assert 0 <= critical_difference(40) - asymptotic < 1 / 40
    assert critical_difference(400) == pytest.approx(stats.kstwobign.isf(0.05) * math.sqrt(2 / 400), abs=1 / 400)
    with pytest.raises(RemaskError, match="alpha"):
        critical_difference(40, 5.0)


def test_replicates_show_the_noise_of_the_estimator() -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(0, 1, (100, 1))
    calm, loud = (np.exp(truth + rng.normal(0, scale, (100, 4))) for scale in (0.01, 2.0))
    quiet = forget_quality(calm, calm)
    assert (quiet.reliable, quiet.pvalue, quiet.replicates) == (True, 1.0, (1.0,) * 4)
    noisy = forget_quality(loud, calm)
    assert noisy.reliable is False
    assert len(noisy.replicates) == 4
    assert forget_quality(calm[:, 0], loud[:, 0]).reliable is None


# ------------------------------------------------------------------ refusals
def test_metrics_that_need_a_reference_refuse_without_one() -> None:
    lm = build_toy()
    for call in (
        lambda: forget_quality([1.0, 2.0], None),
        lambda: distance([1.0], None),
        lambda: prediction_divergence(lm, None, [lm.encode(FACTS[0])], MaskBank()),
    ):
        with pytest.raises(RemaskError, match="never saw the forget set"):
            call()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], "same"),
        ([1.0], [1.0], "two or more"),
        ([1.0, 0.0], [1.0, 2.0], "positive"),
        ([1.0, math.nan], [1.0, 2.0], "positive"),
    ],
)
def test_bad_forget_quality_input_is_named(first: list, second: list, message: str) -> None:
    with pytest.raises(RemaskError, match=message):
        forget_quality(first, second)


def test_distance_is_signed_and_paired() -> None:
    assert distance([-3.0, -1.0], [-2.0, -2.5]) == pytest.approx([-1.0, 1.5])
    with pytest.raises(RemaskError, match="same rows"):
        distance([1.0], [1.0, 2.0])


# ------------------------------------------------------------------ on a model
QUESTIONS = [
    Fact(
        "a",
        "Where was Ada Birk born?",
        "Ada Birk",
        "Lucca",
        perturbed=("Varna", "Arles", "Sligo"),
        paraphrased_answer="In Lucca",
    ),
    Fact("b", "What does Cleo Pell eat?", "Cleo Pell", "rye bread", perturbed=("crow", "a cat", "oats", "soup", "figs")),
]
BANK = MaskBank(draws=2, replicates=3, seed=5)


def test_answer_scores_are_elbo_scores() -> None:
    lm = build_toy()
    scores = answer_scores(lm, QUESTIONS, BANK)
    assert [(score.id, len(score.wrong)) for score in scores] == [("a", 3), ("b", 5)]
    assert scores[0].answer == elbo(lm, [lm.encode(QUESTIONS[0])], BANK)[0]
    assert scores[0].right == elbo(lm, [lm.encode(QUESTIONS[0], answer="In Lucca")], BANK)[0]
    assert scores[1].right == scores[1].answer  # no paraphrase
    losses = [-score.logprob / score.tokens for score in (scores[0].right, *scores[0].wrong)]
    assert scores[0].log_truth_ratio() == pytest.approx(losses[0] - sum(losses[1:]) / 3)
    assert scores[0].log_truth_ratios().mean() == pytest.approx(scores[0].log_truth_ratio())  # linear: exact
    assert scores[0].log_truth_ratios("arithmetic").shape == (3,)
    assert 0 < scores[1].normalised_probability() < 1


def test_utility_of_a_model_is_the_mean_over_its_facts() -> None:
    """Three wrong answers beside five in one set; generations of a random model may be empty or junk."""
    lm = build_toy()
    both = measure_utility(lm, QUESTIONS, BANK, normalised=True)
    single = [measure_utility(lm, [fact], BANK, normalised=True) for fact in QUESTIONS]
    for name in ("probability", "rouge", "truth_ratio"):
        assert getattr(both, name) == pytest.approx(np.mean([getattr(part, name) for part in single]))
    score = answer_scores(lm, QUESTIONS, BANK)
    assert both.probability == pytest.approx(np.mean([s.normalised_probability() for s in score]))
    with pytest.raises(RemaskError, match="at least one fact"):
        measure_utility(lm, [], BANK, normalised=True)


def test_a_fact_without_wrong_answers_is_named() -> None:
    with pytest.raises(RemaskError, match=r"ada/city.*perturbed"):
        answer_scores(build_toy(), FACTS[:1], BANK)


def test_divergence_from_itself_is_zero_and_from_another_is_not() -> None:
    lm, other = build_toy(), build_toy(seed=1)
    rows = [lm.encode(fact) for fact in FACTS[:3]]
    assert prediction_divergence(lm, lm, rows, BANK) == pytest.approx([0, 0, 0], abs=1e-12)
    assert (prediction_divergence(lm, other, rows, BANK) > 0.1).all()


def test_divergence_from_its_definition() -> None:
    """A one-token answer has one mask: scipy's entropy of the two distributions there."""
    lm, other = build_toy(), build_toy(seed=1)
    row = lm.encode(FACTS[0], answer="L")
    assert len(row.answer_ids) == 1
    ids = torch.tensor([[*row.prompt_ids, lm.spec.mask_id]])
    with torch.inference_mode():
        ours, theirs = (model.logits(ids)[0, -1].double().softmax(-1).numpy() for model in (lm, other))
    assert prediction_divergence(lm, other, [row], BANK) == pytest.approx([stats.entropy(theirs, ours)], rel=1e-4)


@real
@pytest.mark.parametrize(
    ("split", "count"), [("forget01_perturbed", 5), ("real_authors_perturbed", 3), ("world_facts_perturbed", 3)]
)
def test_tofus_wrong_answers_are_five_or_three(split: str, count: int) -> None:
    """What the truth ratio must take."""
    assert {len(fact.perturbed) for fact in load_tofu(DATA, split)} == {count}
