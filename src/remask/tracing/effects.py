"""What a trace measured: raw effects of every site on every later step, and their weighted sums (equation 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..backbones.model import Encoded
from ..errors import RemaskError
from ..tensorfile import read_tensors, write_tensors
from .protocol import TraceConfig

Mode = Literal["exact", "sweep", "reference"]
ESTIMANDS: dict[Mode, str] = {
    "exact": "free-running: after the restored step the run denoises on from what it committed",
    "reference": "free-running: after the restored step the run denoises on from what it committed",
    "sweep": "fixed trajectory: the canvas of every step is the clean run's, only the restored step itself is read",
}
_FORMAT = 2
_TENSORS = ("effects", "squares", "clean", "corrupted", "placed", "tokens")


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        RemaskError: the mode is none of those known; they are named.
    """
    if mode not in ESTIMANDS:
        raise RemaskError(f"trace mode {mode!r} is unknown; choose one of {', '.join(get_args(Mode))}")


@dataclass(frozen=True)
class Effects:
    """What was measured on one fact, fp64 on the CPU.

    Attributes:
        effects: [draw, layer, module, step, later step], nats; NaN where nothing is read.
        clean, corrupted: object log-probability of the unpatched runs, [step] and [draw, step].
        placed: [run, step], as in `Trace`.
    """

    effects: Tensor
    clean: Tensor
    corrupted: Tensor
    placed: Tensor


