"""An audit and a comparison of two as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from ..evaluation.summary import LOGPROB
from ..tracing.plots import plural
from .numbers import interval


def group_tables(lines: list[dict[str, Any]], title: str) -> list[Table]:
    """Log-probabilities, and what generations and the levels of not knowing say, a line each group."""
    likelihood, text = Table(title=title), Table(title="levels of not knowing, and greedy answers before > after")
    for table, columns in (
        (likelihood, ("group", "n", "before", "after", "change [95 %]", "control")),
        (text, ("group", "never\ntaught", "prompt\nmasked", "exact", "ROUGE-L", "junk")),
    ):
        for column in columns:
            table.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    for line in lines:
        if LOGPROB not in line["metrics"] or "after" not in line["metrics"][LOGPROB]["change"]:
            continue
        score = line["metrics"][LOGPROB]
        control = score["change"].get("mean-delta")
        likelihood.add_row(
            line["group"],
            str(line["n"]),
            _mean(score, "before"),
            _mean(score, "after"),
            interval(score["change"]["after"], 2, sign=True),
            "-" if control is None else f"{control['mean']:+.2f}",
        )
        shares = [_arrow(line["metrics"].get(metric)) for metric in ("exact match", "ROUGE-L recall", "junk rate")]
        text.add_row(line["group"], _mean(score, "never trained"), _mean(score, "prompt masked"), *shares)
    return [likelihood, text]


def audit_tables(result: dict[str, Any]) -> list[Table | str]:
    """The summary for a terminal: log-probabilities, generations, attacks, and what they amount to."""
    summary, edit = result["summary"], result["edit"]
    title = f"{result['model']['name']}, {result['benchmark']['name']}, edit {edit['name']}, {len(edit['seeds'])} seed(s)"
    tests = result["tests"]
    parts: list[Table | str] = [*group_tables(result["groups"], title)]
    if result["attacks"]:
        parts.append(_attack_rows(result["attacks"]))
        parts += _unmeasured(result["attacks"])
    notes = [f"Log-probabilities in nats a row; {tests['interval']}; control: mean-delta of equal strength."]
    if edit["note"]:
        notes.insert(0, f"[bold]The model does not know the forget set: {edit['note']}. No edit was built.[/]")
    for group, rows in result["benchmark"]["too_long"].items():
        named = ", ".join(rows[:2]) + (", ..." if len(rows) > 2 else "")
        notes.append(f"Left out, longer than the model's context: {len(rows)} of {group} ({named}).")
    closed = [share for share in summary["gap_closed"] or () if share is not None]
    if closed:
        notes.append("Gap to the never-taught level closed: " + ", ".join(f"{share:.0%}" for share in closed) + ".")
    for state, value in summary["selectivity"].items():
        notes.append(
            f"Selectivity ({state}): {value['mean']:.1f} [{value['low']:.1f}, {value['high']:.1f}] nats forgotten a retain nat."
        )
    for state, quality in summary["forget_quality"].items():
        notes.append(
            f"Forget quality ({state}): KS p {quality['pvalue']:.2g}, D {quality['statistic']:.3f} (smallest that "
            f"n = {quality['n']} shows at 5 %: {quality['critical']:.3f})."
        )
    if summary["model_utility"]:
        notes.append(
            "Model utility: " + ", ".join(f"{state} {value:.3f}" for state, value in summary["model_utility"].items()) + "."
        )
    return [*parts, "\n".join(notes)]


def _attack_rows(lines: list[dict[str, Any]]) -> Table:
    table = Table(title="what attacks regain of what was forgotten (nats a row, or share of the text)", box=box.SIMPLE_HEAD)
    for column in ("attack", "before", "after", "floor", "regained [95 %]"):
        table.add_column(column, justify="left" if column == "attack" else "right", no_wrap=column != "attack")
    for line in lines:
        digits = 1 if line["measure"] == LOGPROB else 2
        levels = ["-" if line[key] is None else f"{line[key]:.{digits}f}" for key in ("before", "after", "never")]
        gained = "-" if line["regained"] is None else interval({"mean": line["regained"], **line}, 0, unit=" %")
        total = line["n"] + len(line["left_out"])
        count = str(line["n"]) if not line["left_out"] else f"{line['n']} of {total}"
        table.add_row(f"{line['attack']} ({count})", *levels, gained)
    return table


def _unmeasured(lines: list[dict[str, Any]]) -> list[Table | str]:
    """Why attacks have no number, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if line["note"]:
            reasons.setdefault(line["note"], []).append(line["attack"])
    return [f"Not measurable, {note}: {', '.join(names)}." for note, names in reasons.items()]


def diff_tables(result: dict[str, Any], worst: int = 5) -> list[Table]:
    """The comparison for a terminal: every metric, and the rows that moved most in log-probability."""
    table = Table(title=f"{result['second']['folder']} minus {result['first']['folder']}")
    for column in ("group", "metric", "state", "n", "first", "second", "change [95 %]", "p (Holm)"):
        table.add_column(column, justify="left" if column in ("group", "metric", "state") else "right")
    rows = Table("group", "state", "row", "change (nats)", title=f"rows that moved most, {LOGPROB}")
    for line in result["lines"]:
        change = line["change"]
        interval = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        cells = [line["group"], line["metric"], line["state"], str(line["n"]), f"{line['first']:.3f}", f"{line['second']:.3f}"]
        table.add_row(*cells, interval, f"{line['p_holm']:.4f}")
        for row in line["rows"][:worst] if line["metric"] == LOGPROB else []:
            if row["change"]:
                rows.add_row(line["group"], line["state"], row["id"], f"{row['change']:+.2f}")
    return [table, rows] if rows.row_count else [table]


def _mean(score: dict[str, Any], state: str) -> str:
    return f"{score['states'][state]['mean']:.2f}" if state in score["states"] else "-"


def _arrow(metric: dict[str, Any] | None) -> str:
    if metric is None or "after" not in metric["states"]:
        return "-"
    return f"{metric['states']['before']['mean']:.2f} > {metric['states']['after']['mean']:.2f}"


def trace_tables(record: dict[str, Any]) -> list[Table | str]:
    """A trace's chosen site, how sure the choice is, and what was left out."""
    ran, best = record["trace"], record["strongest"]
    table = Table(
        "site",
        "wins in resamples",
        title=f"{ran['model']}: {plural(ran['facts'], 'fact')}, {plural(ran['draws'], 'draw')}, {ran['mode']}",
    )
    for line in record["stability"][:5]:
        table.add_row(f"{line['module']} at layer {line['layer']}", f"{line['share']:.0%}")
    notes = [
        f"Chosen site: {record['module']} at layer {record['layer']}; strongest of all: {best['module']} at layer "
        f"{best['layer']}, restored at step {best['step']} ({best['effect']:+.2f} nats)."
    ]
    if ran["asked"] < ran["given"]:
        notes.append(f"The first {ran['asked']} of the {ran['given']} facts given (--limit).")
    for what, names in (
        ("whose object the model does not produce; --keep-unknown traces them", record["unknown"]),
        ("for the reasons in site.json", list(record["skipped"])),
    ):
        if names:
            notes.append(f"Left out: {len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}).")
    if record["capped"]:
        notes.append(f"{len(record['capped'])} rows have fewer than {ran['steps']} tokens and so fewer steps, one a token.")
    if ran["mode"] == "sweep":
        notes.append(f"[bold]Another estimand[/]: {ran['estimand']}.")
    return [table, *notes]
