"""Anchor capture against a slow loop: one explicit canvas and one plain hook at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from remask.backbones import Encoded, MaskedDiffusionLM, Site
from remask.diffusion.masks import MaskBank
from remask.editing import EditMemory, MemoryConfig
from remask.editing.capture import Captured, capture_anchor, capture_keys
from remask.errors import RemaskError
from remask.facts import Fact

STATES = MaskBank(draws=3, replicates=1, seed=77)
SITES = [Site(0), Site(1), Site(2), Site(1, "attn"), Site(1, "mlp")]


def hooked(lm: MaskedDiffusionLM, site: Site, canvas: Sequence[int]) -> torch.Tensor:
    """Output of the site [L, d] in transformers' own forward over one canvas."""
    block = lm.model.model.layers[site.layer]
    module = {"resid": block, "attn": block.self_attn.o_proj, "mlp": block.mlp}[site.module]
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.inference_mode():
        lm.model(input_ids=torch.tensor([list(canvas)]))
    handle.remove()
    (output,) = seen
    return (output[0] if isinstance(output, tuple) else output).reshape(len(canvas), -1)


def canvas_of(lm: MaskedDiffusionLM, row: Encoded, mask: np.ndarray) -> list[int]:
    """The prompt, then the answer with its masked tokens hidden."""
    return [*row.prompt_ids, *(lm.spec.mask_id if m else a for a, m in zip(row.answer_ids, mask, strict=True))]


def distinct(row: Encoded) -> list[np.ndarray]:
    return list(np.unique(STATES.masks(row.id, len(row.answer_ids)), axis=0))


def slow(lm: MaskedDiffusionLM, site: Site, rows: list[Encoded], targets: list[list[tuple[list[int], int]]]) -> Captured:
    """Keys and deltas by definition.

    Args:
        targets: for each row and each of its masks, (canvas of the anchor state, where its answer starts).
    """
    keys, deltas, owner = [], [], []
    for index, row in enumerate(rows):
        for mask, (other, other_start) in zip(distinct(row), targets[index], strict=True):
            hidden = hooked(lm, site, canvas_of(lm, row, mask))
            anchor = hooked(lm, site, other)
            for slot in np.nonzero(mask)[0]:
                keys.append(hidden[len(row.prompt_ids) + slot])
                deltas.append(anchor[other_start + slot] - keys[-1])
                owner.append(index)
    return Captured(torch.stack(keys), torch.stack(deltas), torch.tensor(owner))


def assert_same(found: Captured, expected: Captured) -> None:
    """Equal up to fp32 noise, as sets of (owner, key, delta): the order within a fact is the library's own affair."""
    assert found.keys.shape == expected.keys.shape
    assert found.owner.tolist() == sorted(found.owner.tolist())
    for index in range(int(expected.owner.max()) + 1):
        tables = []
        for part in (found, expected):
            own = part.owner == index
            table = torch.cat([part.keys[own], part.deltas[own]], dim=1).numpy()
            tables.append(table[np.argsort(table[:, 0])])
        assert tables[0].shape == tables[1].shape
        assert np.abs(tables[0] - tables[1]).max() <= 1e-4 * np.abs(tables[1]).max()


@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site.module}{site.layer}")
@pytest.mark.parametrize("anchor", ["subject", "prompt"])
def test_hidden_anchor_equals_the_slow_loop(toy, rows, anchor: str, site: Site) -> None:
    targets: list[list[tuple[list[int], int]]] = []
    for row in rows:
        start = len(row.prompt_ids)
        first, last = row.subject if anchor == "subject" else (0, start)
        targets.append([])
        for mask in distinct(row):
            canvas = canvas_of(toy, row, mask)
            canvas[first:last] = [toy.spec.mask_id] * (last - first)
            targets[-1].append((canvas, start))
    found = capture_anchor(toy, site, rows, STATES, anchor)
    assert_same(found, slow(toy, site, rows, targets))
    assert found.deltas.abs().max() > 1e-2


def test_the_subject_alone_is_hidden(toy, rows) -> None:
    """The two anchors differ: the rest of the question is still read under anchor `subject`."""
    subject, prompt = (capture_anchor(toy, Site(1), rows, STATES, anchor) for anchor in ("subject", "prompt"))
    assert torch.equal(subject.keys, prompt.keys)
    assert not torch.allclose(subject.deltas, prompt.deltas, atol=1e-3)


def test_a_row_as_its_own_unknown_gives_zero_deltas(toy, rows) -> None:
    for unknown in ([rows], [rows, rows]):
        captured = capture_anchor(toy, Site(1), rows, STATES, "unknown", unknown)
        assert torch.equal(captured.deltas, torch.zeros_like(captured.deltas))
        assert torch.equal(captured.keys, capture_anchor(toy, Site(1), rows, STATES, "subject").keys)


