"""Figures of traces: what they draw equals numbers computed by hand, and nothing that a trace may lack breaks them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from remask.backbones import Encoded, Site
from remask.errors import RemaskError
from remask.figures import png, save_figure
from remask.tracing import Trace, TraceConfig, Weights
from remask.tracing.plots import NO_DATA, fact_maps, heatmap, layer_lines, position_fact, position_map, step_lines
from remask.tracing.positions import PositionTrace

NAN = math.nan


# ------------------------------------------------------------------ traces with known numbers
def make_trace(
    values: np.ndarray,
    tokens: tuple[int, ...],
    facts: tuple[str, ...] | None = None,
    modules: tuple[Any, ...] = ("resid", "attn", "mlp"),
    mode: Any = "sweep",
    **config: Any,
) -> Trace:
    """A trace whose effect on the restored step is `values` [fact, layer, module, step] and which reads no later one."""
    rows, layers, _, steps = values.shape
    effects = torch.full((rows, layers, len(modules), steps, steps), NAN)
    for step in range(steps):
        effects[..., step, step] = torch.from_numpy(values[..., step]).float()
    line = torch.zeros(rows, steps)
    placed = torch.from_numpy(np.where(np.isnan(values[:, :1, 0, :]), NAN, [[[0.0]]])).float().repeat(1, 2, 1)
    ids = tuple(f"fact/{i}" for i in range(rows))
    return Trace(
        effects,
        effects**2,
        line,
        line - 1,
        placed,
        torch.tensor(tokens),
        ids,
        facts or ids,
        (),
        TraceConfig(steps=steps, modules=modules, **config),
        mode,
        "c0ffee",
    )


def two_facts() -> Trace:
    """Two layers, three steps; the second fact has two steps and four tokens, the first three steps and two tokens."""
    values = np.zeros((2, 2, 3, 3))
    values[0, 0, 0], values[0, 1, 0] = [2, 4, 6], [-8, 0, 2]
    values[1, 0, 0], values[1, 1, 0] = [8, 4, NAN], [4, -4, NAN]
    values[0, :, 1], values[1, :, 1] = 1, [2, 2, NAN]
    values[1, :, 2] = [0, 0, NAN]
    trace = make_trace(values, (2, 4))
    trace.placed[0, 0], trace.placed[0, 1] = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, 0.5])
    trace.placed[1, 0], trace.placed[1, 1] = torch.tensor([0.5, 0.5, NAN]), torch.tensor([0.0, 0.25, NAN])
    return trace


# Mean over facts of effects per token: fact 0 halves, fact 1 quarters.
RESID = [[1.5, 1.5, 3.0], [-1.5, -0.5, 1.0]]
ATTN = [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]


def images(figure: Figure) -> list[np.ma.MaskedArray]:
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


def words(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text() for text in figure.findobj(Text)).split())


def titled(figure: Figure, title: str) -> Any:
    return next(axis for axis in figure.axes if axis.get_title() == title)


# ------------------------------------------------------------------ heat map
def test_heat_map_shows_the_mean_over_facts() -> None:
    found = images(heatmap(two_facts()))
    np.testing.assert_allclose(found[0], RESID, atol=1e-6)
    np.testing.assert_allclose(found[1], ATTN, atol=1e-6)
    np.testing.assert_allclose(found[2], np.zeros((2, 3)))


def test_heat_map_sums_over_tokens_when_weights_do() -> None:
    figure = heatmap(two_facts(), Weights(per_token=False))
    np.testing.assert_allclose(images(figure)[0], [[5, 4, 6], [-2, -2, 2]], atol=1e-6)
    assert "nats, summed over object tokens" in words(figure)
    assert "nats per object token" in words(heatmap(two_facts()))


def test_heat_map_weighs_later_steps() -> None:
    trace = make_trace(np.ones((1, 1, 1, 2)), (1,), modules=("resid",), mode="exact")
    trace.effects[0, 0, 0] = torch.tensor([[1.0, 3.0], [NAN, 5.0]])
    np.testing.assert_allclose(images(heatmap(trace, Weights(gamma=0.5)))[0], [[(1 + 1.5) / 1.5, 5]], atol=1e-6)
    np.testing.assert_allclose(images(heatmap(trace, Weights(gamma=0.5, normalise=False)))[0], [[2.5, 5]], atol=1e-6)


def test_wordings_of_a_fact_count_once() -> None:
    values = np.array([1.0, 3.0, 8.0]).reshape(3, 1, 1, 1)
    trace = make_trace(values, (1, 1, 1), facts=("a", "a", "b"), modules=("mlp",))
    figure = heatmap(trace)
    np.testing.assert_allclose(images(figure)[0], [[5.0]])  # (2 + 8) / 2, not 12 / 3
    assert "2 facts in 3 wordings" in words(figure)


def test_views_are_rows_on_one_symmetric_scale() -> None:
    one = two_facts()
    other = replace(one, effects=one.effects * -3, config=replace(one.config, view="first"))
    figure = heatmap({"subject": one, "first": other})
    drawn = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(drawn) == 6
    assert {image.get_clim() for image in drawn} == {(-9.0, 9.0)}
    assert {image.get_cmap().name for image in drawn} == {"RdBu_r"}
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert "all subject tokens\nlayer" in labels and "first subject token\nlayer" in labels
    shown = [i.get_array() for i in drawn]
    assert sum(np.allclose(a, RESID) for a in shown) == 1
    assert sum(np.allclose(a, -3 * np.array(RESID)) for a in shown) == 1


@pytest.mark.parametrize("change", ["model", "protocol", "ids"])
def test_views_of_different_traces_are_refused(change: str) -> None:
    one = two_facts()
    other = {
        "model": replace(one, model="other"),
        "protocol": replace(one, config=replace(one.config, noise=1.0)),
        "ids": replace(one, ids=("x", "y")),
    }[change]
    with pytest.raises(RemaskError, match=f"'first' has another {change}"):
        heatmap({"subject": one, "first": other})
    with pytest.raises(RemaskError, match="none was given"):
        heatmap({})


def test_strip_shows_what_is_placed() -> None:
    figure = heatmap(two_facts())
    strips = [axis for axis in figure.axes if len(axis.lines) == 2]
    assert len(strips) == 3
    for axis in strips:
        clean, corrupted = axis.lines
        np.testing.assert_allclose(clean.get_ydata(), [0.25, 0.5, 1.0])
        np.testing.assert_allclose(corrupted.get_ydata(), [0.0, 0.125, 0.5])
        assert (clean.get_linestyle(), corrupted.get_linestyle()) == ("-", "--")
    assert len(figure.legends[0].get_texts()) == 2


def test_site_is_marked_in_its_module_alone() -> None:
    figure = heatmap(two_facts(), site=Site(1, "attn"))
    marked = [axis for axis in figure.axes if any(text.get_text() == "chosen" for text in axis.texts)]
    assert [axis.get_title() for axis in figure.axes[:3]] == ["residual stream", "attention output", "MLP output"]
    assert len(marked) == 1 and np.allclose(marked[0].images[0].get_array(), ATTN)
    assert set(marked[0].lines[0].get_ydata()) == {1} and marked[0].lines[0].get_linestyle() == "--"
    assert "chosen" not in words(heatmap(two_facts()))


def test_steps_that_no_fact_has_are_not_shown_and_single_gaps_are_grey() -> None:
    values = np.full((2, 2, 1, 4), NAN)
    values[:, :, 0, :2] = 1.0
    values[:, 1, 0, 0] = NAN
    figure = heatmap(make_trace(values, (1, 1), modules=("resid",)))
    image = next(axis.images[0] for axis in figure.axes if axis.images)
    assert image.get_array().shape == (2, 2)
    assert image.get_array().mask.tolist() == [[False, False], [True, False]]
    assert image.get_cmap().get_bad() == pytest.approx(to_rgba(NO_DATA))


def test_number_of_facts_stands_below_the_steps_where_it_changes() -> None:
    labels = [t.get_text() for t in heatmap(two_facts()).axes[3].get_xticklabels()]
    assert labels == ["0\n(2)", "1\n(2)", "2\n(1)"]
    equal = heatmap(make_trace(np.ones((2, 1, 3, 2)), (1, 1)))
    assert "in brackets" not in words(equal) and "in brackets" in words(heatmap(two_facts()))


@pytest.mark.parametrize("draw", [heatmap, fact_maps, layer_lines, step_lines])
def test_captions_say_how_it_was_measured(draw: Callable[[Trace], Figure]) -> None:
    text = words(draw(two_facts()))
    assert "2 facts, 3 draws, corruption “add”, mode “sweep”" in text
    assert "fixed trajectory: the canvas of every step is the clean run's" in text
    assert "nats" in text
    exact = words(draw(make_trace(np.ones((1, 2, 3, 2)), (1,), mode="exact", corruption="mask")))
    assert "1 fact, 1 draw, corruption “mask”, mode “exact”" in exact and "fixed trajectory" not in exact


def test_layer_ticks_are_integers_and_thin_out() -> None:
    for layers, expected in [(3, [0, 1, 2]), (16, list(range(16))), (32, list(range(0, 32, 4)))]:
        figure = heatmap(make_trace(np.ones((1, layers, 1, 1)), (1,), modules=("resid",)))
        axis = next(axis for axis in figure.axes if axis.images)
        assert axis.get_yticks().tolist() == expected


# ------------------------------------------------------------------ fact by fact
def test_fact_maps_share_a_scale_and_mark_commits() -> None:
    trace = two_facts()
    figure = fact_maps(trace)
    first, second = titled(figure, "fact/0"), titled(figure, "fact/1")
    np.testing.assert_allclose(first.images[0].get_array(), [[1, 2, 3], [-4, 0, 1]])
    np.testing.assert_allclose(second.images[0].get_array()[:, :2], [[2, 1], [1, -1]])
    assert second.images[0].get_array().mask[:, 2].all()
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-4.0, 4.0)
    assert list(first.lines[0].get_xdata()) == [1, 2]  # shares 0, 0.5, 1
    assert list(second.lines[0].get_xdata()) == [0]  # shares 0.5, 0.5


def test_fact_maps_stop_at_the_limit_and_shorten_names() -> None:
    trace = make_trace(np.ones((5, 1, 1, 1)), (1,) * 5, modules=("mlp",))
    long = "a-name-that-is-far-too-long-for-a-panel/end"
    figure = fact_maps(replace(trace, ids=(long, *trace.ids[1:])), "mlp", columns=2, limit=3)
    assert len(images(figure)) == 3
    title = figure.axes[0].get_title()
    assert title.startswith("a-name-") and title.endswith("/end") and "…" in title and len(title) == 24
    assert "the first 3 of 5" in words(figure)
    with pytest.raises(RemaskError, match="'attn' was not traced; choose one of mlp"):
        fact_maps(trace, "attn")


# ------------------------------------------------------------------ lines
def bands(axis: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lower and upper edge of every band, from its outline: there along one edge, back along the other."""
    found = []
    for part in axis.collections:
        points = np.concatenate([path.vertices for path in part.get_paths()]) if part.get_paths() else np.zeros((0, 2))
        xs = sorted(set(points[:, 0]))
        edges = [[f(points[points[:, 0] == x, 1]) for x in xs] for f in (min, max)]
        found.append((np.array(edges[0]), np.array(edges[1])))
    return found


