"""Steering: one vector added at a site, at every position. What a memory has to beat.

A plain memory whose keys share a large common component adds about the *mean* of its deltas to every token. `mean_delta` is
that vector without any memory; a memory is worth its name only as far as it is more selective than this at equal strength.
`caa` and `repe` are what autoregressive models are steered with, `random_layer` is the control for the choice of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.intervention import require_finite
from ..backbones.model import Encoded, MaskedDiffusionLM, Site
from ..diffusion.masks import MaskBank
from ..editfile import read_edit, rebuilt, write_edit
from ..errors import RemaskError
from ..facts import Fact, check_unique_ids
from ..random import numpy_generator
from .capture import object_values
from .config import PRESETS
from .memory import EditMemory
from .shift import ConstantShift, Shift
from .site import SiteEdit

REFUSAL, STATES = PRESETS["default"].refusal, PRESETS["default"].bank


@dataclass
class SteeringVector(SiteEdit):
    """h <- h + alpha * vector at the site, all positions, every step; `vector` is [d].

    `model` is the fingerprint of the model that it was captured on; "" fits any.
    """

    vector: Tensor
    site: Site
    alpha: float = 1.0
    preset: str = "steering"
    model: str = ""
    kind = "steering vector"

    def __post_init__(self) -> None:
        require_finite(self.alpha)

    def shift(self) -> Shift:
        """What is added to a residual."""
        return ConstantShift(self.vector * self.alpha)

    def _tensors(self) -> list[Tensor]:
        return [self.vector]

    def with_alpha(self, alpha: float) -> SteeringVector:
        """The same direction at another strength."""
        return replace(self, alpha=alpha)

    def describe(self) -> dict[str, Any]:
        """Preset, site, strength and norm."""
        return {
            "preset": self.preset,
            "alpha": self.alpha,
            "site": self.site.to_dict(),
            "norm": float(self.vector.norm()),
        }

    def save(self, path: str | Path) -> None:
        """Write an edit file, atomically."""
        header = {"preset": self.preset, "alpha": self.alpha, "site": self.site.to_dict(), "model": self.model}
        write_edit(path, self.kind, header, {"vector": self.vector})

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a steering file.

        Raises:
            RemaskError: missing, unreadable or damaged file, other format version, another kind of edit.
        """
        header, tensors = read_edit(path, cls.kind)
        with rebuilt(path):
            site = Site.from_dict(header["site"])
            return cls(tensors["vector"], site, header["alpha"], header["preset"], header["model"])


def mean_delta(memory: EditMemory) -> SteeringVector:
    """The control at equal strength: the memory's mean delta, scaled to the memory's root-mean-square shift on its own keys."""
    share = memory.counts / memory.counts.sum()
    vector = share @ memory.deltas
    shift = memory.shift()(memory.keys)
    strength = (share @ shift.square().sum(dim=1)).sqrt() / vector.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return SteeringVector(vector, memory.site, float(strength), preset="mean-delta", model=memory.model)


def caa(
    lm: MaskedDiffusionLM,
    site: Site,
    facts: Sequence[Fact],
    *,
    refusal: str = REFUSAL,
    states: MaskBank = STATES,
    alpha: float = 1.0,
) -> SteeringVector:
    """Contrastive activation addition (arXiv 2312.06681): the mean residual of the refusal minus that of the true answer.

    CAA reads both at the answer's own token. Here both answers stand on the canvas in turn, each as partly masked as the bank's
    states have it, and the residual is the mean over all positions of the answer; the vector is the mean over facts and states.
    `mean_delta` contrasts two *questions* instead (known and unknown subject) under one and the same answer, and reads only
    positions that are still masked.

    Args:
        refusal: the positive answer, of every fact.
        states: bank of the masks; state s of both answers hides about the same share of its tokens.

    Raises:
        RemaskError: no facts, duplicate ids, site outside the model, an intervention attached, or no difference.
    """
    vector = answer_differences(lm, site, facts, refusal, states).double().mean(dim=0)
    return SteeringVector(vector.float(), site, alpha, "caa", lm.fingerprint())


