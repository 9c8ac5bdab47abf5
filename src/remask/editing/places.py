"""Where an edit goes in a module tree that somebody else built, and whether a hook there would run at all."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from ..backbones.model import MODULES, Site
from ..backbones.stacks import STACKS, stack_of
from ..errors import RemaskError

SHARDED = {"DataParallel", "FullyShardedDataParallel", "FSDPModule"}


def find_module(model: nn.Module, site: Site, module: nn.Module | str | None) -> nn.Module:
    """The module whose output is the site: `module` where it is given, else the site's own in the tree of `model`.

    Raises:
        RemaskError: no such module, several candidates, a site limited to steps.
    """
    if site.steps is not None:
        raise RemaskError("a live edit has no denoising clock; use a site without steps, or attach it to a MaskedDiffusionLM")
    if isinstance(module, nn.Module):
        return module
    if module is not None:
        try:
            return model.get_submodule(module)
        except AttributeError:
            raise RemaskError(f"{type(model).__name__} has no module {module!r}; see named_modules()") from None
    if site.module not in MODULES:
        raise RemaskError(f"site module {site.module!r} is unknown; choose one of {', '.join(MODULES)}")
    native = type(model).__name__ in STACKS and type(model).__module__.startswith("transformers.")
    stack: Any = stack_of(model) if native else None
    if stack is None and site.module != "resid":
        raise RemaskError(f"where {type(model).__name__} puts out its {site.module} is not known; name it with module=")
    blocks = stack.blocks if native else _blocks(model)
    if not 0 <= site.layer < len(blocks):
        raise RemaskError(f"site layer {site.layer} is outside the model, which has layers 0..{len(blocks) - 1}")
    block = blocks[site.layer]
    return block if site.module == "resid" else getattr(stack, site.module)(block)


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules of one class; lists inside such lists (experts) are no candidates."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    uniform = {n: m for n, m in lists.items() if len({type(b) for b in m}) == 1 and not isinstance(m[0], nn.ModuleList)}
    outer = {n: m for n, m in uniform.items() if not any(o != n and n.startswith(f"{o}." if o else "") for o in uniform)}
    longest = max((len(m) for m in outer.values()), default=0)
    best = [m for m in outer.values() if len(m) == longest]
    if len(best) != 1:
        found = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
        raise RemaskError(f"the blocks of {type(model).__name__} are not clear, its lists of modules: {found}; pass module=")
    return best[0]


def checked_name(model: nn.Module, target: nn.Module) -> str:
    """The target's dotted name, once it is known that a hook on it will run.

    Raises:
        RemaskError: it is no part of the model, or a part that is sharded or compiled.
    """
    names = [name for name, module in model.named_modules() if module is target]
    if not names:
        raise RemaskError(f"the {type(target).__name__} given as module= is not a part of this {type(model).__name__}")
    for name, module in model.named_modules():
        if not any(inner is target for inner in module.modules()):
            continue
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & SHARDED:
            raise RemaskError(f"{name or 'the model'} is wrapped in {type(module).__name__}; attach an edit to a plain copy")
        compiled = "OptimizedModule" in kinds or module._compiled_call_impl is not None
        if compiled or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            raise RemaskError(f"{name or 'the model'} is compiled and ignores new hooks; attach first, then compile")
    return names[0] or type(model).__name__


def device_of(model: nn.Module, target: nn.Module) -> torch.device:
    """Where the target computes.

    Raises:
        RemaskError: its weights are on the meta device.
    """
    weight = next(itertools.chain(target.parameters(), model.parameters()), torch.empty(0))
    if weight.is_meta:
        raise RemaskError("the weights at the site are not loaded (meta device); load them before attaching an edit")
    return weight.device
