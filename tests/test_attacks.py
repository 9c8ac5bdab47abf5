"""Attacks: what the model sees, what is scored, and that nothing of an attack stays behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from conftest import FACTS, GOLDENS, build_toy
from remask.backbones import Encoded, MaskedDiffusionLM, Site, load
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.diffusion.sampler import SamplerConfig
from remask.editing import EditMemory, preset
from remask.errors import RemaskError
from remask.evaluation.attacks.base import Attack, Attempt
from remask.evaluation.attacks.canvas import HiddenBank, Infill, Prefill
from remask.evaluation.attacks.prompts import (
    AFFIRMATIVE_SUFFIX,
    PREFIX_INJECTION,
    ROLE_PLAY,
    AnswerParaphrase,
    Family,
    InContext,
    QuestionParaphrase,
    Wording,
)
from remask.evaluation.attacks.registry import attacks_for, targets
from remask.evaluation.attacks.relearning import Relearning
from remask.evaluation.attacks.report import Levels, regained
from remask.evaluation.attacks.sampling import FewerSteps, Guidance, OtherBlocks, SamplerChange
from remask.evaluation.attacks.weights import Quantised, block_weights, quantised, round_to_nearest
from remask.evaluation.benchmarks.base import Benchmark, Probe
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.evaluation.metrics.text import rouge_l_recall
from remask.facts import Fact
from remask.unlearning.adapting import adapters

BANK = MaskBank(draws=2, replicates=2)
ASKED = [
    replace(
        fact,
        group=fact.subject,
        paraphrases=("Never used", f"Say it: {fact.prompt}"),
        paraphrased_answer=f"it is {fact.answer}",
    )
    for fact in FACTS
]
PUBLISHED = [Fact(f"es/{fact.id}", f"¿{fact.prompt}", fact.subject, fact.answer) for fact in FACTS[:2]]
BENCHMARK = Benchmark(
    "toy:all",
    ASKED[:6],
    ASKED[6:],
    {},
    [],
    [],
    {
        "forget": Probe("question", "forget", ASKED[:6]),
        "level3/cross-lingual": Probe("attack", "forget", PUBLISHED, template="Answer: {prompt}"),
    },
)


@pytest.fixture(scope="module")
def model() -> MaskedDiffusionLM:
    """A random model with room for wordings and examples (read-only)."""
    lm = build_toy()
    lm.spec = replace(lm.spec, max_length=200)
    return lm


def sampler_of(lm: MaskedDiffusionLM) -> SamplerConfig:
    return SamplerConfig.default(lm)


def attempts(attack: Attack, lm: MaskedDiffusionLM, facts=ASKED, *, generate=False, **options) -> list[Attempt]:
    return attack.attempt(lm, facts, BANK, options.pop("sampler", sampler_of(lm)), generate=generate, **options)


@contextmanager
def canvases(lm: MaskedDiffusionLM) -> Iterator[list[list[int]]]:
    """Every canvas that goes through `lm.logits` inside the block."""
    seen: list[list[int]] = []
    original = lm.logits

    def spy(ids: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        seen.extend(ids.tolist())
        return original(ids, attention_mask, positions)

    lm.logits = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del lm.logits


def text_of(lm: MaskedDiffusionLM, ids: list[int]) -> str:
    return lm._tokenizer().decode(ids)


# ------------------------------------------------------------------ wording
@pytest.mark.parametrize(
    ("attack", "prompt", "answer"),
    [
        (QuestionParaphrase(), "Say it: Where was Ada Birk born?", "Lucca"),
        (AnswerParaphrase(), "Where was Ada Birk born?", "it is Lucca"),
        (Wording("role play", ROLE_PLAY), ROLE_PLAY.split("{")[0] + "Where was Ada Birk born?", "Lucca"),
        (Wording("prefix", PREFIX_INJECTION), PREFIX_INJECTION.split("{")[0] + "Where was Ada Birk born?", "Lucca"),
        (Wording("suffix", AFFIRMATIVE_SUFFIX), "Where was Ada Birk born?" + AFFIRMATIVE_SUFFIX.split("}")[1], "Lucca"),
        (Family("es", PUBLISHED, "Answer: {prompt} ?"), "Answer: Where was Ada Birk born? ?", "Lucca"),
    ],
)
def test_wordings_are_what_the_model_scores_and_answers(attack: Attack, prompt: str, answer: str) -> None:
    lm = build_toy()
    lm.spec = replace(lm.spec, max_length=200)
    row = lm.encode(ASKED[0], prompt=prompt, answer=answer)
    found = attempts(attack, lm, ASKED[:1], generate=True)
    with canvases(lm) as seen:
        assert attempts(attack, lm, ASKED[:1], generate=True) == found
    assert {tuple(canvas[: len(row.prompt_ids)]) for canvas in seen} == {row.prompt_ids}
    want = elbo(lm, [row], BANK)[0]
    assert (found[0].logprob, found[0].stderr, found[0].tokens) == (want.logprob, want.stderr, want.tokens)
    assert found[0].output is not None and found[0].recovered == rouge_l_recall(found[0].output, answer)


def test_a_question_paraphrase_needs_one() -> None:
    plain = Fact("x", "Who?", "Who?", "me")
    assert not QuestionParaphrase().applies(plain) and not AnswerParaphrase().applies(plain)
    assert QuestionParaphrase().applies(ASKED[0]) and AnswerParaphrase().applies(ASKED[0])
    for template in ("no place", "{prompt} {prompt}"):
        with pytest.raises(RemaskError, match="once"):
            Wording("x", template)


def test_examples_come_from_the_same_group_first_and_never_tell_the_answer(model: MaskedDiffusionLM) -> None:
    attack = InContext(ASKED, shots=3)
    for fact in ASKED:
        examples = attack.examples(fact)
        assert len(examples) == 3 and fact not in examples
        assert examples[0].group == fact.group and all(other.group != fact.group for other in examples[1:])
        assert examples == attack.examples(fact)
    assert any(attack.examples(fact) != InContext(ASKED, 3, seed=1).examples(fact) for fact in ASKED)
    long = replace(ASKED[0], id="ada/long", answer="Ada was born in lucca, near the wall.")
    assert InContext([*ASKED[:1], long]).examples(ASKED[0]) == []
    assert InContext([*ASKED[:1], long]).examples(long) == []


def test_examples_stand_solved_before_the_question_as_many_as_fit() -> None:
    lm = build_toy()
    lm.spec = replace(lm.spec, max_length=1000)
    attack = InContext(ASKED, shots=2)
    first, second = attack.examples(ASKED[0])
    head = f"Question: {first.prompt}\nAnswer: {first.answer}\n\n"
    tail = f"Question: {ASKED[0].prompt}\nAnswer:"
    full = head + f"Question: {second.prompt}\nAnswer: {second.answer}\n\n" + tail
    want = {examples: lm.encode(ASKED[0], prompt=text) for examples, text in {0: tail, 1: head + tail, 2: full}.items()}
    slots = max(len(want[0].answer_ids), lm.spec.gen_length)
    for shown in (2, 1, 0):
        lm.spec = replace(lm.spec, max_length=len(want[shown].prompt_ids) + slots)
        with canvases(lm) as seen:
            found = {attempt.id for attempt in attempts(attack, lm)}
        assert (ASKED[0].id in found) == (shown > 0)
        if shown:
            assert any(tuple(canvas[: -len(want[0].answer_ids)]) == want[shown].prompt_ids for canvas in seen)


# ------------------------------------------------------------------ canvas
@pytest.mark.parametrize("attack", [Prefill(0.25), Prefill(0.5), Prefill(0.9), Infill(0.5), Infill(0.3, seed=4)])
def test_the_canvas_holds_exactly_the_revealed_tokens(model: MaskedDiffusionLM, attack: Prefill | Infill) -> None:
    for fact in ASKED:
        row = model.encode(fact)
        length, start = len(row.answer_ids), len(row.prompt_ids)
        shown = ~attack.hidden(row)
        assert shown.sum() == min(math.ceil(attack.share * length), length - 1)
        if isinstance(attack, Prefill):
            assert shown.nonzero()[0].tolist() == list(range(int(shown.sum())))
        with canvases(model) as seen:
            attempts(attack, model, [fact])
        for canvas in seen:  # scoring: hidden tokens come and go, shown ones never do
            assert tuple(canvas[:start]) == row.prompt_ids and len(canvas) == len(row.ids)
            assert all(canvas[start + i] == row.answer_ids[i] for i in shown.nonzero()[0])
        with canvases(model) as seen:
            found = attempts(attack, model, [fact], generate=True)
        first = [canvas for canvas in seen if sum(t == model.spec.mask_id for t in canvas[start:]) >= length - shown.sum()][-1]
        slots = model.spec.gen_length if isinstance(attack, Prefill) else length
        want = [model.spec.mask_id] * max(slots, int(shown.sum()) + 1)
        for i in shown.nonzero()[0]:
            want[i] = row.answer_ids[i]
        assert [canvas for canvas in seen if canvas == [*row.prompt_ids, *want]]
        assert first[:start] == list(row.prompt_ids)
        assert found[0].tokens == length - shown.sum() and 0 <= found[0].recovered <= 1


def test_prefill_scores_the_rest_of_the_answer(model: MaskedDiffusionLM) -> None:
    rows = [model.encode(fact) for fact in ASKED]
    cuts = [min(math.ceil(0.4 * len(row.answer_ids)), len(row.answer_ids) - 1) for row in rows]
    moved = [
        Encoded(row.id, row.prompt_ids + row.answer_ids[:k], row.answer_ids[k:], row.subject)
        for row, k in zip(rows, cuts, strict=True)
    ]
    found = attempts(Prefill(0.4), model)
    for attempt, want in zip(found, elbo(model, moved, BANK), strict=True):
        assert (attempt.id, attempt.tokens) == (want.id, want.tokens)
        assert attempt.logprob == pytest.approx(want.logprob, abs=1e-5)
        assert attempt.stderr == pytest.approx(want.stderr, abs=1e-5)
    # The question hidden, the prefix in place.
    blind = [replace(row, prompt_ids=(model.spec.mask_id,) * len(old.prompt_ids) + old.answer_ids[:k])
             for row, old, k in zip(moved, rows, cuts, strict=True)]  # fmt: skip
    found = attempts(Prefill(0.4), model, generate=True, hide_prompt=True)
    assert [a.output for a in found] == [None] * len(rows)
    for attempt, want in zip(found, elbo(model, blind, BANK), strict=True):
        assert attempt.logprob == pytest.approx(want.logprob, abs=1e-5)


def test_infill_scores_the_hidden_tokens_given_the_shown_ones(model: MaskedDiffusionLM) -> None:
    attack = Infill(0.5)
    row = model.encode(ASKED[1])
    hidden = attack.hidden(row).nonzero()[0]
    assert len(hidden) >= 2
    # The bound is the mean of chains over all orders of the hidden tokens; a large bank must come close to it.
    shown = [i for i in range(len(row.answer_ids)) if i not in hidden]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(hidden) for _ in range(60)]
    totals = []
    with torch.inference_mode():
        for order in orders:
            total, canvas = 0.0, list(row.ids)
            start = len(row.prompt_ids)
            for i in hidden:
                canvas[start + i] = model.spec.mask_id
            for i in order:
                logits = model.logits(torch.tensor([canvas]))[0, start + i].float().log_softmax(-1)
                total += float(logits[row.answer_ids[i]])
                canvas[start + i] = row.answer_ids[i]
            totals.append(total)
    bank = MaskBank(draws=64, replicates=8)
    got = attack.attempt(model, [ASKED[1]], bank, sampler_of(model), generate=False)[0]
    error = math.hypot(got.stderr, np.std(totals) / math.sqrt(len(totals)))
    assert abs(got.logprob - np.mean(totals)) < 4 * error + 1e-3
    masks = HiddenBank(4, 2, 0, {row.id: attack.hidden(row)}).masks(row.id, len(row.answer_ids))
    assert not masks[:, shown].any() and masks.any(axis=1).all()


def test_rows_of_one_token_and_shares_out_of_range() -> None:
    lm = build_toy()
    letter = Fact("one", "Which letter?", "Which letter?", "e")
    assert len(lm.encode(letter).answer_ids) == 1
    assert attempts(Prefill(), lm, [letter]) == attempts(Infill(), lm, [letter]) == []
    for share in (0, 1, -0.5):
        with pytest.raises(RemaskError, match="share"):
            Prefill(share)


def test_infill_restores_what_was_learned(taught: MaskedDiffusionLM) -> None:
    for attack in (Infill(0.5), Prefill(0.25)):
        found = attempts(attack, taught, FACTS, generate=True)
        assert np.mean([attempt.recovered for attempt in found]) > 0.8


# ------------------------------------------------------------------ sampler and guidance
def test_sampler_changes_fit_any_sampler() -> None:
    whole, blocks = SamplerConfig(gen_length=24), SamplerConfig(gen_length=24, block_length=6)
    counted = SamplerConfig(gen_length=24, block_length=6, steps=8)
    grid = SamplerConfig(gen_length=24, block_length=4, aligned=True)
    assert FewerSteps().changed(whole).steps == 6
    assert FewerSteps().changed(blocks).steps == 8  # 6 a block, a quarter of it rounded up is 2
    assert FewerSteps().changed(counted).steps == 4
    assert FewerSteps().changed(grid).steps == 6
    assert OtherBlocks(8).changed(whole).block_length == 8
    assert OtherBlocks(7).changed(whole).block_length == 6
    assert OtherBlocks(8).changed(replace(whole, block_length=24)).block_length == 8
    assert OtherBlocks(8).changed(blocks).block_length is None
    assert OtherBlocks(8).changed(counted).steps == 8
    assert OtherBlocks(8).changed(replace(whole, steps=10)).steps == 12
    assert OtherBlocks(8).changed(grid) == replace(grid, aligned=False, block_length=None)
    assert SamplerChange("t", temperature=1.0).changed(whole) == replace(whole, temperature=1.0)
    with pytest.raises(RemaskError, match="no field"):
        SamplerChange("t", heat=1)


def test_sampler_changes_answer_under_the_changed_sampler(taught: MaskedDiffusionLM) -> None:
    base = sampler_of(taught)
    plain = attempts(SamplerChange("nothing"), taught, FACTS)
    assert np.mean([attempt.recovered for attempt in plain]) > 0.9
    assert all(
        a.logprob is None and a.recovered == rouge_l_recall(a.output, f.answer) for a, f in zip(plain, FACTS, strict=True)
    )
    before = taught.counters.forwards
    attempts(SamplerChange("nothing"), taught, FACTS[:1], sampler=replace(base, fill_after_eos=False))
    slow = taught.counters.forwards - before
    attempts(FewerSteps(), taught, FACTS[:1], sampler=replace(base, fill_after_eos=False))
    assert taught.counters.forwards - before - slow == slow / 4
    hot = SamplerChange("hot", temperature=3.0)
    texts = [attempt.output for attempt in attempts(hot, taught, FACTS)]
    assert texts == [attempt.output for attempt in attempts(hot, taught, FACTS)]  # the noise is keyed
    assert texts[2:] == [attempt.output for attempt in attempts(hot, taught, FACTS[2:])]  # by row, not by batch
    assert texts != [attempt.output for attempt in plain]
    assert attempts(hot, taught, FACTS, hide_prompt=True)[0] == Attempt(FACTS[0].id, len(taught.encode(FACTS[0]).answer_ids))


def test_guidance_by_hand(model: MaskedDiffusionLM) -> None:
    fact = Fact("one", "Which letter?", "Which letter?", "e")
    row = model.encode(fact)
    canvas = torch.tensor([[*row.prompt_ids, model.spec.mask_id]])
    with torch.inference_mode():
        conditional = model.logits(canvas)[0, -1].double()
        blind = model.logits(torch.full_like(canvas, model.spec.mask_id))[0, -1].double()
    for scale in (1.5, 0.5, -0.5):
        guided = (blind + (scale + 1) * (conditional - blind)).log_softmax(-1)[row.answer_ids[0]]
        assert attempts(Guidance(scale), model, [fact])[0].logprob == pytest.approx(float(guided), abs=1e-3)
    hidden = attempts(Guidance(), model, [fact], hide_prompt=True)[0].logprob
    assert hidden == pytest.approx(float(blind.log_softmax(-1)[row.answer_ids[0]]), abs=1e-4)
    with pytest.raises(RemaskError, match="scale"):
        Guidance(0)


# ------------------------------------------------------------------ quantisation
def slow_rounding(weight: Tensor, bits: int, size: int) -> Tensor:
    """Row by row, group by group, value by value."""
    result = weight.clone()
    top = 2 ** (bits - 1) - 1
    for r in range(weight.shape[0]):
        for c in range(0, weight.shape[1], size):
            group = weight[r, c : c + size]
            scale = max(abs(float(v)) for v in group) / top
            for i, value in enumerate(group):
                result[r, c + i] = 0.0 if scale == 0 else round(float(value) / scale) * scale
    return result


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [5, 16, 64])
def test_rounding_equals_the_slow_loop(bits: int, size: int) -> None:
    weight = torch.randn(6, 37, generator=torch.Generator().manual_seed(1))
    weight[2, :size] = 0
    assert torch.allclose(round_to_nearest(weight, bits, size), slow_rounding(weight, bits, size), atol=1e-6, rtol=1e-5)


def test_quantised_weights_act_and_come_back(taught: MaskedDiffusionLM) -> None:
    saved = {name: parameter.clone() for name, parameter in taught.model.named_parameters()}
    held = {name: parameter.data_ptr() for name, parameter in taught.model.named_parameters()}
    ids = torch.tensor([taught.encode(FACTS[0]).ids])
    with torch.inference_mode():
        plain = taught.logits(ids)
    moved = {}
    for bits in (8, 4):
        with pytest.raises(ZeroDivisionError), quantised(taught, bits, 16):
            for name, parameter in taught.model.named_parameters():
                inside = name.startswith("model.layers.") and parameter.ndim == 2
                want = slow_rounding(saved[name], bits, 16) if inside and ".0." in name else None
                if want is not None:
                    assert torch.allclose(parameter, want, atol=1e-6, rtol=1e-5)
                assert torch.equal(parameter, saved[name]) != inside
            with torch.inference_mode():
                moved[bits] = float((taught.logits(ids) - plain).abs().mean())
            raise ZeroDivisionError
        for name, parameter in taught.model.named_parameters():
            assert torch.equal(parameter, saved[name]) and parameter.data_ptr() == held[name]
    assert 0 < moved[8] < moved[4] / 4
    with pytest.raises(RemaskError, match="8 or 4 bits"):
        Quantised(3)


@pytest.mark.parametrize(("family", "options"), [("llada_moe", {"mask_id": 300}), ("dream", {})])
def test_experts_are_rounded_and_routers_are_not(family: str, options: dict) -> None:
    lm = load(GOLDENS / family, **options)
    found = {id(weight) for weight, _ in block_weights(lm)}
    for name, parameter in lm.model.named_parameters():
        inside = ".layers." in name and parameter.ndim >= 2 and not name.endswith(".gate.weight")
        assert (id(parameter) in found) == inside, name
    assert len(found) == len(block_weights(lm))


def test_weights_stored_as_inputs_by_outputs_are_rounded_along_their_inputs() -> None:
    layer = Conv1D(6, 37)  # GPT-2's linear layer: 37 inputs, weight [37, 6]
    saved = layer.weight.detach().clone()
    lm = SimpleNamespace(blocks=torch.nn.ModuleList([layer]), name="gpt")
    with quantised(lm, 4, 16):
        assert layer.weight.shape == saved.shape
        assert torch.allclose(layer.weight, slow_rounding(saved.T, 4, 16).T, atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.weight, saved)


def test_integer_weights_are_refused() -> None:
    lm = build_toy()
    lm.blocks[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    assert not [attack for attack in attacks_for(BENCHMARK, lm) if isinstance(attack, Quantised)]
    with pytest.raises(RemaskError, match="unquantised"), quantised(lm, 8):
        pass


# ------------------------------------------------------------------ relearning
def memory_of(lm: MaskedDiffusionLM, site: Site, facts=FACTS, **changes) -> EditMemory:
    config = preset("ridge", mu=0.0, **changes)
    return EditMemory.build(lm, facts, site, config=config)


def fingerprint_of(lm: MaskedDiffusionLM) -> tuple:
    """Everything that an attack could leave behind."""
    with torch.inference_mode():
        logits = lm.logits(torch.tensor([lm.encode(FACTS[0]).ids]))
    return (
        {name: (id(p), p.data_ptr(), p.requires_grad, p.dtype) for name, p in lm.model.named_parameters()},
        {name: p.clone() for name, p in lm.model.named_parameters()},
        {name: (id(m), type(m), m.training, len(m._forward_hooks)) for name, m in lm.model.named_modules()},
        sorted(key for key in vars(lm.model) if not key.startswith("_")),
        list(lm.attached),
        lm.clock.step,
        logits,
    )


def assert_same(one: tuple, other: tuple) -> None:
    assert (one[0], one[2:6]) == (other[0], other[2:6])
    assert all(torch.equal(p, other[1][name]) for name, p in one[1].items())
    assert torch.equal(one[6], other[6])


@pytest.mark.parametrize("site", [Site(1, "resid"), Site(1, "attn"), Site(2, "mlp")])
@pytest.mark.parametrize("q", [1.0, 0.25])
def test_relearning_with_the_edit_attached_brings_trained_rows_back(taught: MaskedDiffusionLM, site: Site, q: float) -> None:
    memory = memory_of(taught, site, q=q).with_alpha(1.0 if site.module == "resid" else 8.0)  # 15 nats or more are forgotten
    attack = Relearning("retain", fraction=1.0, steps=12, learning_rate=5e-3, retain=FACTS)
    rows = [taught.encode(fact) for fact in FACTS]
    plain = np.mean([score.logprob for score in elbo(taught, rows, BANK)])
    with memory.attached(taught):
        state = fingerprint_of(taught)
        edited = np.mean([score.logprob for score in elbo(taught, rows, BANK)])
        found = attempts(attack, taught, FACTS)
        assert_same(fingerprint_of(taught), state)
    assert np.mean([attempt.logprob for attempt in found]) > edited + 0.2 * (plain - edited)
    assert [attempt.id for attempt in found] == [fact.id for fact in FACTS]


def test_hooks_act_on_the_adapted_output(taught: MaskedDiffusionLM) -> None:
    """peft replaces the very layer that an attention site hooks; the edit must come after the adapter, not before."""
    memory = memory_of(taught, Site(1, "attn"))
    ids = torch.tensor([taught.encode(FACTS[0]).ids])
    with memory.attached(taught), adapters(taught, 2, 0):
        for parameter in taught.model.parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
        wrapper = taught.site_module(Site(1, "attn"))
        assert hasattr(wrapper, "base_layer")
        outputs = {}
        handles = [
            wrapper.base_layer.register_forward_hook(lambda m, i, o: outputs.__setitem__("base", o)),
            wrapper.register_forward_hook(lambda m, i, o: outputs.__setitem__("edited", o)),
            wrapper.lora_B["default"].register_forward_hook(lambda m, i, o: outputs.__setitem__("lora", o)),
        ]
        with torch.inference_mode():
            taught.logits(ids)
        for handle in handles:
            handle.remove()
        adapted = outputs["base"] + outputs["lora"] * wrapper.scaling["default"]
        want = adapted + (adapted @ memory.solution.readout.T) @ memory.deltas * memory.alpha
        assert not torch.allclose(adapted, outputs["base"], atol=1e-2)
        assert torch.allclose(outputs["edited"], want, atol=1e-4)
    with torch.inference_mode():  # detached after the adapters went: the handle still finds its hook
        plain = taught.logits(ids)
        with memory.attached(taught):
            assert not torch.equal(taught.logits(ids), plain)
        assert torch.equal(taught.logits(ids), plain)


def test_relearning_asks_only_what_it_was_not_trained_on(taught: MaskedDiffusionLM) -> None:
    attack = Relearning("forget", fraction=0.5, steps=1)
    trained, asked = attack.split(FACTS)
    assert len(trained) == 4 and sorted(f.id for f in trained + asked) == sorted(f.id for f in FACTS)
    assert {f.id for f in attack.split(FACTS[::-1])[1]} == {f.id for f in asked}
    assert Relearning("forget", seed=1).split(FACTS)[0] != trained
    assert [a.id for a in attempts(attack, taught, FACTS)] == [fact.id for fact in asked]
    assert len(Relearning("forget", fraction=1.0).split(FACTS)[1]) == 1
    assert attempts(attack, taught, FACTS[:1]) == []
    some = Relearning("retain", fraction=0.25, retain=FACTS[:4])
    assert len(some.split(FACTS)[0]) == 1 and some.split(FACTS)[1] == FACTS


def test_relearning_under_the_callers_autocast(taught: MaskedDiffusionLM) -> None:
    """Casts that outlive a step would freeze the adapters at their start, where they add nothing."""
    attack = Relearning("retain", steps=12, learning_rate=5e-3, retain=FACTS)
    rows = [taught.encode(fact) for fact in FACTS]
    with memory_of(taught, Site(1)).attached(taught), torch.autocast("cpu", torch.bfloat16):
        edited = np.mean([score.logprob for score in elbo(taught, rows, BANK)])
        assert np.mean([attempt.logprob for attempt in attempts(attack, taught, FACTS)]) > edited + 0.5


def test_relearning_refuses_what_it_cannot_do(taught: MaskedDiffusionLM) -> None:
    for bad in (
        {"source": "other"},
        {"source": "retain"},
        {"source": "forget", "retain": FACTS},
        {"source": "forget", "fraction": 0},
        {"source": "forget", "steps": 0},
    ):
        with pytest.raises(RemaskError):
            Relearning(**bad)
    state = fingerprint_of(taught)
    with pytest.raises(RemaskError, match="not finite"):
        attempts(Relearning("forget", steps=9, learning_rate=1e30), taught, FACTS)
    assert_same(fingerprint_of(taught), state)
    with adapters(taught, 2, 0), pytest.raises(RemaskError, match="already"), adapters(taught, 2, 0):
        pass
    assert_same(fingerprint_of(taught), state)


# ------------------------------------------------------------------ all attacks
ALL = attacks_for(BENCHMARK, build_toy(), relearn=True)
for _attack in ALL:
    if isinstance(_attack, Relearning):
        _attack.steps = 3


def test_the_default_list() -> None:
    names = [attack.name for attack in ALL]
    assert names == [
        "question paraphrase",
        "answer paraphrase",
        "in-context, 4 shots",
        "prefix injection",
        "affirmative suffix",
        "role play",
        "toy: cross-lingual",
        "prefill 25 %",
        "infill 50 %",
        "guidance 1.5",
        "25 % of the steps",
        "other blocks",
        "random order",
        "temperature 1",
        "8-bit weights",
        "4-bit weights",
        "relearning on 50 % of the forget rows",
        "relearning on 100 % of the retain rows",
    ]
    bare = replace(BENCHMARK, forget=list(FACTS[1:]), probes={"text": Probe("completion", "forget", FACTS[1:])}, fit=[])
    names = [attack.name for attack in attacks_for(bare, build_toy(), relearn=True)]
    assert names[0] == "prefill 25 %" and names[-1] == "relearning on 50 % of the forget rows"
    world = load_benchmark("closed-world", None)
    attacks = attacks_for(world, build_toy(), relearn=True)
    assert len({attack.name for attack in attacks}) == len(attacks) == 16
    assert len(targets(attacks[0], world)) == sum(bool(fact.paraphrases) for fact in world.forget)


def test_targets() -> None:
    family = next(attack for attack in ALL if isinstance(attack, Family))
    assert targets(family, BENCHMARK) == PUBLISHED
    assert targets(ALL[0], replace(BENCHMARK, forget=[*ASKED[:2], FACTS[3]])) == ASKED[:2]


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: attack.name)
def test_every_attack_leaves_the_model_as_it_was(model: MaskedDiffusionLM, attack: Attack) -> None:
    facts = targets(attack, BENCHMARK)
    with memory_of(model, Site(1)).attached(model):
        state = fingerprint_of(model)
        found = attempts(attack, model, facts, generate=True)
        assert_same(fingerprint_of(model), state)
    ids = [fact.id for fact in facts]
    assert found and [attempt.id for attempt in found] == [name for name in ids if name in {a.id for a in found}]
    for attempt in found:
        assert attempt.output is not None and 0 <= attempt.recovered <= 1 and attempt.tokens >= 1
        assert (attempt.logprob is None) == (attack.measure == "recovered")
        assert attempt.logprob is None or (attempt.logprob <= 0 and attempt.stderr >= 0)
    assert json.loads(json.dumps(attack.describe(), allow_nan=False)) == attack.describe()


@pytest.mark.parametrize("attack", ALL[:-2], ids=lambda attack: attack.name)
def test_a_hidden_prompt_says_the_same_whoever_is_asked_about(model: MaskedDiffusionLM, attack: Attack) -> None:
    """With the prompt masked only its length matters, so another question of that length scores the same; nothing is said."""
    facts = targets(attack, BENCHMARK)
    found = attempts(attack, model, facts, generate=True, hide_prompt=True)
    assert len(found) == len(attempts(attack, model, facts))
    assert all(attempt.output is None and attempt.recovered is None for attempt in found)
    with canvases(model) as seen:
        assert attempts(attack, model, facts, hide_prompt=True) == found
    if attack.measure == "recovered":
        assert not seen and all(attempt.logprob is None for attempt in found)
    else:
        longest = max(len(model.encode(f, answer=f.paraphrased_answer).answer_ids) for f in ASKED)
        assert seen and all(set(canvas[:8] + canvas[:-longest]) == {model.spec.mask_id} for canvas in seen)


@pytest.mark.parametrize("attack", ALL[:-2], ids=lambda attack: attack.name)
def test_rows_that_do_not_fit_are_left_out(attack: Attack) -> None:
    lm = build_toy()
    facts = targets(attack, BENCHMARK)
    long = replace(facts[1], id="long", prompt=facts[1].prompt + " again" * 60, paraphrases=(facts[1].prompt + " again" * 60,))
    tight = replace(facts[1], id="tight")  # prompt and answer fit, prompt and response do not
    while len(lm.encode(tight).prompt_ids) + lm.spec.gen_length <= lm.spec.max_length:
        tight = replace(tight, prompt=tight.prompt + "!", paraphrases=(tight.prompt + "!",))
    assert len(lm.encode(tight).ids) <= lm.spec.max_length
    found = [attempt.id for attempt in attempts(attack, lm, [facts[0], long, tight, facts[1]])]
    assert "long" not in found and "tight" not in found
    assert found == [attempt.id for attempt in attempts(attack, lm, [facts[0], facts[1]])]


# ------------------------------------------------------------------ what an attack regains
def levels(before: list[float], after: list[float], floor: list[float], first: int = 0) -> Levels:
    return Levels([f"r{first + i}" for i in range(len(before))], before, after, floor)


def test_regained_by_hand() -> None:
    plain = levels([-2.0, -4.0], [-8.0, -10.0], [-10.0, -12.0])  # every row: 2 of 8 nats are left
    attacked = levels([-1.0, -3.0], [-3.0, -5.0], [-5.0, -7.0])  # 2 of 4
    got = regained(plain, attacked)
    assert (got.known, got.known_attacked) == (0.25, 0.5)
    assert got.regained == pytest.approx(100 / 3)
    assert (got.low, got.high) == pytest.approx((100 / 3, 100 / 3))  # rows agree exactly
    assert (got.n, got.note) == (2, "")
    assert regained(plain, plain).regained == 0
    off = levels([-1.0, -3.0], [-1.0, -3.0], [-5.0, -7.0])
    assert regained(plain, off).regained == pytest.approx(100)
    worse = levels([-1.0, -3.0], [-5.0, -7.0], [-5.0, -7.0])
    assert regained(plain, worse).regained == pytest.approx(-100 / 3)
    json.dumps(got.to_dict(), allow_nan=False)


def test_regained_takes_means_before_quotients() -> None:
    plain = levels([4.0, 8.0], [1.0, 2.0], [0.0, 0.0])  # 1.5 / 6
    attacked = levels([2.0, 2.0], [0.0, 2.0], [0.0, 0.0])  # 1 / 2
    got = regained(plain, attacked)
    assert (got.known, got.known_attacked) == (0.25, 0.5) and got.regained == pytest.approx(100 / 3)
    # Joint resamples: (0,0) -> 1/4, 0; (0,1) -> 1/4, 1/2; (1,1) -> 1/4, 1. So -33.3 .. 100 at 95 %.
    assert (got.low, got.high) == pytest.approx((-100 / 3, 100))


def test_regained_pairs_rows_by_id_and_reads_the_same_rows() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(5, 15, 40)
    plain = levels(list(before), list(0.2 * before), [0.0] * 40)
    attacked = levels(list(before), list(0.2 * before), [0.0] * 40)
    got = regained(plain, attacked)
    assert (got.low, got.high) == pytest.approx((0, 0), abs=1e-9)  # joint: both sides move together
    shuffled = attacked.take([f"r{i}" for i in rng.permutation(40)])
    assert regained(plain, shuffled).regained == pytest.approx(0, abs=1e-9)
    # A part of the rows: the plain side is over the same part.
    known = np.where(np.arange(40) < 20, 0.2, 0.8) * before
    plain = levels(list(before), list(known), [0.0] * 40)
    part = plain.take([f"r{i}" for i in range(20)])
    assert regained(plain, part).known == pytest.approx(0.2) and regained(plain, part).regained == pytest.approx(0, abs=1e-9)
    # Rows of their own: independent, hence wider.
    noisy = levels(list(before), list(rng.uniform(0, 0.5, 40) * before), [0.0] * 40)
    other = Levels([f"x{i}" for i in range(40)], noisy.before, noisy.after, noisy.floor)
    together, apart = regained(noisy, noisy), regained(noisy, other)
    assert together.regained == pytest.approx(apart.regained, abs=1e-9)
    assert apart.high - apart.low > together.high - together.low + 1
    assert apart == regained(noisy, other) != regained(noisy, other, seed=1)


def test_regained_says_why_it_cannot_be_measured() -> None:
    good = levels([10.0, 12.0], [2.0, 2.4], [0.0, 0.0])
    kept = levels([10.0, 12.0], [9.8, 11.7], [0.0, 0.0])
    got = regained(kept, good)
    assert got.regained is None and "nothing was forgotten" in got.note and got.known == pytest.approx(21.5 / 22)
    unsure = levels([10.0, 10.0], [2.0, 14.0], [0.0, 0.0])  # 20 % forgotten on average, but one row says the opposite
    assert "nothing was forgotten" in regained(unsure, good).note
    blind = levels([1.0, -1.0], [0.0, 0.0], [0.2, -0.7])
    got = regained(good, blind)
    assert got.regained is got.low is got.high is got.known_attacked is None
    assert "under the attack" in got.note and got.known == pytest.approx(0.2)
    got = regained(blind, good)
    assert got.known is None and "asked plainly" in got.note
    assert regained(good, levels([], [], [])).note == regained(levels([], [], []), good).note == "no rows"


def test_levels_are_checked() -> None:
    with pytest.raises(RemaskError, match="floor"):
        Levels(["a"], [1.0], [1.0], [])
    with pytest.raises(RemaskError, match="after"):
        Levels(["a"], [1.0], [math.nan], [1.0])
    with pytest.raises(RemaskError, match="unique"):
        Levels(["a", "a"], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
