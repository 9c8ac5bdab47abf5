"""Steering baselines and the codebook: what they compute, where they act, and that they go away without a trace."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import build_toy
from remask.backbones import MaskedDiffusionLM, Site
from remask.diffusion.masks import MaskBank
from remask.editing import EditMemory, SteeringVector, anchor_level, calibrate
from remask.editing.calibrate import mean_logprob
from remask.editing.codebook import CODEBOOK, Codebook, deferral_radii
from remask.editing.config import MemoryConfig, preset
from remask.editing.live import attach
from remask.editing.shift import CodebookShift
from remask.editing.site import SiteEdit
from remask.editing.steering import answer_differences, caa, main_direction, random_layer, repe
from remask.errors import RemaskError
from remask.experiments.edits import build_edit, load_edit
from remask.facts import Fact, knowledge_prompt

SITE = Site(1)
IDS = torch.arange(20, 50).view(2, 15)
STATES = MaskBank(draws=3, replicates=1, seed=11)
REFUSAL = "nobody knows"
VECTORS = pytest.mark.parametrize("make", [caa, repe])


def hidden_states(lm: MaskedDiffusionLM, ids: list[int], layer: int) -> np.ndarray:
    """Residual stream after block `layer`, fp64 [L, d], from transformers' own forward."""
    with torch.inference_mode():
        states = lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    return states.double().numpy()


def slow_differences(lm: MaskedDiffusionLM, facts: list[Fact]) -> np.ndarray:
    """One canvas at a time: refusal placed minus answer placed, at each fact and state."""

    def read(fact: Fact, answer: str, state: int) -> np.ndarray:
        row = lm.encode(fact, answer=answer)
        mask = STATES.masks(fact.id, len(row.answer_ids))[state]
        placed = [lm.spec.mask_id if hidden else token for token, hidden in zip(row.answer_ids, mask, strict=True)]
        return hidden_states(lm, [*row.prompt_ids, *placed], SITE.layer)[-len(placed) :].mean(axis=0)

    pairs = itertools.product(sorted(facts, key=lambda fact: fact.id), range(3))
    return np.stack([read(fact, REFUSAL, state) - read(fact, fact.answer, state) for fact, state in pairs])


def make_codebook(lm: MaskedDiffusionLM, facts: list[Fact], alpha: float = 1.0) -> Codebook:
    return Codebook.build(lm, facts[:3], SITE, retain=facts[4:], alpha=alpha)


def captured_canvas(lm: MaskedDiffusionLM, fact: Fact) -> torch.Tensor:
    """The last of the partial states that a codebook of the fact has keys of, [1, L]."""
    row = lm.encode(fact)
    mask = MemoryConfig().bank.masks(row.id, len(row.answer_ids))[-1]
    placed = [lm.spec.mask_id if hidden else token for token, hidden in zip(row.answer_ids, mask, strict=True)]
    return torch.tensor([[*row.prompt_ids, *placed]])


