"""Attacks on the sampler: the same question decoded in another way. Whoever runs the model chooses how it denoises.

An edit that was tuned under one sampler may hold only along its trajectories: fewer steps, other blocks, another order and
noise visit other partial states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ...backbones.model import MaskedDiffusionLM
from ...diffusion.sampler import SamplerConfig
from ...errors import RemaskError
from ...facts import Fact
from .asking import ask, encode, reply
from .base import Attack, Attempt, Measure, Terms

FIELDS = frozenset(item.name for item in fields(SamplerConfig))


class SamplerChange(Attack):
    """Another setting of the sampler. It has no log-probability: recovered is the ROUGE-L recall of the output.

    Args:
        name: of the attack.
        changes: fields of `SamplerConfig`.

    Raises:
        RemaskError: a field that the sampler has not got.
    """

    measure: Measure = "recovered"

    def __init__(self, name: str, **changes: Any) -> None:
        unknown = sorted(set(changes) - FIELDS)
        if unknown:
            raise RemaskError(f"attack {name!r}: the sampler has no field {unknown[0]!r}")
        self.name, self.changes = name, changes

    def changed(self, sampler: SamplerConfig) -> SamplerConfig:
        """The sampler of the attack.

        Raises:
            RemaskError: a value that does not go with the others.
        """
        return replace(sampler, **self.changes)

    def describe(self) -> dict[str, Any]:
        """Kind and changed fields."""
        return {"kind": "sampler", **self.changes}

    def run(self, lm: MaskedDiffusionLM, facts: Sequence[Fact], terms: Terms) -> list[Attempt]:
        """Answer every fact; with `hide_prompt` there is nothing to measure and the attempts are empty."""
        settings = self.changed(terms.sampler)
        asked = encode(lm, facts, terms.sampler)
        if terms.hide_prompt:
            return [Attempt(item.row.id, len(item.row.answer_ids)) for item in asked]
        return reply(lm, asked, settings)


class FewerSteps(SamplerChange):
    """A share of the steps, so that several tokens commit at once and cannot look at one another.

    Args:
        share: of the sampler's steps a block (one a slot where it sets none), rounded up; in (0, 1).
    """

    def __init__(self, share: float = 0.25) -> None:
        if not 0 < share < 1:
            raise RemaskError(f"the share of the steps must be in (0, 1), not {share}")
        super().__init__(f"{100 * share:g} % of the steps")
        self.share = share

    def changed(self, sampler: SamplerConfig) -> SamplerConfig:
        """The same number of steps in every block."""
        return replace(sampler, steps=math.ceil(self.share * sampler.block_steps(sampler.gen_length)) * sampler.num_blocks)

    def describe(self) -> dict[str, Any]:
        """Kind and share."""
        return {"kind": "sampler", "steps": f"{self.share:g} of the steps"}


class OtherBlocks(SamplerChange):
    """Blocks where there were none, none where there were some.

    Args:
        length: of the blocks, in slots; the largest divisor of the response's length up to it is taken.
    """

    def __init__(self, length: int = 8) -> None:
        if length < 1:
            raise RemaskError(f"blocks of {length} slots are too short; give at least 1")
        super().__init__("other blocks")
        self.length = length

    def changed(self, sampler: SamplerConfig) -> SamplerConfig:
        """One block becomes several, several become one; where steps are set there are as many, or up to one a block more."""
        if sampler.num_blocks == 1 and not sampler.aligned:
            slots = sampler.gen_length
            block = max(size for size in range(1, min(self.length, slots) + 1) if slots % size == 0)
            other = replace(sampler, steps=None, block_length=block)
        else:
            other = replace(sampler, steps=None, block_length=None, aligned=False)
        if sampler.steps is None:
            return other
        return replace(other, steps=math.ceil(sampler.steps / other.num_blocks) * other.num_blocks)

    def describe(self) -> dict[str, Any]:
        """Kind and block length."""
        return {"kind": "sampler", "block_length": f"{self.length} slots, or one block where there were several"}


class Guidance(Attack):
    """Classifier-free guidance amplifies what the question adds to the prediction: logits u + (scale + 1) (c - u).

    u are the logits with everything given masked. Scored by `elbo` and decoded under the same guidance.

    Args:
        scale: LLaDA's `cfg_scale`; 0 = none.
    """

    def __init__(self, scale: float = 1.5) -> None:
        if not (math.isfinite(scale) and scale):
            raise RemaskError(f"guidance needs a scale that is finite and not 0, not {scale}")
        self.scale = scale
        self.name = f"guidance {scale:g}"

    def describe(self) -> dict[str, Any]:
        """Kind and scale."""
        return {"kind": "guidance", "cfg_scale": self.scale}

    def run(self, lm: MaskedDiffusionLM, facts: Sequence[Fact], terms: Terms) -> list[Attempt]:
        """Score and answer every fact under guidance."""
        guided = replace(terms, sampler=replace(terms.sampler, cfg_scale=self.scale))
        asked = encode(lm, facts, terms.sampler)
        return ask(lm, asked, guided, cfg_scale=self.scale)