def repe(
    lm: MaskedDiffusionLM,
    site: Site,
    facts: Sequence[Fact],
    *,
    refusal: str = REFUSAL,
    states: MaskBank = STATES,
    alpha: float = 1.0,
) -> SteeringVector:
    """Representation engineering (arXiv 2310.01405, repeng's `pca_diff`): the main direction in which the pairs of `caa` vary.

    A pair is a (fact, state). The vector has the mean norm of the pairs' differences, so that alpha 1 is as strong as one of
    them; repeng leaves the norm at 1.

    Raises:
        RemaskError: as `caa`, or all pairs differ in the same way.
    """
    differences = answer_differences(lm, site, facts, refusal, states).double()
    vector = main_direction(differences) * differences.norm(dim=1).mean()
    return SteeringVector(vector.float(), site, alpha, "repe", lm.fingerprint())


def answer_differences(lm: MaskedDiffusionLM, site: Site, facts: Sequence[Fact], refusal: str, states: MaskBank) -> Tensor:
    """Mean residual at the answer's positions, the refusal's minus the true answer's, [facts * states, d], fp32.

    Facts are in the order of their ids, and a fact's states follow one another.
    """
    if not facts:
        raise RemaskError("steering needs at least one fact")
    check_unique_ids(facts, "steering")
    lm.site_module(site)
    facts = sorted(facts, key=lambda fact: fact.id)
    refused = _partly_masked(lm, site, [lm.encode(fact, answer=refusal) for fact in facts], states)
    differences = refused - _partly_masked(lm, site, [lm.encode(fact) for fact in facts], states)
    if not differences.any():
        raise RemaskError("the refusal is what every answer is already, so there is nothing to steer towards; change it")
    return differences.flatten(0, 1)


def _partly_masked(lm: MaskedDiffusionLM, site: Site, rows: Sequence[Encoded], states: MaskBank) -> Tensor:
    """Mean residual at the answer's positions in every partial state, [rows, states, d]."""
    masks = [states.masks(row.id, len(row.answer_ids)) for row in rows]
    per_state = []
    for state in zip(*masks, strict=True):
        partial = []
        for row, mask in zip(rows, state, strict=True):
            ids = tuple(lm.spec.mask_id if hidden else token for token, hidden in zip(row.answer_ids, mask, strict=True))
            partial.append(replace(row, answer_ids=ids))
        per_state.append(object_values(lm, site, partial))
    return torch.stack(per_state, dim=1)


def main_direction(differences: Tensor) -> Tensor:
    """First principal component of `differences` [n, d], centred, as a unit vector [d] in fp64.

    It points the way that most of the differences do (before centring); where they are divided, the way their sum does.

    Raises:
        RemaskError: nothing is left after centring.
    """
    wide = differences.double()
    centred = wide - wide.mean(dim=0)
    if not bool((centred.norm() > 1e-9 * wide.norm()).item()):
        raise RemaskError("all pairs differ in the same way, so there is no main direction; use more facts, or 'caa'")
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    projections = wide @ direction
    votes = int(projections.sign().sum())
    return -direction if votes < 0 or (votes == 0 and projections.sum() < 0) else direction


def random_layer(lm: MaskedDiffusionLM, facts: Sequence[Fact], *, avoid: int | None = None, seed: int = 0) -> int:
    """A layer other than `avoid`, drawn from (seed, ids of the facts): the control for a layer that was traced or tuned.

    Raises:
        RemaskError: the model has no other layer.
    """
    layers = [layer for layer in range(lm.num_layers) if layer != avoid]
    if not layers:
        raise RemaskError(f"{lm.name} has a single layer, so there is no other one to draw")
    rng = numpy_generator(seed, "random layer", *sorted(fact.id for fact in facts))
    return layers[int(rng.integers(len(layers)))]
