"""`remask audit`: what an edit forgot and what it cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RemaskError
from .common import (
    Data,
    Json,
    Load,
    Model,
    RunGroup,
    SiteOption,
    load_options_of,
    only_one,
    progress,
    show,
    strength_of,
    torchrun,
)

audit_app = typer.Typer(
    cls=RunGroup,
    no_args_is_help=True,
    help="Prove what an edit forgot: `remask audit MODEL --benchmark NAME -o DIR`, then compare two folders with `diff`.",
)


@audit_app.command("run")
def audit_run(
    model: Model,
    benchmark: Annotated[str, typer.Option(help="closed-world, tofu:forget01, rwku:NAME, ...; docs/benchmarks.md lists them")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for records, results and the page")],
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            "--adapter",
            help="a name of docs/editing.md (paper, mean-delta, ...; by default `default`), none, an edit file, or a folder of "
            "`unlearn`; several files act together",
        ),
    ] = None,
    data: Data = None,
    alpha: Annotated[str, typer.Option(help="strength, or 'calibrated' to --level")] = "calibrated",
    layer: Annotated[int | None, typer.Option(help="layer to edit")] = None,
    site: SiteOption = None,
    reference: Annotated[str | None, typer.Option(help="model that never saw the forget set")] = None,
    level: Annotated[str, typer.Option(help="calibrate to: never-trained, prompt-masked, or auto (the higher)")] = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="repetitions of log-probabilities: mask bank and partial states")] = 1,
    precision: Annotated[str, typer.Option(help="of the measurement: fp32, bf16, or auto (bf16 where it is fast)")] = "auto",
    steps: Annotated[int | None, typer.Option(help="denoising steps of generations; by default one token a step")] = None,
    attacks: Annotated[bool, typer.Option(help="also attack the forgetting")] = True,
    relearn: Annotated[bool, typer.Option(help="also attack it by fine-tuning (LoRA)")] = False,
    extraction: Annotated[bool, typer.Option(help="also measure extraction strength (slow)")] = False,
    attack_rows: Annotated[int, typer.Option(min=1, help="rows that attacks on the sampler are run on")] = 24,
    text: Annotated[bool, typer.Option(help="keep generated answers in the records")] = True,
    processes: Annotated[int, typer.Option(min=1, help="processes on this machine that share the work, by torchrun")] = 1,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Measure what an edit forgot and what it cost, against the never-trained level and under attack.

    A killed audit goes on where it was when the same command runs again. On several machines or GPUs start it with
    `accelerate launch -m remask audit ...`.
    """
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        torchrun(processes)
        return
    from ..experiments.audits import AuditConfig, run_benchmark
    from ..reporting.tables import audit_tables

    names: dict[str, Any] = {"auto": None, "fp32": "fp32", "bf16": "bf16 autocast"}
    if precision not in names:
        raise RemaskError(f"--precision {precision!r} is none of auto, fp32, bf16")
    only_one(layer, site)
    first, *also = edit or ["default"]
    config = AuditConfig(
        model,
        benchmark,
        first,
        also=tuple(also),
        alpha=strength_of(alpha),
        layer=layer,
        site=site,
        reference=reference,
        level=_level(level),
        seeds=seeds,
        precision=names[precision],
        steps=steps,
        attacks=attacks,
        relearn=relearn,
        extraction=extraction,
        attack_rows=attack_rows,
        text=text,
    )
    result = run_benchmark(config, out, data, console=progress, load_options=load_options_of(load_options))
    show(result, audit_tables, as_json, f"page: {out / 'index.html'}; every number: {out / 'records.jsonl'}")


@audit_app.command("diff")
def audit_diff(
    first: Annotated[Path, typer.Argument(help="folder of a finished audit")],
    second: Annotated[Path, typer.Argument(help="folder of another one, measured in the same way")],
    as_json: Json = False,
) -> None:
    """Compare two audits row by row; refuses what was not measured under one protocol."""
    from ..experiments.diffs import diff_audits
    from ..reporting.tables import diff_tables

    show(diff_audits(first, second), diff_tables, as_json)


def _level(text: str) -> Any:
    if text not in ("auto", "never-trained", "prompt-masked"):
        raise RemaskError(f"--level {text!r} is none of auto, never-trained, prompt-masked")
    return text
