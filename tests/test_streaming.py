"""Streaming solves against the batch solve and explicit linear algebra, after any sequence of inserts and removals."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from remask.editing.solve import second_moment, solve_readout
from remask.editing.streaming import StreamingSolver
from remask.errors import RemaskError

KINDS = ("absolute", "relative", "retain", "retain absolute")
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**31)
changes = st.lists(st.tuples(st.booleans(), st.integers(1, 3), seeds), max_size=12)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings_of(kind: str, d: int) -> dict[str, Any]:
    retain = {"retain_moment": second_moment(draw(99, 2 * d, d)), "mu": 3.0} if "retain" in kind else {}
    return {"ridge": 0.1, "relative": kind in ("relative", "retain"), **retain}


def explicit(keys: torch.Tensor, ridge: float, relative: bool, retain_moment: Any = None, mu: float = 0.0) -> torch.Tensor:
    """K (K^T K + mu n M + lambda I)^-1 in fp64, in the d x d form whatever n is."""
    wide = keys.double()
    n, d = wide.shape
    scale = ridge * sum(float(row @ row) for row in wide) / n if relative else ridge
    system = wide.T @ wide + scale * torch.eye(d, dtype=torch.float64)
    if mu:
        system = system + mu * n * retain_moment.double()
    return torch.linalg.solve(system, wide.T).T


def exact(solver: StreamingSolver, d: int) -> torch.Tensor:
    """The readout in fp64."""
    return solver.coefficients(torch.eye(d, dtype=torch.float64)).T


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def tensors(solver: StreamingSolver) -> dict[str, torch.Tensor]:
    state = solver._state
    return {f.name: getattr(state, f.name) for f in fields(state) if isinstance(getattr(state, f.name), torch.Tensor)}


def ulps(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in units of the last place of the larger entry."""
    larger = torch.maximum(a.abs(), b.abs())
    return float(((a.double() - b.double()).abs() / (torch.nextafter(larger, torch.tensor(math.inf)) - larger)).max())


# ---------------------------------------------------------------- exactness
@given(kind=kinds, n=st.integers(1, 9), d=st.integers(2, 9), sequence=changes, seed=seeds)
def test_any_sequence_equals_the_batch_solve(kind: str, n: int, d: int, sequence: list[Any], seed: int) -> None:
    """Crossing n = d both ways, blocks of several rows, in every setting."""
    rows, config = draw(seed, n, d), settings_of(kind, d)
    solver = StreamingSolver(rows, **config)
    for insert, count, each in sequence:
        if insert:
            more = draw(each, count, d)
            solver.insert(more)
            rows = torch.cat([rows, more])
        elif len(rows) > 1:
            gone = torch.randperm(len(rows), generator=torch.Generator().manual_seed(each))[
                : min(count, len(rows) - 1)
            ].tolist()
            solver.remove(gone)
            rows = torch.stack([row for i, row in enumerate(rows) if i not in gone])
    batch = solve_readout(rows, **config)
    assert difference(exact(solver, d), explicit(rows, **config)) <= 1e-9
    assert difference(solver.readout, batch.readout) <= 1e-7
    assert solver.solution.condition == pytest.approx(batch.condition, rel=1e-3)
    assert solver.residual <= 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(20, 48), (90, 24)])
def test_readouts_are_equal_to_a_last_place_in_fp32(kind: str, n: int, d: int) -> None:
    keys, config = draw(1, n, d), settings_of(kind, d)
    solver = StreamingSolver(keys, **config)
    assert solver.readout.dtype == torch.float32 and ulps(solver.readout, solve_readout(keys, **config).readout) <= 1
    more = draw(2, 3, d)
    solver.insert(more[:1])
    solver.insert(more[1:])
    solver.remove([0, n])
    left = torch.cat([keys[1:], more[1:]])
    assert ulps(solver.readout, solve_readout(left, **config).readout) <= 1
    assert (solver.refreshes, solver.updates_since_refresh) == (0, 3)
    hidden = draw(3, 2, 5, d)
    loop = torch.stack([torch.stack([solver.readout @ hidden[i, j] for j in range(5)]) for i in range(2)])
    assert (solver.coefficients(hidden) - loop).abs().max() <= 1e-5 * loop.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_removing_all_but_one_and_inserting_again(kind: str) -> None:
    keys, config = draw(1, 12, 8), settings_of(kind, 8)
    for chunk in (1, 11):
        solver = StreamingSolver(keys, **config)
        for _ in range(0, 11, chunk):
            solver.remove([0] if chunk == 1 else range(11))
        assert difference(exact(solver, 8), explicit(keys[11:], **config)) <= 1e-9
        for start in range(0, 11, chunk):
            solver.insert(keys[start : start + chunk])
        assert difference(exact(solver, 8), explicit(torch.cat([keys[11:], keys[:11]]), **config)) <= 1e-9


