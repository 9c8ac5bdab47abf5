"""The reference tracer against explicit forwards, hand-computed averages, and the identities that any tracer must satisfy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from remask.backbones import Encoded, MaskedDiffusionLM, Site
from remask.errors import RemaskError
from remask.random import normal
from remask.tracing import Trace, TraceConfig, aggregate, choose_site, save_heatmap, trace
from remask.tracing.reference import mean_absolute

CONFIG = TraceConfig(steps=3, draws=2)


@pytest.fixture
def pair(rows: list[Encoded]) -> list[Encoded]:
    """A long answer (3 steps) and one of two tokens (2 steps)."""
    short = rows[2]
    return [rows[1], Encoded(short.id, short.prompt_ids, short.answer_ids[:2], short.subject)]


# ------------------------------------------------------------------ identities
def test_without_noise_every_effect_is_exactly_zero(toy, pair) -> None:
    result = trace(toy, pair, TraceConfig(steps=3, draws=1, noise=0.0))
    assert (result.effects[~result.effects.isnan()] == 0).all()
    assert torch.equal(result.clean.nan_to_num(), result.corrupted.nan_to_num())


def test_last_residual_has_no_effect_on_other_positions(toy, pair) -> None:
    """Above the last block nothing mixes positions: the restored subject cannot reach the object."""
    effects = trace(toy, pair, CONFIG).effects
    last = effects[:, -1, CONFIG.modules.index("resid")]
    assert (last[~last.isnan()] == 0).all()
    assert effects[:, 0].nan_to_num().abs().max() > 0.01  # while the first layer does act


def test_shapes_and_nan_pattern(toy, pair) -> None:
    result = trace(toy, pair, CONFIG)
    assert result.effects.shape == (2, toy.num_layers, 3, 3, 3)
    assert result.clean.shape == result.corrupted.shape == (2, 3)
    assert result.fact_ids == (pair[0].id, pair[1].id)
    assert result.model == toy.fingerprint()
    for fact, steps in [(0, 3), (1, 2)]:  # capped at the number of object tokens
        defined = ~result.effects[fact].isnan()
        for s in range(3):
            for later in range(3):
                assert bool(defined[:, :, s, later].all()) is (s <= later < steps)
                assert bool(defined[:, :, s, later].any()) is (s <= later < steps)
        assert result.clean[fact].isnan().tolist() == [s >= steps for s in range(3)]


def test_one_step_a_token_at_most(toy, pair) -> None:
    tokens = len(pair[0].answer_ids)
    assert trace(toy, pair[:1], TraceConfig(steps=50, draws=1, modules=("mlp",))).effects.shape[-1] == tokens


def test_facts_are_traced_independently(toy, pair) -> None:
    together = trace(toy, pair, CONFIG).effects
    alone = trace(toy, pair[1:], CONFIG).effects
    assert torch.equal(together[1:, ..., :2, :2].nan_to_num(), alone.nan_to_num())


def test_tracing_leaves_no_hook_behind(toy, pair) -> None:
    trace(toy, pair[1:], CONFIG)
    assert not any(module._forward_hooks for module in toy.model.modules())


# ------------------------------------------------------------------ brute force
def object_logprob(lm: MaskedDiffusionLM, row: Encoded, canvas: list[int], noise, restore=None) -> tuple:
    """One explicit forward, block by block: (log p(object), logits at the object, residuals after each block)."""
    model, subject = lm.model.model, slice(*row.subject)
    hidden = model.embed_tokens(torch.tensor([canvas])).clone()
    if noise is not None:
        hidden[0, subject] += noise
    rotary = model.rotary_emb(hidden, position_ids=torch.arange(len(canvas))[None])
    states = []
    for index, block in enumerate(model.layers):
        hidden = block(hidden, position_embeddings=rotary)
        if restore is not None and restore[0] == index:
            hidden = hidden.clone()
            hidden[0, subject] = restore[1]
        states.append(hidden[0, subject].clone())
    logits = lm.model.lm_head(model.norm(hidden))[0, len(row.prompt_ids) :]
    logp = logits.double().log_softmax(-1)
    return sum(float(logp[i, token]) for i, token in enumerate(row.answer_ids)), logits, states


def commit_best(lm: MaskedDiffusionLM, canvas: list[int], start: int, logits: torch.Tensor, count: int) -> list[int]:
    """Greedy: the `count` most confident masked positions get their most likely token."""
    canvas = list(canvas)
    masked = [i for i in range(len(canvas)) if canvas[i] == lm.spec.mask_id]
    best = sorted(masked, key=lambda i: -float(logits[i - start].softmax(-1).max()))[:count]
    for i in best:
        canvas[i] = int(logits[i - start].argmax())
    return canvas


@pytest.mark.parametrize(("layer", "step"), [(0, 0), (1, 1)])
@torch.inference_mode()
def test_restoring_the_subject_by_hand_gives_the_same_effect(toy, rows, layer: int, step: int) -> None:
    row = rows[1]
    start, steps, length = len(row.prompt_ids), 3, len(row.answer_ids)
    counts = [length // steps + (s < length % steps) for s in range(steps)]
    ids = torch.tensor(row.prompt_ids[slice(*row.subject)])
    spread = toy.model.model.embed_tokens(ids).std()
    blank = [*row.prompt_ids, *[toy.spec.mask_id] * length]

    clean_states, canvas = [], blank
    for s in range(steps):
        _, logits, states = object_logprob(toy, row, canvas, None)
        clean_states.append(states)
        canvas = commit_best(toy, canvas, start, logits, counts[s])

    effects = torch.zeros(CONFIG.draws, steps)
    for draw in range(CONFIG.draws):
        noise = 3.0 * spread * normal((len(ids), toy.hidden_size), 0, "subject", row.id, draw)
        for sign, patched in [(1, True), (-1, False)]:
            canvas = blank
            for s in range(steps):
                restore = (layer, clean_states[s][layer]) if patched and s == step else None
                value, logits, _ = object_logprob(toy, row, canvas, noise, restore)
                effects[draw, s] += sign * value
                canvas = commit_best(toy, canvas, start, logits, counts[s])

    found = trace(toy, [row], CONFIG).effects[0, layer, CONFIG.modules.index("resid"), step]
    assert effects.mean(0)[step].abs() > 0.01
    assert effects[:, :step].abs().max() == 0 if step else True
    assert (found[step:] - effects.mean(0)[step:]).abs().max() <= 1e-3


# ------------------------------------------------------------------ averages and the choice
def test_aggregate_by_hand() -> None:
    nan = math.nan
    effects = torch.tensor([[1.0, 2.0, -4.0], [nan, 6.0, 3.0], [nan, nan, 5.0]])
    weights = 1 + 0.5 + 0.25
    assert aggregate(effects, 0.5).tolist() == pytest.approx([(1 + 1 - 1) / weights, (6 + 1.5) / 1.5, 5.0])
    assert aggregate(effects, 0.5, normalise=False).tolist() == pytest.approx([1.0, 7.5, 5.0])
    assert aggregate(effects, 0.0).tolist() == pytest.approx([1.0, 6.0, 5.0])
    short = torch.tensor([[8.0, 4.0, nan], [nan, 3.0, nan], [nan, nan, nan]])  # a fact with two steps
    result = aggregate(short, 0.5)
    assert result[:2].tolist() == pytest.approx([10 / 1.5, 3.0])
    assert math.isnan(result[2])


def synthetic(effects: torch.Tensor) -> Trace:
    config = TraceConfig(steps=2, modules=("resid", "mlp"))
    blank = torch.zeros(len(effects), 2)
    return Trace(effects, blank, blank, tuple(f"f{i}" for i in range(len(effects))), config, "model")


@pytest.fixture
def effects() -> torch.Tensor:
    """[2 facts, 4 layers, resid/mlp, 2 steps, 2 later steps]: small everywhere but at three places."""
    tensor = torch.full((2, 4, 2, 2, 2), 0.1)
    tensor[..., 1, 0] = torch.nan
    tensor[:, 2, 1, 1, 1] = torch.tensor([-5.0, 5.0])  # strong, of either sign: |.| before the mean over facts
    tensor[:, 1, 0, 0, :] = 2.0  # strongest residual site
    tensor[0, 3, 1, 1, 1] = 4.0  # strong for one fact only: mean 2.05
    return tensor


def test_site_choice_on_known_effects(effects) -> None:
    assert mean_absolute(synthetic(effects))[2, 1].tolist() == pytest.approx([0.1, 5.0])
    assert choose_site(synthetic(effects)) == Site(2, "mlp")
    assert choose_site(synthetic(effects), module="resid") == Site(1, "resid")
    effects[:, 2, 1, 1, 1] = torch.nan  # both facts too short for that step
    assert choose_site(synthetic(effects)) == Site(3, "mlp")


def test_choice_of_an_untraced_module_is_refused(effects) -> None:
    with pytest.raises(RemaskError, match="'attn' was not traced; traced: resid, mlp"):
        choose_site(synthetic(effects), module="attn")


# ------------------------------------------------------------------ files and errors
def test_heat_map_is_a_png(effects, tmp_path: Path) -> None:
    save_heatmap(synthetic(effects), tmp_path / "map.png", Site(2, "mlp"))
    data = (tmp_path / "map.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert int.from_bytes(data[16:20]) > 300
    assert data[-8:-4] == b"IEND"


def test_saved_trace_says_what_it_is(toy, pair, tmp_path: Path) -> None:
    result = trace(toy, pair[1:], CONFIG)
    result.save(str(tmp_path / "t.safetensors"))
    with safe_open(tmp_path / "t.safetensors", framework="pt") as stream:
        header = json.loads(stream.metadata()["remask"])
        assert torch.equal(stream.get_tensor("effects").nan_to_num(), result.effects.nan_to_num())
    assert header["fact_ids"] == [pair[1].id]
    assert (header["model"], header["unit"], header["config"]["steps"]) == (toy.fingerprint(), "nats", 3)


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"draws": 0}, {"noise": -1.0}, {"modules": ("resid", "mpl")}, {"modules": ()}]
)
def test_impossible_protocols_are_refused(changes: dict) -> None:
    with pytest.raises(RemaskError):
        TraceConfig(**changes)


def test_nothing_to_trace_is_an_error(toy) -> None:
    with pytest.raises(RemaskError, match="no facts"):
        trace(toy, [])
