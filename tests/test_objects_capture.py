"""Rewriting captures against explicit loops: one canvas and one plain hook at a time, and autograd for the head's shift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import FACTS, build_toy
from remask.backbones import MaskedDiffusionLM, Site
from remask.diffusion.masks import MaskBank
from remask.editing import EditMemory, MemoryConfig, SteeringVector, preset
from remask.editing import objects as module
from remask.editing.objects import capture_answers, capture_object, head_shift, predictions
from remask.errors import RemaskError
from remask.evaluation.generation import answers

STATES = MaskBank(draws=3, replicates=1, seed=77)
NEW = [replace(FACTS[0], target="Sligo"), replace(FACTS[1], target="a blind cat")]
KEPT = FACTS[2:]


def canvases(lm: MaskedDiffusionLM, row) -> list[tuple[list[int], list[int]]]:
    """(canvas, positions that are read) by definition: the answer alone, then with free slots up to the generation length."""
    start, found = len(row.prompt_ids), []
    stop = min(start + lm.spec.gen_length, lm.spec.max_length)
    for free in (0, stop - len(row.ids)):
        for mask in np.unique(STATES.masks(row.id, len(row.answer_ids)), axis=0):
            shown = [lm.spec.mask_id if hidden else token for token, hidden in zip(row.answer_ids, mask, strict=True)]
            read = [start + int(slot) for slot in np.nonzero(mask)[0]] + ([len(row.ids)] if free else [])
            found.append(([*row.prompt_ids, *shown, *[lm.spec.mask_id] * free], read))
    return found


def slow(lm: MaskedDiffusionLM, layer: int, rows) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Residuals, and (owner, token that belongs there, token that is said) of each."""
    keys, labels = [], []
    for owner, row in enumerate(rows):
        for canvas, read in canvases(lm, row):
            seen = []
            handle = lm.model.model.layers[layer].register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))
            with torch.inference_mode():
                logits = lm.model(input_ids=torch.tensor([canvas])).logits[0]
            handle.remove()
            hidden = (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).reshape(len(canvas), -1)
            for place in read:
                keys.append(hidden[place])
                labels.append((owner, (*row.ids, lm.spec.eos_id)[place], int(logits[place].argmax())))
    return torch.stack(keys), labels


def in_order(keys: torch.Tensor, labels: list[tuple[int, int, int]]) -> tuple[np.ndarray, list]:
    order = sorted(range(len(labels)), key=lambda i: (*labels[i], round(float(keys[i, 0]), 3), float(keys[i, 1])))
    return keys[order].numpy(), [labels[i] for i in order]


def targets(lm: MaskedDiffusionLM) -> list:
    return [lm.encode(fact, answer=fact.target) for fact in NEW]


@pytest.mark.parametrize("layer", [0, 2])
def test_predictions_are_those_of_the_slow_loop(taught, layer: int) -> None:
    rows = targets(taught)
    found = predictions(taught, Site(layer), rows, STATES)
    labels = list(zip(found.owner.tolist(), found.tokens.tolist(), found.said.tolist(), strict=True))
    assert [owner for owner, *_ in labels] == sorted(owner for owner, *_ in labels)
    got, expected = in_order(found.keys, labels), in_order(*slow(taught, layer, rows))
    assert got[1] == expected[1]
    assert np.abs(got[0] - expected[0]).max() <= 1e-4 * np.abs(expected[0]).max()
    assert {said == token for _, token, said in labels} == {True, False}  # the taught model ends answers where they end


def test_retain_keys_are_read_in_the_same_kinds_of_states(taught) -> None:
    expected, labels = slow(taught, 1, [taught.encode(fact) for fact in KEPT])
    got = capture_answers(taught, Site(1), KEPT, STATES)
    assert got.shape == expected.shape
    got, _ = in_order(got, [(0, 0, 0)] * len(got))
    expected, _ = in_order(expected, [(0, 0, 0)] * len(labels))
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_an_answer_as_long_as_generation_has_no_slots_behind_it(taught) -> None:
    fact = replace(NEW[0], target="a tame crow " * 8)
    row = taught.encode(fact, answer=fact.target)
    assert len(row.answer_ids) >= taught.spec.gen_length
    found = predictions(taught, Site(0), [row], STATES)
    hidden = sum(int(mask.sum()) for mask in np.unique(STATES.masks(row.id, len(row.answer_ids)), axis=0))
    assert len(found.keys) == 2 * hidden


