"""States: canvases at a noise level, drawn so that policy, reference and anchor see the very same ones.

Of a row's response (its answer and the first end token, L tokens) an exact count of ceil(t L) tokens is hidden, t the noise
level. With t ~ U(0, 1] the count is uniform on 1..L, and L / count times the summed cross-entropy of the hidden tokens is
LLaDA's unbiased estimate of the row's likelihood bound (diffusion/likelihood.py). The other laws keep t away from 0, where a
single token carries the weight of the whole row.

Shapes: S states, of R rows in turn with `draws` each; L canvas positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..backbones.model import BackboneSpec, Encoded, MaskedDiffusionLM
from ..diffusion.sampler import SamplerConfig, choose, transfer_counts
from ..errors import RemaskError
from ..random import numpy_generator

if TYPE_CHECKING:
    from typing_extensions import Self

Law = Literal["uniform", "high-noise", "fixed-count"]
Removal = Literal["mask", "attention"]

_LOW: dict[Law, float] = {"uniform": 0.1, "high-noise": 0.9, "fixed-count": 0.0}


class Noise(BaseModel):
    """Law of the noise levels of a row's draws: uniform between `low` and `high`, stratified and mirrored.

    Attributes:
        law: `uniform` over [0.1, 1]; `high-noise` over [0.9, 1], where a denoising run starts and the prompt decides most;
            `fixed-count` over (0, 1], LLaDA's estimator, under which weights make an exact bound.
        low, high: other limits of the first two laws.
        draws: states a row.
    """

    model_config = ConfigDict(extra="forbid")

    law: Law = "uniform"
    low: float = Field(default=0.1, ge=0, le=1, description="smallest noise level; 0.9 for high-noise, 0 for fixed-count")
    high: float = Field(default=1.0, gt=0, le=1, description="largest noise level")
    draws: int = Field(default=1, gt=0, description="states a row")

    @model_validator(mode="before")
    @classmethod
    def _low_of_the_law(cls, data: Any) -> Any:
        return {"low": _LOW.get(data.get("law", "uniform"), 0.1), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.law == "fixed-count" and (self.low, self.high) != (0.0, 1.0):
            raise ValueError("law fixed-count covers every noise level; leave low and high out, or choose law uniform")
        if self.law != "fixed-count" and self.low == 0:
            raise ValueError(f"low must be above 0 for law {self.law}; law fixed-count is the one that goes down to 0")
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; exchange them")
        return self


@dataclass(frozen=True)
class States:
    """States on one padded canvas.

    Attributes:
        ids: [S, L] long, hidden tokens are the mask token.
        clean: [S, L] long, nothing hidden.
        prompt: [S, L] bool.
        scored: [S, L] bool, hidden tokens of the response.
        attention: [S, L] long, 0 = padding; None when nothing is padded.
        row: [S] long, index of each state's row, ascending.
        weight: [S] fp32, response length / scored tokens.
        length: [R] long, response length: answer and one end token.
    """

    ids: Tensor
    clean: Tensor
    prompt: Tensor
    scored: Tensor
    attention: Tensor | None
    row: Tensor
    weight: Tensor
    length: Tensor

    def anchored(self, mask_id: int, how: Removal = "mask") -> Tensor:
        """The same states without their prompts, [S, L].

        Args:
            mask_id: the mask token.
            how: `mask` gives ids with every prompt token replaced by the mask token; padding stays padding. `attention` gives
                an attention mask that hides the prompt as well; families that count positions over real tokens then place
                the response at 0.
        """
        if how == "mask":
            return self.ids.masked_fill(self.prompt, mask_id)
        attention = torch.ones_like(self.ids) if self.attention is None else self.attention
        return attention.masked_fill(self.prompt, 0)

    def to(self, device: torch.device | str) -> States:
        """The states on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


