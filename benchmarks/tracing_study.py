"""Where facts sit along layers and denoising steps, and whether the traced site is the one to edit.

    python benchmarks/tracing_study.py --data DIR --cache DIR [--only tiny]

Runs the experiment of benchmarks/tracing_study.yaml: DIR of --data holds `tofu/` and `counterfact/`, DIR of --cache the model
that benchmarks/adapt_smollm2.py adapted. Facts are validation facts, never those that audits report. Writes
benchmarks/results/tracing_study.json, docs/images/tracing_*.png and, by benchmarks/tables.py, the tables of docs/tracing.md.
Intervals are 95 % bootstraps over facts (2,000 resamples).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.console import Console
from tune_edits import FIRST_MU, STRANGERS, Tuner

from remask import Fact, MaskedDiffusionLM, RemaskError, load
from remask.backbones import Encoded
from remask.evaluation.benchmarks.counterfact import load_known
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.figures import save_figure
from remask.random import numpy_generator
from remask.tracing import (
    PositionTrace,
    SiteRule,
    Trace,
    TraceConfig,
    Weights,
    aggregate,
    choose_site,
    stability,
    trace,
    trace_positions,
)
from remask.tracing.plots import heatmap, position_map
from remask.tracing.positions import CLASSES

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
THIRDS = ("lower", "middle", "upper")
RULES = {
    "mean absolute": SiteRule(module="resid"),
    "signed": SiteRule(module="resid", signed=True),
    "smoothed": SiteRule(module="resid", smooth=1),
    "paper": SiteRule(Weights(normalise=False, per_token=False), module="resid"),
}
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", help="one model; its part of the result file is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load((Path(__file__).with_suffix(".yaml")).read_text())
    path = RESULTS / "tracing_study.json"
    record: dict[str, Any] = {}
    for name in [options.only] if options.only else plan["models"]:
        console.rule(name)
        found = study(name, plan, options.data, options.cache)
        models = json.loads(path.read_text())["models"] if path.is_file() else {}  # as another process may have left it
        command = "python benchmarks/tracing_study.py --data DIR --cache DIR"
        record = {"command": command, "plan": plan, "models": {key: {**models, name: found}.get(key) for key in plan["models"]}}
        record["models"] = {key: value for key, value in record["models"].items() if value is not None}
        path.write_text(json.dumps(record, indent=1) + "\n")
    measured = {name: found["edits"] for name, found in record["models"].items() if "edits" in found}
    if measured:
        save_figure(edit_figure(measured), IMAGES / "tracing_edits.png")


def study(name: str, plan: dict[str, Any], data: Path, cache: Path) -> dict[str, Any]:
    """Everything about one model."""
    model = plan["models"][name]
    lm = load(cache / model["folder"] if "folder" in model else name)
    facts = load_known(data / model["known"]) if "known" in model else validation(model["benchmark"], data)
    if "answer_prefix" in model:
        lm.spec = dataclasses.replace(lm.spec, answer_prefix=model["answer_prefix"])
    rows = known_rows(lm, [fact for fact in facts if fact.subject != fact.prompt], plan["facts"])
    traces = [trace(lm, rows, TraceConfig(**plan["trace"], seed=seed), progress=True) for seed in plan["noise_seeds"]]
    first = traces[0]
    few = rows[:: max(1, len(rows) // plan["positions"]["facts"])][: plan["positions"]["facts"]]
    single = trace_positions(lm, few, TraceConfig(draws=plan["positions"]["draws"]), progress=True)
    save_figure(heatmap(first, site=choose_site(first, RULES["mean absolute"]).site), IMAGES / f"tracing_{name}.png")
    save_figure(position_map(single), IMAGES / f"tracing_{name}_positions.png")
    result = {
        "fingerprint": lm.fingerprint(),
        "layers": lm.num_layers,
        "facts": list(first.ids),
        "steps": sorted({int(n) for n in (~first.clean.isnan()).sum(1)}),
        "lost": estimate((first.clean[:, 0] - first.corrupted[:, 0]) / first.tokens),
        "sites": {rule: [_site(choose_site(found, how)) for found in traces] for rule, how in RULES.items()},
        "strongest": [_site(choose_site(found, SiteRule())) for found in traces],
        "stability": [[site.layer, share] for site, share in stability(first, RULES["mean absolute"])[:3]],
        "restored": restored(first),
        "bands": bands(first),
        "contrasts": contrasts(first, single),
        "classes": classes(single),
        "window": single.window,
    }
    if name in plan["edits"]["models"]:
        result["edits"] = edits(name, model["benchmark"], data, plan["edits"])
    return result


def validation(benchmark: str, data: Path) -> list[Fact]:
    """Facts that hyper-parameters may be chosen on."""
    return load_benchmark(benchmark, data / "tofu").validation


def known_rows(lm: MaskedDiffusionLM, facts: list[Fact], count: int) -> list[Encoded]:
    """Evenly spaced facts whose object the clean run produces."""
    rows = [lm.encode(fact) for fact in facts]
    quick = trace(lm, rows, TraceConfig(steps=8, draws=1, corruption="mask", modules=("resid",)), mode="sweep", progress=True)
    known = [row for row in rows if row.id in quick.ids]
    return [known[int(i)] for i in np.linspace(0, len(known) - 1, min(count, len(known)))]


def _site(choice: Any) -> list[Any]:
    return [choice.site.module, choice.site.layer, choice.step, round(choice.score, 4)]


# ------------------------------------------------------------------ estimates
def estimate(values: torch.Tensor) -> list[float | None]:
    """Mean over facts and its 95 % bootstrap interval; NaN facts are left out, none at all gives None."""
    array = values[~values.isnan()].double().numpy()
    if not len(array):
        return [None, None, None]
    draws = numpy_generator(0, "tracing study", len(array)).integers(0, len(array), (2000, len(array)))
    low, high = np.quantile(array[draws].mean(1), [0.025, 0.975])
    return [round(float(v), 4) for v in (array.mean(), low, high)]


def thirds(count: int) -> list[list[int]]:
    """Indices of the lower, middle and upper third."""
    return [part.tolist() for part in np.array_split(np.arange(count), 3)]


def restored(found: Trace) -> dict[str, list[list[float | None]]]:
    """By module and layer: share of what the corruption took at step 0 that restoring it at step 0 brings back."""
    lost = found.clean[:, 0] - found.corrupted[:, 0]
    heavy = lost > 0.1 * found.tokens  # nats a token: below it the share has no meaning
    back = found.effects[heavy][..., 0, 0] / lost[heavy, None, None]
    return {
        module: [estimate(back[:, layer, m]) for layer in range(back.shape[1])] for m, module in enumerate(found.config.modules)
    }


def bands(found: Trace) -> dict[str, list[dict[str, Any]]]:
    """By module: the mean absolute effect in every third of the layers and third of a fact's own steps."""
    effects = aggregate(found).abs()
    table: dict[str, list[dict[str, Any]]] = {}
    for m, module in enumerate(found.config.modules):
        table[module] = []
        for where, layers in zip(THIRDS, thirds(effects.shape[1]), strict=True):
            for when in range(3):
                cells = torch.stack([_own_third(fact[layers, m], when) for fact in effects])
                table[module].append({"layers": where, "steps": ("early", "middle", "late")[when], "effect": estimate(cells)})
    return table


