"""What the likelihood estimators cost and agree on: real TOFU answers under `tiny-tofu`.

    python benchmarks/likelihood.py --data DIR

Three studies, all in fp32 and through the public estimators: canvases needed for a given standard error (LLaDA's and Dream's
protocols against `elbo`), the standard error of before - after differences with one bank and with two, and all estimators on
answers short enough for `elbo_exact`. Writes benchmarks/results/likelihood.json (numbers and row ids, no TOFU text) and the
tables of docs/likelihood.md. `--tables` only rewrites the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tables import ROOT, put

from remask import load
from remask.backbones import Encoded, MaskedDiffusionLM, Site
from remask.diffusion.likelihood import Likelihood, bernoulli, chain, elbo, elbo_exact, pll
from remask.diffusion.masks import MaskBank
from remask.evaluation.benchmarks.base import Benchmark
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.experiments.edits import build_edit, tuned
from remask.random import numpy_generator

OUT = ROOT / "benchmarks" / "results" / "likelihood.json"
SEED = 4_000_003
BUDGET = 128  # draws of one score, LLaDA's and Dream's default
SHORT = 8  # tokens
RESAMPLES = 2000
COUNT_REPLICATES = 200  # banks that tell how far the counts alone move a replicate; no forwards
CALM = 0.5  # nats: a row that the edit changed by less


# ------------------------------------------------------------------ the protocols
@dataclass(frozen=True)
class LLaDABank:
    """Masks as LLaDA's code draws them (get_log_likelihood.py, batch 16; eval_llada.py, batch 32), one batch a replicate.

    Within a batch of b the first count k is uniform on 1..L, the others follow at steps of L / b, rounded and wrapped around;
    positions are a fresh permutation for each draw. Batches are independent.
    """

    draws: int
    replicates: int
    seed: int = SEED

    def masks(self, row: str, length: int) -> np.ndarray:
        """Bool [replicates * draws, length]."""
        rng = numpy_generator(self.seed, "llada", row, self.draws)
        masks = np.zeros((self.replicates * self.draws, length), dtype=bool)
        for replicate in range(self.replicates):
            first = int(rng.integers(1, length + 1))
            counts = np.round(np.linspace(first, first + (self.draws - 1) * length / self.draws, self.draws)).astype(int)
            for draw, count in enumerate((counts - 1) % length + 1):
                masks[replicate * self.draws + draw, rng.permutation(length)[:count]] = True
        return masks


@dataclass(frozen=True)
class Protocol:
    """One way to draw: its name in the table, draws a replicate, and the share of the budget that it is measured with."""

    name: str
    draws: int
    kind: str
    share: float = 1.0

    def bank(self, nominal: int) -> Any:
        """The masks of `nominal` draws, or as many whole replicates as that holds."""
        replicates = max(2, round(nominal * self.share / self.draws))
        return LLaDABank(self.draws, replicates) if self.kind == "llada" else MaskBank(self.draws, replicates, SEED)

    def distinct(self, row: Encoded) -> int:
        """Canvases that `BUDGET` nominal draws come to, when every distinct mask runs once."""
        bank, length = self.bank(round(BUDGET / self.share)), len(row.answer_ids)
        masks = bank.bernoulli(row.id, length)[0] if self.kind == "bernoulli" else bank.masks(row.id, length)
        return len(np.unique(masks[masks.any(axis=1)], axis=0))


BASELINE, FREE = "LLaDA, batch 32", "independent counts (`elbo`, 1 draw)"
PROTOCOLS = (
    Protocol("LLaDA, batch 16", 16, "llada", 0.25),
    Protocol(BASELINE, 32, "llada", 0.5),
    Protocol("Dream (`bernoulli`, 32 draws)", 32, "bernoulli", 0.5),
    Protocol(FREE, 1, "elbo", 0.25),
    Protocol("`elbo`, 2 draws", 2, "elbo", 0.25),
    Protocol("`elbo`, 4 draws", 4, "elbo", 0.25),
    Protocol("`elbo`, 8 draws", 8, "elbo", 0.25),
    Protocol("`elbo`, 16 draws", 16, "elbo"),
    Protocol("`elbo`, 32 draws", 32, "elbo"),
    Protocol("`elbo`, 64 draws", 64, "elbo", 2.0),
)


# ------------------------------------------------------------------ a. canvases for a given standard error
def efficiency(lm: MaskedDiffusionLM, groups: dict[str, list[Encoded]], nominal: int) -> dict[str, Any]:
    """Variance of one draw's share of a score, by protocol and group; ratios to LLaDA's with intervals over rows."""
    record: dict[str, Any] = {"nominal_draws_a_row": nominal, "budget": BUDGET, "groups": {}, "all rows": {}}
    costs: dict[str, list[np.ndarray]] = {protocol.name: [] for protocol in PROTOCOLS}
    for group, rows in groups.items():
        drawn = {protocol.name: each_draw(lm, rows, protocol, nominal) for protocol in PROTOCOLS}
        variance = {protocol.name: np.zeros(len(rows)) for protocol in PROTOCOLS}
        direct = {name: np.array([value.mean(axis=1).var(ddof=1) for _, value in values]) for name, values in drawn.items()}
        for i, row in enumerate(rows):
            pool = [drawn[protocol.name][i] for protocol in PROTOCOLS if protocol.kind != "bernoulli"]
            counts, values = (np.concatenate([part[side].ravel() for part in pool]) for side in (0, 1))
            curve = Curve.fit(len(row.answer_ids), counts, values)
            for protocol in PROTOCOLS:
                name = protocol.name
                if protocol.kind == "bernoulli":  # its weights leave no such decomposition
                    variance[name][i] = direct[name][i] * protocol.draws
                else:
                    variance[name][i] = curve.a_draw(protocol, row, *drawn[name][i])
        distinct = {protocol.name: np.array([protocol.distinct(row) for row in rows]) for protocol in PROTOCOLS}
        # A row with a loss of hundreds of nats would outvote all others: each row counts in units of its own noise.
        unit = np.maximum(variance[FREE], 1e-12)
        entry: dict[str, Any] = {
            "rows": [row.id for row in rows],
            "tokens": [len(row.answer_ids) for row in rows],
            "protocols": {},
        }
        for protocol in PROTOCOLS:
            costs[protocol.name].append(variance[protocol.name] / unit * distinct[protocol.name])
        for protocol in PROTOCOLS:
            name = protocol.name
            entry["protocols"][name] = {
                "draws_a_replicate": protocol.draws,
                "replicates": len(drawn[name][0][1]),
                "mean": round(float(np.mean([value.mean() for _, value in drawn[name]])), 3),
                "stderr_at_budget": float(f"{np.sqrt(np.maximum(variance[name], 0) / BUDGET).mean():.3g}"),
                "distinct_canvases": round(float(distinct[name].mean()), 1),
                "variance_a_draw": [float(f"{value:.4g}") for value in variance[name]],
                "variance_a_draw_direct": [float(f"{value:.4g}") for value in direct[name] * protocol.draws],
                "fewer_draws": ratio(variance[BASELINE] / unit, variance[name] / unit),
                "fewer_canvases": ratio(costs[BASELINE][-1], costs[name][-1]),
            }
        record["groups"][group] = entry
    for name, parts in costs.items():
        record["all rows"][name] = ratio(np.concatenate(costs[BASELINE]), np.concatenate(parts))
    return record


def each_draw(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], protocol: Protocol, nominal: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row the count and the estimate of every draw, both [replicates, draws]: a bank of single draws shows them."""
    bank = protocol.bank(nominal)
    single: Any = SimpleNamespace(draws=1, replicates=bank.draws * bank.replicates, masks=bank.masks)
    if protocol.kind == "bernoulli":
        single.bernoulli = bank.bernoulli
    scores = (bernoulli if protocol.kind == "bernoulli" else elbo)(lm, rows, single)
    shape = (bank.replicates, bank.draws)
    return [
        (bank.masks(row.id, score.tokens).sum(axis=1).reshape(shape), np.reshape(score.replicates, shape))
        for row, score in zip(rows, scores, strict=True)
    ]