@dataclass(frozen=True)
class Trace:
    """Raw effects of many facts.

    Attributes:
        effects: [fact, layer, module, step, later step], fp32: log p_patched(o) - log p_corrupted(o) in nats, summed over
            object tokens, mean over noise draws; NaN where a fact has fewer steps, the later step is earlier, or the mode does
            not read it.
        squares: the same shape: sum over noise draws of the squared effects.
        clean, corrupted: object log-probability of the unpatched runs, [fact, step], mean over draws.
        placed: [fact, run, step]: share of the object tokens that stand on the canvas, and rightly, after the step; the runs
            are clean and corrupted (mean over draws).
        tokens: number of object tokens, [fact], int64.
        ids: row names. A row is a fact, or a paraphrase of one.
        facts: the fact that each row words; equal to `ids` where no paraphrases were traced.
        unknown: facts that were left out because the model does not know their object.
        config: the protocol; mode: how it was run; model: fingerprint; precision: of the forwards.
    """

    effects: Tensor
    squares: Tensor
    clean: Tensor
    corrupted: Tensor
    placed: Tensor
    tokens: Tensor
    ids: tuple[str, ...]
    facts: tuple[str, ...]
    unknown: tuple[str, ...]
    config: TraceConfig
    mode: Mode
    model: str
    precision: str = "fp32"

    @property
    def estimand(self) -> str:
        """What the numbers are, in words."""
        return ESTIMANDS[self.mode]

    def standard_error(self) -> Tensor:
        """Standard error of `effects` over noise draws, same shape, nats; NaN for a single draw."""
        draws = self.config.draws
        variance = (self.squares - draws * self.effects.double() ** 2).clamp_min(0) / max(draws - 1, 1)
        return (variance / draws).sqrt().float() if draws > 1 else torch.full_like(self.effects, torch.nan)

    def header(self) -> dict[str, Any]:
        """Everything but the numbers, as JSON."""
        return {
            "format": _FORMAT,
            "kind": "trace",
            "mode": self.mode,
            "estimand": self.estimand,
            "model": self.model,
            "precision": self.precision,
            "config": asdict(self.config),
            "axes": ["fact", "layer", "module", "step", "later step"],
            "unit": "nats",
            "ids": list(self.ids),
            "facts": list(self.facts),
            "unknown": list(self.unknown),
        }

    def save(self, path: str | Path) -> None:
        """Write safetensors with JSON metadata, atomically."""
        write_tensors(path, self.header(), {name: getattr(self, name) for name in _TENSORS})

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> Trace:
        """Read a file of `save`.

        Args:
            path: the file, or the folder that holds `trace.safetensors`.
            model: fingerprint that the trace must be of.

        Raises:
            RemaskError: missing or damaged file, another kind or version, or a trace of another model (both named).
        """
        path = Path(path)
        path = path / "trace.safetensors" if path.is_dir() else path
        header, tensors = read_tensors(path, "trace", _FORMAT)
        wrong = RemaskError(f"{path}: this is no trace of format {_FORMAT}; make it again with this version")
        if header.get("kind") != "trace":
            raise wrong
        try:
            named: dict[str, Any] = {name: tuple(header[name]) for name in ("ids", "facts", "unknown")}
            named |= {name: header[name] for name in ("mode", "model", "precision")}
            numbers: dict[str, Any] = dict(tensors)
            found = cls(**numbers, **named, config=TraceConfig(**header["config"]))
        except (KeyError, TypeError):
            raise wrong from None
        if model is not None and found.model != model:
            raise RemaskError(f"{path}: a trace of another model: {found.model}, this one is {model}; trace again")
        return found

    def take(self, rows: Sequence[int]) -> Trace:
        """The same trace over some of its rows, in that order (a row may come several times)."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        tensors: dict[str, Any] = {name: getattr(self, name)[index] for name in _TENSORS}
        return replace(self, **tensors, ids=tuple(self.ids[i] for i in rows), facts=tuple(self.facts[i] for i in rows))


def assemble(rows: Sequence[Encoded], measured: Sequence[Effects], layers: int, steps: int, **fields: Any) -> Trace:
    """The trace of `rows` from what was measured on each; `fields` are the remaining fields of `Trace`."""
    shape = (len(rows), layers, len(fields["config"].modules), steps, steps)
    effects, squares = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    clean, corrupted = torch.full((len(rows), steps), torch.nan), torch.full((len(rows), steps), torch.nan)
    placed = torch.full((len(rows), 2, steps), torch.nan)
    for index, found in enumerate(measured):
        own = len(found.clean)
        effects[index, ..., :own, :own] = found.effects.mean(0).float()
        squares[index, ..., :own, :own] = (found.effects**2).sum(0).float()
        clean[index, :own], corrupted[index, :own] = found.clean.float(), found.corrupted.mean(0).float()
        placed[index, :, :own] = found.placed.float()
    tokens = torch.tensor([len(row.answer_ids) for row in rows], dtype=torch.int64)
    ids = tuple(row.id for row in rows)
    return Trace(effects, squares, clean, corrupted, placed, tokens, ids, **fields)


def join(parts: Sequence[Trace], order: Sequence[str]) -> Trace:
    """One trace from those of disjoint rows, in the order of the row names `order`; unknown facts are collected.

    Raises:
        RemaskError: no parts, or parts of different protocols, modes or models.
    """
    if not parts:
        raise RemaskError("nothing to join: no traces")
    first = parts[0]
    if any((p.config, p.mode, p.model, p.precision) != (first.config, first.mode, first.model, first.precision) for p in parts):
        raise RemaskError("traces of different protocols, modes or models cannot be joined")
    steps = max(part.effects.shape[-1] for part in parts)
    padded = [_pad(part, steps) for part in parts]
    tensors: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in padded]) for name in _TENSORS}
    whole = replace(
        first,
        **tensors,
        ids=tuple(name for part in parts for name in part.ids),
        facts=tuple(name for part in parts for name in part.facts),
        unknown=tuple(sorted({name for part in parts for name in part.unknown}, key=list(order).index)),
    )
    place = {name: i for i, name in enumerate(whole.ids)}
    return whole.take([place[name] for name in order if name in place])


def _pad(part: Trace, steps: int) -> Trace:
    def widen(tensor: Tensor, axes: int) -> Tensor:
        extra = steps - tensor.shape[-1]
        return torch.nn.functional.pad(tensor, (0, extra) * axes, value=torch.nan)

    return replace(
        part,
        effects=widen(part.effects, 2),
        squares=widen(part.squares, 2),
        clean=widen(part.clean, 1),
        corrupted=widen(part.corrupted, 1),
        placed=widen(part.placed, 1),
    )


@dataclass(frozen=True)
class Weights:
    """How effects on later steps are summed (equation 4), applied to raw effects: no trace has to be run again.

    Attributes:
        gamma: weight gamma^(s' - s) of the effect at step s' of a restoration at step s.
        strict: only s' > s, so that only what was committed counts; the last step is then undefined.
        normalise: divide by the sum of the weights; otherwise early steps, which have more later ones, gain from that alone.
        per_token: mean over object tokens, so that facts of different length can be averaged; otherwise their sum.
    """

    gamma: float = 0.9
    strict: bool = False
    normalise: bool = True
    per_token: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise RemaskError(f"gamma {self.gamma} must lie in 0 ... 1")


PRESETS: dict[str, tuple[dict[str, Any], Weights]] = {
    "default": ({}, Weights()),
    # The literal reading of equations 2-5, with ROME's ten noise samples.
    "paper": ({"steps": 8, "draws": 10, "readout": "raw"}, Weights(normalise=False, per_token=False)),
}


def preset(name: str, **changes: Any) -> tuple[TraceConfig, Weights]:
    """Protocol and weights of a preset, the protocol with changes.

    Raises:
        RemaskError: unknown preset.
    """
    if name not in PRESETS:
        raise RemaskError(f"trace preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    fields, weights = PRESETS[name]
    return TraceConfig(**{**fields, **changes}), weights


def aggregate(trace: Trace, weights: Weights | None = None) -> Tensor:
    """Equation (4): TIE(l, m, s) = sum over later steps s' of w(s' - s) TIE(s'), [fact, layer, module, step], nats.

    NaN entries carry no weight; a step without any weight is NaN.
    """
    weights = weights or Weights()
    effects = trace.effects / trace.tokens.view(-1, 1, 1, 1, 1) if weights.per_token else trace.effects
    steps = effects.shape[-1]
    lag = torch.arange(steps)[None, :] - torch.arange(steps)[:, None]
    weight = torch.where(lag >= int(weights.strict), torch.tensor(weights.gamma) ** lag.clamp_min(0), torch.tensor(0.0))
    weight = weight.to(effects) * ~effects.isnan()
    total, norm = (weight * effects.nan_to_num()).sum(-1), weight.sum(-1)
    if weights.normalise:
        total = total / norm.clamp_min(1e-12)
    return torch.where(norm > 0, total, torch.nan)


def largest_difference(one: Trace, other: Trace) -> dict[str, float]:
    """Largest absolute difference of every tensor of two traces, nats (`placed`: share of tokens).

    Raises:
        RemaskError: traces of different models, facts or protocols.
    """
    for field in ("model", "ids", "config"):
        a, b = getattr(one, field), getattr(other, field)
        if a != b:
            raise RemaskError(f"two traces cannot be compared: {field} {_short(a)} against {_short(b)}")
    if (one.mode == "sweep") != (other.mode == "sweep"):
        raise RemaskError(f"two traces cannot be compared: {one.mode} ({one.estimand}) against {other.mode} ({other.estimand})")
    result = {}
    for name in _TENSORS[:-1]:
        a, b = getattr(one, name), getattr(other, name)
        same = torch.equal(a.isnan(), b.isnan())
        result[name] = float((a.double() - b.double()).nan_to_num().abs().max()) if same else float("inf")
    return result


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
