"""`remask diagnose`: a model, or an edit of it, against the anchor, into one folder.

| file | what it is |
|---|---|
| `diagnostics.json` | every number, and how it was measured |
| `trajectory-1-generated.png`, ... | KL from the anchor along the denoising of the first facts, in both modes |
| `convergence.png` | KL from the anchor on the bank, before and after, by noise level |
| `signal.png` | before: E[KL given t], and what the anchor itself says of the answers |

Junk rate and distance to a never-trained model are measured by `remask audit`, which generates and loads the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from ..backbones import Encoded, MaskedDiffusionLM, load
from ..backbones.intervention import Intervention, NoEdit
from ..diffusion.masks import MaskBank
from ..facts import load_facts, write_json
from ..figures import save_figure
from ..reporting.diagnostics import convergence_curves, signal_map, trajectory_map
from ..unlearning.diagnostics import Convergence, Trajectory, convergence, trajectory
from ..unlearning.diagnostics.anchors import check
from ..unlearning.diagnostics.trajectory import MODES
from .edits import load_edit
from .workers import Workers


@dataclass(frozen=True)
class DiagnoseJob:
    """What `remask diagnose` is asked for.

    Attributes:
        model: name or folder.
        facts: JSON Lines file of the forget set; retain: another one, of what should stay.
        edit: file of an edit that is attached to the model.
        anchor: name or folder of the model that gives the anchor; None = the model itself without the edit. Beside an edit it
            is loaded a second time, since both predict in turn.
        tau: inverse temperature of the anchor.
        bank: masks of the convergence.
        shown: facts, the first ones, whose trajectories are followed.
    """

    model: str
    facts: Path
    retain: Path | None = None
    edit: Path | None = None
    anchor: str | None = None
    tau: float = 1.0
    bank: MaskBank = field(default_factory=MaskBank)
    shown: int = 3


def run_diagnostics(
    job: DiagnoseJob, out: Path, console: Console | None = None, load_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Diagnose into `out`; returns the content of diagnostics.json.

    `before` is the anchor's model against its own anchor, `after` the model with its edit; without edit and anchor there is
    only `before`.

    Raises:
        RemaskError: whatever the facts, the models or the edit are refused for.
    """
    lm = load(job.model, **dict(load_options or {}))
    apart = job.edit is not None or job.anchor is not None
    frozen = load(job.anchor or job.model, **dict(load_options or {})) if apart else lm
    edit = load_edit(job.edit) if job.edit else NoEdit()
    sets = {"forget": [lm.encode(fact) for fact in load_facts(job.facts)]}
    if job.retain is not None:
        sets["retain"] = [lm.encode(fact) for fact in load_facts(job.retain)]
    for rows in sets.values():
        check(lm, frozen, rows, job.tau)  # before a model reads another one's ids
    record = _head(job, lm, frozen, edit, sets)
    with Workers().bar(console) as progress:
        bar = progress.add_task("diagnosing", total=_work(job, sets, 1 + apart))
        found, curves = _measure(job, lm, frozen if apart else None, edit, sets, lambda n: progress.advance(bar, n))
    record["trajectories"] = [one.to_dict() for one in found]
    record["convergence"] = {name: {state: one.to_dict() for state, one in states.items()} for name, states in curves.items()}
    _write(out, record, _figures(found, curves))
    return record


def _work(job: DiagnoseJob, sets: Mapping[str, list[Encoded]], states: int) -> int:
    """Canvases on which policy and anchor are compared, up to those that a trajectory spends less."""
    masks = job.bank.draws * job.bank.replicates * states * sum(map(len, sets.values()))
    return masks + len(MODES) * sum(len(row.answer_ids) for row in sets["forget"][: job.shown])


def _measure(
    job: DiagnoseJob,
    lm: MaskedDiffusionLM,
    frozen: MaskedDiffusionLM | None,
    edit: Intervention,
    sets: Mapping[str, list[Encoded]],
    tick: Callable[[int], object],
) -> tuple[list[Trajectory], dict[str, dict[int | str, Convergence]]]:
    """Trajectories of the first facts, and set -> state -> convergence."""
    curves: dict[str, dict[int | str, Convergence]] = {name: {} for name in sets}
    for name, rows in sets.items():
        curves[name]["before"] = convergence(frozen or lm, rows, job.bank, tau=job.tau, done=tick)
    found = []
    with edit.attached(lm):
        for row in sets["forget"][: job.shown]:
            for mode in MODES:
                found.append(trajectory(lm, row, anchor=frozen, tau=job.tau, mode=mode))
                tick(len(row.answer_ids))
        for name, rows in sets.items() if frozen is not None else ():
            curves[name]["after"] = convergence(lm, rows, job.bank, anchor=frozen, tau=job.tau, done=tick)
    return found, curves


def _head(
    job: DiagnoseJob, lm: MaskedDiffusionLM, frozen: MaskedDiffusionLM, edit: Intervention, sets: Mapping[str, list[Encoded]]
) -> dict[str, Any]:
    """What was measured, and under which protocol."""
    mark = lm.fingerprint()
    return {
        "model": {"name": job.model, "fingerprint": mark},
        "anchor": {"name": job.anchor or job.model, "fingerprint": mark if frozen is lm else frozen.fingerprint()},
        "edit": {"kind": edit.kind, **edit.describe()} if job.edit else None,
        "tau": job.tau,
        "bank": {"draws": job.bank.draws, "replicates": job.bank.replicates, "seed": job.bank.seed},
        "rows": {name: len(rows) for name, rows in sets.items()},
    }


def _figures(found: list[Trajectory], curves: Mapping[str, Mapping[int | str, Convergence]]) -> dict[str, Figure]:
    drawn = {f"trajectory-{1 + i // len(MODES)}-{one.mode}": trajectory_map(one) for i, one in enumerate(found)}
    before = {name: states["before"] for name, states in curves.items()}
    return {**drawn, "convergence": convergence_curves(curves, ""), "signal": signal_map(before)}


def _write(out: Path, record: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    for stale in out.glob("trajectory-*.png"):  # of an earlier run with more facts
        stale.unlink()
    write_json(out / "diagnostics.json", record, indent=None)
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
