"""The closed-form solve against torch.linalg.solve in both forms, numpy's least squares and brute selection."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remask.backbones import Site
from remask.editing import EditMemory, preset
from remask.editing.solve import ridge_scale, second_moment, solve_readout
from remask.errors import RemaskError

sizes = st.integers(1, 14)
seeds = st.integers(0, 2**31)
ridges = st.floats(1e-2, 10)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def memory(keys: torch.Tensor, deltas: torch.Tensor, **config: object) -> EditMemory:
    settings = preset("ridge", mu=0.0, **config)
    names = tuple(f"f{i:03}" for i in range(len(keys)))
    return EditMemory(settings, Site(0), names, keys, deltas, torch.arange(len(keys)), "model")


@given(n=sizes, d=sizes, ridge=ridges, seed=seeds)
def test_dual_equals_primal(n: int, d: int, ridge: float, seed: int) -> None:
    """(K K^T + lambda I)^-1 K = K (K^T K + lambda I)^-1, whichever of n and d is larger."""
    keys = draw(seed, n, d)
    readout = solve_readout(keys, ridge, relative=False).readout.double()
    wide = keys.double()
    dual = torch.linalg.solve(wide @ wide.T + ridge * torch.eye(n, dtype=torch.float64), wide)
    primal = torch.linalg.solve(wide.T @ wide + ridge * torch.eye(d, dtype=torch.float64), wide.T).T
    for reference in (dual, primal):
        assert (readout - reference).abs().max() <= 1e-6 * max(1.0, float(reference.abs().max()))


@given(n=sizes, d=sizes, m=sizes, mu=st.floats(0.01, 50), ridge=ridges, seed=seeds)
def test_retain_aware_solve_is_the_least_squares_solution(n, d, m, mu, ridge, seed) -> None:
    """min |K W - D|^2 + mu (n/m) |R W|^2 + lambda |W|^2 as one stacked system."""
    keys, deltas, retain = draw(seed, n, d), draw(seed + 1, n, 5), draw(seed + 2, m, d)
    solution = solve_readout(keys, ridge, relative=False, retain_moment=second_moment(retain), mu=mu)
    stacked = np.vstack([keys.double(), math.sqrt(mu * n / m) * retain.double(), math.sqrt(ridge) * np.eye(d)])
    right = np.vstack([deltas.double(), np.zeros((m, 5)), np.zeros((d, 5))])
    expected = np.linalg.lstsq(stacked, right, rcond=None)[0]
    found = (solution.readout.double().T @ deltas.double()).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6 * max(1.0, np.abs(expected).max()))
    gram = stacked.T @ stacked
    assert solution.condition == pytest.approx(np.linalg.cond(gram), rel=1e-6)


@given(n=sizes, d=sizes, m=sizes, mu=st.sampled_from([0.0, 0.3, 20.0]), ridge=ridges, seed=seeds)
def test_weighted_solve_is_the_least_squares_solution(n, d, m, mu, ridge, seed) -> None:
    """min sum_i w_i |k_i W - d_i|^2 + mu (n/m) |R W|^2 + lambda |W|^2 as one stacked system, in both forms."""
    keys, deltas, retain = draw(seed, n, d), draw(seed + 1, n, 5), draw(seed + 2, m, d)
    weights = draw(seed + 3, n).exp()
    found = solve_readout(keys, ridge, relative=False, retain_moment=second_moment(retain), mu=mu, weights=weights).readout
    root = weights.double().sqrt().unsqueeze(1)
    stacked = np.vstack([root * keys.double(), math.sqrt(mu * n / m) * retain.double(), math.sqrt(ridge) * np.eye(d)])
    right = np.vstack([root * deltas.double(), np.zeros((m, 5)), np.zeros((d, 5))])
    expected = np.linalg.lstsq(stacked, right, rcond=None)[0]
    shift = (found.double().T @ deltas.double()).numpy()
    np.testing.assert_allclose(shift, expected, atol=5e-6 * max(1.0, np.abs(expected).max()))


@given(n=st.integers(1, 6), d=sizes, ridge=ridges, seed=seeds)
def test_a_key_of_weight_three_is_three_keys(n: int, d: int, ridge: float, seed: int) -> None:
    keys, deltas = draw(seed, n, d), draw(seed + 1, n, d)
    times = torch.arange(n) % 3 + 1
    once = solve_readout(keys, ridge, relative=False, weights=times.float()).readout
    often = solve_readout(keys.repeat_interleave(times, 0), ridge, relative=False).readout
    one, other = once.T @ deltas, often.T @ deltas.repeat_interleave(times, 0)
    assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


@given(n=sizes, d=sizes, scale=st.floats(0.01, 100), seed=seeds)
def test_relative_ridge_does_not_depend_on_the_keys_scale(n: int, d: int, scale: float, seed: int) -> None:
    """With dimensionless lambda, scaling all keys by c scales the readout by 1/c."""
    keys = draw(seed, n, d)
    plain, scaled = (solve_readout(k, 0.1, relative=True).readout for k in (keys, keys * scale))
    assert (scaled * scale - plain).abs().max() <= 1e-4 * max(1.0, float(plain.abs().max()))
    norms = [float((row.double() ** 2).sum()) for row in keys]
    assert ridge_scale(keys, 0.1, True) == pytest.approx(0.1 * sum(norms) / n)
    assert ridge_scale(keys, 0.1, False) == 0.1


def test_singular_keys_are_refused_in_both_forms() -> None:
    for n, d in [(3, 8), (30, 8)]:
        keys = draw(0, 1, d).expand(n, d)
        with pytest.raises(RemaskError, match="singular"):
            solve_readout(keys, 1e-15, relative=True)


def test_retain_weight_without_retain_keys_is_refused() -> None:
    with pytest.raises(RemaskError, match="needs retain facts"):
        solve_readout(draw(0, 2, 3), 0.1, mu=1.0)


@given(n=st.integers(1, 40), percent=st.integers(1, 100), seed=seeds)
def test_q_keeps_exactly_the_largest_ceil_qn(n: int, percent: int, seed: int) -> None:
    hidden = draw(seed + 1, 2, 3, 6)
    keys = draw(seed, n, 6)
    dense = hidden @ memory(keys, keys).solution.readout.T
    sparse = memory(keys, keys, q=min(percent / 100, 1 - 1e-9)).shift().coefficients(hidden)
    keep = math.ceil(Fraction(percent, 100) * n)
    assert sparse.shape == (2, 3, n)
    for full, kept in zip(dense.reshape(-1, n), sparse.reshape(-1, n), strict=True):
        chosen = kept.nonzero().flatten().tolist()
        assert chosen == sorted(sorted(range(n), key=lambda i: -abs(float(full[i])))[:keep])
        assert torch.equal(kept[chosen], full[chosen])


@given(n=st.integers(1, 20), seed=seeds)
def test_q_of_one_equals_dense(n: int, seed: int) -> None:
    """The folded d x d map, the unfolded sum over all keys, and a loop over keys agree."""
    keys, deltas, hidden = draw(seed, n, 6), draw(seed + 1, n, 6), draw(seed + 2, 4, 6)
    full = memory(keys, deltas, q=1.0)
    nearly = memory(keys, deltas, q=1 - 1e-3)  # ceil keeps all n: the unfolded path
    readout = full.solution.readout
    loop = sum(float(readout[i] @ hidden[2]) * deltas[i] for i in range(n))
    for edit in (full, nearly):
        shift = shift_of(edit, hidden)
        assert (shift[2] - loop).abs().max() <= 1e-4 * max(1.0, float(loop.abs().max()))
    assert (shift_of(full, hidden) - shift_of(nearly, hidden)).abs().max() <= 1e-4 * max(1.0, float(loop.abs().max()))


def shift_of(edit: EditMemory, hidden: torch.Tensor) -> torch.Tensor:
    """What the attached hook adds, through a stand-in model whose only site is the identity."""

    class Identity:
        name, attached = "identity", []
        device = hidden.device
        module = torch.nn.Identity()

        def fingerprint(self) -> str:
            return "model"

        def site_module(self, _site: Site) -> torch.nn.Module:
            return self.module

    lm = Identity()
    undo = edit._install(lm)  # type: ignore[arg-type]
    try:
        return lm.module(hidden) - hidden
    finally:
        undo()
