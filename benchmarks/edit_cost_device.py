"""The part of edit_cost.py that a device runs: a model of LLaDA-8B's shape with random weights and synthetic keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remask.backbones import Encoded, MaskedDiffusionLM, Site
from remask.diffusion.masks import MaskBank
from remask.editing import LiveEdit, StreamingSolver, attach
from remask.editing.capture import capture_anchor, capture_subject, object_values
from remask.editing.shift import LinearShift, Shift, SoftmaxShift, TopShift
from remask.random import normal

ROUNDS = 50
FIRE = 32  # coefficients a token keeps
ANSWER = 24  # tokens of a canvas that are the answer, at most
TFLOPS = 790  # of an H200, the constant of the design's floors


@dataclass
class Synthetic:
    """An edit that is attached as it is."""

    site: Site
    made: Shift

    def shift(self) -> Shift:
        """What it adds."""
        return self.made


def on_a_device(
    lm: MaskedDiffusionLM,
    facts: Sequence[int] = (40, 400),
    keys: Sequence[int] = (40, 400, 10_000),
    tokens: int = 100,
    batches: Sequence[int] = (1, 16),
    backend: str = "inductor",
) -> dict[str, Any]:
    """Overhead of a forward eager, compiled and as a CUDA graph; seconds of capture, solve, insert and update."""
    site = Site(lm.num_layers * 3 // 8)
    weights = sum(p.numel() for p in lm.blocks[0].parameters())
    return {
        "model": {"name": lm.name, "layers": lm.num_layers, "width": lm.hidden_size, "parameters": lm.num_parameters},
        "layer": site.layer,
        "forward": [line for batch in batches for line in overhead(lm, site, keys, batch, tokens, backend)],
        "install": [install(lm, site, count, tokens, weights) for count in facts],
        "solve": [solving(lm, count) for count in keys],
    }


def taken(lm: MaskedDiffusionLM, run: Callable[[], object]) -> float:
    """Seconds until the device is done."""
    started = time.perf_counter()
    run()
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median(lm: MaskedDiffusionLM, run: Callable[[], object]) -> float:
    return sorted(taken(lm, run) for _ in range(ROUNDS))[ROUNDS // 2]


# ------------------------------------------------------------------ forward
@torch.inference_mode()
def overhead(
    lm: MaskedDiffusionLM, site: Site, keys: Sequence[int], batch: int, tokens: int, backend: str
) -> list[dict[str, Any]]:
    """A forward with each edit over one without, for every way to run it; the bare one is measured again at the end."""
    ids = canvases(lm, batch, tokens)
    found = []
    for mode in ("eager", "compiled", *(["CUDA graph"] if lm.device.type == "cuda" else [])):
        bare = median(lm, prepared(lm, ids, mode, backend))
        lines = []
        for name, edit in synthetic(lm, site, keys).items():
            live = attach(lm.model, edit)  # before compilation and capture
            run = prepared(lm, ids, mode, backend)
            live.check(run)
            lines.append({"edit": name, "batch": batch, "tokens": tokens, "mode": mode, "seconds": median(lm, run)})
            lines[-1]["update_seconds"] = taken(lm, lambda live=live, edit=edit: _updated(live, edit))  # type: ignore[misc]
            live.detach()
        again = median(lm, prepared(lm, ids, mode, backend))
        found += [{**line, "bare": [bare, again], "ratio": 2 * line["seconds"] / (bare + again)} for line in lines]
    return found


def prepared(lm: MaskedDiffusionLM, ids: Tensor, mode: str, backend: str) -> Callable[[], Tensor]:
    """A warm forward of `ids`; what is attached now is compiled or captured with it."""

    def forward(canvas: Tensor) -> Tensor:
        logits: Tensor = lm.model(input_ids=canvas, use_cache=False).logits
        return logits

    if mode == "compiled":
        torch.compiler.reset()
        forward = torch.compile(forward, backend=backend, dynamic=False)
    for _ in range(3):
        forward(ids)
    if mode != "CUDA graph":
        return lambda: forward(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(ids)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def canvases(lm: MaskedDiffusionLM, batch: int, tokens: int) -> Tensor:
    """Random tokens with masks at the end, [batch, tokens]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, lm.embedding.num_embeddings - 1, (batch, tokens), generator=generator)
    ids[:, -min(ANSWER, tokens // 2) :] = lm.spec.mask_id
    return ids.to(lm.device)


def synthetic(lm: MaskedDiffusionLM, site: Site, keys: Sequence[int]) -> dict[str, Synthetic]:
    """Every readout of so many normal keys; the dense one is folded, the same for any number."""
    width = lm.hidden_size
    edits: dict[str, Shift] = {"dense, any number of keys": LinearShift(normal((width, width), 0, "map") / width)}
    for count in keys:
        rows, values = normal((count, width), 0, "keys", count), normal((count, width), 0, "values", count)
        edits[f"top {min(FIRE, count)} of {count} keys"] = TopShift(rows / width, values, FIRE)
        edits[f"softmax over {count} keys"] = SoftmaxShift(rows, values, torch.ones(count), 20.0, torch.zeros(width))
    return {name: Synthetic(site, shift) for name, shift in edits.items()}


def _updated(live: LiveEdit, edit: Synthetic) -> None:
    live.update(edit)


# ------------------------------------------------------------------ install, solve
def install(lm: MaskedDiffusionLM, site: Site, facts: int, tokens: int, weights: int) -> dict[str, Any]:
    """Seconds of the captures beside what the arithmetic of their blocks takes at the device's rate."""
    answer = min(ANSWER, tokens // 2)
    rows = [
        Encoded(f"fact {i}", tuple(row[:-answer]), tuple(row[-answer:]), (2, 5))
        for i, row in enumerate(torch.randint(1, lm.embedding.num_embeddings - 1, (facts, tokens)).tolist())
    ]
    runs: dict[str, Callable[[], object]] = {
        "subject keys": lambda: capture_subject(lm, site, rows, object_values(lm, site, rows)),
        "answer keys": lambda: capture_anchor(lm, site, rows, MaskBank(draws=4, replicates=1, seed=1)),
    }
    line: dict[str, Any] = {"facts": facts, "tokens": tokens}
    for name, run in runs.items():
        run()
        before, forwards = lm.counters.sequence_blocks, lm.counters.forwards
        cost = taken(lm, run)
        blocks = lm.counters.sequence_blocks - before
        assert (lm.counters.forwards - forwards) and blocks % (site.layer + 1) == 0
        floor = 2 * blocks * tokens * weights / (TFLOPS * 1e12)
        line[name] = {"seconds": cost, "sequence_blocks": blocks, "floor_seconds": floor}
    return line


def solving(lm: MaskedDiffusionLM, keys: int) -> dict[str, Any]:
    """Seconds of a solve on the device, and of an insert and a removal with the check of drift."""
    rows = normal((keys, lm.hidden_size), 0, "solve", keys).to(lm.device)
    more = normal((1, lm.hidden_size), 0, "more").to(lm.device)
    line: dict[str, Any] = {"keys": keys}
    for name, relative, ridge in (("absolute", False, 1.0), ("relative", True, 1e-3)):
        solver = StreamingSolver(rows, ridge, relative=relative)
        start = taken(lm, solver.refresh)
        inserts, removals = [], []
        for _ in range(5):
            inserts.append(taken(lm, lambda s=solver: s.insert(more)))  # type: ignore[misc]
            removals.append(taken(lm, lambda s=solver: s.remove([0])))  # type: ignore[misc]
        line[name] = {"solve": start, "insert": min(inserts), "remove": min(removals), "residual": solver.residual}
    return line