# ------------------------------------------------------------------ vectors
def test_caa_is_the_mean_over_facts_and_states_one_canvas_at_a_time(toy, facts) -> None:
    vector = caa(toy, SITE, facts[:3], refusal=REFUSAL, states=STATES, alpha=0.5)
    expected = slow_differences(toy, facts[:3]).mean(axis=0)
    assert np.abs(expected).max() > 0.1
    assert np.abs(vector.vector.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    assert vector.describe() == {"preset": "caa", "alpha": 0.5, "site": SITE.to_dict(), "norm": float(vector.vector.norm())}
    with vector.attached(toy):
        shift = toy.run_to(1, IDS)
    assert (shift - toy.run_to(1, IDS) - 0.5 * vector.vector).abs().max() <= 1e-4


def test_caa_is_not_the_mean_delta(toy, facts) -> None:
    """It contrasts answers under one question; the mean delta contrasts questions under one answer."""
    vector = caa(toy, SITE, facts[:3], refusal=REFUSAL, states=STATES).vector
    deltas = EditMemory.build(toy, facts[:3], SITE, config=preset("ridge", mu=0.0)).deltas.mean(dim=0)
    assert torch.nn.functional.cosine_similarity(vector, deltas, dim=0) < 0.9


def test_repe_is_the_first_component_of_the_centred_differences(toy, facts) -> None:
    vector = repe(toy, SITE, facts[:3], refusal=REFUSAL, states=STATES)
    slow = slow_differences(toy, facts[:3])
    direction = np.linalg.svd(slow - slow.mean(axis=0))[2][0]
    if (slow @ direction < 0).sum() > (slow @ direction > 0).sum():
        direction = -direction
    expected = direction * np.mean([np.linalg.norm(row) for row in slow])
    assert vector.preset == "repe"
    assert np.abs(vector.vector.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_majority_decides_the_sign(sign: float) -> None:
    """Three of five pairs point along -x; one long pair along +x moves the mean, and the SVD itself cannot know."""
    x = sign * np.array([-1.0, -2.0, -1.5, 20.0, 0.5])
    differences = np.stack([x, 0.01 * np.arange(5.0)], axis=1)
    raw = np.linalg.svd(differences - differences.mean(axis=0))[2][0]
    direction = main_direction(torch.from_numpy(differences)).numpy()
    assert np.abs(np.abs(direction) - np.abs(raw)).max() < 1e-12
    assert np.linalg.norm(direction) == pytest.approx(1)
    assert direction[0] * sign < -0.99  # for one of the two signs this is not what the SVD returned


def test_a_tied_vote_goes_to_the_sum() -> None:
    differences = torch.tensor([[-1.0, 0.0], [3.0, 0.0], [-2.0, 0.0], [4.0, 0.0]])
    assert main_direction(differences)[0] == pytest.approx(1)
    assert main_direction(-differences)[0] == pytest.approx(-1)


def test_pairs_that_all_differ_alike_have_no_main_direction() -> None:
    with pytest.raises(RemaskError, match="use more facts, or 'caa'"):
        main_direction(torch.tensor([[1.0, 2.0]]).repeat(4, 1))


@VECTORS
def test_vectors_do_not_depend_on_the_order_of_facts(toy, facts, make) -> None:
    one, other = (make(toy, SITE, some) for some in (facts[:4], facts[3::-1]))
    assert torch.equal(one.vector, other.vector)


@pytest.mark.parametrize(
    ("chosen", "refusal", "match"),
    [([], REFUSAL, "at least one fact"), ([1, 1], REFUSAL, "duplicate fact id 'ada/pet'"), ([1], "a tame crow", "nothing to")],
)
def test_facts_that_cannot_be_steered_by_are_refused(toy, facts, chosen, refusal: str, match: str) -> None:
    with pytest.raises(RemaskError, match=match):
        caa(toy, SITE, [facts[i] for i in chosen], refusal=refusal)


def test_captures_are_of_the_bare_model(toy, facts) -> None:
    with SteeringVector(torch.ones(32), SITE).attached(toy), pytest.raises(RemaskError, match="steering vector attached"):
        caa(toy, SITE, facts[:2])
    with pytest.raises(RemaskError, match="layer 7 is outside"):
        repe(toy, Site(7), facts[:2])


def test_differences_are_one_a_fact_and_state(toy, facts) -> None:
    assert answer_differences(toy, SITE, facts[:3], REFUSAL, STATES).shape == (9, 32)


# ------------------------------------------------------------------ radii
def test_radii_are_half_the_distance_to_the_nearest_retain_key() -> None:
    keys, owner = torch.tensor([[0.0, 0.0], [30.0, 40.0]]), torch.tensor([0, 1])
    deltas = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    retain = torch.tensor([[3.0, 4.0], [30.0, 46.0], [0.0, -9.0]])  # distances 5, 54.9, 9 and 45, 6, 57.5
    assert deferral_radii(keys, deltas, owner, retain).tolist() == pytest.approx([2.5, 3.0])
    middle = deferral_radii(keys, deltas, owner, retain, quantile=0.5)
    assert middle.tolist() == pytest.approx([4.5, np.hypot(27, 36) / 2])


def test_a_conflict_is_split_half_way() -> None:
    """Keys 4 apart on a line, a retain key 10 away: balls of about 5 overlap and are cut to 2; the rest stays."""
    keys = torch.tensor([[0.0, 0.0], [4.0, 0.0], [100.0, 0.0]])
    deltas = torch.eye(3)[:, :2]
    retain = torch.tensor([[0.0, 10.0], [100.0, 7.0]])
    radii = deferral_radii(keys, deltas, torch.tensor([0, 1, 2]), retain)
    assert radii.tolist() == pytest.approx([2.0, 2.0, 3.5])
    shuffled = deferral_radii(keys[[2, 1, 0]], deltas[[2, 1, 0]], torch.tensor([0, 1, 2]), retain)
    assert shuffled.tolist() == pytest.approx([3.5, 2.0, 2.0])


@pytest.mark.parametrize(("owner", "deltas"), [([0, 0], [[1.0], [2.0]]), ([0, 1], [[1.0], [1.0]])])
def test_keys_of_one_fact_or_with_one_delta_do_not_conflict(owner: list[int], deltas: list[list[float]]) -> None:
    keys, retain = torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([[2.0, 20.0]])
    radii = deferral_radii(keys, torch.tensor(deltas), torch.tensor(owner), retain)
    assert radii.tolist() == pytest.approx([np.hypot(2, 20) / 2] * 2)


def test_a_key_that_is_also_retained_never_acts() -> None:
    keys, deltas = torch.tensor([[1.0, 2.0], [5.0, 2.0]]), torch.eye(2)
    radii = deferral_radii(keys, deltas, torch.tensor([0, 1]), keys[:1])
    assert radii.tolist() == pytest.approx([0, 2])
    assert not CodebookShift(keys, deltas, radii)(keys[:1]).any()


def test_radii_of_many_keys_match_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(0)
    keys, deltas, retain = rng.normal(size=(150, 3)), rng.normal(size=(150, 3)), rng.normal(size=(40, 3)) * 2
    owner = rng.permutation(np.arange(150) % 50)
    first = [min(np.linalg.norm(k - r) for r in retain) / 2 for k in keys]
    expected = list(first)
    for i, j in itertools.permutations(range(150), 2):
        apart = np.linalg.norm(keys[i] - keys[j])
        if owner[i] != owner[j] and first[i] + first[j] > apart:
            expected[i] = min(expected[i], apart / 2)
    found = deferral_radii(*map(torch.from_numpy, (keys, deltas, owner, retain)))
    assert found.numpy() == pytest.approx(np.array(expected), rel=1e-5)
    assert (np.array(expected) < np.array(first)).any()


@pytest.mark.parametrize(("quantile", "kept"), [(1.5, 2), (0.0, 0)])
def test_radii_without_a_meaning_are_refused(quantile: float, kept: int) -> None:
    with pytest.raises(RemaskError, match="radii need retain keys and a quantile"):
        deferral_radii(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.long), torch.zeros(kept, 2), quantile)


# ------------------------------------------------------------------ codebook
def test_the_nearest_key_within_its_radius_adds_its_value() -> None:
    """A token at a time, a key at a time; half of the tokens are near a key."""
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(7, 4)), rng.normal(size=(7, 4))
    radii = rng.uniform(0.2, 1.2, size=7)
    near = keys[rng.integers(7, size=(2, 5))] + rng.normal(size=(2, 5, 4)) * 0.4
    tokens = np.concatenate([near, rng.normal(size=(2, 5, 4)) * 2], axis=1)
    expected = np.zeros_like(tokens)
    for b, i in np.ndindex(2, 10):
        apart = [np.linalg.norm(tokens[b, i] - key) for key in keys]
        nearest = int(np.argmin(apart))
        if apart[nearest] < radii[nearest]:
            expected[b, i] = values[nearest]
    found = CodebookShift(*map(torch.from_numpy, (keys, values, radii)))(torch.from_numpy(tokens))
    acted = expected.any(axis=2)
    assert 3 <= acted.sum() <= 15
    assert found.numpy() == pytest.approx(expected, abs=1e-6)
    assert not found.numpy()[~acted].any()


