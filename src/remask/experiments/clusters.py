"""An edit at several sites: every fact where its cluster of a trace says, one memory a site, one strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ..backbones.model import MaskedDiffusionLM, Site
from ..backbones.several import Several
from ..editing.build import in_order
from ..editing.calibrate import calibrate
from ..editing.config import PRESETS, MemoryConfig
from ..editing.memory import EditMemory
from ..errors import RemaskError
from ..facts import Fact
from ..tracing.sites import Choice


def build_clustered(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    retain: Sequence[Fact],
    sites: Mapping[str, Site],
    config: MemoryConfig = PRESETS["default"],
    alpha: float | Literal["calibrated"] = "calibrated",
    level: float | None = None,
) -> Several:
    """One memory a distinct site, lowest layer first, all solved with the same retain facts.

    Args:
        sites: of every fact, by its id; others are ignored.
        alpha: common strength, or "calibrated": the one at which all of them together bring the facts to `level`.
        level: mean log-probability of the facts, nats a row; None = the model's own with the prompt masked.

    Returns:
        The memories, each at the common strength; each can be saved by itself.

    Raises:
        RemaskError: a fact without site, or what `EditMemory.build` and `calibrate` refuse.
    """
    facts = in_order(facts, retain)
    missing = [fact.id for fact in facts if fact.id not in sites]
    if missing:
        raise RemaskError(f"fact {missing[0]!r} has no site ({len(missing)} of {len(facts)} facts); trace it, or leave it out")
    groups: dict[Site, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(sites[fact.id], []).append(fact)
    order = sorted(groups, key=lambda site: (site.layer, site.module, site.steps or ()))
    kept = retain if config.reads_retain else ()
    edit = Several(tuple(EditMemory.build(lm, groups[site], site, retain=kept, config=config) for site in order))
    if alpha != "calibrated":
        return edit.with_alpha(alpha)
    return calibrate(lm, edit, [lm.encode(fact) for fact in facts], level)


def sites_of(clusters: Sequence[tuple[Choice, tuple[str, ...]]]) -> dict[str, Site]:
    """The site of every fact, from `remask.tracing.cluster_sites`."""
    return {name: choice.site for choice, names in clusters for name in names}
