"""Attacks on the canvas: part of the answer is put on it, and the rest is asked for.

A masked diffusion model fills any pattern of masks, so whoever holds a fragment of a forgotten text, its beginning or words
from its middle, can ask for what is missing. What is put there helps every model, also one that never knew: the floor is
measured with the same fragment in place.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.likelihood import elbo
from ...diffusion.masks import MaskBank
from ...diffusion.sampler import SamplerConfig, infill
from ...errors import RemaskError
from ...facts import Fact
from ..metrics.masked import shuffled
from ..metrics.text import rouge_l_recall
from .asking import encode
from .base import Attack, Attempt, Terms

Filled = tuple[str, float]  # output, recovered


@dataclass(frozen=True)
class HiddenBank(MaskBank):
    """The masks of a bank over a row's `hidden` answer positions; the others are never masked.

    Attributes:
        hidden: row id -> bool [answer length].
    """

    hidden: Mapping[str, np.ndarray] = field(default_factory=dict)

    def masks(self, row: str, length: int) -> np.ndarray:
        """Exact-count masks over the h hidden positions, bool [replicates * draws, length]."""
        hidden = self.hidden[row]
        inner = super().masks(row, int(hidden.sum()))
        masks = np.zeros((len(inner), length), dtype=bool)
        masks[:, hidden] = inner
        return masks


class Revealed(Attack):
    """An attack that shows part of the answer; rows of one answer token are left out.

    Args:
        share: of the answer tokens, in (0, 1); ceil(share L) are shown, at most L - 1.

    Raises:
        RemaskError: a share outside of (0, 1).
    """

    def __init__(self, share: float) -> None:
        if not 0 < share < 1:
            raise RemaskError(f"the share of the answer that is shown must be in (0, 1), not {share}")
        self.share = share

    def shown(self, length: int) -> int:
        """Tokens shown of an answer of `length` >= 2 tokens."""
        return min(math.ceil(self.share * length), length - 1)

    @abstractmethod
    def hidden(self, row: Encoded) -> np.ndarray:
        """Which answer positions are asked for, bool [L]."""

    @abstractmethod
    def fill(
        self, lm: MaskedDiffusionLM, rows: Sequence[Encoded], hidden: Sequence[np.ndarray], sampler: SamplerConfig
    ) -> list[Filled]:
        """Generate what is hidden: output and recovered share of each row."""

    def run(self, lm: MaskedDiffusionLM, facts: Sequence[Fact], terms: Terms) -> list[Attempt]:
        """Log-probability of the hidden tokens given the shown ones, and on request a generation.

        With h hidden tokens, E_{l ~ U{1..h}} E_{|M| = l} [ (h / l) sum_{i in M} log p(a_i | q, a without M) ] over subsets M of
        them: the bound of `elbo` on log p(hidden | q, shown), in nats. `hide_prompt` masks the question, not what is shown.
        """
        rows = [item.row for item in encode(lm, facts, terms.sampler) if len(item.row.answer_ids) > 1]
        hidden = [self.hidden(row) for row in rows]
        places = {row.id: mask for row, mask in zip(rows, hidden, strict=True)}
        masks = HiddenBank(terms.bank.draws, terms.bank.replicates, terms.bank.seed, places)
        scores = elbo(lm, rows, masks, hide_prompt=terms.hide_prompt)
        filled: list[Filled] | list[tuple[None, None]] = [(None, None)] * len(rows)
        if terms.generate and not terms.hide_prompt:
            filled = self.fill(lm, rows, hidden, terms.sampler)
        attempts = []
        for score, mask, (output, recovered) in zip(scores, hidden, filled, strict=True):
            # `elbo` weights a mask of l tokens by L / l; only the h hidden ones are scored, so the weight is h / l.
            count, share = int(mask.sum()), float(mask.mean())
            attempts.append(Attempt(score.id, count, score.logprob * share, score.stderr * share, output, recovered))
        return attempts


class Prefill(Revealed):
    """The response starts with the first ceil(share L) answer tokens; the model goes on. Recovered: ROUGE-L recall of the rest.

    The slots for the rest are those that the shown tokens leave of `gen_length`, at least one.
    """

    def __init__(self, share: float = 0.25) -> None:
        super().__init__(share)
        self.name = f"prefill {100 * share:g} %"

    def describe(self) -> dict[str, Any]:
        """Kind and share."""
        return {"kind": "prefill", "share": self.share}

    def hidden(self, row: Encoded) -> np.ndarray:
        """All but the first tokens."""
        length = len(row.answer_ids)
        return np.arange(length) >= self.shown(length)

    def fill(
        self, lm: MaskedDiffusionLM, rows: Sequence[Encoded], hidden: Sequence[np.ndarray], sampler: SamplerConfig
    ) -> list[Filled]:
        """Continue the shown tokens. Not `generate`: the slots left over need not be a multiple of the block length."""
        canvases, spans = [], []
        for row, mask in zip(rows, hidden, strict=True):
            start = len(row.ids) - int(mask.sum())
            stop = max(len(row.prompt_ids) + sampler.gen_length, start + 1)
            end = stop
            if sampler.aligned and sampler.block_length is not None:
                end += -stop % sampler.block_length
            canvases.append([*row.ids[:start], *[lm.spec.mask_id] * (end - start)])
            spans.append((start, stop))
        done = infill(lm, canvases, sampler, keys=[row.id for row in rows])
        filled = []
        for row, generation, (start, stop) in zip(rows, done, spans, strict=True):
            output = lm.decode(generation.response[start:stop])
            filled.append((output, rouge_l_recall(output, lm.decode(row.ids[start:]))))
        return filled


class Infill(Revealed):
    """A random share of the answer's tokens stands in place on a canvas of exactly L slots; the model restores the others.

    Recovered: share of hidden tokens restored exactly. The canvas gives the length away and holds no end token, which is
    therefore never predicted.

    Args:
        share: as in `Revealed`.
        seed: the positions are keyed by (seed, row).
    """

    def __init__(self, share: float = 0.5, seed: int = 0) -> None:
        super().__init__(share)
        self.seed = seed
        self.name = f"infill {100 * share:g} %"

    def describe(self) -> dict[str, Any]:
        """Kind, share and seed."""
        return {"kind": "infill", "share": self.share, "seed": self.seed}

    def hidden(self, row: Encoded) -> np.ndarray:
        """All but the first tokens of a random order."""
        length = len(row.answer_ids)
        mask = np.ones(length, dtype=bool)
        mask[shuffled(length, self.seed, "infill", row.id, 0)[: self.shown(length)]] = False
        return mask

    def fill(
        self, lm: MaskedDiffusionLM, rows: Sequence[Encoded], hidden: Sequence[np.ndarray], sampler: SamplerConfig
    ) -> list[Filled]:
        """Restore the hidden tokens; the output is the whole answer as it then stands."""
        settings = replace(sampler, suppress_eos=True, stop_at_eos=False, fill_after_eos=False)
        canvases = [
            [*row.prompt_ids, *np.where(mask, lm.spec.mask_id, row.answer_ids).tolist()]
            for row, mask in zip(rows, hidden, strict=True)
        ]
        done = infill(lm, canvases, settings, keys=[row.id for row in rows])
        filled = []
        for row, mask, generation in zip(rows, hidden, done, strict=True):
            restored = generation.response[len(row.prompt_ids) :]
            right = np.asarray(restored) == np.asarray(row.answer_ids)
            filled.append((lm.decode(restored), float(right[mask].mean())))
        return filled
