"""The edit memory: forgetting or rewriting facts at inference time on a frozen model, in closed form.

    h <- h + alpha * S_q(A h) D        at the site, all positions, every denoising step

S_q keeps the ceil(q N) largest coefficients of each token. Presets: `paper` is the literal reading of TimeROME-DLM's equations
6-12 (one subject key a fact, refusal target, absolute ridge); `default` reads keys where predictions are made, moves them to
what the model itself says when it cannot see who is asked about, and solves with the retain set in the system; `softmax`
retrieves among forget and retain keys instead; `gated` is equation 10.

A memory is a value. Its rows are kept in the order of fact ids, so it does not depend on the order in which facts came, and one
from which facts were removed is the one that never held them, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones.model import MaskedDiffusionLM, Site
from ..errors import RemaskError
from ..facts import Fact
from .build import capture_facts, fact_hash, in_order
from .calibrate import calibrate
from .capture import Captured, capture_keys
from .config import PRESETS, MemoryConfig
from .files import read_edit, write_edit
from .shift import GatedShift, LinearShift, Shift, SoftmaxShift, TopShift
from .site import SiteEdit
from .solve import Solution, second_moment, solve_readout


@dataclass(frozen=True)
class Retained:
    """What a memory keeps of the retain set: how many keys it had, their mean [d] and second moment [d, d], fp32.

    `keys` [m, d] are kept only where the readout looks them up (softmax); [0, d] otherwise.
    """

    count: int
    mean: Tensor
    moment: Tensor
    keys: Tensor

    @classmethod
    def of(cls, keys: Tensor, *, keep: bool) -> Retained:
        """From retain keys [m, d]."""
        return cls(len(keys), keys.mean(0), second_moment(keys).float(), keys if keep else keys[:0])

    def equals(self, other: Retained) -> bool:
        """Whether both came from the same keys."""
        return self.count == other.count and torch.equal(self.moment, other.moment) and torch.equal(self.keys, other.keys)


@dataclass
class EditMemory(SiteEdit):
    """A solved collection of edits at one site; a value that can be attached, saved, and have facts added and removed.

    Attributes:
        config: how it was captured and solved; site: where.
        fact_ids: sorted; hashes: of each fact's texts, "" where unknown.
        keys, deltas: [n, d] fp32; owner: index into `fact_ids` of each row, [n].
        model: fingerprint of the model that it was captured on.
        alpha: strength.
        retained: of the retain set; None without one.
    """

    config: MemoryConfig
    site: Site
    fact_ids: tuple[str, ...]
    keys: Tensor
    deltas: Tensor
    owner: Tensor
    model: str
    alpha: float = 1.0
    retained: Retained | None = None
    hashes: tuple[str, ...] = ()
    solution: Solution = field(init=False)
    kind = "edit memory"

    def __post_init__(self) -> None:
        self.hashes = self.hashes or ("",) * len(self.fact_ids)
        self._check()
        self._sort()
        if not self.deltas.any():
            raise RemaskError("every delta is zero: the target equals what the model does anyway, so there is nothing to write")
        if self.config.readout == "gated" and len(self.keys) != 1:
            raise RemaskError(f"the gated edit holds one key, not {len(self.keys)}; use preset 'paper' for several facts")
        self.solution = self._solve()

    def _check(self) -> None:
        """Refuse parts that do not fit together, and numbers that are not finite."""
        n, d = self.keys.shape
        tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {"keys": (self.keys, (n, d)), "deltas": (self.deltas, (n, d))}
        looked_up = self.config.readout == "softmax"
        if self.retained is not None:
            kept, m = self.retained, self.retained.count if looked_up else 0
            tensors |= {
                "retain mean": (kept.mean, (d,)),
                "retain moment": (kept.moment, (d, d)),
                "retain keys": (kept.keys, (m, d)),
            }
        elif looked_up:
            raise RemaskError("the readout 'softmax' needs retain keys; build the memory with retain facts")
        for name, (tensor, shape) in tensors.items():
            if tensor.shape != shape:
                raise RemaskError(f"{name}: shape {list(tensor.shape)} where {list(shape)} is needed")
            if not tensor.isfinite().all():
                raise RemaskError(f"{name}: not every number is finite; choose a site where the model's residuals are")
        count, owners = len(self.fact_ids), self.owner.tolist()
        if len(owners) != n or set(owners) != set(range(count)) or not count == len(set(self.fact_ids)) == len(self.hashes):
            raise RemaskError("every row must belong to a fact, and every fact needs a row, a hash and an id of its own")
        if not math.isfinite(self.alpha):
            raise RemaskError(f"alpha must be a finite number, not {self.alpha}")

    def _sort(self) -> None:
        """Rows and facts in the order of fact ids; the rows of a fact keep their order."""
        order = sorted(range(len(self.fact_ids)), key=self.fact_ids.__getitem__)
        place = torch.empty(len(order), dtype=torch.long)
        place[order] = torch.arange(len(order))
        rows = place[self.owner].argsort(stable=True)
        self.fact_ids = tuple(self.fact_ids[i] for i in order)
        self.hashes = tuple(self.hashes[i] for i in order)
        self.keys, self.deltas, self.owner = self.keys[rows], self.deltas[rows], place[self.owner][rows]

    @cached_property
    def centre(self) -> Tensor:
        """What is subtracted from keys and residuals, [d]."""
        if not self.config.centre:
            return torch.zeros(self.keys.shape[1])
        return self.keys.mean(0) if self.retained is None else self.retained.mean

    def _solve(self) -> Solution:
        moment = None
        if self.config.mu > 0 and self.retained is not None:
            moment = self.retained.moment
            if self.config.centre:  # E[(r - c)(r - c)^T] with c the mean of r
                moment = moment.double() - torch.outer(self.centre.double(), self.centre.double())
        keys = self.keys - self.centre
        if not keys.any():
            raise RemaskError(
                "centring leaves nothing of the keys: all are equal; set centre=False, or mu > 0 with retain facts"
            )
        return solve_readout(keys, self.config.ridge, relative=self.config.relative, retain_moment=moment, mu=self.config.mu)

    @classmethod
    def build(
        cls,
        lm: MaskedDiffusionLM,
        facts: Sequence[Fact],
        site: Site,
        *,
        retain: Sequence[Fact] = (),
        config: MemoryConfig = PRESETS["default"],
        alpha: float | Literal["calibrated"] = 1.0,
        level: float | None = None,
    ) -> EditMemory:
        """Capture and solve a memory of `facts` at `site`; only the blocks up to the site run.

        Args:
            retain: facts to leave alone; needed where `config.needs_retain`.
            alpha: strength, or "calibrated": the one that brings the facts to `level`.
            level: mean log-probability of the facts, nats a row; None = the model's own with the prompt masked.

        Raises:
            RemaskError: no facts, duplicate ids, one question with two targets, a fact that is also retained, site outside the
                model, an intervention attached, singular Gram matrix, nothing to write.
        """
        facts = in_order(facts, retain)
        lm.site_module(site)
        if config.needs_retain and not retain:
            raise RemaskError(
                f"this memory (preset {config.preset!r}) needs retain facts; pass --retain, or choose preset 'paper'"
            )
        captured = capture_facts(lm, facts, site, config, retain)
        retained = None
        if config.mu > 0 or config.readout == "softmax":
            keys = capture_keys(lm, site, [lm.encode(fact) for fact in retain], config.bank)
            retained = Retained.of(keys, keep=config.readout == "softmax")
        ids, hashes = tuple(fact.id for fact in facts), tuple(fact_hash(fact) for fact in facts)
        strength = 1.0 if alpha == "calibrated" else alpha
        parts = (captured.keys, captured.deltas, captured.owner)
        memory = cls(config, site, ids, *parts, lm.fingerprint(), strength, retained, hashes)
        if alpha != "calibrated":
            return memory
        return calibrate(lm, memory, [lm.encode(fact) for fact in facts], level)

    # ---------------------------------------------------------------- acting
    def shift(self) -> Shift:
        """What the memory adds to a residual, strength included."""
        config, n = self.config, len(self.keys)
        values = self.deltas * self.alpha
        if config.readout == "softmax":
            assert self.retained is not None
            keys = torch.cat([self.keys, self.retained.keys])
            values = torch.cat([values, torch.zeros_like(self.retained.keys)])
            centre = self.centre if config.centre else keys.mean(0)
            return SoftmaxShift(keys, values, torch.ones(len(keys)), config.beta, centre)
        if config.readout == "gated":
            key = self.keys[0] - self.centre
            return GatedShift(
                key, values[0], config.ridge * (float(key.square().sum()) if config.relative else 1.0), config.cap
            )
        if config.q == 1:
            return LinearShift(self.solution.readout.double().T @ self.deltas.double() * self.alpha, self.centre)
        count = -(-int(config.q * n * 1_000_000) // 1_000_000)  # ceil without float dust
        return TopShift(self.solution.readout, values, max(1, count), self.centre)

    def _tensors(self) -> list[Tensor]:
        return list(self.shift().buffers())

    def with_alpha(self, alpha: float) -> EditMemory:
        """The same memory at another strength; nothing is solved again."""
        other = object.__new__(EditMemory)
        other.__dict__.update(self.__dict__ | {"alpha": alpha})
        return other

    def __mul__(self, factor: float) -> EditMemory:
        """`0.5 * memory`: the same memory at half its strength."""
        return self.with_alpha(self.alpha * factor)

    __rmul__ = __mul__

    # ---------------------------------------------------------------- facts come and go
    def add(self, lm: MaskedDiffusionLM, facts: Sequence[Fact], *, retain: Sequence[Fact] = ()) -> EditMemory:
        """A memory that holds these facts too, captured and solved as the others were.

        Args:
            retain: only for targets that read the retain facts (`mean`, `other`).

        Raises:
            RemaskError: another model, an id that the memory holds already, or whatever `build` refuses.
        """
        if self.model != lm.fingerprint():
            raise RemaskError(
                f"this memory is of model {self.model}, {lm.name} is {lm.fingerprint()}; add facts on its own model"
            )
        facts = in_order(facts, retain)
        held = [fact.id for fact in facts if fact.id in self.fact_ids]
        if held:
            raise RemaskError(f"the memory holds fact {held[0]!r} already; remove it first, or give the new one another id")
        captured = capture_facts(lm, facts, self.site, self.config, retain)
        return self._with(captured, tuple(fact.id for fact in facts), tuple(fact_hash(fact) for fact in facts))

    def merge(self, other: EditMemory) -> EditMemory:
        """Both memories' facts in one, solved together; `a + b` is the same. Retain sets are pooled by their sizes.

        Raises:
            RemaskError: other model, site or settings, or a fact that both hold; names what differs.
        """
        for what, mine, theirs in (
            ("models", self.model, other.model),
            ("sites", self.site, other.site),
            ("settings", self.config, other.config),
            ("strengths", self.alpha, other.alpha),
        ):
            if mine != theirs:
                remedy = "; give both one (--alpha)" if what == "strengths" else ""
                raise RemaskError(f"memories of different {what} cannot be merged: {mine} against {theirs}{remedy}")
        both = sorted(set(self.fact_ids) & set(other.fact_ids))
        if both:
            raise RemaskError(f"both memories hold fact {both[0]!r}; remove it from one of them first")
        captured = Captured(other.keys, other.deltas, other.owner)
        return self._with(captured, other.fact_ids, other.hashes, _pooled(self.retained, other.retained))

    def __add__(self, other: EditMemory) -> EditMemory:
        return self.merge(other)

    def _with(
        self, more: Captured, ids: tuple[str, ...], hashes: tuple[str, ...], retained: Retained | None = None
    ) -> EditMemory:
        keys, deltas = torch.cat([self.keys, more.keys]), torch.cat([self.deltas, more.deltas])
        owner = torch.cat([self.owner, more.owner + len(self.fact_ids)])
        names, marks = self.fact_ids + ids, self.hashes + hashes
        kept = retained or self.retained
        return EditMemory(self.config, self.site, names, keys, deltas, owner, self.model, self.alpha, kept, marks)

    def remove(self, *fact_ids: str) -> EditMemory:
        """A memory without these facts: equal to one that never held them; nothing of theirs is kept.

        Raises:
            RemaskError: unknown id, or nothing would be left.
        """
        unknown = sorted(set(fact_ids) - set(self.fact_ids))
        if unknown:
            raise RemaskError(f"the memory holds no fact {unknown[0]!r}")
        left = [i for i, name in enumerate(self.fact_ids) if name not in fact_ids]
        if not left:
            raise RemaskError("removing every fact leaves no memory; detach it or delete its file instead")
        keep = torch.isin(self.owner, torch.tensor(left))
        renumber = torch.full((len(self.fact_ids),), -1)
        renumber[left] = torch.arange(len(left))
        return EditMemory(
            self.config,
            self.site,
            tuple(self.fact_ids[i] for i in left),
            self.keys[keep],
            self.deltas[keep],
            renumber[self.owner[keep]],
            self.model,
            self.alpha,
            self.retained,
            tuple(self.hashes[i] for i in left),
        )

    def describe(self) -> dict[str, Any]:
        """Preset, site, strength, size, conditioning."""
        return {
            "preset": self.config.preset,
            "alpha": self.alpha,
            "site": self.site.to_dict(),
            "facts": len(self.fact_ids),
            "keys": len(self.keys),
            "condition": self.solution.condition,
            "model": self.model,
            "config": asdict(self.config),
        }

    # ---------------------------------------------------------------- file form
    def save(self, path: str | Path) -> None:
        """Write an edit file, atomically."""
        tensors = {"keys": self.keys, "deltas": self.deltas, "owner": self.owner}
        if self.retained is not None:
            tensors |= {f"retain_{name}": getattr(self.retained, name) for name in ("mean", "moment", "keys")}
        header = {
            "model": self.model,
            "site": self.site.to_dict(),
            "config": asdict(self.config),
            "alpha": self.alpha,
            "fact_ids": list(self.fact_ids),
            "hashes": list(self.hashes),
            "retain_count": 0 if self.retained is None else self.retained.count,
        }
        write_edit(path, self.kind, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> EditMemory:
        """Read a memory file.

        Raises:
            RemaskError: missing, unreadable or damaged file, other format version, another kind of edit.
        """
        header, tensors = read_edit(path, cls.kind)
        try:
            retained = None
            if header["retain_count"]:
                mean, moment, keys = (tensors[f"retain_{name}"] for name in ("mean", "moment", "keys"))
                retained = Retained(int(header["retain_count"]), mean, moment, keys)
            return cls(
                MemoryConfig(**header["config"]),
                Site.from_dict(header["site"]),
                tuple(header["fact_ids"]),
                tensors["keys"],
                tensors["deltas"],
                tensors["owner"],
                header["model"],
                header["alpha"],
                retained,
                tuple(header["hashes"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, RemaskError) as error:
            raise RemaskError(f"{path}: damaged edit file ({error}); build it again") from None


def _pooled(one: Retained | None, other: Retained | None) -> Retained | None:
    """The retain sets of two memories together; one that both share counts once."""
    if one is None or other is None or one.equals(other):
        return one or other
    one, other = sorted((one, other), key=lambda kept: kept.keys.numpy().tobytes())  # a + b is b + a
    total = one.count + other.count
    mean = (one.count * one.mean + other.count * other.mean) / total
    moment = (one.count * one.moment + other.count * other.moment) / total
    return Retained(total, mean, moment, torch.cat([one.keys, other.keys]))
