"""What is trained, and the other models that a loss reads, without a second copy of the network.

Adapters: the start model is the same network with the adapters switched off. All weights: its values are held beside the
trained ones and put in their place for a forward. A moving average and a reinforced model are values of the trained parameters
alone, put in place in the same way.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ...backbones.model import MaskedDiffusionLM
from ...backbones.weight_edit import Change
from ...errors import RemaskError
from ..lora import adapter_changes, adapters_off, add_adapters, find_targets
from .config import UnlearnConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

Values = dict[str, Tensor]


class Trained(ABC):
    """The trainable parameters of `lm`, by name; `split` says that every process holds a part of them."""

    lm: MaskedDiffusionLM
    named: dict[str, nn.Parameter]
    split: ClassVar[bool] = False

    @abstractmethod
    def start(self) -> contextlib.AbstractContextManager[None]:
        """The start model inside the block; gradients must be off."""

    @abstractmethod
    def changes(self) -> dict[str, Change]:
        """What training did to the weights, by parameter; what did not move is left out."""

    @abstractmethod
    def undo(self) -> None:
        """Leave the model as it came."""

    def wrap(self, objective: nn.Module, accelerator: Accelerator) -> nn.Module:
        """`objective` with gradients that are averaged over the processes; forwards with gradient run inside its own."""
        return accelerator.prepare_model(objective)

    def clip(self, limit: float) -> float:
        """Scale the gradient down to a norm of `limit`; returns the norm that it had."""
        return float(nn.utils.clip_grad_norm_(self.named.values(), limit))

    def copy(self) -> Values:
        """The present values."""
        return {name: parameter.detach().clone() for name, parameter in self.named.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite the present values."""
        for name, parameter in self.named.items():
            parameter.copy_(values[name])

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values inside the block; gradients must be off."""
        present = {name: parameter.data for name, parameter in self.named.items()}
        for name, parameter in self.named.items():
            parameter.data = values[name]
        try:
            yield
        finally:
            for name, parameter in self.named.items():
                parameter.data = present[name]


class Adapters(Trained):
    """Low-rank adapters."""

    def __init__(self, lm: MaskedDiffusionLM, config: UnlearnConfig) -> None:
        self.lm = lm
        self.attached = add_adapters(lm, config.rank, config.seed, find_targets(lm, config.targets))
        self.named = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}

    def start(self) -> contextlib.AbstractContextManager[None]:
        """Adapters switched off."""
        return adapters_off(self.lm)

    def changes(self) -> dict[str, Change]:
        """Products of rank r."""
        return adapter_changes(self.lm)

    def undo(self) -> None:
        """Take the adapters off."""
        self.attached.unload()


class Weights(Trained):
    """The weights themselves; the start values are kept, in main memory unless a loss reads the start model.

    Raises:
        RemaskError: weights of half precision, in which small updates are lost.
    """

    def __init__(self, lm: MaskedDiffusionLM, config: UnlearnConfig, *, with_start: bool) -> None:
        self.lm = lm
        chosen = None if config.targets is None else set(find_targets(lm, config.targets).weights)
        self.named = {name: p for name, p in lm.model.named_parameters() if chosen is None or name in chosen}
        for name, parameter in self.named.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise RemaskError(
                    f"{name} is {parameter.dtype}, in which small updates of the weights are lost; "
                    "load the model in float32, or train adapters (rank above 0)"
                )
        place = None if with_start else "cpu"
        self._before = {name: p.detach().to(place or p.device, copy=True) for name, p in self.named.items()}
        for parameter in self.named.values():
            parameter.requires_grad_(True)

    def start(self) -> contextlib.AbstractContextManager[None]:
        """The start values in place."""
        return self.holding(self._before)

    def changes(self) -> dict[str, Change]:
        """Dense differences."""
        moved = {name: parameter.detach().cpu() - self._before[name].cpu() for name, parameter in self.named.items()}
        return {name: change for name, change in moved.items() if bool(change.any())}

    def undo(self) -> None:
        """Put the start values back."""
        self.put(self._before)
        self.lm.model.requires_grad_(False)
