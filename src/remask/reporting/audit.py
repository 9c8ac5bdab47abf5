"""The page of an audit: what was forgotten, what it cost, and how that was measured, from its results and records alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ..evaluation.records import Record
from ..evaluation.summary import LOGPROB, Scores
from . import plots
from .html import render
from .levels import STYLE, levels
from .numbers import NONE, number, p_value, percent
from .plots import estimate, forget_group, kept_group, scored_groups
from .verdict import row_means, verdict

SHOWN = 15  # rows that stand open; the others are folded away
LISTED = 1000  # rows that a page holds at most; all are in the records
SIDES = {"forget": "should go", "retain": "should stay", "holdout": "never seen"}
GOOD = {"reference": "never-trained level", "higher": "higher", "lower": "lower", "zero": "zero", "none": ""}
DIGITS = {"nats": 2, "share": 2, "percent": 1, "probability": 3}

Texts = Mapping[str, tuple[str, str]]


class Cell(NamedTuple):
    """A number of a table, and what stands small below it."""

    main: str
    small: str = ""


@dataclass(frozen=True)
class RowLine:
    """One row of the benchmark before and after.

    Attributes:
        badness: what rows are sorted by, largest first: nats above the level on the forget side, nats lost on the retain side.
        numbers: as they are shown.
        outputs: generated text before and after; None where none was kept.
        junk: whether the answer after the edit is junk.
    """

    id: str
    group: str
    text: tuple[str, str] | None
    badness: float
    numbers: tuple[str, ...]
    outputs: tuple[str | None, ...]
    junk: bool


def audit_figures(result: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Figure]:
    """Figures of an audit by name; one that nothing was measured for is left out.

    Args:
        result: content of results.json.
        records: of the same audit.
    """
    scores = Scores(records)
    found = {
        "levels": levels(scores) if scored_groups(result) else None,
        "forget_retain": plots.forget_retain(result),
        "truth_ratio": plots.truth_ratio(result, scores),
        "attacks": plots.attacks(result),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def audit_page(
    result: Mapping[str, Any], records: Sequence[Record], figures: Mapping[str, bytes], texts: Texts | None = None
) -> str:
    """One self-contained HTML page.

    Args:
        result: content of results.json.
        records: of the same audit.
        figures: `audit_figures` as PNG.
        texts: row id -> prompt and true answer, which records do not hold.
    """
    scores = Scores(records)
    level = next((state for state in ("never trained", "prompt masked") if state in scores.states), None)
    return render(
        "audit.html.j2",
        result=result,
        figures=figures,
        verdict=verdict(result, scores).replace(" %", "\N{NO-BREAK SPACE}%"),
        reason=(result["edit"]["note"] or "").removeprefix("nothing to forget").lstrip(": "),
        groups=_summary_rows(result),
        monte_carlo=_monte_carlo(result),
        counts=", ".join(f"n = {g['n']} ({g['group']})" for g in scored_groups(result)),
        metric_states=_metric_states(result),
        metrics=_metric_rows(result),
        aggregates=_aggregate_rows(result),
        aggregate_states=_aggregate_states(result),
        attacks=_attack_rows(result),
        level=level,
        sides=[_side(result, scores, level, texts, "forget"), _side(result, scores, level, texts, "retain")],
        shown=SHOWN,
        banks=_banks(records),
        interventions=sorted({record.source.intervention for record in records if record.source.intervention}),
        edits=[_json(edit) for edit in result["edit"]["seeds"]],
        sampler=_json(result["sampler"]),
    )


# ------------------------------------------------------------------ tables
def _summary_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of every group whose log-probability was measured."""
    lines = []
    for group in scored_groups(result):
        level = {s: _cell(estimate(group, LOGPROB, s), 2) for s in STYLE}
        change, control = (estimate(group, LOGPROB, state, "change") for state in ("after", "mean-delta"))
        shares = []
        for metric in ("exact match", "ROUGE-L recall", "junk rate"):
            before, after = (estimate(group, metric, state) for state in ("before", "after"))
            shares.append(f"{before['mean']:.2f} → {after['mean']:.2f}" if before and after else NONE)
        cells = [
            level["before"],
            level["after"],
            _cell(change, 2, sign=True),
            Cell(p_value(change)),
            _cell(control, 2, sign=True),
        ]
        cells += [level["never trained"], level["prompt masked"], *(Cell(share) for share in shares)]
        lines.append({"group": group["group"], "side": SIDES[group["side"]], "n": group["n"], "cells": cells})
    return lines