def test_layer_lines_and_bands() -> None:
    axis = titled(layer_lines(two_facts()), "residual stream")
    zero, *lines = axis.lines
    assert set(zero.get_ydata()) == {0}
    np.testing.assert_allclose([line.get_ydata() for line in lines], np.array(RESID).T, atol=1e-6)
    # Two values a, b have the standard error |a - b| / 2.
    half = 1.96 * np.array([[0.5, 2.5], [0.5, 0.5]])  # steps 0 and 1; layer 0: (1, 2), (2, 1); layer 1: (-4, 1), (0, -1)
    for (low, high), line, expected in zip(bands(axis)[:2], lines, half, strict=False):
        np.testing.assert_allclose(high - line.get_ydata(), expected, atol=1e-6)
        np.testing.assert_allclose(line.get_ydata() - low, expected, atol=1e-6)
    assert all(len(low) == 0 for low, _ in bands(axis)[2:])  # a single fact has no band


def test_layer_lines_choose_four_steps() -> None:
    values = np.tile(np.arange(8.0), (3, 2, 1, 1))
    figure = layer_lines(make_trace(values, (1, 1, 1), modules=("resid",)))
    assert [line.get_ydata()[0] for line in figure.axes[0].lines[1:]] == [0, 2, 5, 7]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["step 0 (all masked), 3 facts", "step 2, 3 facts", "step 5, 3 facts", "step 7, 3 facts"]


