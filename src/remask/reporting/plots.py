"""The pictures of an audit beside its levels: drawn from its results and, where single rows are shown, from its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.summary import LOGPROB, Scores
from .levels import STYLE

EDIT_OFF = "edit off"  # the control among the attacks: taking the edit away regains everything
# Where states coincide, as they do after an edit that does nothing, larger hollow marks stay visible around the smaller ones.
NESTED = {
    "prompt masked": ("s", 17.0),
    "never trained": ("o", 13.0),
    "before": ("o", 8.5),
    "after": ("D", 5.0),
    "mean-delta": ("x", 8.0),
}
LINES = {"before": ":", "after": "-", "never trained": "--"}
NARROWEST = 1.0  # nats: an axis never shows less, so that noise does not look like an effect
BOX = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
WIDEST = (-100.0, 250.0)  # per cent: a bar or whisker that goes further is cut; its numbers stand beside it


# ------------------------------------------------------------------ reading results
def estimate(group: Mapping[str, Any] | None, metric: str, state: str, part: str = "states") -> dict[str, Any] | None:
    """The estimate of a metric under a state (`part="change"`: of its change against before); None where there is no number."""
    found = {} if group is None else group["metrics"].get(metric, {}).get(part, {}).get(state)
    return found if found and found["mean"] is not None else None


def scored_groups(result: Mapping[str, Any], *sides: str) -> list[dict[str, Any]]:
    """Groups of these sides (none = all) whose log-probability was measured, in order."""
    return [g for g in result["groups"] if LOGPROB in g["metrics"] and (not sides or g["side"] in sides)]


def forget_group(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The forget set itself, not another wording of it."""
    groups = scored_groups(result, "forget")
    return next((g for g in groups if g["group"] == "forget"), groups[0] if groups else None)