def _monte_carlo(result: Mapping[str, Any]) -> str | None:
    """The largest Monte-Carlo standard error of a mean in the summary."""
    states = [e for g in scored_groups(result) for e in g["metrics"][LOGPROB]["states"].values()]
    errors = [e["mc_stderr"] for e in states if e.get("mc_stderr") is not None]
    return f"{max(errors):.2g}" if errors else None


def _metric_states(result: Mapping[str, Any]) -> list[str]:
    metrics = [m for group in result["groups"] for name, m in group["metrics"].items() if name != LOGPROB]
    return [state for state in STYLE if any(state in metric["states"] for metric in metrics)]


def _metric_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All metrics but the log-probability, by group."""
    states = _metric_states(result)
    found = []
    for group in result["groups"]:
        lines = []
        for name, metric in group["metrics"].items():
            if name == LOGPROB:
                continue
            digits = DIGITS.get(metric["unit"])
            change = estimate(group, name, "after", "change")
            cells = [_cell(estimate(group, name, state), digits) for state in states]
            cells += [_cell(change, digits, sign=True), Cell(p_value(change))]
            n = max((e["n"] for e in metric["states"].values()), default=0)
            lines.append({"name": name, "unit": metric["unit"], "good": GOOD[metric["good"]], "n": n, "cells": cells})
        if lines:
            found.append({"group": group["group"], "side": SIDES[group["side"]], "lines": lines})
    return found


def _aggregates(result: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Cell], int | None]]:
    """Numbers about the whole audit: name, how to read it, value by state, rows."""
    summary, found = result["summary"], []
    shares = [share for share in summary["gap_closed"] or [] if share is not None]
    if shares:
        seeds = f"seeds: {', '.join(map(percent, shares))}" if len(shares) > 1 else ""
        cell = Cell(percent(sum(shares) / len(shares)), seeds)
        reading = "way from before to never trained; 100 % = reached, more = past it"
        found.append(("gap closed", reading, {"after": cell}, _n(forget_group(result))))
    ratios = {state: _cell(e, 1) for state, e in summary["selectivity"].items()}
    if ratios:
        n = _n(kept_group(result))
        found.append(("selectivity", "nats forgotten for each nat that a retain row changed; higher is better", ratios, n))
    tests = summary["forget_quality"]
    if tests:
        n = max(test["n"] for test in tests.values())
        p = {s: Cell(f"{t['pvalue']:.2g}", f"log10 {number(t['log10'], 1)}") for s, t in tests.items()}
        d = {s: Cell(number(t["statistic"], 3), f"visible from {number(t['critical'], 3)}") for s, t in tests.items()}
        noise = {s: Cell(number(t["noise"], 2), _reliable(t["reliable"])) for s, t in tests.items()}
        found.append(("forget quality, p", "Kolmogorov-Smirnov, against never trained; 1 = not told apart", p, n))
        found.append(
            ("forget quality, D", "distance of the truth ratios' distributions; below the small number n is too small", d, n)
        )
        found.append(("forget quality, noise", "estimator's share of the spread; above 0.1 it can decide the test", noise, n))
    if summary["model_utility"]:
        utility = {state: Cell(number(value, 3)) for state, value in summary["model_utility"].items()}
        found.append(("model utility", "harmonic mean of nine scores; higher is better", utility, None))
    membership = summary["membership"]
    for name in dict.fromkeys(name for line in membership.values() for name in line):
        cells = {s: _cell(line[name], 1 if name == "PrivLeak" else 3) for s, line in membership.items() if name in line}
        reading = "per cent; 0 = as never trained" if name == "PrivLeak" else "0.5 = members are not told from texts never seen"
        n = max(line[name].get("n", 0) for line in membership.values() if name in line)
        found.append((f"membership, {name}", reading, cells, n))
    return found


def _aggregate_states(result: Mapping[str, Any]) -> list[str]:
    rows = _aggregates(result)
    return [state for state in STYLE if any(state in cells for _, _, cells, _ in rows)]


def _aggregate_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    states = _aggregate_states(result)
    return [
        {"name": name, "reading": reading, "n": n or NONE, "cells": [cells.get(state, Cell(NONE)) for state in states]}
        for name, reading, cells, n in _aggregates(result)
    ]


def _attack_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for line in plots.sorted_attacks(result):
        gained = {"mean": line["regained"], "low": line["low"], "high": line["high"]}
        cells = [Cell(number(line[key], 2)) for key in ("before", "after", "never", "known", "known_attacked")]
        cells.append(_cell(gained if line["regained"] is not None else None, 1))
        lines.append({**line, "describe": _parameters(line["describe"]), "cells": cells})
    return lines


# ------------------------------------------------------------------ rows
def _side(result: Mapping[str, Any], scores: Scores, level: str | None, texts: Texts | None, side: str) -> dict[str, Any]:
    """All rows of one side, worst first, and what their table shows."""
    groups = [group["group"] for group in scored_groups(result, side)]
    lines = [line for group in groups for line in _row_lines(scores, group, level, texts or {}, side)]
    lines.sort(key=lambda line: -line.badness)
    listed = lines[:LISTED]
    return {
        "side": side,
        "lines": listed,
        "n": len(lines),
        "several": len(groups) > 1,
        "outputs": any(text is not None for line in listed for text in line.outputs),
        "sorted_by": f"most above {level}"
        if side == "forget" and level
        else "least lost"
        if side == "forget"
        else "largest loss",
        "last": f"above {level}" if side == "forget" and level else "change",
    }


def _row_lines(scores: Scores, group: str, level: str | None, texts: Texts, side: str) -> list[RowLine]:
    before, after = (row_means(scores, state, group, LOGPROB) for state in ("before", "after"))
    floor = row_means(scores, level, group, LOGPROB) if level else {}
    outputs = [scores.rows(state, group, "output") for state in ("before", "after")]
    junk = row_means(scores, "after", group, "junk rate")
    lines = []
    for name in after:
        change = after[name] - before[name] if name in before else float("nan")
        last = change if side == "retain" or not level else after[name] - floor.get(name, float("nan"))
        badness = -last if side == "retain" else last
        numbers = [before.get(name), after[name], *([floor.get(name)] if level else []), last]
        lines.append(
            RowLine(
                name,
                group,
                texts.get(name),
                badness if badness == badness else float("-inf"),  # rows without a level cannot be ranked: last
                tuple(number(x, 2, sign=i == len(numbers) - 1) for i, x in enumerate(numbers)),
                tuple(str(rows[name].value) if name in rows else None for rows in outputs),
                junk.get(name, 0.0) > 0,
            )
        )
    return lines


# ------------------------------------------------------------------ protocol and numbers
def _banks(records: Iterable[Record]) -> dict[str, list[str]]:
    """Hashes of the mask banks by group, one a seed."""
    found: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for record in records:
        if record.metric == LOGPROB and not record.attack and record.source.bank:
            found[record.group].add((record.source.seed, record.source.bank))
    return {group: [bank for _, bank in sorted(pairs)] for group, pairs in found.items()}


def _n(group: Mapping[str, Any] | None) -> int | None:
    return None if group is None else int(group["n"])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parameters(described: Mapping[str, Any]) -> str:
    """Parameters of an attack on one line; its kind is its name or close to it."""
    texts = {name: value if isinstance(value, str) else _json(value) for name, value in described.items() if name != "kind"}
    return ", ".join(f"{name}: {text}" for name, text in texts.items())


def _reliable(value: bool | None) -> str:
    return "not measured" if value is None else "reliable" if value else "can decide the test"


def _cell(e: Mapping[str, Any] | None, digits: int | None, sign: bool = False) -> Cell:
    if e is None or e.get("mean") is None:
        return Cell(NONE)
    small = (
        ""
        if e.get("low") is None or e.get("high") is None
        else f"[{', '.join(number(e[k], digits, sign) for k in ('low', 'high'))}]"
    )
    return Cell(number(e["mean"], digits, sign), small)
