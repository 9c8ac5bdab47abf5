"""Tasks: what an audit measures on a set of rows under one state of the model. One function each, one registry.

A task returns one `Value` a row and metric. Randomness is keyed by row id, so a value does not depend on which rows are
scored together, on their order or on the number of processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from ..backbones.model import MaskedDiffusionLM
from ..diffusion.likelihood import elbo
from ..diffusion.masks import MaskBank
from ..diffusion.sampler import SamplerConfig
from ..errors import TooLongError
from ..facts import Fact, knowledge_prompt
from .attacks.base import Attack
from .benchmarks.base import Choice, Text
from .generation import answers
from .metrics.choice import multiple_choice, rewrite_scores
from .metrics.membership import membership_scores
from .metrics.memorisation import exact_memorisation, extraction_strength
from .metrics.muse import knowledge_memorisation, verbatim_memorisation
from .metrics.probability import answer_scores, length_normalised
from .metrics.text import exact_match, junk, n_gram_entropy, rouge_l

Row = Fact | Text
Precision = Literal["fp32", "bf16 autocast"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Value:
    """One metric of one row; fields as in `records.Record`."""

    id: str
    metric: str
    value: float | str
    stderr: float | None = None
    tokens: int | None = None
    replicates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Setting:
    """What every measurement of an audit shares.

    Attributes:
        bank: masks.
        sampler: of generations.
        precision: arithmetic of the forwards; `bf16 autocast` keeps weights, residual stream and edits in fp32.
        context: worked examples before each question (KnowMem).
        known: facts by id, which `Fact.neighbours` names.
        attack: of the task `attack`.
        answered: the attack answers every row; otherwise none.
    """

    bank: MaskBank
    sampler: SamplerConfig
    precision: Precision = "fp32"
    context: tuple[tuple[str, str], ...] = ()
    known: dict[str, Fact] = field(default_factory=dict)
    attack: Attack | None = None
    answered: bool = False

    def arithmetic(self, lm: MaskedDiffusionLM) -> contextlib.AbstractContextManager[object]:
        """Autocast, or nothing."""
        return torch.autocast(lm.device.type, torch.bfloat16, enabled=self.precision != "fp32")


def log_probability(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, hide_prompt: bool) -> list[Value]:
    """Answer log-probability; with `hide_prompt` without seeing the question."""
    scores = elbo(lm, [lm.encode(fact) for fact in facts], setting.bank, hide_prompt=hide_prompt)
    return [Value(s.id, "answer log-probability", s.logprob, _error(s.stderr), s.tokens, s.replicates) for s in scores]


def likelihood(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, hide_prompt: bool) -> list[Value]:
    """Answer log-probability and, against wrong answers where the facts have them, normalised probability and truth ratio."""
    if not all(fact.perturbed for fact in facts):
        plain = log_probability(lm, facts, setting, hide_prompt)
        return plain + [_probability(v.id, float(v.value), v.stderr, v.tokens or 1) for v in plain]
    values = []
    for score in answer_scores(lm, facts, setting.bank):
        answer, error = score.answer, _error(score.answer.stderr)
        logs = score.log_truth_ratios()
        values += [
            Value(score.id, "answer log-probability", answer.logprob, error, answer.tokens, answer.replicates),
            _probability(score.id, answer.logprob, error, answer.tokens),
            Value(score.id, "normalised probability", score.normalised_probability()),
            Value(score.id, "truth ratio", math.exp(score.log_truth_ratio()), replicates=tuple(np.exp(logs).tolist())),
        ]
    return values


def generation(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, _hide_prompt: bool) -> list[Value]:
    """One answer a row and everything that is read off its text."""
    values = []
    for fact, output in zip(facts, answers(lm, [lm.encode(fact) for fact in facts], setting.sampler), strict=True):
        rouge = rouge_l(output, fact.answer)
        values += [
            Value(fact.id, "output", output),
            Value(fact.id, "exact match", float(exact_match(output, fact.answer))),
            Value(fact.id, "ROUGE-L recall", rouge.recall),
            Value(fact.id, "ROUGE-L F1", rouge.f1),
            Value(fact.id, "junk rate", float(junk(output) is not None)),
            Value(fact.id, "n-gram entropy", n_gram_entropy(output)),
        ]
    return values


def memorisation(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, _hide_prompt: bool) -> list[Value]:
    """Exact memorisation, mean over mask ratios."""
    shares = exact_memorisation(lm, [lm.encode(fact) for fact in facts], setting.bank).mean(axis=1)
    return [Value(fact.id, "exact memorisation", float(share)) for fact, share in zip(facts, shares, strict=True)]


def extraction(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, _hide_prompt: bool) -> list[Value]:
    """Extraction strength from a revealed prefix."""
    results = extraction_strength(lm, [lm.encode(fact) for fact in facts], setting.sampler)
    return [Value(result.id, "extraction strength", result.strength, tokens=result.tokens) for result in results]


def membership(lm: MaskedDiffusionLM, rows: Sequence[Row], setting: Setting, _hide_prompt: bool) -> list[Value]:
    """Scores of the membership attacks that need no reference model (that one is a difference of `MIA loss`)."""
    texts = [row.text if isinstance(row, Text) else row.answer for row in rows]
    encoded = [lm.encode_text(row.id, row.text) if isinstance(row, Text) else lm.encode(row) for row in rows]
    scores = membership_scores(lm, encoded, texts, setting.bank)
    named = {"MIA loss": scores.loss, "MIA zlib": scores.zlib, "MIA Min-K": scores.min_k, "MIA Min-K++": scores.min_k_plus_plus}
    return [Value(row.id, name, float(values[i])) for i, row in enumerate(rows) for name, values in named.items()]


def choice(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, _hide_prompt: bool) -> list[Value]:
    """MCQ accuracy: the right option's letter against the others."""
    return [Value(score.id, "MCQ accuracy", score.raw) for score in multiple_choice(lm, facts, setting.bank)]


