"""MUSE's text metrics: verbatim and knowledge memorisation, mean ROUGE-L F1 without stemming, times 100."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.sampler import SamplerConfig
from ...errors import RemaskError
from ...facts import Fact, knowledge_prompt
from ..generation import answers
from .text import rouge_l

VERBATIM_TOKENS = 128
KNOWLEDGE_TOKENS = 32


# ------------------------------------------------------------------ on texts
def muse_rouge(outputs: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """100 x ROUGE-L F1 of each output, no stemmer, [n], 0..100; an empty output scores 0.

    Raises:
        RemaskError: lists that do not pair.
    """
    if len(outputs) != len(references):
        raise RemaskError(f"{len(outputs)} outputs do not pair with {len(references)} references; give one each")
    return np.array([100 * rouge_l(o, r, stem=False).f1 for o, r in zip(outputs, references, strict=True)])


def first_answer(output: str) -> str:
    """A knowledge answer up to the first blank line or the next "Question", which in-context examples provoke."""
    return re.split(r"\n\s*\n|Question", output, maxsplit=1)[0].strip()


# ------------------------------------------------------------------ on a model
def verbatim_memorisation(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], sampler: SamplerConfig | None = None, *, tokens: int = VERBATIM_TOKENS
) -> np.ndarray:
    """VerbMem of each fact, [n], 0..100: continue the prompt (a passage) greedily and compare with the answer's first `tokens`.

    Raises:
        RemaskError: prompt plus continuation exceed the model's context.
    """
    rows = [lm.encode(fact) for fact in facts]
    outputs = answers(lm, rows, sampler or SamplerConfig.default(lm, gen_length=tokens))
    return muse_rouge(outputs, [lm.decode(row.answer_ids[:tokens]) for row in rows])


def knowledge_memorisation(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    examples: Sequence[tuple[str, str]],
    sampler: SamplerConfig | None = None,
) -> np.ndarray:
    """KnowMem of each fact, [n], 0..100: answer the question after in-context examples (MUSE gives ten) in 32 tokens.

    Raises:
        RemaskError: prompt plus answer exceed the model's context.
    """
    rows = [Encoded(fact.id, lm.encode_prompt(knowledge_prompt(fact.prompt, examples)), (), (0, 0)) for fact in facts]
    outputs = answers(lm, rows, sampler or SamplerConfig.default(lm, gen_length=KNOWLEDGE_TOKENS))
    return muse_rouge([first_answer(output) for output in outputs], [fact.answer for fact in facts])
