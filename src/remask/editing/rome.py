"""ROME (arXiv 2202.05262): one fact, one layer, one change of rank one.

W' = argmin_W' E|W' k - W k|^2 over the preserved keys, subject to W' k* = v*, which is  W' = W + delta u^T / (u^T k*)  with
u = C^-1 k*, C the preserved keys' second moment, and delta = v* - W k*. Several facts are told one after the other, each to the
model that has the former ones.

The original takes u at the mean key over states and wordings but divides by the bare prompt's key, so W' k* = v* holds for
neither. The default here has one key everywhere, as R-ROME (arXiv 2403.07175).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM, Site
from ..backbones.weight_edit import WeightEdit
from ..facts import Fact
from .covariance import MomentConfig, ridged, second_moments, solve_moment
from .lookups import Lookups, key_states, read_subjects
from .mlp import Changes, require_editable
from .values import ValueConfig, optimise_values

REMEDY = "raise ridge, or pass more text than the MLP has dimensions"


class RomeConfig(ValueConfig, MomentConfig):
    """Settings of ROME, with the peers' in brackets."""

    layer: int | None = Field(
        default=None, description="layer that is changed; default: a quarter up [17 of 48, 5 of 28 or 32]"
    )
    covariance: bool = Field(default=True, description="preserve keys by their second moment [EasyEdit: off, C = I]")
    # C has rank at most the number of text tokens, and small models are edited with small texts, so some ridge is needed;
    # keys' scale differs from layer to layer, so it is in units of C's mean eigenvalue.
    ridge: float = Field(default=1e-3, ge=0, description="added to C, in units of its mean eigenvalue [0]")
    asymmetric: bool = Field(default=False, description="the original update, which divides by the bare prompt's key")


def rome(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    text: Sequence[Encoded],
    config: RomeConfig | None = None,
    *,
    cache: Path | None = None,
) -> WeightEdit:
    """Tell `lm` new objects: a fact's own `target`, or the refusal text where it has none. `lm` is left as it is.

    Args:
        facts: in the order in which they are told.
        text: whose keys are preserved: retain facts, or texts (`lm.encode_text`); not read without `covariance`.
        cache: folder of second moments.

    Raises:
        RemaskError: no facts or text, a layer outside of the model, a mixture of experts, an intervention attached, a singular
            second moment, or a loss that is not finite.
    """
    config = config or RomeConfig()
    layer = lm.num_layers // 4 if config.layer is None else config.layer
    require_editable(lm, facts, [layer], "ROME")
    started, forwards = time.perf_counter(), lm.counters.forwards
    moment = None
    if config.covariance:
        moment = ridged(second_moments(lm, [layer], text, config, cache)[layer], config.ridge).to(lm.device)
    changes, reports = Changes(lm, "rome"), dict[str, Any]()
    for fact in facts:
        with changes.applied():
            left, right, report = _tell(lm, fact, layer, moment, config)
        changes.add(layer, left, right)
        reports |= report
    cost = {"seconds": time.perf_counter() - started, "forwards": lm.counters.forwards - forwards}
    return changes.edit(options=config.model_dump(mode="json"), layers=[layer], facts=reports, cost=cost)


def _tell(
    lm: MaskedDiffusionLM, fact: Fact, layer: int, moment: Tensor | None, config: RomeConfig
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Factors [d, 1] and [1, m] of one fact's change."""
    lookups = Lookups.of(lm, [fact], config)
    keys, outputs = read_subjects(lm, lookups, key_states(lookups, config), [layer], Site(layer))
    key = divisor = keys[layer][0]
    if config.asymmetric:
        bare = lookups.bare()
        divisor = read_subjects(lm, bare, bare.hidden(), [layer], Site(layer))[0][layer][0]
    values = optimise_values(lm, [fact], Site(layer, "mlp"), outputs.norm(dim=1), lookups, config)
    left, right = rank_one(values.delta[0].double(), key, divisor, moment)
    return left, right, values.report([fact])


def rank_one(delta: Tensor, key: Tensor, divisor: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of  delta u^T / (u^T divisor),  u = C^-1 key: [d, 1] and [1, m], fp64.

    Args:
        delta: v* - W k*, [d]; key, divisor: [m], the same vector in the symmetric form.
        moment: C [m, m]; None = I.

    Raises:
        RemaskError: C is singular to working precision.
    """
    direction = key if moment is None else solve_moment(moment, key[:, None], REMEDY)[:, 0]
    return delta[:, None], (direction / (direction @ divisor))[None]
