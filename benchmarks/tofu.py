"""TOFU on tiny-tofu: what the default edit, mean-delta and the paper's edit forget and what they cost; three seeds each.

    python benchmarks/tofu.py forget01 --data DIR [--work DIR]       (and forget05, forget10: hours)

The same numbers as `remask audit tiny-tofu --benchmark tofu:SPLIT --data DIR --edit EDIT --seeds 3 --no-text`; the states
that no edit touches are measured once. On forget01 the default edit is also attacked, and taken to the twin's level. Writes for
each run benchmarks/results/tofu_<split>_<run>.json (aggregates) and .jsonl.gz (every record; no generated text: TOFU's answers
do not belong in this repository). `torchrun --nproc-per-node 2 benchmarks/tofu.py ...` shares the work.
"""

from __future__ import annotations

import argparse
import gzip
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from remask.experiments.audits import AuditConfig, run_benchmark
from remask.reporting.tables import audit_tables


def runs(split: str) -> dict[str, AuditConfig]:
    """The audits of a split, by name."""
    base = AuditConfig("tiny-tofu", f"tofu:{split}", "default", seeds=3, attacks=False, text=False)
    found = {"default": base, "mean-delta": replace(base, edit="mean-delta"), "paper": replace(base, edit="paper")}
    if split == "forget01":
        found["default"] = replace(base, attacks=True)
        found["default_never-trained"] = replace(base, level="never-trained")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", choices=("forget01", "forget05", "forget10"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/tofu"), help="folder of the audits")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console, results, work = Console(), Path(__file__).parent / "results", asked.work / asked.split
    for name, config in runs(asked.split).items():
        out = work / name
        result = run_benchmark(config, out, asked.data, parts=work / "parts", console=console)
        if result is None:  # not the first process
            continue
        for part in audit_tables(result):
            console.print(part)
        (results / f"tofu_{asked.split}_{name}.json").write_bytes((out / "results.json").read_bytes())
        packed = gzip.compress((out / "records.jsonl").read_bytes(), mtime=0)
        (results / f"tofu_{asked.split}_{name}.jsonl.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