def _own_third(effect: torch.Tensor, when: int) -> torch.Tensor:
    """Mean over layers and one third of the steps that the fact has; NaN for fewer than three steps."""
    steps = int((~effect[0].isnan()).sum())
    return effect[:, thirds(steps)[when]].mean() if steps >= 3 else torch.tensor(torch.nan)


def contrasts(found: Trace, single: PositionTrace) -> dict[str, list[float | None]]:
    """Differences that the two accounts predict to be positive, nats per object token."""
    effects = aggregate(found)
    module = {name: i for i, name in enumerate(found.config.modules)}
    low, mid, high = thirds(effects.shape[1])
    early = effects[..., 0]
    steps = torch.stack([_early_minus_late(fact[low + mid][:, module["resid"]].abs()) for fact in effects])
    where = single.by_class()
    last, begin = (where[..., CLASSES.index(name)] for name in ("last subject", "first subject"))
    rest = where[..., [CLASSES.index(name) for name in ("before subject", "first after", "further", "last of prompt")]]
    mlp, attn = module["mlp"], module["attn"]
    return {
        "TimeROME: residual stream, lower and middle minus upper layers, step 0": estimate(
            early[:, low + mid, 0].mean(1) - early[:, high, 0].mean(1)
        ),
        "TimeROME: early and middle minus late steps, residual stream, lower and middle layers": estimate(steps),
        "TimeROME: residual stream minus MLP, lower and middle layers, step 0": estimate(
            (early[:, low + mid, 0] - early[:, low + mid, mlp]).mean(1)
        ),
        "2606.03924: MLP minus attention at the last subject token, lower and middle layers": estimate(
            (last[:, low + mid, mlp] - last[:, low + mid, attn]).mean(1)
        ),
        "2606.03924: MLP at the last minus the first subject token, lower and middle layers": estimate(
            (last[:, low + mid, mlp] - begin[:, low + mid, mlp]).mean(1)
        ),
        "2606.03924: MLP at the last subject token minus the prompt's other tokens, lower and middle layers": estimate(
            (last[:, low + mid, mlp] - rest[:, low + mid, mlp].nanmean(-1)).mean(1)
        ),
    }


