"""Relearning: a short fine-tuning on part of what was forgotten, or on nothing but what was kept, brings the rest back.

The attacker trains low-rank adapters with the masked-diffusion loss while whatever is attached stays attached and acts, in
training and afterwards (an edit that is limited to denoising steps acts only while sampling). Facts that were trained on are
never counted. Afterwards the adapters are gone and the model is what it was, bit for bit.

An inference-time edit leaves the weights intact. Whoever can detach it needs no relearning: the edit-off control says what
that gives. This attack is about the edited model as a black box that can be fine-tuned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...errors import RemaskError
from ...facts import Fact
from ...random import digest, numpy_generator
from ...unlearning.adapting import adapters
from ...unlearning.trainer import TrainConfig, batches, masked_loss, schedule
from .asking import ask, encode
from .base import Attack, Attempt, Terms


class Relearning(Attack):
    """LoRA fine-tuning of the attacked state for `steps` steps, then plain questions.

    Args:
        source: `forget` trains on a share of the attacked facts, drawn by (seed, fact), and asks the others; `retain` trains on
            `retain` and asks all.
        fraction: of the facts of the source that are trained on, in (0, 1]; with `forget` at least one fact is left to ask.
        steps: optimizer steps of `batch_size` rows.
        rank: of the adapters, on every linear layer; the mask's embedding is trained too.
        learning_rate: of AdamW, without weight decay; warm-up over 5 % of the steps, then cosine.
        seed: of the choice of facts, the adapters, batches and noise.
        retain: facts of the source `retain`.
        batch_size: rows a step.

    Raises:
        RemaskError: a fraction outside of (0, 1], numbers that are not positive, or source `retain` without facts.
    """

    whole = True

    def __init__(
        self,
        source: Literal["forget", "retain"],
        fraction: float = 0.5,
        steps: int = 50,
        rank: int = 8,
        learning_rate: float = 1e-3,
        seed: int = 0,
        retain: Sequence[Fact] = (),
        batch_size: int = 8,
    ) -> None:
        if source not in ("forget", "retain") or (source == "retain") != bool(retain):
            raise RemaskError("relearning trains on forget facts, or on retain facts that it is given; not on both or on none")
        if not 0 < fraction <= 1 or min(steps, rank, batch_size) < 1 or learning_rate <= 0:
            raise RemaskError("relearning needs a fraction in (0, 1] and positive steps, rank, learning rate and batch size")
        self.source, self.fraction, self.retain = source, fraction, tuple(retain)
        self.steps, self.rank, self.batch_size, self.seed = steps, rank, batch_size, seed
        self.learning_rate = learning_rate
        self.name = f"relearning on {100 * fraction:g} % of the {source} rows"

    def describe(self) -> dict[str, Any]:
        """Kind, parameters, and a digest of the retain rows."""
        return {
            "kind": "relearning",
            "source": self.source,
            "fraction": self.fraction,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "rank": self.rank,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "retain": {"rows": len(self.retain), "digest": digest(*(fact.to_dict() for fact in self.retain))},
        }

    def split(self, facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
        """The facts to train on and the facts to ask; which ones does not depend on the order in which they come."""
        pool = list(facts if self.source == "forget" else self.retain)
        count = max(1, round(self.fraction * len(pool)))
        if self.source == "forget":
            count = min(count, len(pool) - 1)
        draw = {fact.id: numpy_generator(self.seed, "relearning", fact.id).random() for fact in pool}
        chosen = {fact.id for fact in sorted(pool, key=lambda fact: draw[fact.id])[: max(0, count)]}
        trained = [fact for fact in pool if fact.id in chosen]
        return trained, list(facts) if self.source == "retain" else [fact for fact in pool if fact.id not in chosen]

    def run(self, lm: MaskedDiffusionLM, facts: Sequence[Fact], terms: Terms) -> list[Attempt]:
        """Train, score and answer the facts that were not trained on, and take the adapters off.

        Raises:
            RemaskError: loss not finite, peft not installed, or adapters on the model already.
        """
        trained, asked = self.split(facts)
        rows = [item.row for item in encode(lm, trained, terms.sampler)]
        remaining = encode(lm, asked, terms.sampler)
        if not rows or not remaining:
            return []
        with adapters(lm, self.rank, self.seed):
            self._train(lm, rows)
            return ask(lm, remaining, terms)

    def _train(self, lm: MaskedDiffusionLM, rows: Sequence[Encoded]) -> None:
        config = TrainConfig(
            seed=self.seed, epochs=1, batch_size=self.batch_size, learning_rate=self.learning_rate, prompt_dropout=0.0
        )
        parameters = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        keys = (
            (batch, (epoch, index))
            for epoch in range(self.steps)  # an epoch has a step at least
            for index, batch in enumerate(batches(rows, config, epoch, lm.spec.gen_length, lm.spec.max_length))
        )
        with torch.inference_mode(False), torch.enable_grad():
            for step, (batch, key) in zip(range(self.steps), keys, strict=False):
                loss = masked_loss(lm, batch, config, key)
                if not math.isfinite(float(loss.detach())):
                    raise RemaskError(f"{self.name}, step {step + 1}: the loss is not finite; lower learning_rate")
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, config.clip)
                optimizer.param_groups[0]["lr"] = self.learning_rate * schedule(step, self.steps, config.warmup)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                # Under an autocast of the caller's, the casts of these weights would outlive the step that changed them.
                torch.clear_autocast_cache()
