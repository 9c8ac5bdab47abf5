"""Unlearning by training: every method of the registry, one trainer.

A step reads as many forget as retain rows, draws states (unlearning/states.py) that policy, start model and anchor share, and
minimises the method's loss plus a retain term. Low-rank adapters by default: the start model is then the same network with the
adapters off, and the weights are in memory once. At rank 0 the weights themselves are trained, and their start values are kept
beside them: on the device where the method or its retain term reads the start model (npo, dpo, undial, whp, kl, hidden, mdu
with the frozen anchor), otherwise in main memory, since the result is a change.

`task-vector` learns the forget rows and subtracts what it learned. `whp` first learns them (the reinforced model), then starts
anew and learns the lowered predictions. Start several processes with `torchrun`; they share every batch and take the steps
that one process takes. With `shard` they share the weights of a model with adapters as well (FSDP2); `lm` stays split then.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ..backbones.model import MaskedDiffusionLM
from ..backbones.weight_edit import WeightEdit, opposite
from ..editfile import EDIT
from ..errors import RemaskError
from ..facts import Fact, write_json
from ..random import digest
from .objectives import METHODS
from .states import Noise
from .trainer import fast_bfloat16
from .training.config import UnlearnConfig
from .training.loop import Phase, Progress
from .training.objective import Objective, Terms, hidden_layer, recomputed_blocks
from .training.processes import start_processes
from .training.rows import Dealer, Rows, evaluated, prepare_rows
from .training.sharded import ShardedAdapters
from .training.weights import Adapters, Trained, Weights

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG = "unlearn.json"
MAIN, REINFORCED = ("checkpoint.safetensors", "metrics.jsonl"), ("reinforced.safetensors", "reinforced.jsonl")


def unlearn(
    lm: MaskedDiffusionLM,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    config: UnlearnConfig,
    out: str | Path,
    *,
    validation: Sequence[Fact] = (),
    reference: MaskedDiffusionLM | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> WeightEdit:
    """Train `lm` to forget; the result is `out/edit.safetensors`, and `lm` is as it came.

    Also in `out`: `unlearn.json` (settings, cost, losses, validation curve), `metrics.jsonl`, `tensorboard/`, and the
    checkpoint that `resume` continues from, to the same numbers step for step.

    Args:
        validation: retain rows that are not trained on; the curve and early stop watch them, or the retain rows themselves.
        reference: the model that never saw the forget rows, for mdu's anchor of that name.

    Raises:
        RemaskError: bad sets (see `prepare_rows`), an intervention attached, a reference that is missing, not read, or of
            another vocabulary, targets that match nothing, a loss that is not finite, a checkpoint of another run, or a launch
            that the trainer does not do.
    """
    if lm.attached:
        raise RemaskError(f"{lm.name} has a {lm.attached[0].kind} attached; detach it before unlearning")
    rows = prepare_rows(lm, forget, retain, validation, config)
    _check_reference(lm, reference, config)
    if config.early_stop is not None and not (rows.retain or rows.validation):
        raise RemaskError("early_stop watches retain or validation rows and there are none; give it some, or leave it out")
    if "hidden" in config.definition.needs:
        hidden_layer(lm, config.parsed)
    accelerator = start_processes("unlearning", config.batch_size, parts=config.parts, find_unused=True)
    if accelerator.num_processes > 1 and config.options.get("mean") == "token":
        raise RemaskError(
            f"{config.method} with mean=token averages over all positions of a batch at once, which several processes would "
            "change; start one, or set mean=row"
        )
    run = _Run(lm, rows, config, Path(out), reference, accelerator)
    with run.trained_parameters() as trained, recomputed_blocks(lm, config.gradient_checkpointing):
        progress, edit = run.phases(trained, resume, console)
    if run.accelerator.is_main_process:
        edit.save(run.out / EDIT)
        write_json(run.out / LOG, run.log(edit, progress))
    run.accelerator.wait_for_everyone()
    return edit


@dataclass
class _Run:
    lm: MaskedDiffusionLM
    rows: Rows
    config: UnlearnConfig
    out: Path
    reference: MaskedDiffusionLM | None
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.lm.model.to(self.accelerator.device)
        if self.lm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.lm.device)
        if self.reference is not None:
            self.reference.model.to(self.accelerator.device)
        self.fingerprint = self.lm.fingerprint()
        other = "" if self.reference is None else self.reference.fingerprint()
        parts = self.accelerator.num_processes if self.config.shard else 1
        data = digest(self.rows.digest, self.fingerprint, other, parts)
        self.identity = {"config": self.config.model_dump_json(), "data": data}
        self.retain = self.config.definition.retain if self.config.retain == "default" else self.config.retain
        if not self.rows.retain:
            self.retain = "none"
        bfloat16 = self.config.precision == "bf16" or (self.config.precision == "auto" and fast_bfloat16(self.lm.device))
        self.terms = Terms(
            self.config.definition, self.config.parsed, self.retain, self.config.retain_weight, bfloat16, self.reference
        )

    @contextlib.contextmanager
    def trained_parameters(self) -> Iterator[Trained]:
        """Adapters or trainable weights inside the block, the model as it came behind it."""
        trained = self._trained()
        try:
            yield trained
        finally:
            trained.undo()

    def _trained(self) -> Trained:
        if self.config.shard:
            return ShardedAdapters(self.lm, self.config, self.accelerator)
        if self.config.rank:
            return Adapters(self.lm, self.config)
        return Weights(self.lm, self.config, with_start=self.terms.reads_start)

    def phases(self, trained: Trained, resume: bool, console: Console | None) -> tuple[Progress, WeightEdit]:
        """Run all phases; progress of the last one with the work of all, and what was trained."""
        start = trained.copy()
        if self.config.definition.calibrate is not None:
            self.terms.options = self._calibrated(trained)
        reinforced = None
        if "reinforced" in self.config.definition.needs:
            learning = Terms(METHODS["task-vector"], METHODS["task-vector"].parse({}), "none", 0.0, self.terms.bfloat16)
            phase = self._phase("reinforce", trained, learning, self.config.retain_noise, REINFORCED)
            reinforced = phase.run(resume=resume, console=console)
            self.terms.held = trained.copy()
            trained.put(start)
        elif getattr(self.terms.options, "anchor", None) == "ema":
            self.terms.held = start
        phase = self._phase(self.config.method, trained, self.terms, self.config.noise, MAIN)
        progress = phase.run(resume=resume, console=console)
        if reinforced is not None:
            progress.work = {name: value + reinforced.work[name] for name, value in progress.work.items()}
        return progress, self._edit(trained, self._cost(progress))

    def _phase(self, name: str, trained: Trained, terms: Terms, noise: Noise, files: tuple[str, str]) -> Phase:
        dealer = Dealer(self.lm, self.rows, self.config, name, noise, "preferred" in terms.method.needs, terms.retain != "none")
        measured = {"forget": evaluated(self.rows.forget, self.config.seed, "evaluated forget rows")}
        watched = "validation" if self.rows.validation else "retain"
        if kept := self.rows.validation or self.rows.retain:
            measured[watched] = evaluated(kept, self.config.seed, f"evaluated {watched} rows")
        return Phase(
            name,
            trained,
            terms,
            dealer,
            self.config,
            self.accelerator,
            self._own(self.out / files[0]),
            self.out / files[1],
            self.identity,
            measured if files == MAIN else {},
        )

    def _own(self, path: Path) -> Path:
        """A file of this process alone, where the model is split."""
        return path.with_stem(f"{path.stem}-{self.accelerator.process_index}") if self.config.shard else path

    def _calibrated(self, trained: Trained) -> Any:
        """The method's options with what it measures on the whole first batch, whatever the number of processes."""
        phase = self._phase(self.config.method, trained, self.terms, self.config.noise, MAIN)
        with torch.no_grad():
            quantities = Objective(trained, self.terms).forget_quantities(phase.dealer.batch(0))
        calibrate = self.config.definition.calibrate
        return self.terms.options if calibrate is None else calibrate(quantities, self.terms.options)

    def _edit(self, trained: Trained, cost: dict[str, Any]) -> WeightEdit:
        """The change; for the task vector its opposite, `alpha` times."""
        changes, alpha = trained.changes(), 1.0
        if self.config.method == "task-vector":
            changes, alpha = {name: opposite(change) for name, change in changes.items()}, self.config.options["alpha"]
        details = {"config": self.config.model_dump(mode="json"), "cost": cost}
        return WeightEdit(changes, self.fingerprint, self.config.method, alpha, details)

    def _cost(self, progress: Progress) -> dict[str, Any]:
        """Seconds and forward work of training, over all processes; bytes of the largest process."""
        names = ("forwards", "sequence_blocks", "tokens")
        counts = torch.tensor([progress.work[name] for name in names], dtype=torch.float64, device=self.lm.device)
        total = self.accelerator.reduce(counts, "sum").tolist()
        peak = torch.tensor([_peak_memory(self.lm.device)], dtype=torch.float64, device=self.lm.device)
        return {
            "seconds": round(progress.work["seconds"], 2),
            **{name: int(value) for name, value in zip(names, total, strict=True)},
            "peak_memory": int(self.accelerator.gather(peak).max()),
            "processes": self.accelerator.num_processes,
        }

    def log(self, edit: WeightEdit, progress: Progress) -> dict[str, Any]:
        """What `unlearn.json` holds."""
        return {
            "method": self.config.method,
            "model": {"name": self.lm.name, "fingerprint": self.fingerprint},
            "config": self.config.model_dump(mode="json"),
            "options": self.terms.options.model_dump(mode="json"),
            "retain": self.retain,
            "bfloat16": self.terms.bfloat16,
            "rows": {name: len(group) for name, group in vars(self.rows).items() if name != "refusals"},
            "edit": {key: value for key, value in edit.describe().items() if key != "details"},
            "cost": edit.details["cost"],
            "steps": progress.step,
            "stopped": progress.stopped,
            "kept_step": progress.step if progress.stopped is None else progress.good,
            "losses": progress.losses,
            "curve": progress.curve,
        }


def _check_reference(lm: MaskedDiffusionLM, reference: MaskedDiffusionLM | None, config: UnlearnConfig) -> None:
    wanted = config.options.get("anchor") == "never-trained"
    if wanted and reference is None:
        raise RemaskError(f"{config.method} with the never-trained anchor needs a reference model; pass one")
    if reference is None:
        return
    if not wanted:
        raise RemaskError(
            f"{config.method} with these options reads no reference model; leave it out, or set anchor=never-trained"
        )
    sizes = [model.embedding.num_embeddings for model in (lm, reference)]
    tables = [None if model.tokenizer is None else model.tokenizer.get_vocab() for model in (lm, reference)]
    if sizes[0] != sizes[1] or lm.spec.mask_id != reference.spec.mask_id or (all(tables) and tables[0] != tables[1]):
        raise RemaskError(
            f"the reference {reference.name} has another vocabulary ({sizes[1]} ids, mask {reference.spec.mask_id}) than "
            f"{lm.name} ({sizes[0]} ids, mask {lm.spec.mask_id}); take one that was trained with the same tokenizer"
        )


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU during the run, or the resident set of the process since its start; 0 = not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
