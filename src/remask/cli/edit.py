"""`remask edit`: edit files built, changed, looked into and checked."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import RemaskError
from .common import (
    Facts,
    Json,
    Load,
    Model,
    SiteOption,
    console,
    load_options_of,
    only_one,
    pairs_of,
    print_json,
    progress,
    strength_of,
)

File = Annotated[Path, typer.Argument(help="edit file")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="file to write; by default the same")]
Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository on the hub")]

edit_app = typer.Typer(no_args_is_help=True, help="Build edit memories, change their files and check them.")


@edit_app.command("build")
def edit_build(
    model: Model,
    facts: Facts,
    output: Annotated[Path, typer.Option("-o", "--output", help="memory file to write")],
    retain: Annotated[Path | None, typer.Option("--retain", help="facts to leave alone, JSON Lines")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="default (also where none is given), ridge, paper, softmax, gated (one fact), or rewrite (to the field "
            "'target' of each fact)"
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="layer to edit; bundled models have a tuned one")] = None,
    site: SiteOption = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="strength, or 'calibrated' (also where none is given, unless --tuned chose one), which is 1 for preset "
            "rewrite: it aims at no level"
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="model that never saw the facts: calibrate to no lower than its level")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="setting of the preset: mu=100, q=0.5, ..."),
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(help="folder of `edit tune`: preset, layer, settings and, without --alpha, strength that it chose"),
    ] = None,
    load_options: Load = None,
) -> None:
    """Build an edit memory that forgets or rewrites facts, and write it to a file."""
    from ..backbones import Site, load
    from ..editing.calibrate import target_level
    from ..editing.config import PRESETS
    from ..editing.memory import EditMemory
    from ..experiments.edits import build_edit
    from ..experiments.tracing import find_site
    from ..experiments.tuning import build_tuned, read_tuned
    from ..facts import load_facts

    name = preset or "default"
    if name not in PRESETS:
        raise RemaskError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    only_one(layer, site)
    if tuned is not None and (preset is not None or layer is not None or site is not None or settings):
        raise RemaskError("--tuned brings preset, layer and settings of its own; leave out --layer, --site, --set and --preset")
    changes = pairs_of("--set", settings)
    lm = load(model, **load_options_of(load_options))
    chosen = load_facts(facts)
    kept = load_facts(retain) if retain else []
    setting, strength = read_tuned(lm, tuned) if tuned is not None else (None, None)
    strength = strength if alpha is None else strength_of(alpha)
    if reference is not None and (strength is not None or name == "rewrite"):
        raise RemaskError("--reference gives a level to calibrate alpha to, and this one is not calibrated; leave it out")
    where = Site(layer) if layer is not None else find_site(lm, site, chosen) if site else None
    level = (
        target_level(lm, chosen, load(reference, **load_options_of(load_options)) if reference else None)
        if strength is None and name != "rewrite"
        else None
    )
    edit = (
        build_tuned(lm, setting, chosen, kept, strength, level)
        if setting is not None
        else build_edit(lm, name, chosen, kept, site=where, alpha=strength, level=level, **changes)
    )
    assert isinstance(edit, EditMemory)
    edit.save(output)
    console.print(
        f"{output}: {len(chosen)} facts, {len(edit.keys)} keys at layer {edit.site.layer}, alpha {edit.alpha:.3g}, "
        f"{output.stat().st_size / 1e6:.2f} MB"
    )


@edit_app.command("add")
def edit_add(
    model: Model,
    file: File,
    facts: Facts,
    output: Output = None,
    retain: Annotated[Path | None, typer.Option("--retain", help="only for targets that read the retain facts")] = None,
    load_options: Load = None,
) -> None:
    """Add facts to a memory file, captured and solved as its others were; the strength stays."""
    from ..backbones import load
    from ..editing import EditMemory
    from ..facts import load_facts

    memory = EditMemory.load(file)
    chosen = load_facts(facts)
    lm = load(model, **load_options_of(load_options))
    larger = memory.add(lm, chosen, retain=load_facts(retain) if retain else [])
    larger.save(output or file)
    console.print(f"{output or file}: {len(memory.fact_ids)} facts and {len(chosen)} new ones, {len(larger.keys)} keys")


@edit_app.command("remove")
def edit_remove(
    file: File,
    ids: Annotated[list[str], typer.Argument(help="ids of facts to remove")],
    output: Output = None,
) -> None:
    """Remove facts from a memory file; nothing of theirs stays in it."""
    from ..editing import EditMemory

    smaller = EditMemory.load(file).remove(*ids)
    smaller.save(output or file)
    console.print(f"{output or file}: {len(smaller.fact_ids)} facts left, {len(smaller.keys)} keys")


@edit_app.command("merge")
def edit_merge(
    first: File,
    second: File,
    output: Annotated[Path, typer.Option("-o", "--output", help="memory file to write")],
    alpha: Annotated[float | None, typer.Option(help="strength of both; needed where theirs differ")] = None,
) -> None:
    """Put the facts of two memory files of one model, site and settings into one."""
    from ..editing import EditMemory

    one, other = EditMemory.load(first), EditMemory.load(second)
    both = one + other if alpha is None else one.with_alpha(alpha) + other.with_alpha(alpha)
    both.save(output)
    console.print(f"{output}: {len(both.fact_ids)} facts, {len(both.keys)} keys")


@edit_app.command("show")
def edit_show(file: File, as_json: Json = False) -> None:
    """Show what an edit file holds."""
    from ..editing import EditMemory
    from ..experiments.editfiles import show_memory
    from ..experiments.edits import load_edit

    edit = load_edit(file)
    if not isinstance(edit, EditMemory):
        if as_json:
            print_json({"kind": edit.kind, **edit.describe()})
        else:
            console.print(f"{edit.kind}: " + ", ".join(f"{key} {value}" for key, value in edit.describe().items()))
        return
    found = show_memory(edit)
    if as_json:
        print_json({"kind": edit.kind, **found})
        return
    config = found["config"]
    console.print(
        f"preset [bold]{found['preset']}[/] ({config['keys']} keys, target {config['target']}, readout {config['readout']}), "
        f"layer {edit.site.layer} {edit.site.module}, alpha {edit.alpha:.3g}, model {edit.model}, "
        f"condition {'-' if found['condition'] is None else format(found['condition'], '.1e')}, "
        f"{found['retain_keys']} retain keys, compression lost {found['lost'][0]:.1%} of keys, {found['lost'][1]:.1%} of deltas"
    )
    table = Table("fact", "keys", "delta (norm)", "hash", title=f"{found['facts']} facts")
    for fact in found["fact_list"]:
        table.add_row(escape(fact["id"]), str(fact["keys"]), f"{fact['delta']:.2f}", fact["hash"])
    console.print(table)


@edit_app.command("diff")
def edit_diff(first: File, second: File, as_json: Json = False) -> None:
    """Compare two memory files: settings, and facts that only one of them holds."""
    from ..editing import EditMemory
    from ..experiments.editfiles import diff_memories

    found = diff_memories(EditMemory.load(first), EditMemory.load(second))
    if as_json:
        print_json(found)
        return
    if found["settings"]:
        table = Table("setting", str(first), str(second))
        for key, (one, other) in found["settings"].items():
            table.add_row(key, escape(str(one)), escape(str(other)))
        console.print(table)
    for what, names in (("only in the first", "removed"), ("only in the second", "added"), ("different rows", "changed")):
        if found[names]:
            console.print(f"{what}: {escape(', '.join(found[names]))}")
    console.print(f"{found['same']} facts are the same")


@edit_app.command("verify")
def edit_verify(
    model: Model,
    file: File,
    facts: Annotated[Path | None, typer.Option("--facts", help="facts that the file should hold, JSON Lines")] = None,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Check that an edit file fits its model, acts, and goes away without a trace; exit code 1 where it does not."""
    from ..backbones import load
    from ..experiments.editfiles import verify_edit
    from ..experiments.edits import load_edit
    from ..facts import load_facts

    edit = load_edit(file)
    found = verify_edit(load(model, **load_options_of(load_options)), edit, load_facts(facts) if facts else ())
    if as_json:
        print_json(found)
    else:
        table = Table("check", "result", title=str(file))
        for name, passed in found["checks"].items():
            table.add_row(name, "[green]yes[/]" if passed else "[red]no[/]")
        console.print(table)
        if found.get("missing"):
            console.print(f"not held, or with other texts: {escape(', '.join(found['missing']))}")
        if level := found.get("log-probability"):
            console.print(f"log-probability of the facts: {level['before']:.2f} -> {level['after']:.2f} nats a row")
    if not found["passed"]:
        raise typer.Exit(1)


