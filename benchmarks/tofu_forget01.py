"""The README's table: TOFU forget01 on tiny-tofu under the three edits, and the default pushed to the never-trained level.

    python benchmarks/tofu_forget01.py --data DIR

Three seeds each. The same numbers as `remask audit tiny-tofu --benchmark tofu:forget01 --edit EDIT --seeds 3 --no-text`, with
the states that no edit touches scored once. Writes benchmarks/results/tofu_forget01_<run>.json (per-row records without
generated text: TOFU's answers do not belong in this repository).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from remask.editing.calibrate import Level
from remask.evaluation.audit import Scores
from remask.experiments.audits import audit_tables, drop_text, run_benchmark

RUNS: tuple[tuple[str, Level], ...] = (
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