@dataclass(frozen=True)
class Curve:
    """A row's mean and variance over positions at each count, from the draws of all protocols together, [L + 1].

    Every protocol's draw, given its count, is a uniform subset. So the protocols share all variances and differ in two things:
    how counts fall and how the draws of a replicate covary. Rare draws of huge weight make a plain variance of 20 replicate
    means nearly useless on rows that a model knows well; they enter here through the pool, alike for all.
    """

    mean: np.ndarray
    variance: np.ndarray

    @staticmethod
    def fit(length: int, counts: np.ndarray, values: np.ndarray) -> Curve:
        """From draws of any protocol, [n] counts with their [n] estimates."""
        cells = [values[counts == level] for level in range(length + 1)]
        mean = np.array([cell.mean() if len(cell) else 0.0 for cell in cells])
        return Curve(mean, np.array([cell.var(ddof=1) if len(cell) > 1 else 0.0 for cell in cells]))

    def a_draw(self, protocol: Protocol, row: Encoded, counts: np.ndarray, values: np.ndarray) -> float:
        """Variance of a replicate's mean times its draws: the variance over positions, their covariances, and the counts'."""
        spread = self.mean[self._counts(protocol, row)].mean(axis=1).var(ddof=1) * protocol.draws
        rest = values - self.mean[counts]
        between = 0.0 if protocol.kind == "llada" else ((rest.sum(axis=1) ** 2 - (rest**2).sum(axis=1)) / protocol.draws).mean()
        return float(self.variance[1:].mean() + between + spread)

    @staticmethod
    def _counts(protocol: Protocol, row: Encoded) -> np.ndarray:
        bank = protocol.bank(round(COUNT_REPLICATES * protocol.draws / protocol.share))
        return bank.masks(row.id, len(row.answer_ids)).sum(axis=1).reshape(-1, protocol.draws)