def test_step_lines_average_thirds_of_the_depth() -> None:
    values = np.zeros((3, 7, 1, 2))
    values[:, :, 0, 0] = np.arange(7.0) * np.array([[1.0], [2.0], [3.0]])
    values[:, :, 0, 1] = 1.0
    values[2, :, 0, 1] = NAN
    axis = step_lines(make_trace(values, (1, 1, 1), modules=("attn",))).axes[0]
    lower, middle, upper = axis.lines[1:]
    np.testing.assert_allclose(lower.get_ydata(), [2, 1])  # layers 0-2: mean 1, times 2
    np.testing.assert_allclose(middle.get_ydata(), [7, 1])  # layers 3-4
    np.testing.assert_allclose(upper.get_ydata(), [11, 1])  # layers 5-6
    error = 1.96 * 3.5 / math.sqrt(3)  # the middle third of the facts: 3.5, 7, 10.5
    low, high = bands(axis)[1]
    assert (low[0], high[0]) == pytest.approx((7 - error, 7 + error))
    assert (low[1], high[1]) == pytest.approx((1, 1))


def test_step_lines_name_their_layers() -> None:
    trace = make_trace(np.ones((1, 7, 1, 2)), (1,), modules=("attn",))
    names = [text.get_text() for text in step_lines(trace).legends[0].get_texts()]
    assert names == ["lower third: layers 0–2", "middle third: layers 3–4", "upper third: layers 5–6"]
    shallow = make_trace(np.ones((1, 1, 1, 2)), (1,), modules=("attn",))
    assert [text.get_text() for text in step_lines(shallow).legends[0].get_texts()] == ["layer 0"]


