"""Temporal Indirect Effect (TIE) tracing, slow and obviously right: the reference that a fast tracer has to equal.

A fact is carried by a site if restoring that site's clean output, in a run whose subject was corrupted, brings the object back.
In a diffusion model there is a second axis, the denoising step s at which the site is restored; its effect is read at s and at
every later step s', because between steps only the canvas carries anything over (TimeROME-DLM, equations 2-5):

    TIE(l, m, s)(s') = log p_patched(o | x_s') - log p_corrupted(o | x_s'),   log p(o | x) = sum over the object tokens

Corruption adds Gaussian noise, 3 standard deviations of the subject's embeddings, to the subject positions at every step;
the noise is fixed per (fact, draw). Every site is patched by a plain forward hook in a full trajectory of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save
from torch import Tensor, nn

from ..backbones.model import MODULES, Encoded, MaskedDiffusionLM, Module, Site, canonical_json
from ..diffusion.likelihood import target_logprobs
from ..diffusion.sampler import SamplerConfig, commit, transfer_counts
from ..errors import RemaskError
from ..facts import write_atomically
from ..random import normal


@dataclass(frozen=True)
class TraceConfig:
    """Protocol of a trace.

    Attributes:
        steps: denoising steps; capped at each fact's number of object tokens (one token a step at most).
        draws: noise samples a fact; effects are their mean.
        noise: standard deviations of the subject-token embeddings.
        modules: which modules of each block are patched.
        seed: of the noise.
    """

    steps: int = 4
    draws: int = 3
    noise: float = 3.0
    modules: tuple[Module, ...] = MODULES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.draws < 1 or self.noise < 0:
            raise RemaskError("a trace needs steps >= 1, draws >= 1 and noise >= 0")
        unknown = set(self.modules) - set(MODULES)
        if unknown or not self.modules:
            raise RemaskError(f"unknown module {sorted(unknown)!r}; choose from {', '.join(MODULES)}")


@dataclass(frozen=True)
class Trace:
    """Raw effects of many facts.

    Attributes:
        effects: [fact, layer, module, step, later step] in nats; NaN where a fact has fewer steps or the later step is earlier.
        clean, corrupted: object log-probability of the unpatched runs, [fact, step].
        fact_ids: rows of the tensors.
        config: the protocol; model: fingerprint.
    """

    effects: Tensor
    clean: Tensor
    corrupted: Tensor
    fact_ids: tuple[str, ...]
    config: TraceConfig
    model: str

    def save(self, path: str | Path) -> None:
        """Write safetensors with JSON metadata, atomically."""
        header = {"format": 1, "kind": "trace", "mode": "reference", "fact_ids": list(self.fact_ids), "model": self.model}
        header |= {"config": asdict(self.config), "axes": ["fact", "layer", "module", "step", "later step"], "unit": "nats"}
        tensors = {"effects": self.effects, "clean": self.clean, "corrupted": self.corrupted}
        write_atomically(path, save(tensors, {"remask": canonical_json(header)}))


@torch.inference_mode()
def trace(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], config: TraceConfig | None = None, *, progress: bool = False
) -> Trace:
    """Trace every fact over layers x modules x steps.

    Raises:
        RemaskError: no facts.
    """
    config = config or TraceConfig()
    if not rows:
        raise RemaskError("nothing to trace: no facts")
    steps = max(_steps(row, config) for row in rows)
    effects = torch.full((len(rows), lm.num_layers, len(config.modules), steps, steps), torch.nan)
    clean, corrupted = torch.full((len(rows), steps), torch.nan), torch.full((len(rows), steps), torch.nan)
    for index, row in enumerate(track(rows, "tracing", disable=not progress)):
        run = _FactRun(lm, row, config)
        total = run.steps
        clean[index, :total], corrupted[index, :total] = run.clean.mean(0), run.corrupted.mean(0)
        for layer in range(lm.num_layers):
            for m, module in enumerate(config.modules):
                for step in range(total):
                    later = run.effect(Site(layer, module), step).mean(0)
                    effects[index, layer, m, step, step:total] = later[step:]
    return Trace(effects, clean, corrupted, tuple(row.id for row in rows), config, lm.fingerprint())


def _steps(row: Encoded, config: TraceConfig) -> int:
    return min(config.steps, len(row.answer_ids))


class _FactRun:
    """Clean and corrupted trajectories of one fact, and patched ones on demand; batch rows are the noise draws."""

    def __init__(self, lm: MaskedDiffusionLM, row: Encoded, config: TraceConfig) -> None:
        self.lm, self.row, self.config = lm, row, config
        self.steps = _steps(row, config)
        self.start = len(row.prompt_ids)
        self.targets = torch.tensor(row.answer_ids, device=lm.device)
        self.subject = slice(*row.subject)
        self.sampler = SamplerConfig(gen_length=len(row.answer_ids))
        self.noise = self._subject_noise()
        self.clean_outputs: list[dict[Site, Tensor]] = []
        self.clean = self._trajectory(corrupt=False, record=True)
        self.corrupted = self._trajectory(corrupt=True)

    def effect(self, site: Site, step: int) -> Tensor:
        """Log p_patched - log p_corrupted at every step, [draws, steps], when `site` is restored at `step`."""
        return self._trajectory(corrupt=True, patch=(site, step)) - self.corrupted

    def _subject_noise(self) -> Tensor:
        """[draws, |S|, d]: noise * std of the subject's embedding entries, keyed by (seed, fact, draw)."""
        table = self.lm.embedding.weight
        ids = torch.tensor(self.row.prompt_ids[self.subject], device=self.lm.device)
        scale = self.config.noise * table[ids].float().std()
        shape = (len(ids), self.lm.hidden_size)
        draws = [normal(shape, self.config.seed, "subject", self.row.id, n) for n in range(self.config.draws)]
        return (torch.stack(draws).to(self.lm.device) * scale).to(table.dtype)

    def _trajectory(self, *, corrupt: bool, patch: tuple[Site, int] | None = None, record: bool = False) -> Tensor:
        """Denoise all draws greedily; object log-probability at every step, [draws, steps]."""
        lm = self.lm
        canvas = torch.tensor(self.row.prompt_ids + (lm.spec.mask_id,) * len(self.row.answer_ids), device=lm.device)
        canvas = canvas.repeat(self.config.draws, 1)
        given = canvas != lm.spec.mask_id
        counts = transfer_counts(canvas[:, self.start :] == lm.spec.mask_id, self.steps)
        answer = torch.zeros_like(given)
        answer[:, self.start :] = True
        values = []
        for step in range(self.steps):
            with contextlib.ExitStack() as stack:
                if corrupt:
                    stack.enter_context(_hooked(lm.embedding, self._add_noise))
                if patch is not None and patch[1] == step:
                    stack.enter_context(_hooked(lm.site_module(patch[0]), self._restore(patch[0], step)))
                if record:
                    outputs: dict[Site, Tensor] = {}
                    for site in (Site(layer, m) for layer in range(lm.num_layers) for m in self.config.modules):
                        stack.enter_context(_hooked(lm.site_module(site), self._remember(site, outputs)))
                    self.clean_outputs.append(outputs)
                logits = lm.logits(canvas, positions=answer)
                targets = self.targets.repeat(self.config.draws)
                values.append(target_logprobs(logits, targets).view(self.config.draws, -1).sum(dim=1).cpu())
                canvas = commit(lm, canvas, given, canvas.shape[1], counts[:, step], [""] * len(canvas), self.sampler)
        return torch.stack(values, dim=1)

    def _add_noise(self, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, self.subject] += self.noise
        return output

    def _restore(self, site: Site, step: int) -> Callable[[Tensor], Tensor]:
        def put(output: Tensor) -> Tensor:
            output = output.clone()
            output[:, self.subject] = self.clean_outputs[step][site]
            return output

        return put

    def _remember(self, site: Site, outputs: dict[Site, Tensor]) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            outputs[site] = output[:, self.subject].clone()
            return output

        return keep


