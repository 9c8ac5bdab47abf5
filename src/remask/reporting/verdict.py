"""What an audit amounts to, in plain sentences computed from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..evaluation.statistics import mean_interval
from ..evaluation.summary import LOGPROB, Scores
from .numbers import interval, number, percent, with_p
from .plots import EDIT_OFF, estimate, forget_group, kept_group, scored_groups


def verdict(result: Mapping[str, Any], scores: Scores) -> str:
    """What the numbers amount to, in plain sentences."""
    forget = forget_group(result)
    if forget is None:
        return "No log-probability of a forget row was measured, so nothing can be said about forgetting."
    if result["edit"]["note"]:
        parts = [_nothing(result, forget)]
    else:
        parts = [_forgotten(forget), _gap(result, scores, forget), _cost(result), _selective(result), _junk(result, forget)]
        parts.append(_attacked(result))
    left_out = sum(len(rows) for rows in result["benchmark"]["too_long"].values())
    parts.append(f"Rows too long for the model, and in no number: {left_out}." if left_out else "")
    return " ".join(filter(None, parts))


def _nothing(result: Mapping[str, Any], forget: Mapping[str, Any]) -> str:
    before, never = (estimate(forget, LOGPROB, state) for state in ("before", "never trained"))
    text = "No edit was built, so “after” is the unedited model again and nothing below is an effect of one."
    if before is not None:
        text += f" The model stands at {before['mean']:.2f} nats a forget row"
        text += f", a model that never saw them at {never['mean']:.2f}." if never else "; no never-trained model was given."
    return text


def _forgotten(forget: Mapping[str, Any]) -> str:
    before, after = (estimate(forget, LOGPROB, state) for state in ("before", "after"))
    change = estimate(forget, LOGPROB, "after", "change")
    if before is None or after is None or change is None:
        return "The forget rows were not scored both before and after the edit."
    if not change["mean"]:
        return f"The log-probability of the {forget['n']} forget answers did not change on average ({before['mean']:.2f} nats)."
    verb = "fell" if change["mean"] < 0 else "rose"
    return (
        f"The log-probability of the {forget['n']} forget answers {verb} from {before['mean']:.2f} to {after['mean']:.2f} nats "
        f"a row, a change of {interval(change, 2, sign=True)}{with_p(change)}."
    )


def _gap(result: Mapping[str, Any], scores: Scores, forget: Mapping[str, Any]) -> str:
    """Where the forget rows stand against the never-trained level."""
    after, never, masked = (
        row_means(scores, state, forget["group"], LOGPROB) for state in ("after", "never trained", "prompt masked")
    )
    if not never:
        text = "No never-trained model was given, so the level that forgetting should reach is unknown."
        over = _difference(after, masked)
        return text + (f" The rows are now {_above(over)} what the model says without seeing the question." if over else "")
    shares = [share for share in result["summary"]["gap_closed"] or [] if share is not None]
    start, goal = (estimate(forget, LOGPROB, state) for state in ("before", "never trained"))
    text = ""
    if start and goal and start["mean"] <= goal["mean"]:  # a share of no way, or of the wrong one, says nothing
        text = "Before the edit they already stood at or below the level of a model that never saw them. "
    elif shares:
        spread = f" (seeds: {percent(min(shares))} to {percent(max(shares))})" if len(shares) > 1 else ""
        text = f"That is {percent(sum(shares) / len(shares))} of the way to a model that never saw them{spread}. "
    over = _difference(after, never)
    if over is None:
        return text.strip()
    meaning = "which is not told apart from it"
    if over["low"] > 0:
        meaning = "so the true answers are still likelier than to a model that never saw them"
    elif over["high"] < 0:
        meaning = "which is over-forgetting: detectable, and no success"
    return f"{text}The rows are now {_above(over)} the never-trained level, {meaning}."


def _cost(result: Mapping[str, Any]) -> str:
    changes = [(g, estimate(g, LOGPROB, "after", "change")) for g in scored_groups(result, "retain")]
    known = sorted(((g, e) for g, e in changes if e is not None), key=lambda pair: float(pair[1]["mean"]))
    if not known:
        return "No rows that should stay were scored, so what it cost is unknown."
    kept = kept_group(result)
    named = [pair for pair in known if pair[0] is kept][:1]
    named += [pair for pair in known if pair[0] is not kept][: 3 - len(named)]
    parts = [f"{g['group']} {interval(e, 2, sign=True)}{with_p(e)}" for g, e in named]
    more = (
        f" ({len(known) - len(named)} more groups that should stay changed less for the worse)"
        if len(known) > len(named)
        else ""
    )
    return f"Change on what should stay, nats a row: {'; '.join(parts)}{more}."


def _selective(result: Mapping[str, Any]) -> str:
    found = result["summary"]["selectivity"]
    if "after" not in found or found["after"]["mean"] is None:
        return "Selectivity is unknown: no retain row was scored, or none changed."
    text = f"For each nat that a retain row changed, {interval(found['after'], 1)} were forgotten"
    control = found.get("mean-delta")
    if control is None or control["mean"] is None:
        return f"{text}; no mean-delta control was measured to compare with."
    return f"{text}; the mean-delta control, one vector of the same strength, manages {interval(control, 1)}."


def _junk(result: Mapping[str, Any], forget: Mapping[str, Any]) -> str:
    parts = []
    for group in (forget, kept_group(result)):
        before, after = (estimate(group, "junk rate", state) for state in ("before", "after"))
        if group is not None and before and after:
            parts.append(f"{percent(after['mean'])} of the {group['group']} answers (before: {percent(before['mean'])})")
    if not parts:
        return "No answers were generated, so whether they turn to junk is unknown."
    return f"Junk answers after the edit: {', '.join(parts)}."


def _attacked(result: Mapping[str, Any]) -> str:
    lines = [line for line in result["attacks"] if line["attack"] != EDIT_OFF]
    if not lines:
        return "No attacks were run."
    measured = [line for line in lines if line["regained"] is not None]
    if not measured:
        return "No attack could be measured."
    best = max(measured, key=lambda line: line["low"])  # the surest gain, not the widest interval
    mean, low, high = (number(best[key], 0) for key in ("regained", "low", "high"))
    return f"The strongest attack ({best['attack']}) regains {mean} % [{low}, {high}] of what was forgotten."


def _difference(rows: Mapping[str, float], level: Mapping[str, float]) -> dict[str, Any] | None:
    shared = [rows[name] - level[name] for name in rows if name in level]
    return mean_interval(shared).to_dict() if shared else None


def _above(e: Mapping[str, Any]) -> str:
    if e["mean"] >= 0:
        return f"{interval(e, 2)} nats above"
    return f"{interval({'mean': -e['mean'], 'low': -e['high'], 'high': -e['low']}, 2)} nats below"


def row_means(scores: Scores, state: str, group: str, metric: str) -> dict[str, float]:
    """Mean over seeds by row id; {} where nothing was measured."""
    table = scores.table(state, group, metric)
    return dict(zip(scores.rows(state, group, metric), table.mean(axis=0).tolist(), strict=True)) if table.size else {}