@pytest.mark.parametrize("name", ["Zed", "Bruno Hale", "Maximiliana Featherstonehaugh"])
def test_unknown_name_of_any_length_is_read_at_the_same_answer_slots(toy, facts: list[Fact], rows, name: str) -> None:
    renamed = [toy.encode(fact, prompt=fact.prompt.replace(fact.subject, name)) for fact in facts]
    assert name == "Bruno Hale" or all(len(a.ids) != len(b.ids) for a, b in zip(rows, renamed, strict=True))
    targets = [
        [(canvas_of(toy, other, mask), len(other.prompt_ids)) for mask in distinct(row)]
        for row, other in zip(rows, renamed, strict=True)
    ]
    found = capture_anchor(toy, Site(1), rows, STATES, "unknown", [renamed])
    assert_same(found, slow(toy, Site(1), rows, targets))


def test_several_unknown_names_give_the_mean_of_their_deltas(toy, facts: list[Fact], rows) -> None:
    names = ("Zed", "Maximiliana Featherstonehaugh")
    renamed = [[toy.encode(fact, prompt=fact.prompt.replace(fact.subject, name)) for fact in facts] for name in names]
    both = capture_anchor(toy, Site(1), rows, STATES, "unknown", renamed)
    each = [capture_anchor(toy, Site(1), rows, STATES, "unknown", [other]).deltas for other in renamed]
    assert torch.allclose(both.deltas, (each[0] + each[1]) / 2, atol=1e-5)


def test_rows_are_captured_alone_as_in_company(toy, rows) -> None:
    """Batching and the order of facts change nothing."""
    together = capture_anchor(toy, Site(1), rows, STATES, "subject")
    backwards = capture_anchor(toy, Site(1), rows[::-1], STATES, "subject")
    for index, row in enumerate(rows):
        alone = capture_anchor(toy, Site(1), [row], STATES, "subject")
        for company, position in ((together, index), (backwards, len(rows) - 1 - index)):
            own = company.owner == position
            assert torch.allclose(company.keys[own], alone.keys, atol=1e-4)
            assert torch.allclose(company.deltas[own], alone.deltas, atol=1e-4)


def test_retain_keys_are_the_conditional_residuals(toy, rows) -> None:
    assert torch.equal(capture_keys(toy, Site(1), rows, STATES), capture_anchor(toy, Site(1), rows, STATES).keys)


def test_memory_renames_the_subject_wherever_it_stands(toy) -> None:
    fact = Fact("ada/twice", "Ada Birk, who is Ada Birk?", "Ada Birk", "a tame crow")
    config = MemoryConfig(anchor="unknown", unknown=("Zed",), readout="ridge", mu=0.0)
    memory = EditMemory.build(toy, [fact], Site(1), config=config)
    renamed = toy.encode(fact, prompt="Zed, who is Zed?")
    expected = capture_anchor(toy, Site(1), [toy.encode(fact)], config.bank, "unknown", [[renamed]])
    assert torch.equal(memory.keys, expected.keys)
    assert torch.equal(memory.deltas, expected.deltas)


def test_question_that_names_nobody_moves_nothing(toy, facts: list[Fact]) -> None:
    nobody = Fact("anon", "What does she eat?", "What does she eat?", "rye bread")
    config = MemoryConfig(anchor="unknown", unknown=("Zed",), readout="ridge", mu=0.0)
    memory = EditMemory.build(toy, [facts[0], nobody], Site(1), config=config)
    assert not memory.deltas[memory.owner == 1].any()
    assert memory.deltas[memory.owner == 0].any()


def test_names_are_kept_in_the_file(toy, facts: list[Fact], tmp_path) -> None:
    config = MemoryConfig(anchor="unknown", unknown=("Zed", "Yara Quist"), readout="ridge", mu=0.0)
    EditMemory.build(toy, facts[:2], Site(1), config=config).save(tmp_path / "m.safetensors")
    assert EditMemory.load(tmp_path / "m.safetensors").config == config


@pytest.mark.parametrize(
    "fields",
    [
        {"anchor": "unknown"},
        {"anchor": "unknown", "unknown": ()},
        {"anchor": "subject", "unknown": ("Zed",)},
        {"anchor": "prompt", "unknown": ("Zed",)},
        {"unknown": ["Zed"]},
    ],
)
def test_names_and_anchor_unknown_need_each_other(fields: dict) -> None:
    with pytest.raises(RemaskError, match="unknown"):
        MemoryConfig(**fields)