def _early_minus_late(effect: torch.Tensor) -> torch.Tensor:
    early, middle, late = (_own_third(effect, when) for when in range(3))
    return (early + middle) / 2 - late


def classes(single: PositionTrace) -> dict[str, dict[str, list[float]]]:
    """By module and class of positions: the largest mean effect over layers, and its layer."""
    means = single.by_class().nanmean(0)
    table: dict[str, dict[str, list[float]]] = {}
    for m, module in enumerate(single.modules):
        table[module] = {}
        for column, name in enumerate(CLASSES):
            effect = means[:, m, column]
            if not effect.isnan().all():
                layer = int(effect.nan_to_num(-np.inf).argmax())
                table[module][name] = [round(float(effect[layer]), 4), layer]
    return table


# ------------------------------------------------------------------ editing where the trace says
def edits(name: str, benchmark: str, data: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Retain loss of calibrated edits at every layer, on every fold of validation people, and the layers that traces choose."""
    tuner = Tuner(name, benchmark, data / "tofu", plan["folds"], "auto", plan["people"])
    changes = {
        "default": {"mu": FIRST_MU, "anchor": "unknown", "unknown": STRANGERS},
        "paper": {},
    }
    measured = {}
    for preset in plan["presets"]:
        layers = []
        for layer in range(tuner.lm.num_layers):
            entry = tuner.measure(preset, layer, **changes[preset])
            layers.append([abs(fold["retain_change"]) if "failed" not in fold else None for fold in entry["folds"]])
            console.print(f"{preset} at layer {layer}: retain loss {layers[-1]}")
        measured[preset] = layers
    chosen: dict[str, list[int]] = {rule: [] for rule in RULES}
    for fold in tuner.folds:
        rows = known_rows(tuner.lm, [fact for fact in fold if fact.subject != fact.prompt], 8)
        found = trace(tuner.lm, rows, TraceConfig())
        for rule, how in RULES.items():
            chosen[rule].append(choose_site(found, how).site.layer)
    return {"retain_loss": measured, "traced": chosen, "compared": compare(measured, chosen)}


def compare(measured: dict[str, list[list[float | None]]], chosen: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Retain loss at the traced, a random and the best layer, mean over folds; a layer without a level counts as the worst."""
    table = []
    for preset, layers in measured.items():
        values = np.array([[np.nan if v is None else v for v in row] for row in layers], dtype=float)
        if np.isnan(values).all():
            raise RemaskError(f"no layer of {preset} reached its level")
        filled = np.where(np.isnan(values), np.nanmax(values, axis=0), values)  # [layer, fold]
        for rule, picks in chosen.items():
            traced = filled[picks, np.arange(filled.shape[1])]
            order = filled.argsort(axis=0).argsort(axis=0)
            table.append(
                {
                    "edit": preset,
                    "rule": rule,
                    "layers": picks,
                    "traced": round(float(traced.mean()), 3),
                    "random": round(float(filled.mean()), 3),
                    "best": round(float(filled.min(axis=0).mean()), 3),
                    "rank": round(float(order[picks, np.arange(filled.shape[1])].mean()) + 1, 2),
                }
            )
    return table


def edit_figure(measured: dict[str, dict[str, Any]]) -> Figure:
    """Retain loss by layer, one line a fold, the traced layer marked."""
    presets = list(next(iter(measured.values()))["retain_loss"])
    figure = Figure(figsize=(4.2 * len(measured), 3.4 * len(presets)), layout="constrained")
    axes = figure.subplots(len(presets), len(measured), squeeze=False)
    for column, (name, found) in enumerate(measured.items()):
        for row, preset in enumerate(presets):
            axis, layers = axes[row, column], found["retain_loss"][preset]
            for fold, pick in enumerate(found["traced"]["mean absolute"]):
                line = [np.nan if values[fold] is None else values[fold] for values in layers]
                [drawn] = axis.plot(range(len(line)), line, marker="o", markersize=4, linewidth=1.3, alpha=0.8)
                label = "traced layer" if fold == 0 else None
                axis.plot(pick, line[pick], "*", markersize=15, color=drawn.get_color(), markeredgecolor="black", label=label)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))
            axis.set_title(f"{name}, edit {preset}", fontsize=11)
            axis.set_xlabel("layer of the edit")
            axis.set_ylabel("retain loss (nats a row)")
            axis.grid(alpha=0.25, which="both")
            axis.legend(fontsize=9)
    figure.suptitle("Every edit forgets to the same level; a line is a fold of validation people", fontsize=11)
    return figure


if __name__ == "__main__":
    main()
