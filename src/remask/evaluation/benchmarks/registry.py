"""Benchmarks by name: `closed-world`, `tofu:forget01`, `rwku:1_Stephen_King`, `muse:books`, ...

A name is `benchmark` or `benchmark:argument`. Adding a benchmark is one file and one entry in `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import RemaskError
from . import counterfact, muse, rwku, tofu, whp, wmdp, zsre
from .base import Benchmark, split_groups
from .closed_world import load_world
from .hub import locate

__all__ = ["BENCHMARKS", "Benchmark", "Entry", "load_benchmark", "names", "split_groups"]


@dataclass(frozen=True)
class Entry:
    """How one benchmark is loaded.

    Attributes:
        load: argument and folder -> groups.
        licence: of the data.
        arguments: what may follow the colon; "" = nothing has to; None = anything (a target), checked by `load`.
        hub: argument -> published hub ids, each with the commit that is taken by default.
        files: which files of them are downloaded.
        example: a valid argument, where `arguments` is None.
    """

    load: Callable[[str, Path], Benchmark]
    licence: str
    arguments: tuple[str, ...] | None = ("",)
    hub: Callable[[str], Mapping[str, str | None]] = lambda _argument: {}
    files: Sequence[str] = field(default_factory=tuple)
    example: str = ""


BENCHMARKS: dict[str, Entry] = {
    "tofu": Entry(tofu.load_benchmark, tofu.LICENCE, tofu.FORGET, lambda _: tofu.HUB, tofu.FILES),
    "rwku": Entry(rwku.load_benchmark, rwku.LICENCE, None, lambda _: rwku.HUB, rwku.FILES, "1_Stephen_King"),
    "muse": Entry(muse.load_benchmark, muse.LICENCE, tuple(muse.CORPORA), lambda corpus: muse.HUB[corpus], muse.FILES),
    "whp": Entry(lambda _, folder: whp.load_benchmark(folder), whp.LICENCE),
    "wmdp": Entry(wmdp.load_benchmark, wmdp.LICENCE, tuple(wmdp.ROWS), lambda _: wmdp.HUB, wmdp.FILES),
    "counterfact": Entry(counterfact.load_benchmark, counterfact.LICENCE, ("", *counterfact.SPLITS)),
    "zsre": Entry(zsre.load_benchmark, zsre.LICENCE, tuple(zsre.SPLITS)),
}
WORLD = "closed-world"


def names() -> list[str]:
    """Every name that `load_benchmark` takes; one example where the argument is a target of the folder."""
    listed = [WORLD]
    for name, entry in BENCHMARKS.items():
        listed += [f"{name}:{word}" if word else name for word in entry.arguments or (entry.example,)]
    return listed


def load_benchmark(name: str, data: str | Path | None) -> Benchmark:
    """Groups of facts and probes of one benchmark.

    Args:
        name: one of `names()`; `rwku:` takes any target of the folder.
        data: local folder with the files, or the hub id of the published set (`locuslab/TOFU`, `jinzhuoran/RWKU`,
            `muse-bench/MUSE-Books`, `muse-bench/MUSE-News`, `cais/wmdp`), optionally with `@commit`. None for the closed world.

    Raises:
        RemaskError: unknown benchmark, missing folder or file, or malformed rows (file and line).
    """
    if name == WORLD:
        return load_world()
    kind, _, argument = name.partition(":")
    entry = BENCHMARKS.get(kind)
    known = entry is not None and (bool(argument) if entry.arguments is None else argument in entry.arguments)
    if entry is None or not known or name != (f"{kind}:{argument}" if argument else kind):
        raise RemaskError(f"unknown benchmark {name!r}; choose one of {', '.join(names())}")
    return entry.load(argument, locate(name, data, entry.hub(argument), entry.files))
