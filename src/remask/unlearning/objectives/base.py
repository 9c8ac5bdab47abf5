"""What every loss reads and returns.

A loss sees logits at the scored (hidden) response positions of S states of R rows and returns one number a row. All
randomness is in the states; a loss is a pure function. With c_i the cross-entropy of position i in nats,

    bound of a row = mean over its states of  weight * sum_i c_i,        weight = response length / scored positions,

an upper estimate of the row's negative log-likelihood; divided by the response length it is the mean over states of the mean
over scored positions.

Shapes: n scored positions, S states, R rows, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from ...errors import RemaskError

Side = Literal["policy", "reference"]
RetainName = Literal["mask-loss", "kl", "hidden", "none"]
Need = Literal["reference", "anchor", "reinforced", "hidden", "preferred"]

T = TypeVar("T")


class Options(BaseModel):
    """Base of every method's options; unknown names are errors."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Quantities:
    """What was computed at the scored positions of a batch of states, in row-major order of `States.scored`.

    Attributes:
        logits: [n, V] fp32 of the policy, the model that is trained; with gradient.
        target: [n], the tokens that are hidden.
        state: [n], index of each position's state.
        row: [S], index of each state's row.
        weight: [S], response length / scored positions.
        length: [R], response length.
        reference: [n, V] of the frozen model under the same states; any floating dtype, no gradient.
        anchor: [n, V] of the anchor, or of the reinforced model for `whp`; any floating dtype, no gradient.
        hidden: [n, d] of the policy at one layer, at the positions that emit the predictions; with gradient.
        hidden_reference: [n, d] of the frozen model.
        preferred: the same rows, in the same order, with a refusal as answer, under the same noise levels.
    """

    logits: Tensor
    target: Tensor
    state: Tensor
    row: Tensor
    weight: Tensor
    length: Tensor
    reference: Tensor | None = None
    anchor: Tensor | None = None
    hidden: Tensor | None = None
    hidden_reference: Tensor | None = None
    preferred: Quantities | None = None

    def cross_entropy(self, of: Side = "policy") -> Tensor:
        """Of the hidden tokens, [n] in nats."""
        logits = self.logits if of == "policy" else needed(self.reference, "reference").to(self.logits.dtype)
        return nn.functional.cross_entropy(logits, self.target, reduction="none")

    def logprob(self, of: Side = "policy") -> Tensor:
        """Log-probability of the hidden tokens, [n]."""
        return -self.cross_entropy(of)

    def per_state(self, values: Tensor) -> Tensor:
        """Sum over each state's positions: [n] to [S]."""
        return values.new_zeros(len(self.row)).index_add(0, self.state, values)

    def per_row(self, values: Tensor) -> Tensor:
        """Mean over each row's states of weight * sum: [n] to [R]."""
        weighted = self.per_state(values) * self.weight.to(values.dtype)
        states = torch.bincount(self.row, minlength=len(self.length))
        return values.new_zeros(len(self.length)).index_add(0, self.row, weighted) / states

    def per_token(self, values: Tensor) -> Tensor:
        """Mean over each row's states of the mean over their positions: [n] to [R]."""
        return self.per_row(values) / self.length

    def bound(self, of: Side = "policy") -> Tensor:
        """Each row's bound, [R] in nats."""
        return self.per_row(self.cross_entropy(of))


@dataclass(frozen=True)
class Loss:
    """A loss of every row [R], and what it is made of, by name: [R] each, detached."""

    rows: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: on the command line.
        loss: of a batch of forget rows; minimised.
        options: its hyper-parameters; defaults and their sources are in the class.
        needs: what `Quantities` must hold beside the policy; `reinforced` is held by `anchor`, `preferred` holds a reference
            where `reference` is needed too.
        retain: name of the term on retain rows in the source.
        needs_retain: a run without retain rows is refused.
        draws: states a row; more where noise enters through a log-sigmoid, which turns it into bias.
        calibrate: options with what is measured once, on the first batch of the start model; None = nothing is.
        summary, source: one line each.
    """

    name: str
    loss: Callable[[Quantities, Any], Loss]
    options: type[Options]
    summary: str
    source: str
    needs: frozenset[Need] = frozenset()
    retain: RetainName = "mask-loss"
    needs_retain: bool = False
    draws: int = 1
    calibrate: Callable[[Quantities, Any], Any] | None = None

    def parse(self, options: Mapping[str, Any]) -> Options:
        """The method's options.

        Raises:
            RemaskError: an unknown option, or a value out of range; names the option.
        """
        known = self.options.model_fields
        for name in options:
            if name not in known:
                raise RemaskError(f"{self.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
        try:
            return self.options.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            raise RemaskError(f"{self.name}: option {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def needed(value: T | None, what: Need) -> T:
    """The quantity, which the method's `needs` must name.

    Raises:
        RemaskError: it was not computed.
    """
    if value is None:
        raise RemaskError(f"the loss reads {what!r}, which was not computed; compute everything in the method's `needs`")
    return value
