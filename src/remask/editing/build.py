"""From facts to the keys and deltas of a memory: what is checked, which texts are read, what is captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM, Site
from ..errors import RemaskError, TooLongError
from ..facts import Fact, check_unique_ids, knowledge_prompt
from ..random import digest
from .capture import Captured, capture_anchor, capture_keys, capture_subject, object_values
from .compress import compressed
from .config import MemoryConfig
from .objects import capture_answers, capture_object


def fact_hash(fact: Fact) -> str:
    """Says whether a file's fact is this one, without holding its texts."""
    return digest("fact", fact.prompt, fact.subject, fact.answer, fact.target)


def shortened(ids: Sequence[str], limit: int = 5) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def in_order(facts: Sequence[Fact], retain: Sequence[Fact], what: str = "a memory") -> list[Fact]:
    """Facts by id, so that batches do not depend on the order in which they came; errors name `what` is made of them.

    Raises:
        RemaskError: no facts, ids twice, one question with two targets or answers, or a fact that is both forgotten and
            retained.
    """
    if not facts:
        raise RemaskError(f"{what} needs at least one fact")
    check_unique_ids(facts, what)
    check_unique_ids(retain, "retain set")
    asked: dict[str, Fact] = {}
    for fact in facts:
        other = asked.setdefault(fact.prompt, fact)
        for what, one, two in (("targets", other.target, fact.target), ("answers", other.answer, fact.answer)):
            if one != two:
                both = f"facts {other.id!r} and {fact.id!r}"
                raise RemaskError(f"{both} ask the same question with two {what}; keep one of them")
    told = {(fact.prompt, fact.answer): fact.id for fact in facts}
    for fact in retain:
        if forgotten := told.get((fact.prompt, fact.answer)):
            raise RemaskError(f"fact {forgotten!r} is also retained (as {fact.id!r}); drop it from one of the files")
    return sorted(facts, key=lambda fact: fact.id)


def capture_facts(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], site: Site, config: MemoryConfig, retain: Sequence[Fact]
) -> Captured:
    """Keys and deltas of `facts` as the config says, compressed if it says so; only a rewrite runs blocks above the site.

    Raises:
        RemaskError: a target that needs retain facts, or a new object, which are not there; what `capture_object` refuses.
    """
    captured = _captured(lm, facts, site, config, retain)
    return compressed(captured, config.compress) if config.compress else captured


def capture_retain(lm: MaskedDiffusionLM, retain: Sequence[Fact], site: Site, config: MemoryConfig) -> Tensor:
    """Keys [m, d] of the retain facts, in the states in which a residual is looked up: a rewrite also acts on free slots."""
    asked, _ = _with_contexts(lm, retain, config)
    if config.rewrites:
        return capture_answers(lm, site, asked, config.bank)
    return capture_keys(lm, site, [lm.encode(fact) for fact in asked], config.bank)


def in_context(fact: Fact, config: MemoryConfig) -> Fact:
    """The fact with itself as a solved example before the question, in the layout of in-context attacks."""
    example = fact.prompt, fact.answer
    if config.context == "paraphrase":
        example = (*fact.paraphrases, fact.prompt)[0], fact.paraphrased_answer or fact.answer
    return replace(fact, prompt=knowledge_prompt(fact.prompt, [example]))


def _with_contexts(lm: MaskedDiffusionLM, facts: Sequence[Fact], config: MemoryConfig) -> tuple[list[Fact], list[int]]:
    """The facts, then those of them in context that fit the model's; and for each the index of its fact."""
    asked, places = list(facts), list(range(len(facts)))
    for index, fact in enumerate(facts if config.context != "none" else ()):
        told = in_context(fact, config)
        try:
            for answer in {fact.answer, fact.target or fact.answer}:
                lm.encode(told, answer=answer)
        except TooLongError:
            continue
        asked.append(told)
        places.append(index)
    return asked, places


