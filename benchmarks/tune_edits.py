"""Choose layer and mu of the edits on validation people or authors; never on the rows that are reported.

    python benchmarks/tune_edits.py tiny world
    python benchmarks/tune_edits.py tiny-tofu tofu:forget01 --data DIR

For every setting the edit is calibrated to the reference twin's level of the validation facts (folds of whole people or
authors, as many at a time as the benchmark forgets), and the retain change is read on validation retain rows. The setting
with the smallest mean absolute retain change wins. Prints the entry for assets/edits.yaml and writes every setting to
benchmarks/results/tune_<model>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from remask import MaskBank, RemaskError, Site, load
from remask.editing.calibrate import calibrate, mean_logprob
from remask.editing.memory import EditMemory, preset
from remask.editing.steering import mean_delta
from remask.evaluation.benchmarks.registry import load_benchmark, split_groups

MUS = (1.0, 10.0, 40.0, 160.0, 640.0)
BANK = MaskBank(draws=4, replicates=1, seed=3_000_003)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("benchmark")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--folds", type=int, default=2)
    arguments = parser.parse_args()
    lm, twin = load(arguments.model), load(f"{arguments.model}-reference")
    benchmark = load_benchmark(arguments.benchmark, arguments.data)
    size = len({fact.group for fact in benchmark.forget})
    names = len({fact.group for fact in benchmark.validation})
    folds = split_groups(benchmark.validation, [size] * min(arguments.folds, names // size), "tune")
    kept = [lm.encode(fact) for fact in benchmark.validation_retain]
    kept_before = mean_logprob(lm, kept, BANK)
    settings = [("default", layer, mu) for layer in range(lm.num_layers) for mu in MUS]
    settings += [(name, layer, 0.0) for name in ("paper", "mean-delta") for layer in range(lm.num_layers)]
    results = []
    for name, layer, mu in track(settings, "tuning"):
        entry = {"edit": name, "layer": layer, "mu": mu, "folds": []}
        for fold in folds:
            rows = [lm.encode(fact) for fact in fold]
            level = mean_logprob(twin, [twin.encode(fact) for fact in fold], BANK)
            config = preset("paper") if name == "paper" else preset("default", mu=mu)
            memory = EditMemory.build(lm, fold, Site(layer), retain=benchmark.fit if config.mu else (), config=config)
            try:
                edit = calibrate(lm, mean_delta(memory) if name == "mean-delta" else memory, rows, level, BANK)
            except RemaskError as error:
                entry["folds"].append({"failed": str(error)})
                continue
            before = mean_logprob(lm, rows, BANK)
            with edit.attached(lm):
                forget, retain = mean_logprob(lm, rows, BANK) - before, mean_logprob(lm, kept, BANK) - kept_before
            entry["folds"].append({"alpha": edit.alpha, "forget_change": forget, "retain_change": retain})
        done = [fold for fold in entry["folds"] if "failed" not in fold]
        complete = len(done) == len(folds)
        entry["retain_loss"] = float(np.mean([abs(fold["retain_change"]) for fold in done])) if complete else None
        entry["selectivity"] = (
            float(np.mean([abs(fold["forget_change"]) / max(abs(fold["retain_change"]), 1e-9) for fold in done]))
            if complete
            else None
        )
        results.append(entry)
    console = Console()
    chosen = {}
    for name in ("default", "paper", "mean-delta"):
        usable = [entry for entry in results if entry["edit"] == name and entry["retain_loss"] is not None]
        best = min(usable, key=lambda entry: entry["retain_loss"])
        chosen[name] = {"layer": best["layer"]} | ({"mu": best["mu"]} if name == "default" else {})
        console.print(f"{name}: {chosen[name]}  retain {best['retain_loss']:.2f} nats, selectivity {best['selectivity']:.1f}")
    out = Path(__file__).parent / "results" / f"tune_{arguments.model}.json"
    out.parent.mkdir(exist_ok=True)
    record = {
        "model": arguments.model,
        "fingerprint": lm.fingerprint(),
        "benchmark": arguments.benchmark,
        "folds": [sorted({fact.group for fact in fold}) for fold in folds],
        "bank": {"draws": BANK.draws, "replicates": BANK.replicates, "seed": BANK.seed},
        "chosen": chosen,
        "settings": results,
    }
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
