"""MEMIT (arXiv 2210.07229): many facts at once, spread over several layers.

The new values z are block outputs at the last edited layer L. For each edited layer in turn, on the model with the earlier ones
changed, a share of what is still missing there is written:

    dW_l = R K^T (lambda C_l + K K^T)^-1,    R = (z - h_L) / (number of layers left)

with K [m, n] the facts' keys at layer l and C_l the preserved keys' second moment: least squares over both. Layers add to the
residual stream as they are; where blocks are post-norm (BERT) that is an approximation, which the re-measuring corrects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM, Site
from ..backbones.weight_edit import WeightEdit
from ..facts import Fact
from .covariance import MomentConfig, ridged, second_moments, solve_moment
from .lookups import Lookups, key_states, read_subjects
from .mlp import Changes, require_editable
from .rome import REMEDY
from .values import ValueConfig, optimise_values

Solve = Callable[[int, Tensor], Tensor]  # (layer, keys [n, m]) -> readout [n, m], so that the layer's change is R^T readout


class SpreadConfig(ValueConfig, MomentConfig):
    """Settings of methods that spread values over layers, with the peers' in brackets."""

    layers: tuple[int, ...] | None = Field(
        default=None, description="layers that are changed; default: five up to a quarter of the model [4-8 of 32, 13-17 of 48]"
    )

    def chosen(self, lm: MaskedDiffusionLM) -> list[int]:
        """The layers of `lm` that are changed."""
        last = lm.num_layers // 4
        return list(range(max(0, last - 4), last + 1)) if self.layers is None else list(self.layers)


class MemitConfig(SpreadConfig):
    """Settings of MEMIT, with the peers' in brackets."""

    # How much of a fact is written is s / (1 + s), s = k^T C^-1 k / lambda, and k^T C^-1 k is m on average over the text. So
    # lambda is in units of m: an absolute 15000 (1.4 m where m = 11008) would leave a small model as it is. On `tiny`, 1 m
    # leaves half of the values unwritten and 0.1 m a tenth, at the same retain log-probability to 0.01 nats a row.
    weight: float = Field(default=0.1, gt=0, description="lambda / MLP size [15000 / 11008 = 1.4, 20000 / 6400 = 3.1]")
    ridge: float = Field(default=1e-3, ge=0, description="added to C, in units of its mean eigenvalue [0]")


def memit(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    text: Sequence[Encoded],
    config: MemitConfig | None = None,
    *,
    cache: Path | None = None,
) -> WeightEdit:
    """Tell `lm` new objects, all at once; arguments and errors are those of `rome`."""
    config = config or MemitConfig()
    layers = config.chosen(lm)
    require_editable(lm, facts, layers, "MEMIT")
    started, forwards = time.perf_counter(), lm.counters.forwards
    moments = second_moments(lm, layers, text, config, cache)

    def solve(layer: int, keys: Tensor) -> Tensor:
        moment = ridged(moments[layer], config.ridge).to(keys.device)
        return memit_readout(keys, moment, config.weight * len(moment))

    changes = Changes(lm, "memit")
    reports = spread(lm, facts, layers, solve, changes, config)
    cost = {"seconds": time.perf_counter() - started, "forwards": lm.counters.forwards - forwards}
    return changes.edit(options=config.model_dump(mode="json"), layers=layers, facts=reports, cost=cost)


def memit_readout(keys: Tensor, moment: Tensor, weight: float) -> Tensor:
    """K^T (lambda C + K K^T)^-1, [n, m] fp64, of keys [n, m] (rows) and C [m, m].

    Raises:
        RemaskError: the system is singular to working precision.
    """
    return solve_moment(weight * moment + keys.T @ keys, keys.T.contiguous(), REMEDY).T


def spread(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], layers: Sequence[int], solve: Solve, changes: Changes, config: SpreadConfig
) -> Mapping[str, Any]:
    """Optimise the facts' values on the model with `changes`, and add to them each layer's share; returns a report a fact."""
    site, lookups = Site(layers[-1]), Lookups.of(lm, facts, config)
    states = key_states(lookups, config)
    with changes.applied():
        init = read_subjects(lm, lookups, states, [], site)[1]
        values = optimise_values(lm, facts, site, init.norm(dim=1), lookups, config)
    goal = init + values.delta.double()
    for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        with changes.applied():
            keys, output = read_subjects(lm, lookups, states, [layer], site)
        changes.add(layer, ((goal - output) / left).T, solve(layer, keys[layer]))
    with changes.applied():
        missing = goal - read_subjects(lm, lookups, states, [], site)[1]
    share = (missing.norm(dim=1) / values.delta.double().norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)).tolist()
    return {name: {**report, "missing": part} for (name, report), part in zip(values.report(facts).items(), share, strict=True)}
