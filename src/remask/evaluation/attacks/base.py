"""What an attack is: another way to ask for what was forgotten, applied alike to every state of the model.

An attack is run on the edited model, on the unedited one and on one that never knew (the floor): what it gives away for free,
such as half of the answer, helps all three, so that only the distance from the floor counts as knowledge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...backbones.model import MaskedDiffusionLM
from ...diffusion.masks import MaskBank
from ...diffusion.sampler import SamplerConfig
from ...facts import Fact

Measure = Literal["answer log-probability", "recovered"]


@dataclass(frozen=True)
class Attempt:
    """What an attack got out of one row.

    Attributes:
        id: the fact's.
        tokens: answer tokens that were not given away, hence scored.
        logprob: of those tokens under the attack, nats, with its Monte-Carlo standard error `stderr`; None where the attack
            lives in the sampler.
        output: generated text; `recovered`: share of the hidden text in it, 0..1. None where nothing was generated.
    """

    id: str
    tokens: int
    logprob: float | None = None
    stderr: float | None = None
    output: str | None = None
    recovered: float | None = None


@dataclass(frozen=True)
class Terms:
    """The options of `Attack.attempt`, which it explains."""

    bank: MaskBank
    sampler: SamplerConfig
    generate: bool
    hide_prompt: bool


class Attack(ABC):
    """One attack with its parameters.

    Attributes:
        name: unique among the attacks of an audit.
        measure: what its success is read off.
        whole: all rows have to be attacked in one call: the attack trains on some of them.
    """

    name: str
    measure: Measure = "answer log-probability"
    whole: bool = False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Kind and parameters, as JSON; recorded with every number."""

    def applies(self, fact: Fact) -> bool:
        """Whether the fact has what the attack needs."""
        return True

    def attempt(
        self,
        lm: MaskedDiffusionLM,
        facts: Sequence[Fact],
        bank: MaskBank,
        sampler: SamplerConfig,
        *,
        generate: bool,
        hide_prompt: bool = False,
    ) -> list[Attempt]:
        """Attack `facts`, in order; a row that would not fit the model's context is left out.

        Args:
            lm: the model in some state: interventions are attached already. It must be left as it was.
            facts: to which `applies` says yes.
            bank: masks of the log-probability, keyed by fact id.
            sampler: of the generation; attacks on the sampler change it.
            generate: also answer; an attack whose measure is `recovered` always does.
            hide_prompt: log-probability with the question masked (not what an attack reveals of the answer), and no
                generation: attempts of an attack that is measured by `recovered` are empty then.
        """
        return self.run(lm, facts, Terms(bank, sampler, generate, hide_prompt))

    @abstractmethod
    def run(self, lm: MaskedDiffusionLM, facts: Sequence[Fact], terms: Terms) -> list[Attempt]:
        """What `attempt` does, its options in one piece."""
