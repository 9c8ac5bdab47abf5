"""Every kind of edit on the closed world's people, calibrated to the same level: what is forgotten, and what it costs.

    python benchmarks/editing.py [--out DIR]

Runs `remask audit tiny --benchmark closed-world --edit NAME --seeds SEEDS --no-attacks --no-text` for every name below into DIR
(the default one also under attack); the states that no edit touches are measured once. Layer and settings of default, ridge,
paper and mean-delta were chosen on validation people; softmax, caa, repe and the codebook borrow default's layer; random-layer
draws its own. Writes benchmarks/results/editing.json,
and docs/editing.md has it as a table (benchmarks/tables.py). A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from remask.evaluation.benchmarks.registry import load_benchmark
from remask.evaluation.records import read_records
from remask.evaluation.statistics import bootstrap_interval
from remask.evaluation.summary import LOGPROB, Scores
from remask.experiments.audits import AuditConfig, run_benchmark

EDITS = ("default", "ridge", "softmax", "codebook", "random-layer", "mean-delta", "caa", "repe", "paper")
SEEDS = {"default": 3, "ridge": 3, "mean-delta": 3, "paper": 3}  # one where an edit is only there to compare
SHOWN = 9  # rows between the answers that are printed
OUT = Path(__file__).parent / "results" / "editing.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/editing"), help="folder of the audits")
    folder = parser.parse_args().out
    torch.set_num_threads(1)
    console = Console(stderr=True)
    found = {}
    for name in EDITS:
        console.rule(name)
        seeds, attacked = SEEDS.get(name, 1), name == "default"
        config = AuditConfig("tiny", "closed-world", name, seeds=seeds, attacks=attacked, text=attacked)
        result = run_benchmark(config, folder / name, parts=folder / "parts", console=console)
        assert result is not None
        kept = (
            "command",
            "edit",
            "estimator",
            "sampler",
            "precision",
            "groups",
            "summary",
            "attacks",
            "versions",
            "model",
            "reference",
        )
        found[name] = {key: result[key] for key in kept} | {"own_wording": own_wording(folder / name)}
        if attacked:
            found[name]["said"] = said(folder / name)
    OUT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def said(folder: Path) -> list[dict[str, str]]:
    """Every SHOWN-th forget and retain question with the answer, and what is said instead."""
    benchmark = load_benchmark("closed-world", None)
    outputs = {
        (r.group, r.id): str(r.value)
        for r in read_records(folder / "records.jsonl")
        if r.metric == "output" and r.state == "after" and not r.attack
    }
    shown = []
    for group, facts in (("forget", benchmark.forget), ("retain", benchmark.scored["retain"])):
        for fact in facts[:: SHOWN if group == "forget" else 2 * SHOWN]:
            shown.append({"group": group, "prompt": fact.prompt, "answer": fact.answer, "said": outputs[group, fact.id]})
    return shown


def own_wording(folder: Path) -> dict[str, float]:
    """Change of the facts that the paraphrase rows ask about, under the wording that the edit was built on, nats a row."""
    scores = Scores(read_records(folder / "records.jsonl"))
    before, after = (scores.rows(state, "forget", LOGPROB) for state in ("before", "after"))
    asked = [row.removesuffix("/paraphrase") for row in scores.rows("before", "paraphrase", LOGPROB)]
    changes = [float(after[row].value) - float(before[row].value) for row in asked]
    estimate = bootstrap_interval(changes)
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


if __name__ == "__main__":
    main()
