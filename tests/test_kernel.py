"""The kernel readout against its objective written out, kernel ridge regression, its two limits, and in a memory."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from remask.backbones import Site
from remask.editing import EditMemory, preset
from remask.editing.kernel import DEPENDENT, KernelSolution, solve_kernel, spread
from remask.editing.retained import Retained
from remask.editing.shift import KernelShift
from remask.errors import RemaskError

SITE = Site(1)
IDS = torch.arange(20, 50).view(2, 15)
N, M, D = 7, 9, 5
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Problem:
    """Forget keys with deltas and weights, retain keys, a centre, and how the readout is solved."""

    keys: Tensor
    deltas: Tensor
    weights: Tensor
    retain: Tensor
    centre: Tensor
    beta: float = 2.0
    mu: float = 3.0
    ridge: float = 1e-2
    landmarks: int = 1000

    @classmethod
    def of(cls, seed: int = 0, n: int = N, m: int = M, d: int = D, **settings: Any) -> Problem:
        """Keys off the origin, of lengths that differ; weights that differ."""
        base = 2 * draw(seed, d)
        keys, retain = base + draw(seed + 1, n, d), base + draw(seed + 2, m, d)
        return cls(keys, draw(seed + 3, n, d), draw(seed + 4, n).exp(), retain, retain.mean(0), **settings)

    def solve(self) -> KernelSolution:
        parts = (self.keys, self.deltas, self.weights, self.retain, self.centre)
        return solve_kernel(*parts, beta=self.beta, mu=self.mu, ridge=self.ridge, landmarks=self.landmarks)

    def shift(self) -> KernelShift:
        found = self.solve()
        return KernelShift(found.landmarks, found.values, self.beta, self.centre)

    def at(self, residuals: Tensor) -> Tensor:
        """The readout in fp64."""
        return self.shift()(residuals.double())

    def kernel(self, one: Tensor, other: Tensor) -> Tensor:
        """exp(beta (cos - 1)), a pair at a time, from residuals."""
        table = torch.zeros(len(one), len(other), dtype=torch.float64)
        for i, x in enumerate(one.double() - self.centre.double()):
            for j, y in enumerate(other.double() - self.centre.double()):
                table[i, j] = math.exp(self.beta * (float(x @ y) / float(x.norm() * y.norm()) - 1))
        return table


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max())


# ------------------------------------------------------------------ the solution
def objective(problem: Problem, values: Tensor, marks: Tensor) -> Tensor:
    """sum w |f(k) - d|^2 + mu (n/m) sum |f(r)|^2 + lambda tr(B^T k(Z, Z) B), a row at a time."""
    total = torch.zeros((), dtype=torch.float64)
    to_forget, to_retain = problem.kernel(problem.keys, marks), problem.kernel(problem.retain, marks)
    for phi, delta, weight in zip(to_forget, problem.deltas.double(), problem.weights.double(), strict=True):
        total = total + weight * (phi @ values - delta).square().sum()
    for phi in to_retain:
        total = total + problem.mu * len(problem.keys) / len(problem.retain) * (phi @ values).square().sum()
    gram = problem.kernel(marks, marks)
    return total + problem.ridge * (values.T @ gram @ values).trace()


def minimum(problem: Problem, marks: Tensor) -> Tensor:
    """B where the objective's gradient is zero: gradient and Hessian by autograd, then one step of Newton's method."""
    size = len(marks)
    zero = torch.zeros(size, problem.deltas.shape[1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(problem, zero, marks), zero, create_graph=True)
    columns = []
    for i in range(size):  # the same for every output dimension: the first is enough
        columns.append(torch.autograd.grad(gradient[i, 0], zero, retain_graph=True)[0][:, 0])
    return -torch.linalg.solve(torch.stack(columns), gradient.detach())


@pytest.mark.parametrize("landmarks", [1000, 8, 5, 2])
@pytest.mark.parametrize("mu", [0.0, 3.0])
def test_it_is_the_minimum_of_its_objective(landmarks: int, mu: float) -> None:
    problem = Problem.of(mu=mu, landmarks=landmarks)
    half = landmarks // 2
    marks = torch.cat([problem.keys[picked(N, half)], problem.retain[picked(M, landmarks - half)]])
    found = problem.solve()
    assert close(found.landmarks, torch.nn.functional.normalize(marks - problem.centre, dim=1), 1e-6)
    best = minimum(problem, marks)
    probes = draw(50, 20, D)
    assert close(problem.at(probes), problem.kernel(probes, marks) @ best, 1e-4)
    least = float(objective(problem, best, marks))
    assert float(objective(problem, found.values.double(), marks)) == pytest.approx(least, rel=1e-5)
    for step in 1e-2 * draw(51, 5, *best.shape).double():
        assert float(objective(problem, best + step, marks)) > least


def picked(there: int, count: int) -> list[int]:
    """Rows that are evenly spread over `there`."""
    return [i * there // count for i in range(count)] if count < there else list(range(there))


@given(seed=seeds, beta=st.floats(0.5, 6), mu=st.sampled_from([0.0, 0.5, 30.0]), ridge=st.floats(1e-3, 1))
def test_with_every_point_as_landmark_it_is_kernel_ridge_regression(seed, beta, mu, ridge) -> None:
    """Representer theorem: f = k(., X) (K + lambda W^-1)^-1 Y; weights w on forget rows, mu n/m on retain rows, Y = 0 there."""
    problem = Problem.of(seed, beta=beta, mu=mu, ridge=ridge)
    points = torch.cat([problem.keys, problem.retain]) if mu else problem.keys
    weights, targets = problem.weights.double(), problem.deltas.double()
    if mu:
        weights = torch.cat([weights, torch.full((M,), mu * N / M, dtype=torch.float64)])
        targets = torch.cat([targets, torch.zeros(M, D, dtype=torch.float64)])
    system = problem.kernel(points, points) + ridge * torch.diag(1 / weights)
    probes = torch.cat([problem.keys, problem.retain, problem.centre + draw(seed + 9, 5, D)])
    expected = problem.kernel(probes, points) @ torch.linalg.solve(system, targets)
    assert close(problem.at(probes), expected, 1e-3)


def test_a_key_of_weight_three_is_three_keys() -> None:
    problem = Problem.of(mu=0.0)
    times = torch.arange(N) % 3 + 1
    once = dataclasses.replace(problem, weights=times.float())
    often = dataclasses.replace(
        problem,
        keys=problem.keys.repeat_interleave(times, 0),
        deltas=problem.deltas.repeat_interleave(times, 0),
        weights=torch.ones(int(times.sum())),
    )
    probes = draw(8, 9, D)
    assert close(once.at(probes), often.at(probes), 1e-5)


def test_condition_is_that_of_the_system_in_orthonormal_coordinates() -> None:
    """Features that the kernel's own norm makes orthonormal: a symmetric root of k(Z, Z) gives the same eigenvalues."""
    problem = Problem.of(ridge=0.3)
    points = torch.cat([problem.keys, problem.retain])
    values, vectors = np.linalg.eigh(problem.kernel(points, points).numpy())
    coordinates = vectors * np.sqrt(values)  # k(X, Z) k(Z, Z)^(-1/2) where X = Z, up to a rotation
    scale = np.concatenate([problem.weights.double().numpy(), np.full(M, problem.mu * N / M)])
    system = coordinates.T @ (scale[:, None] * coordinates) + 0.3 * np.eye(N + M)
    assert problem.solve().condition == pytest.approx(np.linalg.cond(system), rel=1e-4)


