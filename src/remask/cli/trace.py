"""`remask trace`: where and when facts are carried."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import RemaskError
from .common import Facts, Json, Load, Model, RunGroup, load_options_of, progress, show, torchrun

trace_app = typer.Typer(
    cls=RunGroup,
    no_args_is_help=True,
    help="Find where and when facts are carried: `remask trace MODEL --facts FILE -o DIR`; compare two traces with `diff`.",
)


@trace_app.command("run")
def trace_run(
    model: Model,
    facts: Facts,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the trace, site.json, pictures and the page")],
    mode: Annotated[
        str, typer.Option(help="exact; sweep (fixed trajectory, another estimand); reference (hooks, slow)")
    ] = "exact",
    preset: Annotated[str, typer.Option(help="default, or paper: the literal equations, ten draws")] = "default",
    steps: Annotated[int | None, typer.Option(help="denoising steps, at most one a token")] = None,
    draws: Annotated[int | None, typer.Option(help="noise samples a fact")] = None,
    corruption: Annotated[str, typer.Option(help="of the subject: add noise, replace by noise, or mask")] = "add",
    noise: Annotated[float, typer.Option(help="noise in standard deviations of the subject's embeddings")] = 3.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="new noise at every step")] = False,
    readout: Annotated[
        str | None, typer.Option(help="committed object tokens: frozen (keep their value) or raw (read on, as the paper)")
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(help="restore the whole subject, its first or its last token; may be given several times"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    gamma: Annotated[float | None, typer.Option(help="weight gamma^(s' - s) of later steps")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="later steps only, not the restored one")] = False,
    normalise: Annotated[bool | None, typer.Option(help="divide by the sum of the weights")] = None,
    per_token: Annotated[bool | None, typer.Option(help="mean over object tokens; otherwise their sum")] = None,
    module: Annotated[str, typer.Option(help="module to edit: resid, attn, mlp, or any")] = "resid",
    signed: Annotated[bool, typer.Option("--signed", help="mean effect over facts instead of its absolute value")] = False,
    neighbours: Annotated[Path | None, typer.Option(help="facts that the site should not carry, JSON Lines")] = None,
    beta: Annotated[float | None, typer.Option(help="weight of the neighbours; 1 with --neighbours")] = None,
    smooth: Annotated[int, typer.Option(help="layers to each side that scores are averaged over")] = 0,
    clusters: Annotated[int, typer.Option(min=1, help="groups of facts with a site of their own")] = 1,
    paraphrases: Annotated[bool, typer.Option("--paraphrases", help="also trace the facts' other wordings")] = False,
    positions: Annotated[bool, typer.Option("--positions", help="also restore single positions (ROME)")] = False,
    keep_unknown: Annotated[
        bool, typer.Option("--keep-unknown", help="trace also facts whose object the model does not produce")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="trace at most this many facts")] = None,
    memory: Annotated[float | None, typer.Option(help="GB that activations may take")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 autocast")] = "fp32",
    processes: Annotated[int, typer.Option(min=1, help="processes on this machine that share the facts, by torchrun")] = 1,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Restore every module at every layer and denoising step, and see where the object comes back.

    A killed trace goes on where it was when the same command runs again; another weighting or rule is computed from the same
    effects. On several machines or GPUs start it with `accelerate launch -m remask trace ...`.
    """
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        torchrun(processes)
        return
    from dataclasses import replace

    from ..experiments.tracing import TraceJob, run_trace
    from ..reporting.tables import trace_tables
    from ..tracing import SiteRule
    from ..tracing import preset as trace_preset

    config, weights = trace_preset(
        preset,
        **{k: value for k, value in (("steps", steps), ("draws", draws), ("readout", readout)) if value is not None},
        corruption=corruption,
        noise=noise,
        fresh=fresh,
        seed=seed,
    )
    given: dict[str, Any] = {"gamma": gamma, "normalise": normalise, "per_token": per_token, "strict": strict or None}
    weights = replace(weights, **{key: value for key, value in given.items() if value is not None})
    if beta is not None and neighbours is None:
        raise RemaskError("--beta weighs the facts of --neighbours; give that file")
    penalty = (1.0 if beta is None else beta) if neighbours is not None else 0.0
    if precision not in ("fp32", "bf16"):
        raise RemaskError(f"--precision {precision!r} is neither fp32 nor bf16")
    job = TraceJob(
        model,
        facts,
        neighbours=neighbours,
        limit=limit,
        config=config,
        views=tuple(dict.fromkeys(view or ["subject"])),  # type: ignore[arg-type]  # the protocol checks the names
        rule=SiteRule(weights, None if module == "any" else module, signed, penalty, smooth),  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        paraphrases=paraphrases,
        positions=positions,
        clusters=clusters,
        keep_unknown=keep_unknown,
        memory=None if memory is None else int(memory * 1e9),
        bfloat16=precision == "bf16",
    )
    record = run_trace(job, out, progress, load_options_of(load_options), shlex.join(["remask", *sys.argv[1:]]))
    show(record, trace_tables, as_json, f"page: {out / 'index.html'}; raw effects: {out / 'trace.safetensors'}")


@trace_app.command("diff")
def trace_diff(
    first: Annotated[Path, typer.Argument(help="folder of a trace, or its file")],
    second: Annotated[Path, typer.Argument(help="another one, of the same facts on the same model")],
    as_json: Json = False,
) -> None:
    """The largest differences of two traces; refuses other facts, models, protocols and estimands."""
    from ..experiments.tracing import diff_traces

    show(diff_traces(first, second), _differences, as_json)


def _differences(result: dict[str, Any]) -> list[Table | str]:
    """One line a tensor, and what the differences are to be compared with."""
    table = Table("tensor", "largest difference", title=f"{' against '.join(result['modes'])}, {result['rows']} rows")
    for name, value in result["largest"].items():
        table.add_row(name, f"{value:.2g}")
    return [table, f"the largest effect is {result['scale']:.3g} nats"]