# ------------------------------------------------------------------ the head's shift
def gpt2() -> MaskedDiffusionLM:
    """A head behind a LayerNorm with gain and bias."""
    toy = build_toy()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = GPT2Config(vocab_size=len(toy.tokenizer), n_embd=24, n_layer=2, n_head=2, n_positions=96)
        model = GPT2LMHeadModel(config)
        norm = model.transformer.ln_f
        with torch.no_grad():
            for parameter in (norm.weight, norm.bias):
                parameter.normal_(1.0, 0.3)
            model.transformer.wte.weight.mul_(20)
    return MaskedDiffusionLM(model, toy.tokenizer, toy.spec, "gpt2")


@pytest.mark.parametrize("build", [build_toy, gpt2])
def test_head_shift_is_the_least_norm_step_of_autograd(build) -> None:
    lm = build()
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(5, lm.hidden_size, generator=generator) + 0.5
    wanted = torch.tensor([7, 30, 30, 100, 211])
    margin = 4.0
    found = head_shift(lm, start, wanted, margin)
    exact = lm.model.double().requires_grad_(False)
    for row in range(len(start)):
        hidden = start[row].double()
        for _ in range(module.PASSES):
            hidden = hidden.clone().requires_grad_()
            with torch.enable_grad():
                logits = lm.stack.head(hidden)
                others = torch.cat([logits[: wanted[row]], logits[wanted[row] + 1 :]])
                gap = logits[wanted[row]] - others.max()
                (slope,) = torch.autograd.grad(gap, hidden)
            if gap < margin:
                hidden = hidden.detach() + slope * (margin - gap.detach()) / slope.square().sum()
        expected = (hidden.detach() - start[row].double()).float()
        assert torch.allclose(found[row], expected, rtol=1e-3, atol=1e-3 * float(expected.norm())), row
    assert exact is lm.model


def test_head_shift_closes_the_gap_and_is_zero_where_it_is_closed(toy) -> None:
    start = torch.randn(300, toy.hidden_size, generator=torch.Generator().manual_seed(2))  # more than one chunk
    wanted = torch.arange(300) % 200 + 5
    shift = head_shift(toy, start, wanted, 3.0)

    def gaps(hidden: torch.Tensor) -> torch.Tensor:
        logits = toy.stack.head(hidden)
        mine = logits.gather(1, wanted[:, None]).squeeze(1)
        return mine - logits.scatter(1, wanted[:, None], -torch.inf).amax(dim=1)

    assert (gaps(start) < 0).float().mean() > 0.9
    reached = gaps(start + shift)
    assert (reached > 0).float().mean() > 0.95 and reached.median() > 2.0  # the rest needs another pass or two
    again = head_shift(toy, start + 2 * shift, wanted, 0.5)
    assert (again[gaps(start + 2 * shift) >= 0.5] == 0).all()


# ------------------------------------------------------------------ the capture
def test_head_deltas_act_where_the_model_says_something_else(taught) -> None:
    found = predictions(taught, Site(1), targets(taught), STATES)
    captured = capture_object(taught, Site(1), NEW, STATES, margin=5.0)
    assert torch.equal(captured.keys, found.keys) and torch.equal(captured.owner, found.owner)
    wrong = found.said != found.tokens
    assert torch.equal(captured.deltas.any(dim=1), wrong)
    assert torch.equal(captured.deltas[wrong], head_shift(taught, found.keys[wrong], found.tokens[wrong], 5.0))


def test_a_donor_is_the_nearest_residual_that_says_the_token(taught) -> None:
    wrong = replace(FACTS[0], id="ada/wrong", answer="Sligo")  # nearest of all, but the model says Lucca there
    known = [*FACTS[3:], wrong]  # says "a blind cat" and "Sligo"; nobody says the first letters of "Quux"
    rewrites = [*NEW, replace(FACTS[2], target="Quux")]
    captured = capture_object(taught, Site(1), rewrites, STATES, margin=6.0, donors=known)
    plain = capture_object(taught, Site(1), rewrites, STATES, margin=6.0)
    found = predictions(taught, Site(1), [taught.encode(fact, answer=fact.target) for fact in rewrites], STATES)
    given = predictions(taught, Site(1), [taught.encode(fact) for fact in known], STATES)
    used = {"donor": 0, "head": 0}
    for i, (token, said) in enumerate(zip(found.tokens.tolist(), found.said.tolist(), strict=True)):
        best = None
        for j, residual in enumerate(given.keys):
            if int(given.tokens[j]) == token == int(given.said[j]):
                distance = float((residual - found.keys[i]).norm())
                if best is None or distance < best[0]:
                    best = (distance, residual)
        if said == token:
            assert not captured.deltas[i].any()
        elif best is None:
            used["head"] += 1
            assert torch.equal(captured.deltas[i], plain.deltas[i])
        else:
            used["donor"] += 1
            assert torch.allclose(found.keys[i] + captured.deltas[i], best[1], atol=1e-5)
    assert min(used.values()) > 0


