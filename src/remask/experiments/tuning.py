"""`remask edit tune`: the settings of an edit memory, chosen on a validation split against a stated objective.

Whole people or authors are dealt out: retain rows to a memory's own retain set (`fit`) or to the rows that are only scored
(`validation`), facts to folds. A memory of a fold's facts is calibrated on them, since forgetting is about the facts that are
installed; what it costs is read on the validation rows, which no memory has seen.

| file | what it is |
|---|---|
| `tune.json` | splits, every measured setting, the objective, the Pareto frontier, the chosen setting |
| `frontier.png` | retain loss against the distance to the level |
| `parts/` | one finished (setting, fold) each; a killed run goes on from them |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console

from ..backbones import MaskedDiffusionLM, Site, load
from ..editing.calibrate import Level, calibrate
from ..editing.memory import EditMemory
from ..errors import RemaskError
from ..facts import Fact, load_facts, write_atomically, write_json
from ..figures import save_figure
from ..reporting.frontier import frontier_figure
from .tuningbench import AXES, BANK, CONTROL, LADDER, Bench, Setting, grid, split
from .workers import Workers


@dataclass(frozen=True)
class TuneJob:
    """What `remask edit tune` is asked for.

    Attributes:
        model, reference: names or folders; facts, retain: JSON Lines files.
        level: what the memories are calibrated to, see `target_level`.
        presets: of AXES; layers: None = all of them.
        values: for fields of MemoryConfig the values to try, in place of the default grid.
        unknown: names for the anchor `unknown`.
        budget: settings to measure at most; None = the whole grid.
        retain_budget: retain loss that is accepted, nats a row.
        folds: parts that the facts are dealt into, at most as many as there are groups.
        seed: of the split.
    """

    model: str
    facts: Path
    retain: Path
    reference: str | None = None
    level: Level = "auto"
    presets: tuple[str, ...] = ("default",)
    layers: tuple[int, ...] | None = None
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    budget: int | None = None
    retain_budget: float = 1.0
    folds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.presets:
            if name not in AXES:
                raise RemaskError(f"preset {name!r} cannot be tuned; choose among {', '.join(AXES)}")
        if self.level not in get_args(Level):
            raise RemaskError(f"level {self.level!r} is unknown; choose one of {', '.join(get_args(Level))}")
        unused = set(self.values) - {axis for name in self.presets for axis in AXES[name]}
        if unused:
            raise RemaskError(f"no preset among {', '.join(self.presets)} has a {min(unused)!r} to vary; drop it or add one")
        if (self.budget is not None and self.budget < 1) or self.folds < 1 or not 0 <= self.retain_budget < math.inf:
            raise RemaskError("tuning needs a budget and folds of at least 1 and a finite retain budget of at least 0 nats")


# ------------------------------------------------------------------ in which order
def first_pass(settings: Sequence[Setting], budget: int) -> list[Setting]:
    """Middle values at every layer, or at evenly spaced ones where the budget is smaller than that."""
    middle = [setting for setting in settings if setting.middle]
    count = min(budget, len(middle))
    return [middle[int((i + 0.5) * len(middle) / count)] for i in range(count)]


def second_pass(settings: Sequence[Setting], ranked: Sequence[Setting], left: int) -> list[Setting]:
    """The other values where the first pass went best; layers that it passed over come last.

    Args:
        ranked: settings of the first pass, best first.
    """
    order = {(setting.preset, setting.layer): place for place, setting in enumerate(ranked)}
    others = [setting for setting in settings if setting not in ranked]
    return sorted(others, key=lambda setting: order.get((setting.preset, setting.layer), len(order)))[:left]


# ------------------------------------------------------------------ choosing
def averaged(folds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points of a setting, each the mean over its folds; none where a fold could not be measured.

    distance: of the facts above the level (negative = below it), nats a row; closed: as the bench says, a share; retain_loss:
    mean size of the retain change, nats a row; selectivity: forget change over retain change. The folds share their validation
    rows, so that the mean of their standard errors is given, not less. at_level: every fold was calibrated, and this is its
    calibrated strength.
    """
    if not all(fold["points"] for fold in folds):
        return []
    points = []
    for place, factor in enumerate(LADDER):
        cells = [(fold, fold["points"][place]) for fold in folds]
        errors = [cell["retain_stderr"] for _, cell in cells]
        ratios = [abs((cell["forget"] - fold["before"]) / (cell["retain_change"] or math.nan)) for fold, cell in cells]
        points.append(
            {
                "factor": factor,
                "alpha": float(np.mean([cell["alpha"] for _, cell in cells])),
                "at_level": factor == 1 and all(fold["alpha"] is not None for fold in folds),
                "distance": float(np.mean([cell["forget"] - fold["level"] for fold, cell in cells])),
                "closed": float(np.mean([cell["closed"] for _, cell in cells])),
                "forget_change": float(np.mean([cell["forget"] - fold["before"] for fold, cell in cells])),
                "retain_loss": float(np.mean([abs(cell["retain_change"]) for _, cell in cells])),
                "retain_stderr": None if None in errors else float(np.mean(errors)),
                "selectivity": None if any(map(math.isnan, ratios)) else float(np.mean(ratios)),
            }
        )
    return points


