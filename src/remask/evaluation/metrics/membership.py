"""Membership inference: can one tell from the model's scores that a text was in the training set?

Every score is signed "higher = less likely a member", so that AUC = 1 when forget texts stand out as members and 0.5 when they
cannot be told from holdout texts. Token scores of a masked diffusion model are means over masks that hit each token equally
often: s_i = mean of log p(a_i | q, a without M) over the masks M that hold i.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import mannwhitneyu

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.canvas import TOKEN_BUDGET
from ...diffusion.likelihood import elbo
from ...diffusion.masks import MaskBank
from ...errors import RemaskError
from .masked import balanced_masks, predictions
from .reference import require_reference

MIN_K = 0.4
FOLDS = (1, 2, 4)
VARIANCE_FLOOR = 1e-6  # of log p under p, as in Open-Unlearning


# ------------------------------------------------------------------ on arrays
def zlib_score(loss: float, text: str) -> float:
    """Loss over the size of the compressed text, nats per token and byte; takes out how predictable the text is anyway."""
    return loss / len(zlib.compress(text.encode()))


def reference_score(loss: ArrayLike, reference: ArrayLike | None) -> np.ndarray:
    """Loss above the reference model's on the same text, nats per token.

    Raises:
        RemaskError: no reference.
    """
    return np.asarray(loss, dtype=float) - np.asarray(require_reference(reference, "the reference attack"), dtype=float)


def min_k(scores: ArrayLike, share: float = MIN_K) -> float:
    """Min-K: minus the mean of the max(1, floor(share T)) lowest of T token scores (Shi et al., 2024).

    On log-probabilities this is Min-K%; on standardised ones, (log p_i - mu_i) / sigma_i, Min-K%++ (Zhang et al., 2024).

    Raises:
        RemaskError: no tokens, or a share outside of (0, 1].
    """
    values = np.sort(np.asarray(scores, dtype=float))
    if values.ndim != 1 or not len(values) or not 0 < share <= 1:
        raise RemaskError(f"Min-K needs at least one token score and a share in (0, 1], not {values.shape} and {share}")
    return float(-values[: max(1, int(len(values) * share))].mean())


def auc(forget: ArrayLike, holdout: ArrayLike) -> float:
    """P(holdout score > forget score) + P(equal) / 2, 0..1: 1 = every forget text stands out as a member, 0.5 = none does.

    Raises:
        RemaskError: an empty set.
    """
    members, others = np.asarray(forget, dtype=float), np.asarray(holdout, dtype=float)
    if not members.size or not others.size:
        raise RemaskError("a membership attack needs at least one forget and one holdout text")
    return float(mannwhitneyu(others, members, method="asymptotic").statistic / (members.size * others.size))


def privacy_leakage(attack: float, reference: float | None) -> float:
    """PrivLeak (MUSE): 100 ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref), in percent, -100 to unbounded; 0 is the goal.

    Far below 0 the forget set still stands out as known, far above 0 as suspiciously unknown (over-forgetting). MUSE's own AUC
    is 1 minus this one. Its published AUC of retrained models is of Llama-2 and does not serve for any other model.

    Args:
        attack: AUC on the unlearned model, `auc` of its Min-K scores.
        reference: AUC of the same attack on the never-trained model.

    Raises:
        RemaskError: no reference; a value outside of 0..1; a reference of 1, which leaves nothing to compare with.
    """
    level = require_reference(reference, "PrivLeak")
    if not (0 <= attack <= 1 and 0 <= level < 1):
        raise RemaskError(f"PrivLeak needs an AUC in 0..1 and a reference AUC in 0..1 below 1, not {attack} and {level}")
    return 100 * ((1 - attack) - (1 - level)) / (1 - level)


# ------------------------------------------------------------------ on a model
@dataclass(frozen=True)
class TokenScores:
    """Scores of one answer's tokens.

    Attributes:
        id: row id.
        logprobs: s_i, nats, [L].
        standardised: mean of (log p_i - mu_i) / sigma_i over the same masks, mu and sigma^2 being mean and variance of
            log p(.) under p at position i of the masked forward, [L].
    """

    id: str
    logprobs: np.ndarray
    standardised: np.ndarray


def token_scores(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    *,
    draws: int = 4,
    folds: Sequence[int] = FOLDS,
    seed: int = 0,
    token_budget: int = TOKEN_BUDGET,
) -> list[TokenScores]:
    """Per-token log-probabilities, plain and standardised, from `balanced_masks`.

    Args:
        lm: the model.
        rows: encoded facts.
        draws: shuffles of each answer; each costs sum(folds) canvases.
        folds: mask ratios are 1 / fold; every token is scored once a draw at each of them.
        seed: of the shuffles, with the row id.
        token_budget: tokens a forward.

    Raises:
        RemaskError: no draws, folds below 1, or what `remask.elbo` refuses.
    """
    if draws < 1:
        raise RemaskError(f"token scores need at least one draw, not {draws}")
    masks = [balanced_masks(len(row.answer_ids), draws, folds, seed, row.id) for row in rows]
    sums = [np.zeros((2, len(row.answer_ids))) for row in rows]
    hits = [np.zeros(len(row.answer_ids)) for row in rows]
    for batch, _, logprobs in predictions(lm, rows, masks, token_budget):
        picked = logprobs.gather(1, batch.clean[batch.masked][:, None]).squeeze(1)
        weights = logprobs.exp()
        mean = (weights * logprobs).nan_to_num().sum(dim=-1)
        variance = (weights * (logprobs - mean[:, None]) ** 2).nan_to_num().sum(dim=-1).clamp(min=VARIANCE_FLOOR)
        values = np.stack([picked.double().cpu().numpy(), ((picked - mean) / variance.sqrt()).double().cpu().numpy()])
        owner, place = batch.masked.nonzero().cpu().numpy().T
        for i, (row, repeats) in enumerate(zip(batch.rows, batch.draws, strict=True)):
            mine = owner == i
            positions = place[mine] - len(rows[row].prompt_ids)
            sums[row][:, positions] += len(repeats) * values[:, mine]
            hits[row][positions] += len(repeats)
    return [TokenScores(row.id, *(total / count)) for row, total, count in zip(rows, sums, hits, strict=True)]


@dataclass(frozen=True)
class MembershipScores:
    """Every attack's score of each text, [n]; higher = less likely a member. `reference` is None without a reference model."""

    loss: np.ndarray
    zlib: np.ndarray
    min_k: np.ndarray
    min_k_plus_plus: np.ndarray
    reference: np.ndarray | None


