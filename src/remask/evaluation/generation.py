"""Generate an answer for each row and compare it with the truth."""

from __future__ import annotations

from collections.abc import Sequence

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..diffusion.sampler import SamplerConfig, generate


def answers(lm: MaskedDiffusionLM, rows: Sequence[Encoded], config: SamplerConfig | None = None) -> list[str]:
    """Generated answer text of each row, cut at the first end token."""
    settings = config or SamplerConfig.default(lm)
    generations = generate(lm, [row.prompt_ids for row in rows], settings, keys=[row.id for row in rows])
    return [lm.decode(generation.response) for generation in generations]


def exact_match_rows(lm: MaskedDiffusionLM, rows: Sequence[Encoded]) -> list[bool]:
    """Whether the greedy answer, one token a step, equals the row's answer text."""
    return [text == lm.decode(row.answer_ids) for text, row in zip(answers(lm, rows), rows, strict=True)]
