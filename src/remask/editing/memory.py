"""The edit memory: forgetting or rewriting facts at inference time on a frozen model, in closed form.

    h <- h + alpha * S_q(A h) D        at the site, all positions, every denoising step

S_q keeps the ceil(q N) largest coefficients of each token. Presets: `paper` is the literal reading of TimeROME-DLM's equations
6-12 (one subject key a fact, refusal target, absolute ridge); `default` reads keys where predictions are made, moves them to
what the model itself says when it cannot see who is asked about, and solves with the retain set in the system, for a smooth
function of the residual (kernel.py); `ridge` solves for a linear one; `softmax` retrieves among forget and retain keys instead;
`gated` is equation 10; `rewrite` retrieves what makes the model say a new object (objects.py).

A memory is a value. Its rows are kept in the order of fact ids, so it does not depend on the order in which facts came, and one
from which facts were removed is the one that never held them, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones.model import MaskedDiffusionLM, Site
from ..editfile import read_edit, write_edit
from ..errors import RemaskError
from ..facts import Fact
from .build import capture_facts, capture_retain, fact_hash, in_order, shortened
from .calibrate import calibrate
from .capture import Captured
from .compress import lost_share
from .config import PRESETS, MemoryConfig
from .kernel import KernelSolution, solve_kernel
from .retained import Retained, pooled
from .shift import GatedShift, KernelShift, LinearShift, Shift, SoftmaxShift, TopShift, WhitenedShift
from .site import SiteEdit
from .solve import Solution, solve_readout, whitening


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
        counts, lost: of compressed keys, as in `Captured`; [n] and [n, 2].
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
    counts: Tensor = field(default_factory=lambda: torch.empty(0))
    lost: Tensor = field(default_factory=lambda: torch.empty(0))
    solution: Solution | KernelSolution | None = field(init=False)
    kind = "edit memory"

    def __post_init__(self) -> None:
        self.hashes = self.hashes or ("",) * len(self.fact_ids)
        whole = Captured(self.keys, self.deltas, self.owner, self.counts, self.lost)
        self.counts, self.lost = whole.counts, whole.lost
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
        tensors |= {"counts": (self.counts, (n,)), "losses": (self.lost, (n, 2))}
        looked_up = self.config.keeps_keys
        if self.retained is not None:
            kept, m = self.retained, len(self.retained.keys)
            least = min(kept.count, self.config.retain_keys) if looked_up else 0
            if not least <= m <= (kept.count if looked_up else 0):
                raise RemaskError(f"the readout {self.config.readout!r} does not fit the {m} retain keys of the memory")
            tensors |= {
                "retain mean": (kept.mean, (d,)),
                "retain moment": (kept.moment, (d, d)),
                "retain keys": (kept.keys, (m, d)),
            }
        elif looked_up or self.config.whiten:
            what = "whitening" if self.config.whiten else f"the readout {self.config.readout!r}"
            raise RemaskError(f"{what} needs retain keys; build the memory with retain facts")
        for name, (tensor, shape) in tensors.items():
            if tensor.shape != shape:
                raise RemaskError(f"{name}: shape {list(tensor.shape)} where {list(shape)} is needed")
            if not tensor.isfinite().all():
                raise RemaskError(f"{name}: not every number is finite; choose a site where the model's residuals are")
        if (self.counts < 1).any() or (self.lost < 0).any():
            raise RemaskError("a row stands for at least one key and hides no less than nothing of it")
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
        self.counts, self.lost = self.counts[rows], self.lost[rows]

    @property
    def weights(self) -> Tensor:
        """How much each row counts in the solve, [n]: the keys that it stands for, balanced over facts; of mean 1 a key."""
        held = torch.zeros(len(self.fact_ids)).index_add_(0, self.owner, self.counts)
        return self.counts * (held.mean() / held)[self.owner] ** self.config.balance

    @cached_property
    def centre(self) -> Tensor:
        """What is subtracted from keys and residuals, [d]."""
        if not self.config.centre:
            return torch.zeros(self.keys.shape[1])
        return self.keys.mean(0) if self.retained is None else self.retained.mean

    @cached_property
    def _whitening(self) -> Tensor | None:
        """What keys and residuals are multiplied by, [d, d] fp64; None where they stay as they are."""
        if not self.config.whiten or self.retained is None:
            return None
        return whitening(self.retained.mean, self.retained.moment)

    def _framed(self, centre: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Centre and rows as the readout sees them: as they are or, whitened, from the centre as origin."""
        if self._whitening is None:
            return centre, *rows
        return torch.zeros_like(centre), *((part.double() - centre.double()) @ self._whitening for part in rows)

    def _reading(self, inner: Shift, centre: Tensor) -> Shift:
        """The shift for residuals of the model, from one for residuals as the readout sees them."""
        return inner if self._whitening is None else WhitenedShift(inner, self._whitening, centre)

    def _solve(self) -> Solution | KernelSolution | None:
        """The system's solution; None where nothing is solved: retrieval and the single gate."""
        config, kept = self.config, self.retained
        if config.readout == "kernel":
            assert kept is not None
            centre, keys, quiet = self._framed(kept.mean, self.keys, kept.keys)
            return solve_kernel(
                keys,
                self.deltas,
                self.weights,
                quiet,
                centre,
                beta=config.beta,
                mu=config.mu,
                ridge=config.ridge,
                landmarks=config.landmarks,
            )
        return self._solve_ridge() if config.readout == "ridge" else None

    def _solve_ridge(self) -> Solution:
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
        white = self._whitening
        if white is not None:
            keys, moment = keys.double() @ white, None if moment is None else white @ moment.double() @ white
        solution = solve_readout(
            keys,
            self.config.ridge,
            relative=self.config.relative,
            retain_moment=moment,
            mu=self.config.mu,
            weights=self.weights,
        )
        return solution if white is None else replace(solution, readout=(solution.readout.double() @ white).float())

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
        """Capture and solve a memory of `facts` at `site`; only the blocks up to the site run, and all of them for a rewrite.

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
        if config.mu > 0 or config.keeps_keys or config.whiten:
            retained = Retained.of(capture_retain(lm, retain, site, config), config)
        ids, hashes = tuple(fact.id for fact in facts), tuple(fact_hash(fact) for fact in facts)
        strength = 1.0 if alpha == "calibrated" else alpha
        parts = (captured.keys, captured.deltas, captured.owner)
        rows = captured.counts, captured.lost
        memory = cls(config, site, ids, *parts, lm.fingerprint(), strength, retained, hashes, *rows)
        if alpha != "calibrated":
            return memory
        return calibrate(lm, memory, [lm.encode(fact) for fact in facts], level)

    # ---------------------------------------------------------------- acting
    def shift(self) -> Shift:
        """What the memory adds to a residual, strength included."""
        if isinstance(self.solution, KernelSolution):
            assert self.retained is not None
            solved, mean = self.solution, self.retained.mean
            (centre,) = self._framed(mean)
            return self._reading(KernelShift(solved.landmarks, solved.values * self.alpha, self.config.beta, centre), mean)
        if isinstance(self.solution, Solution):
            return self._ridge_shift(self.solution.readout)
        return self._softmax_shift() if self.config.readout == "softmax" else self._gated_shift()

    def _ridge_shift(self, readout: Tensor) -> Shift:
        if self.config.q == 1:
            return LinearShift(readout.double().T @ self.deltas.double() * self.alpha, self.centre)
        count = -(-int(self.config.q * len(readout) * 1_000_000) // 1_000_000)  # ceil without float dust
        return TopShift(readout, self.deltas * self.alpha, max(1, count), self.centre)

    def _softmax_shift(self) -> Shift:
        assert self.retained is not None
        kept = self.retained.keys
        keys = torch.cat([self.keys, kept])
        values = torch.cat([self.deltas * self.alpha, torch.zeros_like(kept)])
        weights = torch.cat([self.weights, torch.full((len(kept),), self.retained.count / len(kept))])
        origin = self.centre if self.config.centre else keys.mean(0)
        centre, keys = self._framed(origin, keys)
        return self._reading(SoftmaxShift(keys, values, weights, self.config.beta, centre), origin)

    def _gated_shift(self) -> Shift:
        key = self.keys[0]
        eps = self.config.ridge * (float(key.square().sum()) if self.config.relative else 1.0)
        return GatedShift(key, self.deltas[0] * self.alpha, eps, self.config.cap)

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
            retain: only for targets that read the retain facts (`mean`, `other`, and `object` with value `donor`).

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
        hashes = tuple(fact_hash(fact) for fact in facts)
        for fact, known in zip(facts, hashes, strict=True):
            if known in self.hashes:
                twin = self.fact_ids[self.hashes.index(known)]
                raise RemaskError(f"the memory holds fact {fact.id!r} already, as {twin!r}; leave it out")
        captured = capture_facts(lm, facts, self.site, self.config, retain)
        return self._with(captured, tuple(fact.id for fact in facts), hashes)

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
        captured = Captured(other.keys, other.deltas, other.owner, other.counts, other.lost)
        return self._with(captured, other.fact_ids, other.hashes, pooled(self.retained, other.retained))

    def __add__(self, other: EditMemory) -> EditMemory:
        return self.merge(other)

    def _with(
        self, more: Captured, ids: tuple[str, ...], hashes: tuple[str, ...], retained: Retained | None = None
    ) -> EditMemory:
        keys, deltas = torch.cat([self.keys, more.keys]), torch.cat([self.deltas, more.deltas])
        owner = torch.cat([self.owner, more.owner + len(self.fact_ids)])
        names, marks = self.fact_ids + ids, self.hashes + hashes
        kept, rows = retained or self.retained, (torch.cat([self.counts, more.counts]), torch.cat([self.lost, more.lost]))
        return EditMemory(self.config, self.site, names, keys, deltas, owner, self.model, self.alpha, kept, marks, *rows)

    def remove(self, *fact_ids: str) -> EditMemory:
        """A memory without these facts: equal to one that never held them; nothing of theirs is kept.

        Raises:
            RemaskError: unknown id, or nothing would be left.
        """
        unknown = sorted(set(fact_ids) - set(self.fact_ids))
        if unknown:
            raise RemaskError(f"the memory holds no fact {unknown[0]!r}; it holds {shortened(self.fact_ids)}")
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
            self.counts[keep],
            self.lost[keep],
        )

    def describe(self) -> dict[str, Any]:
        """Preset, site, strength, size, conditioning, and what compression has lost of keys and deltas (shares)."""
        return {
            "preset": self.config.preset,
            "alpha": self.alpha,
            "site": self.site.to_dict(),
            "facts": len(self.fact_ids),
            "keys": len(self.keys),
            "condition": None if self.solution is None else self.solution.condition,
            "lost": list(lost_share(self.keys, self.deltas, self.counts, self.lost)),
            "model": self.model,
            "config": asdict(self.config),
        }

    # ---------------------------------------------------------------- file form
    def save(self, path: str | Path) -> None:
        """Write an edit file, atomically."""
        tensors = {name: getattr(self, name) for name in ("keys", "deltas", "owner", "counts", "lost")}
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
                tensors["counts"],
                tensors["lost"],
            )
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, RemaskError) as error:
            raise RemaskError(f"{path}: damaged edit file ({error}); build it again") from None