def ratio(top: np.ndarray, bottom: np.ndarray) -> dict[str, float]:
    """Sum over sum, with a 95 % percentile interval over rows (resampled as pairs) and the median of the rows' own ratios."""
    chosen = numpy_generator(SEED, "rows").integers(len(top), size=(RESAMPLES, len(top)))
    tops, bottoms = top[chosen].sum(axis=1), bottom[chosen].sum(axis=1)
    low, high = np.quantile(tops / np.maximum(bottoms, 1e-12), [0.025, 0.975])
    own = top[bottom > 0] / bottom[bottom > 0]
    values = {"ratio": top.sum() / max(bottom.sum(), 1e-12), "low": low, "high": high, "median": np.median(own)}
    return {key: round(float(value), 3) for key, value in values.items()}


# ------------------------------------------------------------------ b. one bank for both sides of a difference
def shared_banks(lm: MaskedDiffusionLM, model: Benchmark, rows: list[Encoded], draws: int, replicates: int) -> dict[str, Any]:
    """Standard errors of after - before on retain rows under the default edit, with one bank and with two."""
    settings = tuned("tiny-tofu", "default")
    site = Site(settings.pop("layer"))
    edit = build_edit(lm, "default", model.forget, model.fit, site=site, **settings)
    banks = [MaskBank(draws, replicates, SEED + i) for i in range(2)]
    before = [np.array([s.replicates for s in elbo(lm, rows, bank)]) for bank in banks]
    with edit.attached(lm):
        after = np.array([s.replicates for s in elbo(lm, rows, banks[0])])
    error = lambda values: values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])  # noqa: E731
    total = lambda errors: float(np.sqrt((errors**2).sum()) / len(errors))  # noqa: E731
    one, two = error(after - before[0]), np.hypot(error(after), error(before[1]))
    # LLaDA's code has no bank: two runs draw two sets of masks. Measured with whole batches, scaled to as many canvases.
    llada: list[Any] = [LLaDABank(16, 4, SEED + i) for i in range(2)]
    runs = [np.array([s.replicates for s in elbo(lm, rows, llada[0])])]
    with edit.attached(lm):
        runs.append(np.array([s.replicates for s in elbo(lm, rows, llada[1])]))
    unpaired = np.hypot(*map(error, runs)) * math.sqrt(64 / (draws * replicates))
    change = (after - before[0]).mean(axis=1)
    calm = np.abs(change) < CALM
    errors = {"one_bank": one, "two_banks": two, "llada": unpaired}
    return {
        "edit": "default",
        "rows": [row.id for row in rows],
        "draws": draws,
        "replicates": replicates,
        "before": round(float(before[0].mean()), 4),
        "mean_difference": {
            "one_bank": float(change.mean()),
            "two_banks": float((after - before[1]).mean()),
            "llada": float(runs[1].mean() - runs[0].mean()),
        },
        "stderr_of_mean": {name: total(values) for name, values in errors.items()},
        "ratio_of_mean": {name: round(total(one) / total(errors[name]), 4) for name in ("two_banks", "llada")},
        "ratio_median_row": round(float(np.median(one[two > 0] / two[two > 0])), 4),
        "rows_at_most_half": int((one <= two / 2).sum()),
        "calm": {
            "rows": int(calm.sum()),
            "ratio_of_mean": round(total(one[calm]) / total(two[calm]), 4) if calm.any() else None,
        },
        "row_change": [float(f"{value:.4g}") for value in change],
        "row_stderr": {name: [float(f"{v:.4g}") for v in values] for name, values in errors.items()},
    }


