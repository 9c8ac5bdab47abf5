"""From records to results: every aggregate of an audit, computed from its record lines alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import RemaskError
from ..random import numpy_generator
from .attacks.report import Levels, regained
from .benchmarks.base import Side
from .metrics.membership import auc, privacy_leakage
from .metrics.probability import SplitUtility, model_utility, true_better
from .metrics.reference import forget_quality
from .metrics.registry import METRICS
from .records import Record
from .statistics import PERMUTATIONS, RESAMPLES, Estimate, bootstrap_interval, holm, paired_permutation, ratio_interval

LOGPROB = "answer log-probability"
EDITED = ("after", "mean-delta")
AUCS = {"MIA loss": "AUC loss", "MIA zlib": "AUC zlib", "MIA Min-K": "AUC Min-K", "MIA Min-K++": "AUC Min-K++"}


class Scores:
    """Values of an audit's records by state, group, metric and attack.

    Raises:
        RemaskError: records of several benchmarks, or one value twice.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)
        if len({record.benchmark for record in self.records}) > 1:
            raise RemaskError("these records belong to several benchmarks; give those of one audit")
        self._rows: dict[tuple[str, str, str, str], dict[int, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
        for record in self.records:
            rows = self._rows[record.state, record.group, record.metric, record.attack][record.source.seed]
            if record.id in rows:
                raise RemaskError(f"record {record.id!r}, {record.metric} of state {record.state!r} is there twice")
            rows[record.id] = record

    @property
    def groups(self) -> list[str]:
        """Groups that were measured as they stand, in order."""
        return list(dict.fromkeys(record.group for record in self.records if not record.attack))

    @property
    def states(self) -> list[str]:
        """States in order."""
        return list(dict.fromkeys(record.state for record in self.records))

    def metrics(self, group: str) -> list[str]:
        """Numeric metrics of a group."""
        found = [r.metric for r in self.records if r.group == group and not r.attack and not isinstance(r.value, str)]
        return list(dict.fromkeys(found))

    def rows(self, state: str, group: str, metric: str, attack: str = "", seed: int = 0) -> dict[str, Record]:
        """Records by row id; empty where nothing was measured."""
        return dict(self._rows.get((state, group, metric, attack), {}).get(seed, {}))

    def table(self, state: str, group: str, metric: str, attack: str = "") -> np.ndarray:
        """Values [seeds, rows]; [0, 0] where nothing was measured."""
        seeds = self._rows.get((state, group, metric, attack), {})
        if not seeds:
            return np.zeros((0, 0))
        return np.array([[float(record.value) for record in seeds[seed].values()] for seed in sorted(seeds)])

    def stderr(self, state: str, group: str, metric: str) -> float | None:
        """Monte-Carlo standard error of the mean over seeds and rows; None where it was not measured."""
        seeds = self._rows.get((state, group, metric, ""), {})
        errors = [record.stderr for rows in seeds.values() for record in rows.values()]
        if not errors or any(error is None for error in errors):
            return None
        return float(np.sqrt(np.sum(np.square(np.array(errors, dtype=float)))) / len(errors))

    def change(self, group: str, state: str = "after", metric: str = LOGPROB) -> np.ndarray:
        """Change of each row against `before`, [seeds, rows]; [0, 0] where one of the two was not measured."""
        before, after = self.table("before", group, metric), self.table(state, group, metric)
        return after - before if before.size and after.size else np.zeros((0, 0))


def estimate(values: np.ndarray) -> dict[str, Any]:
    """Mean over seeds and rows of [seeds, rows], row-bootstrap interval of the mean over seeds, and each seed's mean."""
    return bootstrap_interval(values.mean(axis=0)).to_dict() | {"seeds": [_number(x) for x in values.mean(axis=1)]}


def group_table(scores: Scores, sides: Mapping[str, Side]) -> list[dict[str, Any]]:
    """Every group, metric and state with its interval, and the changes with Holm-corrected paired permutation tests."""
    lines, changes = [], []
    for group in scores.groups:
        metrics: dict[str, Any] = {}
        for metric in scores.metrics(group):
            entry = METRICS[metric]
            cell: dict[str, Any] = {"unit": entry.unit, "good": entry.forget if sides[group] == "forget" else entry.retain}
            cell["states"], cell["change"] = {}, {}
            for state in scores.states:
                values = scores.table(state, group, metric)
                if not values.size:
                    continue
                cell["states"][state] = estimate(values) | _monte_carlo(scores.stderr(state, group, metric))
                if state in EDITED:
                    change = scores.change(group, state, metric)
                    cell["change"][state] = line = estimate(change)
                    rows = change.mean(axis=0)
                    line["p"] = paired_permutation(rows, np.zeros_like(rows)).pvalue if len(rows) > 1 else math.nan
                    changes.append(line)
            metrics[metric] = cell
        n = max(entry["n"] for metric in metrics.values() for entry in metric["states"].values())
        lines.append({"group": group, "side": sides[group], "n": n, "metrics": metrics})
    for line, corrected in zip(changes, holm([line["p"] for line in changes]), strict=True):
        line["p"], line["p_holm"] = _number(line["p"]), _number(corrected)
    return lines


def tests_used(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names of the interval, the test and the correction."""
    count = sum(len(metric["change"]) for line in lines for metric in line["metrics"].values())
    return {
        "interval": f"95 % percentile bootstrap over rows, {RESAMPLES:,} resamples",
        "test": f"paired permutation test over rows, two-sided, exact or {PERMUTATIONS:,} permutations",
        "correction": f"Holm over {count} comparisons",
    }


def gap_closed(scores: Scores) -> list[float | None] | None:
    """For each seed, the share of the way from `before` down to `never trained` on the forget set; 1 = reached, more = past it.

    None without a reference, and for a seed under which the model starts at or below the reference.
    """
    tables = [scores.table(state, "forget", LOGPROB) for state in ("before", "after", "never trained")]
    if not all(table.size for table in tables):
        return None
    before, after, never = (table.mean(axis=1) for table in tables)
    gap = before - never
    return [float((b - a) / g) if g > 0 else None for a, b, g in zip(after, before, gap, strict=True)]


def selectivity(scores: Scores, against: str = "retain") -> dict[str, Any]:
    """For each edited state |forget change| / |change of `against`|, nats forgotten for each nat that a kept row changed."""
    found = {}
    for state in EDITED:
        forget, kept = scores.change("forget", state), scores.change(against, state)
        if not forget.size or not kept.size or not kept.any():
            continue
        seeds = [ratio_interval(f, k).mean for f, k in zip(forget, kept, strict=True)]
        found[state] = ratio_interval(forget.mean(axis=0), kept.mean(axis=0)).to_dict() | {"seeds": seeds}
    return found


def forget_qualities(scores: Scores) -> dict[str, Any]:
    """KS test of each state's truth ratios on the forget set against the reference's; {} without one."""
    reference = _ratios(scores, "never trained")
    if reference is None:
        return {}
    found = {}
    for state in ("before", "after"):
        ratios = _ratios(scores, state)
        if ratios is None:
            continue
        quality = forget_quality(ratios, reference)
        found[state] = {k: _number(v) for k, v in asdict(quality).items() if k != "replicates"}
        found[state] |= {"replicates": list(quality.replicates), "reliable": quality.reliable}
    return found


def _ratios(scores: Scores, state: str) -> np.ndarray | None:
    rows = scores.rows(state, "forget", "truth ratio").values()
    return np.array([row.replicates for row in rows], dtype=float) if rows else None


def utilities(scores: Scores) -> dict[str, float]:
    """TOFU's model utility of each state that was measured on all three of its sets."""
    found = {}
    for state in scores.states:
        splits = []
        for group in ("retain", "real_authors", "world_facts"):
            probability = "length-normalised probability" if group == "retain" else "normalised probability"
            parts = [scores.table(state, group, metric) for metric in (probability, "ROUGE-L recall", "truth ratio")]
            if all(part.size for part in parts):
                means = (float(parts[0][0].mean()), float(parts[1][0].mean()), float(true_better(parts[2][0]).mean()))
                splits.append(SplitUtility(*means))
        if len(splits) == 3:
            found[state] = model_utility(*splits)
    return found


def memberships(scores: Scores, sides: Mapping[str, Side]) -> dict[str, Any]:
    """AUC of every attack by state, forget against holdout texts, with an interval over texts; PrivLeak with a reference."""
    has = {group: side for group, side in sides.items() if "MIA loss" in scores.metrics(group)}
    members = [group for group, side in has.items() if side == "forget"]
    others = [group for group, side in has.items() if side == "holdout"]
    if not members or not others:
        return {}
    found: dict[str, Any] = {}
    for state in scores.states:
        pairs = {
            name: (scores.table(state, members[0], metric)[0], scores.table(state, others[0], metric)[0])
            for metric, name in AUCS.items()
            if scores.table(state, members[0], metric).size
        }
        if not pairs:
            continue
        reference = [scores.table("never trained", group, "MIA loss") for group in (members[0], others[0])]
        if state != "never trained" and reference[0].size:
            mine = [scores.table(state, group, "MIA loss")[0] for group in (members[0], others[0])]
            pairs["AUC reference"] = (mine[0] - reference[0][0], mine[1] - reference[1][0])
        found[state] = {name: _auc(*pair) for name, pair in pairs.items()}
    if "never trained" in found:
        level = found["never trained"]["AUC Min-K"]["mean"]
        for state, line in found.items():
            if state != "never trained" and level < 1:
                line["PrivLeak"] = {"mean": privacy_leakage(line["AUC Min-K"]["mean"], level)}
    return found


def _auc(members: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """AUC with the bootstrap interval over the texts of both sets; a resample weights the same pairwise comparisons."""
    rng = numpy_generator(0, "bootstrap auc", len(members), len(others))
    wins = (others > members[:, None]) + 0.5 * (others == members[:, None])
    first = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES) / len(members)
    second = rng.multinomial(len(others), np.full(len(others), 1 / len(others)), RESAMPLES) / len(others)
    low, high = np.quantile(((first @ wins) * second).sum(axis=1), [0.025, 0.975])
    return Estimate(auc(members, others), float(low), float(high), len(members)).to_dict()


def attack_table(scores: Scores, attacks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each attack regains of what was forgotten, in per cent, with the removal of the edit as the last line.

    Args:
        attacks: name (`attack`), parameters (`describe`), ids of the rows that it was to be run on (`rows`), and what it is
            read off (`measure`): `answer log-probability`, or `recovered`, which is compared with plain ROUGE-L recall.
    """
    never = "never trained" if "never trained" in scores.states else None
    lines = []
    for attack in attacks:
        measure = attack["measure"]
        floor = never or ("prompt masked" if measure == LOGPROB else None)
        plain = _levels(scores, LOGPROB if measure == LOGPROB else "ROUGE-L recall", "", floor)
        lines.append(_attack_line(attack, floor, plain, _levels(scores, measure, attack["attack"], floor)))
    floor = never or "prompt masked"
    plain = _levels(scores, LOGPROB, "", floor)
    off = Levels(plain.ids, plain.before, plain.before, plain.floor)
    control = {"attack": "edit off", "describe": {"kind": "edit off"}, "measure": LOGPROB, "rows": plain.ids}
    return [*lines, _attack_line(control, floor, plain, off)] if lines else []


def _levels(scores: Scores, metric: str, attack: str, floor: str | None) -> Levels:
    """Rows that every one of the three states has; without a floor state the floor is nothing, 0."""
    states = ["before", "after", *([floor] if floor else [])]
    rows = [scores.rows(state, "forget", metric, attack) for state in states]
    ids = tuple(name for name in rows[0] if all(name in other for other in rows))
    values = [np.array([float(other[name].value) for name in ids]) for other in rows]
    return Levels(ids, values[0], values[1], values[2] if floor else np.zeros(len(ids)))


def _attack_line(attack: Mapping[str, Any], floor: str | None, plain: Levels, attacked: Levels) -> dict[str, Any]:
    result = regained(plain, attacked)
    levels = {"before": attacked.before, "after": attacked.after, "never": attacked.floor}
    reached = set(attacked.ids)
    return {
        "attack": attack["attack"],
        "describe": dict(attack["describe"]),
        "measure": attack["measure"],
        "n": len(attacked.ids),
        "left_out": [name for name in attack["rows"] if name not in reached],
        "floor": floor or "nothing recovered",
        **{key: float(np.asarray(values).mean()) if reached else None for key, values in levels.items()},
        **{key: _number(value) for key, value in result.to_dict().items() if key not in ("n", "note")},
        "note": result.note or None,
    }


def _monte_carlo(stderr: float | None) -> dict[str, float]:
    return {} if stderr is None else {"mc_stderr": stderr}


def _number(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
