"""One sampler for every family: from masks to text, one commit rule a step.

At every step the model predicts the masked positions of the current block, each prediction gets a confidence, and the most
confident ones are committed for good; the *schedule* says how many. Between steps the canvas is the only state. What the
families do differently is data (`PRESETS`), not code.

Shapes: B rows, L canvas positions, V vocabulary, n masked positions of all rows in row-major order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..backbones.model import MaskedDiffusionLM, length_batches
from ..errors import RemaskError
from ..random import digest

Schedule = Literal["equal", "ratio", "harmonic", "threshold"]
Confidence = Literal["probability", "margin", "entropy", "random"]

PRESETS: dict[str, dict[str, Any]] = {
    # ML-GSAI/LLaDA generate.py
    "llada": {"gen_length": 128, "block_length": 128},
    # Gen-Verse/MMaDA generate.py
    "mmada": {"gen_length": 128, "block_length": 128, "fp64_confidence": True},
    # DreamLM/Dream README; the other algorithms of diffusion_generate are confidence = probability (maskgit_plus), margin
    # (topk_margin) and random (origin)
    "dream": {
        "gen_length": 512,
        "schedule": "ratio",
        "confidence": "entropy",
        "tempered_confidence": True,
        "temperature": 0.2,
        "top_p": 0.95,
    },
    # HKUNLP/DiffuLLaMA model.py and inf_diffullama.py
    "diffullama": {
        "gen_length": 128,
        "steps": 64,
        "schedule": "harmonic",
        "confidence": "random",
        "tempered_confidence": True,
        "temperature": 0.9,
        "top_p": 0.9,
    },
    # generate() of LLaDA2.0's modelling file
    "llada2": {
        "gen_length": 2048,
        "block_length": 32,
        "aligned": True,
        "schedule": "threshold",
        "threshold": 0.95,
        "tempered_confidence": True,
        "stop_at_eos": True,
    },
    # JetAstra/SDAR generate.py
    "sdar": {
        "gen_length": 128,
        "block_length": 4,
        "aligned": True,
        "schedule": "threshold",
        "threshold": 0.85,
        "tempered_confidence": True,
        "temperature": 1.0,
        "stop_at_eos": True,
    },
}
_LAST_TIME = 1e-3  # where Dream's time grid ends


@dataclass(frozen=True)
class SamplerConfig:
    """How a canvas is denoised.

    A schedule says how many masks of a block commit at its step i of S:

    - `equal`: the same number at every step, the remainder at the first ones (LLaDA).
    - `ratio`: the share 1 - s/t of the masks that are left, s and t neighbours on S + 1 times from 1 to 0.001, rounded down;
      at the last step all (Dream). Each row counts its own masks, the original the mean of its batch.
    - `harmonic`: the share 1/(S - i), rounded down (DiffuLLaMA).
    - `threshold`: all predictions whose confidence exceeds `threshold`, at least as many as `equal` says (LLaDA2, SDAR).

    Under `ratio` and `harmonic`, confidence `random` commits every mask on its own with that share as probability (Dream's
    `origin`, DiffuLLaMA) instead of a number of them; under the other two it only orders them.

    Attributes:
        gen_length: response slots.
        steps: denoising steps over the whole response, shared equally by its blocks; None = one token a step.
        block_length: masks denoised together before the ones to their right; None = all of them.
        aligned: blocks lie on the grid of `block_length` canvas positions, as block-causal models were trained, and the
            canvas is filled up to its end; otherwise they are counted from the first mask.
        schedule: how many masks commit at a step.
        confidence: which ones first: by the probability of the prediction, the margin of the two likeliest tokens, negative
            entropy, or at random.
        threshold: of the schedule `threshold`, in units of the confidence.
        temperature: 0 = greedy; else Gumbel noise in fp64 on exp(logits), which samples softmax(logits / temperature).
        top_p: only the likeliest tokens that hold this probability under the temperature are candidates; 1 = all. Acts before
            `top_k`.
        top_k: only that many tokens are candidates; 0 = all.
        tempered_confidence: confidences are taken under temperature, top_p and top_k, not under the plain softmax.
        fp64_confidence: the softmax of confidences is taken in fp64 instead of the logits' precision.
        order_temperature: 0 = the most confident first; else positions are drawn by softmax(confidence / order_temperature).
        cfg_scale: classifier-free guidance, `u + (cfg_scale + 1) (c - u)` with u the prompt-masked logits.
        suppress_eos: the end token is never predicted.
        suppress_eos_confidence: ids whose logits are removed before confidences are computed (end of text, end of turn).
        stop_at_eos: rows whose finished blocks contain the end token stop; the rest is filled with end tokens.
        fill_after_eos: the masks behind a committed end token become end tokens at once, whatever their block; an answer then
            takes about as many steps as it has tokens, however long the canvas is.
        seed: of all noise, which is keyed by (seed, row, step).
    """

    gen_length: int = 128
    steps: int | None = None
    block_length: int | None = None
    aligned: bool = False
    schedule: Schedule = "equal"
    confidence: Confidence = "probability"
    threshold: float = 0.95
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    tempered_confidence: bool = False
    fp64_confidence: bool = False
    order_temperature: float = 0.0
    cfg_scale: float = 0.0
    suppress_eos: bool = False
    suppress_eos_confidence: tuple[int, ...] = ()
    stop_at_eos: bool = False
    fill_after_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field, known in (("schedule", get_args(Schedule)), ("confidence", get_args(Confidence))):
            if getattr(self, field) not in known:
                raise RemaskError(f"{field} {getattr(self, field)!r} is unknown; choose one of {', '.join(known)}")
        if self.block_length is None and self.aligned:
            raise RemaskError("aligned blocks need a block_length; give the model's attention block")
        if self.block_length is not None and self.block_length < 1:
            raise RemaskError(f"block_length {self.block_length} must be at least 1, or None for one block")
        self.check_length(self.gen_length)
        if self.steps is not None and (self.steps < 1 or self.steps % self.num_blocks):
            raise RemaskError(f"steps {self.steps} must be a positive multiple of the number of blocks {self.num_blocks}")
        for field in ("temperature", "order_temperature", "top_k"):
            if getattr(self, field) < 0:
                raise RemaskError(f"{field} {getattr(self, field)} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise RemaskError(f"top_p {self.top_p} must be above 0 and at most 1")

    @property
    def num_blocks(self) -> int:
        """Blocks of a response of gen_length slots; on the grid of `aligned` blocks it may touch one more."""
        return 1 if self.block_length is None else math.ceil(self.gen_length / self.block_length)

    def check_length(self, gen_length: int) -> None:
        """Refuse a response length that the blocks do not fit.

        Raises:
            RemaskError: below 1, or not a multiple of block_length although blocks start after the prompt.
        """
        if gen_length < 1:
            raise RemaskError(f"gen_length {gen_length} must be at least 1")
        if self.block_length is not None and not self.aligned and gen_length % self.block_length:
            raise RemaskError(
                f"gen_length {gen_length} must be a multiple of block_length {self.block_length}; "
                "change one of them, or set block_length=None for one block"
            )

    def block_steps(self, masks: int) -> int:
        """Most steps spent on one block of a row with `masks` masks."""
        if self.steps is not None:
            return self.steps // self.num_blocks
        return masks if self.block_length is None else self.block_length

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SamplerConfig:
        """The original sampler of a family under its published settings, with changes.

        Raises:
            RemaskError: unknown preset.
        """
        if name not in PRESETS:
            raise RemaskError(f"sampler preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def default(cls, lm: MaskedDiffusionLM, **changes: Any) -> SamplerConfig:
        """The model's preset made deterministic, for evaluation.

        Response and block length are the model's own; greedy, one token of the answer a step, nothing behind the end token;
        a preset that commits at random commits the most confident first. A gen_length that the blocks do not fit is denoised
        as one block.
        """
        base = cls.preset(lm.spec.sampler)
        settings: dict[str, Any] = {
            "gen_length": lm.spec.gen_length,
            "steps": None,
            "temperature": 0.0,
            "stop_at_eos": False,
            "fill_after_eos": True,
        }
        if base.confidence == "random":
            settings["confidence"] = "probability"
        if base.block_length is not None:
            settings["block_length"] = lm.spec.block_length
            if not base.aligned and changes.get("gen_length", lm.spec.gen_length) % lm.spec.block_length:
                settings["block_length"] = None
        return replace(base, **{**settings, **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON form, recorded with every generation."""
        return asdict(self)


