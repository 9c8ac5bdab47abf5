"""What the commands share: consoles, options that several of them take, and how their values are read."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from ..errors import RemaskError

console = Console()
progress = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="bundled name (tiny, tiny-tofu, ...) or checkpoint folder")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Facts = Annotated[Path, typer.Option("--facts", help="facts to work on, JSON Lines")]
Load = Annotated[
    list[str] | None,
    typer.Option("-L", "--load", metavar="KEY=VALUE", help="how to load the model: family, mask_id, dtype, device, chat, ..."),
]
SiteOption = Annotated[
    str | None, typer.Option("--site", metavar="auto|PATH", help="trace the facts now (auto), or the folder of a trace")
]
Data = Annotated[Path | None, typer.Option("--data", help="folder with the benchmark's files")]


class RunGroup(TyperGroup):
    """`remask audit MODEL ...` is `remask audit run MODEL ...`; so for `remask trace`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` in front of what is no command of the group."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


def torchrun(processes: int) -> None:
    """This very command line in several processes."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run(["--standalone", "--nproc-per-node", str(processes), "-m", "remask", *sys.argv[1:]])
    except ChildFailedError:  # the process that failed has said why
        raise typer.Exit(2) from None


def pairs_of(option: str, pairs: list[str] | None) -> dict[str, Any]:
    """`key=value` pairs of an option; values are YAML scalars or lists."""
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, found, value = pair.partition("=")
        if not found:
            raise RemaskError(f"{option} {pair!r} is not KEY=VALUE")
        read = yaml.safe_load(value)
        if isinstance(read, str):
            with contextlib.suppress(ValueError):  # YAML takes 1e-15 for a text
                read = float(read)
        options[key] = read
    return options


def load_options_of(pairs: list[str] | None) -> dict[str, Any]:
    """`-L key=value` pairs as arguments of `load`; dtype is a torch name."""
    options = pairs_of("-L", pairs)
    if "dtype" in options:
        import torch

        dtype = getattr(torch, str(options["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise RemaskError(f"-L dtype={options['dtype']!r} is no torch dtype; try float32 or bfloat16")
        options["dtype"] = dtype
    return options


def strength_of(text: str) -> float | None:
    """The number of `--alpha`; None = calibrated."""
    if text == "calibrated":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RemaskError(f"--alpha {text!r} is neither a finite number nor 'calibrated'")
    return value


def only_one(layer: int | None, site: str | None) -> None:
    """Refuse `--layer` with `--site`."""
    if layer is not None and site is not None:
        raise RemaskError("--layer and --site both say where to edit; give one of them")


def show(result: Any, tables: Callable[[Any], Iterable[RenderableType]], as_json: bool, files: str = "") -> None:
    """Print what was found: for machines, or as tables and where the files are. A process that found nothing is silent."""
    if result is None:  # not the first process
        return
    if as_json:
        print_json(result)
        return
    for table in tables(result):
        console.print(table)
    if files:
        progress.print(files)


def print_json(data: Any) -> None:
    """Print for machines."""
    print(json.dumps(data, indent=1, ensure_ascii=False))
