"""A codebook: a fact's delta is added where the residual is next to one of its keys, and nothing anywhere else.

GRACE (arXiv 2211.11031) for masked diffusion models, in closed form:

    h <- h + alpha * delta_i    for i = argmin |h - k_i|, if |h - k_i| < radius_i

What differs from GRACE. Values are captured deltas that are added, not vectors that are trained and put in the output's place.
Queries are the residuals of the site itself, and every token is looked up at every denoising step, not one token of the prompt
whose decision holds for the answer. Radii come from the distances between keys, not from a constant: residual norms differ
between layers and models. Keys are never merged, so facts do not depend on the order in which they came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backbones.intervention import require_finite
from ..backbones.model import MaskedDiffusionLM, Site
from ..errors import RemaskError
from ..facts import Fact
from .build import capture_facts, capture_retain, in_order
from .capture import capture_subject
from .config import MemoryConfig
from .shift import CodebookShift, Shift
from .site import KeyedEdit

CODEBOOK = MemoryConfig(preset="codebook", readout="ridge", mu=0.0, balance=0.0, compress=0)
_BLOCK = 64  # keys whose distances are in memory at a time


@dataclass
class Codebook(KeyedEdit):
    """Keys with a delta and a radius each; the fields of `KeyedEdit` and these.

    Attributes:
        config: how keys and deltas were captured; its solver settings are not used.
        radii: [n], in the units of residuals.
        model: fingerprint of the model that it was captured on.
        quantile: of the distances to retain keys that the radii come from.
        alpha: strength; radii do not depend on it.
    """

    radii: Tensor
    model: str
    quantile: float = 0.0
    alpha: float = 1.0
    kind = "codebook"

    def __post_init__(self) -> None:
        n, d = self.keys.shape
        for name, shape in (("deltas", (n, d)), ("owner", (n,)), ("radii", (n,))):
            if getattr(self, name).shape != shape:
                raise RemaskError(f"{name}: shape {list(getattr(self, name).shape)} where {list(shape)} is needed")
        if set(self.owner.tolist()) != set(range(len(self.fact_ids))):
            raise RemaskError("every key must belong to a fact, and every fact needs a key")
        require_finite(self.alpha)
        if not (self.radii > 0).any():
            raise RemaskError("every radius is 0: the keys are those of retain facts or of one another; choose another layer")

    @classmethod
    def build(
        cls,
        lm: MaskedDiffusionLM,
        facts: Sequence[Fact],
        site: Site,
        *,
        retain: Sequence[Fact],
        config: MemoryConfig = CODEBOOK,
        quantile: float = 0.0,
        alpha: float = 1.0,
    ) -> Codebook:
        """Capture keys and deltas of `facts` as a memory does, and set the radii by the keys of `retain`.

        Args:
            retain: facts to leave alone; their keys are read in the same way, in context too where the config says so.
            config: keys and target; mu is 0.
            quantile: see `deferral_radii`.

        Raises:
            RemaskError: no retain facts, or whatever `EditMemory.build` refuses.
        """
        if not retain:
            raise RemaskError("a codebook needs retain facts: their distances set its radii; pass --retain")
        facts = in_order(facts, retain, "a codebook")
        lm.site_module(site)
        captured = capture_facts(lm, facts, site, config, retain)
        kept = _retain_keys(lm, retain, site, config)
        parts = (captured.keys, captured.deltas, captured.owner)
        ids = tuple(fact.id for fact in facts)
        return cls(config, site, ids, *parts, deferral_radii(*parts, kept, quantile), lm.fingerprint(), quantile, alpha)

    def shift(self) -> Shift:
        """What it adds to a residual, strength included."""
        return CodebookShift(self.keys, self.deltas * self.alpha, self.radii)

    def _tensors(self) -> list[Tensor]:
        return [self.keys, self.deltas, self.radii]

    def with_alpha(self, alpha: float) -> Codebook:
        """The same look-up at another strength."""
        return replace(self, alpha=alpha)

    def describe(self) -> dict[str, Any]:
        """Preset, site, strength, size, smallest, median and largest radius."""
        return {
            "preset": self.config.preset,
            "alpha": self.alpha,
            "site": self.site.to_dict(),
            "facts": len(self.fact_ids),
            "keys": len(self.keys),
            "radii": [float(self.radii.min()), float(self.radii.median()), float(self.radii.max())],
            "quantile": self.quantile,
            "model": self.model,
            "config": asdict(self.config),
        }

    def _own_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"quantile": self.quantile}, {"radii": self.radii}

    @classmethod
    def _own_fields(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"quantile": header["quantile"], "radii": tensors["radii"]}


def deferral_radii(keys: Tensor, deltas: Tensor, owner: Tensor, retain: Tensor, quantile: float = 0.0) -> Tensor:
    """How far each key reaches, [n], fp32.

    Half the `quantile` of a key's distances to the retain keys: 0 is the nearest, and no retain key is reached. Where the
    balls of two facts' keys with different deltas overlap, neither reaches beyond half way between them, as GRACE splits them;
    all pairs are judged by the radii before any split, so that the order of keys does not matter.

    Args:
        keys, deltas: [n, d]; owner: [n], the fact of each; retain: [m, d].

    Raises:
        RemaskError: quantile outside [0, 1], or no retain keys.
    """
    if not 0 <= quantile <= 1 or not len(retain):
        raise RemaskError(f"radii need retain keys and a quantile in [0, 1], not {len(retain)} keys and {quantile}")
    keys, retain = keys.double(), retain.double()
    radii = torch.cat([torch.cdist(block, retain).quantile(quantile, dim=1) / 2 for block in keys.split(_BLOCK)])
    label = torch.unique(deltas, dim=0, return_inverse=True)[1]
    split = radii.clone()
    for rows in torch.arange(len(keys)).split(_BLOCK):
        apart = torch.cdist(keys[rows], keys)
        conflict = (owner[rows, None] != owner) & (label[rows, None] != label) & (radii[rows, None] + radii > apart)
        half = (apart / 2).masked_fill(~conflict, torch.inf).amin(dim=1)
        split[rows] = torch.minimum(split[rows], half)
    return split.float()


def _retain_keys(lm: MaskedDiffusionLM, retain: Sequence[Fact], site: Site, config: MemoryConfig) -> Tensor:
    """Keys [m, d] of the retain facts, read as those of the facts are."""
    if config.keys == "answer":
        return capture_retain(lm, retain, site, config)
    rows = [lm.encode(fact) for fact in retain]
    return capture_subject(lm, site, rows, torch.zeros(len(rows), lm.hidden_size), config.keys).keys