def merit(point: Mapping[str, Any], retain_budget: float) -> tuple[int, float, float]:
    """The objective as a sort key, best first; OBJECTIVE says it in words."""
    loss = float(point["retain_loss"])
    if loss > retain_budget:
        return 1, loss, 0.0
    return (0, 0.0, -point["closed"]) if point["at_level"] else (0, abs(point["distance"]), loss)


OBJECTIVE = (
    "Among the measured points with a retain loss of at most {budget:g} nats a row, the one nearest to the level, on either "
    "side; a setting at its calibrated strength is at the level, and among those the one wins that closes most of each fact's "
    "own gap (the mean over facts, each capped at its level: one setting lowers long answers only, another all of them). Where "
    "no point is within the budget, the smallest retain loss. Controls are measured and never chosen."
)


def pareto(points: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the points that no other one beats: as deep (distance) at a smaller retain loss, or deeper at the same."""
    order = sorted(range(len(points)), key=lambda i: (points[i]["distance"], points[i]["retain_loss"]))
    found: list[int] = []
    for i in order:
        if not found or points[i]["retain_loss"] < points[found[-1]]["retain_loss"]:
            found.append(i)
    return found


def choose(settings: Sequence[Mapping[str, Any]], retain_budget: float) -> dict[str, Any]:
    """The Pareto frontier and the chosen point of measured settings (`preset`, `points`, `folds` with their `note`).

    Raises:
        RemaskError: no setting has a point.
    """
    points = [{"setting": i, **point} for i, s in enumerate(settings) if s["preset"] != CONTROL for point in s["points"]]
    if not points:
        notes = [fold["note"] for setting in settings for fold in setting["folds"] if fold["note"]]
        raise RemaskError(
            f"no setting could be measured: {notes[0] if notes else 'only controls were asked for; add a preset'}"
        )
    best = min(points, key=lambda point: merit(point, retain_budget))
    within = sum(point["retain_loss"] <= retain_budget for point in points)
    frontier = [{"setting": points[i]["setting"], "factor": points[i]["factor"]} for i in pareto(points)]
    return {"frontier": frontier, "within_budget": within, "points": len(points), "chosen": best}


# ------------------------------------------------------------------ the whole
def run_tune(
    job: TuneJob, out: Path, console: Console | None = None, load_options: Mapping[str, Any] | None = None, command: str = ""
) -> dict[str, Any]:
    """Tune into `out`; returns the content of tune.json.

    Raises:
        RemaskError: whatever the facts, the model or the options are refused for.
    """
    parts = split(load_facts(job.facts), load_facts(job.retain), job.folds, job.seed)
    lm = load(job.model, **(load_options or {}))
    settings = grid(lm.num_layers, job.presets, job.layers, job.values, job.unknown)
    reference = None if job.reference is None else load(job.reference, **(load_options or {}))
    if reference is not None and _vocabulary(reference) != _vocabulary(lm):
        raise RemaskError(f"{lm.name} and {reference.name} differ in vocabulary; give a reference of the same backbone")
    bench = Bench(lm, parts, reference, job.level)
    measured = _measured(bench, settings, job, out / "parts", console)
    found = choose(measured, job.retain_budget)
    record = {
        "command": command,
        "model": job.model,
        "fingerprint": bench.model,
        "reference": None if reference is None else {"model": job.reference, "fingerprint": bench.other},
        "level": job.level,
        "bank": asdict(BANK),
        "seed": job.seed,
        "split": parts.to_dict(),
        "grid": {"settings": len(settings), "measured": len(measured), "ladder": list(LADDER)},
        "objective": {"text": OBJECTIVE.format(budget=job.retain_budget), "retain_budget": job.retain_budget},
        "settings": measured,
        "frontier": found["frontier"],
        "chosen": _chosen(measured, found, job),
    }
    write_json(out / "tune.json", record)
    save_figure(frontier_figure(record), out / "frontier.png")
    return record


def _vocabulary(lm: MaskedDiffusionLM) -> tuple[int, int]:
    return lm.embedding.num_embeddings, lm.spec.mask_id


def _measured(
    bench: Bench, settings: Sequence[Setting], job: TuneJob, folder: Path, console: Console | None
) -> list[dict[str, Any]]:
    """Every setting that the budget allows, in the order of measurement, with its folds and points."""
    budget = len(settings) if job.budget is None else min(job.budget, len(settings))
    folds = range(len(bench.parts.folds))
    for fold in folds:
        bench.level_of(fold)  # refuses before anything is measured
    with Workers().bar(console) as progress:
        task = progress.add_task("tuning", total=budget * len(folds))

        def measure(setting: Setting) -> dict[str, Any]:
            found = []
            for fold in folds:
                path = folder / bench.name(setting, fold)
                if not path.is_file():
                    write_atomically(path, (json.dumps(bench.measure(setting, fold), indent=1) + "\n").encode())
                found.append(json.loads(path.read_text(encoding="utf-8")))
                progress.advance(task)
            return {**setting.to_dict(), "points": averaged(found), "folds": found}

        if budget == len(settings):
            return [measure(setting) for setting in settings]
        first = first_pass(settings, budget)
        results = [measure(setting) for setting in first]
        ranked = sorted(range(len(first)), key=lambda i: _best(results[i], job.retain_budget))
        return results + [measure(s) for s in second_pass(settings, [first[i] for i in ranked], budget - len(first))]


def _best(setting: Mapping[str, Any], retain_budget: float) -> tuple[int, float, float]:
    return min((merit(point, retain_budget) for point in setting["points"]), default=(2, 0.0, 0.0))


def _chosen(settings: Sequence[Mapping[str, Any]], found: Mapping[str, Any], job: TuneJob) -> dict[str, Any]:
    """The chosen point, why, and how to build it."""
    best = found["chosen"]
    setting = {key: value for key, value in settings[best["setting"]].items() if key not in ("points", "folds")}
    if not found["within_budget"]:
        reason = f"none of {found['points']} points is within the budget; the smallest retain loss"
    elif best["at_level"]:
        within = f"{found['within_budget']} of {found['points']} points are within the budget"
        reason = f"closes most of each fact's own gap at the level; {within}"
    else:
        reason = f"no setting reaches the level within the budget; nearest of the {found['within_budget']} points that are"
    build = {**setting, "alpha": "calibrated" if best["at_level"] else best["alpha"]}
    return {**best, "within_budget": best["retain_loss"] <= job.retain_budget, "reason": reason, "build": build}


def read_tuned(lm: MaskedDiffusionLM, folder: Path) -> tuple[Setting, float | None]:
    """The setting that `run_tune` chose in `folder`, and its strength; None = to be calibrated.

    Raises:
        RemaskError: no tune.json there, or one of another model (both are named).
    """
    path = folder / "tune.json" if folder.is_dir() else folder
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        model, build = str(record["fingerprint"]), dict(record["chosen"]["build"])
        name, layer, alpha = str(build.pop("preset")), int(build.pop("layer")), build.pop("alpha")
        strength = None if alpha == "calibrated" else float(alpha)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RemaskError(f"{path}: not a tune.json of `remask edit tune` ({error})") from None
    if model != lm.fingerprint():
        raise RemaskError(f"{path}: tuned on another model: {model}, {lm.name} is {lm.fingerprint()}; tune again")
    return Setting(name, layer, build), strength


def build_tuned(
    lm: MaskedDiffusionLM,
    setting: Setting,
    facts: Sequence[Fact],
    retain: Sequence[Fact],
    alpha: float | None = None,
    level: float | None = None,
) -> EditMemory:
    """The memory of `facts` under a setting of `read_tuned`; without an alpha it is calibrated to `level`.

    Raises:
        RemaskError: what `EditMemory.build` and `calibrate` refuse.
    """
    config = setting.config
    memory = EditMemory.build(lm, facts, Site(setting.layer), retain=retain if config.reads_retain else (), config=config)
    if alpha is not None:
        return memory.with_alpha(alpha)
    return calibrate(lm, memory, [lm.encode(fact) for fact in facts], level)