def kept_group(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """What selectivity is measured against, the group `retain`; without one the largest group that should stay."""
    groups = scored_groups(result, "retain")
    return next((g for g in groups if g["group"] == "retain"), max(groups, key=lambda g: g["n"], default=None))


# ------------------------------------------------------------------ figures
def forget_retain(result: Mapping[str, Any]) -> Figure | None:
    """Forget against retain log-probability, one point a state; None unless both sides were scored before and after."""
    forget, kept = forget_group(result), kept_group(result)
    points = {s: (estimate(forget, LOGPROB, s), estimate(kept, LOGPROB, s)) for s in NESTED}
    points = {state: pair for state, pair in points.items() if pair[0] and pair[1]}
    if forget is None or kept is None or not {"before", "after"} <= set(points):
        return None
    figure = Figure(figsize=(7.6, 5.8), layout="constrained")
    axis = figure.subplots()
    start = _place(points["before"])
    goal = "never trained" in points
    if goal:
        axis.axvline(
            _place(points["never trained"])[0], color=STYLE["never trained"][1], linewidth=0.9, linestyle="--", zorder=0
        )
    axis.axhline(start[1], color=STYLE["before"][1], linewidth=0.9, linestyle=":", zorder=0)
    for state in ("after", "mean-delta"):
        if state in points and _place(points[state]) != start:
            style = {"arrowstyle": "-|>", "color": STYLE[state][1], "alpha": 0.55, "shrinkA": 7, "shrinkB": 6, "linewidth": 1.3}
            axis.annotate("", xy=_place(points[state]), xytext=start, arrowprops=style, zorder=1)
    for state, pair in points.items():
        _point(axis, state, pair)
    _widen(axis)
    if goal:
        place = _place(points["never trained"])
        axis.annotate("goal", place, (11, 11), textcoords="offset points", color=STYLE["never trained"][1], fontweight="bold")
    axis.set_xlabel(f"log-probability of “{forget['group']}” (nats a row; left = forgotten)")
    axis.set_ylabel(f"log-probability of “{kept['group']}” (nats a row; up = kept)")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def truth_ratio(result: Mapping[str, Any], scores: Scores) -> Figure | None:
    """Distribution of log10 truth ratios of the forget rows, one curve a state; None with fewer than two states.

    The vertical bar is the Kolmogorov-Smirnov distance between after and never trained, where it is largest.
    """
    samples = log_truth_ratios(scores, _forget_name(result))
    if len(samples) < 2:
        return None
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axis = figure.subplots()
    for state, values in samples.items():
        _, colour, label = STYLE[state]
        axis.ecdf(values, color=colour, linestyle=LINES[state], linewidth=1.9, label=f"{label} (n = {len(values)})")
    axis.axvline(0, color="#999999", linewidth=0.8, zorder=0)
    if {"after", "never trained"} <= set(samples):
        place, low, high = largest_gap(samples["after"], samples["never trained"])
        axis.plot(
            [place, place], [low, high], color="black", linewidth=3.2, solid_capstyle="butt", label="KS distance", zorder=4
        )
        text = f"D = {high - low:.3f}"
        axis.annotate(text, (place, (low + high) / 2), (8, 0), textcoords="offset points", va="center", bbox=BOX, zorder=5)
        axis.set_title(_test_of(result, high - low), fontsize=10.5)
    axis.set_xlabel("log10 of the truth ratio (left of 0: the true answer is the likelier one)")
    axis.set_ylabel("share of forget rows at or below")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def attacks(result: Mapping[str, Any]) -> Figure | None:
    """What each attack regains of what was forgotten, largest first; None without attacks."""
    lines = sorted_attacks(result)
    if not lines:
        return None
    figure = Figure(figsize=(8.2, 0.42 * len(lines) + 1.5), layout="constrained")
    axis = figure.subplots()
    edge = axis.get_yaxis_transform()
    for y, line in zip(range(len(lines))[::-1], lines, strict=True):
        value = line["regained"]
        if value is None:
            note = line["note"] or "not measured"
            short = note if len(note) <= 60 else note[:57].rstrip() + "..."
            style: dict[str, Any] = {"color": "#8a8a8a", "va": "center", "fontsize": 8.5, "style": "italic", "bbox": BOX}
            axis.text(0.02, y, short, transform=edge, **style)
            continue
        axis.barh(y, value, height=0.62, color="#9a9a9a" if line["attack"] == EDIT_OFF else "#c0392b", alpha=0.85)
        known = line["low"] is not None and line["high"] is not None
        if known:
            spread = np.abs([[value - line["low"]], [line["high"] - value]])
            axis.errorbar(value, y, xerr=spread, fmt="none", ecolor="#222222", elinewidth=1.2, capsize=3)
        label = f"{value:.0f} %" + (f" [{line['low']:.0f}, {line['high']:.0f}]" if known else "")
        axis.text(1.015, y, label, transform=edge, va="center", fontsize=9)
    axis.axvline(0, color="black", linewidth=1.0)
    axis.axvline(100, color="#555555", linewidth=1.2, linestyle="--")
    axis.annotate(
        "edit off", (100, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", fontsize=9
    )
    axis.set_yticks(range(len(lines))[::-1], [f"{line['attack']} ({line['n']})" for line in lines])
    for tick, line in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_color("#8a8a8a" if line["regained"] is None else "black")
    axis.set_ylim(-0.6, len(lines) - 0.4)
    axis.set_xlim(*_reach(lines))
    axis.set_xlabel("regained of what was forgotten (%)")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    return figure


# ------------------------------------------------------------------ parts of them
def log_truth_ratios(scores: Scores, group: str) -> dict[str, np.ndarray]:
    """Sorted log10 truth ratios by state, as the test takes them: the geometric mean over the bank's replicates."""
    found = {}
    for state in LINES:
        rows = scores.rows(state, group, "truth ratio").values()
        ratios = [np.array(row.replicates or [row.value], dtype=float) for row in rows]
        logs = [np.log10(r).mean() for r in ratios if (r > 0).all() and np.isfinite(r).all()]
        if logs:
            found[state] = np.sort(logs)
    return found


def largest_gap(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Where two empirical distribution functions are furthest apart: the place, and the smaller and larger of the two there.

    The functions are constant up to the next point of either sample, so the middle of that stretch is given: a bar there does
    not lie on top of a step.
    """
    points = np.unique(np.concatenate([first, second]))
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (first, second)]
    i = int(np.argmax(np.abs(shares[0] - shares[1])))
    place = points[i] if i + 1 == len(points) else (points[i] + points[i + 1]) / 2
    low, high = sorted((float(shares[0][i]), float(shares[1][i])))
    return float(place), low, high


def sorted_attacks(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measured attacks, the strongest first; then the removal of the edit, if it is listed; then those without a number."""

    def rank(line: Mapping[str, Any]) -> tuple[int, float]:
        if line["regained"] is None:
            return 2, 0.0
        return int(line["attack"] == EDIT_OFF), -line["regained"]

    return sorted(result["attacks"], key=rank)


def _forget_name(result: Mapping[str, Any]) -> str:
    group = forget_group(result)
    return "forget" if group is None else str(group["group"])


def _spread(e: Mapping[str, Any]) -> tuple[float, float]:
    """Lengths of the two whiskers; 0 where there is no interval."""
    low, high = (e["mean"] if e[key] is None else e[key] for key in ("low", "high"))
    return max(0.0, e["mean"] - low), max(0.0, high - e["mean"])


def _place(pair: tuple[Any, Any]) -> tuple[float, float]:
    return pair[0]["mean"], pair[1]["mean"]


def _point(axis: Axes, state: str, pair: tuple[Any, Any]) -> None:
    """One state with both intervals; hollow marks, so that what lies below is seen."""
    _, colour, label = STYLE[state]
    marker, size = NESTED[state]
    x, y = _place(pair)
    axis.errorbar(
        x,
        y,
        xerr=np.array([_spread(pair[0])]).T,
        yerr=np.array([_spread(pair[1])]).T,
        fmt=marker,
        color=colour,
        markersize=size,
        markerfacecolor=colour if state == "after" else "none",
        markeredgewidth=2,
        elinewidth=1.2,
        zorder=5 if state == "mean-delta" else 3,
        label=f"{label} (goal)" if state == "never trained" else label,
    )


def _widen(axis: Axes) -> None:
    for get, set_ in ((axis.get_xlim, axis.set_xlim), (axis.get_ylim, axis.set_ylim)):
        low, high = get()
        extra = max(0.08 * (high - low), (NARROWEST - (high - low)) / 2)
        set_(low - extra, high + extra)


def _test_of(result: Mapping[str, Any], distance: float) -> str:
    quality = result["summary"]["forget_quality"].get("after")
    title = f"Kolmogorov-Smirnov, after against never trained: D = {distance:.3f}"
    if not quality:
        return title
    critical = quality["critical"]
    seen = "no D" if critical is None else f"D of at least {critical:.3f}"
    return f"{title}, p = {quality['pvalue']:.2g}\nn = {quality['n']} questions can show {seen} at 5 %"


def _reach(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Limits that show 0, 100 and every whisker, within reason."""
    ends = [line[key] for line in lines for key in ("regained", "low", "high") if line["regained"] is not None]
    numbers = [float(end) for end in ends if end is not None]
    return max(WIDEST[0], min([-4.0, *(n - 4 for n in numbers)])), min(WIDEST[1], max([108.0, *(n + 6 for n in numbers)]))
