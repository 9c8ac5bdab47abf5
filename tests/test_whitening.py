"""Whitened readouts against numpy and scipy, computed key by key from residuals; and as shifts that live in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from remask.backbones import Site
from remask.editing import EditMemory, MemoryConfig, preset
from remask.editing.retained import Retained
from remask.editing.shift import LinearShift, TopShift, WhitenedShift
from remask.editing.solve import whitening
from remask.errors import RemaskError

SITE = Site(1)
N, M, D = 4, 12, 6
Array = NDArray[np.float64]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def retain_keys(seed: int = 3) -> Tensor:
    """Keys off the origin that vary by factors from 0.1 to 3 along slanted axes."""
    return draw(seed, D) + draw(seed + 1, M, D) @ torch.diag(torch.logspace(-1, 0.5, D)) @ draw(seed + 2, D, D)


def memory_of(config: MemoryConfig, retain: Tensor | None = None, alpha: float = 1.0, seed: int = 10, n: int = N) -> EditMemory:
    kept = None if retain is None else Retained.of(retain, config)
    keys = draw(seed, D) + 2 * draw(seed + 1, n, D)
    names = tuple(f"f{i:02}" for i in range(n))
    return EditMemory(config, SITE, names, keys, draw(seed + 2, n, D), torch.arange(n), "", alpha, kept)


def by_numpy(retain: Tensor) -> tuple[Array, Array]:
    """The retain keys' mean and (C + eps I)^(-1/2), by the definitions."""
    rows = retain.double().numpy()
    covariance = np.cov(rows.T, bias=True)
    floor = 1e-3 * np.linalg.eigvalsh(covariance).mean()
    root: Array = np.real(scipy.linalg.fractional_matrix_power(covariance + floor * np.eye(D), -0.5))
    return rows.mean(0), root


def cosine(one: Array, other: Array) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def close(found: Tensor, expected: Array, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(found.double().numpy() - expected).max() <= tolerance * np.abs(expected).max())


# ------------------------------------------------------------------ the numbers
def test_the_matrix_is_the_inverse_root_of_the_covariance() -> None:
    retain = retain_keys()
    kept = Retained.of(retain, preset("default"))
    found = whitening(kept.mean, kept.moment).numpy()
    _, expected = by_numpy(retain)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(found - found.T).max() <= 1e-12 * np.abs(found).max()
    rows = retain.double().numpy()
    before, after = (np.linalg.eigvalsh(np.cov(part.T, bias=True)) for part in (rows, rows @ found))
    assert np.allclose(after, before / (before + 1e-3 * before.mean()), atol=1e-3)


def test_kernel_equals_normal_equations_in_whitened_coordinates() -> None:
    beta, mu, ridge, alpha = 1.3, 3.0, 1e-2, 0.7
    retain = retain_keys()
    memory = memory_of(preset("default", whiten=True, beta=beta, mu=mu, ridge=ridge), retain, alpha)
    mean, root = by_numpy(retain)
    keys, quiet = ([root @ (row - mean) for row in part.double().numpy()] for part in (memory.keys, retain))
    landmarks = [*keys, *quiet]

    def features(points: list[Array]) -> Array:
        return np.array([[np.exp(beta * (cosine(x, z) - 1)) for z in landmarks] for x in points])

    phi, rho, gram = features(keys), features(quiet), features(landmarks)
    system = phi.T @ phi + mu * N / M * rho.T @ rho + ridge * gram
    values = np.linalg.solve(system, phi.T @ memory.deltas.double().numpy())
    tokens = 2 * draw(20, 9, D)
    expected = alpha * features([root @ (row - mean) for row in tokens.double().numpy()]) @ values
    assert close(memory.shift()(tokens), expected, 1e-3)


@pytest.mark.parametrize("centre", [False, True])
def test_softmax_equals_a_loop_in_whitened_coordinates(centre: bool) -> None:
    beta, alpha = 3.0, 1.6
    retain = retain_keys()
    memory = memory_of(preset("softmax", whiten=True, beta=beta, centre=centre), retain, alpha)
    mean, root = by_numpy(retain)
    rows = np.concatenate([memory.keys.double().numpy(), retain.double().numpy()])
    middle = mean if centre else rows.mean(0)
    values = np.concatenate([memory.deltas.double().numpy(), np.zeros((M, D))])
    tokens = 2 * draw(20, 9, D)
    for token, found in zip(tokens.double().numpy(), memory.shift()(tokens), strict=True):
        drawn = np.array([np.exp(beta * cosine(root @ (key - middle), root @ (token - middle))) for key in rows])
        assert close(found, alpha * drawn @ values / drawn.sum())