# ------------------------------------------------------------------ c. every estimator on short answers
def short_answers(lm: MaskedDiffusionLM, rows: list[Encoded]) -> dict[str, Any]:
    """Means, differences from the exact bound and canvases a row."""
    bank = MaskBank(4, 4, SEED)
    lengths = [len(row.answer_ids) for row in rows]
    masks = {"elbo": [bank.masks(row.id, len(row.answer_ids)) for row in rows]}
    drawn = [bank.bernoulli(row.id, len(row.answer_ids))[0] for row in rows]
    masks["bernoulli"] = [mask[mask.any(axis=1)] for mask in drawn]
    runs: dict[str, Callable[[], list[Likelihood]]] = {
        "elbo_exact": lambda: elbo_exact(lm, rows),
        "elbo": lambda: elbo(lm, rows, bank),
        "bernoulli": lambda: bernoulli(lm, rows, bank),
        "chain, forward": lambda: chain(lm, rows),
        "chain, backward": lambda: chain(lm, rows, order="backward"),
        "pll": lambda: pll(lm, rows),
    }
    scores = {name: run() for name, run in runs.items()}
    exact = np.array([score.logprob for score in scores["elbo_exact"]])
    table = {}
    for name, values in scores.items():
        difference = np.array([score.logprob for score in values]) - exact
        canvases = [2**length - 1 for length in lengths] if name == "elbo_exact" else lengths
        if name in masks:
            canvases = [len(np.unique(mask, axis=0)) for mask in masks[name]]
        table[name] = {
            "mean": round(float(exact.mean() + difference.mean()), 3),
            "mean_difference": round(float(difference.mean()), 3),
            "mean_absolute_difference": round(float(np.abs(difference).mean()), 3),
            "stderr_a_row": round(float(np.mean([score.stderr for score in values])), 3),
            "canvases_a_row": round(float(np.mean(canvases)), 1),
        }
    return {"rows": len(rows), "tokens": lengths, "draws": bank.draws, "replicates": bank.replicates, "estimators": table}


