"""Figures of traces. Effects are signed and in nats; every colour scale is symmetric about zero and common to all panels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..backbones.model import Site
from ..errors import RemaskError
from .effects import Trace, Weights, aggregate
from .positions import CLASSES, PositionTrace

TITLES = {"resid": "residual stream", "attn": "attention output", "mlp": "MLP output"}
VIEWS = {"subject": "all subject tokens", "first": "first subject token", "last": "last subject token"}
STEP = "denoising step (0 = all masked)"
NO_DATA = "#b4b4b4"
NARROWEST = 1e-3  # nats: a colour scale never shows less, so that rounding does not look like an effect
DASHES = ("-", "--", "-.", ":")
TINY = 9  # points: the smallest text


# ------------------------------------------------------------------ figures of a trace
def heatmap(traces: Trace | Mapping[str, Trace], weights: Weights | None = None, site: Site | None = None) -> Figure:
    """Mean effect over facts, [layer x step]; one column a module, one row a view, and above every column a strip.

    The strip is the share of object tokens that stand rightly on the canvas after each step.

    Args:
        traces: one trace, or those of several views by label, alike in all but the view.
        weights: of equation 4.
        site: marked by a dashed line at its layer.

    Raises:
        RemaskError: traces that differ in more than the view.
    """
    views: dict[str, Trace] = {traces.config.view: traces} if isinstance(traces, Trace) else dict(traces)
    first = _check_alike(views)
    weights = weights or Weights()
    values = {label: effects_by_fact(trace, weights) for label, trace in views.items()}
    counts = _facts_by_step(torch.cat(list(values.values()), 1))
    means = {label: np.asarray(value.nanmean(0))[..., : len(counts)] for label, value in values.items()}
    modules, layers = first.config.modules, first.effects.shape[1]
    tall = min(max(0.25 * layers, 2.1), 3.4 if len(views) == 1 else 2.5)
    figure = _figure(2.6 * len(modules) + 2.0, 2.4 + (tall + 0.1) * len(views))
    grid = {"height_ratios": [0.5, *[tall] * len(views)]}
    axes = figure.subplots(1 + len(views), len(modules), squeeze=False, sharex="col", sharey="row", gridspec_kw=grid)
    limit = _limit(list(means.values()))
    for column, module in enumerate(modules):
        axes[0, column].set_title(TITLES[module], fontsize=11)
        _placed_strip(axes[0, column], first, len(counts), legend=column == 0)
        for row, label in enumerate(means, start=1):
            image = _image(axes[row, column], means[label][:, column], limit, origin="lower")
            if site is not None and site.module == module:
                _mark_layer(axes[row, column], site.layer)
        axes[-1, column].set_xlabel(STEP)
        _step_ticks(axes[-1, column], counts)
    axes[0, 0].set_ylabel("placed\nrightly", fontsize=TINY)
    for row, label in enumerate(views, start=1):
        axes[row, 0].set_ylabel(f"{VIEWS.get(label, label)}\nlayer", parse_math=False)
        _ticks(axes[row, 0].yaxis, layers)
    _finish(figure, weights, image, axes[1:], 2 if len(modules) > 1 else 1)
    _caption(figure, "Restoring the subject: mean effect over facts", first, *_step_note(counts))
    return figure


def fact_maps(trace: Trace, module: str = "resid", weights: Weights | None = None, columns: int = 4, limit: int = 12) -> Figure:
    """One [layer x step] heat map for each of the first `limit` rows; ticks above: the clean run commits object tokens rightly.

    Raises:
        RemaskError: a module that was not traced.
    """
    if module not in trace.config.modules:
        raise RemaskError(f"module {module!r} was not traced; choose one of {', '.join(trace.config.modules)}")
    weights = weights or Weights()
    effects = aggregate(trace, weights)[:limit, :, trace.config.modules.index(module)]
    values = np.asarray(effects)[..., : len(_facts_by_step(effects))]
    shown, layers, steps = values.shape
    columns = min(columns, shown)
    rows = -(-shown // columns)
    figure = _figure(2.1 * columns + 1.3, 1.95 * rows + 1.2)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    scale = _limit([values])
    for index, axis in enumerate(axes.ravel()):
        if index >= shown:
            axis.set_axis_off()
            continue
        image = _image(axis, values[index], scale, origin="lower")
        axis.set_title(_shorten(trace.ids[index], 24), fontsize=9.5, pad=9, parse_math=False)
        _commit_ticks(axis, trace.placed[index, 0, :steps])
        axis.xaxis.set_tick_params(labelbottom=True)
        _ticks(axis.xaxis, steps, 8)
    _ticks(axes[0, 0].yaxis, layers, 8)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
    figure.supxlabel(STEP, fontsize=10)
    _finish(figure, weights, image, axes, 0)
    part = "" if shown == len(trace.ids) else f" (the first {shown} of {len(trace.ids)})"
    what = f"Restoring the {TITLES[module]}, fact by fact{part}"
    _caption(figure, what, trace, "ticks above a map: steps at which the clean run commits object tokens rightly")
    return figure


def layer_lines(trace: Trace, weights: Weights | None = None) -> Figure:
    """Mean effect over facts against the layer, one panel a module, one line for each of at most four steps.

    Bands are 1.96 standard errors over facts; a step that one fact alone has gets none.
    """
    weights = weights or Weights()
    values = effects_by_fact(trace, weights)
    counts = _facts_by_step(values)
    figure, axes = _line_panels(trace, weights)
    for column, axis in enumerate(axes):
        for i, step in enumerate(_spread(len(counts), 4)):
            name = f"step {step}{' (all masked)' if step == 0 else ''}, {plural(counts[step], 'fact')}"
            _line(axis, values[:, :, column, step], i, 4, name if column == 0 else None)
        axis.set_xlabel("layer")
        _ticks(axis.xaxis, values.shape[1], 9)
    _finish_lines(figure, "Effect by layer", trace)
    return figure


def step_lines(trace: Trace, weights: Weights | None = None) -> Figure:
    """Mean effect over facts against the step, one panel a module, one line for each third of the depth.

    A third is the mean over its layers for each fact. Bands are 1.96 standard errors over facts.
    """
    weights = weights or Weights()
    values = effects_by_fact(trace, weights)
    counts = _facts_by_step(values)
    figure, axes = _line_panels(trace, weights)
    for column, axis in enumerate(axes):
        for i, (name, layers) in enumerate(_thirds(values.shape[1]).items()):
            part = values[:, layers, column, : len(counts)].nanmean(1)
            _line(axis, part, i, 3, name if column == 0 else None)
        axis.set_xlabel(STEP)
        _step_ticks(axis, counts)
    _finish_lines(figure, "Effect by denoising step", trace, *_step_note(counts))
    return figure


# ------------------------------------------------------------------ figures of positions
def position_map(result: PositionTrace) -> Figure:
    """Mean effect over facts for each class of positions, [class x layer], one panel a module, nats per object token.

    Classes that no fact has are left out; brackets hold the number of facts that have it.
    """
    values = result.by_class().double()
    counts = (~values.isnan()).any(1).any(1).sum(0)
    kept = [i for i in range(len(CLASSES)) if counts[i]]
    means = np.asarray(values.nanmean(0))[..., kept]
    figure, axes = _position_panels(result, means.transpose(1, 2, 0), 0.3)
    axes[0].set_yticks(range(len(kept)), [f"{CLASSES[i]} ({int(counts[i])})" for i in kept])
    title = f"Restoring one position: mean over {plural(len(result.rows), 'fact')}, {plural(result.draws, 'draw')}"
    _title(figure, [f"{title}, canvas of step {result.step}", "in brackets: facts that have such a position"])
    return figure


def position_fact(result: PositionTrace, index: int) -> Figure:
    """Effect of restoring each position of one fact, [position x layer], one panel a module, nats per object token.

    Subject tokens are starred.
    """
    row = result.rows[index]
    values = np.asarray(result.effects[index].double()) / len(row.answer_ids)
    figure, axes = _position_panels(result, values.transpose(1, 2, 0), 0.21)
    start, stop = row.subject
    names = [_visible(text) + ("*" if start <= i < stop else "") for i, text in enumerate(result.tokens[index])]
    axes[0].set_yticks(range(len(names)), names, parse_math=False)
    title = f"Restoring one position: {_shorten(row.id, 40)}, {plural(result.draws, 'draw')}"
    _title(figure, [f"{title}, canvas of step {result.step}", "starred: tokens of the subject"])
    return figure


def _position_panels(result: PositionTrace, values: np.ndarray, line: float) -> tuple[Figure, np.ndarray]:
    """A panel a module of values [module, row, layer]; `line`: inches a row."""
    modules, rows, layers = values.shape
    figure = _figure(2.6 * modules + 2.7, line * rows + 1.9)
    axes = figure.subplots(1, modules, squeeze=False, sharey=True)[0]
    limit = _limit([values])
    for axis, module, value in zip(axes, result.modules, values, strict=True):
        image = _image(axis, value, limit, origin="upper")
        window = "\none layer" if module == "resid" else f"\nwindow of {plural(result.window, 'layer')}"
        axis.set_title(TITLES[module] + window, fontsize=10)
        axis.set_xlabel("layer")
        _ticks(axis.xaxis, layers, 9)
    _finish(figure, Weights(per_token=True), image, axes, 0)
    return figure, axes


# ------------------------------------------------------------------ numbers
def unit(weights: Weights) -> str:
    """Unit of weighted effects, in words."""
    return "nats per object token" if weights.per_token else "nats, summed over object tokens"


def effects_by_fact(trace: Trace, weights: Weights | None = None) -> Tensor:
    """Equation 4 for every fact, [fact, layer, module, step], fp64: the mean over the rows that word the fact.

    Facts stand in the order of their first row; NaN where none of a fact's rows has data.
    """
    return by_fact(aggregate(trace, weights), trace)


def mean_and_band(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first axis and 1.96 standard errors of it, without NaN entries; NaN error below two of them."""
    count = (~values.isnan()).sum(0)
    mean = values.nanmean(0)
    variance = ((values - mean) ** 2).nansum(0) / (count - 1).clamp_min(1)
    return mean, torch.where(count > 1, 1.96 * (variance / count.clamp_min(1)).sqrt(), torch.nan)


