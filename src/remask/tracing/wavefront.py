"""One pass of clean, corrupted and patched sequences through the layers, together.

Sequences move up block by block as one batch: clean ones, corrupted ones, and at every layer the patched ones that start there.
A patched sequence therefore costs only the blocks above its layer, and what it is restored to stands in the same batch.

Shapes: C clean and U corrupted sequences, P patches, L positions, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.model import MaskedDiffusionLM, Module, Site, capture
from ..errors import RemaskError
from .protocol import Corruptor


@dataclass(frozen=True)
class Sources:
    """The sequences that are not patched.

    Attributes:
        clean: [C, L] canvases; corrupted: [U, L] canvases as the model sees them.
        clean_of: [U], the clean sequence that each corrupted one is restored from.
        where: [U, L] bool, corrupted positions; noise: [n, d] for them in row-major order, or None.
    """

    clean: Tensor
    corrupted: Tensor
    clean_of: Tensor
    where: Tensor
    noise: Tensor | None


@dataclass(frozen=True)
class Patches:
    """What is restored, one entry a patched sequence.

    Attributes:
        unit: [P], the corrupted sequence that is patched.
        module: [P], index into `modules`.
        first, last: [P], the layers (both included) whose module is restored; a residual stream has one.
        where: [P, L] bool, restored positions.
        modules: names.
    """

    unit: Tensor
    module: Tensor
    first: Tensor
    last: Tensor
    where: Tensor
    modules: tuple[Module, ...]

    def __len__(self) -> int:
        return len(self.unit)

    def take(self, index: Tensor) -> Patches:
        """Some of the patches."""
        parts = {name: getattr(self, name)[index] for name in ("unit", "module", "first", "last", "where")}
        return replace(self, **parts)


def wavefront(
    lm: MaskedDiffusionLM, corruptor: Corruptor, sources: Sources, patches: Patches, limit: int
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yield the last block's output of the corrupted sequences, (None, [U, L, d]), and of patches, ([n], [n, L, d]).

    `limit` bounds the sequences in the batch; patches that do not fit are run in several passes, each with its sources.
    """
    room = limit - len(sources.clean) - len(sources.corrupted)
    order = patches.first.argsort(stable=True)
    for number, chunk in enumerate(order.split(max(1, room))):
        corrupted, patched, rows = _pass(lm, corruptor, sources, patches.take(chunk), keep=number == 0)
        if number == 0:
            yield None, corrupted
        yield chunk[rows], patched


