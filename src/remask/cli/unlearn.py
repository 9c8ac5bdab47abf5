"""`remask unlearn`: forget by training or by writing into weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperCommand

from ..errors import RemaskError
from .common import Json, Load, console, load_options_of, pairs_of, print_json, progress, show


class WithMethods(TyperCommand):
    """`--help` ends with every method and its options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, then the methods."""
        super().format_help(ctx, formatter)
        console.print(_methods())
        console.print(_trainer())


def unlearn(
    model: Annotated[str | None, typer.Argument(help="bundled name (tiny, tiny-tofu, ...) or checkpoint folder")] = None,
    method: Annotated[str | None, typer.Option(help="one of --list")] = None,
    forget: Annotated[Path | None, typer.Option(help="facts to forget, JSON Lines")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="folder for the edit, its log and checkpoints")] = None,
    retain: Annotated[Path | None, typer.Option(help="facts to keep")] = None,
    validation: Annotated[Path | None, typer.Option(help="facts to keep that are watched and not trained on")] = None,
    reference: Annotated[
        str | None, typer.Option(help="model that never saw the facts (mdu, --set anchor=never-trained)")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="optimizer steps; of rome, memit, alphaedit: for a value")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="of AdamW, or of the value's Adam")] = None,
    seed: Annotated[int | None, typer.Option(help="of rows, states and adapters; 0 by default")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="an option of the method or of the trainer, see below"),
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on from the checkpoint in --out")] = False,
    list_methods: Annotated[bool, typer.Option("--list", help="list the methods")] = False,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Unlearn with a method: `remask unlearn MODEL --method NAME --forget F --retain R -o DIR`.

    Several devices or processes: `torchrun --nproc_per_node N -m remask unlearn ...`. The result loads like any edit:
    `remask audit MODEL --adapter DIR ...`.
    """
    if list_methods:
        _list(as_json)
        return
    for name, value in (("MODEL", model), ("--method", method), ("--forget", forget), ("--out", out)):
        if value is None:
            raise RemaskError(f"{name} is missing; `remask unlearn --help` shows how to call it, --list the methods")
    from ..editfile import EDIT
    from ..experiments.unlearning import UnlearnJob, run_unlearn
    from ..unlearning.unlearn import LOG

    assert model is not None and method is not None and forget is not None and out is not None
    given = {"seed": seed, "steps": max_steps, "learning_rate": learning_rate}
    chosen = pairs_of("--set", settings) | {key: value for key, value in given.items() if value is not None}
    job = UnlearnJob(model, method, forget, retain, validation, reference, chosen)
    record = run_unlearn(job, out, resume=resume, console=progress, load_options=load_options_of(load_options))
    show(record, lambda found: [_summary(found)], as_json, f"edit: {out / EDIT}; settings and cost: {out / LOG}")


def _summary(record: dict[str, Any]) -> Table:
    """What was done and what it cost."""
    table = Table(title=f"{record['method']} on {record['model']['name']}", show_header=False)
    table.add_row("rows", ", ".join(f"{count} {name}" for name, count in record["rows"].items() if count))
    if "steps" in record:
        stopped = f", stopped: {record['stopped']}" if record["stopped"] else ""
        table.add_row("steps", f"{record['kept_step']}{stopped}")
    for point in record.get("curve", [])[:1] + record.get("curve", [])[-1:]:
        means = {name: value for name, value in point.items() if isinstance(value, float)}
        table.add_row(f"step {point['step']}", ", ".join(f"{name} {value:.2f}" for name, value in means.items()))
    for layer, found in record.get("null_space", {}).items():
        table.add_row(f"null space, layer {layer}", f"rank {found['rank']} of {found['of']}")
    table.add_row("cost", f"{record['cost']['seconds']:.1f} s, {record['cost']['forwards']} forwards")
    return table


def _list(as_json: bool) -> None:
    from ..experiments.unlearning import describe_methods

    if as_json:
        print_json(describe_methods())
        return
    table = Table(Column("method", no_wrap=True), "what it does", "source", "retain term")
    for row in describe_methods():
        needed = " (needed)" if row["needs_retain"] else ""
        table.add_row(row["name"], row["summary"], row["source"], f"{row['retain']}{needed}")
    console.print(table)


def _methods() -> Table:
    from ..experiments.unlearning import describe_methods

    table = Table(Column("method", no_wrap=True), "options (--set KEY=VALUE) and defaults", title="methods")
    for row in describe_methods():
        noise = {} if row["draws"] in (None, 1) else {"noise": {"draws": row["draws"]}}  # other than the trainer's
        table.add_row(row["name"], escape(_options(row["options"] | noise)) or "-")
    return table


def _trainer() -> Table:
    from ..experiments.unlearning import trainer_options

    table = Table("options (--set KEY=VALUE) and defaults", title="all methods that train")
    table.add_row(escape(_options(trainer_options())))
    return table


def _options(options: dict[str, Any]) -> str:
    shown = {name: value.model_dump() if hasattr(value, "model_dump") else value for name, value in options.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())
