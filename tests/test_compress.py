"""Compressed keys: centres, counts and losses by loops over the captured keys, each fact alone; and how keys are weighed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from remask.backbones import Site
from remask.editing import EditMemory, preset
from remask.editing.capture import Captured
from remask.editing.compress import compressed, lost_share
from remask.errors import RemaskError

SITE = Site(1)
SIZES = (9, 2, 5, 14)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captured(seed: int = 0, sizes: tuple[int, ...] = SIZES, d: int = 4) -> Captured:
    """Facts of so many keys each."""
    owner = torch.tensor([fact for fact, size in enumerate(sizes) for _ in range(size)])
    return Captured(draw(seed, len(owner), d), draw(seed + 1, len(owner), d), owner)


def same(one: Captured, other: Captured) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("keys", "deltas", "owner", "counts", "lost"))


def of_fact(whole: Captured, fact: int) -> list[Tensor]:
    return [part[whole.owner == fact] for part in (whole.keys, whole.deltas, whole.counts, whole.lost)]


@given(seed=seeds, limit=st.integers(1, 8))
def test_rows_stand_for_their_cluster(seed: int, limit: int) -> None:
    """Centres average to the mean of all; what they lose is what is left of the spread about it, summed row by row."""
    whole = captured(seed)
    found = compressed(whole, limit)
    assert found.owner.tolist() == sorted(found.owner.tolist())
    for fact, size in enumerate(SIZES):
        keys, deltas, counts, lost = of_fact(found, fact)
        own = whole.owner == fact
        assert len(keys) <= limit if size > limit else len(keys) == size
        assert counts.sum() == size
        mean, moved = (counts @ part / size for part in (keys, deltas))
        assert torch.allclose(mean, whole.keys[own].mean(0), atol=1e-5)
        assert torch.allclose(moved, whole.deltas[own].mean(0), atol=1e-5)
        for column, (centres, part) in enumerate(((keys, whole.keys[own]), (deltas, whole.deltas[own]))):
            middle = part.double().mean(0)
            about = sum(float((row - middle).square().sum()) for row in part.double())
            pairs = zip(counts, centres.double(), strict=True)
            between = sum(float(c * (row - middle).square().sum()) for c, row in pairs)
            assert float(lost[:, column].sum()) == pytest.approx(about - between, rel=1e-3, abs=1e-4)


def test_clusters_that_lie_apart_are_found_with_their_losses() -> None:
    keys = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 2.0], [100.0, 4.0], [100.0, 2.0]])
    deltas = torch.tensor([[1.0], [5.0], [3.0], [8.0], [2.0]])
    found = compressed(Captured(keys, deltas.expand(-1, 2), torch.zeros(5, dtype=torch.long)), 2)
    assert found.keys.tolist() == [[0.0, 1.0], [100.0, 2.0]]
    assert found.deltas.tolist() == [[2.0, 2.0], [5.0, 5.0]]
    assert found.counts.tolist() == [2.0, 3.0]
    assert found.lost.tolist() == [[2.0, 4.0], [8.0, 36.0]]  # 1 + 1 and (1 + 1) * 2; 4 + 4 + 0 and (0 + 9 + 9) * 2
    assert found.owner.tolist() == [0, 0]


def test_every_fact_is_compressed_by_itself() -> None:
    whole = captured()
    together = compressed(whole, 3)
    for gone in range(len(SIZES)):
        keep = whole.owner != gone
        left = [fact for fact in range(len(SIZES)) if fact != gone]
        owner = torch.tensor([left.index(fact) for fact in whole.owner[keep].tolist()])
        alone = compressed(Captured(whole.keys[keep], whole.deltas[keep], owner), 3)
        for place, fact in enumerate(left):
            assert all(torch.equal(a, b) for a, b in zip(of_fact(alone, place), of_fact(together, fact), strict=True))


def test_a_limit_that_no_fact_reaches_changes_nothing() -> None:
    whole = captured()
    for limit in (max(SIZES), max(SIZES) + 1, 1000):
        assert same(compressed(whole, limit), whole)
    assert whole.counts.tolist() == [1.0] * sum(SIZES) and not whole.lost.any()


def test_nothing_is_drawn() -> None:
    whole, state = captured(), torch.get_rng_state()
    one = compressed(whole, 3)
    torch.manual_seed(99)
    assert same(compressed(whole, 3), one)
    torch.set_rng_state(state)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6])
def test_equal_keys_are_one_cluster_and_nobody_is_warned(limit: int) -> None:
    """Three distinct keys, seen five times, once and twice: evenly spread rows would start most clusters at the first."""
    distinct = draw(0, 3, 4)
    order = [0, 0, 0, 0, 0, 1, 2, 2]
    deltas = draw(1, 8, 4)
    whole = Captured(distinct[order], deltas, torch.zeros(8, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compressed(whole, limit)
    assert found.counts.sum() == 8
    assert len(found.keys) <= min(limit, 3)
    if limit >= 3:
        assert torch.equal(found.keys, distinct)
        assert found.counts.tolist() == [5.0, 1.0, 2.0]
        assert not found.lost[:, 0].any()
        own = deltas[:5].double()
        assert found.deltas[0].tolist() == pytest.approx(own.mean(0).tolist(), rel=1e-6)
        assert float(found.lost[0, 1]) == pytest.approx(sum(float((row - own.mean(0)).square().sum()) for row in own), rel=1e-5)


@given(seed=seeds, limit=st.integers(2, 8))
def test_centres_that_lose_all_their_keys_are_dropped_silently(seed: int, limit: int) -> None:
    whole = Captured((draw(seed, 30, 1) * 2).round(), draw(seed, 30, 1), torch.zeros(30, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compressed(whole, limit)
    assert (found.counts >= 1).all() and found.counts.sum() == 30
    assert found.keys.isfinite().all()


def test_more_keys_a_fact_lose_less() -> None:
    whole = captured(sizes=(60, 40))
    shares = [lost_share(c.keys, c.deltas, c.counts, c.lost) for c in (compressed(whole, limit) for limit in (1, 4, 16, 60))]
    for lost in zip(*shares, strict=True):
        assert list(lost) == sorted(lost, reverse=True)
    assert shares[-1] == (0.0, 0.0)


@given(seed=seeds, limit=st.integers(1, 8))
def test_the_share_is_of_the_captured_squared_norms(seed: int, limit: int) -> None:
    whole = captured(seed)
    found = compressed(whole, limit)
    shares = lost_share(found.keys, found.deltas, found.counts, found.lost)
    for share, part, column in zip(shares, (whole.keys, whole.deltas), (0, 1), strict=True):
        total = sum(float(row.double().square().sum()) for row in part)
        assert 0 <= share <= 1
        assert share == pytest.approx(float(found.lost[:, column].double().sum()) / total, rel=1e-4, abs=1e-7)


def test_keys_that_are_not_finite_are_left_to_the_memory_to_refuse() -> None:
    whole = captured()
    whole.keys[3, 1] = float("inf")
    found = compressed(whole, 3)
    assert not found.keys.isfinite().all()
    with pytest.raises(RemaskError, match="keys: not every number is finite"):
        EditMemory(
            preset("paper"),
            SITE,
            tuple("abcd"),
            found.keys,
            found.deltas,
            found.owner,
            "model",
            1.0,
            None,
            (),
            found.counts,
            found.lost,
        )


# ------------------------------------------------------------------ weights
def memory(balance: float, counts: Tensor | None = None, owner: tuple[int, ...] = (0, 0, 0, 0, 1, 2)) -> EditMemory:
    n = len(owner)
    config = preset("ridge", mu=0.0, balance=balance)
    names = tuple("abc")[: max(owner) + 1]
    counts = torch.ones(n) if counts is None else counts
    return EditMemory(config, SITE, names, draw(0, n, 4), draw(1, n, 4), torch.tensor(owner), "model", counts=counts)


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (0.0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (1.0, [0.5, 0.5, 0.5, 0.5, 2.0, 2.0]),  # 2 keys a fact in the mean; the facts have 4, 1 and 1
        (0.5, [0.5**0.5] * 4 + [2**0.5] * 2),
    ],
)
def test_facts_count_alike_as_far_as_balance_says(balance: float, expected: list[float]) -> None:
    assert memory(balance).weights.tolist() == pytest.approx(expected)


def test_compressed_rows_weigh_what_they_stand_for() -> None:
    counts = torch.tensor([1.0, 5.0, 1.0, 1.0, 3.0, 1.0])  # 8, 3 and 1 keys: 4 a fact in the mean
    assert memory(0.0, counts).weights.tolist() == counts.tolist()
    assert memory(1.0, counts).weights.tolist() == pytest.approx([0.5, 2.5, 0.5, 0.5, 4.0, 4.0])
    assert float(memory(1.0, counts).weights.sum()) == pytest.approx(12)


def test_weights_decide_the_solution() -> None:
    """The ridge solution with W = diag(weights), written out in fp64."""
    found = memory(1.0)
    keys, deltas, weights = found.keys.double(), found.deltas.double(), torch.tensor([0.5] * 4 + [2.0] * 2).double()
    lam = 1e-3 * sum(float(key @ key) for key in keys) / len(keys)
    left = sum(w * torch.outer(key, key) for w, key in zip(weights, keys, strict=True)) + lam * torch.eye(4)
    right = sum(w * torch.outer(key, delta) for w, key, delta in zip(weights, keys, deltas, strict=True))
    probe = draw(5, 3, 4)
    assert torch.allclose(found.shift()(probe).double(), probe.double() @ torch.linalg.solve(left, right), atol=1e-4)
    assert not torch.allclose(found.shift()(probe), memory(0.0).shift()(probe), atol=1e-2)


# ------------------------------------------------------------------ in a memory
@pytest.mark.parametrize("name", ["default", "ridge", "softmax"])
def test_a_memory_keeps_compressed_rows(toy, facts, tmp_path: Path, name: str) -> None:
    def of(limit: int) -> EditMemory:
        return EditMemory.build(toy, facts[:3], SITE, retain=facts[4:], config=preset(name, compress=limit))

    every, few = of(0), of(2)
    rows = Captured(every.keys, every.deltas, every.owner)
    assert same(compressed(rows, 2), Captured(few.keys, few.deltas, few.owner, few.counts, few.lost))
    assert of(100).describe()["lost"] == every.describe()["lost"] == [0.0, 0.0]
    assert few.describe()["lost"] == list(lost_share(few.keys, few.deltas, few.counts, few.lost))
    assert all(0 < share < 1 for share in few.describe()["lost"])
    few.save(tmp_path / "m")
    again = EditMemory.load(tmp_path / "m")
    assert torch.equal(again.counts, few.counts) and torch.equal(again.lost, few.lost)
    left, alone = (
        few.remove(facts[1].id),
        EditMemory.build(toy, [facts[0], facts[2]], SITE, retain=facts[4:], config=few.config),
    )
    left.save(tmp_path / "left")
    alone.save(tmp_path / "alone")
    assert (tmp_path / "left").read_bytes() == (tmp_path / "alone").read_bytes()
