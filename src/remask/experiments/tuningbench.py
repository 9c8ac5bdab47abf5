"""The bench that `remask edit tune` measures on: settings of a memory, the validation split, and one (setting, fold) at a time.

Blocks below a site do not depend on an edit at it, so their outputs are computed once for all settings and strengths there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones import Encoded, MaskedDiffusionLM, Site
from ..diffusion.likelihood import elbo
from ..diffusion.masks import MaskBank
from ..editing.calibrate import Level, calibrate, target_levels
from ..editing.config import MemoryConfig, preset
from ..editing.memory import EditMemory
from ..editing.steering import SteeringVector, mean_delta
from ..errors import NothingToForgetError, RemaskError
from ..facts import Fact
from ..random import digest, numpy_generator

BANK = MaskBank(draws=4, replicates=1, seed=3_000_003)
"""Never the bank that numbers are reported on, nor the one that `edit build` calibrates on."""
LADDER = (0.5, 0.75, 1.0, 1.25)  # strengths that are measured, in units of the calibrated one
CONTROL = "mean-delta"
AXES: dict[str, dict[str, tuple[Any, ...]]] = {  # what each preset can vary, and the default grid; () = the preset's own value
    "default": {"anchor": (), "mu": (10.0, 30.0, 100.0), "beta": (2.0, 4.0, 8.0), "ridge": (), "balance": ()},
    "ridge": {"anchor": (), "mu": (1.0, 10.0, 100.0), "ridge": (), "q": (), "balance": ()},
    "softmax": {"anchor": (), "beta": (10.0, 20.0, 40.0)},
    "paper": {"ridge": (0.1, 1.0, 10.0), "q": ()},
    CONTROL: {"anchor": ()},
}


# ------------------------------------------------------------------ settings
@dataclass(frozen=True)
class Setting:
    """A preset at a layer, the fields of MemoryConfig that differ from it, and whether each has the middle of its values."""

    preset: str
    layer: int
    changes: Mapping[str, Any]
    middle: bool = True

    @property
    def config(self) -> MemoryConfig:
        """How the memory is captured and solved."""
        return preset("ridge", mu=0.0, **self.changes) if self.preset == CONTROL else preset(self.preset, **self.changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"preset": self.preset, "layer": self.layer, **self.changes}


def grid(
    num_layers: int,
    presets: Sequence[str],
    layers: Sequence[int] | None = None,
    values: Mapping[str, tuple[Any, ...]] | None = None,
    unknown: tuple[str, ...] = (),
) -> list[Setting]:
    """Every setting, layer by layer, so that neighbours in the list share what is below the site.

    Args:
        presets: of AXES; layers: None = all of them.
        values: for fields of MemoryConfig the values to try, in place of the default grid.
        unknown: names for the anchor `unknown`.

    Raises:
        RemaskError: a layer outside the model, or values that a config refuses.
    """
    layers = range(num_layers) if layers is None else sorted(set(layers))
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise RemaskError(f"layer {outside[0]} is outside the model, which has layers 0..{num_layers - 1}")
    found = []
    for layer, name in itertools.product(layers, dict.fromkeys(presets)):
        axes = {axis: (values or {}).get(axis, default) for axis, default in AXES[name].items()}
        axes = {axis: tuple(dict.fromkeys(tried)) for axis, tried in axes.items() if tried}
        middle = {axis: tried[(len(tried) - 1) // 2] for axis, tried in axes.items()}
        for chosen in itertools.product(*axes.values()):
            changes = dict(zip(axes, chosen, strict=True))
            setting = Setting(name, layer, changes, changes == middle)
            if changes.get("anchor") == "unknown":
                setting = replace(setting, changes={**changes, "unknown": unknown})
            setting.config  # noqa: B018  # refuses what it cannot be
            found.append(setting)
    return found


# ------------------------------------------------------------------ splits
@dataclass(frozen=True)
class Split:
    """Facts by fold; retain rows that memories may read (`fit`) and those that are only scored (`validation`)."""

    folds: tuple[tuple[Fact, ...], ...]
    fit: tuple[Fact, ...]
    validation: tuple[Fact, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ids."""
        ids = lambda facts: [fact.id for fact in facts]  # noqa: E731
        return {"folds": [ids(fold) for fold in self.folds], "fit": ids(self.fit), "validation": ids(self.validation)}


