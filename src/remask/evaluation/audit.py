"""Before and after: what an intervention did to what should go and to what should stay.

Every state of the model is scored on the same rows, under the same mask bank:

- `before`, `after`: without and with the intervention;
- `never trained`: the reference model, which never saw the forget set: the level to reach, not to pass;
- `prompt masked`: the unedited model with every prompt token hidden: what it says without knowing the question;
- `mean-delta`: the control, a single steering vector of the same strength. A memory that does no better is steering.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from ..backbones.intervention import Intervention
from ..backbones.model import MaskedDiffusionLM
from ..diffusion.masks import MaskBank
from ..diffusion.sampler import SamplerConfig
from ..facts import Fact
from .records import RowScore, score_rows
from .statistics import mean_interval, ratio_interval

SCHEMA = 1
Scores = dict[str, list[RowScore]]


@dataclass
class Audit:
    """All row scores of one run, and what they were measured with.

    Attributes:
        states: state name -> group name -> scores.
        header: model, reference, intervention, estimator, bank, sampler, versions.
    """

    header: dict[str, Any]
    states: dict[str, Scores] = field(default_factory=dict)

    def values(self, state: str, group: str, name: str) -> list[float]:
        """One number a row: `logprob`, `rouge`, `exact` or `junk` (1 where junk)."""
        rows = self.states[state][group]
        if name == "junk":
            return [float(row.junk is not None) for row in rows]
        return [float(getattr(row, name)) for row in rows]

    def change(self, group: str, state: str = "after") -> list[float]:
        """Per-row change of log-probability against `before`, nats."""
        return [
            b - a for a, b in zip(self.values("before", group, "logprob"), self.values(state, group, "logprob"), strict=True)
        ]

    def table(self) -> list[dict[str, Any]]:
        """One row a group: every number with its bootstrap interval and Monte-Carlo standard error."""
        lines = []
        for group, rows in self.states["before"].items():
            line: dict[str, Any] = {"group": group, "n": len(rows)}
            for state, scores in self.states.items():
                if group not in scores:
                    continue
                entry: dict[str, Any] = {"logprob": mean_interval(self.values(state, group, "logprob")).to_dict()}
                entry["logprob"]["mc_stderr"] = _pooled([row.stderr for row in scores[group]])
                if scores[group][0].output is not None:
                    for name in ("exact", "rouge", "junk"):
                        entry[name] = mean_interval(self.values(state, group, name)).to_dict()
                if state in ("after", "mean-delta"):
                    entry["change"] = mean_interval(self.change(group, state)).to_dict()
                line[state] = entry
            lines.append(line)
        return lines

    def selectivity(self, state: str = "after", against: str = "retain") -> dict[str, Any]:
        """|forget change| / |change of `against`|, with interval."""
        return ratio_interval(self.change("forget", state), self.change(against, state)).to_dict()

    def gap_closed(self) -> float | None:
        """Share of the way from `before` to `never trained` on the forget set; 1 = reached, more = over-forgetting."""
        if "never trained" not in self.states:
            return None
        before, after, never = (
            np.mean(self.values(state, "forget", "logprob")) for state in ("before", "after", "never trained")
        )
        return None if before == never else float((before - after) / (before - never))

    def to_dict(self) -> dict[str, Any]:
        """The whole run as JSON: header, table, selectivity and every row."""
        controls = [state for state in ("after", "mean-delta") if state in self.states]
        return {
            "schema": SCHEMA,
            **self.header,
            "gap_closed": self.gap_closed(),
            "selectivity": {state: self.selectivity(state) for state in controls},
            "table": self.table(),
            "rows": [
                {"state": state, "group": group, **asdict(row), "stderr": _number(row.stderr)}
                for state, groups in self.states.items()
                for group, rows in groups.items()
                for row in rows
            ],
        }


def run_audit(
    lm: MaskedDiffusionLM,
    intervention: Intervention,
    groups: Mapping[str, Sequence[Fact]],
    bank: MaskBank,
    *,
    sampler: SamplerConfig | None = None,
    reference: MaskedDiffusionLM | None = None,
    control: Intervention | None = None,
    known: Mapping[str, Scores] | None = None,
    text: bool = True,
    report: Callable[[str], None] = lambda _message: None,
) -> Audit:
    """Score all states on all groups.

    Args:
        groups: name -> facts; must hold `forget` and `retain`.
        reference: model that never saw the forget set.
        control: intervention to score beside the real one; log-probabilities only.
        known: states of the unedited models that another audit scored on the same groups, bank and sampler; used as they are.
        text: also generate answers (of the states that have them).
        report: receives one line before each state.
    """
    sampler = sampler or SamplerConfig.default(lm)

    def score(model: MaskedDiffusionLM, state: str, *, generate: bool, hide_prompt: bool = False) -> Scores:
        if known is not None and state in known:
            return known[state]
        report(state)
        settings = sampler if generate and text else None
        return {name: score_rows(model, facts, bank, settings, hide_prompt=hide_prompt) for name, facts in groups.items()}

    audit = Audit(_header(lm, intervention, reference, control, groups, bank, sampler))
    audit.states["before"] = score(lm, "before", generate=True)
    with intervention.attached(lm):
        audit.states["after"] = score(lm, "after", generate=True)
    if reference is not None:
        audit.states["never trained"] = score(reference, "never trained", generate=True)
    audit.states["prompt masked"] = score(lm, "prompt masked", generate=False, hide_prompt=True)
    if control is not None:
        with control.attached(lm):
            audit.states["mean-delta"] = score(lm, "mean-delta", generate=False)
    return audit


def _pooled(errors: Sequence[float]) -> float | None:
    """Standard error of a mean of independent estimates; None where a single replicate gives none."""
    return _number(float(np.sqrt(np.sum(np.square(errors))) / len(errors)))


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _header(
    lm: MaskedDiffusionLM,
    intervention: Intervention,
    reference: MaskedDiffusionLM | None,
    control: Intervention | None,
    groups: Mapping[str, Sequence[Fact]],
    bank: MaskBank,
    sampler: SamplerConfig,
) -> dict[str, Any]:
    lengths = [(row.id, len(row.answer_ids)) for facts in groups.values() for row in map(lm.encode, facts)]
    return {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint()},
        "reference": None if reference is None else {"name": reference.name, "fingerprint": reference.fingerprint()},
        "intervention": {"kind": intervention.kind, **intervention.describe()},
        "control": None if control is None else {"kind": control.kind, **control.describe()},
        "estimator": {
            "name": "elbo, exact count, stratified",
            "draws": bank.draws * bank.replicates,
            "replicates": bank.replicates,
            "seed": bank.seed,
            "bank": bank.fingerprint(lengths),
        },
        "sampler": sampler.to_dict(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
