"""The attacks that a benchmark is put through by default, and the facts that each of them is run on."""

from __future__ import annotations

from ...backbones.model import MaskedDiffusionLM
from ...facts import Fact
from ..benchmarks.base import Benchmark
from .base import Attack
from .canvas import Infill, Prefill
from .prompts import (
    AFFIRMATIVE_SUFFIX,
    PREFIX_INJECTION,
    ROLE_PLAY,
    AnswerParaphrase,
    Family,
    InContext,
    QuestionParaphrase,
    Wording,
)
from .relearning import Relearning
from .sampling import FewerSteps, Guidance, OtherBlocks, SamplerChange
from .weights import BITS, Quantised, quantisable


def attacks_for(benchmark: Benchmark, lm: MaskedDiffusionLM, *, relearn: bool = False) -> list[Attack]:
    """Attacks that fit the benchmark's forget facts and the model, in a fixed order; names are unique.

    Wordings and in-context examples are for questions: they are left out where the forget facts are completions of a text.
    Rounding is left out where the model's weights are integers already.

    Args:
        benchmark: whose `forget` facts and probes of kind `attack` are used.
        lm: the model, in any state.
        relearn: also fine-tune, on half of the forget facts and on the benchmark's `fit` facts.
    """
    attacks: list[Attack] = [
        attack
        for attack in (QuestionParaphrase(), AnswerParaphrase())
        if any(attack.applies(fact) for fact in benchmark.forget)
    ]
    if _questions(benchmark):
        attacks += [
            InContext(benchmark.forget),
            Wording("prefix injection", PREFIX_INJECTION),
            Wording("affirmative suffix", AFFIRMATIVE_SUFFIX),
            Wording("role play", ROLE_PLAY),
        ]
    attacks += [
        Family.of(f"{benchmark.name.partition(':')[0]}: {name.rpartition('/')[2]}", probe)
        for name, probe in benchmark.probes.items()
        if probe.kind == "attack" and probe.side == "forget"
    ]
    attacks += [
        Prefill(),
        Infill(),
        Guidance(),
        FewerSteps(),
        OtherBlocks(),
        SamplerChange("random order", confidence="random"),
        SamplerChange("temperature 1", temperature=1.0),
    ]
    if quantisable(lm):
        attacks += [Quantised(bits) for bits in BITS]
    if relearn:
        attacks.append(Relearning("forget"))
        if benchmark.fit:
            attacks.append(Relearning("retain", fraction=1.0, retain=benchmark.fit))
    return attacks


def targets(attack: Attack, benchmark: Benchmark) -> list[Fact]:
    """The facts to pass to `attack.attempt`: a family's own prompts, else the forget facts that the attack applies to."""
    facts = attack.facts if isinstance(attack, Family) else benchmark.forget
    return [fact for fact in facts if attack.applies(fact)]


def _questions(benchmark: Benchmark) -> bool:
    """Whether the forget facts are questions and not beginnings of a text."""
    texts = {fact.id for probe in benchmark.probes.values() if probe.kind in ("completion", "cloze") for fact in probe.facts}
    return not any(fact.id in texts for fact in benchmark.forget)
