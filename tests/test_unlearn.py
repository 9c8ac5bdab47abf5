"""The trainer of unlearning: what it computes, shares between processes, resumes, refuses and leaves behind."""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import remask.backbones as backbones
from conftest import FACTS, GOLDENS, build_toy
from remask.backbones import Encoded, MaskedDiffusionLM, Site
from remask.backbones.weight_edit import LowRank, WeightEdit
from remask.diffusion.likelihood import elbo
from remask.editing import EditMemory, preset
from remask.errors import RemaskError
from remask.experiments.edits import load_edit
from remask.facts import Fact
from remask.unlearning.objectives import METHODS, Loss, Quantities
from remask.unlearning.states import Noise, draw_states
from remask.unlearning.training.config import UnlearnConfig
from remask.unlearning.training.loop import BANK, Phase
from remask.unlearning.training.objective import Objective, Terms, hidden_layer
from remask.unlearning.training.rows import Dealer, epoch_order, prepare_rows
from remask.unlearning.training.weights import Adapters, Weights
from remask.unlearning.unlearn import unlearn

pytest.importorskip("peft", reason="training needs remask[train]")
pytest.importorskip("accelerate", reason="training needs remask[train]")

FORGET, RETAIN, HELD_OUT = FACTS[:4], FACTS[4:6], FACTS[6:]
WRONG = ("Ghent", "a red fox", "Turin", "a mule")
UNKNOWN = [replace(fact, answer=answer) for fact, answer in zip(FORGET, WRONG, strict=True)]
SMALL: dict[str, Any] = {"steps": 3, "batch_size": 2, "rank": 2, "learning_rate": 1e-2, "precision": "fp32"}


def config_of(method: str, **settings: Any) -> UnlearnConfig:
    return UnlearnConfig(method=method, **{**SMALL, **settings})


def run(out: Path, method: str, lm: MaskedDiffusionLM | None = None, **settings: Any) -> WeightEdit:
    options = {key: settings.pop(key) for key in ("validation", "reference", "resume") if key in settings}
    return unlearn(lm or build_toy(), FORGET, RETAIN, config_of(method, **settings), out, **options)


def log_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "unlearn.json").read_text("utf-8"))


def metrics_of(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def tensors(edit: WeightEdit) -> list[Tensor]:
    changes = [edit.changes[name] for name in sorted(edit.changes)]
    return [change.dense() if isinstance(change, LowRank) else change for change in changes]


def level(lm: MaskedDiffusionLM, facts: Sequence[Fact]) -> float:
    return float(np.mean([score.logprob for score in elbo(lm, [lm.encode(fact) for fact in facts], BANK)]))


def logits(lm: MaskedDiffusionLM) -> Tensor:
    with torch.inference_mode():
        return lm.logits(torch.tensor([lm.encode(FACTS[0]).ids]))


# ------------------------------------------------------------------------------------------------ every method
@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_file_acts(tmp_path: Path, method: str, rank: int) -> None:
    lm = build_toy()
    base, fingerprint, parameters = logits(lm), lm.fingerprint(), dict(lm.model.named_parameters())
    edit = run(tmp_path, method, lm, rank=rank, learning_rate=1e-2 if rank else 1e-3)
    assert lm.fingerprint() == fingerprint and torch.equal(logits(lm), base)  # the model is as it came
    assert all(lm.model.get_parameter(name) is value for name, value in parameters.items())
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    loaded = load_edit(tmp_path / "edit.safetensors")
    assert isinstance(loaded, WeightEdit) and loaded.preset == method and loaded.fingerprint() == edit.fingerprint()
    with loaded.attached(lm):
        changed = logits(lm)
    assert changed.isfinite().all() and not torch.allclose(changed, base, atol=1e-4)
    log = log_of(tmp_path)
    assert (log["method"], log["steps"], len(log["losses"])) == (method, 3, 3)
    assert all(math.isfinite(value) for value in log["losses"])
    assert log["cost"]["forwards"] > 0 and log["cost"]["peak_memory"] > 0 and log["cost"]["processes"] == 1
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]
    assert [point["step"] for point in log["curve"]] == [0, 3]


def test_ascent_forgets_and_retain_terms_hold(taught: MaskedDiffusionLM, tmp_path: Path) -> None:
    before = level(taught, FORGET), level(taught, RETAIN)
    after = {}
    for method in ("ga", "graddiff", "npo"):
        edit = run(tmp_path / method, method, taught, steps=20, learning_rate=5e-3)
        with edit.attached(taught):
            after[method] = level(taught, FORGET), level(taught, RETAIN)
        curve = log_of(tmp_path / method)["curve"]
        assert (curve[0]["forget"], curve[0]["retain"]) == pytest.approx(before, abs=1e-6)
        # The curve measures the adapters, the edit the changed weights: one and the same model.
        assert (curve[-1]["forget"], curve[-1]["retain"]) == pytest.approx(after[method], abs=1e-2)
        assert curve[-1]["drift"] == pytest.approx(before[1] - curve[-1]["retain"])
    assert all(forget < before[0] - 3 for forget, _ in after.values())
    assert after["graddiff"][1] > after["ga"][1] + 1


