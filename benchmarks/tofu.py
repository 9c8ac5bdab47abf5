"""The README's table: TOFU forget01 on tiny-tofu under the three edits, and the default one to the twin's level; three seeds.

    python benchmarks/tofu_forget01.py --data DIR [--work DIR]

The same numbers as `remask audit tiny-tofu --benchmark tofu:forget01 --data DIR --edit EDIT --seeds 3 --no-text`; the states
that no edit touches are measured once. Attacks are run on the default edit. Writes for each run
benchmarks/results/tofu_forget01_<run>.json (aggregates) and .jsonl.gz (every record; no generated text: TOFU's answers do not
belong in this repository). `torchrun --nproc-per-node 2 benchmarks/tofu_forget01.py ...` shares the work.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import torch
from rich.console import Console

from remask.experiments.audits import AuditConfig, run_benchmark
from remask.reporting.tables import audit_tables

RUNS = {
    "default": AuditConfig("tiny-tofu", "tofu:forget01", "default", seeds=3, text=False),
    "mean-delta": AuditConfig("tiny-tofu", "tofu:forget01", "mean-delta", seeds=3, attacks=False, text=False),
    "paper": AuditConfig("tiny-tofu", "tofu:forget01", "paper", seeds=3, attacks=False, text=False),
    "default_never-trained": AuditConfig(
        "tiny-tofu", "tofu:forget01", "default", level="never-trained", seeds=3, attacks=False, text=False
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/tofu_forget01"), help="folder of the audits")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console, results = Console(), Path(__file__).parent / "results"
    for name, config in RUNS.items():
        out = asked.work / name
        result = run_benchmark(config, out, asked.data, parts=asked.work / "parts", console=console)
        if result is None:  # not the first process
            continue
        for part in audit_tables(result):
            console.print(part)
        (results / f"tofu_forget01_{name}.json").write_bytes((out / "results.json").read_bytes())
        packed = gzip.compress((out / "records.jsonl").read_bytes(), mtime=0)
        (results / f"tofu_forget01_{name}.jsonl.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
