"""KL from the anchor along one denoising trajectory (MDU's figure 3; D1).

At step s the canvas y_s has some response positions committed. For every position i that is still masked

    K[s, i] = KL( softmax z_c[i] || softmax(tau z_u[i]) ),   z_c = policy(prompt, y_s),   z_u = anchor(masked prompt, y_s)

and NaN after its commit. Large early values mean that the prompt, not the revealed part of the answer, carries the information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.sampler import SamplerConfig, choose, generate, transfer_counts
from ...errors import RemaskError
from .anchors import Anchor, check, compare

Mode = Literal["generated", "teacher-forced"]
MODES: tuple[Mode, ...] = get_args(Mode)
SERIES = ("kl", "policy", "anchor", "entropy")


@dataclass(frozen=True)
class Trajectory:
    """One trajectory of S steps over L response positions; arrays are fp64 [S, L], NaN where the position is committed.

    Attributes:
        id: row id; mode, tau: as asked for.
        kl: K[s, i] in nats; policy, anchor: probability of the gold token under p_c and under the plain anchor p_u, NaN behind
            the gold answer; entropy: of p_c, nats.
        commit: the step that commits each position, int [L]; K at `commit` is the last value of its column.
        ids, tokens: what was committed, and as text; the id in brackets without a tokenizer.
        gold: the gold token ids, None behind the answer.
    """

    id: str
    mode: Mode
    tau: float
    kl: np.ndarray
    policy: np.ndarray
    anchor: np.ndarray
    entropy: np.ndarray
    commit: np.ndarray
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    gold: tuple[int | None, ...]

    @property
    def at_commit(self) -> np.ndarray:
        """KL of each position at the step that commits it, nats [L]."""
        return self.kl[self.commit, np.arange(len(self.commit))]

    @property
    def masked_mean(self) -> np.ndarray:
        """Mean KL over the positions that are still masked at each step, nats [S]."""
        return np.nanmean(self.kl, axis=1)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; NaN becomes None."""
        arrays = {name: _plain(getattr(self, name)) for name in SERIES}
        summaries = {"at_commit": _plain(self.at_commit), "masked_mean": _plain(self.masked_mean)}
        return {**asdict(self), **arrays, "commit": self.commit.tolist(), **summaries}


def _plain(array: np.ndarray) -> Any:
    return np.where(np.isnan(array), np.array(None), array).tolist()


@torch.inference_mode()
def trajectory(
    lm: MaskedDiffusionLM,
    row: Encoded,
    *,
    anchor: Anchor = None,
    tau: float = 1.0,
    mode: Mode = "generated",
    config: SamplerConfig | None = None,
) -> Trajectory:
    """Denoise one row and compare policy and anchor at every state on the way; two forwards a state, and those of the sampler.

    - `generated`: the canvases of `generate` under `config`, whose own choices are committed. Readings are without guidance.
    - `teacher-forced`: the canvas has as many slots as the answer has tokens, and at every step the positions that `config`
      is most confident in get their gold token. They are one block, shared equally by the steps, at most one step a token; more
      commit at once under the schedule `threshold`.

    Args:
        lm: the policy, with whatever is attached to it. Interventions that are limited to steps act at theirs.
        row: prompt and gold answer.
        anchor: see `Anchor`; give the unedited model where something is attached.
        tau: inverse temperature of the anchor.
        mode: what is committed.
        config: how; by default the model's deterministic sampler with as many slots as the answer has tokens.

    Raises:
        RemaskError: an unknown mode, or what `generate` refuses; a row, an anchor or a tau that cannot be measured.
    """
    check(lm, anchor, [row], tau)
    if mode not in MODES:
        raise RemaskError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    config = config or SamplerConfig.default(lm, gen_length=len(row.answer_ids))
    run = _generated if mode == "generated" else _forced
    states, steps = run(lm, row, config)
    slots = slice(len(row.prompt_ids), len(row.prompt_ids) + (config.gen_length if run is _generated else len(row.answer_ids)))
    masked = states[:-1, slots] == lm.spec.mask_id
    used = int(masked.any(dim=1).sum())  # less than all where the canvas of aligned blocks ends behind the response
    found = _along(lm, row, anchor, tau, states[:used], slots, steps)
    ids = tuple(states[used, slots].tolist())
    gold: list[int | None] = [*row.answer_ids, *[None] * len(ids)][: len(ids)]
    commit = masked.sum(dim=0).cpu().numpy() - 1
    return Trajectory(row.id, mode, tau, **found, commit=commit, ids=ids, tokens=_texts(lm, ids), gold=tuple(gold))


