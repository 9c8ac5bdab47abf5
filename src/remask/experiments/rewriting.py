"""Rewriting measured: facts get new objects, and everything that should and should not change is scored before and after.

The memory holds a key for every masked position of the new objects (`remask.editing.objects`) and looks residuals up among them
and the retain facts' keys. Its controls act at the same site and are scaled to the memory's root-mean-square shift on its own
keys: `mean-delta` steers, `paper` is TimeROME-DLM's reading (one subject key a fact, object target).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..backbones.model import MaskedDiffusionLM, Site
from ..diffusion.likelihood import elbo
from ..diffusion.masks import MaskBank
from ..editing.config import preset
from ..editing.memory import EditMemory
from ..editing.site import SiteEdit
from ..editing.steering import mean_delta
from ..errors import RemaskError
from ..evaluation.generation import answers
from ..evaluation.metrics.choice import RewriteScores, rewrite_scores
from ..evaluation.rewriting import Said, answer_accuracy, locality, rewrite_summary, said_summary
from ..evaluation.statistics import mean_interval
from ..facts import Fact, write_json
from .edits import build_edit

EditName = Literal["rewrite", "mean-delta", "paper"]
BANK = MaskBank(draws=4, replicates=2, seed=7_000_003)
"""Never the bank of the captures, nor one that settings were chosen on."""
SHOWN = 8  # generations of each kind that a result holds


@dataclass(frozen=True)
class Measured:
    """Rewrites and rows that are to stay, under one state of the model; lists are in the order of the facts.

    Attributes:
        scores: of each rewrite.
        accuracy: zsRE's, of each rewrite's target.
        outputs: the answer to each rewrite's prompt; paraphrased: to its first other wording, None where it has none.
        kept: log-probabilities of the rows that are to stay, nats; kept_outputs: their answers.
    """

    scores: list[RewriteScores]
    accuracy: list[float]
    outputs: list[str]
    paraphrased: list[str | None]
    kept: list[float]
    kept_outputs: list[str]


def control(lm: MaskedDiffusionLM, name: EditName, memory: EditMemory, facts: Sequence[Fact]) -> SiteEdit:
    """The rewrite itself, or one of its controls at the same site and strength.

    Raises:
        RemaskError: unknown name.
    """
    if name not in get_args(EditName):
        raise RemaskError(f"unknown rewrite {name!r}; choose one of {', '.join(get_args(EditName))}")
    if name == "rewrite":
        return memory
    if name == "mean-delta":
        return mean_delta(memory)
    paper = EditMemory.build(lm, facts, memory.site, config=preset("paper", target="object"))
    wanted, found = (edit.shift()(memory.keys).square().sum(dim=1).mean().sqrt() for edit in (memory, paper))
    return paper.with_alpha(float(wanted / found))


def measure(lm: MaskedDiffusionLM, facts: Sequence[Fact], kept: Sequence[Fact], known: Mapping[str, Fact]) -> Measured:
    """Score the model as it stands.

    Args:
        facts: with targets; kept: rows that are to stay; known: facts by id, which `Fact.neighbours` names.

    Raises:
        RemaskError: a fact without target, or an unknown neighbour.
    """
    asked = [lm.encode(fact) for fact in facts]
    worded = [i for i, fact in enumerate(facts) if fact.paraphrases]
    other = answers(lm, [lm.encode(facts[i], facts[i].paraphrases[0]) for i in worded])
    paraphrased: list[str | None] = [None] * len(facts)
    for i, output in zip(worded, other, strict=True):
        paraphrased[i] = output
    rows = [lm.encode(fact) for fact in kept]
    return Measured(
        scores=rewrite_scores(lm, facts, BANK, known),
        accuracy=answer_accuracy(lm, [lm.encode(fact, answer=fact.target) for fact in facts]),
        outputs=answers(lm, asked),
        paraphrased=paraphrased,
        kept=[score.logprob for score in elbo(lm, rows, BANK)],
        kept_outputs=answers(lm, rows),
    )


def run_rewrite(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    retain: Sequence[Fact],
    kept: Sequence[Fact],
    *,
    edit: EditName = "rewrite",
    site: Site | None = None,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    known: Mapping[str, Fact] | None = None,
    before: Measured | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Rewrite `facts` with the preset `rewrite` or a control, and measure before and after; the model is left as it was.

    Args:
        facts: with targets; retain: what the edit may read; kept: rows that are to stay and that no edit read.
        edit: the rewrite or a control.
        site: where; by default the layer that is known for a bundled model.
        seed: of the partial states; changes: fields of MemoryConfig to change.
        known: facts by id, which `Fact.neighbours` names.
        before: the unedited model's measurement, if it is at hand.
        out: file of the result (JSON).

    Raises:
        RemaskError: a row that is both read and kept, or what building and measuring refuse.
    """
    known, read = known or {}, {fact.id for fact in retain}
    for fact in kept:
        if fact.id in read:
            raise RemaskError(
                f"row {fact.id!r} is read by the edit and cannot show what it leaves alone; drop it from one list"
            )
    memory = build_edit(lm, "rewrite", facts, retain, site=site, seed=seed, **(changes or {}))
    assert isinstance(memory, EditMemory)
    built = control(lm, edit, memory, facts)
    before = before or measure(lm, facts, kept, known)
    with built.attached(lm):
        after = measure(lm, facts, kept, known)
    result = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint()},
        "edit": edit,
        "seed": seed,
        "settings": asdict(memory.config),
        "description": built.describe(),
        "estimator": {"bound": "stratified", **asdict(BANK)},
        "counts": {"facts": len(facts), "retain": len(retain), "kept": len(kept)},
        "before": summary(facts, before, before),
        "after": summary(facts, before, after),
        "generations": generations(facts, before, after),
        "kept_changed": changed(kept, before, after),
    }
    if out is not None:
        write_json(out, result)
    return result


