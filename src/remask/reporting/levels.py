"""The picture of an audit: where each group's log-probability stands in every state of the model."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

from ..evaluation.summary import LOGPROB, Scores, estimate

matplotlib.use("Agg", force=False)
STYLE = {
    "before": ("o", "#444444", "before"),
    "after": ("D", "#c0392b", "after the edit"),
    "never trained": ("|", "#1f77b4", "never trained"),
    "mean-delta": ("x", "#e08e0b", "mean-delta control, equal strength"),
    "prompt masked": (".", "#999999", "prompt masked"),
}


def levels(scores: Scores) -> Figure:
    """Mean answer log-probability a row with its 95 % interval, one line a group, one mark a state."""
    groups = [group for group in scores.groups if scores.table("before", group, LOGPROB).size]
    figure = Figure(figsize=(8.2, 0.62 * len(groups) + 1.5), layout="constrained")
    axis = figure.subplots()
    for state, (marker, colour, label) in STYLE.items():
        if state not in scores.states:
            continue
        estimates = [estimate(scores.table(state, group, LOGPROB)) for group in groups]
        y = [len(groups) - 1 - i + (0.12 if state == "mean-delta" else 0.0) for i in range(len(groups))]
        means = [e["mean"] for e in estimates]
        if state in ("before", "after"):
            spread = [[e["mean"] - e["low"] for e in estimates], [e["high"] - e["mean"] for e in estimates]]
            axis.errorbar(means, y, xerr=spread, fmt="none", ecolor=colour, elinewidth=1.2, alpha=0.6)
        size = 260 if marker == "|" else 46
        axis.scatter(means, y, marker=marker, s=size, color=colour, label=label, zorder=3, linewidths=2)
    axis.set_yticks(range(len(groups)), [f"{g} ({scores.table('before', g, LOGPROB).shape[1]})" for g in reversed(groups)])
    axis.set_ylim(-0.6, len(groups) - 0.4)
    axis.set_xlabel("log-probability of the true answer (nats a row, higher = known)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22 if len(groups) > 3 else -0.35), ncols=3, frameon=False)
    return figure
