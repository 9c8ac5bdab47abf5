"""The loop over steps: gradients averaged over processes, checkpoints, the validation curve and the stops."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from ...backbones.model import Encoded
from ...diffusion.likelihood import elbo
from ...diffusion.masks import MaskBank
from ...errors import RemaskError
from ..trainer import load_checkpoint, save_checkpoint, schedule
from .config import UnlearnConfig
from .journal import Journal
from .objective import Objective, Terms
from .rows import Dealer, finite_rows
from .weights import Trained, Values

if TYPE_CHECKING:
    from accelerate import Accelerator

BANK = MaskBank(draws=4, replicates=1, seed=7_000_003)
"""Of the validation curve; never the bank that numbers are reported on."""


@dataclass
class Progress:
    """How far a phase is: JSON, in its checkpoint.

    Attributes:
        losses: of every step.
        curve: points {step, forget, retain (or validation), ...} in nats a row.
        work: counts of `Counters` and `seconds` that the steps took, without the points of the curve.
        stopped: step at which the drift limit was crossed, if it was.
        good: last step whose point was within the limit.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    work: dict[str, float] = field(default_factory=dict)
    stopped: int | None = None
    good: int = 0


@dataclass
class Phase:
    """One training run of a method; most methods have one phase.

    Attributes:
        checkpoint, metrics: files of the state and of the journal; of a split model every process has a state of its own.
        identity: of the run; another run's checkpoint is refused.
        measured: rows of the validation curve, by name; the one that early stop watches is the last. Empty = no curve.
    """

    name: str
    trained: Trained
    terms: Terms
    dealer: Dealer
    config: UnlearnConfig
    accelerator: Accelerator
    checkpoint: Path
    metrics: Path
    identity: Mapping[str, str]
    measured: Mapping[str, Sequence[Encoded]]

    def run(self, *, resume: bool, console: Console | None) -> Progress:
        """Train until the steps are done or retain rows drift; the trained values are in place afterwards.

        Raises:
            RemaskError: loss or gradient not finite, a drift beyond the limit at the first point, or another run's checkpoint.
        """
        core = Objective(self.trained, self.terms)
        self._inside, self._loss = self.trained.wrap(core, self.accelerator), core.loss
        optimizer = torch.optim.AdamW(
            self.trained.named.values(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
        )
        progress = self._restored(optimizer) if resume else None
        total, live = self.config.steps, self.accelerator.is_main_process
        if progress is None:
            progress = Progress()
        journal = Journal(self.metrics, self.name, progress.step, total, live=live, console=console)
        try:
            with journal:
                if not progress.step:
                    self._point(progress, journal)
                while progress.step < total and progress.stopped is None:
                    self._advance(optimizer, progress, journal)
        finally:
            optimizer.zero_grad()  # of a step that did not come to its end, which another run would add to
        if progress.stopped is not None:
            if not progress.good:
                lost, rate, every = progress.curve[-1]["drift"], self.config.learning_rate, self.config.evaluate_every
                raise RemaskError(
                    f"{self.config.method}: at step {progress.stopped}, the first that is evaluated, rows that should stay "
                    f"lost {lost:.2f} nats already; lower learning_rate ({rate:g}) or evaluate_every ({every})"
                )
            self.trained.put(_values(load_file(self._good_file), "model."))
        return progress

    def _advance(self, optimizer: torch.optim.Optimizer, progress: Progress, journal: Journal) -> None:
        """One step with what follows it."""
        config, started, before = self.config, time.perf_counter(), self._counted()
        values = self._step(optimizer, progress.step)
        progress.step += 1
        progress.losses.append(values["loss"])
        spent = {name: count - before[name] for name, count in self._counted().items()}
        spent["seconds"] = time.perf_counter() - started
        progress.work = {name: progress.work.get(name, 0) + value for name, value in spent.items()}
        journal.write("train", progress.step, values)
        if progress.step % config.evaluate_every == 0 or progress.step == config.steps:
            self._point(progress, journal)
        journal.advance(f"loss {values['loss']:.3f}")
        if progress.step % config.checkpoint_every == 0 or progress.step == config.steps or progress.stopped is not None:
            self._save(self.checkpoint, [optimizer], asdict(progress))

    def _counted(self) -> dict[str, float]:
        """Forward work so far, of the model and of a never-trained one."""
        models = [self.trained.lm] + ([] if self.terms.reference is None else [self.terms.reference])
        counts = [asdict(model.counters) for model in models]
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
        """One optimizer step on this process's share of the batch; metrics over all processes."""
        config = self.config
        values = self._gathered([self._differentiated(step, piece) for piece in range(config.parts)], step)
        norm = self.trained.clip(config.clip)
        if not math.isfinite(norm):
            raise self._failed(step, "gradient", list(chain(*self.dealer.names(step))))
        rate = config.learning_rate * schedule(step, config.steps, config.warmup)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.terms.held is not None and (decay := getattr(self.terms.options, "ema", None)) is not None:
            for name, parameter in self.trained.named.items():
                self.terms.held[name].lerp_(parameter.detach(), 1 - decay)
        return {**values, "gradient_norm": norm, "learning_rate": rate}

    def _differentiated(self, step: int, piece: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Add a piece's share of the gradient; its loss, and its rows' losses and what they are made of, {name: [rows]}.

        All pieces have equally many rows, so the mean over the batch is the mean of theirs. Replicas average their gradients in
        the last piece; a split model does in every one, since no process has room for a whole gradient.
        """
        batch, last = self.dealer.batch(step, *self._share(piece)), piece == self.config.parts - 1
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self._inside):
            loss, rows = self._inside(lambda: self._loss(batch))
            self.accelerator.backward(loss / self.config.parts)
        return loss.detach(), rows

    def _share(self, piece: int) -> tuple[int, int]:
        """First row of a piece of this process in the batch, and the distance to the next."""
        world = self.accelerator.num_processes
        return self.accelerator.process_index + world * piece, world * self.config.parts

    def _gathered(self, pieces: Sequence[tuple[Tensor, Mapping[str, Tensor]]], step: int) -> dict[str, float]:
        """Loss and what it is made of, means over the rows of all pieces of all processes.

        Raises:
            RemaskError: a row's loss is not finite; names the rows.
        """
        accelerator, kinds = self.accelerator, list(pieces[0][1])
        losses = torch.stack([loss for loss, _ in pieces])
        shared = torch.zeros(len(kinds), self.config.batch_size, device=losses.device)
        for piece, (_, found) in enumerate(pieces):
            first, distance = self._share(piece)
            shared[:, first::distance] = torch.stack([found[kind].float() for kind in kinds])
        rows = dict(zip(kinds, accelerator.reduce(shared, "sum"), strict=True))
        for side, names in zip(("forget", "retain"), self.dealer.names(step), strict=True):
            if names and (bad := finite_rows(rows[side], names)):
                raise self._failed(step, "loss", bad)
        total = float(accelerator.reduce(losses.mean(), "mean"))
        return {"loss": total} | {name: float(value.mean()) for name, value in rows.items()}

    def _failed(self, step: int, what: str, names: Sequence[str]) -> RemaskError:
        kept = f"the last good checkpoint is kept in {self.checkpoint}" if self.checkpoint.is_file() else "no checkpoint yet"
        return RemaskError(
            f"{self.config.method}, step {step + 1}: the {what} of rows {', '.join(names)} is not finite; {kept}; "
            f"lower learning_rate ({self.config.learning_rate:g}) or raise the lowest noise level"
        )

    # ---------------------------------------------------------------- validation
    def _point(self, progress: Progress, journal: Journal) -> None:
        """Add a point to the curve; remember values that are within the drift limit, stop behind it."""
        if not self.measured:
            return
        point = {name: self._level(rows) for name, rows in self.measured.items()}
        watched = list(point)[-1]
        drift = (progress.curve[0] if progress.curve else point)[watched] - point[watched]
        progress.curve.append({"step": progress.step, **point, "drift": drift})
        journal.write("validation", progress.step, {**point, "drift": drift})
        if self.config.early_stop is None:
            return
        if drift > self.config.early_stop or not math.isfinite(drift):
            progress.stopped = progress.step
        else:
            progress.good = progress.step
            self._save(self._good_file, [], progress.step)

    def _level(self, rows: Sequence[Encoded]) -> float:
        """Mean log-probability, nats a row, in the run's precision; the processes share the rows."""
        with torch.autocast(self.trained.lm.device.type, torch.bfloat16, enabled=self.terms.bfloat16):
            return self._mean_level(rows)

    def _mean_level(self, rows: Sequence[Encoded]) -> float:
        lm, values = self.trained.lm, torch.zeros(len(rows), dtype=torch.float64, device=self.trained.lm.device)
        if self.trained.split:  # every process takes part in every forward
            return float(np.mean([score.logprob for score in self._inside(lambda: elbo(lm, rows, BANK))]))
        mine = list(range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))
        scores = [score.logprob for score in elbo(lm, [rows[i] for i in mine], BANK)]
        values[mine] = torch.tensor(scores, dtype=torch.float64, device=values.device)
        return float(self.accelerator.reduce(values, "sum").mean())

    # ---------------------------------------------------------------- state
    @property
    def _good_file(self) -> Path:
        return self.checkpoint.with_name(self.checkpoint.name.replace("checkpoint", "good"))

    def _save(self, path: Path, optimizers: Sequence[torch.optim.Optimizer], progress: Any) -> None:
        held = {f"held.{name}": value for name, value in (self.terms.held or {}).items()}
        if self.accelerator.is_main_process or self.trained.split:
            save_checkpoint(path, {**self.trained.named, **held}, optimizers, self.identity, progress)  # type: ignore[dict-item]
        self.accelerator.wait_for_everyone()

    def _restored(self, optimizer: torch.optim.Optimizer) -> Progress | None:
        found = load_checkpoint(self.checkpoint, self.trained.named, [optimizer], self.identity)
        if found is None:
            return None
        if self.terms.held is not None:
            held = _values(load_file(self.checkpoint), "model.held.")
            self.terms.held = {name: held[name].to(value.device) for name, value in self.terms.held.items()}
        return Progress(**found)


def _values(state: Mapping[str, Tensor], prefix: str) -> Values:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
