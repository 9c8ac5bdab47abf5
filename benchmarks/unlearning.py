"""Every method of `remask unlearn` and the edit memory in one table: what each forgets, what it costs, and at one common level.

    python benchmarks/unlearning.py tiny
    python benchmarks/unlearning.py tiny-tofu --data DIR                           (forget10)
    python benchmarks/unlearning.py tiny-tofu --data DIR --split forget05 --only default mean-delta paper

Learning rates are chosen on a validation split (people or authors that are not reported): of the grid, the rate that comes
nearest to the never-trained level (the prompt-masked one where the reference knows that split) while held retain rows lose at
most BUDGET nats each; where none does, the one that costs them least. Then the runs on the reported split, all on one mask
bank. Every cell is a file in --work, so a killed run goes on, several processes can share the work (`--share --only NAME ...`
in each), and the last call writes benchmarks/results/unlearning_<model>.json, or unlearning_<model>_<split>.json. What is
measured, and the strength that brings an edit to the common level, is measured under bf16 autocast; methods train as they do
by default; memories are built in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from remask import Fact, Intervention, MaskBank, MaskedDiffusionLM, RemaskError, elbo, load
from remask.editing.calibrate import CALIBRATION_BANK, Level, calibrate, target_level
from remask.evaluation.benchmarks.registry import load_benchmark, split_groups
from remask.evaluation.generation import answers
from remask.evaluation.metrics.text import exact_match, junk_rate, rouge_l_recall
from remask.evaluation.records import package_versions
from remask.evaluation.statistics import bootstrap_interval
from remask.experiments.edits import build_edit
from remask.experiments.unlearning import EDITORS, NAMES, apply, config_of
from remask.facts import write_json
from remask.figures import save_figure
from remask.unlearning.unlearn import LOG

SPLITS = ("forget10", "forget05", "forget01")  # of TOFU
STEPS = {"tiny": 100, "tiny-tofu": 50}
POINTS = 10  # of the curve along training, of the first seed
RATES = {"tiny": (2e-4, 5e-4, 1e-3, 2e-3), "tiny-tofu": (5e-4, 1e-3, 2e-3)}
BUDGET = 2.0  # nats a held retain row
BANK = MaskBank(draws=4, replicates=2, seed=0)
LEVELLED = 100  # forget rows, about, that a trained method's strength is scaled on
WRITTEN = 24  # rows of a group whose answers are generated, under the first seed
MEMORIES: dict[str, dict[str, Any]] = {  # and what is changed of their settings
    "default": {},
    "default landmarks=1500": {"landmarks": 1500},
    "default landmarks=1500 beta=8": {"landmarks": 1500, "beta": 8.0},
    "mean-delta": {},
    "paper": {},
}
MANY = [name for name in MEMORIES if "=" in name]  # for hundreds of facts; measured under one seed
ONE_SEED = (*MANY, *EDITORS)  # on TOFU: values are optimised fact by fact there
VARIANTS: dict[str, dict[str, Any]] = {  # of MDU: what its temperature, states and anchor do
    "mdu tau=0.5": {"tau": 0.5},
    "mdu tau=1": {"tau": 1.0},
    "mdu tau=1 high-noise": {"tau": 1.0, "noise": {"law": "high-noise"}},
    "mdu tau=1 never-trained": {"tau": 1.0, "anchor": "never-trained", "prompt": "keep"},
}


@dataclass(frozen=True)
class Split:
    """What is forgotten, what a method may keep with, what its curve watches, and what is only scored."""

    forget: Sequence[Fact]
    fit: Sequence[Fact]
    watched: Sequence[Fact]
    scored: dict[str, Sequence[Fact]]


class Study:
    """One model and its two splits: the one that is reported, and the one that settings are chosen on."""

    def __init__(self, model: str, split: str, data: Path | None, work: Path, seeds: int) -> None:
        self.model, self.seeds = model, range(seeds)
        self.name = model if model == "tiny" else f"{model}_{split}"
        self.work = work / self.name
        self.lm, self.twin = load(model), load(f"{model}-reference")
        self.benchmark = b = load_benchmark("closed-world" if model == "tiny" else f"tofu:{split}", data)
        scored = {name: b.scored[name] for name in b.scored if name not in ("text", "unknown")}
        self.reported = Split(b.forget, b.fit, b.validation_retain, scored)
        self.goals: dict[str, Level] = {"reported": "auto", "validation": "never-trained" if b.validation else "prompt-masked"}
        if b.validation:
            self.validation = Split(b.validation, b.fit, b.validation_retain, {"retain": b.validation_retain})
        else:  # forget10 leaves no authors to forget for practice: validation authors of the retain set take their place
            fit, held = split_groups(b.fit, (8, 2), "unlearning validation")
            self.validation = Split(b.validation_retain, fit, held, {"retain": held})
        self.console = Console()

    # ------------------------------------------------------------ one run
    def cell(self, name: str, split: str, rate: float | None, seed: int) -> dict[str, Any]:
        """A finished run: read, or made."""
        path = self.work / f"{split}-{name}-{rate}-{seed}.json".replace(" ", "_")
        if not path.is_file():
            self.console.print(f"{self.model}: {name}, {split}, rate {rate}, seed {seed}")
            found = self._run(name, getattr(self, split), rate, seed, path.with_suffix(""), whole=split == "reported")
            write_json(path, found)
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _run(self, name: str, rows: Split, rate: float | None, seed: int, out: Path, *, whole: bool) -> dict[str, Any]:
        try:
            edit, cost = self._edit(name, rows, rate, seed, out)
        except RemaskError as error:
            return {"failed": str(error)}
        log = out / LOG
        curve = json.loads(log.read_text()).get("curve") if log.is_file() and whole and seed == 0 else None
        found: dict[str, Any] = {"cost": cost, "curve": curve, "own": self._measured(edit, rows, seed if whole else None)}
        if whole:
            if name in MEMORIES:  # are at the level as they are
                found["calibrated"] = {"alpha": edit.alpha, **found["own"]}
            else:
                found["calibrated"] = self._calibrated(edit, rows) if seed == 0 else None
        return found

    def _edit(self, name: str, rows: Split, rate: float | None, seed: int, out: Path) -> tuple[Any, dict[str, Any]]:
        if name in MEMORIES:
            preset, changes = name.split()[0], MEMORIES[name]
            built = build_edit(self.lm, preset, rows.forget, rows.fit, alpha=1.0, seed=seed, **changes)
            return self._scaled(built, rows.forget, self.levels("reported")["goal"]), {}
        settings: dict[str, Any] = {"seed": seed} | VARIANTS.get(name, {})
        method = name.split()[0]
        if method not in EDITORS:
            steps = STEPS[self.model]
            every = math.ceil(steps / POINTS) if rows is self.reported and seed == 0 else steps
            settings |= {"steps": steps, "learning_rate": rate, "evaluate_every": every, "checkpoint_every": steps}
        watched = () if method in EDITORS else rows.watched
        reference = self.twin if settings.get("anchor") == "never-trained" else None
        config = config_of(method, settings)
        edit = apply(self.lm, rows.forget, rows.fit, config, out, validation=watched, reference=reference)
        return edit, json.loads((out / LOG).read_text())["cost"]

    # ------------------------------------------------------------ measuring
    def _measured(self, edit: Intervention, rows: Split, seed: int | None) -> dict[str, Any]:
        """Mean log-probability of every group, nats a row; with the first seed also what is answered."""
        with edit.attached(self.lm):
            found: dict[str, Any] = {name: self._logprobs(facts) for name, facts in self.groups(rows).items()}
            if seed == 0:
                found["answers"] = {name: self._answers(self.groups(rows)[name]) for name in ("forget", "retain")}
        return found

    def _calibrated(self, edit: Any, rows: Split) -> dict[str, Any] | None:
        """The same at the strength that brings the forget rows to the common level; None where no strength does."""
        try:
            scaled = self._scaled(edit, *self.sample)
        except RemaskError:
            return None
        return {"alpha": scaled.alpha, **self._measured(scaled, rows, None)}

    @cached_property
    def sample(self) -> tuple[Sequence[Fact], float]:
        """Reported forget rows that trained methods are scaled on, and their level."""
        facts = self.reported.forget[:: max(1, len(self.reported.forget) // LEVELLED)]
        with torch.autocast("cpu", torch.bfloat16):
            return facts, target_level(self.lm, facts, self.twin)

    def _scaled(self, edit: Any, facts: Sequence[Fact], level: float) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return calibrate(self.lm, edit, [self.lm.encode(fact) for fact in facts], level, CALIBRATION_BANK)

    @staticmethod
    def groups(rows: Split) -> dict[str, Sequence[Fact]]:
        """Rows that are scored, by group."""
        return {"forget": rows.forget, **rows.scored}

    def _logprobs(self, facts: Sequence[Fact], lm: MaskedDiffusionLM | None = None) -> list[float]:
        lm = lm or self.lm
        with torch.autocast("cpu", torch.bfloat16):
            return [round(score.logprob, 3) for score in elbo(lm, [lm.encode(fact) for fact in facts], BANK)]

    def _answers(self, facts: Sequence[Fact]) -> dict[str, Any]:
        step = max(1, len(facts) // WRITTEN)
        chosen = list(facts)[::step][:WRITTEN]
        with torch.autocast("cpu", torch.bfloat16):
            texts = answers(self.lm, [self.lm.encode(fact) for fact in chosen])
        pairs = list(zip(texts, (fact.answer for fact in chosen), strict=True))
        return {
            "exact": float(np.mean([exact_match(*pair) for pair in pairs])),
            "rouge": float(np.mean([rouge_l_recall(*pair) for pair in pairs])),
            "junk": junk_rate(texts),
            "rows": len(chosen),
        }

    # ------------------------------------------------------------ choosing and reporting
    def levels(self, split: str) -> dict[str, Any]:
        """Before, and what the twin says, of every group; and the level to forget to."""
        path = self.work / f"{split}-levels.json"
        if not path.is_file():
            rows: Split = getattr(self, split)
            found: dict[str, Any] = {
                name: {"before": self._logprobs(facts), "never trained": self._logprobs(facts, self.twin)}
                for name, facts in self.groups(rows).items()
            }
            with torch.autocast("cpu", torch.bfloat16):
                found["goal"] = target_level(self.lm, rows.forget, self.twin, self.goals[split])
            if split == "reported":
                found["answers"] = {name: self._answers(self.groups(rows)[name]) for name in ("forget", "retain")}
            write_json(path, found)
        return dict(json.loads(path.read_text()))

    def rate(self, name: str) -> tuple[float | None, list[dict[str, Any]]]:
        """The chosen learning rate, and what every rate of the grid gave on the validation split."""
        if name in MEMORIES or name.split()[0] in EDITORS:
            return None, []
        levels, tried = self.levels("validation"), []
        for rate in RATES[self.model]:
            found = self.cell(name, "validation", rate, 0)
            if "failed" in found:
                tried.append({"rate": rate, "failed": found["failed"]})
                continue
            own = found["own"]
            loss = float(np.mean(levels["retain"]["before"]) - np.mean(own["retain"]))
            distance = float(np.mean(own["forget"]) - levels["goal"])
            tried.append({"rate": rate, "distance": distance, "retain_loss": loss})
        finished = [line for line in tried if "failed" not in line]
        if not finished:
            return RATES[self.model][0], tried
        within = [line for line in finished if line["retain_loss"] <= BUDGET]
        best = (
            min(within, key=lambda line: abs(line["distance"]))
            if within
            else min(finished, key=lambda line: line["retain_loss"])
        )
        return best["rate"], tried

    def report(self, name: str) -> dict[str, Any]:
        """A method's line: its rate, and the seeds' runs summarised."""
        rate, tried = self.rate(name)
        seeds = self.seeds[:1] if name in ONE_SEED and self.model != "tiny" else self.seeds
        runs = [self.cell(name, "reported", rate, seed) for seed in seeds]
        levels = self.levels("reported")
        line: dict[str, Any] = {
            "name": name,
            "rate": rate,
            "validation": tried,
            "failed": [r["failed"] for r in runs if "failed" in r],
        }
        done = [run for run in runs if "failed" not in run]
        for strength in ("own", "calibrated"):
            measured = [run[strength] for run in done if run[strength]]
            line[strength] = _summary(measured, levels, self.groups(self.reported)) if measured else None
        if done:
            line["answers"] = done[0]["own"]["answers"]
            line["curve"] = done[0]["curve"]
            line["cost"] = {key: float(np.median([run["cost"][key] for run in done])) for key in done[0]["cost"]}
        return line


def _summary(runs: Sequence[dict[str, Any]], levels: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any]:
    """Changes of every group with a bootstrap over rows of the mean over seeds, and the share of the gap that is closed."""
    found: dict[str, Any] = {"runs": len(runs)}
    for name in groups:
        before = np.array(levels[name]["before"])
        changes = np.array([np.array(run[name]) - before for run in runs])
        estimate = bootstrap_interval(changes.mean(axis=0).tolist())
        found[name] = {
            "mean": estimate.mean,
            "low": estimate.low,
            "high": estimate.high,
            "seeds": [round(float(v), 3) for v in changes.mean(axis=1)],
        }
    gap = np.mean(levels["forget"]["never trained"]) - np.mean(levels["forget"]["before"])
    found["closed"] = [round(v / float(gap), 4) for v in found["forget"]["seeds"]]
    found["selectivity"] = found["forget"]["mean"] / found["retain"]["mean"] if found["retain"]["mean"] else math.nan
    if "alpha" in runs[0]:
        found["alpha"] = [run["alpha"] for run in runs]
    return found


def paths(record: dict[str, Any]) -> Figure:
    """What forget rows and watched retain rows lose along training, a line a method; what has no such path as a point."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(record["methods"]):
        if line["own"] is None:
            continue
        curve = line["curve"] if line["name"] != "task-vector" else None  # which learns first and is subtracted then
        colour, first = f"C{place % 10}", (curve or [None])[0]
        if first is None:
            x, y, marker = [-line["own"]["retain"]["mean"]], [-line["own"]["forget"]["mean"]], "*"
        else:
            x = [point["drift"] for point in curve]
            y, marker = [first["forget"] - point["forget"] for point in curve], ""
        x, y = ([max(value, 0.0) for value in values] for values in (x, y))
        axes.plot(x, y, color=colour, lw=1, ls=("-", "--", ":")[place // 10 % 3], marker=marker, ms=12)
        axes.plot(x[-1:], y[-1:], "." if first else "", color=colour)
        style = {"textcoords": "offset points", "fontsize": 7, "color": colour, "rotation": 0 if first else 35}
        axes.annotate(line["name"], (x[-1], y[-1]), (4, 2), **style)
    goal = record["levels"]["forget"]["before"] - record["levels"]["auto"]
    axes.axhline(goal, color="0.6", lw=0.8)
    axes.annotate("prompt-masked level", (0.005, goal), (0, 3), textcoords="offset points", fontsize=7, color="0.4")
    axes.axvline(BUDGET, color="0.6", lw=0.8)
    axes.set_xscale("symlog", linthresh=0.03)
    axes.set_yscale("symlog", linthresh=0.03)
    axes.set(xlim=(0, 2 * axes.dataLim.x1), ylim=(0, 5 * axes.dataLim.y1))
    alike = np.geomspace(0.001, axes.get_ylim()[1])
    axes.plot(alike, alike, color="0.8", lw=0.8)
    axes.set(xlabel="lost by a retain row, nats", ylabel="lost by a forget row, nats")
    axes.set_title(f"{record['model']}, {record['benchmark']}: {record['steps']} steps", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=STEPS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="of TOFU")
    parser.add_argument("--work", type=Path, default=Path("out/unlearning"))
    parser.add_argument("--only", nargs="+", help="methods; by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", action="store_true", help="only make the cells, for another call to put together")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(asked.model, asked.split, asked.data, asked.work, asked.seeds)
    names = asked.only or [name for name in (*MEMORIES, *NAMES, *VARIANTS) if asked.model != "tiny" or name not in MANY]
    lines = [study.report(name) for name in names]
    if asked.share:
        return
    command = ["python benchmarks/unlearning.py", asked.model]
    command += ["--data DIR", f"--split {asked.split}"] if asked.data else []
    command += ["--only", *(f'"{name}"' if " " in name else name for name in asked.only)] if asked.only else []
    levels = study.levels("reported")
    summary = {
        name: {key: float(np.mean(v)) for key, v in found.items()}
        for name, found in levels.items()
        if name in study.groups(study.reported)
    }
    record = {
        "command": " ".join(command),
        "model": asked.model,
        "benchmark": study.benchmark.name,
        "rows": {name: len(facts) for name, facts in study.groups(study.reported).items()},
        "steps": STEPS[asked.model],
        "grid": list(RATES[asked.model]),
        "budget": BUDGET,
        "seeds": list(study.seeds),
        "bank": {"draws": BANK.draws, "replicates": BANK.replicates, "seed": BANK.seed},
        "levels": summary | {"auto": levels["goal"]},
        "answers before": levels["answers"],
        "versions": package_versions(),
        "methods": lines,
    }
    root = Path(__file__).parents[1]
    out = root / "benchmarks" / "results" / f"unlearning_{study.name}.json"
    write_json(out, record)
    if any(line.get("curve") for line in lines):
        save_figure(paths(record), root / "docs" / "images" / f"unlearning_{study.name}.png")


if __name__ == "__main__":
    main()
