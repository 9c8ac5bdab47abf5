"""The edit memory: forgetting or rewriting facts at inference time on a frozen model, in closed form.

    h <- h + alpha * S_q(A h) D        at the site, all positions, every denoising step

S_q keeps the ceil(q N) largest coefficients of each token. Presets: `paper` is the literal reading of TimeROME-DLM's equations
6-12 (one subject key a fact, refusal target, absolute ridge); `default` reads keys where predictions are made, moves them to
what the model itself says when it cannot see who is asked about, and solves with the retain set in the system.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones.intervention import Intervention, add_shift
from ..backbones.model import Encoded, MaskedDiffusionLM, Site
from ..diffusion.masks import MaskBank
from ..errors import RemaskError
from ..facts import Fact, check_unique_ids
from .calibrate import anchor_level, calibrate
from .capture import Anchor, Captured, capture_anchor, capture_keys, capture_paper
from .files import read_edit, write_edit
from .solve import Solution, second_moment, solve_readout


@dataclass(frozen=True)
class MemoryConfig:
    """How a memory is captured and solved.

    Attributes:
        preset: name recorded with every number.
        keys: `subject` (one mean key a fact) or `answer` (every masked answer position of partial states).
        target: what deltas move towards: `refusal` text, or the `anchor` residual.
        anchor: what the anchor state hides: `prompt`, `subject`, or nothing but the subject's identity (`unknown`).
        unknown: for anchor `unknown`, names that the model was never taught, put in the subject's place.
        refusal: the refusal text.
        ridge, relative: lambda, and whether it is in units of the mean squared key norm.
        mu: weight of the retain term per retain key, relative to a forget key.
        q: share of keys that may fire at a token; 1 = dense.
        states: partial states a fact; state_seed: their seed.
    """

    preset: str = "default"
    keys: Literal["subject", "answer"] = "answer"
    target: Literal["refusal", "anchor"] = "anchor"
    anchor: Anchor = "subject"
    unknown: tuple[str, ...] = ()
    refusal: str = "I don't know."
    ridge: float = 1e-3
    relative: bool = True
    mu: float = 10.0
    q: float = 1.0
    states: int = 4
    state_seed: int = 1_000_003

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise RemaskError(f"q must be in (0, 1], not {self.q}")
        if self.ridge <= 0 or self.mu < 0 or self.states < 1:
            raise RemaskError("a memory needs ridge > 0, mu >= 0 and states >= 1")
        if (self.keys == "subject" and self.target == "anchor") or (self.keys == "answer" and self.target == "refusal"):
            raise RemaskError("subject keys go with target 'refusal', answer keys with target 'anchor'")
        object.__setattr__(self, "unknown", tuple(self.unknown))
        if (self.anchor == "unknown") != bool(self.unknown):
            raise RemaskError("anchor 'unknown' needs names that the model was never taught, and only it takes them")

    @property
    def bank(self) -> MaskBank:
        """The partial states that captures read; their seed is never a scoring bank's."""
        return MaskBank(draws=self.states, replicates=1, seed=self.state_seed)


PRESETS: dict[str, MemoryConfig] = {
    "default": MemoryConfig(),
    "paper": MemoryConfig(preset="paper", keys="subject", target="refusal", ridge=1.0, relative=False, mu=0.0),
}