@pytest.mark.parametrize("q", [1.0, 0.5])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("mu", [0.0, 4.0])
def test_ridge_equals_the_system_in_whitened_coordinates(mu: float, centre: bool, q: float) -> None:
    ridge, alpha = 0.05, 1.2
    retain = retain_keys()
    memory = memory_of(preset("ridge", whiten=True, mu=mu, centre=centre, q=q, ridge=ridge), retain, alpha)
    mean, root = by_numpy(retain)
    middle = mean if centre else 0 * mean
    keys, quiet = ((part.double().numpy() - middle) @ root for part in (memory.keys, retain))
    scale = ridge * (keys**2).sum(1).mean()
    system = keys.T @ keys + mu * N / M * quiet.T @ quiet + scale * np.eye(D)
    tokens = 2 * draw(20, 9, D)
    coefficients = (tokens.double().numpy() - middle) @ root @ np.linalg.solve(system, keys.T)
    for row in coefficients:
        row[np.argsort(-np.abs(row))[int(np.ceil(q * N)) :]] = 0
    shift = memory.shift()
    assert close(shift(tokens), alpha * coefficients @ memory.deltas.double().numpy(), 1e-3)
    assert type(shift) is (LinearShift if q == 1 else TopShift)  # folded: no further product


def test_a_quiet_direction_is_told_apart_only_whitened() -> None:
    """Two forget keys differ where retain keys hardly vary: whitened, one is moved and the other is not."""
    retain = torch.cat([100 * draw(0, 40, 1), 0.1 * draw(1, 40, 1)], dim=1)
    moved, still = torch.tensor([[60.0, 1.0]]), torch.tensor([[60.0, -1.0]])
    keys, deltas = torch.cat([moved, still]), torch.tensor([[1.0, 0.0], [0.0, 1e-6]])
    share = {}
    for whiten in (False, True):
        config = preset("softmax", beta=3.0, whiten=whiten)
        memory = EditMemory(config, SITE, ("a", "b"), keys, deltas, torch.arange(2), "", 1.0, Retained.of(retain, config))
        share[whiten] = float(memory.shift()(moved)[0, 0] / memory.shift()(still)[0, 0])
    assert share[False] < 1.1
    assert share[True] > 3


# ------------------------------------------------------------------ as a memory
@pytest.mark.parametrize("name", ["default", "softmax", "ridge"])
def test_a_whitened_memory_acts_and_is_stored(toy, facts, tmp_path: Path, name: str) -> None:
    """Also without a retain term: the covariance alone is read from the retain facts, and kept."""
    config = preset(name, whiten=True, **({"mu": 0.0} if name == "ridge" else {}))
    memory = EditMemory.build(toy, facts[:3], SITE, retain=facts[4:], config=config, alpha=0.5)
    memory.save(tmp_path / "m.safetensors")
    loaded = EditMemory.load(tmp_path / "m.safetensors")
    ids = torch.arange(20, 50).view(2, 15)
    before = toy.run_to(1, ids)
    with memory.attached(toy):
        edited = toy.run_to(1, ids)
    with loaded.attached(toy):
        assert torch.equal(toy.run_to(1, ids), edited)
    assert not torch.equal(before, edited)
    assert torch.equal(toy.run_to(1, ids), before)
    assert torch.allclose(edited, before + memory.shift()(before))
    assert torch.equal(memory.with_alpha(1.0).shift()(before), memory.shift()(before) * 2)


def test_whitened_shifts_take_each_other_over_in_place() -> None:
    config, retain = preset("softmax", whiten=True), retain_keys()
    one, two = (memory_of(config, retain, seed=seed) for seed in (10, 30))
    live, tokens = one.shift().padded(40), draw(20, 5, D)
    assert live.capacity == 40
    assert live.width == D
    assert torch.allclose(live(tokens), one.shift()(tokens), atol=1e-6)
    places = {name: buffer.data_ptr() for name, buffer in live.named_buffers()}
    live.assign(two.shift())
    assert torch.allclose(live(tokens), two.shift()(tokens), atol=1e-6)
    assert {name: buffer.data_ptr() for name, buffer in live.named_buffers()} == places
    now = live(tokens)
    others = {
        "WhitenedShift": memory_of(preset("softmax"), retain).shift(),
        "SoftmaxShift": memory_of(preset("default", whiten=True), retain).shift(),
        "room for 40": memory_of(config, retain, n=60).shift(),
    }
    for words, other in others.items():
        with pytest.raises(RemaskError, match=words):
            live.assign(other)
        assert torch.equal(live(tokens), now)
    assert isinstance(live, WhitenedShift)


# ------------------------------------------------------------------ what is refused
def test_whitening_needs_retain_facts_and_a_readout_that_compares(toy, facts) -> None:
    config = preset("ridge", mu=0.0, whiten=True)
    assert config.needs_retain
    with pytest.raises(RemaskError, match="needs retain facts"):
        EditMemory.build(toy, facts[:2], SITE, config=config)
    with pytest.raises(RemaskError, match="whitening needs retain keys"):
        memory_of(config)
    with pytest.raises(RemaskError, match="whiten=False"):
        preset("gated", whiten=True)


@pytest.mark.parametrize("name", ["default", "softmax", "ridge"])
def test_retain_keys_that_do_not_vary_are_refused(name: str) -> None:
    changes: dict[str, Any] = {"mu": 0.0} if name == "ridge" else {}
    with pytest.raises(RemaskError, match="do not vary"):
        memory_of(preset(name, whiten=True, **changes), draw(0, 1, D).expand(M, D)).shift()
