"""What an edit memory costs: at every forward, to install, to change, and on the held retain rows; ratios inside one run.

    python benchmarks/edit_cost.py             # tiny, CPU; results/edit_cost.json and docs/images/edit_inserts.png
    python benchmarks/edit_cost.py --size 8b   # random weights of LLaDA-8B's shape on a GPU; results/edit_cost_8b.json
    python benchmarks/edit_cost.py --size toy  # the same code on a toy of that shape on the CPU; only prints

On the CPU one thread works and its own seconds are counted, so that other processes lengthen nothing. What is compared runs
turn about; a ratio is the median of the rounds' ratios, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from edit_cost_device import on_a_device
from matplotlib.figure import Figure
from torch import Tensor
from tracing import llada_8b, machine

from remask import Fact, load
from remask.backbones import Encoded, MaskedDiffusionLM
from remask.backbones.intervention import add_shift
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.editing import EditMemory, StreamingSolver
from remask.editing.shift import Shift
from remask.editing.solve import solve_readout
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.experiments.edits import build_edit
from remask.figures import save_figure
from remask.random import normal, numpy_generator
from remask.unlearning.trainer import TrainConfig, batches, fast_bfloat16, masked_loss

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from test_streaming import operations  # noqa: E402  # the counter of operations has its own test there

ROUNDS = {1: 100, 32: 20}  # by batch size
TURNS = 5
BANK = MaskBank(draws=4, replicates=1, seed=0)
INSERTS, EVERY = 50, 5
KEYS, WIDTHS = 10_000, (192, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "8b", "toy"), default="tiny")
    size = parser.parse_args().size
    if size == "8b" and not torch.cuda.is_available():
        parser.error("--size 8b needs a CUDA device and there is none; --size toy runs the same code on the CPU")
    if size == "toy":
        toy = llada_8b(torch.device("cpu"), layers=3, width=128, mlp=256, words=500)
        record = on_a_device(toy, facts=(2, 4), keys=(4, 16, 200), tokens=24, batches=(1, 2), backend="eager")
    else:
        record = on_tiny() if size == "tiny" else on_a_device(llada_8b(torch.device("cuda")))
    command = "python benchmarks/edit_cost.py" + ("" if size == "tiny" else f" --size {size}")
    text = json.dumps({"command": command, **record, "machine": machine()}, indent=1)
    if size != "toy":
        name = "edit_cost" if size == "tiny" else "edit_cost_8b"
        (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(text + "\n")
    print(text)


def on_tiny() -> dict[str, Any]:
    torch.set_num_threads(1)
    lm, world = load("tiny"), load_benchmark("closed-world", None)
    people = [*world.forget, *world.validation, *world.scored["neighbours"]]
    order = numpy_generator(0, "edit cost").permutation(len(world.forget))[:INSERTS]
    return {
        "model": {"name": lm.name, "layers": lm.num_layers, "width": lm.hidden_size},
        "forward": forward_overhead(lm, people[:400], world.fit),
        "install": install(lm, world.forget[:40], world.fit),
        "streaming": [line for width in WIDTHS for line in streaming(KEYS, width)],
        "inserts": inserts(lm, [world.forget[i] for i in order], world.fit, world.scored),
    }


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def least(run: Callable[[], object], turns: int = TURNS) -> float:
    return min(seconds(run) for _ in range(turns))


# ------------------------------------------------------------------ what a forward costs with a memory in it
@torch.inference_mode()
def forward_overhead(lm: MaskedDiffusionLM, facts: Sequence[Fact], retain: Sequence[Fact]) -> list[dict[str, Any]]:
    """Forwards with a memory of 40 and of 400 facts against forwards without, on canvases as a generation starts with."""
    prompt = max((lm.encode(fact).prompt_ids for fact in facts), key=len)
    canvas = torch.tensor([[*prompt, *[lm.spec.mask_id] * lm.spec.gen_length]])
    found = []
    memories = {f"{name}, {n} facts": memory for n in (40, 400) for name, memory in _readouts(lm, facts[:n], retain).items()}
    for batch, rounds in ROUNDS.items():
        ids = canvas.repeat(batch, 1)
        ratios = _interleaved(lm, ids, {name: (memory, memory.shift()) for name, memory in memories.items()}, rounds)
        for name, values in ratios.items():
            low, middle, high = statistics.quantiles(values, n=4)
            line = {"edit": name, "keys": len(memories[name].keys), "batch": batch, "tokens": len(ids[0]), "rounds": rounds}
            found.append({**line, "ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]})
    return found


def _readouts(lm: MaskedDiffusionLM, facts: Sequence[Fact], retain: Sequence[Fact]) -> dict[str, EditMemory]:
    """Memories of the same facts that are read in different ways; alpha does not change their cost."""
    found: dict[str, EditMemory] = {}
    for name in ("default", "ridge", "softmax", "paper"):
        memory = build_edit(lm, name, facts, retain, alpha=1.0)
        assert isinstance(memory, EditMemory)
        if name != "paper":
            found[name] = memory
        if memory.config.readout == "ridge":
            found[f"{name}, top tenth"] = replace(memory, config=replace(memory.config, q=0.1))
    return found


def _interleaved(
    lm: MaskedDiffusionLM, ids: Tensor, edits: dict[str, tuple[EditMemory, Shift]], rounds: int
) -> dict[str, list[float]]:
    """For every edit the seconds of a forward over those of a bare forward of the same round."""
    ratios: dict[str, list[float]] = {name: [] for name in edits}
    for turn in range(rounds + 1):
        bare = seconds(lambda: lm.logits(ids))
        for name, (memory, shift) in edits.items():
            undo = add_shift(lm, memory.site, shift)
            ratio = seconds(lambda: lm.logits(ids)) / bare
            undo()
            if turn:  # the first round warms up
                ratios[name].append(ratio)
    return ratios


# ------------------------------------------------------------------ what it costs to install
def install(lm: MaskedDiffusionLM, facts: Sequence[Fact], retain: Sequence[Fact]) -> dict[str, Any]:
    """Blocks and seconds of building a memory, and seconds of one epoch of masked-diffusion training on the same facts."""
    rows = [lm.encode(fact) for fact in facts]
    step = least(lambda: _epoch(lm, rows))
    found: dict[str, Any] = {
        "facts": len(facts),
        "epoch_seconds": round(step, 4),
        "epoch": "forward and backward of the mask loss, one draw a row, batches of 32, no optimizer step"
        + (", bf16 autocast" if fast_bfloat16(lm.device) else ""),
        "builds": [],
    }
    for name, read in (("default", retain), ("paper", ())):
        before = replace(lm.counters)
        memory = build_edit(lm, name, facts, read, alpha=1.0)
        assert isinstance(memory, EditMemory)
        forwards, blocks, by_row = (
            getattr(lm.counters, kind) - getattr(before, kind) for kind in ("forwards", "blocks", "sequence_blocks")
        )
        assert blocks == forwards * (memory.site.layer + 1), "a block above the site ran"
        cost = least(lambda name=name, read=read: build_edit(lm, name, facts, read, alpha=1.0))  # type: ignore[misc]
        line = {"preset": name, "layer": memory.site.layer, "retain_rows": len(read), "keys": len(memory.keys)}
        line |= {"forwards": forwards, "blocks_a_forward": blocks // forwards, "of": lm.num_layers, "sequence_blocks": by_row}
        found["builds"].append({**line, "seconds": round(cost, 4), "epoch_over_install": round(step / cost, 2)})
    return found


def _epoch(lm: MaskedDiffusionLM, rows: Sequence[Encoded]) -> None:
    config = TrainConfig(epochs=1)
    lm.model.requires_grad_(True)
    for index, batch in enumerate(batches(rows, config, 0, lm.spec.gen_length, lm.spec.max_length)):
        masked_loss(lm, batch, config, (0, index)).backward()  # type: ignore[no-untyped-call]
    lm.model.zero_grad(set_to_none=True)
    lm.model.requires_grad_(False)


# ------------------------------------------------------------------ one key among ten thousand
def streaming(keys: int, width: int) -> list[dict[str, Any]]:
    """A new solve against the insert and the removal of one key, in seconds and in counted operations."""
    rows, more = normal((keys, width), 0, "edit cost"), normal((1, width), 0, "edit cost, more")
    found = []
    for name, config in (("absolute", {"ridge": 1.0, "relative": False}), ("relative", {"ridge": 1e-3, "relative": True})):
        rebuild = least(lambda config=config: solve_readout(rows, **config), 3)  # type: ignore[arg-type, misc]
        counted = operations(lambda config=config: solve_readout(rows, **config))  # type: ignore[arg-type, misc]
        solver = StreamingSolver(rows, **config)  # type: ignore[arg-type]
        changes = {"insert": lambda s=solver: s.insert(more), "remove": lambda s=solver: s.remove([17])}  # type: ignore[misc]
        taken = {what: min(pair) for what, pair in zip(changes, zip(*_turns(changes), strict=True), strict=True)}
        work = {what: operations(change) for what, change in changes.items()}
        assert not solver.refreshes
        line: dict[str, Any] = {"ridge": name, "keys": keys, "width": width, "updates": solver.updates_since_refresh}
        line |= {"rebuild_seconds": round(rebuild, 5), "rebuild_operations": counted, "residual": solver.residual}
        for what in changes:
            line[f"{what}_seconds"] = round(taken[what], 5)
            line[f"rebuild_over_{what}"] = round(rebuild / taken[what], 1)
            line[f"rebuild_over_{what}_operations"] = round(counted / work[what], 1)
        found.append(line)
    return found


def _turns(changes: dict[str, Callable[[], None]]) -> list[list[float]]:
    return [[seconds(change) for change in changes.values()] for _ in range(25)]


# ------------------------------------------------------------------ fifty facts, one by one
def inserts(lm: MaskedDiffusionLM, facts: Sequence[Fact], fit: Sequence[Fact], held: dict[str, list[Fact]]) -> dict[str, Any]:
    """Change of log-probability of inserted, retained and neighbour rows as facts come in one by one, nats a row."""
    whole = build_edit(lm, "default", facts, fit)
    assert isinstance(whole, EditMemory)
    groups = {"forget": list(facts), "retain": held["retain"], "neighbours": held["neighbours"]}
    rows = {name: [lm.encode(fact) for fact in group] for name, group in groups.items()}
    before = {name: _scores(lm, group) for name, group in rows.items()}
    memory, curve = build_edit(lm, "default", facts[:1], fit, alpha=whole.alpha), []
    assert isinstance(memory, EditMemory)
    for count in range(1, len(facts) + 1):
        if count > 1:
            memory = memory.add(lm, [facts[count - 1]])
        if count == 1 or count % EVERY == 0:
            with memory.attached(lm):
                change = {name: _scores(lm, group) - before[name] for name, group in rows.items()}
            point = {name: round(float(values.mean()), 3) for name, values in change.items() if name != "forget"}
            curve.append({"facts": count, "inserted": round(float(change["forget"][:count].mean()), 3), **point})
    draw(curve, ROOT / "docs" / "images" / "edit_inserts.png")
    return {
        "alpha": whole.alpha,
        "alpha_from": "calibrated for all of the facts together to the prompt-masked level, and fixed from the first insert on",
        "equals_one_build": memory.fingerprint() == whole.fingerprint(),
        "bank": {"draws": BANK.draws, "seed": BANK.seed},
        "rows": {name: len(group) for name, group in groups.items()},
        "largest_retain_change": max(abs(point["retain"]) for point in curve),
        "largest_neighbour_change": max(abs(point["neighbours"]) for point in curve),
        "curve": curve,
    }


def _scores(lm: MaskedDiffusionLM, rows: Sequence[Encoded]) -> Tensor:
    """Log-probabilities, nats a row."""
    return torch.tensor([score.logprob for score in elbo(lm, rows, BANK)])


def draw(curve: Sequence[dict[str, Any]], path: Path) -> None:
    """Forgetting of what was inserted beside what the rows lose that no edit has read."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    counts = [point["facts"] for point in curve]
    labels = {"inserted": "facts inserted so far", "neighbours": "neighbours, never read", "retain": "retain, never read"}
    for name, colour in (("inserted", "tab:red"), ("neighbours", "tab:orange"), ("retain", "tab:blue")):
        axes.plot(counts, [point[name] for point in curve], color=colour, marker="o", markersize=3, label=labels[name])
    axes.axhline(-1, color="grey", linewidth=0.8, linestyle="--")
    axes.text(counts[-1], -1, "1 nat lost", ha="right", va="top", color="grey", fontsize=8)
    axes.set(xlabel="facts in the memory, inserted one by one", ylabel="change of log-probability, nats a row")
    axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