@dataclass
class Generation:
    """One row's result.

    Attributes:
        response: ids of the response; of `infill`, the whole canvas.
        history: when asked for, the canvas before the first step and after each step at which the row still had masks in the
            current block, [steps + 1, L].
    """

    response: list[int]
    history: list[list[int]]


@torch.inference_mode()
def generate(
    lm: MaskedDiffusionLM,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    *,
    gen_lengths: Sequence[int] | None = None,
    keys: Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    history: bool = False,
    token_budget: int = 8192,
) -> list[Generation]:
    """Denoise one response a prompt.

    Args:
        lm: the model.
        prompts: token ids; rows of equal length share a batch, so results do not depend on batching.
        config: how.
        gen_lengths: response slots of each row; config.gen_length by default.
        keys: row names that key the noise; row indices by default.
        attention_mask: [len(prompts), P] for prompts padded by the caller to one length P, 1 = real token.
        history: keep the canvas of every step.
        token_budget: tokens a batch.

    Raises:
        RemaskError: prompt plus response exceed the context; the prompt contains the mask token; guidance without a prompt;
            padding with a block-causal model; lengths that do not fit the blocks, the prompts or each other.
    """
    lengths = [config.gen_length] * len(prompts) if gen_lengths is None else list(gen_lengths)
    if len(lengths) != len(prompts):
        raise RemaskError(f"gen_lengths has {len(lengths)} entries for {len(prompts)} prompts; give one a prompt")
    if attention_mask is not None and any(len(prompt) != attention_mask.shape[1] for prompt in prompts):
        raise RemaskError(f"attention_mask is for prompts of {attention_mask.shape[1]} tokens; pad every prompt to that length")
    canvases = []
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        config.check_length(length)
        if lm.spec.mask_id in prompt:
            raise RemaskError(f"prompt {row} contains the mask token of {lm.name}; use infill to fill masks inside a text")
        canvases.append([*prompt, *[lm.spec.mask_id] * length])
        if config.aligned and config.block_length is not None:
            canvases[-1] += [lm.spec.mask_id] * (-len(canvases[-1]) % config.block_length)
    done = infill(lm, canvases, config, keys=keys, attention_mask=attention_mask, history=history, token_budget=token_budget)
    return [
        Generation(row.response[len(prompt) : len(prompt) + length], row.history)
        for row, prompt, length in zip(done, prompts, lengths, strict=True)
    ]


