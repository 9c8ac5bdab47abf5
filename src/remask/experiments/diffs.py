"""`remask audit diff A B`: two audits row by row, refused where they were not measured under one protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RemaskError
from ..evaluation.records import Record, read_records
from ..evaluation.statistics import bootstrap_interval, holm, paired_permutation
from ..evaluation.summary import Scores
from .audits import read_header

SHARED = ("estimator", "draws", "bank", "sampler", "precision")  # what two values must have in common to be subtracted


def diff_audits(first: Path, second: Path) -> dict[str, Any]:
    """Compare two audits row by row: change of every metric of every state, second minus first, with tests.

    Raises:
        RemaskError: one is unfinished or damaged, or they were measured under different protocols; names what differs.
    """
    headers = [read_header(path) for path in (first, second)]
    tables = [Scores(read_records(path / "records.jsonl")) for path in (first, second)]
    _check_protocol(headers, tables)
    lines = []
    for group in tables[0].groups:
        for metric in tables[0].metrics(group):
            for state in tables[0].states:
                line = _compare([table.rows(state, group, metric) for table in tables])
                if line is not None:
                    lines.append({"group": group, "metric": metric, "state": state, **line})
    for line, corrected in zip(lines, holm([line["p"] for line in lines]), strict=True):
        line["p_holm"] = float(corrected)
    names = [
        {"folder": str(p), "model": h["model"], "edit": h["edit"]["name"]}
        for p, h in zip((first, second), headers, strict=True)
    ]
    return {"first": names[0], "second": names[1], "lines": lines}


def _compare(rows: list[dict[str, Record]]) -> dict[str, Any] | None:
    """One metric under one state, seed 0; None where either has none of it."""
    if not rows[0] or not rows[1]:
        return None
    values = [np.array([float(record.value) for record in row.values()]) for row in rows]
    change = values[1] - values[0]
    moved = sorted(zip(change.tolist(), rows[0], strict=True), key=lambda pair: -abs(pair[0]))
    return {
        "n": len(change),
        "first": float(values[0].mean()),
        "second": float(values[1].mean()),
        "change": bootstrap_interval(change).to_dict(),
        "p": paired_permutation(values[1], values[0]).pvalue if len(change) > 1 else 1.0,
        "rows": [{"id": name, "change": value} for value, name in moved],
    }


def _check_protocol(headers: list[dict[str, Any]], tables: list[Scores]) -> None:
    """Refuse to compare what was not measured alike: other benchmark, rows, masks, sampler or arithmetic."""
    names = [header["benchmark"]["name"] for header in headers]
    if names[0] != names[1]:
        raise RemaskError(f"two protocols cannot be compared: benchmark {names[0]!r} against {names[1]!r}")
    for group in tables[0].groups:
        for metric in tables[0].metrics(group):
            for state in tables[0].states:
                rows = [table.rows(state, group, metric) for table in tables]
                if not rows[0] or not rows[1]:
                    continue
                if list(rows[0]) != list(rows[1]):
                    raise RemaskError(f"two protocols cannot be compared: group {group!r} holds other rows")
                sources = [next(iter(row.values())).source for row in rows]
                for field in SHARED:
                    first, second = (getattr(source, field) for source in sources)
                    if first != second:
                        raise RemaskError(
                            f"two protocols cannot be compared: {field} of {metric} in group {group!r} is {_short(first)} "
                            f"against {_short(second)}; run one of them again with the other's settings"
                        )


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else repr(value)