def _along(
    lm: MaskedDiffusionLM, row: Encoded, anchor: Anchor, tau: float, states: Tensor, slots: slice, steps: Sequence[int]
) -> dict[str, np.ndarray]:
    """The four series, fp64 [S, L] each, of the states [S, canvas]."""
    place = torch.arange(states.shape[1], device=lm.device)
    response, prompt = (place >= slots.start) & (place < slots.stop), (place < slots.start)[None]
    gold = torch.full_like(place, lm.spec.eos_id)
    known = torch.tensor(row.answer_ids, device=lm.device)[: slots.stop - slots.start]
    gold[slots.start : slots.start + len(known)] = known
    found = np.full((len(SERIES), len(states), slots.stop - slots.start), np.nan)
    try:
        for s, state in enumerate(states):
            lm.clock.step = steps[s]
            masked = response & (state == lm.spec.mask_id)
            readings = compare(lm, anchor, state[None], masked[None], prompt, gold[masked], tau).double()
            readings[:, 1:3] = readings[:, 1:3].exp()
            found[:, s, masked[slots].cpu().numpy()] = readings.T.cpu().numpy()
    finally:
        lm.clock.step = None
    found[1:3, :, len(known) :] = np.nan
    return dict(zip(SERIES, found, strict=True))


def _generated(lm: MaskedDiffusionLM, row: Encoded, config: SamplerConfig) -> tuple[Tensor, list[int]]:
    """The canvas before every step and at the end [S + 1, canvas], and the clock's step of each."""
    states = torch.tensor(generate(lm, [row.prompt_ids], config, keys=[row.id], history=True)[0].history, device=lm.device)
    start = len(row.prompt_ids)
    size = config.block_length or states.shape[1] - start
    first = start // size * size if config.aligned else start
    per_block = config.block_steps(states.shape[1] - start)
    steps: list[int] = []
    for state in states[:-1]:  # blocks are denoised from left to right: the running one holds the first mask
        block = (int((state == lm.spec.mask_id).nonzero().min()) - first) // size
        steps.append(steps[-1] + 1 if steps and steps[-1] // per_block == block else block * per_block)
    return states, steps


def _forced(lm: MaskedDiffusionLM, row: Encoded, config: SamplerConfig) -> tuple[Tensor, list[int]]:
    """As `_generated`, for gold tokens in the order of confidence."""
    start, length = len(row.prompt_ids), len(row.answer_ids)
    gold = torch.tensor([row.ids], device=lm.device)
    slots = torch.arange(gold.shape[1], device=lm.device)[None] >= start
    canvas = gold.masked_fill(slots, lm.spec.mask_id)
    masked, states = slots, [canvas]
    try:
        for step, count in enumerate(transfer_counts(slots, min(config.steps or length, length))[0].tolist()):
            lm.clock.step = step
            logits = lm.logits(canvas, positions=masked)
            logits[:, lm.spec.mask_id] = -torch.inf  # a proposed mask would not show which position was chosen
            counts = torch.tensor([min(count, int(masked.sum()))])
            chosen = masked & (choose(lm, canvas, masked, logits, counts, [row.id], config) != lm.spec.mask_id)
            canvas, masked = torch.where(chosen, gold, canvas), masked & ~chosen
            states.append(canvas)
            if not masked.any():
                break
    finally:
        lm.clock.step = None
    return torch.cat(states), list(range(len(states) - 1))


def _texts(lm: MaskedDiffusionLM, ids: Sequence[int]) -> tuple[str, ...]:
    if lm.tokenizer is None:
        return tuple(f"[{token}]" for token in ids)
    return tuple(str(lm.tokenizer.decode([token])) for token in ids)