def _pass(
    lm: MaskedDiffusionLM, corruptor: Corruptor, sources: Sources, patches: Patches, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(corrupted outputs, patched outputs, their patches); the corrupted ones are empty unless they are to be kept."""
    count = len(sources.clean) + len(sources.corrupted)
    first = len(sources.clean)
    where = torch.cat([torch.zeros_like(sources.clean, dtype=torch.bool), sources.where])
    with corruptor.acting(where, sources.noise):
        hidden = lm.embed(torch.cat([sources.clean, sources.corrupted]))
    rows = torch.zeros(0, dtype=torch.long, device=hidden.device)  # the patch of every sequence after the sources
    top = lm.num_layers - 1 if keep else int(patches.last.max())
    for layer in range(lm.num_layers):
        inside = _starting(lm, patches, layer, inside=True)
        hidden = torch.cat([hidden, hidden[first + patches.unit[inside]]])
        rows = torch.cat([rows, inside])
        outside = _starting(lm, patches, layer, inside=False)
        sites = [Site(layer, name) for name in ("attn", "mlp")] if len(outside) else []
        with _restoring(lm, layer, sources, patches, rows, count), capture(lm, sites) as outputs:
            result = lm.run_blocks(range(layer, layer + 1), hidden)
        if len(outside):
            parts: dict[str, Tensor] = {site.module: output for site, output in outputs.items()}
            new = _replaced(lm, layer, hidden, {"resid": result, **parts}, sources, patches.take(outside))
            result, rows = torch.cat([result, new]), torch.cat([rows, outside])
        if layer == top and not keep:
            result, count = result[count:], 0
        hidden = result
    return hidden[first:count], hidden[count:], rows


def _starting(lm: MaskedDiffusionLM, patches: Patches, layer: int, *, inside: bool) -> Tensor:
    """Patches [n] that start at `layer`: those that have to be there while the block runs, or those that replace its output.

    A window of layers, and a block that something else is attached to, are patched while the block runs.
    """
    hooked = any(module._forward_hooks for module in lm.blocks[layer].modules())
    residual = torch.tensor([name == "resid" for name in patches.modules], device=patches.unit.device)[patches.module]
    within = ~residual & ((patches.last > layer) | hooked)
    return ((patches.first == layer) & (within == inside)).nonzero().squeeze(1)


def _replaced(
    lm: MaskedDiffusionLM, layer: int, inputs: Tensor, outputs: dict[str, Tensor], sources: Sources, patches: Patches
) -> Tensor:
    """Output [n, L, d] of block `layer` for patches that restore one of its modules, from the sources' outputs alone."""
    block, stack = lm.blocks[layer], lm.stack
    base = len(sources.clean) + patches.unit
    result = outputs["resid"][base]
    for index, name in enumerate(patches.modules):
        mine = (patches.module == index).nonzero().squeeze(1)
        if not len(mine):
            continue
        where = patches.where[mine]
        corrupted, clean = base[mine], sources.clean_of[patches.unit[mine]]
        output = outputs[name][clean][where]
        if name != "resid":
            attn = output if name == "attn" else outputs["attn"][corrupted][where]
            middle = stack.after_attn(block, inputs[corrupted][where], attn)
            mlp = output if name == "mlp" else _tensor(stack.run_mlp(block, middle.unsqueeze(0))).squeeze(0)
            output = stack.after_mlp(block, middle, mlp)
        changed = result[mine]
        changed[where] = output.to(changed.dtype)
        result[mine] = changed
    return result


@contextlib.contextmanager
def _restoring(
    lm: MaskedDiffusionLM, layer: int, sources: Sources, patches: Patches, rows: Tensor, count: int
) -> Iterator[None]:
    """While the block runs, the sequences of `rows` (after `count` sources) whose window holds `layer` are restored."""
    with contextlib.ExitStack() as stack:
        live = (patches.last[rows] >= layer) if count else torch.zeros_like(rows, dtype=torch.bool)
        for index, name in enumerate(patches.modules):
            mine = (live & (patches.module[rows] == index)).nonzero().squeeze(1)
            if name == "resid" or not len(mine):
                continue
            chosen = rows[mine]
            hook = _copier(count + mine, sources.clean_of[patches.unit[chosen]], patches.where[chosen])
            stack.callback(lm.site_module(Site(layer, name)).register_forward_hook(hook).remove)
        yield


def _copier(rows: Tensor, clean: Tensor, where: Tensor) -> Any:
    """Hook that copies the positions `where` [n, L] of the sequences `clean` [n] to the sequences `rows` [n]."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        values = _tensor(output)
        changed = values.clone()
        changed[rows] = torch.where(where.unsqueeze(-1), values[clean], values[rows])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def limits(lm: MaskedDiffusionLM, length: int, slots: int, memory: int) -> tuple[int, int]:
    """Sequences a batch, and sequences whose logits are taken at a time, within `memory` bytes of activations.

    Raises:
        RemaskError: not even one patched sequence with its clean and corrupted one fits; says how much is needed.
    """
    config = lm.model.config
    size = lm.embedding.weight.element_size()
    experts = getattr(config, "num_experts_per_tok", None)
    wide = int(getattr(config, "moe_intermediate_size" if experts else "intermediate_size", 4 * lm.hidden_size)) * (
        experts or 1
    )
    scores = 4 * int(config.num_attention_heads) * length * length
    sequence = length * (16 * lm.hidden_size + 4 * wide) * size + scores
    head = slots * int(lm.model.config.vocab_size) * (2 * size + 4 + 3 * 8)  # logits, log-softmax, fp64 confidences
    if memory // 2 < max(3 * sequence, head):
        need = 2 * max(3 * sequence, head) / 1e6
        raise RemaskError(
            f"tracing {length} tokens on {lm.name} needs {need:.0f} MB, more than the {memory / 1e6:.0f} MB given"
        )
    return memory // 2 // sequence, memory // 2 // head