# ------------------------------------------------------------------ the memory
REWRITE = preset("rewrite", beta=60.0)


def build(lm: MaskedDiffusionLM, facts=NEW, config: MemoryConfig = REWRITE) -> EditMemory:
    return EditMemory.build(lm, facts, Site(1), retain=KEPT, config=config)


def test_a_memory_rewrites_the_facts_and_nothing_else(taught) -> None:
    memory = build(taught)
    kept = [taught.encode(fact) for fact in KEPT]
    asked = [taught.encode(fact) for fact in NEW]
    assert answers(taught, asked) == [fact.answer for fact in NEW]
    before = answers(taught, kept)
    with memory.attached(taught):
        assert answers(taught, asked) == [fact.target for fact in NEW]
        assert answers(taught, kept) == before


@pytest.mark.parametrize("value", ["head", "donor"])
def test_a_memory_holds_every_key_of_both_sides(taught, value: str) -> None:
    memory = build(taught, config=preset("rewrite", value=value, margin=5.0))
    states = memory.config.bank
    captured = capture_object(taught, Site(1), NEW, states, margin=5.0, donors=KEPT if value == "donor" else ())
    assert torch.equal(memory.keys, captured.keys) and torch.equal(memory.deltas, captured.deltas)
    kept = capture_answers(taught, Site(1), KEPT, states)
    assert torch.equal(memory.retained.keys, kept) and memory.retained.count == len(kept)
    assert (memory.weights == 1).all()


def test_rewrites_come_go_and_are_put_together(taught, tmp_path) -> None:
    whole, first, second = build(taught), build(taught, NEW[:1]), build(taught, NEW[1:])
    for other in (first.add(taught, NEW[1:]), first + second):
        assert other.fact_ids == whole.fact_ids and other.hashes == whole.hashes
        assert torch.equal(other.retained.keys, whole.retained.keys)
        assert torch.allclose(other.keys, whole.keys, atol=1e-4) and torch.allclose(other.deltas, whole.deltas, atol=1e-2)
    files = {name: tmp_path / name for name in ("first", "less")}
    first.save(files["first"])
    (first + second).remove("ada/pet").save(files["less"])
    assert files["first"].read_bytes() == files["less"].read_bytes()
    assert EditMemory.load(files["first"]).config == REWRITE


def test_donors_are_needed_wherever_facts_are_captured(taught) -> None:
    config = preset("rewrite", value="donor")
    memory = build(taught, NEW[:1], config)
    with pytest.raises(RemaskError, match="'donor' is read from retain facts"):
        memory.add(taught, NEW[1:])
    assert memory.add(taught, NEW[1:], retain=KEPT).fact_ids == ("ada/city", "ada/pet")
    solved = {"readout": "ridge", "mu": 0.0, "target": "object"}
    assert MemoryConfig(**solved, value="donor").needs_retain and not MemoryConfig(**solved).needs_retain
    paper = preset("paper", target="object", value="donor")
    assert not paper.needs_retain  # its deltas come from the object itself


def test_settings_of_a_rewrite_that_are_refused() -> None:
    with pytest.raises(RemaskError, match="value 'wish' is unknown; choose one of head, donor"):
        preset("rewrite", value="wish")
    for margin in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(RemaskError, match="margin must be finite and positive"):
            preset("rewrite", margin=margin)


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (FACTS[:1], "'ada/city' has no target"),
        ([replace(FACTS[0], target=FACTS[0].answer)], "says every target already"),
    ],
)
def test_what_cannot_be_rewritten(taught, facts, message: str) -> None:
    with pytest.raises(RemaskError, match=message):
        capture_object(taught, Site(1), facts, STATES, margin=6.0)


def test_sites_and_models_that_cannot_be_read(taught, toy) -> None:
    with pytest.raises(RemaskError, match="residual stream"):
        capture_object(taught, Site(1, "mlp"), NEW, STATES, margin=6.0)
    with SteeringVector(torch.ones(32), Site(0)).attached(toy), pytest.raises(RemaskError, match="detach"):
        capture_object(toy, Site(1), NEW, STATES, margin=6.0)
    toy.model.model.norm = torch.nn.Sequential(toy.model.model.norm)
    toy.model.model.add_module("final_norm", toy.model.model.norm)
    del toy.model.model.norm
    with pytest.raises(RemaskError, match="more than a norm and a table"):
        head_shift(toy, torch.ones(1, 32), torch.tensor([5]), 1.0)