def _captured(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], site: Site, config: MemoryConfig, retain: Sequence[Fact]
) -> Captured:
    """Every key and its delta.

    Raises:
        RemaskError: a target that needs retain facts, or a new object, which are not there.
    """
    if config.target == "mean" and not retain:
        raise RemaskError("target 'mean' is read from retain facts; pass --retain")
    if config.rewrites:
        return _rewrite(lm, facts, site, config, retain)
    if config.keys == "answer":
        return _anchored(lm, facts, site, config, retain)
    rows, kept = [lm.encode(fact) for fact in facts], [lm.encode(fact) for fact in retain]
    if config.target == "mean":
        values = object_values(lm, site, kept).mean(0).expand(len(rows), -1)
    elif config.target == "mask":
        values = object_values(lm, site, rows, masked=True)
    else:
        values = object_values(lm, site, [lm.encode(fact, answer=_new_object(fact, retain, config)) for fact in facts])
    return capture_subject(lm, site, rows, values, config.keys)


def _anchored(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], site: Site, config: MemoryConfig, retain: Sequence[Fact]
) -> Captured:
    """Keys at the answers, also in context; the anchor there is read in the same layout without the example, which tells."""
    asked, places = _with_contexts(lm, facts, config)
    rows = [lm.encode(fact) for fact in asked]
    if config.target == "mean":
        captured = capture_anchor(lm, site, rows, config.bank)
        mean = capture_retain(lm, retain, site, config).mean(0)
        captured = Captured(captured.keys, mean - captured.keys, captured.owner)
    else:
        unknown = [
            [_laid_out(lm, facts[place], _renamed(facts[place], name), i >= len(facts)) for i, place in enumerate(places)]
            for name in config.unknown
        ]
        bare = [_laid_out(lm, facts[place], facts[place].prompt, i >= len(facts)) for i, place in enumerate(places)]
        captured = capture_anchor(lm, site, rows, config.bank, config.anchor, unknown, bare)
    return replace(captured, owner=torch.tensor(places)[captured.owner])


def _rewrite(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], site: Site, config: MemoryConfig, retain: Sequence[Fact]
) -> Captured:
    """Keys at the new objects and what makes the model say them.

    Raises:
        RemaskError: value `donor` without retain facts, or what `capture_object` refuses.
    """
    if config.value == "donor" and not retain:
        raise RemaskError("value 'donor' is read from retain facts; pass --retain")
    donors = retain if config.value == "donor" else ()
    asked, places = _with_contexts(lm, facts, config)
    captured = capture_object(lm, site, asked, config.bank, margin=config.margin, donors=donors)
    return replace(captured, owner=torch.tensor(places)[captured.owner])


def _new_object(fact: Fact, retain: Sequence[Fact], config: MemoryConfig) -> str:
    """The text that stands in the object's place; never another forgotten fact's, which must be removable without a trace."""
    if config.target == "refusal":
        return config.refusal
    if config.target == "object":
        if fact.target is None:
            raise RemaskError(f"fact {fact.id!r} has no target to rewrite its answer to; give it the field 'target'")
        return fact.target
    others = [text for text in (*fact.perturbed, *(other.answer for other in retain)) if text != fact.answer]
    if not others:
        raise RemaskError(f"fact {fact.id!r}: target 'other' needs retain facts with other answers, or the field 'perturbed'")
    return min(others, key=lambda text: (abs(len(text) - len(fact.answer)), digest(fact.id, text)))


def _renamed(fact: Fact, name: str) -> str:
    """The fact's question about `name`; a question that names nobody stays as it is and contributes no change."""
    return fact.prompt if fact.subject == fact.prompt else fact.prompt.replace(fact.subject, name)


def _laid_out(lm: MaskedDiffusionLM, fact: Fact, question: str, in_context: bool) -> Encoded:
    """The fact under another question, as it stands or in the layout that has room for examples."""
    return lm.encode(fact, prompt=knowledge_prompt(question, []) if in_context else question)
