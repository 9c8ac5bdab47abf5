"""From facts to the keys and deltas of a memory: what is checked, which texts are read, what is captured."""

from __future__ import annotations

from collections.abc import Sequence

from ..backbones.model import Encoded, MaskedDiffusionLM, Site
from ..errors import RemaskError
from ..facts import Fact, check_unique_ids
from ..random import digest
from .capture import Captured, capture_anchor, capture_keys, capture_subject, object_values
from .compress import compressed
from .config import MemoryConfig


def fact_hash(fact: Fact) -> str:
    """Says whether a file's fact is this one, without holding its texts."""
    return digest("fact", fact.prompt, fact.subject, fact.answer, fact.target)


def shortened(ids: Sequence[str], limit: int = 5) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def in_order(facts: Sequence[Fact], retain: Sequence[Fact]) -> list[Fact]:
    """Facts by id, so that batches do not depend on the order in which they came.

    Raises:
        RemaskError: no facts, ids twice, one question with two targets or answers, or a fact that is to be forgotten and retained.
    """
    if not facts:
        raise RemaskError("a memory needs at least one fact")
    check_unique_ids(facts, "memory")
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
    """Keys and deltas of `facts` as the config says, compressed if it says so; only the blocks up to the site run.

    Raises:
        RemaskError: a target that needs retain facts, or a new object, which are not there.
    """
    captured = _captured(lm, facts, site, config, retain)
    return compressed(captured, config.compress) if config.compress else captured


def _captured(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], site: Site, config: MemoryConfig, retain: Sequence[Fact]
) -> Captured:
    """Every key and its delta.

    Raises:
        RemaskError: a target that needs retain facts, or a new object, which are not there.
    """
    if config.target == "mean" and not retain:
        raise RemaskError("target 'mean' is read from retain facts; pass --retain")
    rows, kept = [lm.encode(fact) for fact in facts], [lm.encode(fact) for fact in retain]
    if config.keys == "answer":
        if config.target == "mean":
            captured = capture_anchor(lm, site, rows, config.bank)
            mean = capture_keys(lm, site, kept, config.bank).mean(0)
            return Captured(captured.keys, mean - captured.keys, captured.owner)
        unknown = [[_renamed(lm, fact, name) for fact in facts] for name in config.unknown]
        return capture_anchor(lm, site, rows, config.bank, config.anchor, unknown)
    if config.target == "mean":
        values = object_values(lm, site, kept).mean(0).expand(len(rows), -1)
    elif config.target == "mask":
        values = object_values(lm, site, rows, masked=True)
    else:
        values = object_values(lm, site, [lm.encode(fact, answer=_new_object(fact, retain, config)) for fact in facts])
    return capture_subject(lm, site, rows, values, config.keys)


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


def _renamed(lm: MaskedDiffusionLM, fact: Fact, name: str) -> Encoded:
    """The fact's question about `name`; a question that names nobody stays as it is and contributes no change."""
    asked = fact.prompt if fact.subject == fact.prompt else fact.prompt.replace(fact.subject, name)
    return lm.encode(fact, prompt=asked)