def test_single_point_has_an_error_bar() -> None:
    values = np.array([1.0, 4.0]).reshape(2, 1, 1, 1)
    axis = step_lines(make_trace(values, (1, 1), modules=("attn",))).axes[0]
    ((low, high),) = [segment[:, 1] for segment in axis.collections[0].get_segments()]
    assert (low, high) == pytest.approx((2.5 - 1.96 * 1.5, 2.5 + 1.96 * 1.5))


# ------------------------------------------------------------------ nothing breaks them
DEGENERATE = {
    "one of everything": lambda: make_trace(np.ones((1, 1, 1, 1)), (1,), modules=("mlp",), draws=1),
    "one layer": lambda: make_trace(np.ones((3, 1, 3, 4)), (1, 2, 3)),
    "one step": lambda: make_trace(np.ones((3, 5, 3, 1)), (1, 2, 3)),
    "one fact": lambda: make_trace(np.ones((1, 5, 3, 4)), (2,)),
    "zeros": lambda: make_trace(np.zeros((3, 5, 3, 4)), (1, 2, 3)),
    "a fact without data": lambda: make_trace(np.concatenate([np.full((1, 5, 3, 4), NAN), np.ones((1, 5, 3, 4))]), (1, 2)),
    "no data at all": lambda: make_trace(np.full((2, 5, 3, 4), NAN), (1, 2)),
    "many": lambda: make_trace(np.ones((14, 48, 3, 40)), (1,) * 14),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DEGENERATE)
