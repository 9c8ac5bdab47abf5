"""The processes that share a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...errors import RemaskError

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_processes(what: str, batch_size: int, *, parts: int = 1, find_unused: bool = False) -> Accelerator:
    """The accelerator of a data-parallel run of one process or several.

    Args:
        what: adapting, unlearning: how errors call the run.
        batch_size, parts: rows of a step, and the pieces that a process works its share in.
        find_unused: some parameters may get no gradient in a step.

    Raises:
        RemaskError: accelerate not installed, a sharded launch, or a batch that cannot be dealt out in equal pieces.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
    except ImportError:
        raise RemaskError(f"{what} needs accelerate; install remask[train]") from None
    # Autocast is in the loss. Without `cpu` several processes on a machine without accelerators would each run alone.
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RemaskError(
            f"{what} runs data-parallel, not under {accelerator.distributed_type.value}; change the launch config"
        )
    pieces = accelerator.num_processes * parts
    if batch_size % pieces:
        shares = f"{pieces} processes" if parts == 1 else f"{pieces} pieces (processes x parts)"
        raise RemaskError(f"batch_size {batch_size} must be a multiple of the {shares}")
    return accelerator
