"""From a trace to the site that an edit should use (TimeROME-DLM, equation 5).

    score(l, m, s) = mean over facts of |TIE(l, m, s)| - beta * mean over neighbour facts of |TIE(l, m, s)|

A fact's TIE is the mean over its rows (its paraphrases), as it is over noise draws: the absolute value is there so that facts
of opposite sign do not cancel, while an effect whose sign depends on the wording is none of the fact's.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from ..backbones.model import MODULES, Module, Site
from ..errors import RemaskError
from ..random import numpy_generator
from .effects import Trace, Weights, aggregate

_CHUNK = 2**20  # numbers in the largest tensor of a chunk of resamples
_DECIMALS = 6  # of a score in nats: what fp32 effects hold; finer differences come from rounding and would decide ties


@dataclass(frozen=True)
class SiteRule:
    """How a site is chosen.

    Attributes:
        weights: how effects on later steps are summed.
        module: choose among the sites of this module; None = all that were traced.
        signed: mean of TIE itself over the facts instead of its absolute value: a strongly negative cell is no good edit site.
            The neighbours' penalty stays absolute, for a site that moves a neighbour either way is no good one either.
        beta: weight of the neighbours' mean.
        smooth: layers to each side that a score is averaged over (same module and step, clipped at the ends).
    """

    weights: Weights = field(default_factory=Weights)
    module: Module | None = None
    signed: bool = False
    beta: float = 0.0
    smooth: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf or self.smooth < 0:
            raise RemaskError(f"a site rule needs finite beta >= 0 and smooth >= 0, not beta {self.beta}, smooth {self.smooth}")
        if self.module is not None and self.module not in MODULES:
            raise RemaskError(f"module {self.module!r} is unknown; choose one of {', '.join(MODULES)}")

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON form: the weights' fields beside the rule's own."""
        own = {"module": self.module, "signed": self.signed, "beta": self.beta, "smooth": self.smooth}
        return asdict(self.weights) | own


@dataclass(frozen=True)
class Choice:
    """A chosen site; it acts at every step, as the paper's edit does: the trace chooses where, not when.

    Attributes:
        site: layer and module.
        step: the denoising step at which the site's score is largest.
        score: that score, nats.
    """

    site: Site
    step: int
    score: float


def site_scores(trace: Trace, rule: SiteRule | None = None, neighbours: Trace | None = None) -> Tensor:
    """Equation (5), [layer, module, step], fp64, nats; -inf where nothing is defined or the rule excludes the module.

    Each mean is over the facts that have the step. Where no neighbour has it there is no penalty; steps that only neighbours
    have do not count.

    Raises:
        RemaskError: beta without neighbours, neighbours of another protocol, mode or model, or a module that was not traced.
    """
    rule = rule or SiteRule()
    maps, penalised = _both_maps(trace, rule, neighbours)
    return _scores(maps.nanmean(0), penalised.nanmean(0), rule)


def choose_site(trace: Trace, rule: SiteRule | None = None, neighbours: Trace | None = None) -> Choice:
    """The site of the largest score; of equal ones the lowest layer, then the first module of the trace, then the first step.

    Raises:
        RemaskError: as `site_scores`, or no effect is defined.
    """
    return _best(site_scores(trace, rule, neighbours), trace)


