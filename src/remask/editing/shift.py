"""What an edit adds to a residual, as modules: every number that acts is a buffer of fixed size, updated in place.

An attached edit is one of these modules called by a hook. Nothing in a forward depends on data, syncs with the host or
allocates from Python lists, so a model that was compiled or captured into a CUDA graph with the edit attached runs the new
numbers after `assign`, without compiling again.

Shapes: d hidden size, n keys (capacity: rows beyond a memory's own keys are zero and add nothing).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..errors import RemaskError

if TYPE_CHECKING:
    from typing_extensions import Self


class Shift(nn.Module, ABC):
    """Maps residuals [..., d] to what is added to them, [..., d], in the residuals' dtype (fp32 or wider).

    The last dimension of the first buffer of a kind is the hidden size. `free` names the buffers with a row a key, and what a
    row holds while there is no key in it.
    """

    free: ClassVar[dict[str, float]] = {}

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """The shift."""

    @property
    def width(self) -> int:
        """Hidden size d."""
        return int(next(self.buffers()).shape[-1])

    @property
    def capacity(self) -> int:
        """Keys that there is room for; 0 for a kind whose size does not depend on its keys."""
        return max((len(self.get_buffer(name)) for name in self.free), default=0)

    def padded(self, capacity: int) -> Self:
        """A copy, in storage of its own, with room for `capacity` keys; the added rows shift nothing.

        Raises:
            RemaskError: it has more keys.
        """
        if self.free and self.capacity > capacity:
            raise RemaskError(
                f"the edit has {self.capacity} keys and there is room for {capacity}; attach it with more capacity"
            )
        wider = copy.deepcopy(self)
        for name, value in self.free.items():
            buffer = wider.get_buffer(name)
            spare = buffer.new_full((capacity - len(buffer), *buffer.shape[1:]), value)
            setattr(wider, name, torch.cat([buffer, spare]))
        return wider

    def assign(self, other: Shift) -> None:
        """Take over the numbers of `other`, in place: the buffers keep their addresses, nothing is compiled again.

        Raises:
            RemaskError: another kind or hidden size, or more keys than there is room for; nothing has changed then.
        """
        if type(other) is not type(self) or other.width != self.width:
            raise RemaskError(
                f"a {type(other).__name__} over {other.width} dimensions cannot take the place of a {type(self).__name__} "
                f"over {self.width}; detach the old edit and attach the new one"
            )
        numbers = dict(other.padded(self.capacity).named_buffers())
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                buffer.copy_(numbers[name])


class ConstantShift(Shift):
    """The same vector [d] everywhere: steering."""

    vector: Tensor

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.register_buffer("vector", vector.float())

    def forward(self, hidden: Tensor) -> Tensor:
        """The vector at every position."""
        return self.vector.to(hidden.dtype).expand_as(hidden)


class LinearShift(Shift):
    """(h - centre) F with F = A^T D folded to [d, d]: a dense memory of any number of facts at the same cost."""

    matrix: Tensor
    centre: Tensor

    def __init__(self, matrix: Tensor, centre: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.float())
        self.register_buffer("centre", torch.zeros(matrix.shape[0]) if centre is None else centre.float())

    def forward(self, hidden: Tensor) -> Tensor:
        """One product."""
        return (hidden - self.centre.to(hidden.dtype)) @ self.matrix.to(hidden.dtype)


class TopShift(Shift):
    """S_q(A (h - centre)) D: only the `count` largest coefficients of a token act.

    Args:
        readout, values: A and D, [n, d]; values hold the strength.
        count: coefficients a token keeps; exactly that many, also where they tie.
        centre: [d], subtracted first.

    Attributes:
        room: coefficients that are selected, a fixed number; the `count` largest of them act.
    """

    free: ClassVar[dict[str, float]] = {"readout": 0.0, "values": 0.0}
    readout: Tensor
    values: Tensor
    centre: Tensor
    count: Tensor

    def __init__(self, readout: Tensor, values: Tensor, count: int, centre: Tensor | None = None) -> None:
        super().__init__()
        self.room = min(count, len(readout))
        self.register_buffer("readout", readout.float())
        self.register_buffer("values", values.float())
        self.register_buffer("centre", torch.zeros(readout.shape[1]) if centre is None else centre.float())
        self.register_buffer("count", torch.tensor(self.room, device=readout.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Two products with a selection between them."""
        return self.coefficients(hidden) @ self.values.to(hidden.dtype)

    def coefficients(self, hidden: Tensor) -> Tensor:
        """S_q(A (h - centre)): [..., n]."""
        dense = (hidden - self.centre.to(hidden.dtype)) @ self.readout.to(hidden.dtype).T
        top = dense.abs().topk(self.room, dim=-1).indices
        beyond = torch.arange(self.room, device=dense.device) >= self.count
        return torch.zeros_like(dense).scatter(-1, top, dense.gather(-1, top).masked_fill(beyond, 0.0))

    def padded(self, capacity: int) -> Self:
        """A copy with room for `capacity` keys, of which the same share may act."""
        wider = super().padded(capacity)
        wider.room = -(-self.room * capacity // self.capacity)
        return wider

    def assign(self, other: Shift) -> None:
        """Take over the numbers of `other`, in place.

        Raises:
            RemaskError: as for any shift, or it keeps more coefficients than are selected.
        """
        if isinstance(other, TopShift) and other.room > self.room and other.capacity <= self.capacity:
            raise RemaskError(
                f"the edit keeps {other.room} coefficients a token and the attached one selects {self.room}; "
                "detach the old edit and attach the new one"
            )
        super().assign(other)


class SoftmaxShift(Shift):
    """V softmax(beta cos(K, h)): a retrieval among forget keys (values: deltas) and retain keys (value: nothing).

    Args:
        keys: [n, d], forget and retain keys; cosines are taken after `centre` is subtracted from keys and residuals.
        values: [n, d], zero for retain keys.
        weight: [n], how many keys each stands for; zero = a free row.
        beta: inverse temperature.
        centre: [d].
    """

    free: ClassVar[dict[str, float]] = {"keys": 0.0, "values": 0.0, "bias": float("-inf")}
    keys: Tensor
    values: Tensor
    bias: Tensor
    centre: Tensor
    beta: Tensor

    def __init__(self, keys: Tensor, values: Tensor, weight: Tensor, beta: float, centre: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", nn.functional.normalize(keys.float() - centre.float(), dim=-1))
        self.register_buffer("values", values.float())
        self.register_buffer("bias", weight.float().log())
        self.register_buffer("centre", centre.float())
        self.register_buffer("beta", torch.tensor(float(beta), device=keys.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """The mean of the values under the softmax over keys."""
        unit = nn.functional.normalize(hidden - self.centre.to(hidden.dtype), dim=-1)
        scores = self.beta.to(hidden.dtype) * (unit @ self.keys.to(hidden.dtype).T) + self.bias.to(hidden.dtype)
        return scores.softmax(dim=-1) @ self.values.to(hidden.dtype)


class KernelShift(Shift):
    """exp(beta (cos(h, z) - 1)) B: a smooth function of the residual, given by its values around landmarks.

    Args:
        landmarks: z, [M, d], unit vectors; values: B, [M, d], strength included.
        beta: inverse temperature.
        centre: [d], subtracted from residuals before the cosine.
    """

    free: ClassVar[dict[str, float]] = {"landmarks": 0.0, "values": 0.0}
    landmarks: Tensor
    values: Tensor
    centre: Tensor
    beta: Tensor

    def __init__(self, landmarks: Tensor, values: Tensor, beta: float, centre: Tensor) -> None:
        super().__init__()
        self.register_buffer("landmarks", landmarks.float())
        self.register_buffer("values", values.float())
        self.register_buffer("centre", centre.float())
        self.register_buffer("beta", torch.tensor(float(beta), device=landmarks.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Two products with an exponential between them."""
        unit = nn.functional.normalize(hidden - self.centre.to(hidden.dtype), dim=-1)
        features = (self.beta.to(hidden.dtype) * (unit @ self.landmarks.to(hidden.dtype).T - 1)).exp()
        return features @ self.values.to(hidden.dtype)


class WhitenedShift(Shift):
    """Another shift in other coordinates: inner((h - centre) P).

    Args:
        inner: sees whitened residuals and puts out plain shifts.
        matrix: P, [d, d]; centre: [d].
    """

    matrix: Tensor
    centre: Tensor

    def __init__(self, inner: Shift, matrix: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("matrix", matrix.float())
        self.register_buffer("centre", centre.float())

    def forward(self, hidden: Tensor) -> Tensor:
        """One product more than the inner shift."""
        shifted: Tensor = self.inner((hidden - self.centre.to(hidden.dtype)) @ self.matrix.to(hidden.dtype))
        return shifted

    @property
    def capacity(self) -> int:
        """The inner shift's."""
        return self.inner.capacity

    def padded(self, capacity: int) -> Self:
        """A copy whose inner shift has room for `capacity` keys."""
        wider = copy.deepcopy(self)
        wider.inner = self.inner.padded(capacity)
        return wider

    def assign(self, other: Shift) -> None:
        """Take over the numbers of `other`, in place.

        Raises:
            RemaskError: as for any shift, and for the inner ones.
        """
        if isinstance(other, WhitenedShift):
            self.inner.assign(other.inner)  # first: what it refuses has then changed nothing
        super().assign(other)


class GatedShift(Shift):
    """g(h) delta with g(h) = clip(<h, k> / (|k|^2 + eps), 0, cap): one fact (TimeROME-DLM, equation 10)."""

    key: Tensor
    delta: Tensor
    cap: Tensor

    def __init__(self, key: Tensor, delta: Tensor, eps: float, cap: float) -> None:
        super().__init__()
        self.register_buffer("key", key.float() / (key.float().square().sum() + eps))
        self.register_buffer("delta", delta.float())
        self.register_buffer("cap", torch.tensor(float(cap), device=key.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """The gate of every position times the delta."""
        gate = (hidden @ self.key.to(hidden.dtype)).clamp(min=0).clamp(max=self.cap.to(hidden.dtype))
        return gate.unsqueeze(-1) * self.delta.to(hidden.dtype)


class CodebookShift(Shift):
    """The value of the nearest key, where that key is nearer than its radius; nothing elsewhere.

    Args:
        keys, values: [n, d]; radii: [n], 0 = the key never acts.
    """

    free: ClassVar[dict[str, float]] = {"keys": float("inf"), "values": 0.0, "radii": 0.0}
    keys: Tensor
    values: Tensor
    radii: Tensor

    def __init__(self, keys: Tensor, values: Tensor, radii: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", keys.float())
        self.register_buffer("values", values.float())
        self.register_buffer("radii", radii.float())

    def forward(self, hidden: Tensor) -> Tensor:
        """A look-up at every position."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        # By differences: from products, |h|^2 - 2 hk + |k|^2, the decision would depend on the batch and on TF32.
        distances = torch.cdist(flat, self.keys.to(hidden.dtype), compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.min(dim=-1)
        inside = nearest.values < self.radii[nearest.indices]
        values = self.values[nearest.indices].to(hidden.dtype)
        return torch.where(inside.unsqueeze(-1), values, 0.0).view_as(hidden)
