"""The page of a trace: where facts are carried, how sure that is, what was left out, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ..backbones.model import Site
from ..tracing import plots
from ..tracing.effects import Trace, Weights
from ..tracing.plots import TITLES, VIEWS, plural, unit
from ..tracing.positions import PositionTrace
from .html import render
from .numbers import number, percent

SHOWN = 12  # names or lines that stand open; longer lists are folded


def trace_figures(
    traces: Mapping[str, Trace], weights: Weights, site: Site | None, positions: PositionTrace | None = None
) -> dict[str, Figure]:
    """Figures of a trace by name: heatmap, facts, layers, steps, and positions where they were traced.

    Args:
        traces: view -> trace, alike in all but the view; the lines and the facts are those of the first.
        weights: of equation 4.
        site: marked in the heat map; its module is the one whose facts are drawn one by one.
        positions: of the same facts.
    """
    first = next(iter(traces.values()))
    modules = first.config.modules
    module = site.module if site is not None and site.module in modules else modules[0]
    found = {
        "heatmap": plots.heatmap(traces, weights, site),
        "facts": plots.fact_maps(first, module, weights),
        "layers": plots.layer_lines(first, weights),
        "steps": plots.step_lines(first, weights),
    }
    return found if positions is None else {**found, "positions": plots.position_map(positions)}


def trace_page(traces: Mapping[str, Trace], weights: Weights, record: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """One self-contained HTML page.

    Args:
        traces: view -> trace, as for `trace_figures`.
        weights: of equation 4.
        record: content of site.json.
        figures: `trace_figures` as PNG.
    """
    first = next(iter(traces.values()))
    return render(
        "trace.html.j2",
        record=record,
        figures=figures,
        shown=SHOWN,
        sweep=first.mode == "sweep",
        found=_found(record, weights),
        cost=number(_cost(first, weights), 2),
        unit=unit(weights),
        views=[VIEWS.get(view, view) for view in traces],
        stability=_stability(record),
        clusters=[{**cluster, "site": site_name(cluster)} for cluster in record["clusters"]],
        facts=_facts(record),
        kind=_kind(record["rule"]),
        agreeing=sum(_same(site, record) for site in record["facts"].values()),
        protocol=_protocol(first, weights, record),
    )


def site_name(site: Mapping[str, Any]) -> str:
    """A site in words."""
    return f"{TITLES[site['module']]} of layer {site['layer']}"


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["layer"], one["module"]) == (other["layer"], other["module"])


def _found(record: Mapping[str, Any], weights: Weights) -> str:
    """The result in plain words."""
    best = record["strongest"]
    rule = record["rule"]
    plain = not rule["beta"] and not rule["smooth"]
    what = f"a mean {_kind(rule)}" if plain else f"a score ({_rule(rule)})"
    text = (
        f"Restoring matters most at the {site_name(best)}, at step {best['step']}: {what} of "
        f"{number(best['effect'], None)} {unit(weights)}. "
    )
    same = "the same site" if _same(best, record) else f"the {site_name(record)}"
    share = next((line["share"] for line in record["stability"] if _same(line, record)), None)
    sure = "" if share is None else f", which wins in {percent(share)} of resamples of the facts"
    return text + f"Chosen as the place to edit: {same}{sure}."


def _cost(trace: Trace, weights: Weights) -> float:
    """What the corruption takes from the object at the first step, mean over facts, nats."""
    lost = trace.clean[:, 0] - trace.corrupted[:, 0]
    return float(plots.by_fact(lost / trace.tokens if weights.per_token else lost, trace).nanmean())


def _stability(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = sorted(record["stability"], key=lambda line: -line["share"])
    return [{"site": site_name(line), "share": percent(line["share"]), "chosen": _same(line, record)} for line in lines]


def _facts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each fact's own strongest site."""
    sign = record["rule"]["signed"]
    return [
        {"id": name, "site": site_name(site), "effect": number(site["effect"], None, sign), "chosen": _same(site, record)}
        for name, site in record["facts"].items()
    ]


def _protocol(trace: Trace, weights: Weights, record: Mapping[str, Any]) -> dict[str, str]:
    """How it was measured, by name."""
    ran, config = record["trace"], trace.config
    kept = "new at every step" if config.fresh else "the same at all steps"
    noise = f"; noise of {config.noise:g} standard deviations of the subject's embedding entries, {kept}, seed {config.seed}"
    return {
        "model": f"{ran['model']}, fingerprint {ran['fingerprint']}, {ran['precision']}",
        "facts": f"{ran['facts']} traced, {plural(ran['draws'], 'draw')} each",
        "steps": f"{ran['steps']} denoising steps at most, no more than the object has tokens",
        "corruption": f"“{ran['corruption']}” on all subject tokens{'' if config.corruption == 'mask' else noise}",
        "mode": f"{ran['mode']}: {ran['estimand']}",
        "readout": _READOUTS[config.readout],
        "weights": _weights(trace, weights),
        "choice of the site": f"the largest {_rule(record['rule'])}",
        "work": f"{ran['blocks']:,} passes of a sequence through a block in {ran['seconds']:.1f} s of this run",
    }


_READOUTS = {
    "raw": "every object token at every step",
    "frozen": "an object token keeps its value of the step that committed it",
}


def _weights(trace: Trace, weights: Weights) -> str:
    """Equation 4 in words."""
    if trace.mode == "sweep":
        return f"equation 4 has one term, the restored step itself; {unit(weights)}"
    which = "s' > s" if weights.strict else "s' ≥ s"
    norm = "divided by the sum of the weights" if weights.normalise else "not divided by the sum of the weights"
    return (
        f"equation 4: sum over later steps {which} of γ^(s' − s) · effect at s', γ = {weights.gamma:g}, {norm}; {unit(weights)}"
    )


def _kind(rule: Mapping[str, Any]) -> str:
    return "effect" if rule["signed"] else "absolute effect"


def _rule(rule: Mapping[str, Any]) -> str:
    """The score of equation 5 in words."""
    text = f"mean {_kind(rule)} over facts"
    if rule["beta"]:
        text += f", less {rule['beta']:g} times the mean absolute effect over neighbour facts"
    return text + (f", averaged over {plural(rule['smooth'], 'layer')} to each side" if rule["smooth"] else "")