def deal(facts: Sequence[Fact], parts: int, seed: int, purpose: str) -> list[list[Fact]]:
    """Whole groups in a random order, each to the part that has the fewest rows; a fact without a group is its own."""
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in sorted(facts, key=lambda fact: fact.id):
        groups.setdefault(("group", fact.group) if fact.group else ("fact", fact.id), []).append(fact)
    names = sorted(groups)
    dealt: list[list[Fact]] = [[] for _ in range(min(parts, len(names)))]
    for i in numpy_generator(seed, "tune", purpose).permutation(len(names)):
        min(dealt, key=len).extend(groups[names[i]])
    return [sorted(part, key=lambda fact: fact.id) for part in dealt]


def split(facts: Sequence[Fact], retain: Sequence[Fact], folds: int = 2, seed: int = 0) -> Split:
    """Deal facts and retain rows.

    Raises:
        RemaskError: a fact that is also retained, or fewer than two groups of retain rows.
    """
    told, ids = {(fact.prompt, fact.answer) for fact in facts}, {fact.id for fact in facts}
    for fact in retain:
        if fact.id in ids or (fact.prompt, fact.answer) in told:
            raise RemaskError(f"fact {fact.id!r} is among the facts and among the retain rows; drop it from one of the files")
    kept = deal(retain, 2, seed, "retain")
    if len(kept) < 2:
        raise RemaskError(
            "the retain rows are one group, so none would be left to validate on; give rows of at least two people or authors"
        )
    return Split(tuple(map(tuple, deal(facts, folds, seed, "facts"))), tuple(kept[0]), tuple(kept[1]))


# ------------------------------------------------------------------ measuring
class Resumed(MaskedDiffusionLM):
    """A model seen from the output of one block: blocks up to it run once for each batch, and edits there act on the copy kept.

    Exact, because those blocks do not depend on an edit at their output. `elbo`, `calibrate` and edits take it as a model.
    """

    def __init__(self, lm: MaskedDiffusionLM, layer: int, model: str) -> None:
        rest = (lm.counters, lm.clock, list(lm.attached), lm.source, lm.fp32_rope)
        super().__init__(lm.model, lm.tokenizer, lm.spec, lm.name, *rest)
        self.layer, self._model = layer, model
        self._door = nn.Identity()  # what edits at the site hook, instead of a block that does not run
        self._kept: dict[tuple[torch.Size, bytes], Tensor] = {}

    def site_module(self, site: Site) -> nn.Module:
        """The module whose output is the site."""
        return self._door if site == Site(self.layer) else super().site_module(site)

    def fingerprint(self) -> str:
        """Of the model, computed once."""
        return self._model

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Position-aligned logits, as `MaskedDiffusionLM.logits`."""
        key = (ids.shape, ids.cpu().numpy().tobytes())
        if key not in self._kept:
            self._kept[key] = self.run_to(self.layer, ids, attention_mask)
        return self.run_from(self.layer, self._door(self._kept[key]), attention_mask, positions)


def logprobs(lm: MaskedDiffusionLM, rows: Sequence[Encoded]) -> np.ndarray:
    """Log-probability of every row on the tuning bank, nats, [rows]."""
    return np.array([score.logprob for score in elbo(lm, rows, BANK)])


def closed(after: np.ndarray, level: np.ndarray, before: np.ndarray) -> float:
    """Mean share of the facts' own gaps that is closed, each between 0 and 1; facts without a gap do not count."""
    known = before > level
    return float(np.clip((before - after)[known] / (before - level)[known], 0, 1).mean())