@torch.inference_mode()
def infill(
    lm: MaskedDiffusionLM,
    canvases: Sequence[Sequence[int]],
    config: SamplerConfig,
    *,
    keys: Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    history: bool = False,
    token_budget: int = 8192,
) -> list[Generation]:
    """Fill the masks of given canvases, wherever they are; every other token stays.

    The number of slots is the canvas's own, config.gen_length only says how config.steps are shared. A block is
    `block_length` consecutive masks of the row, from left to right and whatever stands between them (the last one may be
    shorter), or, for `aligned` blocks, the masks of one cell of the grid. `stop_at_eos` writes end tokens into all masks that
    are left, also those inside the text.

    Args:
        lm: the model.
        canvases: token ids; rows of equal length with equally many masks share a batch.
        config: how.
        keys: row names that key the noise; row indices by default.
        attention_mask: [len(canvases), at most L] for canvases padded on the left by the caller, 1 = real token; positions
            beyond it are real.
        history: keep the canvas of every step.
        token_budget: tokens a batch.

    Raises:
        RemaskError: a canvas exceeds the context; guidance without a given token; padding with a block-causal model.
    """
    names = [str(key) for key in (keys if keys is not None else range(len(canvases)))]
    if attention_mask is not None:
        if len(attention_mask) != len(canvases) or any(attention_mask.shape[1] > len(canvas) for canvas in canvases):
            raise RemaskError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit {len(canvases)} rows; give one a row, no longer"
            )
        if lm.spec.attention_block and not attention_mask.all():
            raise RemaskError(
                f"{lm.name} is block-causal and padding would shift its blocks; give rows without padding, of any lengths"
            )
    groups: dict[int, list[int]] = defaultdict(list)
    for row, canvas in enumerate(canvases):
        masks = list(canvas).count(lm.spec.mask_id)
        if len(canvas) > lm.spec.max_length:
            raise RemaskError(
                f"row {names[row]!r}: {len(canvas)} tokens exceed the context of {lm.name} ({lm.spec.max_length}); "
                "shorten the prompt or the response"
            )
        if config.cfg_scale and masks == len(canvas):
            raise RemaskError(f"row {names[row]!r} has no prompt to guide by; give one, or set cfg_scale=0")
        groups[masks].append(row)
    results: dict[int, Generation] = {}
    for rows in groups.values():
        for batch in length_batches([len(canvases[row]) for row in rows], token_budget):
            chosen = [rows[i] for i in batch]
            state = torch.tensor([list(canvases[row]) for row in chosen], dtype=torch.long, device=lm.device)
            real = None
            if attention_mask is not None:
                real = torch.ones_like(state, dtype=torch.bool)
                real[:, : attention_mask.shape[1]] = attention_mask[chosen].bool().to(lm.device)
            done = _denoise(lm, state, [names[row] for row in chosen], config, real, history)
            results |= dict(zip(chosen, done, strict=True))
    return [results[row] for row in range(len(canvases))]