# ------------------------------------------------------------------ its two limits
def test_for_a_small_beta_it_is_affine_in_the_direction() -> None:
    """Twice as many probes as an affine map of the unit vector has coefficients: what it leaves is of the order of beta."""
    left = []
    for beta in (4.0, 0.4, 0.04):
        problem = Problem.of(n=40, m=40, beta=beta, ridge=30 * beta)  # too large for what is of second order
        probes = draw(3, 12, D).double()
        units = torch.nn.functional.normalize(probes - problem.centre.double(), dim=1)
        design = torch.cat([units, torch.ones(12, 1)], dim=1)
        found = problem.at(probes)
        fit = design @ torch.linalg.lstsq(design, found).solution
        left.append(float((found - fit).norm() / (found - found.mean(0)).norm()))
    assert left[0] > 0.1
    assert left[2] < 0.01
    assert left[0] > 3 * left[1] > 9 * left[2]


def test_for_a_large_beta_it_is_a_look_up() -> None:
    problem = Problem.of(beta=500.0, ridge=1e-6)
    assert close(problem.at(problem.keys), problem.deltas, 1e-4)
    along = problem.centre + 7 * (problem.keys - problem.centre)  # a cosine knows no length
    assert close(problem.at(along), problem.deltas, 1e-4)
    assert problem.at(problem.retain).abs().max() < 1e-4
    elsewhere = problem.centre + draw(77, 200, D)
    towards = torch.nn.functional.normalize(elsewhere - problem.centre, dim=1)
    marks = torch.nn.functional.normalize(problem.keys - problem.centre, dim=1)
    far = (towards @ marks.T).max(dim=1).values < 0.9
    assert far.sum() > 50
    assert problem.at(elsewhere[far]).abs().max() < 1e-9


