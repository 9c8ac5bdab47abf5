"""`remask audit`: a benchmark x an edit, repeated over seeds, with the never-trained twin and the mean-delta control."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..assets import bundled_models
from ..backbones import Site, load
from ..diffusion.masks import MaskBank
from ..editing.calibrate import Level, target_level
from ..editing.memory import EditMemory
from ..editing.steering import mean_delta
from ..evaluation.audit import SCHEMA, Audit, Scores, run_audit
from ..evaluation.benchmarks.registry import load_benchmark
from .edits import build_edit

DRAWS, REPLICATES = 2, 4


def run_benchmark(
    model: str,
    benchmark: str,
    edit: str,
    data: Path | None,
    *,
    alpha: float | None = None,
    layer: int | None = None,
    reference: str | None = None,
    level: Level = "auto",
    seeds: int = 1,
    known: dict[int, dict[str, Scores]] | None = None,
    console: Console | None = None,
    load_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the edit from the benchmark's forget and fit sets and score it on rows that it never read, `seeds` times.

    A seed sets the mask bank, the partial states and so the calibrated alpha. Greedy answers, the slow part, are generated for
    seed 0 only. `reference` defaults to `<model>-reference` where that is bundled. Pass one `known` dict to several edits of
    the same model and benchmark, and the states that no edit touches are scored once. Model and reference are loaded with
    the same `load_options`.
    """
    options = dict(load_options or {})
    lm = load(model, **options)
    name = reference or (f"{model}-reference" if f"{model}-reference" in bundled_models() else None)
    twin = load(name, **options) if name else None
    groups = load_benchmark(benchmark, data)
    scored = {"forget": groups.forget, **groups.scored}
    runs: list[Audit] = []
    known = {} if known is None else known
    for seed in range(seeds):
        target = target_level(lm, groups.forget, twin, level) if alpha is None else None
        site = Site(layer) if layer is not None else None
        intervention = build_edit(lm, edit, groups.forget, groups.fit, site=site, alpha=alpha, level=target, seed=seed)
        intervention.attach(lm).detach()  # an edit of another model is refused before anything is scored
        control = mean_delta(intervention) if isinstance(intervention, EditMemory) else None
        runs.append(
            run_audit(
                lm,
                intervention,
                scored,
                MaskBank(DRAWS, REPLICATES, seed),
                reference=twin,
                control=control,
                known=known.get(seed),
                text=seed == 0,
                report=_reporter(console, seed),
            )
        )
        states = runs[-1].states
        known[seed] = {key: states[key] for key in ("before", "never trained", "prompt masked") if key in states}
    return {
        "schema": SCHEMA,
        "command": _command(model, benchmark, edit, alpha, layer, reference, level, seeds),
        "benchmark": groups.name,
        "model": lm.name,
        "edit": edit,
        "level": level if alpha is None else None,
        "seeds": seeds,
        "summary": _summary(runs),
        "runs": [run.to_dict() for run in runs],
    }


def _reporter(console: Console | None, seed: int) -> Callable[[str], None]:
    return lambda state: console.print(f"seed {seed}: scoring {state}") if console else None


def _command(
    model: str,
    benchmark: str,
    edit: str,
    alpha: float | None,
    layer: int | None,
    reference: str | None,
    level: Level,
    seeds: int,
) -> str:
    parts = ["remask audit", model, "--benchmark", benchmark, "--edit", edit, "--seeds", str(seeds)]
    parts += ["--data", "DIR"] if benchmark != "closed-world" else []
    chosen = None if level == "auto" else level
    for flag, value in (("--alpha", alpha), ("--layer", layer), ("--reference", reference), ("--level", chosen)):
        parts += [flag, str(value)] if value is not None else []
    return " ".join(parts)


def drop_text(result: dict[str, Any]) -> dict[str, Any]:
    """The result without generated answers in its records."""
    runs = [{**run, "rows": [{k: v for k, v in row.items() if k != "output"} for row in run["rows"]]} for run in result["runs"]]
    return {**result, "runs": runs}


def _summary(runs: list[Audit]) -> dict[str, Any]:
    """Means over seeds; each interval is the first seed's row bootstrap widened to cover every seed's."""
    tables = [run.table() for run in runs]
    groups = []
    for lines in zip(*tables, strict=True):
        line: dict[str, Any] = {"group": lines[0]["group"], "n": lines[0]["n"]}
        for state in (key for key in lines[0] if key not in ("group", "n")):
            entries = [entry[state] for entry in lines]
            line[state] = {m: _merge([entry[m] for entry in entries if m in entry]) for m in entries[0]}
        groups.append(line)
    closed = [run.gap_closed() for run in runs]
    states = [state for state in ("after", "mean-delta") if state in runs[0].states]
    return {
        "groups": groups,
        "gap_closed": None if closed[0] is None else [round(float(value), 4) for value in closed if value is not None],
        "selectivity": {state: _merge([run.selectivity(state) for run in runs]) for state in states},
        "alpha": [run.header["intervention"].get("alpha") for run in runs],
    }


def _merge(estimates: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {
        "mean": float(np.mean([e["mean"] for e in estimates])),
        "low": min(e["low"] for e in estimates),
        "high": max(e["high"] for e in estimates),
        "n": estimates[0]["n"],
        "seeds": [e["mean"] for e in estimates],
    }
    if estimates[0].get("mc_stderr") is not None:
        merged["mc_stderr"] = float(np.mean([e["mc_stderr"] for e in estimates]))
    return merged


def audit_tables(result: dict[str, Any]) -> list[Table | str]:
    """The summary for a terminal: log-probabilities, generations, and what they amount to."""
    summary = result["summary"]
    likelihood = Table(title=f"{result['model']}, {result['benchmark']}, edit {result['edit']}, {result['seeds']} seed(s)")
    for column in ("group", "n", "before", "after", "change [95 %]", "control"):
        likelihood.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    text = Table(title="levels of not knowing, and greedy answers before > after")
    for column in ("group", "never\ntaught", "prompt\nmasked", "exact", "ROUGE-L", "junk"):
        text.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    for line in summary["groups"]:
        change = line["after"]["change"]
        likelihood.add_row(
            line["group"],
            str(line["n"]),
            _mean(line, "before"),
            _mean(line, "after"),
            f"{change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]",
            f"{line['mean-delta']['change']['mean']:+.2f}" if "mean-delta" in line else "-",
        )
        shares = [f"{line['before'][m]['mean']:.2f} > {line['after'][m]['mean']:.2f}" for m in ("exact", "rouge", "junk")]
        text.add_row(line["group"], _mean(line, "never trained"), _mean(line, "prompt masked"), *shares)
    notes = ["Log-probabilities in nats a row; 95 % row-bootstrap intervals; control: mean-delta of equal strength."]
    if summary["gap_closed"] is not None:
        notes.append("Gap to the never-taught level closed: " + ", ".join(f"{v:.0%}" for v in summary["gap_closed"]) + ".")
    for state, value in summary["selectivity"].items():
        notes.append(
            f"Selectivity ({state}): {value['mean']:.1f} [{value['low']:.1f}, {value['high']:.1f}] nats forgotten a retain nat."
        )
    return [likelihood, text, "\n".join(notes)]


def _mean(line: dict[str, Any], state: str) -> str:
    return f"{line[state]['logprob']['mean']:.2f}" if state in line else "-"