def _denoise(
    lm: MaskedDiffusionLM,
    canvas: Tensor,
    keys: list[str],
    config: SamplerConfig,
    attention_mask: Tensor | None,
    history: bool,
) -> list[Generation]:
    """The loop, over rows [B, L] with equally many masks each; `canvas` is filled in place."""
    slots = canvas == lm.spec.mask_id
    place = torch.arange(canvas.shape[1], device=lm.device)
    blocks = [_blocks(row, config) for row in slots.tolist()]
    steps = config.block_steps(int(slots[0].sum()))
    traces = [[state] for state in canvas.tolist()]
    try:
        for block in range(max(map(len, blocks))):
            bounds = torch.tensor([row[block] if block < len(row) else (0, 0) for row in blocks], device=lm.device)
            inside = (place >= bounds[:, :1]) & (place < bounds[:, 1:])
            planned = transfer_counts(inside if config.aligned else inside & (canvas == lm.spec.mask_id), steps).cpu()
            for i in range(steps):
                lm.clock.step = block * steps + i
                left = (inside & (canvas == lm.spec.mask_id)).sum(dim=1).cpu()
                if not left.any():
                    break
                counts = _counts(config, planned[:, i], left, i, steps, keys, lm.clock.step)
                rows = counts.nonzero().squeeze(1)
                if len(rows):
                    ends = bounds[rows, 1:]
                    width = canvas.shape[1]
                    if cell := lm.spec.attention_block:  # a block-causal model sees nothing behind its current block
                        width = min(width, math.ceil(int(ends.max()) / cell) * cell)
                    mask = None if attention_mask is None else attention_mask[rows, :width]
                    names = [keys[row] for row in rows.tolist()]
                    state = commit(lm, canvas[rows, :width], ~slots[rows, :width], ends, counts[rows], names, config, mask)
                    canvas[rows, :width] = state
                if config.fill_after_eos:
                    ended = ((canvas == lm.spec.eos_id) & slots).cumsum(dim=1) > 0
                    canvas[ended & (canvas == lm.spec.mask_id)] = lm.spec.eos_id
                if history:
                    for row in left.nonzero().squeeze(1).tolist():
                        traces[row].append(canvas[row].tolist())
            if config.stop_at_eos:
                ended = ((canvas == lm.spec.eos_id) & slots & (place < bounds[:, 1:])).any(dim=1, keepdim=True)
                canvas[ended & slots & (place >= bounds[:, 1:])] = lm.spec.eos_id
    finally:
        lm.clock.step = None
    return [Generation(row, trace if history else []) for row, trace in zip(canvas.tolist(), traces, strict=True)]


