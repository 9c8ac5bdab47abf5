"""Choose layer, anchor and mu of the edits on validation people or authors; never on the rows that are reported.

    python benchmarks/tune_edits.py tiny closed-world
    python benchmarks/tune_edits.py tiny-tofu tofu:forget01 --data DIR

For every setting the edit is calibrated to the level of the validation facts (by default the twin's or the prompt-masked one,
whichever is higher; folds of whole people or authors, as many at a time as the benchmark forgets), and the retain change is
read on validation retain rows. The setting with the smallest mean absolute retain change wins: first anchor and layer at
mu = 10, then mu. Paper and mean-delta choose their layer by the same rule. Prints the entries for assets/edits.yaml and
writes every setting to
benchmarks/results/tune_<model>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.progress import track

from remask import Fact, MaskBank, RemaskError, Site, load
from remask.editing.calibrate import Level, calibrate, mean_logprob, target_level
from remask.editing.config import preset
from remask.editing.memory import EditMemory
from remask.editing.steering import mean_delta
from remask.evaluation.benchmarks.registry import load_benchmark, split_groups

MUS = (1.0, 3.0, 30.0, 100.0, 300.0)
FIRST_MU = 10.0
STRANGERS = ("Ada Crane", "Greta Nash", "Kaya Frost", "Xenia Penrose")  # nobody was taught them; in the world's fit set
BANK = MaskBank(draws=4, replicates=1, seed=3_000_003)


class Tuner:
    """One model, one benchmark, its validation folds; measures a setting and remembers it.

    A fold is `people` whole people or authors, by default as many as the benchmark forgets.
    """

    def __init__(self, model: str, name: str, data: Path | None, folds: int, level: Level, people: int | None = None) -> None:
        self.level = level
        self.lm, self.twin = load(model), load(f"{model}-reference")
        self.benchmark = load_benchmark(name, data)
        size = people or len({fact.group for fact in self.benchmark.forget})
        names = len({fact.group for fact in self.benchmark.validation})
        self.folds = split_groups(self.benchmark.validation, [size] * min(folds, names // size), "tune")
        self.kept = [self.lm.encode(fact) for fact in self.benchmark.validation_retain]
        self.kept_before = mean_logprob(self.lm, self.kept, BANK)
        self.settings: list[dict[str, Any]] = []

    def measure(self, edit: str, layer: int, **changes: Any) -> dict[str, Any]:
        """Calibrate on every fold and read the retain change; None where a fold cannot reach its level."""
        folds = [self._fold(edit, fold, layer, changes) for fold in self.folds]
        done = [fold for fold in folds if "failed" not in fold]
        complete = len(done) == len(folds)
        loss = float(np.mean([abs(fold["retain_change"]) for fold in done])) if complete else None
        ratio = float(np.mean([fold["forget_change"] / fold["retain_change"] for fold in done])) if complete else None
        entry = {"edit": edit, "layer": layer, **changes, "retain_loss": loss, "selectivity": ratio, "folds": folds}
        self.settings.append(entry)
        return entry

    def _fold(self, edit: str, fold: list[Fact], layer: int, changes: dict[str, Any]) -> dict[str, Any]:
        lm = self.lm
        rows = [lm.encode(fact) for fact in fold]
        level = target_level(lm, fold, self.twin, self.level, BANK)
        config = preset("paper") if edit == "paper" else preset("default", **changes)
        retain = self.benchmark.fit if config.mu else ()
        memory = EditMemory.build(lm, fold, Site(layer), retain=retain, config=config)
        try:
            chosen = calibrate(lm, mean_delta(memory) if edit == "mean-delta" else memory, rows, level, BANK)
        except RemaskError as error:
            return {"failed": str(error)}
        before = mean_logprob(lm, rows, BANK)
        with chosen.attached(lm):
            forget, retained = mean_logprob(lm, rows, BANK), mean_logprob(lm, self.kept, BANK)
        return {"alpha": chosen.alpha, "forget_change": forget - before, "retain_change": retained - self.kept_before}


def best(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry with the smallest retain loss among those that reached the level."""
    reached = [entry for entry in entries if entry["retain_loss"] is not None]
    if not reached:
        raise RemaskError(f"no setting of {entries[0]['edit']} reached its level on every fold")
    return min(reached, key=lambda entry: entry["retain_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("benchmark")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--level", default="auto", choices=get_args(Level), help="calibrate every setting to this level")
    arguments = parser.parse_args()
    tuner = Tuner(arguments.model, arguments.benchmark, arguments.data, arguments.folds, arguments.level)
    anchors: list[dict[str, Any]] = [
        {"anchor": "prompt"},
        {"anchor": "subject"},
        {"anchor": "unknown", "unknown": STRANGERS},
    ]
    layers = range(tuner.lm.num_layers)
    first = [
        tuner.measure("default", layer, mu=FIRST_MU, **anchor)
        for anchor, layer in track([(anchor, layer) for anchor in anchors for layer in layers], "anchor and layer")
    ]
    top = best(first)
    fixed = {key: top[key] for key in ("anchor", "unknown") if key in top}
    default = best([top, *(tuner.measure("default", top["layer"], mu=mu, **fixed) for mu in track(MUS, "mu"))])
    chosen = {"default": {"layer": default["layer"], "mu": default["mu"], **fixed}}
    paper = best([tuner.measure("paper", layer) for layer in track(layers, "paper")])
    control = best([tuner.measure("mean-delta", layer, mu=0.0, **fixed) for layer in track(layers, "mean-delta")])
    chosen["paper"], chosen["mean-delta"] = {"layer": paper["layer"]}, {"layer": control["layer"], **fixed}
    console = Console()
    for name, entry in (("default", default), ("paper", paper), ("mean-delta", control)):
        console.print(f"{name}: {json.dumps(chosen[name])}")
        console.print(f"  retain change {entry['retain_loss']:.2f} nats, selectivity {entry['selectivity']:.1f}")
    suffix = "" if arguments.level == "auto" else f"_{arguments.level}"
    out = Path(__file__).parent / "results" / f"tune_{arguments.model}{suffix}.json"
    out.parent.mkdir(exist_ok=True)
    record = {
        "model": arguments.model,
        "fingerprint": tuner.lm.fingerprint(),
        "benchmark": arguments.benchmark,
        "level": arguments.level,
        "folds": [sorted({fact.group for fact in fold}) for fold in tuner.folds],
        "bank": {"draws": BANK.draws, "replicates": BANK.replicates, "seed": BANK.seed},
        "chosen": chosen,
        "settings": tuner.settings,
    }
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