class Bench:
    """One model and one split; measures (setting, fold) pairs. States and captures of one layer are kept at a time."""

    def __init__(self, lm: MaskedDiffusionLM, parts: Split, reference: MaskedDiffusionLM | None, level: Level) -> None:
        self.lm, self.parts, self.reference, self.level = lm, parts, reference, level
        self.model, self.other = lm.fingerprint(), None if reference is None else reference.fingerprint()
        self.validation = [lm.encode(fact) for fact in parts.validation]
        self._levels: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._here: Resumed | None = None
        self._captured: dict[tuple[int, MemoryConfig], EditMemory] = {}

    @cached_property
    def kept_before(self) -> np.ndarray:
        """Log-probabilities of the validation rows on the unedited model, nats, [rows]."""
        return logprobs(self.lm, self.validation)

    def at(self, layer: int) -> Resumed:
        """The model from `layer` on; what was kept of another layer is dropped."""
        if self._here is None or self._here.layer != layer:
            self._captured.clear()
            self._here = Resumed(self.lm, layer, self.model)
        return self._here

    def level_of(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """What the facts of a fold are to reach and where they are on the unedited model, nats, [facts] each.

        Raises:
            NothingToForgetError: they are already at or below the level.
        """
        if fold not in self._levels:
            facts = self.parts.folds[fold]
            before = logprobs(self.lm, [self.lm.encode(fact) for fact in facts])
            level = target_levels(self.lm, facts, self.reference, self.level, BANK)
            if before.mean() <= level.mean():
                raise NothingToForgetError(
                    f"nothing to forget: the facts of fold {fold + 1} ({facts[0].id!r} ...) are at {before.mean():.2f} nats "
                    f"a row, already at or below the level {level.mean():.2f}; choose facts that the model knows, or another "
                    "level"
                )
            self._levels[fold] = level, before
        return self._levels[fold]

    def edit(self, setting: Setting, fold: int) -> EditMemory | SteeringVector:
        """The edit of a fold's facts; captured once for all settings that only solve or read the captures differently."""
        self.at(setting.layer)
        config = setting.config
        read = fold, replace(config, ridge=1.0, q=1.0, beta=1.0, balance=0.0, mu=float(config.mu > 0))
        if read not in self._captured:
            retain = self.parts.fit if config.needs_retain else ()
            site = Site(setting.layer)
            self._captured[read] = EditMemory.build(self.lm, self.parts.folds[fold], site, retain=retain, config=config)
        m = self._captured[read]
        memory = m if m.config == config else replace(m, config=config)
        return mean_delta(memory) if setting.preset == CONTROL else memory

    def measure(self, setting: Setting, fold: int) -> dict[str, Any]:
        """Calibrate on the fold's facts; then what is forgotten and what it costs, at every strength of the ladder.

        Returns:
            level, before: log-probability of the facts, nats a row; alpha: calibrated, None where no strength reaches the level
            (the ladder is then around the strength that the memory is built with) or it cannot be solved (no points then), with
            the reason in `note`; points: factor, alpha, forget (nats a row), retain_change with its paired standard error.

        Raises:
            NothingToForgetError: the model is already at or below the level.
        """
        here, level, before = self.at(setting.layer), *(float(part.mean()) for part in self.level_of(fold))
        rows = [self.lm.encode(fact) for fact in self.parts.folds[fold]]
        found: dict[str, Any] = {"alpha": None, "note": "", "level": level, "before": before, "points": []}
        try:
            edit = self.edit(setting, fold)
        except RemaskError as error:
            return found | {"note": str(error)}
        try:
            edit = calibrate(here, edit, rows, level, BANK)
            found["alpha"] = edit.alpha
        except RemaskError as error:
            found["note"] = str(error)
        return found | {"points": [self._point(edit, fold, rows, factor) for factor in LADDER]}

    def _point(self, edit: EditMemory | SteeringVector, fold: int, rows: Sequence[Encoded], factor: float) -> dict[str, Any]:
        here = self.at(edit.site.layer)
        with edit.with_alpha(edit.alpha * factor).attached(here):
            forget = logprobs(here, rows)
            kept = logprobs(here, self.validation) - self.kept_before
        stderr = float(kept.std(ddof=1) / math.sqrt(len(kept))) if len(kept) > 1 else None
        point = {"factor": factor, "alpha": edit.alpha * factor, "forget": float(forget.mean())}
        point["closed"] = closed(forget, *self.level_of(fold))
        return point | {"retain_change": float(kept.mean()), "retain_stderr": stderr}

    def name(self, setting: Setting, fold: int) -> str:
        """File of a (setting, fold): a digest of everything that its numbers depend on."""
        lm, parts = self.lm, self.parts
        weights = (self.model, lm.spec, lm.embedding.weight.dtype, self.other, self.level)
        site = "mean-delta" if setting.preset == CONTROL else "memory", setting.layer, setting.config
        return f"{digest(*weights, *site, parts.folds[fold], parts.fit, parts.validation, BANK, LADDER)}.json"
