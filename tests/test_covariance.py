"""Second moments of MLP keys against explicit loops over tokens and states; their cache; keys and parameter names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import FACTS, GOLDEN_OPTIONS, GOLDENS, build_toy
from remask.backbones import Encoded, MaskedDiffusionLM, load
from remask.backbones.weight_edit import LowRank
from remask.editing.covariance import MomentConfig, ridged, second_moments, solve_moment
from remask.editing.mlp import Changes, output_matrix, require_editable
from remask.editing.rome import RomeConfig
from remask.errors import RemaskError


def keys_of(lm: MaskedDiffusionLM, layer: int, ids: Tensor) -> Tensor:
    """Input of the down projection [L, m] on one canvas [L], fp64, by a hook of its own."""
    seen: list[Tensor] = []
    handle = lm.model.model.layers[layer].mlp.down_proj.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0][0]))
    try:
        with torch.no_grad():
            lm.logits(ids[None])
    finally:
        handle.remove()
    return seen[0].double()


def text_rows(lm: MaskedDiffusionLM) -> list[Encoded]:
    """The last row has one answer token and so one state, drawn again and again."""
    rows = [lm.encode(FACTS[0]), lm.encode(FACTS[1]), lm.encode_text("note", "Ada Birk keeps a crow.")]
    return [*rows, Encoded("word", (9, 8), (7,), (0, 1))]


@pytest.mark.parametrize("tokens", ["visible", "masked", "all"])
def test_moment_is_the_mean_over_tokens_and_states(toy: MaskedDiffusionLM, tokens: str) -> None:
    config = MomentConfig(text_tokens=tokens, text_draws=5, seed=3)
    rows = text_rows(toy)
    found = second_moments(toy, [0, 2], rows, config)
    for layer in (0, 2):
        total, count = torch.zeros(48, 48, dtype=torch.float64), 0
        for row in rows:
            for mask in config.bank.masks(row.id, len(row.answer_ids)):
                hidden = np.concatenate([np.zeros(len(row.prompt_ids), dtype=bool), mask])
                ids = torch.tensor([toy.spec.mask_id if h else i for i, h in zip(row.ids, hidden, strict=True)])
                for key, masked in zip(keys_of(toy, layer, ids), hidden, strict=True):
                    if tokens == "all" or masked == (tokens == "masked"):
                        total += torch.outer(key, key)
                        count += 1
        assert found[layer].dtype == torch.float64
        torch.testing.assert_close(found[layer], total / count, rtol=1e-4, atol=1e-6 * float(total.abs().max()))


def test_cache_hits_are_the_same_tensors(toy: MaskedDiffusionLM, tmp_path: Path) -> None:
    rows, config = text_rows(toy), MomentConfig()
    first = second_moments(toy, [0, 1], rows, config, tmp_path)
    spent = toy.counters.forwards
    again = second_moments(toy, [1], rows, config, tmp_path)
    assert toy.counters.forwards == spent
    assert torch.equal(again[1], first[1])
    second_moments(toy, [1], rows, RomeConfig(steps=3), tmp_path)  # how values are optimised does not matter
    assert toy.counters.forwards == spent
    both = second_moments(toy, [1, 2], rows, config, tmp_path)  # one of two is there
    assert toy.counters.forwards > spent
    assert list(both) == [1, 2]
    assert torch.equal(both[2], second_moments(toy, [2], rows, config)[2])


def test_another_model_or_text_misses_the_cache(toy: MaskedDiffusionLM, tmp_path: Path) -> None:
    rows = text_rows(toy)
    second_moments(toy, [1], rows, MomentConfig(), tmp_path)
    others = [
        (rows[:2], MomentConfig()),
        (rows, MomentConfig(seed=1)),
        (rows, MomentConfig(text_draws=3)),
        (rows, MomentConfig(text_tokens="all")),
    ]
    for chosen, config in others:
        spent = toy.counters.forwards
        found = second_moments(toy, [1], chosen, config, tmp_path)
        assert toy.counters.forwards > spent
        assert torch.equal(found[1], second_moments(toy, [1], chosen, config)[1])
    changed = build_toy(seed=1)
    assert torch.equal(
        second_moments(changed, [1], rows, MomentConfig(), tmp_path)[1], second_moments(changed, [1], rows, MomentConfig())[1]
    )
    assert changed.counters.forwards > 0
    assert len(list(tmp_path.iterdir())) == 2 + len(others)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_cache_file_is_made_again(toy: MaskedDiffusionLM, tmp_path: Path, damage: str) -> None:
    rows = text_rows(toy)
    first = second_moments(toy, [1], rows, MomentConfig(), tmp_path)[1]
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes({"truncated": bytes(data[:-100]), "flipped": bytes(data), "emptied": b""}[damage])
    assert torch.equal(second_moments(toy, [1], rows, MomentConfig(), tmp_path)[1], first)
    spent = toy.counters.forwards
    assert torch.equal(second_moments(toy, [1], rows, MomentConfig(), tmp_path)[1], first)
    assert toy.counters.forwards == spent


def test_no_text_no_tokens_and_edited_models_are_refused(toy: MaskedDiffusionLM) -> None:
    with pytest.raises(RemaskError, match="there is none; pass --retain"):
        second_moments(toy, [0], [], MomentConfig())
    word = Encoded("word", (), (7,), (0, 0))  # one token, which every state hides
    with pytest.raises(RemaskError, match=r"no state of the text has visible tokens.*longer texts"):
        second_moments(toy, [0], [word], MomentConfig())
    with pytest.raises(RemaskError, match="layer 7 is outside"):
        second_moments(toy, [7], text_rows(toy), MomentConfig())


def test_ridge_is_in_units_of_the_mean_eigenvalue() -> None:
    moment = torch.diag(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert torch.equal(ridged(moment, 0.5).diagonal(), torch.tensor([2.5, 3.5, 7.5], dtype=torch.float64))


def test_a_singular_moment_names_the_remedy() -> None:
    key = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    with pytest.raises(RemaskError, match=r"3 dimensions\) is singular: raise it"):
        solve_moment(key.T @ key, key.T, "raise it")
    solved = solve_moment(ridged(key.T @ key, 1e-3), key.T, "raise it")
    torch.testing.assert_close(ridged(key.T @ key, 1e-3) @ solved, key.T)


def test_mixtures_of_experts_and_bad_layers_are_refused(toy: MaskedDiffusionLM) -> None:
    experts = load(GOLDENS / "llada_moe", **GOLDEN_OPTIONS["llada_moe"])
    with pytest.raises(RemaskError, match="mixture-of-experts layer has no single MLP key"):
        require_editable(experts, FACTS, [0], "ROME")
    for layers in ([], [1, 0], [1, 1]):
        with pytest.raises(RemaskError, match="increasing order, each once"):
            require_editable(toy, FACTS, layers, "MEMIT")
    toy.model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 48, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(RemaskError, match="layer 1 of toy-0 is quantised; load the model without"):
        output_matrix(toy, 1)


def test_changes_add_up_and_take_their_smaller_form(toy: MaskedDiffusionLM) -> None:
    changes, total = Changes(toy, "rome"), torch.zeros(32, 48)
    for index in range(30):
        left, right = torch.randn(32, 1, dtype=torch.float64), torch.randn(1, 48, dtype=torch.float64)
        changes.add(1, left, right)
        total += (left @ right).float()
        (change,) = changes.edit().changes.values()
        assert isinstance(change, LowRank) == (index + 1 <= 19)  # 19 * (32 + 48) <= 32 * 48 < 20 * (32 + 48)
    torch.testing.assert_close(change, total, rtol=1e-4, atol=1e-4)
    weight = toy.model.model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    with changes.applied():
        torch.testing.assert_close(weight.detach(), before + total, rtol=1e-4, atol=1e-3)
    assert torch.equal(weight, before)