def draw_states(spec: BackboneSpec, rows: Sequence[Encoded], noise: Noise, key: tuple[Any, ...], tail: int) -> States:
    """States of `rows`, on the CPU.

    A row's noise levels depend on (key, row id) alone, its masks on its answer's length as well; neither depends on the batch
    or on the process. Another answer under the same id gets the same levels: that pairs a refusal with what it replaces.

    Args:
        spec: of the model, for its ids and its context.
        key: (seed, step, ...).
        tail: end tokens behind the first one, as far as the context reaches. Each is hidden with probability t and never
            scored.

    Raises:
        RemaskError: a row that exceeds the context with its end token, or starts with its answer although the family never
            predicts position 0.
    """
    for row in rows:
        _check(spec, row)
    size = noise.draws
    width = min(max(len(row.ids) for row in rows) + 1 + tail, spec.max_length)
    clean = np.full((len(rows), size, width), spec.eos_id)
    prompt, scored, hidden, real = (np.zeros(clean.shape, dtype=bool) for _ in range(4))
    for r, row in enumerate(rows):
        start, end = row.answer
        stop = min(end + 1 + tail, width)
        masks, levels = _masks(noise, end + 1 - start, key, row.id)
        clean[r, :, :end] = row.ids
        prompt[r, :, :start] = True
        scored[r, :, start : end + 1] = masks
        hidden[r, :, end + 1 : stop] = _generator("tail", key, row.id).random((size, stop - end - 1)) < levels[:, None]
        real[r, :, :stop] = True
    ids = np.where(hidden | scored, spec.mask_id, clean)
    length = torch.tensor([len(row.answer_ids) + 1 for row in rows])
    owner = torch.arange(len(rows)).repeat_interleave(size)
    counts = torch.from_numpy(scored.sum(axis=2).reshape(-1))

    def flat(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.reshape(-1, width))

    return States(
        ids=flat(ids),
        clean=flat(clean),
        prompt=flat(prompt),
        scored=flat(scored),
        attention=None if real.all() else flat(real).long(),
        row=owner,
        weight=length[owner] / counts,
        length=length,
    )


@torch.no_grad()
def roll_out(lm: MaskedDiffusionLM, states: States, steps: int) -> States:
    """States that the model itself arrives at: its own tokens where `states` show the row's.

    Every response starts fully masked and is denoised greedily, the most confident positions first, until as many of its
    tokens are hidden as in the drawn state. Tokens behind it stay as drawn.

    Args:
        lm: the current model, on the device of `states`.
        steps: denoising steps that share the tokens to commit (the release of MDU: 16).
    """
    place = torch.arange(states.ids.shape[1], device=states.ids.device)
    start = states.prompt.sum(dim=1, keepdim=True)
    response = (place >= start) & (place < start + states.length[states.row][:, None])
    planned = transfer_counts(response & ~states.scored, steps)
    canvas = states.ids.masked_fill(response, lm.spec.mask_id)
    for counts in planned[:, planned.any(dim=0)].unbind(dim=1):
        open_ = response & (canvas == lm.spec.mask_id)
        logits = lm.logits(canvas, states.attention, open_)
        logits[:, lm.spec.mask_id] = -torch.inf  # a committed mask would leave one token too many hidden
        canvas = choose(lm, canvas, open_, logits, counts, [""] * len(canvas), _GREEDY)
    return replace(states, ids=canvas, scored=response & (canvas == lm.spec.mask_id))


_GREEDY = SamplerConfig(gen_length=1, fp64_confidence=True)


def _check(spec: BackboneSpec, row: Encoded) -> None:
    if len(row.ids) >= spec.max_length:
        raise RemaskError(
            f"row {row.id!r}: {len(row.ids)} tokens and an end token exceed the context of {spec.max_length}; shorten it"
        )
    if spec.shift and not row.prompt_ids:
        raise RemaskError(
            f"row {row.id!r} has no prompt, and {spec.family} never predicts position 0; start it with a BOS token"
        )


def _masks(noise: Noise, length: int, key: tuple[Any, ...], row: str) -> tuple[np.ndarray, np.ndarray]:
    """Hidden tokens of a response, bool [draws, length], and the noise levels, [draws].

    Each half of the draws hides consecutive windows of one random order: every token is hidden equally often there, up to
    one, and each draw given its count is a uniform subset. The halves have orders of their own (diffusion/masks.py).
    """
    rng = _generator("states", key, row)
    lower = (noise.draws + 1) // 2
    strata = (1 - rng.random() + np.arange(lower)) / noise.draws
    levels = noise.low + (noise.high - noise.low) * np.concatenate([strata, (1 - strata[: noise.draws - lower])[::-1]])
    counts = np.clip(np.ceil(levels * length), 1, length).astype(int)
    masks = np.zeros((noise.draws, length), dtype=bool)
    for half in (range(lower), range(lower, noise.draws)):
        order, start = rng.permutation(length), 0
        for draw in half:
            masks[draw, order[(start + np.arange(counts[draw])) % length]] = True
            start += counts[draw]
    return masks, levels


def _generator(purpose: str, key: tuple[Any, ...], row: str) -> np.random.Generator:
    return numpy_generator(key[0], purpose, *key[1:], row)