def summary(facts: Sequence[Fact], before: Measured, now: Measured) -> dict[str, Any]:
    """Every number with its interval: scores, what is said, and what became of the rows that were to stay."""
    said = [Said.of(text, fact.target or "", fact.answer) for fact, text in zip(facts, now.outputs, strict=True)]
    other = [
        Said.of(text, fact.target or "", fact.answer)
        for fact, text in zip(facts, now.paraphrased, strict=True)
        if text is not None
    ]
    parts = {
        **rewrite_summary(now.scores),
        "accuracy": mean_interval(now.accuracy),
        **{f"said {name}": value for name, value in said_summary(said).items()},
        **{f"paraphrase said {name}": value for name, value in said_summary(other).items()},
        **{f"kept {name}": value for name, value in _locality(before, now).items()},
    }
    return {name: estimate.to_dict() for name, estimate in parts.items()}


def _locality(before: Measured, now: Measured) -> dict[str, Any]:
    return locality(before.kept, now.kept, before.kept_outputs, now.kept_outputs)


def generations(facts: Sequence[Fact], before: Measured, after: Measured) -> dict[str, list[dict[str, str]]]:
    """Answers that are the new object and answers that are not, the first few of each."""
    found: dict[str, list[dict[str, str]]] = {"good": [], "bad": []}
    for fact, old, new in zip(facts, before.outputs, after.outputs, strict=True):
        kind = found["good" if Said.of(new, fact.target or "", fact.answer).exact else "bad"]
        kind.append({"prompt": fact.prompt, "target": fact.target or "", "before": old, "after": new})
    return {kind: lines[:SHOWN] for kind, lines in found.items()}


def changed(kept: Sequence[Fact], before: Measured, after: Measured) -> list[dict[str, str]]:
    """Rows that were to stay and are answered otherwise, the first few."""
    rows = zip(kept, before.kept_outputs, after.kept_outputs, strict=True)
    return [{"prompt": fact.prompt, "before": old, "after": new} for fact, old, new in rows if old != new][:SHOWN]


def with_targets(facts: Sequence[Fact], known: Mapping[str, Fact]) -> list[Fact]:
    """Facts with a made-up target: their first wrong answer; facts without one are left out.

    Of several other wordings only the first is kept: the closed world's model was never taught the last, and hardly answers it
    before any edit. Neighbours that have the target for an answer cannot tell a rewrite from a leak and are dropped.
    """
    made = []
    for fact in facts:
        if fact.perturbed:
            target = fact.perturbed[0]
            near = tuple(name for name in fact.neighbours if known[name].answer != target)
            made.append(replace(fact, target=target, paraphrases=fact.paraphrases[:1], neighbours=near))
    return made


@torch.inference_mode()
def known_rewrites(lm: MaskedDiffusionLM, facts: Sequence[Fact]) -> list[Fact]:
    """Those that have a target and whose answer the model gives: with it all masked, every token is the likeliest one."""
    asked = [fact for fact in facts if fact.target and fact.target != fact.answer]
    right = answer_accuracy(lm, [lm.encode(fact) for fact in asked])
    return [fact for fact, share in zip(asked, right, strict=True) if share == 1.0]
