"""What exact and sweep tracing save against rerunning every site, as ratios inside one run.

    python benchmarks/tracing.py             # tiny, CPU; writes benchmarks/results/tracing.json
    python benchmarks/tracing.py --size 8b   # random weights of LLaDA-8B's shape on a GPU; results/tracing_8b.json

Block executions are counted by sequence, so they do not depend on batching. Seconds are the least of three turns on one
thread, taken turn about. The rivals on `tiny`: the reference (hooks, one site at a time, all steps), and the same hooks on as
many sites at once as fit, started at the restored step. All of them compute the same numbers, which is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from remask import Fact, TraceConfig, load, load_facts
from remask.backbones import BackboneSpec, Encoded, MaskedDiffusionLM, Site, capture
from remask.diffusion.likelihood import target_logprobs
from remask.tracing import Trace, largest_difference, trace
from remask.tracing.protocol import Corruptor, advance, blank, commits_at

ROOT = Path(__file__).parents[1]
CONFIG = TraceConfig(steps=8, draws=3)
TURNS = 3
FACTS = 4
ROWS = 256  # sequences that the batched hooks take at once
H200 = {"TFLOP/s": 790, "source": "the same constants as the floors of the design"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "8b"), default="tiny")
    size = parser.parse_args().size
    record = on_tiny() if size == "tiny" else on_a_device(llada_8b(torch.device("cuda")), length=100, facts=8)
    name = "tracing" if size == "tiny" else "tracing_8b"
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


# ------------------------------------------------------------------ tiny
def on_tiny() -> dict[str, Any]:
    """Ratios on the example facts of at least eight tokens, at 8 steps; of at least sixteen, at 16 steps."""
    torch.set_num_threads(1)
    lm = load("tiny")
    facts = load_facts(ROOT / "examples" / "facts.jsonl")
    eight, sixteen = _long(lm, facts, 8)[:FACTS], _long(lm, facts, 16)[:FACTS]
    runs: dict[str, Callable[[], Trace | Tensor]] = {
        "reference": lambda: trace(lm, eight, CONFIG, mode="reference"),
        "hooks, batched": lambda: batched_hooks(lm, eight, CONFIG),
        "exact": lambda: trace(lm, eight, CONFIG),
        "sweep": lambda: trace(lm, eight, CONFIG, mode="sweep"),
    }
    measured, results = timed(lm, runs)
    difference = largest_difference(results["exact"], results["reference"])
    rival = (results["hooks, batched"] - results["reference"].effects.double()).nan_to_num().abs().max()
    blocks = {name: run["blocks"] for name, run in measured.items()}
    seconds = {name: run["seconds"] for name, run in measured.items()}
    sweep = counted(lm, lambda: trace(lm, sixteen, TraceConfig(steps=16, draws=3), mode="sweep"))
    return {
        "command": "python benchmarks/tracing.py",
        "model": {"name": lm.name, "layers": lm.num_layers},
        "facts": [row.id for row in eight],
        "config": {"steps": CONFIG.steps, "draws": CONFIG.draws, "modules": 3, "readout": CONFIG.readout},
        "runs": measured,
        "ratios": {
            "blocks, rerun / exact": round(blocks["reference"] / blocks["exact"], 1),
            "blocks, from the restored step / exact": round(from_step(lm, eight, CONFIG) / blocks["exact"], 1),
            "blocks, rerun / sweep": round(blocks["reference"] / blocks["sweep"], 1),
            "blocks, rerun / sweep, 16 steps": round(rerun(lm, sixteen, TraceConfig(steps=16, draws=3)) / sweep, 1),
            "seconds, reference / exact": round(seconds["reference"] / seconds["exact"], 1),
            "seconds, batched hooks / exact": round(seconds["hooks, batched"] / seconds["exact"], 1),
            "seconds, reference / sweep": round(seconds["reference"] / seconds["sweep"], 1),
        },
        "largest difference of effects, nats": {
            "exact and reference": difference["effects"],
            "batched hooks and reference": float(rival),
            "largest effect": float(results["reference"].effects.nan_to_num().abs().max()),
        },
        "bf16": bf16(eight),
        "machine": machine(),
    }


def _long(lm: MaskedDiffusionLM, facts: list[Fact], tokens: int) -> list[Encoded]:
    return [row for row in map(lm.encode, facts) if len(row.answer_ids) >= tokens]


def rerun(lm: MaskedDiffusionLM, rows: list[Encoded], config: TraceConfig) -> int:
    """Block executions of a whole trajectory for every site, step and draw, without clean and corrupted runs."""
    sites = lm.num_layers * len(config.modules)
    return sum(config.draws * sites * config.steps_of(row) ** 2 * lm.num_layers for row in rows)


def from_step(lm: MaskedDiffusionLM, rows: list[Encoded], config: TraceConfig) -> int:
    """The same when every trajectory starts at the restored step."""
    sites = lm.num_layers * len(config.modules)
    steps = [config.steps_of(row) for row in rows]
    return sum(config.draws * sites * count * (count + 1) // 2 * lm.num_layers for count in steps)


def counted(lm: MaskedDiffusionLM, run: Callable[[], Any]) -> int:
    """Block executions of a run, by sequence."""
    before = lm.counters.sequence_blocks
    run()
    return lm.counters.sequence_blocks - before


def timed(lm: MaskedDiffusionLM, runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Block executions and least seconds of every run, and its last result."""
    results: dict[str, Any] = {}
    found: dict[str, Any] = {name: {"blocks": 0, "seconds": float("inf")} for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            before, started = lm.counters.sequence_blocks, time.perf_counter()
            results[name] = run()
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            found[name]["seconds"] = round(min(found[name]["seconds"], time.perf_counter() - started), 3)
            found[name]["blocks"] = lm.counters.sequence_blocks - before
    return found, results


def bf16(rows: list[Encoded]) -> dict[str, Any]:
    """How far rounding moves the numbers: between batchings of one precision, and between precisions."""
    plain, weights = load("tiny"), load("tiny", dtype=torch.bfloat16)
    fp32 = trace(plain, rows, CONFIG, keep_unknown=True)
    result: dict[str, Any] = {}
    for name, lm, autocast in (("bf16 autocast", plain, True), ("bf16 weights", weights, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fast = trace(lm, rows, CONFIG, keep_unknown=True)
            slow = trace(lm, rows, CONFIG, mode="reference", keep_unknown=True)
        result[name] = {
            "exact against reference": spread(fast, slow),
            "exact against exact in fp32": spread(fast, fp32),
        }
    return result


def spread(one: Trace, other: Trace) -> dict[str, float]:
    """Largest and mean absolute difference of effects, nats, and their correlation over cells."""
    defined = ~one.effects.isnan()
    a, b = one.effects[defined].double(), other.effects[defined].double()
    return {
        "largest": round(float((a - b).abs().max()), 4),
        "mean": round(float((a - b).abs().mean()), 5),
        "correlation": round(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), 5),
    }


# ------------------------------------------------------------------ the rival: the reference's hooks on many sites at once
@torch.inference_mode()
def batched_hooks(lm: MaskedDiffusionLM, rows: list[Encoded], config: TraceConfig) -> Tensor:
    """Mean effects [fact, layer, module, step, later step], frozen readout; sites of a restored step share a batch."""
    effects = torch.full((len(rows), lm.num_layers, 3, config.steps, config.steps), torch.nan, dtype=torch.float64)
    for index, row in enumerate(rows):
        run = _Hooked(lm, row, config)
        corrupted = run.trajectory(0, [None] * config.draws, list(range(config.draws)))
        sites = [Site(layer, module) for layer in range(lm.num_layers) for module in config.modules]
        entries = [(site, draw) for site in sites for draw in range(config.draws)]
        for step in range(run.steps):
            values = torch.cat(
                [
                    run.trajectory(step, [site for site, _ in part], [draw for _, draw in part])
                    for part in (entries[start : start + ROWS] for start in range(0, len(entries), ROWS))
                ]
            )
            change = values.view(lm.num_layers, 3, config.draws, -1) - corrupted[:, step:]
            effects[index, :, :, step, step : run.steps] = change.mean(2)
    return effects


class _Hooked:
    """Trajectories of one fact in which every sequence has its own restored site."""

    def __init__(self, lm: MaskedDiffusionLM, row: Encoded, config: TraceConfig) -> None:
        self.lm, self.row, self.steps, self.corruptor = lm, row, config.steps_of(row), Corruptor(lm, config)
        self.slots = torch.zeros(1, len(row.ids), dtype=torch.bool)
        self.slots[:, len(row.prompt_ids) :] = True
        self.targets = torch.tensor(row.answer_ids)
        self.sites = [Site(layer, module) for layer in range(lm.num_layers) for module in config.modules]
        self.outputs: list[dict[Site, Tensor]] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # canvas and kept values of the corrupted runs at every step
        canvas = blank(lm, row).unsqueeze(0)
        for count in commits_at(row, self.steps):
            with capture(lm, self.sites) as outputs:
                logits = lm.logits(canvas, positions=self.slots)
            self.outputs.append(dict(outputs))
            canvas = advance(lm, canvas, self.slots, logits, torch.tensor([count]))

    def trajectory(self, start: int, sites: list[Site | None], draws: list[int]) -> Tensor:
        """Object log-probability from step `start` on, [sequences, steps]."""
        lm, row = self.lm, self.row
        first = blank(lm, row).repeat(len(draws), 1), torch.zeros(len(draws), len(self.targets), dtype=torch.float64)
        canvas, kept = (part[draws] for part in self.before[start]) if self.before else first
        slots = self.slots.expand(len(draws), -1)
        where = torch.zeros_like(canvas, dtype=torch.bool)
        where[:, slice(*row.subject)] = True
        noise = torch.cat([n for draw in draws if (n := self.corruptor.noise(row, draw, 0)) is not None])
        values, states = [], []
        for step, count in list(enumerate(commits_at(row, self.steps)))[start:]:
            states.append((canvas, kept))
            with self.corruptor.acting(where, noise), self.restored(sites if step == start else [], step):
                logits = lm.logits(canvas, positions=slots)
            read = target_logprobs(logits, self.targets.repeat(len(draws))).view(len(draws), -1).double()
            kept = torch.where(canvas[:, len(row.prompt_ids) :] == lm.spec.mask_id, read, kept)
            values.append(kept.sum(1))
            canvas = advance(lm, canvas, slots, logits, torch.full((len(draws),), count))
        if not self.before:
            self.before = states
        return torch.stack(values, dim=1)

    @contextlib.contextmanager
    def restored(self, sites: list[Site | None], step: int) -> Any:
        """Every sequence's own site puts out what the clean run had there."""
        with contextlib.ExitStack() as stack:
            for site in {site for site in sites if site is not None}:
                rows = torch.tensor([i for i, other in enumerate(sites) if other == site])
                clean = self.outputs[step][site][:, slice(*self.row.subject)]

                def hook(
                    _module: nn.Module, _inputs: Any, output: Tensor, rows: Tensor = rows, clean: Tensor = clean
                ) -> Tensor:
                    output = output.clone()
                    output[rows, self.row.subject[0] : self.row.subject[1]] = clean
                    return output

                stack.callback(self.lm.site_module(site).register_forward_hook(hook).remove)
            yield


# ------------------------------------------------------------------ a device
def llada_8b(
    device: torch.device, layers: int = 32, width: int = 4096, mlp: int = 12288, words: int = 126464
) -> MaskedDiffusionLM:
    """Random bf16 weights of LLaDA-8B's shape."""
    heads = width // 128
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return MaskedDiffusionLM(model, None, BackboneSpec("llada", mask_id=words - 1, eos_id=0, pad_id=0), "llada-8b, random")


def on_a_device(lm: MaskedDiffusionLM, length: int, facts: int) -> dict[str, Any]:
    """Seconds of both modes at one noise draw, 8 steps and 3 modules, beside the time that the arithmetic alone takes."""
    config, answer = TraceConfig(steps=8, draws=1), 24
    ids = torch.randint(
        1, lm.embedding.num_embeddings - 1, (facts, length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = [Encoded(f"fact {i}", tuple(row[:-answer]), tuple(row[-answer:]), (10, 15)) for i, row in enumerate(ids)]
    runs = {
        mode: (lambda mode=mode: trace(lm, rows, config, mode=mode, keep_unknown=True))  # type: ignore[misc]
        for mode in ("exact", "sweep")
    }
    measured, _ = timed(lm, runs)
    block = sum(p.numel() for p in lm.blocks[0].parameters())
    for run in measured.values():
        flop = 2 * run["blocks"] * length * block
        run["floor_seconds"] = round(flop / (H200["TFLOP/s"] * 1e12), 3)  # type: ignore[operator]
        run["times_the_floor"] = round(run["seconds"] / max(run["floor_seconds"], 1e-9), 2)
    return {
        "command": "python benchmarks/tracing.py --size 8b",
        "model": {"name": lm.name, "layers": lm.num_layers, "width": lm.hidden_size, "parameters": lm.num_parameters},
        "facts": facts,
        "tokens": length,
        "config": {"steps": 8, "draws": 1, "modules": 3},
        "floor": H200,
        "runs": measured,
        "naive_blocks": rerun(lm, rows, config),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
