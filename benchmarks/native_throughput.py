"""Throughput of `MaskedDiffusionLM.logits` against a hand-written loop over the same layers, as a ratio inside one run.

    python benchmarks/native_throughput.py

Both compute the same logits of the same 32 canvases of 64 tokens on `tiny` (asserted), turn about, on one thread; the ratio
is of medians. Writes benchmarks/results/native_throughput.json.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from remask import load

OUT = Path(__file__).parent / "results" / "native_throughput.json"
ROWS, LENGTH, ROUNDS = 32, 64, 60


def main() -> None:
    torch.set_num_threads(1)
    lm = load("tiny")
    body = lm.model.model
    ids = torch.randint(0, lm.embedding.num_embeddings, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def by_hand(ids: Tensor) -> Tensor:
        hidden = body.embed_tokens(ids)
        rotary = body.rotary_emb(hidden, torch.arange(LENGTH)[None])
        for layer in body.layers:
            hidden = layer(hidden, position_embeddings=rotary)
        return lm.model.lm_head(body.norm(hidden))

    seconds: dict[str, list[float]] = {"native": [], "by hand": []}
    paths: dict[str, Callable[[Tensor], Tensor]] = {"native": lm.logits, "by hand": by_hand}
    with torch.inference_mode():
        assert torch.equal(lm.logits(ids), by_hand(ids))
        for _ in range(ROUNDS):
            for name, path in paths.items():
                started = time.perf_counter()
                path(ids)
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    record = {
        "command": "python benchmarks/native_throughput.py",
        "tokens_per_second": {name: round(ROWS * LENGTH / value) for name, value in medians.items()},
        "ratio_native_to_by_hand": round(medians["by hand"] / medians["native"], 3),
        "rounds": ROUNDS,
        "machine": {
            "processor": platform.machine(),
            "threads": 1,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
