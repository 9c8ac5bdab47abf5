"""Figures of the unlearning diagnostics. KL is in nats a masked token and never below 0: its colours and axes start there."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..errors import RemaskError
from ..tracing.plots import NO_DATA, STEP, TINY, plural
from ..unlearning.diagnostics.convergence import BINS, QUANTILES, ByNoise, Convergence, Spread
from ..unlearning.diagnostics.trajectory import Trajectory

KL = "KL from the anchor (nats a masked token)"
NOISE = "noise level t: share of the answer that is masked\n(in brackets: rows with such masks)"
BIN_NAMES = tuple(f"{low:g}–{high:g}" for low, high in BINS)
COLOURS = ("#c0392b", "#1f77b4", "#e08e0b", "#2c7a4b", "#7b4ea3")
MARKS = ("o", "D", "s", "^", "v")
WRONG, BEHIND = "#c0392b", "#8a8a8a"
NARROWEST = 0.1  # nats: a scale never shows less, so that rounding does not look like a signal
LONGEST = 14  # characters of a token that are shown


# ------------------------------------------------------------------ D1
def trajectory_map(found: Trajectory) -> Figure:
    """KL from the anchor, step x position, with the committed tokens below; its value at commit above, its mean to the right.

    Grey cells: committed; framed: the step that commits the position. Tokens in red are not the gold ones, those behind the
    gold answer are grey.
    """
    steps, length = found.kl.shape
    width, height = min(max(0.3 * length, 2.6), 14.0), min(max(0.26 * steps, 1.4), 7.0)
    figure = Figure(figsize=(max(width + 3.4, 7.0), height + 3.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[width, 1.7], height_ratios=[1.1, height])
    middle = figure.add_subplot(grid[1, 0])
    above, right = figure.add_subplot(grid[0, 0], sharex=middle), figure.add_subplot(grid[1, 1], sharey=middle)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=NO_DATA)
    top = max(float(np.nanmax(found.kl)), NARROWEST)
    image = middle.imshow(
        np.ma.masked_invalid(found.kl), cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
    )
    for position, step in enumerate(found.commit):
        middle.add_patch(Rectangle((position - 0.5, step - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.6))
        middle.add_patch(Rectangle((position - 0.5, step - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=0.7))
    middle.set_ylabel(STEP)
    middle.set_yticks(range(0, steps, -(-steps // 20)))
    _token_ticks(middle, found)
    above.bar(range(length), found.at_commit, color="#555555", width=0.7)
    above.set_ylabel("at commit\n(nats)", fontsize=TINY)
    above.tick_params(axis="x", labelbottom=False)
    right.plot(found.masked_mean, range(steps), color="#555555", marker="o", markersize=3.5, linewidth=1.5)
    right.set_xlabel("mean over masked\npositions (nats)", fontsize=TINY)
    right.tick_params(axis="y", labelleft=False)
    right.set_xlim(0, max(1.08 * float(found.masked_mean.max()), NARROWEST))
    above.set_ylim(0, max(1.08 * float(found.at_commit.max()), NARROWEST))
    for axis in (above, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.colorbar(image, ax=[middle, right], label=KL.replace(" (", "\n("), pad=0.02)
    about = f"{found.mode} trajectory of “{found.id}”, tau {found.tau:g}"
    _title(
        figure,
        [
            "KL from the anchor along denoising",
            about,
            "grey: committed; framed: the step of the commit; tokens " + _wrong(found),
        ],
    )
    return figure


def _wrong(found: Trajectory) -> str:
    scored = [a == b for a, b in zip(found.ids, found.gold, strict=True) if b is not None]
    return f"in red: not gold ({scored.count(False)} of {len(scored)})"


def _token_ticks(axis: Axes, found: Trajectory) -> None:
    """The committed tokens below their columns, red where they are not gold."""
    stride = -(-len(found.ids) // 64)
    places = range(0, len(found.ids), stride)
    texts = [_shown(found.tokens[i]) for i in places]
    axis.set_xticks(places, texts, rotation=60, ha="right", rotation_mode="anchor", fontsize=TINY, parse_math=False)
    for i, label in zip(places, axis.get_xticklabels(), strict=True):
        label.set_color(BEHIND if found.gold[i] is None else "black" if found.ids[i] == found.gold[i] else WRONG)
    axis.set_xlabel("committed token, by answer position")


def _shown(token: str) -> str:
    """A token without outer blanks; control characters in a form that shows."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token.strip(" ")) or repr(token)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


