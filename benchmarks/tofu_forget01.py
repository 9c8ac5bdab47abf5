"""The README's table: TOFU forget01 on tiny-tofu under the three edits, and the default one to the twin's level; three seeds.

    python benchmarks/tofu_forget01.py --data DIR

The same numbers as `remask audit tiny-tofu --benchmark tofu:forget01 --edit EDIT --seeds 3 --no-text`, with
the states that no edit touches scored once. Writes benchmarks/results/tofu_forget01_<edit>.json (per-row records without
generated text: TOFU's answers do not belong in this repository).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Literal

from rich.console import Console

from remask.evaluation.audit import Scores
from remask.experiments.audits import audit_tables, drop_text, run_benchmark

RUNS: tuple[tuple[str, Literal["auto", "never-trained"]], ...] = (
    ("default", "auto"),
    ("mean-delta", "auto"),
    ("paper", "auto"),
    ("default", "never-trained"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    console, known = Console(), dict[int, dict[str, Scores]]()
    for edit, level in RUNS:
        result = run_benchmark("tiny-tofu", "tofu:forget01", edit, data, level=level, seeds=3, known=known, console=console)
        name = edit if level == "auto" else f"{edit}_{level}"
        out = Path(__file__).parent / "results" / f"tofu_forget01_{name}.json"
        out.write_text(json.dumps(drop_text(result), allow_nan=False) + "\n")
        for part in audit_tables(result):
            console.print(part)


if __name__ == "__main__":
    main()
