"""`remask diagnose`: how far a model is from the anchor, and what the anchor says itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import Facts, Json, Load, Model, load_options_of, progress, show


def diagnose(
    model: Model,
    facts: Facts,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for diagnostics.json and pictures")],
    retain: Annotated[Path | None, typer.Option("--retain", help="facts that should stay, JSON Lines")] = None,
    edit: Annotated[Path | None, typer.Option("--edit", help="edit file to attach to the model")] = None,
    anchor: Annotated[
        str | None, typer.Option("--anchor", help="model that gives the anchor; by default the model without the edit")
    ] = None,
    tau: Annotated[float, typer.Option(min=0, help="inverse temperature of the anchor; 0 = uniform")] = 1.0,
    draws: Annotated[int, typer.Option(min=1, help="masks a replicate (4 replicates)")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the mask bank")] = 0,
    shown: Annotated[int, typer.Option(min=0, help="facts whose denoising is followed step by step")] = 3,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Measure the KL from the anchor, the prediction with the prompt masked: along denoising and by noise level."""
    from ..diffusion.masks import MaskBank
    from ..experiments.diagnostics import DiagnoseJob, run_diagnostics

    bank = MaskBank(draws=draws, seed=seed)
    job = DiagnoseJob(model, facts, retain, edit, anchor, tau, bank, shown)
    record = run_diagnostics(job, out, progress, load_options_of(load_options))
    pictures = ", ".join(sorted(path.name for path in out.glob("*.png")))
    show(record, lambda found: [_table(found)], as_json, f"every number: {out / 'diagnostics.json'}; pictures: {pictures}")


def _table(record: dict[str, Any]) -> Table:
    """One line a set and noise level: KL in every state, and the anchor's probability of the answer before."""
    states = list(record["convergence"]["forget"])
    heads = [f"KL {state} (nats)" for state in states]
    table = Table(
        "set", "noise level", "rows", *heads, "anchor's p(gold)", title=f"{record['model']['name']}: KL from the anchor"
    )
    for name, found in record["convergence"].items():
        levels = ["all", *(f"{low:g}-{high:g}" for low, high in found["before"]["edges"])]
        for i, level in enumerate(levels):
            kls = [_of(found[state]["kl"], i) for state in states]
            if kls[0]["rows"]:
                means = [f"{kl['mean']:.2f}" for kl in kls] + [f"{_of(found['before']['leakage'], i)['mean']:.3f}"]
                table.add_row(name, level, str(kls[0]["rows"]), *means, end_section=i == len(levels) - 1)
    return table


def _of(quantity: dict[str, Any], level: int) -> dict[str, Any]:
    """The spread at all noise levels (0) or in one bin."""
    found: dict[str, Any] = quantity["overall"] if level == 0 else quantity["bins"][level - 1]
    return found