def membership_scores(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    texts: Sequence[str],
    bank: MaskBank,
    *,
    reference: MaskedDiffusionLM | None = None,
    share: float = MIN_K,
) -> MembershipScores:
    """Score the answers of `rows` by all attacks; `texts` are the same answers, whose compressed size zlib reads.

    LOSS, zlib and the reference attack read the stratified bound per token under `bank`, the reference model under the same
    masks; Min-K and Min-K++ read `token_scores` with one shuffle a replicate. Score forget and holdout texts alike, then `auc`.

    Raises:
        RemaskError: a share outside of (0, 1], or what `remask.elbo` refuses.
    """
    loss = _losses(lm, rows, bank)
    tokens = token_scores(lm, rows, draws=bank.replicates, seed=bank.seed)
    return MembershipScores(
        loss=loss,
        zlib=np.array([zlib_score(value, text) for value, text in zip(loss, texts, strict=True)]),
        min_k=np.array([min_k(score.logprobs, share) for score in tokens]),
        min_k_plus_plus=np.array([min_k(score.standardised, share) for score in tokens]),
        reference=None if reference is None else reference_score(loss, _losses(reference, rows, bank)),
    )


def _losses(lm: MaskedDiffusionLM, rows: Sequence[Encoded], bank: MaskBank) -> np.ndarray:
    return np.array([-score.logprob / score.tokens for score in elbo(lm, rows, bank)])
