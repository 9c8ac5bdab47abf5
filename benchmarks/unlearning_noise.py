"""How noisy a step of unlearning by training is, and what it costs: draws, shared masks, stratified levels, references.

    python benchmarks/unlearning_noise.py            # tiny, CPU, one thread; results/unlearning_noise.json

Noise: the loss of ROWS fixed forget rows and its gradient by the adapters, at REDRAWS independent draws of the states, on the
way of an NPO run (after each number of steps in POINTS). `noise` is E|g - E g|^2 / |E g|^2: how much of a step is chance.
Cost: steps of the methods turn about, all with DRAWS states a row and no retain term; a method's ratio to gradient ascent is
the median of the rounds' ratios, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from remask import UnlearnConfig, load
from remask.backbones import Encoded
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.evaluation.records import package_versions
from remask.facts import write_json
from remask.unlearning.objectives import METHODS
from remask.unlearning.objectives.base import Loss, Quantities, Side, needed
from remask.unlearning.states import Noise, States, draw_states
from remask.unlearning.trainer import fast_bfloat16
from remask.unlearning.training.objective import Objective, Terms
from remask.unlearning.training.rows import Batch, Rows, prepare_rows
from remask.unlearning.training.weights import Adapters

ROWS, REDRAWS, POINTS, RATE = 8, 48, (5, 50), 5e-4
NOISY = ("ga", "mdu", "npo", "dpo")
FRESH = "4 draws, fresh masks for the reference"
DRAWN = {"1 draw": 1, "4 draws, each for itself": 4, "4 draws": 4, "8 draws": 8, FRESH: 4}
COSTED, DRAWS, ROUNDS = ("ga", "simnpo", "me", "mdu", "npo", "undial", "dpo"), 4, 12


@dataclass(frozen=True)
class Fresh(Quantities):
    """Quantities whose reference saw other states: what peers do, and this project does not."""

    other: Quantities | None = None

    def bound(self, of: Side = "policy") -> Tensor:
        """Of the policy under its states, of the reference under others."""
        return super().bound(of) if of == "policy" else needed(self.other, "reference").bound(of)


def fresh(own: Quantities, other: Quantities) -> Fresh:
    """`own` with the reference of `other`, and so in what is preferred."""
    values = {field.name: getattr(own, field.name) for field in fields(Quantities)}
    if own.preferred is not None and other.preferred is not None:
        values["preferred"] = fresh(own.preferred, other.preferred)
    return Fresh(**values, other=other)


class Lab:
    """A model with adapters, some rows, and the losses of all methods on them."""

    def __init__(self) -> None:
        self.lm = load("tiny")
        benchmark = load_benchmark("closed-world", None)
        self.config = UnlearnConfig(method="dpo", batch_size=ROWS, retain="none")  # the one that reads refusals
        self.rows: Rows = prepare_rows(self.lm, benchmark.forget, (), (), self.config)
        self.trained = Adapters(self.lm, self.config)
        self.parameters = list(self.trained.named.values())

    def objective(self, name: str) -> Objective:
        """A method without a retain term."""
        method = METHODS[name]
        return Objective(self.trained, Terms(method, method.parse({}), "none", 0.0, fast_bfloat16(self.lm.device)))

    def chosen(self, step: int) -> slice:
        """Rows of a step."""
        first = step * ROWS % (len(self.rows.forget) - ROWS)
        return slice(first, first + ROWS)

    def batch(self, key: tuple[Any, ...], rows: slice, draws: int, *, apart: bool = False) -> Batch:
        """Rows and their refusals under states of their own; `apart` leaves levels and masks of a row unrelated."""

        def states(encoded: Sequence[Encoded]) -> States:
            if not apart:
                return draw_states(self.lm.spec, encoded, Noise(draws=draws), key, 0)
            return joined([draw_states(self.lm.spec, encoded, Noise(), (*key, draw), 0) for draw in range(draws)])

        return Batch(states(self.rows.forget[rows]), states(self.rows.refusals[rows]), None)

    def train(self, first: int, last: int, optimizer: torch.optim.Optimizer) -> None:
        """Steps of NPO."""
        objective = self.objective("npo")
        for step in range(first, last):
            objective.loss(self.batch((0, "train", step), self.chosen(step), DRAWS))[0].backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def gradient(self, loss: Loss) -> Tensor:
        """Of the mean over rows, by all adapters, flat."""
        found = torch.autograd.grad(loss.rows.mean(), self.parameters, materialize_grads=True)
        return torch.cat([part.flatten() for part in found]).double()

    def noise(self, name: str, scheme: str) -> dict[str, float]:
        """Of loss and gradient over redraws of the states of fixed rows."""
        objective, method, keys = self.objective(name), METHODS[name], count()
        rows, draws = slice(0, ROWS), DRAWN[scheme]

        def drawn() -> Quantities:
            batch = self.batch((1, scheme, next(keys)), rows, draws, apart=scheme.endswith("itself"))
            return objective.forget_quantities(batch)

        values, total, squares = [], torch.zeros(()), 0.0
        for _ in range(REDRAWS):
            quantities = drawn()
            if scheme == FRESH:
                with torch.no_grad():
                    quantities = fresh(quantities, drawn())
            loss = method.loss(quantities, objective.terms.options)
            gradient = self.gradient(loss)
            values.append(loss.rows.detach().double())
            total, squares = total + gradient, squares + float(gradient.square().sum())
        mean = total / REDRAWS
        spread = (squares - REDRAWS * float(mean.square().sum())) / (REDRAWS - 1)
        signal = float(mean.square().sum()) - spread / REDRAWS  # without the noise of the mean itself
        stacked = torch.stack(values)
        return {
            "loss": float(stacked.mean()),
            "loss standard deviation a row": float(stacked.var(dim=0).mean().sqrt()),
            "noise": spread / signal,
        }

    def seconds(self) -> dict[str, list[float]]:
        """Of a step of every method, turn about."""
        objectives = {name: self.objective(name) for name in COSTED}
        found: dict[str, list[float]] = {name: [] for name in COSTED}
        for turn in track(range(-1, ROUNDS), description="cost"):
            for name, objective in objectives.items():
                batch = self.batch((2, turn), self.chosen(turn + 1), DRAWS)
                started = time.process_time()
                self.gradient(METHODS[name].loss(objective.forget_quantities(batch), objective.terms.options))
                if turn >= 0:  # the first round warms up
                    found[name].append(time.process_time() - started)
        return found


def joined(parts: Sequence[States]) -> States:
    """Draws of the same rows as one set of states."""

    def merged(take: Callable[[States], Tensor]) -> Tensor:
        return torch.stack([take(part) for part in parts], dim=1).flatten(0, 1)

    attention = None if parts[0].attention is None else merged(lambda part: needed(part.attention, "reference"))
    names = ("ids", "clean", "prompt", "scored", "row", "weight")
    values = {name: merged(lambda part, name=name: getattr(part, name)) for name in names}  # type: ignore[misc]
    return States(**values, attention=attention, length=parts[0].length)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    lab, noise, done = Lab(), [], 0
    optimizer = torch.optim.AdamW(lab.parameters, lr=RATE, weight_decay=0.0)
    for steps in POINTS:
        lab.train(done, steps, optimizer)
        done = steps
        pairs = [(name, scheme) for name in NOISY for scheme in DRAWN if scheme != FRESH or name in ("npo", "dpo")]
        for name, scheme in track(pairs, description=f"noise after {steps} steps"):
            noise.append({"steps": steps, "method": name, "scheme": scheme, **lab.noise(name, scheme)})
    cost = []
    seconds = lab.seconds()
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["ga"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        cost.append({"method": name, "seconds": statistics.median(values), "over ga": statistics.median(ratios)})
        cost[-1]["quartiles"] = [quartiles[0], quartiles[2]]
    record = {
        "command": "python benchmarks/unlearning_noise.py",
        "model": "tiny",
        "rows": ROWS,
        "redraws": REDRAWS,
        "npo rate": RATE,
        "noise": noise,
        "cost": {"draws": DRAWS, "rounds": ROUNDS, "methods": cost},
        "versions": package_versions(),
    }
    out = Path(__file__).parent / "results" / "unlearning_noise.json"
    write_json(out, record)


if __name__ == "__main__":
    main()
