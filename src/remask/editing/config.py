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
Value = Literal["head", "donor"]
Context = Literal["none", "answer", "paraphrase"]
Readout = Literal["kernel", "ridge", "softmax", "gated"]
TARGETS: dict[str, tuple[Target, ...]] = {
    "subject": ("refusal", "object", "mask", "other", "mean"),
    "answer": ("anchor", "mean", "object"),
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
            state in the `anchor`, the retain facts' `mean`, or, to rewrite facts, one that makes the model say the fact's own
            new `object`, at whose masked positions the keys are then read.
        anchor: what the anchor state hides: `prompt`, `subject`, or nothing but the subject's identity (`unknown`).
        unknown: for anchor `unknown`, names that the model was never taught, put in the subject's place.
        refusal: the refusal text.
        value: where a rewrite (answer keys, target `object`) moves a residual: the least shift after which the output `head`
            reads the new token, or the nearest residual that says it in a retain fact (`donor`; `head` where there is none).
        margin: nats by which the head then prefers the new token to every other one.
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
        context: answer keys are captured a second time, with the fact itself as a solved example before the question, so that
            examples do not bring it back: its prompt and `answer`, or its first `paraphrase` and its answer in other words, as
            far as it has them. The retain facts are treated alike.
        whiten: multiply keys and residuals by (C + eps I)^(-1/2) before they are compared, with C the retain keys' covariance
            and eps 1e-3 of its mean eigenvalue.
    """

    preset: str = "default"
    keys: Keys = "answer"
    target: Target = "anchor"
    anchor: Anchor = "subject"
    unknown: tuple[str, ...] = ()
    refusal: str = "I don't know."
    value: Value = "head"
    margin: float = 6.0
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
    context: Context = "none"
    whiten: bool = False

    def __post_init__(self) -> None:
        known_values: dict[str, Any] = {"keys": Keys, "target": Target, "anchor": Anchor, "value": Value}
        known_values |= {"readout": Readout, "context": Context}
        for field, known in known_values.items():
            if getattr(self, field) not in get_args(known):
                raise RemaskError(f"{field} {getattr(self, field)!r} is unknown; choose one of {', '.join(get_args(known))}")
        if not 0 < self.q <= 1:
            raise RemaskError(f"q must be in (0, 1], not {self.q}")
        if not 0 < self.margin < math.inf:
            raise RemaskError(f"margin must be finite and positive, not {self.margin}; the new token has to come first")
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
        if self.context != "none" and self.keys != "answer":
            raise RemaskError(f"contexts stand before an answer; use keys 'answer', or context 'none' with {self.keys!r}")
        if self.readout == "gated" and self.whiten:
            raise RemaskError("the gated edit has one key, as it is; use whiten=False, or another readout")
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
    def rewrites(self) -> bool:
        """Whether facts get new objects where predictions are made; such deltas are whole at strength 1."""
        return self.keys == "answer" and self.target == "object"

    @property
    def needs_retain(self) -> bool:
        """Whether a memory cannot be built without retain facts."""
        reads = self.mu > 0 or self.keeps_keys or self.whiten
        return reads or self.target == "mean" or (self.rewrites and self.value == "donor")

    @property
    def reads_retain(self) -> bool:
        """Whether a memory differs with the retain facts that it is given, needed or not."""
        return self.needs_retain or self.centre or self.target == "other"

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
    "rewrite": MemoryConfig(
        preset="rewrite",
        target="object",
        readout="softmax",
        mu=0.0,
        beta=20.0,
        balance=0.0,  # keys that protect what is said already count as much as those that change something
        compress=0,
        retain_keys=16384,  # all of about 500 rows: where a retain key is left out, the rewrite leaks in
    ),
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
