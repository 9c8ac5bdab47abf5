"""The fast tracer against the slow one, the slow one against explicit forwards, and the identities that both must satisfy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import remask
from conftest import GOLDEN_OPTIONS, GOLDENS, build_toy
from remask.backbones import Encoded, MaskedDiffusionLM, Site
from remask.backbones.intervention import add_shift
from remask.errors import RemaskError
from remask.random import normal
from remask.tracing import TraceConfig, largest_difference, trace
from remask.tracing.tie import batches

CONFIG = TraceConfig(steps=3, draws=2, readout="raw")
PROTOCOLS: dict[str, dict[str, Any]] = {
    "add": {},
    "replace": {"corruption": "replace"},
    "mask": {"corruption": "mask"},
    "fresh noise": {"fresh": True},
    "first token": {"view": "first"},
    "last token": {"view": "last"},
    "frozen": {"readout": "frozen"},
    "one module": {"modules": ("mlp",)},
}


@pytest.fixture
def pair(rows: list[Encoded]) -> list[Encoded]:
    """A long answer (3 steps) and one of two tokens (2 steps)."""
    short = rows[2]
    return [rows[1], Encoded(short.id, short.prompt_ids, short.answer_ids[:2], short.subject)]


def golden_rows(lm: MaskedDiffusionLM) -> list[Encoded]:
    """Two rows of ids that are no mask, of different lengths."""
    ids = [i for i in range(3, 40) if i != lm.spec.mask_id]
    return [
        Encoded("long", tuple(ids[:7]), tuple(ids[9:14]), (2, 5)),
        Encoded("short", tuple(ids[14:18]), tuple(ids[20:22]), (1, 4)),
    ]


# ------------------------------------------------------------------ fast equals slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_exact_equals_the_reference_under_every_protocol(toy, rows, pair, protocol: str) -> None:
    config = dataclasses.replace(CONFIG, **PROTOCOLS[protocol])
    everything = [*pair, rows[3], rows[5]]
    slow = trace(toy, everything, config, mode="reference", keep_unknown=True)
    fast = trace(toy, everything, config, keep_unknown=True)
    assert largest_difference(fast, slow)["effects"] <= 1e-5
    assert torch.equal(fast.placed.nan_to_num(-1), slow.placed.nan_to_num(-1))  # the same commits at every step
    assert slow.effects.nan_to_num().abs().max() > 0.01
    assert fast.ids == slow.ids == tuple(row.id for row in everything)


@pytest.mark.parametrize("family", GOLDEN_OPTIONS)
def test_exact_equals_the_reference_on_every_family(family: str) -> None:
    """Shifted logits, mixtures of experts, block-causal attention; a model that two processes of a trace share."""
    lm = remask.load(GOLDENS / family, **GOLDEN_OPTIONS[family])
    rows = golden_rows(lm)
    slow = trace(lm, rows, CONFIG, mode="reference", keep_unknown=True)
    fast = trace(lm, rows, CONFIG, keep_unknown=True)
    assert largest_difference(fast, slow)["effects"] <= 1e-5
    assert torch.equal(fast.placed.nan_to_num(-1), slow.placed.nan_to_num(-1))
    assert slow.effects.nan_to_num().abs().max() > 1e-3


def test_exact_equals_the_reference_on_the_bundled_model(tiny) -> None:
    lm = tiny
    facts = {fact.id: fact for fact in remask.load_facts("examples/facts.jsonl")}
    chosen = [lm.encode(facts[f"zora-yates/{name}"]) for name in ("book/short", "food/short", "year/long")]
    config = TraceConfig(steps=4, draws=2)
    slow, fast = (trace(lm, chosen, config, mode=mode) for mode in ("reference", "exact"))
    assert largest_difference(fast, slow)["effects"] <= 1e-5
    assert torch.equal(fast.placed.nan_to_num(-1), slow.placed.nan_to_num(-1))
    assert fast.unknown == slow.unknown == ()


def test_equal_batch_shapes_give_equal_bits(toy, rows) -> None:
    """One draw, one site in the batch: the same products in the same order."""
    config = TraceConfig(steps=1, draws=1, modules=("resid",))
    slow = trace(toy, rows[1:2], config, mode="reference", keep_unknown=True)
    fast = trace(toy, rows[1:2], config, keep_unknown=True)
    assert torch.equal(fast.clean, slow.clean)
    assert torch.equal(fast.effects, slow.effects)


def test_an_edited_model_is_traced_as_it_is(toy, rows) -> None:
    """A hook inside a block takes part in the patched runs too."""
    undo = [
        add_shift(toy, Site(layer, module), lambda hidden: 0.3 * hidden.roll(1, dims=-1))
        for layer, module in ((1, "resid"), (2, "mlp"))
    ]
    slow = trace(toy, rows[1:3], CONFIG, mode="reference", keep_unknown=True)
    fast = trace(toy, rows[1:3], CONFIG, keep_unknown=True)
    for remove in undo:
        remove()
    assert largest_difference(fast, slow)["effects"] <= 1e-5
    plain = trace(toy, rows[1:3], CONFIG, keep_unknown=True)
    assert (plain.effects - fast.effects).nan_to_num().abs().max() > 0.01


# ------------------------------------------------------------------ identities
@pytest.mark.parametrize("mode", ["exact", "sweep", "reference"])
def test_without_noise_every_effect_is_zero(toy, pair, mode) -> None:
    result = trace(toy, pair, TraceConfig(steps=3, draws=1, noise=0.0), mode=mode, keep_unknown=True)
    assert result.effects.nan_to_num().abs().max() <= 1e-5
    assert (result.clean - result.corrupted).nan_to_num().abs().max() <= 1e-5


@pytest.mark.parametrize("mode", ["exact", "sweep", "reference"])
def test_last_layer_has_no_effect_on_other_positions(toy, pair, mode) -> None:
    """Above the last block nothing mixes positions: the restored subject cannot reach the object."""
    effects = trace(toy, pair, CONFIG, mode=mode, keep_unknown=True).effects
    assert effects[:, -1].nan_to_num().abs().max() <= 1e-5
    assert effects[:, 0].nan_to_num().abs().max() > 0.01  # while the first layer does act


def test_shapes_and_nan_pattern(toy, pair) -> None:
    result = trace(toy, pair, CONFIG, keep_unknown=True)
    assert result.effects.shape == result.squares.shape == (2, toy.num_layers, 3, 3, 3)
    assert result.clean.shape == result.corrupted.shape == (2, 3)
    assert result.placed.shape == (2, 2, 3)
    assert result.tokens.tolist() == [len(row.answer_ids) for row in pair]
    assert result.model == toy.fingerprint()
    for fact, steps in [(0, 3), (1, 2)]:  # capped at the number of object tokens
        defined = ~result.effects[fact].isnan()
        for s in range(3):
            for later in range(3):
                assert bool(defined[:, :, s, later].all()) is (s <= later < steps)
                assert bool(defined[:, :, s, later].any()) is (s <= later < steps)
        assert result.clean[fact].isnan().tolist() == [s >= steps for s in range(3)]


def test_one_step_a_token_at_most(toy, pair) -> None:
    config = TraceConfig(steps=50, draws=1, modules=("mlp",))
    assert trace(toy, pair[:1], config, keep_unknown=True).effects.shape[-1] == len(pair[0].answer_ids)


def test_facts_draws_and_batches_are_independent(toy, rows) -> None:
    """Rows that share a batch, and one row alone, within rounding; another order gives the same rows."""
    same = [dataclasses.replace(rows[1], id=f"copy {i}") for i in range(3)]
    together = trace(toy, [*same, rows[2]], CONFIG, keep_unknown=True)
    alone = trace(toy, same[1:2], CONFIG, keep_unknown=True)
    assert (together.effects[1] - alone.effects[0]).nan_to_num().abs().max() <= 1e-5
    turned = trace(toy, [rows[2], *same[::-1]], CONFIG, keep_unknown=True)
    assert turned.ids == (rows[2].id, "copy 2", "copy 1", "copy 0")
    assert (turned.effects[2] - together.effects[1]).nan_to_num().abs().max() <= 1e-5


def test_tracing_leaves_no_hook_and_no_clock_behind(toy, pair) -> None:
    trace(toy, pair[1:], CONFIG, keep_unknown=True)
    assert not any(module._forward_hooks for module in toy.model.modules())
    assert toy.clock.step is None


def test_sums_of_squares_give_the_standard_error_over_draws(toy, rows) -> None:
    """Against the same draws traced one by one: the first n noise samples do not depend on their number."""
    config = TraceConfig(steps=2, draws=3, corruption="replace")
    means = [trace(toy, rows[1:2], dataclasses.replace(config, draws=n), keep_unknown=True) for n in (1, 2, 3)]
    single = [means[0].effects, 2 * means[1].effects - means[0].effects, 3 * means[2].effects - 2 * means[1].effects]
    expected = torch.stack(single).double().std(dim=0) / 3**0.5
    assert (means[2].standard_error() - expected).nan_to_num().abs().max() <= 1e-4
    assert means[0].standard_error().isnan().all()


# ------------------------------------------------------------------ sweep
def test_sweep_reads_the_restored_step_on_the_clean_canvas(toy, rows) -> None:
    """At the first step both modes see the same canvas, so they agree there; nothing else is read."""
    exact = trace(toy, rows[1:3], CONFIG, keep_unknown=True)
    sweep = trace(toy, rows[1:3], CONFIG, mode="sweep", keep_unknown=True)
    assert (exact.effects[..., 0, 0] - sweep.effects[..., 0, 0]).abs().max() <= 1e-5
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert sweep.effects[..., off_diagonal].isnan().all()
    assert "fixed trajectory" in sweep.estimand
    with pytest.raises(RemaskError, match="fixed trajectory"):
        largest_difference(exact, sweep)


@torch.inference_mode()
def test_sweep_by_hand(toy, rows) -> None:
    row, step, layer = rows[1], 1, 0
    sweep = trace(toy, [row], TraceConfig(steps=3, draws=1, readout="raw"), mode="sweep", keep_unknown=True)
    canvas = clean_canvases(toy, row, 3)[step]
    noise = subject_noise(toy, row, 0)
    _, _, states = object_logprob(toy, row, canvas, None)
    patched, _, _ = object_logprob(toy, row, canvas, noise, (layer, states[layer]))
    corrupted, _, _ = object_logprob(toy, row, canvas, noise)
    assert float(sweep.effects[0, layer, 0, step, step]) == pytest.approx(patched - corrupted, abs=1e-4)
    assert float(sweep.corrupted[0, step]) == pytest.approx(corrupted, abs=1e-4)


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
    best = sorted(masked, key=lambda i: -float(logits[i - start].double().softmax(-1).max()))[:count]
    for i in best:
        canvas[i] = int(logits[i - start].argmax())
    return canvas


def counts(row: Encoded, steps: int) -> list[int]:
    length = len(row.answer_ids)
    return [length // steps + (s < length % steps) for s in range(steps)]


def clean_canvases(lm: MaskedDiffusionLM, row: Encoded, steps: int) -> list[list[int]]:
    canvases = [[*row.prompt_ids, *[lm.spec.mask_id] * len(row.answer_ids)]]
    for count in counts(row, steps):
        _, logits, _ = object_logprob(lm, row, canvases[-1], None)
        canvases.append(commit_best(lm, canvases[-1], len(row.prompt_ids), logits, count))
    return canvases


def subject_noise(lm: MaskedDiffusionLM, row: Encoded, draw: int) -> torch.Tensor:
    ids = torch.tensor(row.prompt_ids[slice(*row.subject)])
    spread = lm.model.model.embed_tokens(ids).std()
    return 3.0 * spread * normal((len(ids), lm.hidden_size), 0, "subject", row.id, draw)


@pytest.mark.parametrize("mode", ["exact", "reference"])
@pytest.mark.parametrize(("layer", "step"), [(0, 0), (1, 1)])
@torch.inference_mode()
def test_restoring_the_subject_by_hand_gives_the_same_effect(toy, rows, mode, layer: int, step: int) -> None:
    row = rows[1]
    start, steps = len(row.prompt_ids), 3
    canvases = clean_canvases(toy, row, steps)
    clean_states = [object_logprob(toy, row, canvas, None)[2] for canvas in canvases[:steps]]
    effects = torch.zeros(CONFIG.draws, steps)
    for draw in range(CONFIG.draws):
        noise = subject_noise(toy, row, draw)
        for sign, patched in [(1, True), (-1, False)]:
            canvas = canvases[0]
            for s in range(steps):
                restore = (layer, clean_states[s][layer]) if patched and s == step else None
                value, logits, _ = object_logprob(toy, row, canvas, noise, restore)
                effects[draw, s] += sign * value
                canvas = commit_best(toy, canvas, start, logits, counts(row, steps)[s])

    found = trace(toy, [row], CONFIG, mode=mode, keep_unknown=True).effects[0, layer, CONFIG.modules.index("resid"), step]
    assert effects.mean(0)[step].abs() > 0.01
    assert effects[:, :step].abs().max() == 0 if step else True
    assert (found[step:] - effects.mean(0)[step:]).abs().max() <= 1e-3


# ------------------------------------------------------------------ work
def deep(layers: int) -> MaskedDiffusionLM:
    """A toy of more layers."""
    lm = build_toy()
    blocks = lm.model.model.layers
    copies = [build_toy(seed).model.model.layers for seed in range(1, 1 + layers // len(blocks))]
    lm.model.model.layers = nn.ModuleList([block for group in (blocks, *copies) for block in group][:layers])
    lm.model.config.num_hidden_layers = layers
    for module in lm.model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return lm


def work(lm: MaskedDiffusionLM, row: Encoded, config: TraceConfig, mode) -> int:
    before = lm.counters.sequence_blocks
    trace(lm, [row], config, mode=mode, keep_unknown=True)
    return lm.counters.sequence_blocks - before


def long_row(row: Encoded, tokens: int) -> Encoded:
    return Encoded("long", row.prompt_ids, (row.answer_ids * tokens)[:tokens], row.subject)


def test_exact_runs_ten_times_fewer_blocks_than_rerunning_every_site(rows) -> None:
    lm, config = deep(8), TraceConfig(steps=8, draws=3)
    row = long_row(rows[1], 8)
    fast, slow = work(lm, row, config, "exact"), work(lm, row, config, "reference")
    sites, steps = 8 * 3, 8
    assert slow == steps * 8 + 3 * (sites * steps + 2) * steps * 8  # a clean and a corrupted run, then one a site and step
    from_step = 3 * sites * 8 * steps * (steps + 1) // 2
    assert slow >= 10 * fast
    assert from_step >= 5 * fast


def test_a_sweep_runs_twenty_times_fewer_blocks(rows) -> None:
    lm, config = deep(8), TraceConfig(steps=16, draws=3)
    row = long_row(rows[1], 16)
    rerun = 3 * (8 * 3) * 16 * 16 * 8
    assert rerun >= 20 * work(lm, row, config, "sweep")


@pytest.mark.parametrize("layers", [3, 6])
def test_batches_stay_within_the_memory_budget(rows, layers: int) -> None:
    """Twice the layers or facts: more passes, not wider ones; the numbers stay."""
    lm = deep(layers)
    many = [dataclasses.replace(rows[1], id=f"copy {i}") for i in range(4)]
    budget = 2_000_000
    seen: list[int] = []
    handles = [block.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].numel())) for block in lm.blocks]
    wide = trace(lm, many, CONFIG, keep_unknown=True)
    unbounded = max(seen)
    seen.clear()
    narrow = trace(lm, many, CONFIG, keep_unknown=True, memory=budget)
    for handle in handles:
        handle.remove()
    assert max(seen) * 4 * 16 <= budget / 2 < unbounded * 4 * 16  # sixteen fp32 copies of the hidden state
    assert (wide.effects - narrow.effects).nan_to_num().abs().max() <= 1e-5


def test_too_small_a_budget_says_how_much_is_needed(toy, rows) -> None:
    with pytest.raises(RemaskError, match=r"needs .* MB, more than the 0 MB given"):
        trace(toy, rows[:1], CONFIG, memory=1000)


def test_only_equal_shapes_share_a_batch(rows) -> None:
    copies = [dataclasses.replace(rows[1], id=str(i)) for i in range(20)]
    assert [len(batch) for batch in batches([*copies, rows[2]], CONFIG)] == [16, 4, 1]


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"draws": 0},
        {"noise": -1.0},
        {"modules": ("resid", "mpl")},
        {"modules": ()},
        {"modules": ("mlp", "mlp")},
        {"corruption": "delete"},
        {"view": "middle"},
        {"readout": "late"},
    ],
)
def test_impossible_protocols_are_refused(changes: dict) -> None:
    with pytest.raises(RemaskError):
        TraceConfig(**changes)


def test_masking_the_subject_has_one_draw() -> None:
    assert TraceConfig(corruption="mask", draws=5).draws == 1


def test_nothing_to_trace_is_an_error(toy) -> None:
    with pytest.raises(RemaskError, match="no facts"):
        trace(toy, [])


def test_a_fact_without_a_subject_is_named(toy, rows) -> None:
    for span in ((0, 0), (3, 2), (0, len(rows[0].prompt_ids) + 1)):
        with pytest.raises(RemaskError, match=f"{rows[0].id!r} has no subject"):
            trace(toy, [dataclasses.replace(rows[0], subject=span)])


def test_a_fact_given_twice_is_named(toy, rows) -> None:
    with pytest.raises(RemaskError, match="given twice"):
        trace(toy, [rows[0], rows[0]])


def test_an_unknown_mode_is_refused(toy, rows) -> None:
    with pytest.raises(RemaskError, match="mode 'fast' is unknown"):
        trace(toy, rows[:1], mode="fast")


def test_a_context_of_one_token_can_be_traced(toy, rows) -> None:
    """The prompt is the subject."""
    row = Encoded("one", rows[0].prompt_ids[:1], rows[0].answer_ids, (0, 1))
    slow, fast = (trace(toy, [row], CONFIG, mode=mode, keep_unknown=True) for mode in ("reference", "exact"))
    assert largest_difference(fast, slow)["effects"] <= 1e-5


def test_facts_that_the_model_does_not_know_are_left_out_and_named(taught, facts) -> None:
    taught_rows = [taught.encode(fact) for fact in facts]
    wrong = dataclasses.replace(taught_rows[1], id="wrong", answer_ids=taught_rows[1].answer_ids[::-1])
    result = trace(taught, [taught_rows[0], wrong], CONFIG)
    assert result.ids == (taught_rows[0].id,)
    assert result.unknown == ("wrong",)
    assert len(trace(taught, [taught_rows[0], wrong], CONFIG, keep_unknown=True).ids) == 2
    with pytest.raises(RemaskError, match="does not produce the object of any of the 1 facts"):
        trace(taught, [wrong], CONFIG)