@settings(max_examples=25)
@given(kind=kinds, seed=seeds)
def test_order_of_insertion_permutes_rows_only(kind: str, seed: int) -> None:
    keys, more, config = draw(seed, 10, 16), draw(seed + 1, 4, 16), settings_of(kind, 16)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    first, second = StreamingSolver(keys, **config), StreamingSolver(keys, **config)
    for i in range(4):
        first.insert(more[i : i + 1])
        second.insert(more[order[i] : order[i] + 1])
    expected = torch.cat([exact(first, 16)[:10], exact(first, 16)[10:][order]])
    assert difference(exact(second, 16), expected) <= 1e-12


# ---------------------------------------------------------------- forgetting
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(20, 48), (90, 24)])
def test_nothing_of_a_removed_row_stays(kind: str, n: int, d: int) -> None:
    """Every state tensor is the survivors' to rounding and owns no more memory; after `exact` it is theirs bit for bit.

    Slots that are free hold nothing, and after a refresh there are none.
    """
    keys, secret, config = draw(1, n, d), 100 * draw(2, 2, d), settings_of(kind, d)
    never = tensors(StreamingSolver(keys, **config))
    for was_exact in (False, True):
        solver = StreamingSolver(keys, **config)
        solver.insert(secret)
        assert difference(solver._state.gram.sum(), never["gram"].sum()) > 1e-3
        solver.remove([n, n + 1], exact=was_exact)
        assert solver.refreshes == int(was_exact)
        for name, tensor in tensors(solver).items():
            assert tensor.shape == never[name].shape
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 8
            if tensor.numel():
                assert difference(tensor, never[name]) <= 1e-9
            if was_exact:
                assert torch.equal(tensor, never[name])
        held = torch.zeros(len(solver._rows.data), dtype=torch.bool)
        held[solver._state.order] = True
        assert torch.equal(solver._rows.data[held], keys.double()) and not solver._rows.data[~held].any()
        solver.refresh()
        assert torch.equal(solver._rows.data, keys.double())
        assert all(torch.equal(tensor, never[name]) for name, tensor in tensors(solver).items())
        assert solver.updates_since_refresh == 0


def test_callers_tensors_are_copied() -> None:
    keys, more = draw(1, 4, 6).double(), draw(2, 1, 6).double()
    solver = StreamingSolver(keys, 0.1)
    solver.insert(more)
    before = solver.readout
    keys.zero_()
    more.zero_()
    solver.refresh()
    assert difference(solver.readout, before) <= 1e-6


def test_slots_are_used_again_and_room_grows_by_doubling() -> None:
    """Rows keep their order whatever slot they are in; the others are never copied for one row."""
    keys, solver = draw(1, 8, 3), StreamingSolver(draw(1, 8, 3), 0.5, relative=False, refresh=10**9)
    solver.insert(draw(2, 1, 3))
    place = solver._rows.data.data_ptr()
    assert len(solver._rows.data) == 16
    rows = torch.cat([keys, draw(2, 1, 3)])
    for t in range(20):
        solver.remove([t % 9])
        solver.insert(draw(10 + t, 1, 3))
        rows = torch.cat([rows[: t % 9], rows[t % 9 + 1 :], draw(10 + t, 1, 3)])
        assert torch.equal(solver.keys, rows.double())
    assert solver._rows.data.data_ptr() == place and solver.refreshes == 0
    assert difference(exact(solver, 3), explicit(rows, 0.5, False)) <= 1e-12


@given(kind=kinds, n=st.integers(1, 9), d=st.integers(2, 9), seed=seeds)
def test_the_bound_is_above_the_condition(kind: str, n: int, d: int, seed: int) -> None:
    state = StreamingSolver(draw(seed, n, d), **settings_of(kind, d))._state
    exact_condition = float(torch.linalg.cond(state.times(torch.eye(len(state.gram), dtype=torch.float64))))
    assert state.estimate * (1 - 1e-9) <= exact_condition <= state.bound * (1 + 1e-9)


# ---------------------------------------------------------------- refusals
def frozen(solver: StreamingSolver) -> tuple[Any, ...]:
    return id(solver._state), solver.refreshes, solver.updates_since_refresh, solver.readout.tolist()


