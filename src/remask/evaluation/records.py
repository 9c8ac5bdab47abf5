"""Scores of rows: what was measured, on which row, under which randomness; aggregates are derived from these alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..backbones.model import MaskedDiffusionLM
from ..diffusion.likelihood import elbo
from ..diffusion.masks import MaskBank
from ..diffusion.sampler import SamplerConfig
from ..facts import Fact
from .generation import answers
from .metrics.text import exact_match, junk, rouge_l_recall


@dataclass(frozen=True)
class RowScore:
    """One row under one state of the model.

    Attributes:
        logprob: answer log-probability, nats summed over tokens (stratified bound); stderr: Monte-Carlo.
        output: greedy generation, None where none was asked for; exact, rouge, junk are read off it.
    """

    id: str
    tokens: int
    logprob: float
    stderr: float
    output: str | None = None
    exact: bool | None = None
    rouge: float | None = None
    junk: str | None = None


def score_rows(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    bank: MaskBank,
    sampler: SamplerConfig | None = None,
    *,
    hide_prompt: bool = False,
) -> list[RowScore]:
    """Log-probability of every fact's answer under `bank`; with `sampler` also a greedy generation and its metrics."""
    rows = [lm.encode(fact) for fact in facts]
    scores = elbo(lm, rows, bank, hide_prompt=hide_prompt)
    outputs = answers(lm, rows, sampler) if sampler else [None] * len(rows)
    return [
        RowScore(fact.id, score.tokens, score.logprob, score.stderr)
        if output is None
        else RowScore(
            fact.id,
            score.tokens,
            score.logprob,
            score.stderr,
            output,
            exact_match(output, fact.answer),
            rouge_l_recall(output, fact.answer),
            junk(output),
        )
        for fact, score, output in zip(facts, scores, outputs, strict=True)
    ]