def test_every_trace_can_be_drawn(name: str) -> None:
    trace = DEGENERATE[name]()
    module = trace.config.modules[0]
    figures = (
        heatmap(trace, site=Site(0, module)),
        heatmap(trace, Weights(strict=True, normalise=False)),
        fact_maps(trace, module),
        layer_lines(trace),
        step_lines(trace),
    )
    for figure in figures:
        assert png(figure, 30).startswith(b"\x89PNG")
        limits = {axis.images[0].get_clim() for axis in figure.axes if axis.images}
        assert all(-low == high > 0 for low, high in limits) and len(limits) <= 1
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 9


# ------------------------------------------------------------------ positions
def make_positions(layers: int = 2, modules: tuple[str, ...] = ("resid", "mlp"), window: int = 3) -> PositionTrace:
    """Two facts: [one before, two subject, last of prompt, two slots] and [one subject, last of prompt, one slot]."""
    rows = (Encoded("a$b^", (1, 2, 3, 4), (5, 6), (1, 3)), Encoded("c", (1, 2), (3,), (0, 1)))
    effects = []
    for scale, row in zip((2.0, 3.0), rows, strict=True):
        numbers = torch.arange(1.0, len(row.ids) + 1) * scale
        effects.append(
            torch.stack([torch.stack([numbers * (layer + 1), -numbers]) for layer in range(layers)])[:, : len(modules)]
        )
    tokens = (("The", " $x_", "\n", " is", "<m>", "<m>"), ("Ada", ":", "<m>"))
    return PositionTrace(tuple(effects), tokens, rows, modules, window, 1, 3, "c0ffee")


def test_position_map_shows_the_classes_that_occur() -> None:
    figure = position_map(make_positions())
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["before subject (1)", "first subject (1)", "last subject (2)", "last of prompt (2)", "answer slots (2)"]
    # Per token: fact a has positions 1 ... 6 (times 2 / 2 tokens), fact c 3, 6, 9 (one token); layer 1 is twice layer 0.
    column = np.array([1, 2, (3 + 3) / 2, (4 + 6) / 2, (5.5 + 9) / 2])
    np.testing.assert_allclose(axis.images[0].get_array(), np.stack([column, 2 * column], 1))
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), np.stack([-column, -column], 1))
    assert axis.images[0].get_clim() == figure.axes[1].images[0].get_clim() == pytest.approx((-14.5, 14.5))
    assert figure.axes[0].get_title() == "residual stream\none layer"
    assert figure.axes[1].get_title() == "MLP output\nwindow of 3 layers"
    assert "nats per object token" in words(figure) and "canvas of step 1" in words(figure)


def test_position_fact_stars_the_subject() -> None:
    figure = position_fact(make_positions(), 0)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["The", "$x_*", "\\n*", "is", "<m>", "<m>"]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), np.outer(np.arange(1, 7), [1, 2]))
    assert "a$b^" in words(figure)
    assert png(figure, 30).startswith(b"\x89PNG")  # neither the name nor a token is read as a formula


@pytest.mark.filterwarnings("error")
def test_positions_of_one_layer_and_zeros_can_be_drawn() -> None:
    small = make_positions(1, ("resid",), 1)
    zero = replace(small, effects=tuple(0 * effects for effects in small.effects))
    for figure in (position_map(small), position_map(zero), position_fact(zero, 1)):
        assert png(figure, 30).startswith(b"\x89PNG")
        assert len({axis.images[0].get_clim() for axis in figure.axes if axis.images}) == 1


# ------------------------------------------------------------------ as files
def test_figures_are_written_as_png_or_svg(tmp_path: Path) -> None:
    trace = two_facts()
    for name, start in (("a.png", b"\x89PNG\r\n\x1a\n"), ("a.svg", b"<?xml")):
        save_figure(heatmap(trace), tmp_path / name)
        save_figure(heatmap(trace), tmp_path / f"again-{name}")
        assert (tmp_path / name).read_bytes().startswith(start)
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    with pytest.raises(RemaskError, match=r"a\.pdf: a figure is written as \.png or \.svg"):
        save_figure(heatmap(trace), tmp_path / "a.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "again-a.png", "again-a.svg"]
