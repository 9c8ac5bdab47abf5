"""What `fill_after_eos` and bf16 autocast save, and what they change: greedy answers of tiny-tofu to TOFU questions.

    python benchmarks/generation_speed.py --data DIR

Every 32nd row of forget10 and retain_perturbed and every 10th of real authors and world facts, one thread; forwards and
tokens are counted, CPU seconds are this machine's. Writes benchmarks/results/generation_speed.json (no TOFU text).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from remask import SamplerConfig, generate, load
from remask.evaluation.benchmarks.tofu import load_tofu

STEPS = {"forget10": 32, "retain_perturbed": 32, "real_authors_perturbed": 10, "world_facts_perturbed": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    lm = load("tiny-tofu")
    facts = [fact for split, step in STEPS.items() for fact in load_tofu(data, split)[::step]]
    rows = [lm.encode(fact) for fact in facts]
    runs, outputs = [], []
    for fill, bf16 in ((False, False), (True, False), (True, True)):
        config = SamplerConfig.default(lm, fill_after_eos=fill, stop_at_eos=not fill)
        lm.counters.forwards = lm.counters.tokens = 0
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            done = generate(lm, [row.prompt_ids for row in rows], config, keys=[row.id for row in rows])
        outputs.append([lm.decode(result.response) for result in done])
        runs.append(
            {
                "fill_after_eos": fill,
                "precision": "bf16 autocast" if bf16 else "fp32",
                "forwards": lm.counters.forwards,
                "tokens": lm.counters.tokens,
                "cpu_seconds": round(time.process_time() - started, 1),
                "exact_match": sum(text == fact.answer for text, fact in zip(outputs[-1], facts, strict=True)),
                "same_as_first": sum(a == b for a, b in zip(outputs[-1], outputs[0], strict=True)),
            }
        )
        print(runs[-1])
    record = {
        "rows": len(rows),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "runs": runs,
    }
    (Path(__file__).parent / "results" / "generation_speed.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