@contextlib.contextmanager
def _hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's tensor output by `change(output)` inside the block."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def aggregate(effects: Tensor, gamma: float = 0.9, *, normalise: bool = True) -> Tensor:
    """Equation (4): TIE(l, m, s) = sum over s' >= s of gamma^(s' - s) TIE(s'), over its weights' sum when `normalise`.

    Args:
        effects: [..., step, later step]; NaN entries carry no weight.

    Returns:
        [..., step].
    """
    steps = effects.shape[-1]
    lag = torch.arange(steps)[None, :] - torch.arange(steps)[:, None]
    weight = torch.where(lag >= 0, torch.tensor(gamma) ** lag.clamp_min(0), torch.tensor(0.0)).to(effects)
    weight = weight * ~effects.isnan()
    total = (weight * effects.nan_to_num()).sum(-1)
    if normalise:
        return torch.where(weight.sum(-1) > 0, total / weight.sum(-1).clamp_min(1e-12), torch.nan)
    return torch.where(weight.sum(-1) > 0, total, torch.nan)


def mean_absolute(trace_result: Trace, gamma: float = 0.9) -> np.ndarray:
    """Equation (5) without neighbours: mean over facts of |TIE|, [layer, module, step], nats."""
    per_fact = aggregate(trace_result.effects, gamma).abs()
    return np.asarray(per_fact.nanmean(dim=0).numpy())
