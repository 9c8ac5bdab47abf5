"""An edit that is alive in a running model: attached once, changed in place, on or off for each row, and exact.

The numbers of a `LiveEdit` are buffers of fixed size and address. A model that is compiled or captured into a CUDA graph
*after* the edit was attached runs a new edit, strength or set of rows without compiling or capturing again. A hook that comes
later never fires there: `attach` refuses a compiled module, and `LiveEdit.check` asks the running model itself.

Caches. Blocks up to the site do not depend on the edit; keys, values and features of the blocks above do. What was computed
under one `LiveEdit.version` must not be used under another: drop `past_key_values`, reset feature caches (dLLM-Cache,
dKV-Cache), and flush a server's prefix cache or make the version part of its key. `rows` leaves the version alone, since a row
that is on is what it was; a row that is off is the base model's and is keyed without a version. `hold` keeps a version for a
generation.

What is off has every bit of the base model in eager and captured code. Inductor keeps bf16 values unrounded inside the kernels
that it fuses, and an edit changes what is fused: there, compiled code with the edit off equals compiled code without it to bf16
rounding, and bit for bit under `torch._inductor.config.emulate_precision_casts = True`.

Several edits add up. At one site they act in the order in which they were attached; each sees what the one before put out.

Shapes: B sequences, L positions, d hidden size. Where an engine packs its sequences, [T, d], the rows are tokens.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backbones.model import Site, fingerprint
from ..errors import RemaskError
from .places import checked_name, device_of, find_module
from .shift import Shift

_VERSIONS = itertools.count(1)  # of the process: an edit that is attached later does not repeat a version


class Edit(Protocol):
    """What can be attached: an edit memory, a steering vector."""

    @property
    def site(self) -> Site:
        """Where it acts."""

    def shift(self) -> Shift:
        """What it adds there, strength included."""


def attach(
    model: nn.Module,
    edit: Edit,
    *,
    capacity: int | None = None,
    module: nn.Module | str | None = None,
    residual_pair: bool = False,
    batch_capacity: int | None = None,
    probe: Callable[[], Tensor] | None = None,
    same_model: bool = True,
) -> LiveEdit:
    """Hook `edit` into any model, on the model's device; move the model before, compile or capture it after.

    The model's own bookkeeping does not see it: `MaskedDiffusionLM.attached` and `state_dict` stay as they are.

    Args:
        model: the root of the module tree; of a `MaskedDiffusionLM` its `model`.
        capacity: keys that later edits may have; by default as many as this one has. Kinds without keys ignore it.
        module: the module, or its dotted name, whose output is the site. By default the site's module in transformers' own
            architectures; elsewhere block `site.layer` of the longest list of blocks of one class (for `resid` only).
        residual_pair: the module puts out (hidden, residual or None) and its true output is their sum, as in SGLang and vLLM.
        batch_capacity: largest batch whose rows `LiveEdit.rows` can tell apart; None = it is not used.
        probe: runs the model on a prompt that the edit changes; the edit is detached again unless it passes `LiveEdit.check`.
        same_model: refuse a model whose fingerprint is not the one that the edit was built on. The fingerprint reads names and
            values of all weights: switch it off for the same checkpoint under other names (remote code) or quantised.

    Raises:
        RemaskError: another model, no such module, several candidates, another hidden size, a compiled or sharded module, a
            site limited to steps, too little capacity, an edit that is attached already.
    """
    if isinstance(edit, LiveEdit):
        raise RemaskError(f"this edit is attached to {edit.where} already; attach the memory or vector that it was made from")
    if not isinstance(model, nn.Module):
        raise RemaskError(f"a {type(model).__name__} is not a torch module; pass its .model")
    if batch_capacity is not None and batch_capacity < 1:
        raise RemaskError(f"batch_capacity must be at least 1, not {batch_capacity}")
    target = find_module(model, edit.site, module)
    where = checked_name(model, target)
    built_on = getattr(edit, "model", "")
    if same_model and built_on and built_on != (found := fingerprint(model)):
        raise RemaskError(
            f"the edit was built on model {built_on}, this one is {found}; build it again, or pass same_model=False"
        )
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be changed in place later
        shift = edit.shift()
        # a copy keeps the layout in memory, with which products round as they do where the edit is attached by itself
        shift = copy.deepcopy(shift) if capacity is None else shift.padded(capacity)
        width = getattr(getattr(model, "config", None), "hidden_size", None) or shift.width
        if module is None and shift.width != width:
            raise RemaskError(f"the edit has {shift.width} dimensions and the model {width}; build the edit on this model")
        acting = _Acting(shift, where, residual_pair, batch_capacity).to(device_of(model, target))
    live = LiveEdit(acting, edit.site, target)
    if probe is not None:
        try:
            live.check(probe)
        except BaseException:
            live.detach()
            raise
    return live


class LiveEdit:
    """An attached edit; made by `attach`. Every change waits until no other thread is inside `hold` or `rows`.

    Attributes:
        site: the site; where: the dotted name of the hooked module.
    """

    def __init__(self, acting: _Acting, site: Site, target: nn.Module) -> None:
        self.site, self.where = site, acting.where
        self._acting, self._gate = acting, _Gate()
        self._strength, self._version = 1.0, next(_VERSIONS)
        self._handle: Any = target.register_forward_hook(acting.hook)

    @property
    def version(self) -> int:
        """Grows at every change of what acts, and belongs into the key of every cache above the site (see the module)."""
        return self._version

    @property
    def strength(self) -> float:
        """Factor on the edit's own strength, kept in fp32; an update leaves it alone."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not math.isfinite(value):
            raise RemaskError(f"strength must be a finite number, not {value}")
        with self._changing():
            self._acting.strength.fill_(value)
            self._strength = float(value)

    @property
    def enabled(self) -> bool:
        """Whether the edit acts; where it does not, every bit is the base model's."""
        return bool(self._acting.enabled)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        with self._changing():
            self._acting.enabled.fill_(value)

    def update(self, edit: Edit) -> None:
        """Put another edit in the place of this one, in place: nothing is compiled or captured again.

        Raises:
            RemaskError: another site, kind or hidden size, too many keys, detached, or called inside `hold`; nothing has
                changed then.
        """
        if edit.site != self.site:
            raise RemaskError(f"the new edit is for {edit.site}, this one is at {self.site}; attach the new one by itself")
        shift = edit.shift()
        with self._changing():
            self._acting.shift.assign(shift)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the edit as it is for the block: changes by other threads wait for it. Any number of threads may hold it.

        Threads that hold several edits take them in one order. Coroutines of one thread count as one.
        """
        with self._gate.shared():
            yield

    @contextlib.contextmanager
    def rows(self, mask: Tensor) -> Iterator[None]:
        """Within the block the edit acts on these rows of every batch only; other threads' generations wait.

        Args:
            mask: [B] bool, B at most `batch_capacity`. A forward of another batch size is refused; compiled or captured
                code cannot refuse, and there rows beyond the mask are off.

        Raises:
            RemaskError: attached without `batch_capacity`, a mask of another kind or size, or called inside `hold`.
        """
        flags = self._acting.rows
        if flags is None:
            raise RemaskError("this edit was attached without rows; attach it with batch_capacity=B")
        if mask.dtype != torch.bool or mask.dim() != 1 or not 0 < len(mask) <= len(flags):
            raise RemaskError(f"rows takes a bool mask [B] with B = 1..{len(flags)}, not {mask.dtype} {list(mask.shape)}")
        with self._alone():
            before = flags.clone(), self._acting.batch
            self._acting.batch = len(mask)
            flags.fill_(False)[: len(mask)].copy_(mask)
            self._settle()
            try:
                yield
            finally:
                self._settle()
                self._acting.batch = before[1]
                flags.copy_(before[0])

    def check(self, run: Callable[[], Tensor]) -> None:
        """Make sure that the edit is alive: `run` must give something else with it than without it.

        Args:
            run: runs the model as it will be used (compiled, captured) on an input that the edit is about; deterministic.

        Raises:
            RemaskError: the edit makes no difference, or `run` differs from call to call; says what to do.
        """
        with self._alone():
            was, self._acting.fired = self.enabled, False
            try:
                edited, base, again = (self._run(run, enabled) for enabled in (True, False, True))
            finally:
                self.enabled = was
        if not _same(edited, again):
            raise RemaskError("run() gives another result at every call, so nothing can be told from it; seed it")
        if not _same(edited, base):
            return
        if self._acting.fired:
            raise RemaskError(
                f"the edit at {self.where} runs but changes nothing here; probe with a prompt that it is about, and check its "
                "strength and rows"
            )
        raise RemaskError(
            f"the edit at {self.where} never acted: code that was compiled or captured into a CUDA graph before the edit was "
            "attached does not run it, nor does an engine that calls forward() directly or runs another copy of the model; "
            "attach first, then compile or capture"
        )

    def detach(self) -> None:
        """Take this edit and only it away, in whatever order; code compiled or captured with it becomes the base model's.

        Raises:
            RemaskError: not attached any more.
        """
        with self._changing():
            self._acting.enabled.fill_(False)  # compiled and captured code goes on running the hook
            self._handle.remove()
            self._handle = None

    def _run(self, run: Callable[[], Tensor], enabled: bool) -> Tensor:
        self.enabled = enabled
        return run().detach().clone()  # a captured graph puts every result in the same place

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._gate.exclusive():
            if self._handle is None:
                raise RemaskError(f"this edit is not attached to {self.where} any more; attach it again")
            self._settle()
            yield

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._alone():
            yield
            self._version = next(_VERSIONS)
            self._settle()

    def _settle(self) -> None:
        """Wait for the device: other threads may run on other streams."""
        if self._acting.strength.is_cuda:
            torch.cuda.synchronize(self._acting.strength.device)


class _Acting(nn.Module):
    """What the hook runs. It holds no lock and no handle, so a hooked model can be copied."""

    strength: Tensor
    enabled: Tensor
    rows: Tensor | None

    def __init__(self, shift: Shift, where: str, residual_pair: bool, batch_capacity: int | None) -> None:
        super().__init__()
        self.shift, self.where, self.residual_pair = shift, where, residual_pair
        self.fired = False
        self.batch: int | None = None  # rows that the flags are about; None = any number, all on
        self.register_buffer("strength", torch.ones(()))
        self.register_buffer("enabled", torch.tensor(True))
        self.register_buffer("rows", None if batch_capacity is None else torch.ones(batch_capacity, dtype=torch.bool))

    def hook(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """The module's output with the edit in it."""
        hidden, residual = self._pair(output) if self.residual_pair else (self._hidden(output), None)
        if hidden.shape[-1] != self.shift.width:
            raise RemaskError(f"{self.where} puts out {hidden.shape[-1]} dimensions and the edit has {self.shift.width}")
        if not torch.compiler.is_compiling():  # state of the host would be baked in
            self._note(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):  # the shift is computed in fp32 whatever runs around it
            wide = hidden if hidden.dtype == torch.float64 else hidden.float()
            total = wide if residual is None else wide + residual.to(wide.dtype)
            edited = (wide + self.strength.to(wide.dtype) * self.shift(total)).to(hidden.dtype)
        edited = torch.where(self._on(hidden), edited, hidden)  # chooses bits: adding 0 would turn -0 into 0 and inf into NaN
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    def _note(self, batch: int) -> None:
        self.fired = True
        if self.batch is not None and batch != self.batch:
            raise RemaskError(f"rows were given for a batch of {self.batch} and {self.where} sees {batch}; give a flag a row")

    def _on(self, hidden: Tensor) -> Tensor:
        """Whether the edit acts, a scalar or a flag a row that broadcasts over `hidden`."""
        if self.rows is None:
            return self.enabled
        if len(hidden) > len(self.rows):
            raise RemaskError(
                f"{self.where} sees a batch of {len(hidden)} and the edit was attached with batch_capacity={len(self.rows)}"
            )
        return (self.rows[: len(hidden)] & self.enabled).view(-1, *[1] * (hidden.dim() - 1))

    def _hidden(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        if type(output) is not tuple or not output or not isinstance(output[0], Tensor):
            raise RemaskError(
                f"{self.where} puts out a {type(output).__name__}, not a tensor or a tuple that starts with one; "
                "name another module="
            )
        if any(isinstance(other, Tensor) and other.shape == output[0].shape for other in output[1:]):
            raise RemaskError(
                f"{self.where} puts out several tensors of one shape; pass residual_pair=True if its output is the sum of two, "
                "else name another module="
            )
        return output[0]

    def _pair(self, output: Any) -> tuple[Tensor, Tensor | None]:
        if type(output) is tuple and len(output) == 2 and isinstance(output[0], Tensor):
            hidden, residual = output
            if residual is None or (isinstance(residual, Tensor) and residual.shape == hidden.shape):
                return hidden, residual
        raise RemaskError(f"{self.where} does not put out (hidden, residual) of one shape; attach without residual_pair")


class _Gate:
    """Many holders or one change at a time. A change that waits lets no new thread in; a thread may enter again."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._holders: Counter[int] = Counter()
        self._owner: int | None = None
        self._depth = self._waiting = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._moved:
            self._moved.wait_for(
                lambda: me == self._owner or me in self._holders or (self._owner is None and not self._waiting)
            )
            self._holders[me] += 1
        try:
            yield
        finally:
            with self._moved:
                self._holders[me] -= 1
                self._holders += Counter()  # drops who holds nothing
                self._moved.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._moved:
            if me in self._holders:
                raise RemaskError("this thread is inside hold(), which keeps the edit as it is; change the edit after it")
            self._waiting += 1
            try:
                self._moved.wait_for(lambda: me == self._owner or (self._owner is None and not self._holders))
                self._owner, self._depth = me, self._depth + 1
            finally:
                self._waiting -= 1
                self._moved.notify_all()
        try:
            yield
        finally:
            with self._moved:
                self._depth -= 1
                self._owner = me if self._depth else None
                self._moved.notify_all()


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal in shape and numbers; NaN equals NaN."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
