"""From the states of a step to its loss: the forwards of policy, start model and anchor over the same states.

The whole step is one forward of one module, which is what accelerate wraps to average gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones.model import MaskedDiffusionLM
from ...errors import RemaskError
from ..objectives import RETAIN, Loss, Method, Quantities
from ..states import States, roll_out
from .rows import Batch
from .weights import Trained, Values

DEPTH = 7 / 32  # of the block whose output RMU reads


@dataclass
class Terms:
    """What a phase minimises: `method` on forget rows plus `retain_weight` times the term `retain` on retain rows.

    Attributes:
        options: of the method.
        retain: name in `RETAIN`, or none.
        bfloat16: forwards run under bf16 autocast.
        reference: the never-trained model, where the anchor is one.
        held: values of the moving average (anchor `ema`) or of the reinforced model (`whp`).
    """

    method: Method
    options: Any
    retain: str
    retain_weight: float
    bfloat16: bool
    reference: MaskedDiffusionLM | None = None
    held: Values | None = None

    @property
    def retain_needs(self) -> frozenset[str]:
        """Needs of the retain term."""
        return frozenset() if self.retain == "none" else RETAIN[self.retain].needs

    @property
    def reads_start(self) -> bool:
        """Whether a forward of the start model is needed anywhere."""
        frozen = "anchor" in self.method.needs and self.options.anchor == "frozen"
        return frozen or "reference" in self.method.needs | self.retain_needs


class Objective(nn.Module):
    """The one module that accelerate or FSDP2 wrap; its forward runs `work`, so that everything happens inside it."""

    def __init__(self, trained: Trained, terms: Terms) -> None:
        super().__init__()
        self.trained, self.terms, self.lm = trained, terms, trained.lm
        self.model = trained.lm.model

    def forward(self, work: Callable[[], Any]) -> Any:
        """What `work` returns."""
        return work()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the rows of a batch, with gradient, and the rows' losses and parts, {name: [rows]}."""
        terms = self.terms
        lost: Loss = terms.method.loss(self.forget_quantities(batch), terms.options)
        loss = lost.rows.mean()
        parts = {"forget": lost.rows.detach()} | {f"forget_{name}": value for name, value in lost.parts.items()}
        if batch.retain is not None:
            held = RETAIN[terms.retain].loss(self.quantities(batch.retain, terms.retain_needs))
            loss = loss + terms.retain_weight * held.rows.mean()
            parts |= {"retain": held.rows.detach()}
        return loss, parts

    def forget_quantities(self, batch: Batch) -> Quantities:
        """Everything that the method reads."""
        needs, states = self.terms.method.needs, batch.forget
        if needs == {"preferred"}:  # the answer itself is not looked at
            refusal = self.quantities(self._drawn(batch.preferred), needs)
            return replace(refusal, preferred=refusal)
        if getattr(self.terms.options, "states", "drawn") == "generated":
            with self._forward():
                states = roll_out(self.lm, states, self.terms.options.rollout_steps)
        quantities = self.quantities(states, needs)
        if "preferred" in needs:
            quantities = replace(quantities, preferred=self.quantities(self._drawn(batch.preferred), needs))
        if "anchor" in needs:
            quantities = replace(quantities, anchor=self._anchor(states))
        if "reinforced" in needs:
            quantities = replace(quantities, anchor=self._held_logits(states.ids, states))
        return quantities

    def quantities(self, states: States, needs: frozenset[str]) -> Quantities:
        """Policy, with gradient, and start model under the same states."""
        compute = self._hidden if "hidden" in needs else self._logits
        policy = compute(states.ids, states)
        frozen = None
        if "reference" in needs:
            with torch.no_grad(), self.trained.start():
                frozen = compute(states.ids, states)
        places = states.scored.nonzero()
        common = (states.clean[states.scored], places[:, 0], states.row, states.weight, states.length)
        if "hidden" in needs:  # such terms read no prediction, so the blocks above do not run
            nothing = policy.new_zeros(len(policy), 0, dtype=torch.float32)
            return Quantities(nothing, *common, hidden=policy, hidden_reference=frozen)
        return Quantities(policy, *common, reference=frozen)

    @torch.no_grad()
    def _anchor(self, states: States) -> Tensor:
        """Logits without the prompt, of the model that the options name."""
        options, ids, attention = self.terms.options, states.ids, states.attention
        if options.prompt == "mask":
            ids = states.anchored(self.lm.spec.mask_id)
        elif options.prompt == "attention":
            attention = states.anchored(self.lm.spec.mask_id, "attention")
        states = replace(states, attention=attention)
        if options.anchor == "current":
            return self._logits(ids, states)
        if options.anchor == "ema":
            return self._held_logits(ids, states)
        if options.anchor == "never-trained":
            with self._forward():
                return self._drawn(self.terms.reference).logits(ids, attention, states.scored).float()
        with self.trained.start():
            return self._logits(ids, states)

    @torch.no_grad()
    def _held_logits(self, ids: Tensor, states: States) -> Tensor:
        with self.trained.holding(self._drawn(self.terms.held)):
            return self._logits(ids, states)

    def _logits(self, ids: Tensor, states: States) -> Tensor:
        """[n, V] at the scored positions, fp32."""
        with self._forward():
            return self.lm.logits(ids, states.attention, states.scored).float()

    def _hidden(self, ids: Tensor, states: States) -> Tensor:
        """[n, d] at the positions that emit the scored ones."""
        with self._forward():
            hidden = self.lm.run_to(hidden_layer(self.lm, self.terms.options), ids, states.attention)
        if self.lm.spec.shift:
            hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        return hidden[states.scored]

    def _forward(self) -> torch.autocast:
        # Without its cache: it would hold on to casts of weights across the exchange of their values, and to casts made
        # without gradients.
        return torch.autocast(self.lm.device.type, torch.bfloat16, enabled=self.terms.bfloat16, cache_enabled=False)

    @staticmethod
    def _drawn(value: Any) -> Any:
        if value is None:
            raise RemaskError("a quantity that the method reads was not drawn")
        return value


def hidden_layer(lm: MaskedDiffusionLM, options: Any) -> int:
    """The block whose output terms on hidden states read: the option `layer`, else one as deep as block 7 of 32.

    Raises:
        RemaskError: a layer outside the model.
    """
    layer: int | None = getattr(options, "layer", None)
    if layer is None:
        return min(round(DEPTH * lm.num_layers), lm.num_layers - 1)
    if layer >= lm.num_layers:
        raise RemaskError(f"layer {layer} is outside the model: {lm.name} has layers 0..{lm.num_layers - 1}")
    return layer


@contextlib.contextmanager
def recomputed_blocks(lm: MaskedDiffusionLM, wanted: bool) -> Iterator[None]:
    """Blocks are recomputed in the backward pass instead of keeping their activations."""
    if not wanted:
        yield
        return
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers recomputes in training mode alone; set on the block itself it leaves dropout off.
    blocks: list[Any] = list(lm.blocks)
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        lm.model.gradient_checkpointing_disable()