# ------------------------------------------------------------------ what it does to keys
def test_retain_keys_get_nothing_and_own_keys_their_deltas() -> None:
    problem = Problem.of(n=20, m=30, d=40, mu=1.0, ridge=1e-6)
    assert close(problem.at(problem.keys), problem.deltas, 1e-3)
    assert problem.at(problem.retain).abs().max() < 1e-3
    with_none = dataclasses.replace(problem, mu=0.0)
    assert with_none.at(problem.retain).norm() > 100 * problem.at(problem.retain).norm()


def test_a_larger_mu_costs_the_forget_keys_and_spares_the_retain_keys() -> None:
    on_forget, on_retain = [], []
    for mu in (0.1, 1.0, 10.0, 100.0):
        problem = Problem.of(n=40, m=60, d=6, mu=mu)
        on_forget.append(float((problem.weights.unsqueeze(1) * (problem.at(problem.keys) - problem.deltas).square()).sum()))
        on_retain.append(float(problem.at(problem.retain).square().sum()))
    assert on_forget == sorted(on_forget)
    assert on_retain == sorted(on_retain, reverse=True)


def test_forget_keys_that_are_retain_keys_are_split_by_their_weights() -> None:
    """One point with the targets d (weight 1) and 0 (weight mu): w d / (w + mu + lambda)."""
    point, away = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    problem = Problem(point, away, torch.tensor([1.0]), point, torch.zeros(2), mu=4.0, ridge=0.5)
    assert problem.at(point)[0].tolist() == pytest.approx([0.0, 1 / 5.5], rel=1e-5)
    whole = Problem.of(n=6, m=6, mu=1.0, ridge=1e-9)
    same = dataclasses.replace(whole, retain=whole.keys, weights=torch.ones(6), centre=2 * draw(0, D))
    assert close(same.at(same.keys), same.deltas / 2, 1e-3)


def test_keys_that_are_all_equal_to_the_mean_are_refused() -> None:
    problem = Problem.of()
    equal = dataclasses.replace(problem, keys=problem.centre.expand(N, -1))
    with pytest.raises(RemaskError, match=r"all keys equal the retain keys' mean.*another layer"):
        equal.solve()
    keys = problem.keys.clone()
    keys[0] = problem.centre  # one of them alone is no harm
    assert dataclasses.replace(problem, keys=keys).at(problem.keys).isfinite().all()