@pytest.mark.parametrize(("n", "relative"), [(3, True), (3, False), (30, True), (30, False)])
def test_singular_rows_are_refused_and_nothing_is_lost(n: int, relative: bool) -> None:
    """Equal keys without a ridge: the batch solve's own sentence, the state as it was."""
    d = 8
    with pytest.raises(RemaskError, match="singular") as batch:
        solve_readout(draw(0, 1, d).expand(n, d), 1e-15, relative=relative)
    with pytest.raises(RemaskError, match="singular") as first:
        StreamingSolver(draw(0, 1, d).expand(n, d), 1e-15, relative=relative)
    assert str(first.value) == str(batch.value)
    if n > d:
        return
    keys = draw(1, n, d)
    solver = StreamingSolver(keys, 1e-15, relative=relative)
    before = frozen(solver)
    for bad in (keys[:1], torch.zeros(1, d)):
        with pytest.raises(RemaskError, match="singular") as later:
            solver.insert(bad)
        assert str(later.value) == str(batch.value)
        assert frozen(solver) == before
        free = torch.ones(len(solver._rows.data), dtype=torch.bool)
        free[solver._state.order] = False
        assert not solver._rows.data[free].any()
    solver.insert(draw(2, 1, d))
    assert difference(solver.readout, solve_readout(solver.keys, 1e-15, relative=relative).readout) <= 1e-6


def test_removal_that_leaves_a_singular_system_is_refused() -> None:
    """d x d without ridge: the last row in a direction cannot go."""
    keys = torch.cat([draw(1, 9, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([[0.0, 0.0, 0.0, 1.0]])])
    solver = StreamingSolver(keys, 0.0, relative=False)
    before = frozen(solver)
    with pytest.raises(RemaskError, match="singular"):
        solver.remove([9])
    assert frozen(solver) == before


def test_zero_and_equal_keys_with_a_ridge_are_fine() -> None:
    keys = torch.cat([draw(1, 3, 8), torch.zeros(1, 8)])
    solver = StreamingSolver(keys, 0.5, relative=False)
    solver.insert(keys[:2])
    solver.insert(torch.zeros(1, 8))
    rows = torch.cat([keys, keys[:2], torch.zeros(1, 8)])
    assert difference(exact(solver, 8), explicit(rows, 0.5, False)) <= 1e-12
    nothing = StreamingSolver(torch.zeros(2, 8), 0.5, relative=False)
    nothing.insert(torch.zeros(1, 8))
    assert not nothing.readout.any() and nothing.refreshes == 0


def test_bad_input_is_named() -> None:
    solver = StreamingSolver(draw(1, 4, 6), 0.1)
    before = frozen(solver)
    for index in ([4], [-1], [0, 7]):
        with pytest.raises(RemaskError, match=f"no row {index[-1]} among 4"):
            solver.remove(index)
    with pytest.raises(RemaskError, match="every row"):
        solver.remove([0, 1, 2, 3, 3])
    for keys in (draw(1, 2, 5), draw(1, 6), torch.full((1, 6), math.nan)):
        with pytest.raises(RemaskError, match=r"finite rows \[r, 6\]"):
            solver.insert(keys)
    with pytest.raises(RemaskError, match="at least one row"):
        StreamingSolver(draw(1, 0, 6), 0.1)
    with pytest.raises(RemaskError, match="second moment"):
        StreamingSolver(draw(1, 4, 6), 0.1, mu=1.0)
    solver.insert(draw(1, 0, 6))
    solver.remove([])
    assert frozen(solver) == before


# ---------------------------------------------------------------- drift
def residual_like(seed: int, n: int, d: int) -> torch.Tensor:
    """Rows as residual streams have them: a common direction 30 times as long as the rest, which lies in few directions."""
    return (draw(seed, n, 8) @ draw(2, 8, d) + 30 * draw(1, d)).double() + 1e-4 * draw(seed + 1, n, d)


def worst_drift(ridge: float, **control: Any) -> tuple[float, StreamingSolver]:
    solver, worst = StreamingSolver(residual_like(3, 40, 64), ridge, relative=False, **control), 0.0
    for t in range(600):
        if t % 2 == 0:
            solver.insert(residual_like(100 + 2 * t, 1, 64))
        else:
            solver.remove([(t * 7) % 40])
        if t % 12 > 9:
            rows = solver.keys
            gram = rows @ rows.T + ridge * torch.eye(len(rows), dtype=torch.float64)
            worst = max(worst, difference(exact(solver, 64), torch.cholesky_solve(rows, torch.linalg.cholesky(gram))))
    return worst, solver


def test_drift_is_kept_below_tolerance() -> None:
    """Condition 8e9: left alone, 600 updates end beyond the tolerance; the probe notices and solves anew."""
    loose, alone = worst_drift(3e-4, refresh=10**9, tolerance=math.inf)
    held, watched = worst_drift(3e-4)
    assert alone.refreshes == 0 and alone.updates_since_refresh == 600
    assert loose > 4e-6 and alone.residual > 1e-6
    assert held <= 1e-6 and 2 < watched.refreshes < 60


def test_ordinary_keys_do_not_drift() -> None:
    """A full-rank spread about the common direction (condition 2e5): eleven digits survive 600 updates without control."""
    common, d = 30 * draw(1, 48), 48
    keys = draw(2, 30, d) + common
    solver = StreamingSolver(keys, 1e-4, relative=False, refresh=10**9)
    for t in range(600):
        if t % 2 == 0:
            solver.insert(draw(100 + t, 1, d) + common)
        else:
            solver.remove([(t * 7) % 30])
    assert solver.refreshes == 0
    rows = solver.keys
    assert difference(exact(solver, d), exact(StreamingSolver(rows, 1e-4, relative=False), d)) <= 1e-10
    assert solver.residual <= 1e-10


def test_refresh_comes_after_so_many_updates() -> None:
    solver = StreamingSolver(draw(1, 6, 16), 0.1, relative=False, refresh=4)
    counts = []
    for i in range(9):
        solver.insert(draw(i, 1, 16)) if i % 2 == 0 else solver.remove([0])
        counts.append((solver.refreshes, solver.updates_since_refresh))
    assert counts == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]


