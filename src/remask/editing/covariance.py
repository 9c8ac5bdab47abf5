"""Second moment of MLP keys over masked text, C = E[k k^T]: what a locate-then-edit method must leave alone.

An MDLM meets text at every noise level, so the mean is over partial states: t ~ U(0, 1), stratified, with exact counts. Subject
keys are those of visible tokens in a partly masked canvas, hence the default. C is accumulated in fp64 and cached by what it
depends on: the model's fingerprint (not its name), layer, rows and how they are masked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..diffusion.canvas import canvas_batches
from ..diffusion.masks import MaskBank
from ..errors import RemaskError
from ..random import digest
from ..tensorfile import read_tensors, write_tensors
from .mlp import mlp_keys
from .solve import MAX_CONDITION

FORMAT = 1


class MomentConfig(BaseModel):
    """Over which tokens of which states C is taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: Literal["visible", "masked", "all"] = Field(
        default="visible", description="tokens of the masked text whose keys are to be preserved"
    )
    text_draws: int = Field(default=4, ge=1, description="partial states a row of text")
    seed: int = Field(default=0, description="seed of all masks")

    @property
    def bank(self) -> MaskBank:
        """The states of the text."""
        return MaskBank(draws=self.text_draws, replicates=1, seed=self.seed)


def second_moments(
    lm: MaskedDiffusionLM, layers: Sequence[int], rows: Sequence[Encoded], config: MomentConfig, cache: Path | None = None
) -> dict[int, Tensor]:
    """C [m, m] of each layer, fp64 on the CPU; what is not in the folder `cache` is computed in one pass and put there.

    Args:
        rows: facts, whose answers are masked, or texts (`lm.encode_text`), which are masked anywhere.

    Raises:
        RemaskError: no rows, no token of the kind asked for, an intervention attached, or a mixture of experts.
    """
    if not rows:
        raise RemaskError("second moments are taken over text, and there is none; pass --retain")
    if lm.attached:
        raise RemaskError(f"{lm.name} has a {lm.attached[0].kind} attached; detach it before second moments are taken")
    if cache is None:
        return _accumulate(lm, layers, rows, config)
    settings = config.model_dump_json(include=set(MomentConfig.model_fields))
    data = digest(lm.fingerprint(), settings, *((row.id, row.prompt_ids, row.answer_ids) for row in rows))
    paths = {layer: cache / f"moment-{digest(data, layer)}.safetensors" for layer in layers}
    found = {layer: moment for layer in layers if (moment := _read(paths[layer])) is not None}
    if missing := [layer for layer in layers if layer not in found]:
        for layer, moment in _accumulate(lm, missing, rows, config).items():
            write_tensors(paths[layer], {"format": FORMAT, "sum": _checksum(moment)}, {"moment": moment})
            found[layer] = moment
    return {layer: found[layer] for layer in layers}


def solve_moment(system: Tensor, right: Tensor, remedy: str) -> Tensor:
    """X of `system` X = `right`, fp64, `system` symmetric and positive definite.

    Raises:
        RemaskError: singular to working precision; says the `remedy`.
    """
    factor, info = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal().square()
    if int(info) or not pivots.max() <= MAX_CONDITION * pivots.min():
        raise RemaskError(f"the second moment of the MLP keys ({len(system)} dimensions) is singular: {remedy}")
    return torch.cholesky_solve(right, factor)


def ridged(moment: Tensor, ridge: float) -> Tensor:
    """C + ridge * mean eigenvalue * I."""
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


@torch.no_grad()
def _accumulate(
    lm: MaskedDiffusionLM, layers: Sequence[int], rows: Sequence[Encoded], config: MomentConfig
) -> dict[int, Tensor]:
    masks = [config.bank.masks(row.id, len(row.answer_ids)) for row in rows]
    sums: dict[int, Tensor] = {}
    count = 0.0
    for batch in canvas_batches(lm, rows, masks):
        kinds = {"visible": ~batch.masked, "masked": batch.masked, "all": torch.ones_like(batch.masked)}
        chosen = kinds[config.text_tokens]
        draws = torch.tensor([float(len(draws)) for draws in batch.draws], dtype=torch.float64, device=lm.device)
        weight = draws[chosen.nonzero()[:, 0], None]
        with mlp_keys(lm, layers) as store:
            lm.run_to(max(layers), batch.clean.masked_fill(batch.masked, lm.spec.mask_id))
        for layer in layers:
            keys = store[layer][chosen].double()
            moment = keys.T @ (keys * weight)
            sums[layer] = sums[layer] + moment if layer in sums else moment
        count += float(weight.sum())
    if not count:
        raise RemaskError(f"no state of the text has {config.text_tokens} tokens; use text_tokens 'all' or longer texts")
    return {layer: (moment / count).cpu() for layer, moment in sums.items()}


def _read(path: Path) -> Tensor | None:
    """A cached moment; None where there is none or it is damaged, and so has to be taken again."""
    try:
        header, tensors = read_tensors(path, "second moment", FORMAT)
    except RemaskError:
        return None
    moment = tensors.get("moment")
    return moment if moment is not None and header.get("sum") == _checksum(moment) else None


def _checksum(moment: Tensor) -> str:
    return hashlib.blake2b(moment.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
