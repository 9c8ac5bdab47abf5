"""What every edit at inference time is: a shift that is added at one site of one model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..backbones.intervention import Intervention, add_shift
from ..backbones.model import MaskedDiffusionLM, Site
from ..editfile import read_edit, rebuilt, write_edit
from ..errors import RemaskError
from .config import MemoryConfig
from .shift import Shift

if TYPE_CHECKING:
    from typing_extensions import Self


class SiteEdit(Intervention):
    """An intervention that adds a shift at one site of the model that it was built on; a value, not changed once made.

    `model` is the fingerprint of that model; "" fits any. At `alpha` 0 nothing is hooked.
    """

    site: Site
    alpha: float
    model: str

    @abstractmethod
    def shift(self) -> Shift:
        """What is added to a residual, strength included."""

    def fingerprint(self) -> str:
        """16 hex digits, as of every intervention; computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return super().fingerprint()

    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        if self.model not in ("", lm.fingerprint()):
            raise RemaskError(
                f"this {self.kind} was built on model {self.model} and does not fit {lm.name} ({lm.fingerprint()}); "
                "build it again"
            )
        if self.alpha == 0:
            return lambda: None
        return add_shift(lm, self.site, self.shift().to(lm.device))


@dataclass
class KeyedEdit(SiteEdit):
    """An edit made of keys with a delta each, captured from facts.

    Attributes:
        config: how they were captured; site: where it acts.
        fact_ids: sorted.
        keys, deltas: [n, d] fp32; owner: index into `fact_ids` of each row, [n].
    """

    config: MemoryConfig
    site: Site
    fact_ids: tuple[str, ...]
    keys: Tensor
    deltas: Tensor
    owner: Tensor

    @abstractmethod
    def _own_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors that the file of this kind has beside those of every kind."""

    @classmethod
    @abstractmethod
    def _own_fields(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields that `_own_parts` wrote."""

    def save(self, path: str | Path) -> None:
        """Write an edit file, atomically."""
        header, tensors = self._own_parts()
        header |= {"model": self.model, "site": self.site.to_dict(), "config": asdict(self.config)}
        header |= {"alpha": self.alpha, "fact_ids": list(self.fact_ids)}
        write_edit(path, self.kind, header, tensors | {name: getattr(self, name) for name in ("keys", "deltas", "owner")})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an edit file of this kind.

        Raises:
            RemaskError: missing, unreadable or damaged file, other format version, another kind of edit.
        """
        header, tensors = read_edit(path, cls.kind)
        with rebuilt(path):
            fields = cls._own_fields(header, tensors) | {name: tensors[name] for name in ("keys", "deltas", "owner")}
            fields |= {"config": MemoryConfig(**header["config"]), "site": Site.from_dict(header["site"])}
            fields |= {"model": header["model"], "alpha": header["alpha"], "fact_ids": tuple(header["fact_ids"])}
            return cls(**fields)
