"""Choose the settings of assets/edits.yaml on validation people or authors; never on the rows that are reported.

    python benchmarks/tune_edits.py tiny closed-world
    python benchmarks/tune_edits.py tiny-tofu tofu:forget01 --data DIR

`remask edit tune` over the validation rows: `default`, and what it is compared with (`ridge`, `paper`, `mean-delta`), whose
layers are chosen by the smallest retain loss at the level; `anchors` compares what an anchor hides. Folds hold as many people
as the benchmark forgets. Writes the runs to --work and what was measured to benchmarks/results/tune_<model>_<run>.json; prints
the entries for assets/edits.yaml.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from remask import save_facts
from remask.evaluation.benchmarks.registry import load_benchmark, split_groups
from remask.experiments.tuning import TuneJob, run_tune

STRANGERS = ("Ada Crane", "Greta Nash", "Kaya Frost", "Xenia Penrose")  # nobody was taught them
ANCHOR: dict[str, tuple[Any, ...]] = {"anchor": ("unknown",)}
RUNS: dict[str, dict[str, Any]] = {
    "default": {"values": {**ANCHOR, "mu": (10.0, 30.0, 100.0), "beta": (2.0, 4.0)}, "budget": 10},
    "ridge": {"values": {**ANCHOR, "mu": (10.0, 100.0, 300.0)}, "budget": 8},
    "anchors": {"presets": ("ridge",), "values": {"anchor": ("prompt", "subject", "unknown"), "mu": (10.0,)}},
    "controls": {"presets": ("paper", "mean-delta"), "values": {**ANCHOR, "ridge": (1.0,)}},
}
FOLDS = 2
BUDGET = 1.0  # nats a retain row


def best(run: dict[str, Any], preset: str) -> dict[str, Any]:
    """What is chosen; of what it is compared with, the setting that costs the retain rows least at the level."""
    if preset == "default":
        return dict(run["chosen"]["build"])
    at_level = [
        (point["retain_loss"], {key: value for key, value in setting.items() if key not in ("points", "folds", "ridge")})
        for setting in run["settings"]
        for point in setting["points"]
        if setting["preset"] == preset and point["at_level"]
    ]
    return min(at_level, key=lambda pair: pair[0])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("benchmark")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/tune_edits"))
    parser.add_argument("--only", nargs="+", choices=RUNS, help="runs to make")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console, work = Console(), asked.work / asked.model
    benchmark = load_benchmark(asked.benchmark, asked.data)
    people = len({fact.group for fact in benchmark.forget})
    there = len({fact.group for fact in benchmark.validation})
    folds = split_groups(benchmark.validation, [people] * min(FOLDS, there // people), "tune")
    work.mkdir(parents=True, exist_ok=True)
    facts, retain = work / "facts.jsonl", work / "retain.jsonl"
    save_facts([fact for fold in folds for fact in fold], facts)
    save_facts([*benchmark.fit, *benchmark.validation_retain], retain)
    for name in asked.only or RUNS:
        settings = RUNS[name]
        job = TuneJob(
            asked.model,
            facts,
            retain,
            reference=f"{asked.model}-reference",
            unknown=STRANGERS,
            retain_budget=BUDGET,
            folds=len(folds),
            **{"presets": (name,), **settings},
        )
        found = run_tune(job, work / name, console)
        out = Path(__file__).parent / "results" / f"tune_{asked.model}_{name}.json"
        out.write_text(json.dumps({"benchmark": asked.benchmark, **found}, indent=1, ensure_ascii=False) + "\n")
        for preset in job.presets:
            console.print(f"{preset}: {json.dumps(best(found, preset))}")


if __name__ == "__main__":
    main()
