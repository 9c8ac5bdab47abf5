"""What every edit at inference time is: a shift that is added at one site of one model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from ..backbones.intervention import Intervention, add_shift
from ..backbones.model import MaskedDiffusionLM, Site
from ..errors import RemaskError
from .shift import Shift


class SiteEdit(Intervention):
    """An intervention that adds a shift at one site of the model that it was built on.

    `model` is the fingerprint of that model; "" fits any. At `alpha` 0 nothing is hooked.
    """

    site: Site
    alpha: float
    model: str

    @abstractmethod
    def shift(self) -> Shift:
        """What is added to a residual, strength included."""

    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        if self.model not in ("", lm.fingerprint()):
            raise RemaskError(
                f"this {self.kind} was built on model {self.model} and does not fit {lm.name} ({lm.fingerprint()}); "
                "build it again"
            )
        if self.alpha == 0:
            return lambda: None
        return add_shift(lm, self.site, self.shift().to(lm.device))