def by_fact(values: Tensor, trace: Trace) -> Tensor:
    """Mean of values [row, ...] over the rows that word a fact, [fact, ...], fp64, without NaN entries."""
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(trace.facts):
        rows.setdefault(name, []).append(index)
    return torch.stack([values[where].double().nanmean(0) for where in rows.values()])


def _facts_by_step(values: Tensor) -> list[int]:
    """How many facts have data at each step, up to the last step with any; one step at least. `values`: [fact, ..., step]."""
    known = ~values.isnan().flatten(1, -2).all(1)
    counts = [int(n) for n in known.sum(0)]
    last = max((i for i, n in enumerate(counts) if n), default=0)
    return counts[: last + 1]


def _limit(values: Sequence[np.ndarray]) -> float:
    return max(NARROWEST, *(float(np.abs(np.nan_to_num(value)).max()) for value in values))


def _spread(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices of `count`, first and last among them."""
    return sorted({round(float(x)) for x in np.linspace(0, count - 1, min(most, count))})


def _thirds(layers: int) -> dict[str, list[int]]:
    """Layers of the lower, middle and upper third by name; single layers where there are fewer than three."""
    parts = [[int(i) for i in part] for part in np.array_split(np.arange(layers), 3) if len(part)]
    spans = [f"layer {p[0]}" if len(p) == 1 else f"layers {p[0]}–{p[-1]}" for p in parts]
    names = [f"{place} third: " for place in ("lower", "middle", "upper")] if len(parts) == 3 else [""] * len(parts)
    return {name + span: part for name, span, part in zip(names, spans, parts, strict=True)}


def _check_alike(views: Mapping[str, Trace]) -> Trace:
    """The first of traces that differ in nothing but the view."""
    if not views:
        raise RemaskError("a heat map needs a trace; none was given")
    first = next(iter(views.values()))
    for label, trace in views.items():
        for field in ("model", "mode", "ids"):
            if getattr(trace, field) != getattr(first, field):
                raise RemaskError(f"view {label!r} has another {field} than the first; one heat map shows views of one trace")
        if replace(trace.config, view=first.config.view) != first.config:
            raise RemaskError(f"view {label!r} has another protocol than the first; only the view may differ in a heat map")
    return first


# ------------------------------------------------------------------ parts of figures
def _figure(width: float, height: float) -> Figure:
    """At least as wide as its caption needs."""
    return Figure(figsize=(max(width, 5.4), height), layout="constrained")


def _title(figure: Figure, lines: Sequence[str]) -> None:
    """The first line, the others smaller below it, wrapped to the width."""
    room = figure.get_figwidth() * 72
    wrapped = [part for line in lines for part in textwrap.wrap(line, int(room / 5))]
    figure.suptitle("\n".join(wrapped), fontsize=10, parse_math=False)


def _caption(figure: Figure, what: str, trace: Trace, *more: str) -> None:
    """What is shown, how it was measured, and how to read it."""
    facts, rows = len(set(trace.facts)), len(trace.ids)
    number = plural(facts, "fact") + (f" in {rows} wordings" if rows != facts else "")
    config = trace.config
    protocol = f"{number}, {plural(config.draws, 'draw')}, corruption “{config.corruption}”, mode “{trace.mode}”"
    _title(figure, [what, protocol, *([trace.estimand] if trace.mode == "sweep" else []), *more])


def _finish(figure: Figure, weights: Weights, image: AxesImage, axes: np.ndarray, legend: int) -> None:
    """The colour bar of all `axes`, and a legend below in so many columns."""
    figure.colorbar(image, ax=axes.ravel().tolist(), label=_effect_label(weights), pad=0.02)
    if legend:
        figure.legend(loc="outside lower center", ncols=legend, frameon=False, fontsize=TINY)


def _effect_label(weights: Weights) -> str:
    return f"indirect effect\n({unit(weights)})"


def _image(axis: Axes, values: np.ndarray, limit: float, origin: Any) -> AxesImage:
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=NO_DATA)
    data = np.ma.masked_invalid(values)
    return axis.imshow(data, origin=origin, aspect="auto", cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")


def _mark_layer(axis: Axes, layer: int) -> None:
    """A dashed line, and its name outside, where it hides no cell."""
    halo = [withStroke(linewidth=3, foreground="white", alpha=0.8)]
    axis.axhline(layer, color="black", linewidth=1.4, linestyle="--", path_effects=halo)
    style: dict[str, Any] = {"rotation": -90, "va": "center", "ha": "left", "fontsize": TINY}
    axis.text(1.02, layer, "chosen", transform=axis.get_yaxis_transform(), **style)


def _placed_strip(axis: Axes, trace: Trace, steps: int, legend: bool) -> None:
    """Share of object tokens that stand rightly on the canvas after each step, mean over facts."""
    shares = by_fact(trace.placed, trace).nanmean(0)[:, :steps]
    for share, line, run in zip(shares, ("-", "--"), ("clean", "corrupted"), strict=True):
        label = f"share of object tokens placed rightly, {run} run" if legend else None
        axis.plot(range(steps), np.asarray(share), line, color="#333333", marker="o", markersize=3, linewidth=1.3, label=label)
    axis.set_ylim(-0.12, 1.12)
    axis.set_yticks([0, 1])
    axis.tick_params(axis="x", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def _commit_ticks(axis: Axes, placed: Tensor) -> None:
    """Ticks above the steps that raise the share of tokens placed rightly."""
    before = torch.cat([placed.new_zeros(1), placed[:-1]])
    steps = [i for i, more in enumerate((placed > before).tolist()) if more]
    if not steps:  # the extent of an unclipped line without points would spoil the layout
        return
    style: dict[str, Any] = {"marker": 2, "color": "black", "markersize": 6, "clip_on": False}
    axis.plot(steps, [1] * len(steps), " ", transform=axis.get_xaxis_transform(), **style)


def _line_panels(trace: Trace, weights: Weights) -> tuple[Figure, np.ndarray]:
    modules = trace.config.modules
    figure = _figure(2.8 * len(modules) + 0.9, 4.4)
    axes = figure.subplots(1, len(modules), squeeze=False, sharey=True)[0]
    for axis, module in zip(axes, modules, strict=True):
        axis.set_title(TITLES[module], fontsize=11)
        axis.axhline(0, color="#666666", linewidth=0.9, zorder=1)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(_effect_label(weights))
    return figure, axes


def _line(axis: Axes, values: Tensor, place: int, of: int, label: str | None) -> None:
    """Mean over facts of values [fact, x] with its band; `place` of `of` chooses colour and dashes."""
    mean, error = (np.asarray(part) for part in mean_and_band(values))
    colour = matplotlib.colormaps["viridis"](0.85 * place / max(of - 1, 1))
    x = np.arange(len(mean))
    axis.plot(x, mean, DASHES[place], color=colour, marker="o", markersize=3.5, linewidth=1.7, label=label)
    if len(x) > 1:
        axis.fill_between(x, mean - error, mean + error, color=colour, alpha=0.16, linewidth=0)
    else:  # a band of one point would have no width
        axis.errorbar(x, mean, error, color=colour, capsize=4)


def _finish_lines(figure: Figure, what: str, trace: Trace, *more: str) -> None:
    columns = 4 if figure.get_figwidth() > 9 else 2
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=TINY)
    _caption(figure, f"{what}: mean over facts, bands of 1.96 standard errors", trace, *more)


def _ticks(axis: Any, count: int, most: int = 16) -> None:
    """Integer ticks 0 ... count - 1, every n-th where there are more than `most`."""
    stride = 1 if count <= most else next(n for n in (2, 4, 5, 10, 20, 50, count) if count / n <= min(most, 10))
    axis.set_ticks(range(0, count, stride))
    axis.set_tick_params(labelsize=TINY)


def _step_ticks(axis: Axes, counts: Sequence[int]) -> None:
    """Steps; below each, where they differ, the number of facts that have it."""
    _ticks(axis.xaxis, len(counts))
    if len(set(counts)) > 1:
        steps = [int(step) for step in axis.get_xticks()]
        axis.set_xticks(steps, [f"{step}\n({counts[step]})" for step in steps])


def _step_note(counts: Sequence[int]) -> list[str]:
    return ["in brackets: facts that have the step"] if len(set(counts)) > 1 else []


def plural(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _shorten(text: str, most: int) -> str:
    """The text, its middle left out where it is longer than `most`."""
    text = _visible(text)
    head = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - head]}…{text[len(text) - head :]}"


def _visible(text: str) -> str:
    """Without line breaks and outer spaces; blanks and control characters in a form that shows."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip(" "))
    return shown or repr(text)