# ------------------------------------------------------------------ tables
def table_text(record: dict[str, Any]) -> str:
    """The measured part of docs/likelihood.md."""
    groups = record["efficiency"]["groups"]
    columns = [f"{name} ({len(entry['rows'])} rows)" for name, entry in groups.items()]
    head = "| protocol | " + " | ".join([*columns, "all rows"]) + " |"
    lines = [
        f"Model `{Path(record['model']).name}`, fp32, seed {record['seed']}. Each cell: how many times fewer canvases than "
        f"LLaDA's protocol in batches of 32 for the same standard error [95 % over rows]; behind it the standard error of "
        f"{record['efficiency']['budget']} draws in nats a row.",
        "",
        head,
        "|---" * (len(groups) + 2) + "|",
    ]
    for protocol in PROTOCOLS:
        cells = [protocol.name]
        for entry in groups.values():
            one = entry["protocols"][protocol.name]
            cells.append(f"{_times(protocol, one['fewer_canvases'])}; {one['stderr_at_budget']:.3g}")
        cells.append(_times(protocol, record["efficiency"]["all rows"][protocol.name]))
        lines.append("| " + " | ".join(cells) + " |")
    banks = record["shared_banks"]
    errors, means = banks["stderr_of_mean"], banks["mean_difference"]
    ratios, calm = banks["ratio_of_mean"], banks["calm"]
    lines += [
        "",
        f"After - before of the default edit on {len(banks['rows'])} retain rows ({banks['before']:.2f} nats a row before), "
        f"{banks['replicates']} replicates of {banks['draws']} draws a side:",
        "",
        "| | one bank | two banks | LLaDA's protocol, two runs |",
        "|---|---|---|---|",
        "| mean difference, nats a row | " + " | ".join(f"{means[key]:+.3f}" for key in means) + " |",
        "| Monte-Carlo standard error of that mean | " + " | ".join(f"{errors[key]:.4f}" for key in errors) + " |",
        f"| one bank's standard error over this one's | | {ratios['two_banks']:.2f} | {ratios['llada']:.2f} |",
    ]
    if calm["rows"]:
        lines.append(
            f"| the same, {calm['rows']} rows that changed by less than {CALM} nats | | {calm['ratio_of_mean']:.2f} | |"
        )
    lines += [
        f"| median row | | {banks['ratio_median_row']:.2f} | |",
        f"| rows at half or less | | {banks['rows_at_most_half']} of {len(banks['rows'])} | |",
    ]
    short = record["short_answers"]
    lines += [
        "",
        f"{short['rows']} answers of at most {SHORT} tokens (real authors, world facts); `elbo` and `bernoulli` with "
        f"{short['replicates']} replicates of {short['draws']} draws; nats a row:",
        "",
        "| estimator | mean | mean difference from exact | mean absolute difference | standard error a row | canvases a row |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in short["estimators"].items():
        cells = [f"{one['mean']:.2f}", f"{one['mean_difference']:+.2f}", f"{one['mean_absolute_difference']:.2f}"]
        cells += [f"{one['stderr_a_row']:.2f}", f"{one['canvases_a_row']:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(protocol: Protocol, value: dict[str, float]) -> str:
    interval = "" if protocol.name == BASELINE else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['ratio']:.2f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with TOFU's files")
    parser.add_argument("--model", default="tiny-tofu", help="a taught model: a bundled name or a folder")
    parser.add_argument("--draws", type=int, default=320, help="nominal draws a row and protocol")
    parser.add_argument("--tables", action="store_true", help="only rewrite the tables from the committed result")
    args = parser.parse_args()
    if not args.tables:
        if args.data is None:
            parser.error("--data is needed")
        torch.set_num_threads(1)
        started = time.perf_counter()
        lm, benchmark = load(args.model), load_benchmark("tofu:forget01", args.data)
        encode = lambda facts: [lm.encode(fact) for fact in facts]  # noqa: E731
        retain = encode(benchmark.scored["retain"][::4])[:24]
        short = [row for name in ("real_authors", "world_facts") for row in encode(benchmark.scored[name])]
        short = [row for row in short if len(row.answer_ids) <= SHORT][::2]
        groups = {
            "retain, taught": retain[::2],
            "forget, taught": encode(benchmark.forget[2::5]),
            "holdout, unknown": encode(benchmark.probes["holdout"].facts[2::10]),
        }
        record = {
            "command": "python benchmarks/likelihood.py --data DIR",
            "model": args.model,
            "dtype": "float32",
            "seed": SEED,
            "efficiency": efficiency(lm, groups, args.draws),
            "shared_banks": shared_banks(lm, benchmark, retain, 4, 8),
            "short_answers": short_answers(lm, short),
            "torch": torch.__version__,
        }
        OUT.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        print(f"{time.perf_counter() - started:.0f} s")
    text = table_text(json.loads(OUT.read_text()))
    put(ROOT / "docs" / "likelihood.md", "likelihood", text)
    print(text)


if __name__ == "__main__":
    main()