def stability(
    trace: Trace,
    rule: SiteRule | None = None,
    neighbours: Trace | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[tuple[Site, float]]:
    """How often each site wins when facts, and independently neighbour facts, are drawn anew with replacement (bootstrap).

    Facts without any defined effect are not drawn. A fact is drawn with all its paraphrases.

    Returns:
        Sites that won and their shares of the resamples (they sum to 1), most frequent first, then in the order of ties.

    Raises:
        RemaskError: as `choose_site`, or no resamples.
    """
    rule = rule or SiteRule()
    if resamples < 1:
        raise RemaskError(f"site stability needs at least one resample, not {resamples}")
    maps, penalised = (_with_values(each) for each in _both_maps(trace, rule, neighbours))
    if not len(maps):
        raise _nothing_defined()
    facts, others = (numpy_generator(seed, "site stability", *key) for key in ((), ("neighbours",)))
    chunk = max(1, _CHUNK // max(maps[0].numel(), len(maps), len(penalised)))
    wins: Counter[int] = Counter()
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        scores = _scores(_resampled(maps, facts, size), _resampled(penalised, others, size), rule)
        wins.update((scores.flatten(1).argmax(1) // scores.shape[-1]).tolist())
    modules = trace.config.modules
    ranked = sorted(wins.items(), key=lambda item: (-item[1], item[0]))
    return [(Site(i // len(modules), modules[i % len(modules)]), n / resamples) for i, n in ranked]


def fact_sites(trace: Trace, rule: SiteRule | None = None) -> dict[str, Choice]:
    """Every fact's own site, by the name of the fact, in the order of the trace.

    Raises:
        RemaskError: as `site_scores`, or a fact without any defined effect (named).
    """
    rule = rule or SiteRule()
    names, maps = _complete_maps(trace, rule)
    return {name: _best(scores, trace) for name, scores in zip(names, _scores(maps, None, rule), strict=True)}


def cluster_sites(trace: Trace, clusters: int, rule: SiteRule | None = None) -> list[tuple[Choice, tuple[str, ...]]]:
    """Facts grouped by the shape of their maps, and the site that each group's facts alone choose.

    The shape is the |TIE| of every (layer, module), scaled to norm 1: where a fact is carried, not how strongly. Steps are
    averaged, not maximised, since the maximum of noise grows with the number of steps and would sort facts by their length.
    Ward's hierarchy, cut at that many clusters, needs no random start and leaves no cluster empty.

    Returns:
        (choice, names of the facts in the order of the trace), largest group first, then by the first name. Fewer groups than
        asked for where no cut gives that many, as among equal shapes.

    Raises:
        RemaskError: as `fact_sites`, or clusters outside of 1 ... number of facts.
    """
    rule = rule or SiteRule()
    names, maps = _complete_maps(trace, rule)
    if not 1 <= clusters <= len(names):
        raise RemaskError(f"{clusters} clusters of {len(names)} facts: choose 1 ... {len(names)}")
    labels = _ward(maps.abs().nanmean(-1).nan_to_num().flatten(1).numpy(), clusters)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    result = [(_best(_scores(maps[group].nanmean(0), None, rule), trace), tuple(names[i] for i in group)) for group in groups]
    return sorted(result, key=lambda item: (-len(item[1]), item[1][0]))


# ------------------------------------------------------------------ maps of facts
def _both_maps(trace: Trace, rule: SiteRule, neighbours: Trace | None) -> tuple[Tensor, Tensor]:
    """Maps [fact, layer, module, step] of the facts and of the neighbours that the rule penalises (maybe none)."""
    _check(trace, rule, neighbours)
    maps = _maps(trace, rule)[1]
    if neighbours is None or rule.beta == 0:
        return maps, maps[:0]
    penalised = _maps(neighbours, replace(rule, signed=False))[1]
    missing = maps.shape[-1] - penalised.shape[-1]  # negative: the neighbours' further steps are cut
    return maps, torch.nn.functional.pad(penalised, (0, missing), value=torch.nan)


def _complete_maps(trace: Trace, rule: SiteRule) -> tuple[tuple[str, ...], Tensor]:
    """Names and maps of the facts, each of which has a value."""
    _check(trace, rule, None)
    names, maps = _maps(trace, rule)
    empty = [name for name, undefined in zip(names, maps.isnan().flatten(1).all(1).tolist(), strict=True) if undefined]
    if empty:
        raise RemaskError(f"fact {empty[0]!r} has no defined effect ({len(empty)} of {len(names)} facts); leave it out")
    return names, maps


def _maps(trace: Trace, rule: SiteRule) -> tuple[tuple[str, ...], Tensor]:
    """Names of the facts and their effects, [fact, layer, module, step] fp64; NaN where undefined or excluded."""
    effects = aggregate(trace, rule.weights).double()
    names = tuple(dict.fromkeys(trace.facts))
    place = {name: i for i, name in enumerate(names)}
    index = torch.tensor([place[name] for name in trace.facts], dtype=torch.long)
    total, known = (
        torch.zeros(len(names), *effects.shape[1:], dtype=torch.float64).index_add_(0, index, values)
        for values in (effects.nan_to_num(), (~effects.isnan()).double())
    )
    maps = total / known
    if rule.module is not None:
        maps[:, :, [name != rule.module for name in trace.config.modules]] = torch.nan
    return names, maps if rule.signed else maps.abs()


def _with_values(maps: Tensor) -> Tensor:
    return maps[~maps.isnan().flatten(1).all(1)]


def _resampled(maps: Tensor, rng: np.random.Generator, size: int) -> Tensor:
    """Means over facts of `size` bootstrap resamples, [size, layer, module, step]; NaN where no drawn fact has a value."""
    facts = max(len(maps), 1)  # without neighbours there is no column to draw
    counts = torch.from_numpy(rng.multinomial(len(maps), [1 / facts] * facts, size)[:, : len(maps)]).double()
    flat = maps.flatten(1)
    return ((counts @ flat.nan_to_num()) / (counts @ (~flat.isnan()).double())).view(size, *maps.shape[1:])


# ------------------------------------------------------------------ from means to a site
def _scores(means: Tensor, penalty: Tensor | None, rule: SiteRule) -> Tensor:
    """Scores [..., layer, module, step] of means over facts and over neighbours, -inf where undefined."""
    scores = means if penalty is None else means - rule.beta * penalty.nan_to_num()
    if rule.smooth:
        near = [slice(max(0, layer - rule.smooth), layer + rule.smooth + 1) for layer in range(scores.shape[-3])]
        scores = torch.stack([scores[..., layers, :, :].nanmean(-3) for layers in near], dim=-3)
    return torch.where(means.isnan(), -math.inf, scores.round(decimals=_DECIMALS))


def _best(scores: Tensor, trace: Trace) -> Choice:
    layer, module, step = np.unravel_index(int(scores.argmax()), scores.shape)
    score = float(scores[layer, module, step])
    if score == -math.inf:
        raise _nothing_defined()
    return Choice(Site(int(layer), trace.config.modules[module]), int(step), score)


def _ward(vectors: np.ndarray, clusters: int) -> np.ndarray:
    """Cluster of every row of [n, d] after scaling to norm 1."""
    if clusters == 1:  # also a single row, which has no hierarchy
        return np.zeros(len(vectors), int)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return fcluster(linkage(vectors / np.where(norms > 0, norms, 1), "ward"), clusters, "maxclust")


# ------------------------------------------------------------------ errors
def _check(trace: Trace, rule: SiteRule, neighbours: Trace | None) -> None:
    if rule.module is not None and rule.module not in trace.config.modules:
        raise RemaskError(f"module {rule.module!r} was not traced; traced: {', '.join(trace.config.modules)}")
    if rule.beta > 0 and (neighbours is None or not neighbours.ids):
        raise RemaskError(f"beta {rule.beta} weighs neighbour facts, but none were given; pass their trace or set beta to 0")
    if neighbours is None:
        return
    for what, (own, other) in {
        "model": (trace.model, neighbours.model),
        "mode": (trace.mode, neighbours.mode),
        "number of layers": (trace.effects.shape[1], neighbours.effects.shape[1]),
    }.items():
        if own != other:
            raise RemaskError(f"neighbours were traced with another {what}: {other} against {own}; trace them like the facts")
    own_config, other_config = asdict(trace.config), asdict(neighbours.config)
    for name in own_config:
        if name != "seed" and own_config[name] != other_config[name]:
            raise RemaskError(
                f"neighbours were traced with another protocol: {name} {other_config[name]!r} against {own_config[name]!r}; "
                "trace them like the facts"
            )


def _nothing_defined() -> RemaskError:
    return RemaskError("no effect is defined, so no site can be chosen; trace facts with more object tokens or strict=False")