def test_the_task_vector_is_subtracted(taught: MaskedDiffusionLM, tmp_path: Path) -> None:
    """Taught on other rows than it knows, it learns them; the edit does the opposite, `alpha` times."""
    config = config_of("task-vector", steps=20, learning_rate=5e-3, options={"alpha": 0.5})
    edit = unlearn(taught, UNKNOWN, (), config, tmp_path)
    curve = log_of(tmp_path)["curve"]
    assert edit.alpha == 0.5 and curve[-1]["forget"] > curve[0]["forget"] + 3
    with edit.with_alpha(-1.0).attached(taught):
        assert level(taught, UNKNOWN) == pytest.approx(curve[-1]["forget"], abs=1e-2)
    with edit.attached(taught):
        assert level(taught, UNKNOWN) < curve[0]["forget"]


def test_whp_reads_the_reinforced_model(taught: MaskedDiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phase 1 knows the rows better than the start model; phase 2 starts anew and reads its logits as anchor."""
    seen: list[Quantities] = []
    genuine = METHODS["whp"].loss
    spy = replace(METHODS["whp"], loss=lambda q, o: seen.append(q) or genuine(q, o))
    monkeypatch.setitem(METHODS, "whp", spy)
    unlearn(taught, UNKNOWN, RETAIN, config_of("whp", steps=10, learning_rate=2e-3), tmp_path)
    first = seen[0]
    torch.testing.assert_close(first.logits.detach(), first.reference)  # a fresh adapter
    assert first.anchor is not None
    surer = nn.functional.cross_entropy(first.anchor, first.target)
    assert surer < nn.functional.cross_entropy(first.reference, first.target)
    assert log_of(tmp_path)["cost"]["forwards"] == 10 + 10 * (3 + 1)


def test_refusals_are_those_of_the_editing_presets() -> None:
    assert UnlearnConfig(method="idk").refusal == preset("default").refusal


# ------------------------------------------------------------------------------------------------ quantities
def stirred(lm: MaskedDiffusionLM, **settings: Any) -> Adapters:
    """Adapters that act."""
    trained = Adapters(lm, config_of("npo", **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.named.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trained


def terms_of(method: str, retain: str = "none", **options: Any) -> Terms:
    return Terms(METHODS[method], METHODS[method].parse(options), retain, 1.0, False)


def test_adapters_off_are_the_start_model_to_the_bit() -> None:
    lm, plain = build_toy(), build_toy()
    states = draw_states(lm.spec, [lm.encode(fact) for fact in FORGET], Noise(draws=3), (0, 1), tail=2)
    quantities = Objective(stirred(lm), terms_of("npo")).quantities(states, frozenset({"reference"}))
    with torch.no_grad():
        expected = plain.logits(states.ids, states.attention, states.scored)
    assert quantities.reference is not None and torch.equal(quantities.reference, expected)
    assert not quantities.reference.requires_grad and quantities.logits.requires_grad
    assert not torch.allclose(quantities.logits, expected, atol=1e-2)
    assert torch.equal(quantities.target, states.clean[states.scored])
    assert torch.equal(torch.bincount(quantities.state, minlength=len(states.ids)), states.scored.sum(dim=1))


def test_all_weights_held_aside_are_the_start_model_to_the_bit() -> None:
    lm, plain = build_toy(), build_toy()
    states = draw_states(lm.spec, [lm.encode(fact) for fact in FORGET], Noise(), (0, 1), tail=0)
    trained = Weights(lm, config_of("npo", rank=0), with_start=True)
    with torch.no_grad():
        for parameter in trained.named.values():
            parameter.mul_(1.01)
    moved = trained.copy()
    quantities = Objective(trained, terms_of("npo")).quantities(states, frozenset({"reference"}))
    with torch.no_grad():
        expected = plain.logits(states.ids, states.attention, states.scored)
    assert quantities.reference is not None and torch.equal(quantities.reference, expected)
    assert all(torch.equal(parameter, moved[name]) for name, parameter in trained.named.items())
    # The policy's gradient is that of the moved weights although the start values were in their place meanwhile.
    found = torch.autograd.grad(quantities.cross_entropy().sum(), list(trained.named.values()))
    again = lm.logits(states.ids, states.attention, states.scored)
    loss = nn.functional.cross_entropy(again, quantities.target, reduction="sum")
    for one, other in zip(found, torch.autograd.grad(loss, list(trained.named.values())), strict=True):
        torch.testing.assert_close(one, other)


def test_the_anchors_of_mdu() -> None:
    """Each anchor's logits, recomputed from models and canvases that are put together by hand."""
    lm, plain, other = build_toy(), build_toy(), build_toy(seed=9)
    rows = [lm.encode(fact) for fact in FORGET]
    states = draw_states(lm.spec, rows, Noise(), (0, 1), tail=0)
    trained = stirred(lm)
    blind, attention = states.ids.clone(), torch.ones_like(states.ids) if states.attention is None else states.attention.clone()
    for s, r in enumerate(states.row):
        blind[s, : len(rows[r].prompt_ids)] = lm.spec.mask_id
        attention[s, : len(rows[r].prompt_ids)] = 0
    moved = {name: 2 * value for name, value in trained.copy().items()}
    with torch.no_grad():
        expected = {
            "frozen": plain.logits(blind, states.attention, states.scored),
            "current": lm.logits(blind, states.attention, states.scored),
            "never-trained": other.logits(blind, states.attention, states.scored),
            "attention": plain.logits(states.ids, attention, states.scored),
            "keep": plain.logits(states.ids, states.attention, states.scored),
        }
        with trained.holding(moved):
            expected["ema"] = lm.logits(blind, states.attention, states.scored)
    for name, wanted in expected.items():
        options = {"prompt": name} if name in ("attention", "keep") else {"anchor": name}
        terms = replace(terms_of("mdu", **options), reference=other, held=moved)
        found = Objective(trained, terms)._anchor(states)
        assert torch.equal(found, wanted) and not found.requires_grad, name
    assert len({round(float(value.sum()), 2) for value in expected.values()}) == len(expected)


def test_the_moving_average_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history: list[dict[str, Tensor]] = []
    held: list[dict[str, Tensor]] = []
    genuine = Phase._step

    def step(self: Phase, *arguments: Any) -> dict[str, float]:
        history.append(self.trained.copy())
        values = genuine(self, *arguments)
        assert self.terms.held is not None
        held.append({name: value.clone() for name, value in self.terms.held.items()})
        history[-1] = {"before": history[-1], "after": self.trained.copy()}  # type: ignore[dict-item]
        return values

    monkeypatch.setattr(Phase, "_step", step)
    run(tmp_path, "mdu", options={"anchor": "ema", "ema": 0.8})
    for name, average in history[0]["before"].items():  # type: ignore[union-attr]
        for passed, shown in zip(history, held, strict=True):
            average = 0.8 * average + 0.2 * passed["after"][name]  # type: ignore[call-overload]
            torch.testing.assert_close(shown[name], average)


def test_hidden_states_are_those_that_emit_the_predictions() -> None:
    """Under shifted logits as well: the head over them gives the logits of the scored positions."""
    for name in ("llada", "dream"):
        lm = backbones.load(GOLDENS / name)
        encoded = Encoded("row", (5, 6, 7), (8, 9, 10, 11), (0, 1))
        states = draw_states(lm.spec, [encoded], Noise(draws=3), (0,), tail=0)
        last = lm.num_layers - 1
        with torch.no_grad():
            objective = Objective(stirred(lm), terms_of("rmu", "hidden", layer=last))
            found = objective.quantities(states, frozenset({"hidden", "reference"}))
            assert found.hidden is not None and found.hidden_reference is not None
            expected = lm.logits(states.ids, states.attention, states.scored)
            torch.testing.assert_close(lm.stack.head(found.hidden), expected)
            assert not torch.allclose(found.hidden, found.hidden_reference)


def test_terms_on_hidden_states_stop_at_their_layer(tmp_path: Path) -> None:
    lm = build_toy()
    assert hidden_layer(lm, METHODS["rmu"].parse({})) == 1  # as deep as block 7 of 32
    run(tmp_path, "rmu", lm, options={"layer": 0})
    cost = log_of(tmp_path)["cost"]
    assert cost["sequence_blocks"] == 3 * 2 * (1 + 2)  # steps x rows x (forget, retain, retain of the start model)


def test_adaptive_rmu_measures_the_start_model(tmp_path: Path) -> None:
    lm = build_toy()
    run(tmp_path, "adaptive-rmu", lm, options={"scale": 3.0})
    config = config_of("adaptive-rmu")
    rows = prepare_rows(lm, FORGET, RETAIN, (), config)
    states = Dealer(lm, rows, config, "adaptive-rmu", config.noise, False, True).batch(0).forget
    with torch.no_grad():
        norms = lm.run_to(1, states.ids, states.attention)[states.scored].norm(dim=-1)
    assert log_of(tmp_path)["options"]["coefficient"] == pytest.approx(3.0 * float(norms.mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------------ cost
def test_memory_holds_the_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters alive in a step: the model's and the adapters'. No other tensor has the size of the token table either."""
    lm = build_toy()
    table = lm.embedding.weight.shape

    def alive() -> tuple[int, int]:
        gc.collect()
        found = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        parameters = {p.data_ptr(): p.numel() for p in found if isinstance(p, nn.Parameter)}
        return sum(parameters.values()), len({t.data_ptr() for t in found if t.shape == table})

    seen = []
    genuine = Phase._step

    def step(self: Phase, *arguments: Any) -> dict[str, float]:
        values = genuine(self, *arguments)
        seen.append((alive(), sum(p.numel() for p in self.trained.named.values())))
        return values

    monkeypatch.setattr(Phase, "_step", step)
    parameters, tables = alive()
    for method in ("npo", "mdu"):
        run(tmp_path / method, method, lm, steps=1)
    assert len(seen) == 2
    for found, adapters in seen:
        assert found == (parameters + adapters, tables)
        assert adapters < 0.25 * lm.num_parameters


def test_a_step_of_npo_costs_at_most_1_6_of_one_of_ga(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executions of a block on a canvas; one that is differentiated costs three forwards."""
    genuine = MaskedDiffusionLM.run_blocks
    cost = {"ga": 0, "npo": 0}
    for method in cost:

        def counted(lm: MaskedDiffusionLM, layers: range, hidden: Tensor, *rest: Any, method: str = method) -> Tensor:
            if not torch.is_inference_mode_enabled():  # the validation curve
                cost[method] += len(layers) * len(hidden) * (3 if torch.is_grad_enabled() else 1)
            return genuine(lm, layers, hidden, *rest)

        monkeypatch.setattr(MaskedDiffusionLM, "run_blocks", counted)
        lm = build_toy()
        run(tmp_path / method, method, lm, retain="none", noise={"draws": 4})
        assert log_of(tmp_path / method)["cost"]["sequence_blocks"] == 3 * 2 * 4 * 3 * (1 if method == "ga" else 2)
    assert cost["ga"] == 3 * 2 * 4 * 3 * 3
    assert cost["npo"] / cost["ga"] == pytest.approx(4 / 3)


def test_idk_looks_at_refusals_alone(tmp_path: Path) -> None:
    run(tmp_path, "idk")
    assert log_of(tmp_path)["cost"]["forwards"] == 3 * 2  # refusals and retain rows


def test_recomputed_blocks_give_the_same_steps(tmp_path: Path) -> None:
    lm = build_toy()
    calls = []
    hooks = [block.self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled())) for block in lm.blocks]
    edits, counts = [], []
    for wanted in (False, True):
        calls.clear()
        edits.append(run(tmp_path / str(wanted), "npo", lm, gradient_checkpointing=wanted))
        counts.append(sum(calls))
    for hook in hooks:
        hook.remove()
    assert counts[1] == 2 * counts[0]  # every block that is differentiated ran twice
    for one, other in zip(*map(tensors, edits), strict=True):
        torch.testing.assert_close(one, other)
    assert not any(module.training for module in lm.model.modules())


# ------------------------------------------------------------------------------------------------ parts
PARTED: dict[str, dict[str, Any]] = {
    "ga": {"retain": "mask-loss"},
    "npo": {"noise": {"draws": 4}},
    "mdu": {},
    "rmu": {},
}


@pytest.mark.parametrize("method", PARTED)
def test_parts_take_the_steps_of_one(tmp_path: Path, method: str) -> None:
    """Result, losses, and the norm of the gradient before it is clipped, whose size Adam hardly notices."""
    settings = {"batch_size": 4, "retain_weight": 2.0, **PARTED[method]}
    edits, lines, costs = {}, {}, {}
    for parts in (1, 2, 4):
        out = tmp_path / str(parts)
        edits[parts] = unlearn(build_toy(), FORGET, FACTS[4:], config_of(method, parts=parts, **settings), out)
        lines[parts] = [{**line, "kind": 0} for line in metrics_of(out)]
        costs[parts] = log_of(out)["cost"]
    assert all(line["retain"] != 0 for line in lines[1][1:])
    for parts in (2, 4):
        for one, other in zip(tensors(edits[1]), tensors(edits[parts]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        for line, other_line in zip(lines[1], lines[parts], strict=True):
            assert line == pytest.approx(other_line, rel=1e-3, abs=1e-5)
        assert costs[parts]["sequence_blocks"] == costs[1]["sequence_blocks"]
        assert costs[parts]["forwards"] == parts * costs[1]["forwards"]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_piece_is_differentiated_before_the_next_is_read(tmp_path: Path, parts: int) -> None:
    """Canvases of every forward that is differentiated, and whether there is a gradient already."""
    lm, seen = build_toy(), []

    def look(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        if torch.is_grad_enabled():
            seen.append((len(inputs[0]), any(p.grad is not None for p in lm.model.parameters())))

    handle = lm.embedding.register_forward_hook(look)
    settings = {"steps": 1, "batch_size": 4, "noise": {"draws": 4}, "parts": parts}
    unlearn(lm, FORGET, FACTS[4:], config_of("npo", **settings), tmp_path)
    handle.remove()
    assert seen == [(size // parts, piece > 0) for piece in range(parts) for size in (16, 4)]


# ------------------------------------------------------------------------------------------------ batches
def test_batches_pair_the_sets_and_pass_over_each_in_shuffles() -> None:
    lm = build_toy()
    config = config_of("npo", batch_size=3)
    rows = prepare_rows(lm, FORGET, FACTS[4:], (), config)
    dealer = Dealer(lm, rows, config, "npo", config.noise, False, True)
    names = [dealer.names(step) for step in range(4)]
    assert all(len(forget) == len(retain) == 3 for forget, retain in names)
    for side, facts in ((0, FORGET), (1, FACTS[4:])):
        drawn = [name for step in names for name in step[side]]
        epochs = [drawn[:4], drawn[4:8], drawn[8:]]
        assert all(sorted(epoch) == sorted(fact.id for fact in facts) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [n for step in names for n in step[0]] != [n.replace("cleo", "ada") for step in names for n in step[1]]
    batch = dealer.batch(0)
    assert len(batch.forget.length) == len(batch.retain.length) == 3  # type: ignore[union-attr]
    assert len(batch.forget.ids) == 3 * METHODS["npo"].draws and len(batch.retain.ids) == 3  # type: ignore[union-attr]
    other = Dealer(lm, rows, config.model_copy(update={"seed": 1}), "npo", config.noise, False, True)
    assert [other.names(step) for step in range(4)] != names


def test_shares_of_processes_are_the_batch() -> None:
    lm = build_toy()
    config = config_of("dpo", batch_size=4, tails=(0, 1, 0))
    rows = prepare_rows(lm, FORGET, FACTS[4:], (), config)
    dealer = Dealer(lm, rows, config, "dpo", config.noise, True, True)
    whole, shares = dealer.batch(5), [dealer.batch(5, rank, 2) for rank in (0, 1)]
    for side in ("forget", "preferred", "retain"):
        parts = [getattr(share, side) for share in shares]
        all_of = getattr(whole, side)
        for row in range(4):
            mine = parts[row % 2].ids[parts[row % 2].row == row // 2]
            width = min(mine.shape[1], all_of.ids.shape[1])
            assert torch.equal(mine[:, :width], all_of.ids[all_of.row == row][:, :width])
    tails = {dealer._tail(step, rows.forget) for step in range(20)}
    assert len(tails) > 5 and min(tails) >= 1 and max(tails) <= 24


def test_epoch_order_runs_across_epochs() -> None:
    one = np.concatenate([epoch_order(5, first, 1, 0, "x") for first in range(12)])
    assert np.array_equal(one, epoch_order(5, 0, 12, 0, "x"))
    assert np.array_equal(one[3:10], epoch_order(5, 3, 7, 0, "x"))
    assert sorted(one[:5]) == sorted(one[5:10]) == list(range(5))


def test_draws_and_options_are_the_methods_unless_given() -> None:
    assert UnlearnConfig(method="npo").noise.draws == METHODS["npo"].draws >= 4
    assert UnlearnConfig(method="ga").noise.draws == 1
    assert UnlearnConfig(method="npo", noise={"draws": 1}).noise.draws == 1
    assert UnlearnConfig(method="npo").options == {"beta": 0.1, "normalised": False}
    restored = UnlearnConfig.model_validate_json(UnlearnConfig(method="dpo", options={"beta": 0.3}).model_dump_json())
    assert restored == UnlearnConfig(method="dpo", options={"beta": 0.3})


# ------------------------------------------------------------------------------------------------ resume
CASES: dict[str, dict[str, Any]] = {
    "npo": {},
    "mdu": {"options": {"anchor": "ema"}},
    "whp": {},
    "adaptive-rmu": {},
    "dpo": {"parts": 2},
    "kl": {"rank": 0, "learning_rate": 1e-3},
    "graddiff": {"early_stop": 1e3, "evaluate_every": 2},
}


@pytest.mark.parametrize("killed_at", [3, 8])
@pytest.mark.parametrize("method", CASES)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, killed_at: int
) -> None:
    settings = {"steps": 5, "checkpoint_every": 2, **CASES[method]}
    whole = run(tmp_path / "whole", method, **settings)
    genuine, calls = Phase._step, []

    def step(self: Phase, *arguments: Any) -> dict[str, float]:
        calls.append(arguments[-1])
        if len(calls) == killed_at + 1:
            raise KeyboardInterrupt
        return genuine(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Phase, "_step", step)
        if killed_at < (10 if method == "whp" else 5):
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "killed", method, **settings)
    resumed = run(tmp_path / "killed", method, resume=True, **settings)
    assert all(torch.equal(one, other) for one, other in zip(tensors(whole), tensors(resumed), strict=True))
    one, other = log_of(tmp_path / "whole"), log_of(tmp_path / "killed")
    for key in ("losses", "curve", "options", "edit"):
        assert one[key] == other[key]
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")
    assert metrics_of(tmp_path / "whole", "validation") == metrics_of(tmp_path / "killed", "validation")
    assert one["cost"]["sequence_blocks"] == other["cost"]["sequence_blocks"]
    again = run(tmp_path / "killed", method, resume=True, **settings)  # nothing is left to do
    assert all(torch.equal(one, other) for one, other in zip(tensors(whole), tensors(again), strict=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "npo")
    with pytest.raises(RemaskError, match="other hyper-parameters"):
        run(tmp_path, "npo", resume=True, learning_rate=2e-2)
    with pytest.raises(RemaskError, match="other data"):
        unlearn(build_toy(), FORGET[:3], RETAIN, config_of("npo"), tmp_path, resume=True)
    with pytest.raises(RemaskError, match="other data"):
        run(tmp_path, "npo", build_toy(seed=2), resume=True)


# ------------------------------------------------------------------------------------------------ stops
def test_tensorboard_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written where it is installed; here by a stand-in."""
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path / "tensorboard" / "npo"), 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr("remask.unlearning.training.journal.importlib.util.find_spec", lambda name: True)
    run(tmp_path, "npo")
    assert written[-1][0] == "closed"
    lines = [*metrics_of(tmp_path), *metrics_of(tmp_path, "validation")]
    numbers = {
        (f"{line['kind']}/{key}", line["step"], line[key]) for line in lines for key in line if key not in ("kind", "step")
    }
    assert {(name, step, value) for name, value, step in written[:-1]} == numbers


def test_early_stop_goes_back_to_the_point_before(taught: MaskedDiffusionLM, tmp_path: Path) -> None:
    settings = {"steps": 30, "learning_rate": 2e-3, "evaluate_every": 2, "early_stop": 2.0}
    with pytest.raises(RemaskError, match="at step 4, the first that is evaluated"):
        run(tmp_path / "late", "ga", taught, **{**settings, "learning_rate": 5e-2, "evaluate_every": 4})
    edit = run(tmp_path, "ga", taught, **settings)
    log = log_of(tmp_path)
    drifts = [point["drift"] for point in log["curve"]]
    assert drifts[-1] > 2.0 >= max(drifts[:-1])
    assert log["stopped"] == log["curve"][-1]["step"] < 30 and log["kept_step"] == log["curve"][-2]["step"]
    with edit.attached(taught):
        assert level(taught, RETAIN) == pytest.approx(log["curve"][-2]["retain"], abs=1e-2)
    again = run(tmp_path, "ga", taught, resume=True, **settings)
    assert all(torch.equal(one, other) for one, other in zip(tensors(edit), tensors(again), strict=True))


def test_validation_rows_are_watched_where_given(tmp_path: Path) -> None:
    lm = build_toy()
    run(tmp_path, "npo", lm, validation=HELD_OUT)
    curve = log_of(tmp_path)["curve"]
    assert set(curve[0]) == {"step", "forget", "validation", "drift"}
    assert curve[0]["validation"] == pytest.approx(level(lm, HELD_OUT)) != pytest.approx(level(lm, RETAIN))


def poisoned(method: str, at: int, how: str) -> Any:
    """The method with a loss, or a gradient, that is not a number for the first row of step `at`."""
    calls: list[int] = []

    def loss(quantities: Quantities, options: Any) -> Loss:
        calls.append(1)
        found = METHODS_BEFORE[method].loss(quantities, options)
        if len(calls) != at:
            return found
        if how == "loss":
            return Loss(torch.cat([found.rows[:1] * math.nan, found.rows[1:]]), found.parts)
        zero = (quantities.logits * 0).sum()
        return Loss(found.rows + zero.sqrt(), found.parts)

    return replace(METHODS_BEFORE[method], loss=loss)


METHODS_BEFORE = dict(METHODS)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    lm = build_toy()
    monkeypatch.setitem(METHODS, "npo", poisoned("npo", 4, how))
    config = config_of("npo", steps=6, checkpoint_every=2)
    dealer = Dealer(lm, prepare_rows(lm, FORGET, RETAIN, (), config), config, "npo", config.noise, False, True)
    forget, retain = dealer.names(3)
    named = forget[:1] if how == "loss" else forget + retain
    with pytest.raises(RemaskError) as caught:
        unlearn(lm, FORGET, RETAIN, config, tmp_path)
    message = str(caught.value)
    assert f"npo, step 4: the {how} of rows {', '.join(named)} is not finite" in message
    assert str(tmp_path / "checkpoint.safetensors") in message
    assert lm.fingerprint() == build_toy().fingerprint()
    assert not (tmp_path / "edit.safetensors").exists()
    monkeypatch.setitem(METHODS, "npo", METHODS_BEFORE["npo"])  # the checkpoint of step 2 is good: the run goes on from it
    resumed = unlearn(lm, FORGET, RETAIN, config, tmp_path, resume=True)
    whole = unlearn(lm, FORGET, RETAIN, config, tmp_path / "whole")
    assert all(torch.equal(one, other) for one, other in zip(tensors(whole), tensors(resumed), strict=True))


def test_a_loss_of_a_later_piece_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is named, no weight moves in that step, and no gradient is left for the next run."""
    lm, config = build_toy(), config_of("npo", parts=2, rank=0, learning_rate=1e-3)
    dealer = Dealer(lm, prepare_rows(lm, FORGET, RETAIN, (), config), config, "npo", config.noise, False, True)
    genuine, kept = Phase._step, []

    def step(self: Phase, *arguments: Any) -> dict[str, float]:
        before = self.trained.copy()
        try:
            return genuine(self, *arguments)
        except RemaskError:
            kept.append(all(torch.equal(value, before[name]) for name, value in self.trained.copy().items()))
            raise

    with monkeypatch.context() as patch:
        patch.setattr(Phase, "_step", step)
        patch.setitem(METHODS, "npo", poisoned("npo", 4, "loss"))  # step 2, piece 2
        with pytest.raises(RemaskError, match=rf"step 2: the loss of rows {dealer.names(1)[0][1]} is not finite"):
            unlearn(lm, FORGET, RETAIN, config, tmp_path / "failed")
    assert kept == [True] and all(parameter.grad is None for parameter in lm.model.parameters())
    again, fresh = (unlearn(m, FORGET, RETAIN, config, tmp_path / name) for name, m in (("again", lm), ("new", build_toy())))
    assert all(torch.equal(one, other) for one, other in zip(tensors(again), tensors(fresh), strict=True))


def test_a_run_that_fails_at_once_says_that_there_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "ga", poisoned("ga", 1, "loss"))
    with pytest.raises(RemaskError, match="no checkpoint yet"):
        run(tmp_path, "ga")


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"forget": ()}, "forget set is empty"),
        ({"retain": ()}, "graddiff needs retain rows"),
        ({"method": "npo", "retain": (), "settings": {"retain": "kl"}}, "retain term kl needs retain rows"),
        ({"retain": [replace(FORGET[0], prompt="Who is it, Ada Birk?")]}, "'ada/city' is in the forget set and in the retain"),
        ({"retain": [replace(FORGET[0], id="new")]}, "'new' of the retain set has prompt and answer of 'ada/city'"),
        ({"validation": RETAIN[:1]}, "is in the retain set and in the validation set"),
        ({"forget": [*FORGET, FORGET[0]]}, "duplicate fact id"),
        ({"settings": {"targets": ("c_attn",)}}, "target 'c_attn' matches nothing"),
        ({"settings": {"targets": ("c_attn",), "rank": 0}}, "target 'c_attn' matches nothing"),
        ({"method": "mdu", "settings": {"options": {"anchor": "never-trained"}}}, "needs a reference model"),
        ({"method": "npo", "reference": "toy"}, "reads no reference model"),
        ({"method": "mdu", "settings": {"options": {"anchor": "never-trained"}}, "reference": "golden"}, "another vocabulary"),
        ({"method": "rmu", "settings": {"options": {"layer": 9}}}, "layer 9 is outside"),
        ({"method": "ga", "retain": [], "settings": {"early_stop": 1.0}}, "early_stop watches retain or validation rows"),
        ({"settings": {"parts": 3}}, "batch_size 2 must be a multiple of the 3 pieces"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    lm, method = build_toy(), change.get("method", "graddiff")
    others = {"toy": lambda: build_toy(seed=1), "golden": lambda: backbones.load(GOLDENS / "llada")}
    reference = others[change["reference"]]() if "reference" in change else None
    arguments = (change.get("forget", FORGET), change.get("retain", RETAIN), config_of(method, **change.get("settings", {})))
    with pytest.raises(RemaskError, match=sentence):
        unlearn(lm, *arguments, tmp_path, validation=change.get("validation", ()), reference=reference)
    assert lm.fingerprint() == build_toy().fingerprint()
    assert not any(tmp_path.iterdir())


def test_a_reference_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = build_toy(seed=1)
    vocabulary = other.tokenizer.get_vocab()  # type: ignore[union-attr]
    other.tokenizer.get_vocab = lambda: {**vocabulary, "zz": 1}  # type: ignore[union-attr, method-assign]
    with pytest.raises(RemaskError, match="another vocabulary"):
        run(tmp_path, "mdu", options={"anchor": "never-trained"}, reference=other)
    edit = run(tmp_path, "mdu", options={"anchor": "never-trained"}, reference=build_toy(seed=1))
    assert edit.changes
    assert log_of(tmp_path)["cost"]["forwards"] == 3 * 3  # policy, retain term and the reference, three steps


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "gaa"}, "unknown method 'gaa'.*npo"),
        ({"method": "npo", "options": {"tau": 1}}, "npo has no option 'tau'"),
        ({"method": "npo", "options": {"beta": -1}}, "beta"),
        ({"method": "graddiff", "retain": "none"}, "made of its retain term"),
        ({"method": "mdu", "options": {"mean": "token"}, "parts": 2}, "leave parts at 1, or set mean=row"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RemaskError, match=sentence):
        UnlearnConfig(**settings)
    for wrong in ({"tails": (0.5, 0.5, 0.5)}, {"steps": 0}, {"parts": 0}, {"momentum": 1}, {"retain": "all"}):
        with pytest.raises(ValueError):
            UnlearnConfig(method="npo", **wrong)


def test_edited_and_half_precision_models_are_refused(taught: MaskedDiffusionLM, tmp_path: Path) -> None:
    memory = EditMemory.build(taught, FORGET, Site(1), config=preset("paper"), alpha=1.0)
    with memory.attached(taught), pytest.raises(RemaskError, match="attached; detach it"):
        run(tmp_path, "npo", taught)
    half = build_toy()
    half.model.to(torch.bfloat16)
    with pytest.raises(RemaskError, match=r"bfloat16.*float32"):
        run(tmp_path, "ga", half, rank=0)
    edit = run(tmp_path, "ga", half)
    with edit.attached(half):
        assert not torch.equal(logits(half), logits(taught))


# ------------------------------------------------------------------------------------------------ processes
SHARED = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_unlearn import SHARED_CASES, assert_averaged_once, assert_refused, kill_and_resume, run_shared
for name in SHARED_CASES:
    run_shared(name, Path({out!r}) / name)
kill_and_resume("npo split", Path({out!r}) / "killed")
assert_averaged_once(Path({out!r}) / "averaged")
assert_refused(Path({out!r}) / "refused")
"""
SHARED_CASES: dict[str, dict[str, Any]] = {
    "npo": {"early_stop": 1e3},
    "dpo": {"parts": 2},
    "adaptive-rmu": {},
    "whp": {"gradient_checkpointing": True},
    "kl": {"rank": 0, "learning_rate": 1e-3},
    "npo split": {"shard": True, "parts": 2, "early_stop": 1e3, "gradient_checkpointing": True, "checkpoint_every": 1},
    "rmu split": {"shard": True, "rank": 1},
}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("npo", {"batch_size": 3}, "batch_size 3 must be a multiple of the 2 processes"),
    ("npo", {"parts": 2}, "batch_size 2 must be a multiple of the 4 pieces"),
    ("mdu", {"options": {"mean": "token"}}, "start one, or set mean=row"),
    ("whp", {"shard": True}, "does not run split"),
    ("mdu", {"shard": True, "options": {"anchor": "ema"}}, "does not run split"),
    ("mdu", {"shard": True, "options": {"states": "generated"}}, "does not run split"),
    ("npo", {"shard": True, "rank": 0}, "shard needs adapters"),
]


def assert_refused(out: Path) -> None:
    for method, settings, sentence in REFUSED:
        with pytest.raises(RemaskError, match=sentence):
            run(out, method, **settings)


def assert_averaged_once(out: Path) -> None:
    """Processes average the gradient once a step, however many parts it is made of."""
    averaged: list[bool] = []

    def wrap(self: Adapters, objective: nn.Module, accelerator: Any) -> nn.Module:
        wrapped = accelerator.prepare_model(objective)
        wrapped.register_comm_hook(
            None, lambda group, bucket: averaged.append(bucket.is_last()) or allreduce_hook(group, bucket)
        )
        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adapters, "wrap", wrap)
        run(out, "npo", batch_size=4, parts=2)
    assert sum(averaged) == SMALL["steps"]


def run_shared(name: str, out: Path, *, alone: bool = False, resume: bool = False) -> WeightEdit:
    method, settings = name.split()[0], SHARED_CASES[name]
    if alone:
        settings = {key: value for key, value in settings.items() if key not in ("shard", "parts")}
    config = config_of(method, steps=4, batch_size=4, evaluate_every=2, **{"rank": 2, **settings})
    return unlearn(build_toy(), FORGET, FACTS[4:], config, out, resume=resume)


def kill_and_resume(name: str, out: Path) -> None:
    genuine = Phase._step

    def step(self: Phase, *arguments: Any) -> dict[str, float]:
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        return genuine(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Phase, "_step", step)
        run_shared(name, out)
    run_shared(name, out, resume=True)


def launch(script: Path) -> subprocess.CompletedProcess[bytes]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, timeout=300)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Data-parallel and with split weights, some in parts: losses, curve, result, a resumed run, and what is refused."""
    out = tmp_path / "two"
    (tmp_path / "shared.py").write_text(SHARED.format(tests=str(Path(__file__).parent), out=str(out)), "utf-8")
    ran = launch(tmp_path / "shared.py")
    assert ran.returncode == 0, ran.stderr.decode()
    for name in SHARED_CASES:
        one = run_shared(name, tmp_path / "one" / name, alone=True)
        two = load_edit(out / name / "edit.safetensors")
        assert isinstance(two, WeightEdit)
        assert set(one.changes) == set(two.changes)
        for first, second in zip(tensors(one), tensors(two), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
        single, double = log_of(tmp_path / "one" / name), log_of(out / name)
        assert single["losses"] == pytest.approx(double["losses"], rel=1e-5)
        for point, other in zip(single["curve"], double["curve"], strict=True):
            assert point == pytest.approx(other, rel=1e-5, abs=1e-4)
        for line, other in zip(metrics_of(tmp_path / "one" / name), metrics_of(out / name), strict=True):
            assert {**line, "kind": 0} == pytest.approx({**other, "kind": 0}, rel=1e-3, abs=1e-5)
        assert double["cost"]["processes"] == 2
        assert double["cost"]["sequence_blocks"] == single["cost"]["sequence_blocks"]
    whole, resumed = (load_edit(out / name / "edit.safetensors") for name in ("npo split", "killed"))
    assert isinstance(whole, WeightEdit) and isinstance(resumed, WeightEdit)
    assert all(torch.equal(one, other) for one, other in zip(tensors(whole), tensors(resumed), strict=True))
    assert log_of(out / "npo split")["losses"] == log_of(out / "killed")["losses"]


def test_one_process_cannot_split(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match="there is one; start several with torchrun"):
        run(tmp_path, "npo", shard=True)
