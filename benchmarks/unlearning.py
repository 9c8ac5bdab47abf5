"""Every method of `remask unlearn` and the edit memory in one table: what each forgets, what it costs, and at one common level.

    python benchmarks/unlearning.py tiny
    python benchmarks/unlearning.py tiny-tofu --data DIR

Learning rates are chosen on a validation split (people or authors that are not reported): of the grid, the rate that comes
nearest to the never-trained level while held retain rows lose at most BUDGET nats each; where none does, the one that costs
them least. Then the runs on the reported split, all on one mask bank. Every cell is a file in --work, so a killed run goes on,
several processes can share the work (`--share --only NAME ...` in each), and the last call writes
benchmarks/results/unlearning_<model>.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from remask import Fact, Intervention, MaskBank, MaskedDiffusionLM, RemaskError, elbo, load
from remask.editing.calibrate import CALIBRATION_BANK, calibrate, target_level
from remask.evaluation.benchmarks.registry import load_benchmark, split_groups
from remask.evaluation.generation import answers
from remask.evaluation.metrics.text import exact_match, junk_rate, rouge_l_recall
from remask.evaluation.records import package_versions
from remask.evaluation.statistics import bootstrap_interval
from remask.experiments.edits import build_edit
from remask.experiments.unlearning import EDITORS, NAMES, apply, config_of
from remask.facts import write_atomically
from remask.unlearning.unlearn import LOG

BENCHMARKS = {"tiny": "closed-world", "tiny-tofu": "tofu:forget10"}
STEPS = {"tiny": 40, "tiny-tofu": 50}
RATES = (5e-4, 1e-3, 2e-3)
BUDGET = 2.0  # nats a held retain row
BANK = MaskBank(draws=4, replicates=2, seed=0)
WRITTEN = 24  # rows of a group whose answers are generated, under the first seed
MEMORIES = ("default", "mean-delta")
VARIANTS: dict[str, dict[str, Any]] = {  # of MDU: what its temperature, states and anchor do
    "mdu tau=0.5": {"tau": 0.5},
    "mdu tau=1": {"tau": 1.0},
    "mdu tau=1 high-noise": {"tau": 1.0, "noise": {"law": "high-noise"}},
    "mdu tau=1 never-trained": {"tau": 1.0, "anchor": "never-trained", "prompt": "keep"},
}


@dataclass(frozen=True)
class Split:
    """What is forgotten, what a method may keep with, and what is only scored."""

    forget: Sequence[Fact]
    fit: Sequence[Fact]
    scored: dict[str, Sequence[Fact]]


class Study:
    """One model and its two splits."""

    def __init__(self, model: str, data: Path | None, work: Path, seeds: int) -> None:
        self.model, self.work, self.seeds = model, work / model, range(seeds)
        self.lm, self.twin = load(model), load(f"{model}-reference")
        self.benchmark = load_benchmark(BENCHMARKS[model], data)
        b = self.benchmark
        self.reported = Split(b.forget, b.fit, {name: b.scored[name] for name in b.scored if name not in ("text", "unknown")})
        if b.validation:
            self.validation = Split(b.validation, b.fit, {"retain": b.validation_retain})
        else:  # forget10 leaves no authors to forget for practice: validation authors of the retain set take their place
            fit, held = split_groups(b.fit, (8, 2), "unlearning validation")
            self.validation = Split(b.validation_retain, fit, {"retain": held})
        self.console = Console()

    # ------------------------------------------------------------ one run
    def cell(self, name: str, split: str, rate: float | None, seed: int) -> dict[str, Any]:
        """A finished run: read, or made."""
        path = self.work / f"{split}-{name}-{rate}-{seed}.json".replace(" ", "_")
        if not path.is_file():
            self.console.print(f"{self.model}: {name}, {split}, rate {rate}, seed {seed}")
            found = self._run(name, getattr(self, split), rate, seed, path.with_suffix(""), whole=split == "reported")
            write_atomically(path, json.dumps(found, indent=1, ensure_ascii=False).encode())
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _run(self, name: str, rows: Split, rate: float | None, seed: int, out: Path, *, whole: bool) -> dict[str, Any]:
        try:
            edit, cost = self._edit(name, rows, rate, seed, out)
        except RemaskError as error:
            return {"failed": str(error)}
        found = {"cost": cost, "own": self._measured(edit, rows, seed if whole else None)}
        if whole:
            found["calibrated"] = self._calibrated(edit, rows) if seed == 0 else None
        return found

    def _edit(self, name: str, rows: Split, rate: float | None, seed: int, out: Path) -> tuple[Any, dict[str, Any]]:
        if name in MEMORIES:
            level = target_level(self.lm, rows.forget, self.twin)
            return build_edit(self.lm, name, rows.forget, rows.fit, level=level, seed=seed), {}
        settings: dict[str, Any] = {"seed": seed} | VARIANTS.get(name, {})
        method = name.split()[0]
        if method not in EDITORS:
            settings |= {"steps": STEPS[self.model], "learning_rate": rate, "tails": (0.4, 0.4, 0.2)}
        elif rate is not None:
            settings |= {"learning_rate": rate}
        reference = f"{self.model}-reference" if settings.get("anchor") == "never-trained" else None
        edit = apply(self.lm, rows.forget, rows.fit, config_of(method, settings), out, reference=reference)
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
        level = target_level(self.lm, rows.forget, self.twin)
        encoded = [self.lm.encode(fact) for fact in rows.forget]
        try:
            scaled = calibrate(self.lm, edit, encoded, level, CALIBRATION_BANK)
        except RemaskError:
            return None
        return {"alpha": scaled.alpha, **self._measured(scaled, rows, None)}

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
        """Before, and what the twin says, of every group."""
        path = self.work / f"{split}-levels.json"
        if not path.is_file():
            rows: Split = getattr(self, split)
            found: dict[str, Any] = {
                name: {"before": self._logprobs(facts), "never trained": self._logprobs(facts, self.twin)}
                for name, facts in self.groups(rows).items()
            }
            found["auto level"] = target_level(self.lm, rows.forget, self.twin)
            found["answers"] = {name: self._answers(self.groups(rows)[name]) for name in ("forget", "retain")}
            write_atomically(path, json.dumps(found).encode())
        return dict(json.loads(path.read_text()))

    def rate(self, name: str) -> tuple[float | None, list[dict[str, Any]]]:
        """The chosen learning rate, and what every rate of the grid gave on the validation split."""
        if name in MEMORIES or name.split()[0] in EDITORS:
            return None, []
        levels, tried = self.levels("validation"), []
        target = np.mean(levels["forget"]["never trained"])
        for rate in RATES:
            found = self.cell(name, "validation", rate, 0)
            if "failed" in found:
                tried.append({"rate": rate, "failed": found["failed"]})
                continue
            own = found["own"]
            loss = float(np.mean(levels["retain"]["before"]) - np.mean(own["retain"]))
            distance = float(np.mean(own["forget"]) - target)
            tried.append({"rate": rate, "distance": distance, "retain_loss": loss})
        finished = [line for line in tried if "failed" not in line]
        if not finished:
            return RATES[0], tried
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
        runs = [self.cell(name, "reported", rate, seed) for seed in self.seeds]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=BENCHMARKS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/unlearning"))
    parser.add_argument("--only", nargs="+", help="methods; by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", action="store_true", help="only make the cells, for another call to put together")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(asked.model, asked.data, asked.work, asked.seeds)
    names = asked.only or [*MEMORIES, *NAMES, *VARIANTS]
    lines = [study.report(name) for name in names]
    if asked.share:
        return
    levels = study.levels("reported")
    summary = {
        name: {key: float(np.mean(v)) for key, v in found.items()}
        for name, found in levels.items()
        if name in study.groups(study.reported)
    }
    record = {
        "command": " ".join(["python benchmarks/unlearning.py", asked.model, *(["--data DIR"] if asked.data else [])]),
        "only": asked.only,
        "model": asked.model,
        "benchmark": BENCHMARKS[asked.model],
        "rows": {name: len(facts) for name, facts in study.groups(study.reported).items()},
        "steps": STEPS[asked.model],
        "grid": list(RATES),
        "budget": BUDGET,
        "seeds": list(study.seeds),
        "bank": {"draws": BANK.draws, "replicates": BANK.replicates, "seed": BANK.seed},
        "levels": summary | {"auto": levels["auto level"]},
        "answers before": levels["answers"],
        "versions": package_versions(),
        "methods": lines,
    }
    out = Path(__file__).parent / "results" / f"unlearning_{asked.model}.json"
    write_atomically(out, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