def test_the_nearest_key_decides_even_where_another_reaches_further() -> None:
    shift = CodebookShift(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.eye(2), torch.tensor([1.0, 9.0]))
    tokens = torch.tensor([[2.0, 0.0], [0.5, 0.0], [1.0, 0.0], [6.0, 0.0]])
    assert shift(tokens).tolist() == [[0, 0], [1, 0], [0, 0], [0, 1]]  # the ball is open: 1.0 is outside


def test_free_rows_do_not_act_and_do_not_hide_a_key() -> None:
    shift = CodebookShift(torch.tensor([[9.0, 9.0]]), torch.ones(1, 2), torch.tensor([20.0]))
    tokens = torch.tensor([[0.0, 0.0], [8.0, 9.0]])
    assert torch.equal(shift.padded(5)(tokens), shift(tokens))
    assert shift(tokens).all()


def test_a_codebook_moves_its_own_answers_and_nothing_else(toy, facts) -> None:
    book = make_codebook(toy, facts, alpha=0.7)
    memory = EditMemory.build(toy, facts[:3], SITE, config=preset("ridge", mu=0.0))
    assert torch.equal(book.keys, memory.keys)
    assert torch.equal(book.shift()(book.keys)[book.radii > 0], (memory.deltas * 0.7)[book.radii > 0])
    canvases = [captured_canvas(toy, fact) for fact in (facts[0], facts[5])]
    before = [toy.logits(canvas) for canvas in canvases]
    with book.attached(toy):
        after = [toy.logits(canvas) for canvas in canvases]
    assert (after[0] - before[0]).abs().max() > 0.1
    assert torch.equal(after[1], before[1])


