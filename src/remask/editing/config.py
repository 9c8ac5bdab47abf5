"""How an edit memory is captured, solved and read, and the presets that name such choices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..diffusion.masks import MaskBank
from ..errors import RemaskError

Keys = Literal["subject-mean", "subject-last", "subject-all", "answer"]
Target = Literal["refusal", "object", "mask", "other", "mean", "anchor"]
Anchor = Literal["prompt", "subject", "unknown"]
Readout = Literal["kernel", "ridge", "softmax", "gated"]
TARGETS: dict[str, tuple[Target, ...]] = {
    "subject": ("refusal", "object", "mask", "other", "mean"),
    "answer": ("anchor", "mean"),
}


@dataclass(frozen=True)
class MemoryConfig:
    """How a memory is captured, solved and read.

    Attributes:
        preset: name recorded with every number.
        keys: residuals that say when to act: the subject's tokens in the revealed statement (their `mean`, the `last`, or `all`
            of them, each a key of its own), or every masked `answer` position of partial states, where predictions are made.
        target: what deltas move towards. With subject keys the object's mean residual: under the `refusal` text, under the
            fact's own new `object` (its target), with the object left as `mask`, under an `other` object (a retain fact's, or
            one of the fact's `perturbed`), or the `mean` one of the retain facts. With answer keys the residual of the same
            state in the `anchor`, or the retain facts' `mean`.
        anchor: what the anchor state hides: `prompt`, `subject`, or nothing but the subject's identity (`unknown`).
        unknown: for anchor `unknown`, names that the model was never taught, put in the subject's place.
        refusal: the refusal text.
        readout: `kernel` (ridge regression in the features exp(beta (cos - 1))), `ridge` (equation 12), `softmax` over forget
            and retain keys (value zero), or `gated` (equation 10, one key).
        ridge, relative: lambda, and whether it is in units of the mean squared key norm (which is 1 for `kernel`).
        mu: weight of the retain term per retain key, relative to a row of forget keys, compressed or not (readouts `kernel` and
            `ridge`).
        q: share of keys that may fire at a token; 1 = dense (readout `ridge`).
        centre: subtract the retain keys' mean (the forget keys' where there are none) from keys and residuals; cosines are
            always centred.
        beta: inverse temperature of the readouts `kernel` and `softmax`.
        landmarks: features of the readout `kernel`, half of them at forget keys and half at retain keys.
        cap: largest gate of the readout `gated`.
        balance: how far facts count alike: a key's weight is (mean keys a fact / keys of its fact) ** balance. With 0 every key
            counts alike, and an answer of thirty tokens outweighs thirty one-word answers.
        compress: keys that a fact keeps at most, as centres of k-means over its keys; 0 = all of them.
        retain_keys: retain keys that are kept at most, evenly spread, where the readout looks at them (`kernel`, `softmax`).
        states: partial states a fact; state_seed: their seed.
    """

    preset: str = "default"
    keys: Keys = "answer"
    target: Target = "anchor"
    anchor: Anchor = "subject"
    unknown: tuple[str, ...] = ()
    refusal: str = "I don't know."
    readout: Readout = "kernel"
    ridge: float = 1e-3
    relative: bool = True
    mu: float = 10.0
    q: float = 1.0
    centre: bool = False
    beta: float = 2.0
    landmarks: int = 384
    cap: float = 1.0
    balance: float = 1.0
    compress: int = 32
    retain_keys: int = 4096
    states: int = 4
    state_seed: int = 1_000_003

    def __post_init__(self) -> None:
        for field, known in (("keys", Keys), ("target", Target), ("anchor", Anchor), ("readout", Readout)):
            if getattr(self, field) not in get_args(known):
                raise RemaskError(f"{field} {getattr(self, field)!r} is unknown; choose one of {', '.join(get_args(known))}")
        if not 0 < self.q <= 1:
            raise RemaskError(f"q must be in (0, 1], not {self.q}")
        positive = all(0 < value < math.inf for value in (self.ridge, self.beta, self.cap))
        if not positive or not 0 <= self.mu < math.inf or not 0 <= self.balance <= 1 or self.states < 1:
            raise RemaskError("a memory needs finite ridge, beta and cap > 0, mu >= 0, balance in [0, 1] and states >= 1")
        if self.landmarks < 2 or self.retain_keys < 1 or self.compress < 0:
            raise RemaskError("a memory needs landmarks >= 2, retain_keys >= 1 and compress >= 0")
        kind = self.keys.split("-")[0]
        if self.target not in TARGETS[kind]:
            raise RemaskError(f"{kind} keys have the targets {', '.join(TARGETS[kind])}, not {self.target!r}")
        object.__setattr__(self, "unknown", tuple(self.unknown))
        if (self.anchor == "unknown") != bool(self.unknown):
            raise RemaskError("anchor 'unknown' needs names that the model was never taught, and only it takes them")
        if self.readout == "gated" and (self.keys not in ("subject-mean", "subject-last") or self.centre):
            raise RemaskError(
                "the gated edit has one key, as it is; use keys 'subject-mean' or 'subject-last', and centre=False"
            )
        if self.readout in ("softmax", "gated") and self.mu > 0:
            raise RemaskError(f"mu belongs to the readouts 'kernel' and 'ridge'; set mu=0 for {self.readout!r}")
        if self.readout != "ridge" and self.q < 1:
            raise RemaskError(f"q belongs to the readout 'ridge'; set q=1 for {self.readout!r}")

    @property
    def keeps_keys(self) -> bool:
        """Whether the readout looks at single retain keys, not only at their moments."""
        return self.readout in ("kernel", "softmax")

    @property
    def needs_retain(self) -> bool:
        """Whether a memory cannot be built without retain facts."""
        return self.mu > 0 or self.keeps_keys or self.target == "mean"

    @property
    def bank(self) -> MaskBank:
        """The partial states that captures read; their seed is never a scoring bank's."""
        return MaskBank(draws=self.states, replicates=1, seed=self.state_seed)


_PAPER = MemoryConfig(
    preset="paper", keys="subject-mean", target="refusal", readout="ridge", ridge=1.0, relative=False, mu=0.0, balance=0.0
)
PRESETS: dict[str, MemoryConfig] = {
    "default": MemoryConfig(),
    "ridge": MemoryConfig(preset="ridge", readout="ridge", mu=10.0),
    "paper": _PAPER,
    "softmax": MemoryConfig(preset="softmax", readout="softmax", mu=0.0, beta=20.0),
    "gated": replace(_PAPER, preset="gated", readout="gated", ridge=1e-6),
}


def preset(name: str, **changes: Any) -> MemoryConfig:
    """A preset by name, with changes.

    Raises:
        RemaskError: unknown preset or setting, or a value of another type.
    """
    if name not in PRESETS:
        raise RemaskError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    unknown = sorted(set(changes) - set(MemoryConfig.__dataclass_fields__))
    if unknown:
        raise RemaskError(f"a memory has no setting {unknown[0]!r}; it has {', '.join(MemoryConfig.__dataclass_fields__)}")
    try:
        return replace(PRESETS[name], **changes)
    except TypeError as error:
        raise RemaskError(f"a setting of preset {name!r} has a value of another type ({error})") from None
