"""What tuning an edit found: the picture of its trade-off, and the settings as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from .numbers import number

MARKS = {
    "default": ("o", "#7f9fc0", "default"),
    "ridge": ("D", "#9aa27c", "ridge"),
    "softmax": ("s", "#83b08b", "softmax"),
    "paper": ("^", "#b79ac8", "paper"),
    "mean-delta": ("x", "#e08e0b", "mean-delta (control)"),
}
CHOSEN = "#c0392b"
TICKS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 200)
Place = tuple[float, float]


def frontier_figure(record: Mapping[str, Any]) -> Figure:
    """Retain loss against the distance to the level: every measured point, the Pareto frontier, the budget, the choice.

    Args:
        record: the content of tune.json.
    """
    figure = Figure(figsize=(8.2, 5.8), layout="constrained")
    axis = figure.subplots()
    _measured(axis, record)
    _frontier(axis, record)
    budget, chosen = record["objective"]["retain_budget"], record["chosen"]
    axis.axvline(0, color="#1f77b4", linewidth=1.0, linestyle="--", zorder=0, label="the level")
    axis.axhline(budget, color="#555555", linewidth=1.0, linestyle=":", zorder=0, label=f"retain budget, {budget:g} nats")
    before = [fold["before"] - fold["level"] for fold in record["settings"][chosen["setting"]]["folds"]]
    start = sum(before) / len(before)
    axis.plot(start, 0, "o", color="#444444", markerfacecolor="white", markersize=9, clip_on=False, zorder=5, label="unedited")
    style: dict[str, Any] = {"color": CHOSEN, "markersize": 16, "markeredgecolor": "white", "clip_on": False, "zorder": 6}
    axis.errorbar(*_place(chosen), yerr=chosen["retain_stderr"], fmt="*", capsize=3, label="chosen", **style)
    _square_roots(axis)
    axis.set_xlabel("facts above the level they are to reach (nats a row; 0 = reached, left of it = below)")
    axis.set_ylabel("retain loss on validation rows (nats a row; down = kept)")
    grid = record["grid"]
    figure.suptitle(f"{record['model']}: {grid['measured']} of {grid['settings']} settings measured", fontsize=11)
    axis.set_title(f"chosen: {name_of(chosen['build'])}; {_outcome(chosen)}", fontsize=9.5, color=CHOSEN)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def tune_table(record: Mapping[str, Any]) -> Table:
    """The measured settings at their calibrated strength, in order of measurement; the chosen one is bold."""
    grid, chosen = record["grid"], record["chosen"]
    table = Table(title=f"{record['model']}: {grid['measured']} of {grid['settings']} settings")
    for column in ("setting", "alpha", "above the\nlevel", "retain\nloss", "±", "selectivity"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for i, setting in enumerate(record["settings"]):
        point = next((point for point in setting["points"] if point["factor"] == 1), None)
        if point is None:
            table.add_row(name_of(setting), *["–"] * 5, style="dim")
            continue
        alpha = f"{point['alpha']:.3g}" + ("" if point["at_level"] else " (level not reached)")
        cells = [number(point[key], 2) for key in ("distance", "retain_loss", "retain_stderr")]
        row = (escape(name_of(setting)), alpha, *cells, number(point["selectivity"], 1))
        table.add_row(*row, style="bold" if i == chosen["setting"] else "")
    return table


def name_of(setting: Mapping[str, Any]) -> str:
    """Preset, layer and what differs from the preset, in a few words."""
    skipped = ("preset", "layer", "unknown", "points", "folds", "alpha")
    changes = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in setting.items()
        if key not in skipped
    ]
    return ", ".join([setting["preset"], f"layer {setting['layer']}", *changes])


def _outcome(chosen: Mapping[str, Any]) -> str:
    distance = "at the level" if chosen["at_level"] else f"{number(chosen['distance'], 2, sign=True)} nats from the level"
    return f"retain loss {number(chosen['retain_loss'], 2)} nats, {distance}"


def _square_roots(axis: Axes) -> None:
    """A square-root axis from 0: a memory's small losses and a control's large ones are both seen."""
    top = axis.get_ylim()[1]
    axis.set_yscale("function", functions=(lambda y: np.sign(y) * np.sqrt(np.abs(y)), lambda y: np.sign(y) * y**2))
    axis.set_ylim(0, top)
    shown: list[float] = [0]
    for tick in TICKS:
        if tick <= top and math.sqrt(tick / top) - math.sqrt(shown[-1] / top) > 0.04:
            shown.append(tick)
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])


def _place(point: Mapping[str, Any]) -> Place:
    return point["distance"], point["retain_loss"]


def _measured(axis: Axes, record: Mapping[str, Any]) -> None:
    """Every point, light; those of one setting are joined, from half of its strength on."""
    named: set[str] = set()
    for setting in record["settings"]:
        marker, colour, label = MARKS[setting["preset"]]
        if not setting["points"]:
            continue
        xs, ys = zip(*map(_place, setting["points"]), strict=True)
        axis.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.45, zorder=1)
        shown = label if setting["preset"] not in named else None
        axis.scatter(xs, ys, marker=marker, s=26, color=colour, alpha=0.75, linewidths=1.3, zorder=2, label=shown)
        named.add(setting["preset"])


def _frontier(axis: Axes, record: Mapping[str, Any]) -> None:
    """The points that no other beats, joined from the deepest to the shallowest."""
    found = []
    for end in record["frontier"]:
        points = record["settings"][end["setting"]]["points"]
        found.append(next(_place(point) for point in points if point["factor"] == end["factor"]))
    xs, ys = zip(*found, strict=True)
    axis.plot(xs, ys, color="#222222", linewidth=1.8, marker="o", markersize=4.5, zorder=4, label="Pareto frontier")