def _blocks(slots: list[bool], config: SamplerConfig) -> list[tuple[int, int]]:
    """Canvas spans (half-open) of one row's blocks, in the order in which they are denoised."""
    masks = [position for position, is_slot in enumerate(slots) if is_slot]
    size = config.block_length or max(1, len(masks))
    if config.aligned:
        return [(cell * size, (cell + 1) * size) for cell in sorted({position // size for position in masks})]
    ends = [masks[min(start + size, len(masks)) - 1] + 1 for start in range(0, len(masks), size)]
    return list(zip([0, *ends], ends, strict=False))


def transfer_counts(masks: Tensor, steps: int) -> Tensor:
    """Tokens to commit at each step, [B, steps]: equal split of each row's masks, remainder to the first steps."""
    count = masks.sum(dim=1, keepdim=True)
    return count // steps + (torch.arange(steps, device=masks.device)[None, :] < count % steps)


def _counts(config: SamplerConfig, planned: Tensor, left: Tensor, i: int, steps: int, keys: Sequence[str], step: int) -> Tensor:
    """Masks to commit at step i of a block's `steps`, [B] on the CPU, from the equal split and the masks left, both [B]."""
    if config.schedule in ("equal", "threshold"):
        return torch.minimum(planned, left)
    if i == steps - 1:
        return left
    times = torch.linspace(1, _LAST_TIME, steps + 1)
    share = 1 - times[i + 1] / times[i] if config.schedule == "ratio" else torch.tensor(1 / (steps - i))
    if config.confidence == "random":  # the same draws order the positions in `commit`
        draws = _row_uniforms(left, config.seed, "remask", keys, step)
        return torch.stack([(row >= 1 - share).sum() for row in draws])
    return (left * share).long() if config.schedule == "ratio" else left // (steps - i)


def commit(
    lm: MaskedDiffusionLM,
    canvas: Tensor,
    given: Tensor,
    end: int | Tensor,
    counts: Tensor,
    keys: Sequence[str],
    config: SamplerConfig,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """One denoising step: the canvas [B, L] with `counts[row]` more masks before `end` committed.

    Args:
        lm: the model; its clock's step keys the noise.
        canvas: [B, L] token ids.
        given: [B, L] bool, what the unconditional branch of guidance hides.
        end: one position, or one a row, [B, 1].
        counts: [B], at most the row's masks before `end`; under the schedule `threshold` the least number.
        keys: row names that key the noise.
        config: how.
        attention_mask: [B, L], 1 = real token; None = no padding.
    """
    masked = (canvas == lm.spec.mask_id) & (torch.arange(canvas.shape[1], device=canvas.device) < end)
    logits = _guided_logits(lm, canvas, given, masked, config, attention_mask)
    return choose(lm, canvas, masked, logits, counts, keys, config)


def choose(
    lm: MaskedDiffusionLM,
    canvas: Tensor,
    masked: Tensor,
    logits: Tensor,
    counts: Tensor,
    keys: Sequence[str],
    config: SamplerConfig,
) -> Tensor:
    """The commit rule on known logits: the canvas [B, L] with `counts[row]` of its `masked` positions filled.

    Args:
        lm: the model; its clock's step keys the noise.
        canvas: [B, L] token ids.
        masked: [B, L] bool, the positions that may be filled.
        logits: [n, V] at them, in row-major order; may be changed.
        counts: [B], at most the row's masked positions; under the schedule `threshold` the least number.
        keys: row names that key the noise.
        config: how.
    """
    sizes = masked.sum(dim=1)
    if config.suppress_eos:
        logits[:, lm.spec.eos_id] = -torch.inf
    candidates = _candidates(logits, config)
    chosen = _gumbel(candidates, sizes, lm.clock.step, keys, config).argmax(dim=-1)
    if config.tempered_confidence:
        logits = candidates / config.temperature if config.temperature else candidates
    for token in config.suppress_eos_confidence:
        logits[:, token] = -torch.inf
    if config.confidence == "random":
        value = torch.cat(_row_uniforms(sizes, config.seed, "remask", keys, lm.clock.step)).to(logits.device)
    else:
        value = _confidence(logits, chosen, config)
    if config.schedule == "threshold":
        sure = torch.zeros_like(masked)
        sure[masked] = value > config.threshold
        counts = torch.maximum(counts, sure.sum(dim=1).to(counts.device))
    if config.order_temperature:
        draws = torch.cat(_row_uniforms(sizes, config.seed, "order", keys, lm.clock.step)).to(logits.device)
        value = value.double() / config.order_temperature - (-draws.log()).log()  # top-k of it = drawn without replacement
    order = torch.full(canvas.shape, -torch.inf, dtype=value.dtype, device=canvas.device)
    order[masked] = value
    proposal = canvas.clone()
    proposal[masked] = chosen
    result = canvas.clone()
    for row in range(len(canvas)):
        take = order[row].topk(int(counts[row])).indices
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


def _candidates(logits: Tensor, config: SamplerConfig) -> Tensor:
    """Logits [n, V] with the tokens outside top_p and top_k at the lowest finite value, as Dream has them."""
    lowest = torch.finfo(logits.dtype).min
    if config.top_p < 1:
        scaled = logits / config.temperature if config.temperature else logits
        ordered, tokens = scaled.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)  # probability of the likelier tokens
        before[:, 0] = 0
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, before > config.top_p), lowest
        )
    if config.top_k:
        least = logits.topk(min(config.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, lowest)
    return logits


def _confidence(logits: Tensor, chosen: Tensor, config: SamplerConfig) -> Tensor:
    """Confidence [n] in the predictions `chosen` [n] from logits [n, V]; higher commits first."""
    probabilities = (logits.double() if config.fp64_confidence else logits).softmax(dim=-1)
    if config.confidence == "margin":
        first, second = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
        return first - second
    if config.confidence == "entropy":
        return (probabilities * (probabilities + 1e-10).log()).sum(dim=-1)
    return probabilities.gather(1, chosen[:, None]).squeeze(1)


def _gumbel(logits: Tensor, sizes: Tensor, step: int | None, keys: Sequence[str], config: SamplerConfig) -> Tensor:
    """Scores [n, V] whose argmax is a sample: Gumbel-max in fp64, `exp(logits) / (-log u)^temperature` (LLaDA's form)."""
    if config.temperature == 0:
        return logits
    vocabulary = logits.shape[-1]
    noise = torch.cat(_row_uniforms(sizes, config.seed, "gumbel", keys, step, vocabulary)).to(logits.device)
    return logits.double().exp() / (-noise.log()) ** config.temperature


def _row_uniforms(
    sizes: Tensor, seed: int, purpose: str, keys: Sequence[str], step: int | None, *trailing: int
) -> list[Tensor]:
    """For every row `sizes[row]` draws (of shape `trailing`), a function of (seed, purpose, key, step) alone."""
    return [_uniform((n, *trailing), seed, purpose, key, step) for n, key in zip(sizes.tolist(), keys, strict=True)]


def _uniform(shape: tuple[int, ...], seed: int, purpose: str, key: str, step: int | None) -> Tensor:
    generator = torch.Generator().manual_seed(int(digest(seed, purpose, key, step), 16) % 2**63)
    return torch.rand(shape, generator=generator, dtype=torch.float64)
