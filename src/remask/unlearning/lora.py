"""Low-rank adapters on the blocks of any family, and what they did to the weights.

W becomes W + s B A with A [r, in], B [out, r] and s = `SCALING` (peft's lora_alpha / r). Which layers is asked of the model
itself, not of a table of families: every linear layer of its blocks, and the fused parameters of a mixture's experts. Router,
embeddings and head stay as they are.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..backbones.model import MaskedDiffusionLM
from ..backbones.weight_edit import Change, LowRank
from ..errors import RemaskError

if TYPE_CHECKING:
    from peft import PeftModel

SCALING = 2
ROUTERS = ("gate", "router")  # of mixtures, where a version of transformers makes them linear layers


@dataclass(frozen=True)
class Targets:
    """What adapters are put on: dotted names of linear `modules`, and of fused expert `parameters` [experts, ., .]."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the parameters that these change."""
        return (*(f"{name}.weight" for name in self.modules), *self.parameters)


def find_targets(lm: MaskedDiffusionLM, patterns: Sequence[str] | None = None) -> Targets:
    """Linear layers and experts of the blocks.

    Args:
        patterns: dotted names or ends of them, `q_proj`, `mlp.down_proj`, with `*`, `?` and `[5-7]` as in a shell:
            `layers.[5-7].mlp.*`; None = all but routers. A router must be named.

    Raises:
        RemaskError: a pattern that matches nothing, or nothing at all to put adapters on.
    """
    found = _candidates(lm)
    if patterns is None:
        names = {name for name in (*found.modules, *found.parameters) if name.rpartition(".")[2] not in ROUTERS}
    else:
        names = {name for pattern in patterns for name in _matching(lm, found, pattern)}
    if not names:
        raise RemaskError(f"{lm.name} has no linear layers to put adapters on; train all weights (rank 0)")
    kept = ([name for name in group if name in names] for group in (found.modules, found.parameters))
    return Targets(*map(tuple, kept))


def _matching(lm: MaskedDiffusionLM, found: Targets, pattern: str) -> list[str]:
    names = (*found.modules, *found.parameters)
    chosen = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
    if not chosen:
        ends = sorted({".".join(name.rsplit(".", 2)[1:]) for name in names})
        raise RemaskError(f"target {pattern!r} matches nothing in the blocks of {lm.name}; there are {', '.join(ends)}")
    return chosen


def _candidates(lm: MaskedDiffusionLM) -> Targets:
    prefix = _prefix(lm)
    inside = [(f"{prefix}.{name}", module) for name, module in lm.blocks.named_modules()]
    modules = [name for name, module in inside if isinstance(module, nn.Linear | Conv1D)]
    experts = [f"{prefix}.{name}" for name, parameter in lm.blocks.named_parameters() if parameter.ndim == 3]
    return Targets(tuple(modules), tuple(experts))


def _prefix(lm: MaskedDiffusionLM) -> str:
    """Dotted name of the list of blocks."""
    return next(name for name, module in lm.model.named_modules() if module is lm.blocks)


@dataclass(frozen=True)
class Attached:
    """What peft put into a model."""

    lm: MaskedDiffusionLM
    parts: tuple[PeftModel, ...]

    def merge_and_unload(self) -> nn.Module:
        """Fold the adapters into the weights and take them off; returns the model."""
        for part in self.parts:
            part.merge_and_unload()
        self._leave()
        return self.lm.model

    def unload(self) -> None:
        """Take the adapters off: modules and weights are those that were there."""
        for part in self.parts:
            part.unload()
        self._leave()

    def _leave(self) -> None:
        # What peft leaves on the modules would make a second round believe that adapters are there.
        for module in (self.lm.model, self.lm.blocks):
            if hasattr(module, "peft_config"):
                del module.peft_config
        self.lm.model.requires_grad_(False)


def add_adapters(
    lm: MaskedDiffusionLM, rank: int, seed: int, targets: Targets | None = None, tokens: Sequence[int] = ()
) -> Attached:
    """Put trainable adapters into `lm.model`, in place; everything else is frozen. B starts at 0, so nothing changes yet.

    Args:
        targets: of `find_targets`, by default all.
        tokens: ids whose embeddings become trainable too.

    Raises:
        RemaskError: adapters on the model already, peft not installed, or too old for experts.
    """
    if any(hasattr(module, "base_layer") for module in lm.model.modules()):
        raise RemaskError(f"{lm.name} has adapters already; merge them first")
    try:
        from peft import LoraConfig, TrainableTokensConfig, get_peft_model
    except ImportError:
        raise RemaskError("LoRA needs peft; install remask[train]") from None
    targets = targets or find_targets(lm)
    # peft sees the blocks, not the model: for some mixtures it takes the names of dense layers for those of old experts.
    prefix = f"{_prefix(lm)}."
    options: dict[str, Any] = {}
    if targets.parameters:
        if "target_parameters" not in inspect.signature(LoraConfig).parameters:
            raise RemaskError(
                f"adapters on the experts of {lm.name} need peft 0.17 or newer; upgrade it, or name other targets"
            )
        options["target_parameters"] = [name.removeprefix(prefix) for name in targets.parameters]
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALING * rank,
        target_modules=[name.removeprefix(prefix) for name in targets.modules],
        fan_in_fan_out=lm.model.config.model_type == "gpt2",
        **options,
    )
    parts = []
    with torch.random.fork_rng(), warnings.catch_warnings():
        # About tied embeddings, whose other end peft adapts as well.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        torch.manual_seed(seed)
        if tokens:
            table = next(name for name, module in lm.model.named_modules() if module is lm.embedding)
            parts.append(get_peft_model(lm.model, TrainableTokensConfig(token_indices=list(tokens), target_modules=[table])))
        parts.append(get_peft_model(lm.blocks, config))
    return Attached(lm, tuple(parts))


@contextlib.contextmanager
def adapters_off(lm: MaskedDiffusionLM) -> Iterator[None]:
    """The start model inside the block: adapted layers compute what they did before, and no weight is copied."""
    layers = _layers(lm)
    for _, layer in layers:
        # Not `enable_adapters`: it takes the adapters out of autograd, in the middle of a step.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for _, layer in layers:
            layer._disable_adapters = False


def adapter_changes(lm: MaskedDiffusionLM) -> dict[str, Change]:
    """What the adapters add to each parameter, by the name that it has without them; unchanged ones are left out."""
    changes: dict[str, Change] = {}
    for path, layer in _layers(lm):
        change = _change(layer)
        if bool(change.left.any()) and bool(change.right.any()):
            changes[f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"] = change
    return changes


def _layers(lm: MaskedDiffusionLM) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in lm.model.named_modules() if hasattr(module, "lora_A")]


def _change(layer: Any) -> LowRank:
    """The product s B A in the layout of the layer's parameter."""
    down, up = (_whole(factor["default"].weight.detach()).float() for factor in (layer.lora_A, layer.lora_B))
    up = up * layer.scaling["default"]
    if getattr(layer, "num_experts", 1) == 1:
        transposed = layer.fan_in_fan_out
    else:  # peft stacks the experts of A along its rows, and those of B along its columns, rank by rank
        count = layer.num_experts
        down = down.reshape(count, -1, down.shape[-1])
        up = up.reshape(len(up), -1, count).permute(2, 0, 1)
        transposed = not getattr(layer, "_did_swap_in_out_features", False)
    left, right = (down.mT, up.mT) if transposed else (up, down)
    return LowRank(left.contiguous().clone(), right.contiguous().clone())


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that is split over processes, put together; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
