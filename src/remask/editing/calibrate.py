"""`alpha="calibrated"`: the strength that brings the forget set to a given level, and not lower.

The level is the never-trained one or the model's own with the prompt masked, whichever is higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeVar

import numpy as np

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..diffusion.likelihood import elbo
from ..diffusion.masks import MaskBank
from ..errors import NothingToForgetError, RemaskError
from ..facts import Fact

Edit = TypeVar("Edit", bound="Scalable")


class Scalable(Protocol):
    """An intervention with a strength."""

    def with_alpha(self: Edit, alpha: float) -> Edit:
        """The same intervention at another strength."""
        ...

    def attached(self, lm: MaskedDiffusionLM) -> AbstractContextManager[MaskedDiffusionLM]:
        """Attach inside a `with` block."""
        ...


CALIBRATION_BANK = MaskBank(draws=4, replicates=2, seed=2_000_003)
"""Never the bank that numbers are reported on."""
LARGEST = 256.0
TOLERANCE = 0.01  # of the gap between the unedited model and the level


def anchor_level(lm: MaskedDiffusionLM, rows: Sequence[Encoded], bank: MaskBank = CALIBRATION_BANK) -> float:
    """Mean prompt-masked log-probability of `rows`, nats a row."""
    return mean_logprob(lm, rows, bank, hide_prompt=True)


def mean_logprob(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], bank: MaskBank = CALIBRATION_BANK, *, hide_prompt: bool = False
) -> float:
    """Mean answer log-probability of `rows`, nats a row."""
    return float(_logprobs(lm, rows, bank, hide_prompt).mean())


def _logprobs(lm: MaskedDiffusionLM, rows: Sequence[Encoded], bank: MaskBank, hide_prompt: bool = False) -> np.ndarray:
    return np.array([score.logprob for score in elbo(lm, rows, bank, hide_prompt=hide_prompt)])


Level = Literal["auto", "never-trained", "prompt-masked"]


def target_level(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    reference: MaskedDiffusionLM | None = None,
    level: Level = "auto",
    bank: MaskBank = CALIBRATION_BANK,
) -> float:
    """The level to forget to, nats a row: the mean of `target_levels`."""
    return float(target_levels(lm, facts, reference, level, bank).mean())


def target_levels(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    reference: MaskedDiffusionLM | None = None,
    level: Level = "auto",
    bank: MaskBank = CALIBRATION_BANK,
) -> np.ndarray:
    """The level of every fact, nats, [facts].

    Args:
        reference: model that never saw the facts.
        level: `never-trained` (the reference's), `prompt-masked` (the model's own without the question), or `auto`: the higher
            of the two, by their means. A small reference can be confidently wrong, far below knowing nothing; going there is
            over-forgetting.

    Raises:
        RemaskError: `never-trained` without a reference.
    """
    if level == "never-trained" and reference is None:
        raise RemaskError("the never-trained level needs a reference model; pass --reference or choose another --level")
    levels = []
    if level != "never-trained":
        levels.append(_logprobs(lm, [lm.encode(fact) for fact in facts], bank, hide_prompt=True))
    if level != "prompt-masked" and reference is not None:
        levels.append(_logprobs(reference, [reference.encode(fact) for fact in facts], bank))
    return max(levels, key=np.mean)


def calibrate(
    lm: MaskedDiffusionLM, edit: Edit, rows: Sequence[Encoded], level: float | None = None, bank: MaskBank = CALIBRATION_BANK
) -> Edit:
    """`edit` at the smallest alpha found whose mean log-probability of `rows` is at `level` (within 1 % of the gap).

    Without a level it is the model's own with the prompt masked.

    Doubling brackets the crossing, interpolation finds it; all on one bank, so that the curve is a deterministic function.

    Raises:
        NothingToForgetError: the model is already at or below the level.
        RemaskError: alpha = 256 does not reach it.
    """
    level = anchor_level(lm, rows, bank) if level is None else level
    start = mean_logprob(lm, rows, bank)
    gap = start - level
    if gap <= 0:
        raise NothingToForgetError(
            f"nothing to forget: the rows are at {start:.2f} nats, already at or below the level {level:.2f}"
        )

    def at(alpha: float) -> float:
        with edit.with_alpha(alpha).attached(lm):
            return mean_logprob(lm, rows, bank)

    low, high, above, below = 0.0, 1.0, start, at(1.0)
    while below > level:
        if high >= LARGEST:
            raise RemaskError(
                f"alpha = {high:g} leaves the forget set at {below:.1f} nats, above the level {level:.1f}; "
                "choose another layer or a smaller mu"
            )
        low, above = high, below
        high *= 2
        below = at(high)
    while level - below > TOLERANCE * gap and high - low > 1e-4 * high:
        share = (above - level) / (above - below)  # where a straight line crosses, kept off the ends
        middle = low + (high - low) * min(max(share, 0.1), 0.9)
        value = at(middle)
        if 0 < value - level <= TOLERANCE * gap:
            return edit.with_alpha(middle)
        if value > level:
            low, above = middle, value
        else:
            high, below = middle, value
    return edit.with_alpha(high)