# ---------------------------------------------------------------- cost
class Operations(TorchDispatchMode):
    """Counts floating point operations of what runs inside: products and solves by formula, all else one an element moved.

    The batch solve's condition number (singular values) is left out, in its favour.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            self.total += 2 * args[-2].shape[0] * args[-2].shape[1] * args[-1].shape[1]
        elif "cholesky_ex" in name:
            self.total += len(args[0]) ** 3 // 3
        elif "cholesky_solve" in name:
            self.total += 2 * args[0].numel() * len(args[1])
        elif "triangular" in name:
            self.total += args[1].numel() * len(args[0])
        elif "eigh" in name:
            self.total += 10 * len(args[0]) ** 3
        elif name in ("index", "index_put_"):  # what is moved, not where it lies
            self.total += (out if name == "index" else args[2]).numel()
        elif "svd" not in name and not func.is_view:
            self.total += max((t.numel() for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)), default=0)
        return out


def operations(call: Any) -> int:
    with Operations() as counter:
        call()
    return counter.total


def test_the_counter_counts() -> None:
    assert operations(lambda: draw(1, 3, 5) @ draw(1, 5, 7)) - operations(lambda: (draw(1, 3, 5), draw(1, 5, 7))) == 2 * 105
    square, column = torch.eye(6), torch.ones(6, 2)
    assert operations(lambda: torch.linalg.cholesky_ex(square)) == 72
    assert operations(lambda: torch.cholesky_solve(column, square)) == 2 * 36 * 2
    assert operations(lambda: torch.linalg.solve_triangular(square, column, upper=False)) == 36 * 2
    assert operations(lambda: torch.addmm(square, column, column.T)) == 2 * 36 * 2
    assert operations(lambda: square[torch.tensor([1, 4])]) - operations(lambda: torch.tensor([1, 4])) == 2 * 6
    assert operations(lambda: square.T[1:]) == 0 and operations(lambda: square + 1) == 36


@pytest.mark.parametrize("kind", KINDS)
def test_one_fact_among_ten_thousand_is_fifty_times_cheaper(kind: str) -> None:
    """With the next token's coefficients."""
    d, n = 192, 10_000
    keys, more, config = draw(1, n, d), draw(2, 1, d), settings_of(kind, d)
    rebuild = operations(lambda: solve_readout(keys, **config))
    assert rebuild >= 4 * n * d * d
    solver = StreamingSolver(keys, **config)

    inserting = operations(lambda: (solver.insert(more), solver.coefficients(more)))
    removing = operations(lambda: (solver.remove([7]), solver.coefficients(more)))
    assert solver.refreshes == 0
    assert rebuild >= 50 * inserting
    assert rebuild >= 50 * removing
