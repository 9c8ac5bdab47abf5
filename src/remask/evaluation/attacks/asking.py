"""What attacks share: rows in another wording that fit the context, scored and answered like plain ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.likelihood import elbo
from ...diffusion.sampler import SamplerConfig
from ...errors import TooLongError
from ...facts import Fact
from ..generation import answers
from ..metrics.text import rouge_l_recall
from .base import Attempt, Terms


@dataclass(frozen=True)
class Asked:
    """A row as it is asked, and the text that an output is compared with."""

    row: Encoded
    answer: str


def as_it_stands(fact: Fact) -> str:
    """The fact's own question."""
    return fact.prompt


def true_answer(fact: Fact) -> str:
    """The fact's own answer."""
    return fact.answer


def fits(lm: MaskedDiffusionLM, row: Encoded, sampler: SamplerConfig) -> bool:
    """Whether prompt and answer, and prompt and response slots (up to the end of an aligned block), are within the context.

    A property of the row and not of what is asked of it, so that every state of the model is attacked on the same rows.
    """
    tokens = len(row.prompt_ids) + max(len(row.answer_ids), sampler.gen_length)
    if sampler.aligned and sampler.block_length is not None:
        tokens += -tokens % sampler.block_length
    return tokens <= lm.spec.max_length


def encode(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    sampler: SamplerConfig,
    prompt: Callable[[Fact], str] = as_it_stands,
    answer: Callable[[Fact], str] = true_answer,
) -> list[Asked]:
    """The facts in the wording `prompt` with the answer `answer`; rows that do not fit are left out.

    Raises:
        RemaskError: a text contains the mask token.
    """
    asked = []
    for fact in facts:
        try:
            row = lm.encode(fact, prompt=prompt(fact), answer=answer(fact))
        except TooLongError:
            continue
        if fits(lm, row, sampler):
            asked.append(Asked(row, answer(fact)))
    return asked


def ask(
    lm: MaskedDiffusionLM,
    asked: Sequence[Asked],
    terms: Terms,
    *,
    cfg_scale: float = 0.0,
) -> list[Attempt]:
    """Log-probability (the bound of `elbo`) of every answer and, on request, a generation with its ROUGE-L recall.

    Args:
        lm: the model in the state that is attacked.
        asked: rows that fit.
        terms: bank, sampler of the generation, whether to answer (not with the prompt hidden), whether to hide the prompt.
        cfg_scale: guidance of the log-probability; the generation's is the sampler's.
    """
    rows = [item.row for item in asked]
    # With the prompt hidden both branches of guidance are the same canvas, and guidance changes nothing.
    scores = elbo(lm, rows, terms.bank, hide_prompt=terms.hide_prompt, cfg_scale=0.0 if terms.hide_prompt else cfg_scale)
    attempts = [Attempt(score.id, score.tokens, score.logprob, score.stderr) for score in scores]
    if not terms.generate or terms.hide_prompt:
        return attempts
    replies = reply(lm, asked, terms.sampler)
    return [Attempt(a.id, a.tokens, a.logprob, a.stderr, b.output, b.recovered) for a, b in zip(attempts, replies, strict=True)]


def reply(lm: MaskedDiffusionLM, asked: Sequence[Asked], sampler: SamplerConfig) -> list[Attempt]:
    """A generation for every row and its ROUGE-L recall against the row's answer, 0..1; no log-probability."""
    outputs = answers(lm, [item.row for item in asked], sampler)
    return [
        Attempt(item.row.id, len(item.row.answer_ids), output=output, recovered=rouge_l_recall(output, item.answer))
        for item, output in zip(asked, outputs, strict=True)
    ]
