"""Positional tracing against hooks set one by one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from remask.backbones import Encoded, MaskedDiffusionLM, Site, capture
from remask.diffusion.likelihood import target_logprobs
from remask.errors import RemaskError
from remask.tracing import TraceConfig, trace, trace_positions
from remask.tracing.positions import CLASSES, position_classes
from remask.tracing.protocol import Corruptor

CONFIG = TraceConfig(steps=2, draws=2)


def by_hand(lm: MaskedDiffusionLM, row: Encoded, draw: int, sites: list[Site], position: int) -> float:
    """Effect of restoring `position` at all of `sites`, on the fully masked canvas."""
    canvas = torch.tensor([[*row.prompt_ids, *[lm.spec.mask_id] * len(row.answer_ids)]])
    slots = torch.zeros_like(canvas, dtype=torch.bool)
    slots[:, len(row.prompt_ids) :] = True
    corruptor = Corruptor(lm, CONFIG)
    where = torch.zeros_like(canvas, dtype=torch.bool)
    where[:, slice(*row.subject)] = True
    with torch.inference_mode():
        with capture(lm, sites) as clean:
            lm.logits(canvas)
        values = []
        for restore in ([], sites):
            handles = []
            for site in restore:

                def put(_module, _inputs, output, site=site):
                    output = output.clone()
                    output[:, position] = clean[site][:, position]
                    return output

                handles.append(lm.site_module(site).register_forward_hook(put))
            with corruptor.acting(where, corruptor.noise(row, draw, 0)):
                logits = lm.logits(canvas, positions=slots)
            for handle in handles:
                handle.remove()
            values.append(float(target_logprobs(logits, torch.tensor(row.answer_ids)).double().sum()))
    return values[1] - values[0]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_every_position_layer_and_module_by_hand(toy, rows, window: int) -> None:
    row = rows[1]
    found = trace_positions(toy, [row], CONFIG, window=window, keep_unknown=True)
    [effects] = found.effects
    assert effects.shape == (toy.num_layers, 3, len(row.ids))
    for layer in range(toy.num_layers):
        for m, module in enumerate(found.modules):
            first = layer if module == "resid" else max(0, layer - window // 2)
            after = layer + 1 if module == "resid" else min(toy.num_layers, layer - window // 2 + window)
            sites = [Site(index, module) for index in range(first, after)]
            for position in (0, row.subject[0], row.subject[1] - 1, len(row.prompt_ids), len(row.ids) - 1):
                expected = sum(by_hand(toy, row, draw, sites, position) for draw in range(2)) / 2
                assert float(effects[layer, m, position]) == pytest.approx(expected, abs=1e-5)
    assert effects.abs().max() > 0.1


def test_rome_restores_ten_layers_from_five_below_to_four_above(toy, rows) -> None:
    """[max(0, l - 5), min(L, l + 5)) is what a window of ten means; with three layers that is all of them at every layer."""
    [effects] = trace_positions(toy, rows[1:2], CONFIG, window=10, keep_unknown=True).effects
    mlp = effects[:, 2]
    assert (mlp - mlp[0]).abs().max() <= 1e-5
    assert mlp.abs().max() > 0.01


def test_a_narrow_budget_gives_the_same_numbers(toy, rows) -> None:
    wide = trace_positions(toy, rows[1:2], CONFIG, window=2, keep_unknown=True)
    narrow = trace_positions(toy, rows[1:2], CONFIG, window=2, keep_unknown=True, memory=2_000_000)
    assert (wide.effects[0] - narrow.effects[0]).abs().max() <= 1e-5


def test_one_subject_token_at_the_first_step_is_the_temporal_trace_there(toy, rows) -> None:
    """With a subject of one token both tracers restore the same thing."""
    row = Encoded("one", rows[1].prompt_ids, rows[1].answer_ids, (2, 3))
    temporal = trace(toy, [row], CONFIG, keep_unknown=True).effects[0, :, :, 0, 0]
    positional = trace_positions(toy, [row], CONFIG, window=1, keep_unknown=True).effects[0][:, :, 2]
    assert (temporal - positional).abs().max() <= 1e-5


def test_a_later_step_reads_the_clean_canvas_of_that_step(toy, rows) -> None:
    row = Encoded("one", rows[1].prompt_ids, rows[1].answer_ids, (2, 3))
    sweep = trace(toy, [row], TraceConfig(steps=2, draws=2, readout="raw"), mode="sweep", keep_unknown=True)
    found = trace_positions(toy, [row], CONFIG, step=1, window=1, keep_unknown=True)
    assert (sweep.effects[0, :, :, 1, 1] - found.effects[0][:, :, 2]).abs().max() <= 1e-5
    with pytest.raises(RemaskError, match="has 2 steps; there is no step 2"):
        trace_positions(toy, [row], CONFIG, step=2, keep_unknown=True)


def test_classes_of_positions() -> None:
    row = Encoded("x", tuple(range(9)), (1, 2), (2, 5))
    assert position_classes(row) == (
        *["before subject"] * 2,
        "first subject",
        "middle subject",
        "last subject",
        "first after",
        *["further"] * 2,
        "last of prompt",
        *["answer slots"] * 2,
    )
    assert position_classes(Encoded("y", (7,), (1,), (0, 1))) == ("last subject", "answer slots")


def test_class_means_are_per_object_token(toy, rows) -> None:
    found = trace_positions(toy, rows[1:3], CONFIG, keep_unknown=True)
    means = found.by_class()
    assert means.shape == (2, toy.num_layers, 3, len(CLASSES))
    row, effects = rows[1], found.effects[0]
    slots = effects[:, :, len(row.prompt_ids) :].mean(-1) / len(row.answer_ids)
    assert torch.allclose(means[0, :, :, CLASSES.index("answer slots")], slots)
    last = effects[:, :, row.subject[1] - 1] / len(row.answer_ids)
    assert torch.allclose(means[0, :, :, CLASSES.index("last subject")], last)


def test_file_holds_effects_tokens_and_classes(toy, rows, tmp_path) -> None:
    found = trace_positions(toy, rows[1:2], CONFIG, keep_unknown=True)
    found.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as stream:
        header = json.loads(stream.metadata()["remask"])
        assert torch.equal(stream.get_tensor(rows[1].id), found.effects[0])
    assert header["tokens"][rows[1].id] == list(found.tokens[0])
    assert (header["model"], header["window"], header["unit"]) == (toy.fingerprint(), 1, "nats")


def test_unknown_objects_and_bad_windows(taught, facts) -> None:
    row = taught.encode(facts[1])
    wrong = Encoded("wrong", row.prompt_ids, row.answer_ids[::-1], row.subject)
    assert [kept.id for kept in trace_positions(taught, [row, wrong], CONFIG).rows] == [row.id]
    with pytest.raises(RemaskError, match="does not produce the object of any of the 1 facts"):
        trace_positions(taught, [wrong], CONFIG)
    with pytest.raises(RemaskError, match="window of 0 layers"):
        trace_positions(taught, [row], CONFIG, window=0)