def rewriting(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, _hide_prompt: bool) -> list[Value]:
    """Efficacy, paraphrase and neighbourhood scores of rewrites."""
    values = []
    for score in rewrite_scores(lm, facts, setting.bank, setting.known):
        named = {"efficacy": score.efficacy, "paraphrase": score.paraphrase, "neighbourhood": score.neighbourhood}
        values += [Value(score.id, name, value) for name, value in named.items() if not math.isnan(value)]
    return values


def knowledge(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, _hide_prompt: bool) -> list[Value]:
    """KnowMem, after the benchmark's worked examples."""
    scores = knowledge_memorisation(lm, facts, setting.context)
    return [Value(fact.id, "KnowMem", float(score)) for fact, score in zip(facts, scores, strict=True)]


def verbatim(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, _hide_prompt: bool) -> list[Value]:
    """VerbMem: continue a passage."""
    return [
        Value(fact.id, "VerbMem", float(score)) for fact, score in zip(facts, verbatim_memorisation(lm, facts), strict=True)
    ]


def attacked(lm: MaskedDiffusionLM, facts: Sequence[Fact], setting: Setting, hide_prompt: bool) -> list[Value]:
    """What an attack gets out of the rows; rows that it cannot be run on have no value."""
    assert setting.attack is not None
    values = []
    for attempt in setting.attack.attempt(
        lm, facts, setting.bank, setting.sampler, generate=setting.answered, hide_prompt=hide_prompt
    ):
        if attempt.logprob is not None:
            error = None if attempt.stderr is None else _error(attempt.stderr)
            values.append(Value(attempt.id, "answer log-probability", attempt.logprob, error, attempt.tokens))
        if attempt.output is not None:
            values.append(Value(attempt.id, "output", attempt.output))
        if attempt.recovered is not None:
            values.append(Value(attempt.id, "recovered", attempt.recovered))
    return values


Task = Callable[[MaskedDiffusionLM, Sequence[Row], Setting, bool], list[Value]]
TASKS: dict[str, Task] = {
    "log-probability": log_probability,  # type: ignore[dict-item]
    "likelihood": likelihood,  # type: ignore[dict-item]
    "generation": generation,  # type: ignore[dict-item]
    "memorisation": memorisation,  # type: ignore[dict-item]
    "extraction": extraction,  # type: ignore[dict-item]
    "membership": membership,
    "choice": choice,  # type: ignore[dict-item]
    "rewrite": rewriting,  # type: ignore[dict-item]
    "knowledge": knowledge,  # type: ignore[dict-item]
    "verbatim": verbatim,  # type: ignore[dict-item]
    "attack": attacked,  # type: ignore[dict-item]
}


def lettered(question: Choice, wrap: Callable[[str], str]) -> Fact:
    """A multiple-choice question as a fact: options in the prompt, the right letter as answer, the others as `perturbed`."""
    letters = LETTERS[: len(question.options)]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, question.options, strict=True))
    prompt = wrap(f"{question.question.strip()}\n{listed}")
    wrong = tuple(letter for i, letter in enumerate(letters) if i != question.answer)
    return Fact(question.id, prompt, prompt, letters[question.answer], group=question.group, perturbed=wrong)


def fits(lm: MaskedDiffusionLM, row: Row, slots: int, context: Sequence[tuple[str, str]] = ()) -> bool:
    """Whether everything that is measured on the row fits the context, its generation of `slots` tokens too."""
    try:
        if isinstance(row, Text):
            lm.encode_text(row.id, row.text)
            return True
        fact = replace(row, prompt=knowledge_prompt(row.prompt, context)) if context else row
        variants = [fact.answer, *fact.perturbed, *(text for text in (fact.paraphrased_answer, fact.target) if text)]
        prompts = [lm.encode(fact, answer=answer).prompt_ids for answer in variants]
        return len(prompts[0]) + slots <= lm.spec.max_length
    except TooLongError:
        return False


def _error(stderr: float) -> float | None:
    """A single replicate has no standard error."""
    return None if math.isnan(stderr) else stderr


def _probability(name: str, logprob: float, stderr: float | None, tokens: int) -> Value:
    """P = exp(log p / L), its first-order bias taken off."""
    return Value(name, "length-normalised probability", float(length_normalised(logprob, tokens, stderr or 0.0)), tokens=tokens)
