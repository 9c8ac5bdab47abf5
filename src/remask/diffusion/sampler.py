"""The low-confidence sampler (LLaDA's generate): from a canvas of masks to text, one commit rule a step.

At every step the model predicts all masked positions, each prediction gets a confidence, and the most confident ones of the
current block are committed for good. Between steps the canvas is the *only* state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones.model import MaskedDiffusionLM, length_batches
from ..errors import RemaskError
from ..random import digest


@dataclass(frozen=True)
class SamplerConfig:
    """How a canvas is denoised.

    Attributes:
        gen_length: response slots.
        steps: denoising steps over the whole response; None = gen_length (one token a step).
        block_length: semi-autoregressive block; gen_length = pure diffusion.
        temperature: 0 = greedy; else Gumbel noise in fp64 on exp(logits), keyed by (seed, row, step).
        cfg_scale: classifier-free guidance, `u + (cfg_scale + 1) (c - u)` with u the prompt-masked logits.
        remasking: confidence is the probability of the prediction (`low_confidence`) or random.
        suppress_eos: the end token is never predicted.
        suppress_eos_confidence: ids whose logits are removed before confidences are computed (end of text, end of turn).
        stop_at_eos: rows whose finished blocks contain the end token stop; the rest is filled with end tokens.
        seed: of the noise.
    """

    gen_length: int = 128
    steps: int = None  # type: ignore[assignment]  # None is replaced on construction
    block_length: int = None  # type: ignore[assignment]
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    suppress_eos: bool = False
    suppress_eos_confidence: tuple[int, ...] = ()
    stop_at_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", self.gen_length if self.steps is None else self.steps)
        object.__setattr__(self, "block_length", self.gen_length if self.block_length is None else self.block_length)
        if self.gen_length < 1 or self.block_length < 1 or self.gen_length % self.block_length:
            raise RemaskError(f"gen_length {self.gen_length} must be a positive multiple of block_length {self.block_length}")
        if self.steps % self.num_blocks or self.steps < self.num_blocks:
            raise RemaskError(f"steps {self.steps} must be a positive multiple of the number of blocks {self.num_blocks}")
        if self.temperature < 0 or self.remasking not in ("low_confidence", "random"):
            raise RemaskError("temperature must be >= 0 and remasking 'low_confidence' or 'random'")

    @property
    def num_blocks(self) -> int:
        """Blocks of the response."""
        return self.gen_length // self.block_length

    @classmethod
    def default(cls, lm: MaskedDiffusionLM, **changes: Any) -> SamplerConfig:
        """The model's own response and block length, greedy, one token a step, stopping at the end token."""
        base = cls(gen_length=lm.spec.gen_length, block_length=lm.spec.block_length, stop_at_eos=True)
        if changes.get("gen_length", base.gen_length) % base.block_length:
            changes.setdefault("block_length", changes["gen_length"])
        return replace(base, **{"steps": None, **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON form, recorded with every generation."""
        return asdict(self)


@dataclass
class Generation:
    """One row's result: response ids, and with `history` the canvas before each step and after the last, [steps run + 1, L].

    With `stop_at_eos` the history ends where the last row of the batch stopped.
    """

    response: list[int]
    history: list[list[int]]


def transfer_counts(masks: Tensor, steps: int) -> Tensor:
    """Tokens to commit at each step, [B, steps]: equal split of each row's masks, remainder to the first steps."""
    count = masks.sum(dim=1, keepdim=True)
    return count // steps + (torch.arange(steps, device=masks.device)[None, :] < count % steps)


@torch.inference_mode()
def generate(
    lm: MaskedDiffusionLM,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    *,
    keys: Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    history: bool = False,
    token_budget: int = 8192,
) -> list[Generation]:
    """Denoise one response a prompt.

    Args:
        prompts: token ids; rows of equal length share a batch, so results do not depend on batching.
        keys: row names that key the noise; row indices by default.
        attention_mask: [len(prompts), P] for prompts padded by the caller to one length, 1 = real token.
        history: keep the canvas of every step.

    Raises:
        RemaskError: prompt plus response exceed the context.
    """
    names = [str(key) for key in (keys if keys is not None else range(len(prompts)))]
    results: list[Generation | None] = [None] * len(prompts)
    for batch in length_batches([len(prompt) + config.gen_length for prompt in prompts], token_budget):
        canvas = torch.tensor([list(prompts[i]) for i in batch], device=lm.device)
        mask = None if attention_mask is None else attention_mask[torch.from_numpy(batch)].to(lm.device)
        done = _denoise(lm, canvas, [names[i] for i in batch], config, mask, history)
        for i, generation in zip(batch, done, strict=True):
            results[i] = generation
    return [result for result in results if result is not None]


def _denoise(
    lm: MaskedDiffusionLM,
    prompt: Tensor,
    keys: list[str],
    config: SamplerConfig,
    attention_mask: Tensor | None,
    history: bool,
) -> list[Generation]:
    rows, start = prompt.shape
    slots = torch.full((rows, config.gen_length), lm.spec.mask_id, device=lm.device)
    canvas = torch.cat([prompt, slots], dim=1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.bool(), torch.ones_like(slots, dtype=torch.bool)], dim=1)
    given = canvas != lm.spec.mask_id  # what the unconditional branch hides
    trace = [canvas.clone()]
    live = torch.arange(rows, device=lm.device)
    per_block = config.steps // config.num_blocks
    try:
        for block in range(config.num_blocks):
            low, high = start + block * config.block_length, start + (block + 1) * config.block_length
            counts = transfer_counts(canvas[live, low:high] == lm.spec.mask_id, per_block)
            for i in range(per_block):
                lm.clock.step = block * per_block + i
                mask = None if attention_mask is None else attention_mask[live]
                names = [keys[row] for row in live.tolist()]
                canvas[live] = commit(lm, canvas[live], given[live], high, counts[:, i], names, config, mask)
                if history:
                    trace.append(canvas.clone())
            if config.stop_at_eos:
                ended = (canvas[live, start:high] == lm.spec.eos_id).any(dim=1)
                canvas[live[ended], high:] = lm.spec.eos_id
                live = live[~ended]
                if not len(live):
                    break
    finally:
        lm.clock.step = None
    return [
        Generation(canvas[row, start:].tolist(), [state[row].tolist() for state in trace] if history else [])
        for row in range(rows)
    ]


def commit(
    lm: MaskedDiffusionLM,
    canvas: Tensor,
    given: Tensor,
    end: int,
    counts: Tensor,
    keys: Sequence[str],
    config: SamplerConfig,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """One denoising step: the canvas [B, L] with `counts[row]` more positions below `end` committed."""
    masked = canvas == lm.spec.mask_id
    masked[:, end:] = False
    logits = _guided_logits(lm, canvas, given, masked, config, attention_mask)
    if config.suppress_eos:
        logits[:, lm.spec.eos_id] = -torch.inf
    noisy = logits if config.temperature == 0 else _gumbel(logits, masked, lm.clock.step, keys, config)
    chosen = noisy.argmax(dim=-1)
    for token in config.suppress_eos_confidence:
        logits[:, token] = -torch.inf
    if config.remasking == "low_confidence":
        value = logits.softmax(dim=-1).gather(1, chosen[:, None]).squeeze(1)
    else:
        value = torch.cat(
            [_uniform((int(n),), config.seed, "remask", key, lm.clock.step) for n, key in zip(masked.sum(1), keys, strict=True)]
        ).to(logits)
    confidence = torch.full(canvas.shape, -torch.inf, dtype=value.dtype, device=canvas.device)
    confidence[masked] = value
    proposal = canvas.clone()
    proposal[masked] = chosen
    result = canvas.clone()
    for row in range(len(canvas)):
        take = confidence[row].topk(int(counts[row])).indices
        result[row, take] = proposal[row, take]
    return result


def _guided_logits(
    lm: MaskedDiffusionLM,
    canvas: Tensor,
    given: Tensor,
    positions: Tensor,
    config: SamplerConfig,
    attention_mask: Tensor | None,
) -> Tensor:
    """Logits [n, V] at `positions`, with classifier-free guidance when asked for."""
    if config.cfg_scale == 0:
        return lm.logits(canvas, attention_mask, positions)
    blind = torch.where(given, lm.spec.mask_id, canvas)
    both = None if attention_mask is None else torch.cat([attention_mask, attention_mask])
    conditional, unconditional = lm.logits(torch.cat([canvas, blind]), both, torch.cat([positions, positions])).chunk(2)
    return unconditional + (config.cfg_scale + 1) * (conditional - unconditional)


def _gumbel(logits: Tensor, masked: Tensor, step: int | None, keys: Sequence[str], config: SamplerConfig) -> Tensor:
    """Gumbel-max in fp64, `exp(logits) / (-log u)^temperature` (LLaDA's form)."""
    noise = torch.cat(
        [
            _uniform((int(n), logits.shape[-1]), config.seed, "gumbel", key, step)
            for n, key in zip(masked.sum(1), keys, strict=True)
        ]
    ).to(logits.device)
    return logits.double().exp() / (-noise.log()) ** config.temperature


def _uniform(shape: tuple[int, ...], seed: int, purpose: str, key: str, step: int | None) -> Tensor:
    generator = torch.Generator().manual_seed(int(digest(seed, purpose, key, step), 16) % 2**63)
    return torch.rand(shape, generator=generator, dtype=torch.float64)