# ------------------------------------------------------------------ landmarks
def test_landmarks_are_evenly_spread_and_nothing_is_drawn() -> None:
    problem = Problem.of(n=30, m=50, landmarks=11)
    state = torch.get_rng_state()
    found = problem.solve()
    assert torch.equal(torch.get_rng_state(), state)
    forget, retain = [i * 30 // 5 for i in range(5)], [i * 50 // 6 for i in range(6)]
    chosen = torch.cat([problem.keys[forget], problem.retain[retain]]) - problem.centre
    assert close(found.landmarks, chosen / chosen.norm(dim=1, keepdim=True), 1e-6)
    again = problem.solve()
    assert torch.equal(again.landmarks, found.landmarks) and torch.equal(again.values, found.values)


@given(rows=st.integers(1, 60), count=st.integers(0, 70))
def test_spread_rows_are_distinct_in_order_and_evenly_apart(rows: int, count: int) -> None:
    found = spread(torch.arange(rows), count).tolist()
    assert len(found) == min(rows, count)
    assert found == sorted(set(found))
    gaps = [b - a for a, b in zip([*found, rows], [*found[1:], rows], strict=False)] if found else []
    assert not gaps or max(gaps[:-1] or [1]) - min(gaps[:-1] or [1]) <= 1


def test_few_landmarks_are_a_worse_fit_than_all() -> None:
    errors = []
    for landmarks in (2, 8, 32, 80):
        problem = Problem.of(n=40, m=40, mu=0.1, ridge=1e-6, landmarks=landmarks)
        errors.append(float((problem.at(problem.keys) - problem.deltas).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


# ------------------------------------------------------------------ precision
@pytest.mark.parametrize(("ridge", "tolerance"), [(1e-3, 1e-3), (1e-9, 1e-2)])
@pytest.mark.parametrize("beta", [1.0, 2.0, 4.0])
def test_fp32_forward_is_the_fp64_one(beta: float, ridge: float, tolerance: float) -> None:
    """Keys close to a subspace of few dimensions, as residuals are: k(Z, Z) is all but singular and values cancel."""
    plane, base = draw(1, 4, 24), 5 * draw(2, 24)
    points = base + draw(3, 200, 4) @ plane + 1e-3 * draw(4, 200, 24)
    keys, retain = points[:100], points[100:]
    deltas = ((keys - base) @ draw(5, 24, 24) / 5).tanh()
    problem = Problem(keys, deltas, torch.ones(100), retain, retain.mean(0), beta, 10.0, ridge)
    residuals = torch.cat([points, base + draw(6, 50, 4) @ plane])
    shift = problem.shift()
    cosines = shift.landmarks.double() @ shift.landmarks.double().T
    assert torch.linalg.cond((beta * (cosines - 1)).exp()) > 1e6
    narrow, wide = shift(residuals), shift(residuals.double())
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert float((narrow.double() - wide).norm()) <= tolerance * float(wide.norm())


def test_directions_that_fp32_cannot_tell_from_noise_are_left_out() -> None:
    """Two landmarks that all but coincide: their difference is worth less than DEPENDENT, so that no value is huge."""
    apart = math.sqrt(DEPENDENT) / 10
    keys = torch.tensor([[1.0, 0.0], [1.0, apart]])
    retain = torch.tensor([[-1.0, 1.0], [-1.0, -1.0]])
    problem = Problem(keys, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.ones(2), retain, torch.zeros(2), ridge=1e-12)
    found = problem.solve()
    assert found.values.abs().max() < 10
    assert found.condition < 1e13
    wider = dataclasses.replace(problem, keys=torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert close(wider.at(wider.keys), wider.deltas, 1e-3)


# ------------------------------------------------------------------ the shift as a module
def test_the_shift_is_a_loop_over_landmarks() -> None:
    marks = torch.nn.functional.normalize(draw(0, 4, D), dim=1)
    values, centre, residuals = draw(1, 4, D), draw(2, D), draw(3, 2, 3, D)
    shift = KernelShift(marks, values, 1.5, centre)
    found = shift(residuals)
    assert found.shape == residuals.shape
    for i, j in np.ndindex(2, 3):
        away = (residuals[i, j] - centre).double()
        cosines = [float(mark.double() @ away / away.norm()) for mark in marks]
        expected = sum(math.exp(1.5 * (c - 1)) * value.double() for c, value in zip(cosines, values, strict=True))
        assert close(found[i, j], expected, 1e-5)


def test_room_for_more_landmarks_changes_nothing_and_can_be_used() -> None:
    one = Problem.of(landmarks=6)
    other = Problem.of(40, n=12, m=12, landmarks=10, beta=3.0)
    small, large, residuals = one.shift(), other.shift(), draw(5, 8, D)
    assert (small.capacity, large.capacity, small.width) == (6, 10, D)
    room = small.padded(10)
    assert torch.allclose(room(residuals), small(residuals), rtol=1e-5, atol=1e-6)
    assert room.landmarks.data_ptr() != small.landmarks.data_ptr()
    places = {name: buffer.data_ptr() for name, buffer in room.named_buffers()}
    room.assign(large)
    assert torch.equal(room(residuals), large(residuals))
    room.assign(small)
    assert torch.equal(room(residuals), small.padded(10)(residuals))
    assert not room.values[6:].any() and not room.landmarks[6:].any()
    assert {name: buffer.data_ptr() for name, buffer in room.named_buffers()} == places
    with pytest.raises(RemaskError, match=r"10 keys.*room for 6"):
        small.assign(large)


# ------------------------------------------------------------------ in a memory
def test_a_memory_acts_as_its_solution(toy, facts) -> None:
    """Keys, weights, retain keys and their mean go in as they are; the strength multiplies what comes out."""
    config = preset("default", beta=3.0, mu=2.0, ridge=0.02, balance=0.5, compress=3, landmarks=10, retain_keys=11)
    memory = EditMemory.build(toy, facts[:3], SITE, retain=facts[4:], config=config, alpha=1.5)
    kept = memory.retained
    assert isinstance(memory.solution, KernelSolution) and kept is not None
    assert len(kept.keys) == 11 < kept.count
    problem = Problem(memory.keys, memory.deltas, memory.weights, kept.keys, kept.mean, 3.0, 2.0, 0.02, 10)
    expected = problem.solve()
    assert torch.equal(memory.solution.landmarks, expected.landmarks)
    assert torch.equal(memory.solution.values, expected.values)
    hidden = toy.run_to(1, IDS)
    assert torch.equal(memory.shift()(hidden), KernelShift(expected.landmarks, 1.5 * expected.values, 3.0, kept.mean)(hidden))
    with memory.attached(toy):
        assert close(toy.run_to(1, IDS), hidden + memory.shift()(hidden), 1e-6)


def test_kept_retain_keys_are_spread_over_all_of_them() -> None:
    rows = draw(0, 50, D)
    kept = Retained.of(rows, preset("default", retain_keys=7))
    assert torch.equal(kept.keys, rows[[i * 50 // 7 for i in range(7)]])
    assert kept.count == 50
    assert close(kept.mean, rows.double().mean(0), 1e-6)  # mean and moment are of all
    assert close(kept.moment, sum(torch.outer(row, row) for row in rows.double()) / 50, 1e-6)
    assert Retained.of(rows, preset("ridge", retain_keys=7)).keys.shape == (0, D)


def data_of(memory: EditMemory, folder: Path) -> bytes:
    memory.save(folder / "bytes")
    return (folder / "bytes").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"compress": 3}, {"landmarks": 6}, {"balance": 0.0}, {"retain_keys": 5}], ids=str)
def test_facts_come_and_go_without_a_trace(toy, facts, tmp_path: Path, changes: dict[str, Any]) -> None:
    """In any order, removed, merged, saved and loaded: bit for bit the memory that was built in one go, landmarks included."""

    def of(*chosen: int) -> EditMemory:
        config = preset("default", **changes)
        return EditMemory.build(toy, [facts[i] for i in chosen], SITE, retain=facts[4:], config=config, alpha=0.7)

    whole, never, hidden = of(0, 1, 2, 3), of(0, 2, 3), toy.run_to(1, IDS)
    assert data_of(whole, tmp_path) != data_of(never, tmp_path)
    whole.save(tmp_path / "file")
    ways = {
        "order": (of(2, 0, 3, 1), whole),
        "add": (of(2, 0).add(toy, [facts[3], facts[1]]), whole),
        "merge": (of(3, 1) + of(0, 2), whole),
        "load": (EditMemory.load(tmp_path / "file"), whole),
        "remove": (whole.remove(facts[1].id), never),
        "there and back": (never.add(toy, [facts[1]]).remove(facts[1].id), never),
    }
    for way, (found, expected) in ways.items():
        assert data_of(found, tmp_path) == data_of(expected, tmp_path), way
        assert torch.equal(found.shift()(hidden), expected.shift()(hidden)), way
        assert torch.equal(found.weights, expected.weights), way


def test_a_memory_at_strength_zero_or_detached_leaves_the_model_alone(toy, facts) -> None:
    before = toy.logits(IDS)
    memory = EditMemory.build(toy, facts[:3], SITE, retain=facts[4:])
    with memory.with_alpha(0.0).attached(toy):
        assert torch.equal(toy.logits(IDS), before)
    with memory.attached(toy):
        assert not torch.equal(toy.logits(IDS), before)
    assert torch.equal(toy.logits(IDS), before)


def test_a_memory_without_retain_keys_is_refused(toy, facts) -> None:
    with pytest.raises(RemaskError, match=r"'default'.*needs retain facts"):
        EditMemory.build(toy, facts[:2], SITE)
    parts = (("a",), draw(0, 1, D), draw(1, 1, D), torch.tensor([0]), "model")
    with pytest.raises(RemaskError, match=r"'kernel' needs retain keys"):
        EditMemory(preset("default"), SITE, *parts)
    linear = Retained.of(draw(2, 6, D), preset("ridge"))
    with pytest.raises(RemaskError, match=r"'kernel' does not fit the 0 retain keys"):
        EditMemory(preset("default"), SITE, *parts, retained=linear)
    kept = Retained.of(draw(2, 6, D), preset("default"))
    with pytest.raises(RemaskError, match=r"'ridge' does not fit the 6 retain keys"):
        EditMemory(preset("ridge"), SITE, *parts, retained=kept)
