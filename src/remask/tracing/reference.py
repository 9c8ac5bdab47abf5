"""Temporal Indirect Effects, slow and obviously right: what the fast tracer has to equal.

Every site is restored by a plain forward hook in a full trajectory of its own:

    TIE(l, m, s)(s') = log p_patched(o | x_s') - log p_corrupted(o | x_s'),   log p(o | x) = sum over the object tokens

for every later step s' >= s, because between steps only the canvas carries anything over (TimeROME-DLM, equations 2-3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.model import Encoded, MaskedDiffusionLM, Site
from ..diffusion.likelihood import target_logprobs
from .effects import Effects
from .protocol import Corruptor, TraceConfig, advance, blank, commits_at


@torch.inference_mode()
def reference_effects(lm: MaskedDiffusionLM, row: Encoded, config: TraceConfig) -> Effects:
    """Effects of one fact, a trajectory for every layer x module x step; batch rows are the noise draws."""
    run = _FactRun(lm, row, config)
    shape = (config.draws, lm.num_layers, len(config.modules), run.steps, run.steps)
    effects = torch.full(shape, torch.nan, dtype=torch.float64)
    for layer in range(lm.num_layers):
        for m, module in enumerate(config.modules):
            for step in range(run.steps):
                later, _ = run.trajectory(corrupt=True, patch=(Site(layer, module), step))
                effects[:, layer, m, step, step:] = (later - run.corrupted)[:, step:]
    placed = torch.stack([run.clean_placed.mean(0), run.corrupted_placed.mean(0)])
    return Effects(effects, run.clean[0], run.corrupted, placed)


class _FactRun:
    """Clean and corrupted trajectories of one fact, and patched ones on demand."""

    def __init__(self, lm: MaskedDiffusionLM, row: Encoded, config: TraceConfig) -> None:
        self.lm, self.row, self.config = lm, row, config
        self.steps = config.steps_of(row)
        self.answer = slice(*row.answer)
        self.targets = torch.tensor(row.answer_ids, device=lm.device)
        self.subject, self.restored = slice(*row.subject), list(config.restored(row))
        self.corruptor = Corruptor(lm, config)
        self.clean_outputs: list[dict[Site, Tensor]] = []
        self.clean, self.clean_placed = self.trajectory(corrupt=False, record=True)
        self.corrupted, self.corrupted_placed = self.trajectory(corrupt=True)

    def trajectory(
        self, *, corrupt: bool, patch: tuple[Site, int] | None = None, record: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Denoise all draws; log p(object) and the share of its tokens that stand rightly, at every step, [draws, steps]."""
        lm, draws = self.lm, self.config.draws
        canvas = blank(lm, self.row).repeat(draws, 1)
        slots = torch.zeros_like(canvas, dtype=torch.bool)
        slots[:, self.answer] = True
        tokens = torch.zeros(draws, len(self.targets), dtype=torch.float64)
        values, placed = [], []
        for step, count in enumerate(commits_at(self.row, self.steps)):
            lm.clock.step = step
            seen = self.corruptor.canvas(self.row, canvas) if corrupt else canvas
            with contextlib.ExitStack() as stack:
                if corrupt:
                    stack.enter_context(self._corrupted(step, canvas.shape))
                if patch is not None and patch[1] == step:
                    stack.enter_context(_hooked(lm.site_module(patch[0]), self._restore(patch[0], step)))
                if record:
                    stack.enter_context(self._recorded())
                logits = lm.logits(seen, positions=slots)
            read = target_logprobs(logits, self.targets.repeat(draws)).view(draws, -1).double().cpu()
            masked = (canvas[:, self.answer] == lm.spec.mask_id).cpu()
            tokens = torch.where(masked, read, tokens) if self.config.readout == "frozen" else read
            values.append(tokens.sum(dim=1))
            canvas = advance(lm, canvas, slots, logits, torch.full((draws,), count))
            placed.append((canvas[:, self.answer] == self.targets).double().mean(dim=1).cpu())
        return torch.stack(values, dim=1), torch.stack(placed, dim=1)

    def _corrupted(self, step: int, shape: torch.Size) -> contextlib.AbstractContextManager[None]:
        where = torch.zeros(shape, dtype=torch.bool, device=self.lm.device)
        where[:, self.subject] = True
        noise = [self.corruptor.noise(self.row, draw, step) for draw in range(self.config.draws)]
        return self.corruptor.acting(where, None if noise[0] is None else torch.cat([n for n in noise if n is not None]))

    def _restore(self, site: Site, step: int) -> Callable[[Tensor], Tensor]:
        def put(output: Tensor) -> Tensor:
            output = output.clone()
            output[:, self.restored] = self.clean_outputs[step][site]
            return output

        return put

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep every site's output at the restored positions during one forward."""
        outputs: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                outputs[site] = output[:, self.restored].clone()
                return output

            return change

        with contextlib.ExitStack() as stack:
            for site in (Site(layer, m) for layer in range(self.lm.num_layers) for m in self.config.modules):
                stack.enter_context(_hooked(self.lm.site_module(site), keep(site)))
            yield
        self.clean_outputs.append(outputs)


@contextlib.contextmanager
def _hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's tensor output by `change(output)` inside the block."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
