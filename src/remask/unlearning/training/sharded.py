"""Adapters on a model whose weights are split over the processes (FSDP2): for a model that no single device holds.

Each block is gathered when it runs. The forwards of a step have to be the same on every process, whatever rows it has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import RemaskError
from .weights import Adapters

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...backbones.model import MaskedDiffusionLM
    from .config import UnlearnConfig


class ShardedAdapters(Adapters):
    """Low-rank adapters whose factors are split like the weights; `named` holds this process's parts.

    The optimizer works number by number, so that it needs the parts only. The model stays split behind the run.

    Raises:
        RemaskError: one process, all weights, experts, or a method that reads values other than those of start and policy.
    """

    split = True

    def __init__(self, lm: MaskedDiffusionLM, config: UnlearnConfig, accelerator: Accelerator) -> None:
        if accelerator.num_processes == 1:
            raise RemaskError("shard splits the weights over processes and there is one; start several with torchrun")
        if not config.rank:
            raise RemaskError("shard needs adapters; set rank above 0")
        options = config.options
        if "reinforced" in config.definition.needs or options.get("anchor") == "ema" or options.get("states") == "generated":
            raise RemaskError(f"{config.method} with these options does not run split over processes; leave shard out")
        self._whole: dict[str, nn.Parameter] = {}
        super().__init__(lm, config)
        if experts := [name for name, p in self.named.items() if "lora_" in name and ".experts." in name]:
            self.undo()
            raise RemaskError(f"adapters on experts ({experts[0]}) cannot be split over processes; name other targets")
        self._accelerator = accelerator

    def wrap(self, objective: nn.Module, accelerator: Accelerator) -> nn.Module:
        """Split all weights; from here on every forward runs inside that of `objective`."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.lm.device.type, (accelerator.num_processes,))
        for block in self.lm.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        self._whole = {name: p for name, p in self.lm.model.named_parameters() if p.requires_grad}
        self.named = {name: nn.Parameter(_part(p.detach())) for name, p in self._whole.items()}
        probe = torch.full((1, 2), self.lm.spec.mask_id, device=self.lm.device)
        with torch.no_grad():  # the first gathering allocates; under inference mode gradients could not flow later
            objective(lambda: self.lm.logits(probe))
        return objective

    def clip(self, limit: float) -> float:
        """Over all processes."""
        for name, part in self.named.items():
            gradient = self._whole[name].grad
            part.grad = None if gradient is None else _part(gradient)
            self._whole[name].grad = None
        gradients = [part.grad for part in self.named.values() if part.grad is not None]
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        norm = math.sqrt(float(self._accelerator.reduce(squares, "sum")))
        for gradient in gradients:
            gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm

    def undo(self) -> None:
        """Weights that are split stay split."""
        if not self._whole:
            super().undo()


def _part(tensor: Any) -> Tensor:
    """This process's part, in the same memory."""
    part: Tensor = tensor.to_local()
    return part