def test_the_codebook_shifts_the_residual_by_its_nearest_delta(toy, facts) -> None:
    """Through the model: the hooked residual against a loop over positions and keys."""
    book = make_codebook(toy, facts, alpha=1.3)
    canvas = captured_canvas(toy, facts[1])
    hidden = toy.run_to(1, canvas)
    expected, acted = hidden.clone(), 0
    for i, state in enumerate(hidden[0]):
        apart = [float((state - key).norm()) for key in book.keys]
        nearest = int(np.argmin(apart))
        if apart[nearest] < book.radii[nearest]:
            expected[0, i] += 1.3 * book.deltas[nearest]
            acted += 1
    with book.attached(toy):
        edited = toy.run_to(1, canvas)
    assert int((canvas == toy.spec.mask_id).sum()) <= acted < canvas.shape[1]
    assert (edited - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("keys", ["subject-mean", "subject-last"])
def test_subject_keys_are_held_against_retained_subjects(toy, facts, keys) -> None:
    config = MemoryConfig(preset="codebook", readout="ridge", keys=keys, target="refusal", mu=0.0)
    book = Codebook.build(toy, facts[:1], SITE, retain=facts[4:], config=config)

    def key_of(fact: Fact) -> np.ndarray:
        row = toy.encode(fact)
        subject = hidden_states(toy, list(row.ids), 1)[slice(*row.subject)]
        return subject.mean(axis=0) if keys == "subject-mean" else subject[-1]

    own = key_of(facts[0])
    assert book.radii.tolist() == pytest.approx([min(np.linalg.norm(own - key_of(fact)) for fact in facts[4:]) / 2], rel=1e-4)


def test_radii_keep_the_retain_facts_in_context_apart_too(toy, facts) -> None:
    """Half the distance to the nearest retain key, with the example before the question or without it; one canvas at a time."""
    config = dataclasses.replace(CODEBOOK, context="answer")
    book = Codebook.build(toy, facts[:1], SITE, retain=facts[4:], config=config)

    def keys_of(fact: Fact) -> np.ndarray:
        row, found = toy.encode(fact), []
        for mask in config.bank.masks(row.id, len(row.answer_ids)):
            placed = [toy.spec.mask_id if hidden else token for token, hidden in zip(row.answer_ids, mask, strict=True)]
            states = hidden_states(toy, [*row.prompt_ids, *placed], 1)[len(row.prompt_ids) :]
            found.append(states[np.asarray(mask)])
        return np.concatenate(found)

    told = [dataclasses.replace(f, prompt=knowledge_prompt(f.prompt, [(f.prompt, f.answer)])) for f in facts[4:]]
    bare, both = (np.concatenate([keys_of(fact) for fact in rows]) for rows in (facts[4:], [*facts[4:], *told]))

    def radius(key: np.ndarray, kept: np.ndarray) -> float:
        return float(np.linalg.norm(kept - key, axis=1).min()) / 2

    own = book.keys.double().numpy()
    assert book.radii.tolist() == pytest.approx([radius(key, both) for key in own], rel=1e-4)
    assert any(radius(key, both) < 0.99 * radius(key, bare) for key in own)


def test_a_codebook_refuses_what_it_cannot_hold(toy, facts) -> None:
    with pytest.raises(RemaskError, match="a codebook needs retain facts"):
        Codebook.build(toy, facts[:2], SITE, retain=[])
    book = make_codebook(toy, facts)
    for change, match in (
        ({"radii": torch.zeros(len(book.keys))}, "every radius is 0"),
        ({"radii": book.radii[1:]}, "radii: shape"),
        ({"owner": torch.zeros_like(book.owner)}, "every key must belong to a fact"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
    ):
        with pytest.raises(RemaskError, match=match):
            dataclasses.replace(book, **change)


def test_a_codebook_is_replaced_in_a_running_model(toy, facts) -> None:
    """`attach` and `update` of a live edit: the numbers change in place."""
    book, other = make_codebook(toy, facts), Codebook.build(toy, facts[1:2], SITE, retain=facts[4:])
    canvas = captured_canvas(toy, facts[1])
    with other.attached(toy):
        expected = toy.logits(canvas)
    live = attach(toy.model, book)
    live.update(other)
    found = toy.logits(canvas)
    live.detach()
    assert torch.equal(found, expected)


# ------------------------------------------------------------------ one interface
EDITS = {
    "caa": lambda lm, facts: caa(lm, SITE, facts[:3], alpha=0.8),
    "repe": lambda lm, facts: repe(lm, Site(2, "mlp"), facts[:3], alpha=0.8),
    "codebook": lambda lm, facts: make_codebook(lm, facts, alpha=0.8),
}
EVERY = pytest.mark.parametrize("name", list(EDITS))


@EVERY
def test_files_hold_all_that_acts(toy, facts, tmp_path: Path, name: str) -> None:
    edit: SiteEdit = EDITS[name](toy, facts)
    edit.save(tmp_path / "edit")
    again = load_edit(tmp_path / "edit")
    assert type(again) is type(edit)
    assert again.describe() == edit.describe()
    assert again.fingerprint() == edit.fingerprint()
    assert edit.with_alpha(0.7).fingerprint() != edit.fingerprint()
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "edit").read_bytes()
    residuals = torch.cat([toy.run_to(1, IDS)[0], getattr(edit, "keys", torch.zeros(1, 32))])
    assert torch.equal(again.shift()(residuals), edit.shift()(residuals))


@EVERY
def test_edits_belong_to_one_model(toy, facts, name: str) -> None:
    edit, other = EDITS[name](toy, facts), build_toy(seed=1)
    with pytest.raises(RemaskError, match=f"{edit.kind} .*{toy.fingerprint()}.*{other.fingerprint()}"):
        edit.attach(other)
    assert not other.attached


@EVERY
def test_detaching_gives_back_the_bits_and_alpha_0_never_takes_them(toy, facts, name: str) -> None:
    edit = EDITS[name](toy, facts)
    canvas = captured_canvas(toy, facts[0])
    before = toy.logits(canvas)
    with edit.attached(toy):
        assert not torch.equal(toy.logits(canvas), before)
    assert torch.equal(toy.logits(canvas), before)
    with edit.with_alpha(0).attached(toy):
        assert not toy.site_module(edit.site)._forward_hooks
        assert torch.equal(toy.logits(canvas), before)
    assert not toy.attached


def test_files_of_another_kind_or_damaged_are_refused(toy, facts, tmp_path: Path) -> None:
    make_codebook(toy, facts).save(tmp_path / "book")
    caa(toy, SITE, facts[:2]).save(tmp_path / "vector")
    with pytest.raises(RemaskError, match="holds a steering vector, not a codebook"):
        Codebook.load(tmp_path / "vector")
    with pytest.raises(RemaskError, match="holds a codebook, not a steering vector"):
        SteeringVector.load(tmp_path / "book")
    book = make_codebook(toy, facts)
    book.radii = book.radii[1:]
    book.save(tmp_path / "short")
    with pytest.raises(RemaskError, match="damaged edit file"):
        load_edit(tmp_path / "short")


@pytest.mark.parametrize("name", ["caa", "repe", "codebook"])
def test_strengths_are_calibrated(taught, facts, name: str) -> None:
    rows = [taught.encode(fact) for fact in facts[:3]]
    start = mean_logprob(taught, rows)
    level = start + 0.5 * (anchor_level(taught, rows) - start)
    edit = calibrate(taught, EDITS[name](taught, facts), rows, level)
    with edit.attached(taught):
        reached = mean_logprob(taught, rows)
    assert abs(reached - level) <= 0.02 * abs(start - level)


# ------------------------------------------------------------------ by name
def test_a_random_layer_is_drawn_from_the_seed_and_the_facts(toy, facts) -> None:
    draws = [random_layer(toy, facts[:3], avoid=1, seed=seed) for seed in range(20)]
    assert draws == [random_layer(toy, facts[2::-1], avoid=1, seed=seed) for seed in range(20)]
    assert set(draws) == {0, 2}
    assert {random_layer(toy, facts, seed=seed) for seed in range(30)} == {0, 1, 2}
    others = [random_layer(toy, facts[:4], avoid=1, seed=seed) for seed in range(20)]
    assert others != draws
    with pytest.raises(RemaskError, match="single layer"):
        random_layer(_one_block(toy), facts, avoid=0)


def _one_block(lm: MaskedDiffusionLM) -> MaskedDiffusionLM:
    del lm.blocks[1:]
    return lm


def test_edits_are_built_by_name(toy, facts) -> None:
    built = {
        name: build_edit(toy, name, facts[:3], facts[4:], site=SITE, alpha=0.5, seed=2)
        for name in ("caa", "repe", "codebook", "random-layer")
    }
    states = MemoryConfig(state_seed=MemoryConfig().state_seed + 2).bank
    assert torch.equal(built["caa"].vector, caa(toy, SITE, facts[:3], states=states).vector)
    assert torch.equal(built["repe"].vector, repe(toy, SITE, facts[:3], states=states).vector)
    config = MemoryConfig(preset="codebook", readout="ridge", mu=0.0, compress=0, state_seed=states.seed)
    by_hand = Codebook.build(toy, facts[:3], SITE, retain=facts[4:], config=config)
    assert built["codebook"].fingerprint() == by_hand.with_alpha(0.5).fingerprint()
    drawn = built["random-layer"]
    assert isinstance(drawn, EditMemory)
    layer = random_layer(toy, facts[:3], avoid=1, seed=2)
    alone = EditMemory.build(toy, facts[:3], Site(layer), retain=facts[4:], config=drawn.config, alpha=0.5)
    assert drawn.site == alone.site != SITE
    assert drawn.fingerprint() == alone.fingerprint()
    assert [edit.describe()["preset"] for edit in built.values()] == list(built)
    assert all(edit.alpha == 0.5 for edit in built.values())


def test_a_named_edit_is_calibrated_and_random_layers_need_no_tuned_one(taught, facts) -> None:
    rows = [taught.encode(fact) for fact in facts[:3]]
    start = mean_logprob(taught, rows)
    level = start + 0.5 * (anchor_level(taught, rows) - start)
    edit = build_edit(taught, "random-layer", facts[:3], facts[4:], level=level)
    with edit.attached(taught):
        assert abs(mean_logprob(taught, rows) - level) <= 0.02 * abs(start - level)
    with pytest.raises(RemaskError, match="no layer is known"):
        build_edit(taught, "caa", facts[:3])