@edit_app.command("push")
def edit_push(
    file: File,
    repository: Repository,
    base_model: Annotated[
        str | None, typer.Option(help="hub id of the model that the edit is of, OWNER/NAME; for the card")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="make a new repository public; by default it is private")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to push to")] = None,
) -> None:
    """Upload an edit file and a card to the hub; ids and hashes of its facts are in the file, their texts are not."""
    from ..experiments.edithub import push_edit

    address = push_edit(file, repository, base_model=base_model, private=not public, revision=revision)
    console.print(f"{file} is at {escape(address)}", soft_wrap=True)


@edit_app.command("pull")
def edit_pull(
    repository: Repository,
    output: Annotated[Path, typer.Option("-o", "--output", help="edit file to write")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit; by default the newest")] = None,
) -> None:
    """Download an edit file from the hub and check it; nothing is written unless it is one."""
    from ..experiments.edithub import pull_edit

    edit = pull_edit(repository, output, revision=revision)
    console.print(f"{output}: {edit.kind}, alpha {edit.alpha:.3g}, for model {edit.model or 'any'}")


@edit_app.command("tune")
def edit_tune(
    model: Model,
    facts: Facts,
    retain: Annotated[Path, typer.Option("--retain", help="facts to leave alone, of two people or more, JSON Lines")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for tune.json, frontier.png and finished parts")],
    preset: Annotated[
        str, typer.Option(help="of default, ridge, softmax, paper, mean-delta (control); this and below: A,B,...")
    ] = "default",
    layers: Annotated[str | None, typer.Option(help="layers to try; by default all")] = None,
    mu: Annotated[str | None, typer.Option(help="weights of the retain term (default: 10,30,100; ridge: 1,10,100)")] = None,
    ridge: Annotated[str | None, typer.Option(help="ridges (paper: 0.1,1,10)")] = None,
    q: Annotated[str | None, typer.Option(help="shares of keys that may fire at a token")] = None,
    beta: Annotated[str | None, typer.Option(help="inverse temperatures (default: 2,4,8; softmax: 10,20,40)")] = None,
    anchor: Annotated[str | None, typer.Option(help="what anchor states hide: subject, prompt, unknown")] = None,
    unknown: Annotated[list[str] | None, typer.Option(help="name that the model was never taught; several times")] = None,
    reference: Annotated[str | None, typer.Option(help="model that never saw the facts")] = None,
    level: Annotated[
        str, typer.Option(help="to reach: never-trained (the reference's), prompt-masked, or auto: the higher of them")
    ] = "auto",
    retain_budget: Annotated[float, typer.Option(help="retain loss to accept, nats a row")] = 1.0,
    budget: Annotated[int | None, typer.Option(help="settings to measure at most; by default the whole grid")] = None,
    folds: Annotated[int, typer.Option(help="parts that the facts are dealt into, by whole people")] = 2,
    seed: Annotated[int, typer.Option(help="of the split")] = 0,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Choose the settings of an edit memory on retain rows that it never reads; a killed run goes on where it was."""
    from ..experiments.tuning import TuneJob, run_tune
    from ..reporting.frontier import name_of, tune_table

    lists = {"mu": (mu, float), "ridge": (ridge, float), "q": (q, float), "beta": (beta, float), "anchor": (anchor, str)}
    job = TuneJob(
        model,
        facts,
        retain,
        reference=reference,
        level=level,  # type: ignore[arg-type]  # the job checks the name
        presets=_listed("--preset", preset, str),
        layers=None if layers is None else _listed("--layers", layers, int),
        values={name: _listed(f"--{name}", text, kind) for name, (text, kind) in lists.items() if text is not None},
        unknown=tuple(unknown or ()),
        budget=budget,
        retain_budget=retain_budget,
        folds=folds,
        seed=seed,
    )
    record = run_tune(job, out, progress, load_options_of(load_options), shlex.join(["remask", *sys.argv[1:]]))
    if as_json:
        print_json(record)
        return
    console.print(tune_table(record))
    chosen = record["chosen"]
    name, alpha = name_of(chosen["build"]), "calibrated" if chosen["at_level"] else f"{chosen['alpha']:.3g}"
    console.print(f"chosen: [bold]{escape(name)}, alpha {alpha}[/] ({chosen['reason']})")
    progress.print(f"all numbers: {out / 'tune.json'}; picture: {out / 'frontier.png'}")


def _listed(option: str, text: str, kind: type) -> tuple[Any, ...]:
    """The values of a comma list."""
    try:
        return tuple(kind(value.strip()) for value in text.split(","))
    except ValueError:
        raise RemaskError(f"{option} {text!r} is no comma list of numbers; write for example 1,10") from None
