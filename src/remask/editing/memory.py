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

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones.intervention import require_finite
from ..backbones.model import MaskedDiffusionLM, Site
from ..errors import RemaskError
from ..facts import Fact
from .build import capture_facts, capture_retain, fact_hash, in_order, shortened
from .calibrate import calibrate
from .capture import Captured
from .compress import lost_share
from .config import PRESETS, MemoryConfig
from .kernel import KernelSolution
from .readout import READOUTS, Readout, require_retained
from .retained import Retained, pooled
from .shift import Shift
from .site import KeyedEdit
from .solve import Solution

_RETAINED = ("mean", "moment", "keys")  # of the retain set, in a file


@dataclass
class EditMemory(KeyedEdit):
    """A solved collection of edits at one site; a value that can be attached, saved, and have facts added and removed.

    It has the fields of `KeyedEdit`, with rows and hashes in the order of `fact_ids`, and these.

    Attributes:
        config: how it was captured and solved.
        model: fingerprint of the model that it was captured on.
        alpha: strength.
        retained: of the retain set; None without one.
        hashes: of each fact's texts, "" where unknown.
        counts, lost: of compressed keys, as in `Captured`; [n] and [n, 2].
    """

    model: str
    alpha: float = 1.0
    retained: Retained | None = None
    hashes: tuple[str, ...] = ()
    counts: Tensor = field(default_factory=lambda: torch.empty(0))
    lost: Tensor = field(default_factory=lambda: torch.empty(0))
    _readout: Readout = field(init=False, repr=False)
    kind = "edit memory"

    def __post_init__(self) -> None:
        self.hashes = self.hashes or ("",) * len(self.fact_ids)
        require_retained(self.retained, self.config)
        self._check(self.captured)
        order = sorted(range(len(self.fact_ids)), key=self.fact_ids.__getitem__)
        self.fact_ids, self.hashes = _picked(self.fact_ids, order), _picked(self.hashes, order)
        vars(self).update(vars(self.captured.of_facts(order)))
        if not self.deltas.any():
            raise RemaskError("every delta is zero: the target equals what the model does anyway, so there is nothing to write")
        if self.config.readout == "gated" and len(self.keys) != 1:
            raise RemaskError(f"the gated edit holds one key, not {len(self.keys)}; use preset 'paper' for several facts")
        self._readout = READOUTS[self.config.readout](self.captured, self.retained, self.config)

    def _check(self, rows: Captured) -> None:
        """Refuse parts that do not fit together, and numbers that are not finite."""
        (n, d), kept = rows.keys.shape, self.retained
        tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {"keys": (rows.keys, (n, d)), "deltas": (rows.deltas, (n, d))}
        tensors |= {"counts": (rows.counts, (n,)), "losses": (rows.lost, (n, 2))}
        if kept is not None:
            tensors |= {"retain mean": (kept.mean, (d,)), "retain moment": (kept.moment, (d, d))}
            tensors |= {"retain keys": (kept.keys, (len(kept.keys), d))}
        for name, (tensor, shape) in tensors.items():
            if tensor.shape != shape:
                raise RemaskError(f"{name}: shape {list(tensor.shape)} where {list(shape)} is needed")
            if not tensor.isfinite().all():
                raise RemaskError(f"{name}: not every number is finite; choose a site where the model's residuals are")
        if (rows.counts < 1).any() or (rows.lost < 0).any():
            raise RemaskError("a row stands for at least one key and hides no less than nothing of it")
        count, owners = len(self.fact_ids), rows.owner.tolist()
        if len(owners) != n or set(owners) != set(range(count)) or not count == len(set(self.fact_ids)) == len(self.hashes):
            raise RemaskError("every row must belong to a fact, and every fact needs a row, a hash and an id of its own")
        require_finite(self.alpha)

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
            retain: facts to leave alone; needed where `config.needs_retain`, read where `config.reads_retain`.
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
        if retain and (config.mu > 0 or config.keeps_keys or config.whiten or config.centre):
            retained = Retained.of(capture_retain(lm, retain, site, config), config)
        ids, hashes = tuple(fact.id for fact in facts), tuple(fact_hash(fact) for fact in facts)
        strength = 1.0 if alpha == "calibrated" else alpha
        memory = cls(
            config=config,
            site=site,
            fact_ids=ids,
            model=lm.fingerprint(),
            alpha=strength,
            retained=retained,
            hashes=hashes,
            **vars(captured),
        )
        if alpha != "calibrated":
            return memory
        return calibrate(lm, memory, [lm.encode(fact) for fact in facts], level)

    # ---------------------------------------------------------------- acting
    @property
    def captured(self) -> Captured:
        """Its rows."""
        return Captured(self.keys, self.deltas, self.owner, self.counts, self.lost)

    @property
    def weights(self) -> Tensor:
        """How much each row counts in the solve, [n], as `Captured.weights`; of mean 1 a key."""
        return self._readout.weights

    @property
    def solution(self) -> Solution | KernelSolution | None:
        """Of the system; None where nothing is solved: retrieval and the single gate."""
        return self._readout.solution

    def shift(self) -> Shift:
        """What the memory adds to a residual, strength included."""
        return self._readout.shift(self.alpha)

    def _tensors(self) -> list[Tensor]:
        return list(self.shift().buffers())

    def with_alpha(self, alpha: float) -> EditMemory:
        """The same memory at another strength; nothing is solved again.

        Raises:
            RemaskError: a strength that is not finite.
        """
        require_finite(alpha)
        other = copy.copy(self)
        other.alpha = alpha
        vars(other).pop("_fingerprint", None)  # what is cached is of the old strength
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
        """Both memories' facts in one, solved together; `a + b` is the same, and `b + a` to the bit.

        Memories of one retain set keep it, and of several such memories the order does not matter. Different retain sets are
        pooled by their sizes (`pooled`): of three memories or more the order then shows in the last digits, and a set that
        two of them share counts once only where these two are merged first.

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
        return self._with(other.captured, other.fact_ids, other.hashes, pooled(self.retained, other.retained))

    def __add__(self, other: EditMemory) -> EditMemory:
        return self.merge(other)

    def _with(
        self, more: Captured, ids: tuple[str, ...], hashes: tuple[str, ...], retained: Retained | None = None
    ) -> EditMemory:
        """These facts too; their rows are numbered from 0."""
        rows = Captured.joined([self.captured, replace(more, owner=more.owner + len(self.fact_ids))])
        names, marks, kept = self.fact_ids + ids, self.hashes + hashes, retained or self.retained
        return replace(self, fact_ids=names, hashes=marks, retained=kept, **vars(rows))

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
        names, marks = _picked(self.fact_ids, left), _picked(self.hashes, left)
        return replace(self, fact_ids=names, hashes=marks, **vars(self.captured.of_facts(left)))

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
    def _own_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors, count = {"counts": self.counts, "lost": self.lost}, 0
        if self.retained is not None:
            count = self.retained.count
            tensors |= {f"retain_{name}": getattr(self.retained, name) for name in _RETAINED}
        return {"hashes": list(self.hashes), "retain_count": count}, tensors

    @classmethod
    def _own_fields(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        retained = None
        if header["retain_count"]:
            retained = Retained(int(header["retain_count"]), *(tensors[f"retain_{name}"] for name in _RETAINED))
        hashes = tuple(header["hashes"])
        return {"retained": retained, "hashes": hashes, "counts": tensors["counts"], "lost": tensors["lost"]}


def _picked(names: Sequence[str], order: Sequence[int]) -> tuple[str, ...]:
    return tuple(names[i] for i in order)