@dataclass
class EditMemory(Intervention):
    """A solved collection of edits at one site; a value that can be attached, saved, and have facts removed.

    Attributes:
        keys, deltas: [n, d] fp32; owner: index into `fact_ids` of each row, [n].
        retain_moment: second moment of the retain keys [d, d], or None.
        model: fingerprint of the model that it was captured on.
    """

    config: MemoryConfig
    site: Site
    fact_ids: tuple[str, ...]
    keys: Tensor
    deltas: Tensor
    owner: Tensor
    model: str
    alpha: float = 1.0
    retain_moment: Tensor | None = None
    solution: Solution = field(init=False)
    kind = "edit memory"

    def __post_init__(self) -> None:
        self.solution = solve_readout(
            self.keys,
            self.config.ridge,
            relative=self.config.relative,
            retain_moment=self.retain_moment,
            mu=self.config.mu,
        )

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
            retain: facts to leave alone; needed when `config.mu` > 0.
            alpha: strength, or "calibrated": the one that brings the facts to `level`.
            level: mean log-probability of the facts, nats a row; None = the model's own with the prompt masked.

        Raises:
            RemaskError: no facts, duplicate ids, site outside the model, an intervention attached, singular Gram matrix.
        """
        if not facts:
            raise RemaskError("a memory needs at least one fact")
        check_unique_ids(facts, "memory")
        check_unique_ids(retain, "retain set")
        lm.site_module(site)
        rows = [lm.encode(fact) for fact in facts]
        if config.keys == "subject":
            targets = [lm.encode(fact, answer=fact.target or config.refusal) for fact in facts]
            captured = capture_paper(lm, site, rows, targets)
        else:
            unknown = [[_renamed(lm, fact, name) for fact in facts] for name in config.unknown]
            captured = capture_anchor(lm, site, rows, config.bank, config.anchor, unknown)
        moment = None
        if config.mu > 0:
            if not retain:
                raise RemaskError("the default memory is retain-aware and needs retain facts; pass --retain, or preset 'paper'")
            moment = second_moment(capture_keys(lm, site, [lm.encode(fact) for fact in retain], config.bank)).float()
        strength = 1.0 if alpha == "calibrated" else alpha
        memory = cls._of(captured, config, site, tuple(fact.id for fact in facts), lm.fingerprint(), strength, moment)
        if alpha != "calibrated":
            return memory
        return calibrate(lm, memory, rows, anchor_level(lm, rows) if level is None else level)

    @classmethod
    def _of(
        cls,
        captured: Captured,
        config: MemoryConfig,
        site: Site,
        fact_ids: tuple[str, ...],
        model: str,
        alpha: float,
        moment: Tensor | None,
    ) -> EditMemory:
        return cls(config, site, fact_ids, captured.keys, captured.deltas, captured.owner, model, alpha, moment)

    # ---------------------------------------------------------------- acting
    def coefficients(self, hidden: Tensor) -> Tensor:
        """S_q(A h): [..., n] for residuals [..., d]."""
        dense = hidden @ self.solution.readout.to(hidden).T
        count = -(-int(self.config.q * len(self.keys) * 1_000_000) // 1_000_000)  # ceil without float dust
        if count >= dense.shape[-1]:
            return dense
        top = dense.abs().topk(max(1, count), dim=-1).indices
        return torch.zeros_like(dense).scatter(-1, top, dense.gather(-1, top))

    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        if self.model != lm.fingerprint():
            raise RemaskError(
                f"this memory was built on model {self.model} and does not fit {lm.name} ({lm.fingerprint()}); build it again"
            )
        if self.alpha == 0:
            return lambda: None
        if self.config.q == 1:
            folded = (self.solution.readout.double().T @ self.deltas.double() * self.alpha).float().to(lm.device)
            return add_shift(lm, self.site, lambda hidden: hidden @ folded.to(hidden.dtype))
        deltas = (self.deltas * self.alpha).to(lm.device)
        return add_shift(lm, self.site, lambda hidden: self.coefficients(hidden) @ deltas.to(hidden.dtype))

    def _tensors(self) -> list[Tensor]:
        return [self.solution.readout, self.deltas]

    def with_alpha(self, alpha: float) -> EditMemory:
        """The same memory at another strength; nothing is solved again."""
        other = object.__new__(EditMemory)
        other.__dict__.update(self.__dict__ | {"alpha": alpha})
        return other

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
        captured = Captured(self.keys[keep], self.deltas[keep], renumber[self.owner[keep]])
        names = tuple(self.fact_ids[i] for i in left)
        return self._of(captured, self.config, self.site, names, self.model, self.alpha, self.retain_moment)

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
        if self.retain_moment is not None:
            tensors["retain_moment"] = self.retain_moment
        header = {
            "model": self.model,
            "site": self.site.to_dict(),
            "config": asdict(self.config),
            "alpha": self.alpha,
            "fact_ids": list(self.fact_ids),
        }
        write_edit(path, self.kind, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> EditMemory:
        """Read a memory file.

        Raises:
            RemaskError: missing, unreadable or damaged file, other format version, another kind of edit.
        """
        header, tensors = read_edit(path)
        if header["kind"] != cls.kind:
            raise RemaskError(f"{path}: holds a {header['kind']}, not an edit memory")
        try:
            return cls(
                MemoryConfig(**header["config"]),
                Site.from_dict(header["site"]),
                tuple(header["fact_ids"]),
                tensors["keys"],
                tensors["deltas"],
                tensors["owner"],
                header["model"],
                header["alpha"],
                tensors.get("retain_moment"),
            )
        except (KeyError, TypeError, ValueError, RemaskError) as error:
            raise RemaskError(f"{path}: damaged edit file ({error}); build it again") from None


def _renamed(lm: MaskedDiffusionLM, fact: Fact, name: str) -> Encoded:
    """The fact's question about `name`; a question that names nobody stays as it is and contributes no change."""
    asked = fact.prompt if fact.subject == fact.prompt else fact.prompt.replace(fact.subject, name)
    return lm.encode(fact, prompt=asked)


def preset(name: str, **changes: Any) -> MemoryConfig:
    """A preset by name, with changes.

    Raises:
        RemaskError: unknown preset.
    """
    if name not in PRESETS:
        raise RemaskError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
