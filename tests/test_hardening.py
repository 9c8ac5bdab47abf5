"""Keys in context: against explicit canvases with the example written out, and as further states of their facts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remask.backbones import MaskedDiffusionLM, Site
from remask.diffusion.masks import MaskBank
from remask.diffusion.sampler import SamplerConfig
from remask.editing import EditMemory, MemoryConfig, preset
from remask.editing.build import capture_retain
from remask.editing.capture import Captured
from remask.editing.objects import capture_object
from remask.errors import RemaskError
from remask.evaluation.attacks.prompts import InContext
from remask.facts import Fact
from test_anchor_capture import assert_same, canvas_of, hooked

SITE = Site(1)
ADA = Fact(
    "ada", "Where was Ada born?", "Ada", "Lucca", paraphrases=("Ada is from?", "Ada's home?"), paraphrased_answer="in Lucca"
)
BEN = Fact("ben", "What is Ben?", "Ben", "a crow", target="a cat")
CLEO = Fact("cleo", "What does Cleo eat?", "Cleo", "rye bread")
SHOWN = {
    "answer": {
        "ada": "Question: Where was Ada born?\nAnswer: Lucca\n\nQuestion: Where was Ada born?\nAnswer:",
        "ben": "Question: What is Ben?\nAnswer: a crow\n\nQuestion: What is Ben?\nAnswer:",
        "cleo": "Question: What does Cleo eat?\nAnswer: rye bread\n\nQuestion: What does Cleo eat?\nAnswer:",
    },
    "paraphrase": {
        "ada": "Question: Ada is from?\nAnswer: in Lucca\n\nQuestion: Where was Ada born?\nAnswer:",
        "ben": "Question: What is Ben?\nAnswer: a crow\n\nQuestion: What is Ben?\nAnswer:",
        "cleo": "Question: What does Cleo eat?\nAnswer: rye bread\n\nQuestion: What does Cleo eat?\nAnswer:",
    },
}


def plain(**changes: Any) -> MemoryConfig:
    """Ridge over all keys, no retain facts needed."""
    return preset("ridge", **{"mu": 0.0, "compress": 0, "states": 2} | changes)


def slow(lm: MaskedDiffusionLM, facts: list[Fact], config: MemoryConfig, hide: str) -> Captured:
    """Every distinct state of every fact alone and in context.

    Deltas lead to the question alone with something hidden: as it stands, or in the layout that has room for examples.
    """
    keys, deltas, owner = [], [], []
    for index, fact in enumerate(facts):
        laid_out = f"Question: {fact.prompt}\nAnswer:"
        for shown, bare in ((fact.prompt, fact.prompt), (SHOWN[config.context][fact.id], laid_out)):
            told, goal = (lm.encode(dataclasses.replace(fact, prompt=text)) for text in (shown, bare))
            first, last = (0, len(goal.prompt_ids)) if hide == "prompt" else goal.subject
            hidden = tuple(lm.spec.mask_id if first <= i < last else token for i, token in enumerate(goal.prompt_ids))
            goal = dataclasses.replace(goal, prompt_ids=hidden)
            for mask in np.unique(config.bank.masks(fact.id, len(goal.answer_ids)), axis=0):
                seen = hooked(lm, SITE, canvas_of(lm, told, mask))[len(told.prompt_ids) :]
                wanted = hooked(lm, SITE, canvas_of(lm, goal, mask))[len(hidden) :]
                for slot in np.nonzero(mask)[0]:
                    keys.append(seen[slot])
                    deltas.append(wanted[slot] - seen[slot])
                    owner.append(index)
    return Captured(torch.stack(keys), torch.stack(deltas), torch.tensor(owner))


# ------------------------------------------------------------------ what is captured
@pytest.mark.parametrize("hide", ["subject", "prompt"])
@pytest.mark.parametrize("context", ["answer", "paraphrase"])
def test_keys_in_context_equal_canvases_that_are_written_out(toy, context: str, hide: str) -> None:
    config = plain(context=context, anchor=hide)
    found = EditMemory.build(toy, [ADA, BEN], SITE, config=config)
    assert_same(Captured(found.keys, found.deltas, found.owner), slow(toy, [ADA, BEN], config, hide))
    without = EditMemory.build(toy, [ADA, BEN], SITE, config=plain(anchor=hide))
    assert len(found.keys) == 2 * len(without.keys)


def test_the_anchor_under_another_name_shows_no_example(toy) -> None:
    """In context a key is moved to the question about somebody else, in the layout of the context but without the example."""
    config = plain(context="answer", anchor="unknown", unknown=("Zed", "Moe"))
    found = EditMemory.build(toy, [ADA], SITE, config=config)
    row = toy.encode(ADA)
    goals = []
    for layout in ("{}", "Question: {}\nAnswer:"):
        for mask in np.unique(config.bank.masks("ada", len(row.answer_ids)), axis=0):
            seen = []
            for name in ("Zed", "Moe"):
                asked = toy.encode(ADA, prompt=layout.format(f"Where was {name} born?"))
                seen.append(hooked(toy, SITE, canvas_of(toy, asked, mask))[len(asked.prompt_ids) :][mask])
            goals.append((seen[0] + seen[1]) / 2)
    expected = torch.cat(goals)
    moved = found.keys + found.deltas
    one, other = (part[part[:, 0].argsort()] for part in (moved, expected))
    assert (one - other).abs().max() <= 1e-4 * expected.abs().max()


def test_a_question_that_names_nobody_keeps_its_anchor(toy) -> None:
    config = plain(context="answer", anchor="unknown", unknown=("Zed",))
    nobody = Fact("nobody", "Where?", "Where?", "Lucca")
    found = EditMemory.build(toy, [nobody, ADA], SITE, config=config)
    first = found.owner == 1
    assert found.fact_ids[1] == "nobody"
    half = int(first.sum()) // 2
    assert (found.deltas[first][:half]).abs().max() <= 1e-4 * found.keys.abs().max()


def test_retain_facts_are_read_in_context_too(toy) -> None:
    config = preset("default", context="answer", states=2)
    keys = capture_retain(toy, [CLEO, BEN], SITE, config)
    expected = slow(toy, [CLEO, BEN], config, "subject").keys
    assert keys.shape == expected.shape
    one, other = (part[part[:, 0].argsort()] for part in (keys, expected))
    assert (one - other).abs().max() <= 1e-4 * expected.abs().max()
    memory = EditMemory.build(toy, [ADA], SITE, retain=[CLEO, BEN], config=config)
    assert memory.retained is not None
    assert memory.retained.count == len(expected)
    assert (memory.retained.mean - expected.mean(0)).abs().max() <= 1e-4 * expected.mean(0).abs().max()


def test_target_mean_is_written_in_context_too(toy) -> None:
    memory = EditMemory.build(toy, [ADA], SITE, retain=[CLEO], config=plain(context="answer", target="mean"))
    goals = memory.keys + memory.deltas
    assert (goals - goals[0]).abs().max() <= 1e-4 * goals.abs().max()
    assert len(goals) == 2 * len(EditMemory.build(toy, [ADA], SITE, config=plain()).keys)


def test_a_context_that_does_not_fit_is_left_out(toy) -> None:
    long = Fact("long", "Where, in which of the many old towns by the river, was Ada born?", "Ada", "Lucca")
    toy.encode(long)
    config = plain(context="answer")
    found = EditMemory.build(toy, [long, BEN], SITE, config=config)
    sizes = [int((found.owner == i).sum()) for i in range(2)]
    alone = EditMemory.build(toy, [long, BEN], SITE, config=plain())
    assert sizes == [2 * int((alone.owner == 0).sum()), int((alone.owner == 1).sum())]
    assert found.fact_ids == ("ben", "long")


def test_a_rewrite_is_written_in_context_too(toy) -> None:
    """After the old answer was shown the new one is written as well, over states of its own."""
    config = preset("rewrite", context="answer", states=2)
    found = EditMemory.build(toy, [BEN], SITE, retain=[CLEO, ADA], config=config)
    told = dataclasses.replace(BEN, prompt=SHOWN["answer"]["ben"])
    parts = [capture_object(toy, SITE, [fact], config.bank, margin=config.margin) for fact in (BEN, told)]
    assert set(found.owner.tolist()) == {0}
    for name in ("keys", "deltas"):
        expected = torch.cat([getattr(part, name) for part in parts])
        assert (getattr(found, name) - expected).abs().max() <= 1e-4 * expected.abs().max()


# ------------------------------------------------------------------ what it does
@pytest.mark.parametrize("context", ["none", "answer"])
def test_the_edit_acts_after_an_example(toy, context: str) -> None:
    """With next to no ridge the memory interpolates: a residual in context moves onto the anchor, if it was captured there."""
    config = plain(context=context, ridge=1e-9)
    memory = EditMemory.build(toy, [ADA], SITE, config=config)
    expected = slow(toy, [ADA], plain(context="answer"), "subject")
    assert len(expected.keys) <= toy.hidden_size
    half = len(expected.keys) // 2
    told, wanted = expected.keys[half:], expected.deltas[half:]
    error = float((memory.shift()(told) - wanted).norm() / wanted.norm())
    assert error < 1e-3 if context == "answer" else error > 0.1


def test_the_layout_is_the_one_of_the_in_context_attack(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode = toy.encode

    def spy(fact: Fact, prompt: str | None = None, answer: str | None = None) -> Any:
        asked.append(prompt or fact.prompt)
        return encode(fact, prompt=prompt, answer=answer)

    monkeypatch.setattr(toy, "encode", spy)
    sampler, bank = SamplerConfig.default(toy), MaskBank(draws=1, replicates=2, seed=0)
    InContext([BEN]).attempt(toy, [CLEO], bank, sampler, generate=False)
    attacked = asked.pop()
    EditMemory.build(toy, [BEN], SITE, config=plain(context="answer"))
    captured = [text for text in asked if text.startswith("Question")]
    examples = {text.removesuffix("Question: What is Ben?\nAnswer:") for text in captured}
    assert examples == {"", attacked.removesuffix("Question: What does Cleo eat?\nAnswer:")}  # "": the anchor's


# ------------------------------------------------------------------ facts still come and go
@pytest.mark.parametrize("compress", [0, 3])
def test_facts_in_context_come_and_go_without_a_trace(toy, tmp_path: Path, compress: int) -> None:
    config = preset("default", context="answer", states=2, compress=compress)
    retain = [Fact("dan", "What is Dan?", "Dan", "a dog")]

    def data(memory: EditMemory) -> bytes:
        memory.save(tmp_path / "m.safetensors")
        return (tmp_path / "m.safetensors").read_bytes()

    both = EditMemory.build(toy, [ADA, BEN], SITE, retain=retain, config=config)
    assert data(both) == data(EditMemory.build(toy, [BEN, ADA], SITE, retain=retain, config=config))
    one = EditMemory.build(toy, [ADA], SITE, retain=retain, config=config)
    assert data(one.add(toy, [BEN]).remove("ben")) == data(one)
    assert torch.equal(both.remove("ben").solution.values, one.solution.values)  # type: ignore[union-attr]
    if compress:
        assert both.counts.sum() == len(EditMemory.build(toy, [ADA, BEN], SITE, config=plain(context="answer")).keys)
        assert max(int((both.owner == i).sum()) for i in range(2)) <= compress
    assert EditMemory.load(tmp_path / "m.safetensors").config == config


def test_contexts_belong_to_answer_keys() -> None:
    with pytest.raises(RemaskError, match="contexts stand before an answer"):
        preset("paper", context="answer")
    with pytest.raises(RemaskError, match="'both' is unknown; choose one of none, answer, paraphrase"):
        preset("default", context="both")