# ------------------------------------------------------------------ D2
def convergence_curves(curves: Mapping[str, Mapping[int | str, Convergence]], label: str = "training step") -> Figure:
    """KL from the anchor over training, one line a set of rows, one panel for all noise levels and one for each bin.

    Bands hold 80 % and 50 % of the rows; lines are means.

    Args:
        curves: name of the set ("forget", "retain") -> step, or name of a state, -> its measurement.
        label: of the x axis.

    Raises:
        RemaskError: nothing to draw.
    """
    _check(curves)
    figure = Figure(figsize=(10.6, 6.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    for number, axis in enumerate(axes):
        spreads = {name: [_spread(point, number) for point in points.values()] for name, points in curves.items()}
        rows = " / ".join(str(line[0].rows) for line in spreads.values())
        axis.set_title(
            f"all noise levels ({rows} rows)" if number == 0 else f"t in {BIN_NAMES[number - 1]} ({rows})", fontsize=10
        )
        for place, (name, line) in enumerate(spreads.items()):
            _line(axis, _places(curves[name]), line, place, name)
        _ticks_of(axis, curves)
        axis.grid(alpha=0.25)
        if number % 3 == 0:
            axis.set_ylabel("KL from the anchor\n(nats a masked token)")
        if number >= 3:
            axis.set_xlabel(label)
    axes[0].set_ylim(bottom=0)
    _finish(figure, axes[0], ["Convergence to the anchor on a fixed bank", *_about(curves)])
    return figure


def _spread(point: Convergence, panel: int) -> Spread:
    """Of all noise levels (panel 0), or of one bin."""
    return point.kl.overall if panel == 0 else point.kl.bins[panel - 1]


def _places(points: Mapping[int | str, Convergence]) -> list[float]:
    """Steps as they are; named states side by side."""
    return [float(key) if isinstance(key, int) else float(i) for i, key in enumerate(points)]


def _ticks_of(axis: Axes, curves: Mapping[str, Mapping[int | str, Convergence]]) -> None:
    names = max((list(points) for points in curves.values()), key=len)
    if any(isinstance(name, str) for name in names):
        axis.set_xticks(range(len(names)), [str(name) for name in names], parse_math=False)
        axis.set_xlim(-0.4, len(names) - 0.6)


# ------------------------------------------------------------------ D3
def signal_map(found: Mapping[str, Convergence]) -> Figure:
    """By noise level: E[KL | t], the signal that the anchor gives, and the leakage p_u(gold), what the anchor itself says.

    Args:
        found: name of a set of rows -> its measurement.

    Raises:
        RemaskError: nothing to draw.
    """
    _check(found)
    figure = Figure(figsize=(10.6, 4.6), layout="constrained")
    panels = ("kl", "leakage", "leakage_logprob")
    for axis, panel in zip(figure.subplots(1, 3), panels, strict=True):
        for place, (name, point) in enumerate(found.items()):
            quantity: ByNoise = getattr(point, panel)
            _line(axis, [float(i) for i in range(len(BINS))], quantity.bins, place, name)
        rows = [" / ".join(str(point.kl.bins[i].rows) for point in found.values()) for i in range(len(BINS))]
        axis.set_xticks(range(len(BINS)), [f"{name}\n({count})" for name, count in zip(BIN_NAMES, rows, strict=True)])
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlim(-0.4, len(BINS) - 0.6)
        axis.set_xlabel(NOISE, fontsize=TINY)
        axis.grid(alpha=0.25)
    first, second, third = figure.axes
    first.set_ylim(bottom=0)
    first.set_title("signal: E[KL | t]", fontsize=10.5)
    first.set_ylabel(KL)
    second.set_ylim(-0.03, 1.03)
    second.set_title("leakage: anchor's p(gold)", fontsize=10.5)
    second.set_ylabel("probability of a masked gold token")
    third.set_title("leakage: anchor's log p(gold)", fontsize=10.5)
    third.set_ylabel("nats a masked token")
    _finish(figure, first, ["Signal and leakage of the anchor by noise level", *_about(found)])
    return figure


# ------------------------------------------------------------------ parts
def _check(drawn: Mapping[str, object]) -> None:
    if not drawn or not all(drawn.values()):
        raise RemaskError("a figure of the anchor needs a measurement; none was given")


def _line(axis: Axes, places: Sequence[float], spreads: Sequence[Spread], number: int, label: str) -> None:
    """Means with bands between the outer and between the inner quantiles; nothing where there are no rows."""
    colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
    full = [(x, spread.mean, spread.quantiles) for x, spread in zip(places, spreads, strict=True) if spread.quantiles]
    if not full:
        return
    x, mean = [point[0] for point in full], np.array([point[1] for point in full])
    quantiles = np.array([point[2] for point in full]).T
    axis.plot(x, mean, color=colour, marker=mark, markersize=4.5, linewidth=1.8, label=label)
    for low, alpha in ((0, 0.12), (1, 0.2)):
        if len(x) > 1:
            axis.fill_between(x, quantiles[low], quantiles[-1 - low], color=colour, alpha=alpha, linewidth=0)
        else:  # a band of one point would have no width
            shift = x[0] + 0.04 * number
            axis.vlines(shift, quantiles[low], quantiles[-1 - low], color=colour, alpha=0.6, linewidth=1.2 + 2 * low)


def _about(found: Mapping[str, Convergence | Mapping[int | str, Convergence]]) -> list[str]:
    """Rows of each set, tau and how to read the bands."""
    firsts = {name: one if isinstance(one, Convergence) else next(iter(one.values())) for name, one in found.items()}
    rows = ", ".join(f"{name}: {plural(len(one.ids), 'row')}" for name, one in firsts.items())
    taus = ", ".join(f"{tau:g}" for tau in sorted({one.tau for one in firsts.values()}))
    wide, narrow = (round(100 * (QUANTILES[-1 - i] - QUANTILES[i])) for i in (0, 1))
    return [f"{rows}; tau {taus}; lines: means, bands: {narrow} % and {wide} % of the rows"]


def _finish(figure: Figure, axis: Axes, lines: Sequence[str]) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    _title(figure, lines)


def _title(figure: Figure, lines: Sequence[str]) -> None:
    room = int(figure.get_figwidth() * 72 / 5.2)
    figure.suptitle("\n".join(part for line in lines for part in textwrap.wrap(line, room)), fontsize=10, parse_math=False)
