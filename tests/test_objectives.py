"""Every loss and its gradient against a second derivation: scalar loops over rows, states, tokens and ids in float64.

The loops below share no formula with the library: softmax is written out, L / count is counted, rows are walked one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remask.backbones import BackboneSpec, Encoded
from remask.errors import RemaskError
from remask.unlearning.objectives import METHODS, RETAIN, Quantities
from remask.unlearning.objectives.divergence import divergence
from remask.unlearning.objectives.representation import direction
from remask.unlearning.states import Noise, draw_states

V, D = 7, 5
LENGTHS = (3, 5, 2)  # response tokens of three rows
SCORED = ((0, 1), (0, 3), (1, 5), (1, 2), (2, 1), (2, 2))  # (row, hidden tokens) of each state
ALL = "mdu me ga graddiff kl capped npo simnpo dpo idk wga satimp undial rmu adaptive-rmu task-vector whp".split()


def quantities(seed: int = 0, dtype: torch.dtype = torch.float64, scored: Sequence[tuple[int, int]] = SCORED) -> Quantities:
    """Random numbers for everything that a loss may read; logits and hidden states are leaves with gradient."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(count for _, count in scored)

    def normal(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype)

    return Quantities(
        logits=normal(n, V).requires_grad_(),
        target=torch.randint(V, (n,), generator=rng),
        state=torch.tensor([s for s, (_, count) in enumerate(scored) for _ in range(count)]),
        row=torch.tensor([r for r, _ in scored]),
        weight=torch.tensor([LENGTHS[r] / count for r, count in scored], dtype=dtype),
        length=torch.tensor(LENGTHS[: max(r for r, _ in scored) + 1]),
        reference=normal(n, V),
        anchor=normal(n, V),
        hidden=normal(n, D).requires_grad_(),
        hidden_reference=normal(n, D),
    )


def with_refusal(made: Quantities) -> Quantities:
    return replace(made, preferred=quantities(99))


# ------------------------------------------------------------------ the loops
def softmax(z: Sequence[Any]) -> list[Any]:
    powers = [v.exp() if isinstance(v, Tensor) else math.exp(v) for v in z]
    return [power / sum(powers) for power in powers]


def nll(z: Tensor, target: int) -> Tensor:
    return -softmax(list(z))[int(target)].log()


def positions(made: Quantities, row: int) -> list[list[int]]:
    """Scored positions of a row, state by state."""
    states = [s for s, r in enumerate(made.row.tolist()) if r == row]
    return [[i for i, s in enumerate(made.state.tolist()) if s == state] for state in states]


def token_mean(made: Quantities, row: int, value: Callable[[int], Any]) -> Any:
    per_state = [sum(value(i) for i in state) / len(state) for state in positions(made, row)]
    return sum(per_state) / len(per_state)


def bound(made: Quantities, row: int, logits: Tensor | None = None) -> Tensor:
    logits = made.logits if logits is None else logits
    length = int(made.length[row])
    sums = [length / len(state) * sum(nll(logits[i], made.target[i]) for i in state) for state in positions(made, row)]
    return sum(sums) / len(sums)


def kl(p: Sequence[Any], q: Sequence[Any]) -> Any:
    return sum(a * (torch.as_tensor(a).log() - torch.as_tensor(b).log()) for a, b in zip(p, q, strict=True))


def log_sigmoid(x: Tensor) -> Tensor:
    return -(1 + (-x).exp()).log()


def pulled(made: Quantities, row: int, tau: float = 0.25, eta: float = 0.0, order: str = "forward") -> Tensor:
    def value(i: int) -> Tensor:
        policy = made.logits[i].detach()
        goal = [tau * (float(u) - eta * (float(c) - float(u))) for u, c in zip(made.anchor[i], policy, strict=True)]
        p, q = softmax(list(made.logits[i])), [torch.tensor(v, dtype=torch.float64) for v in softmax(goal)]
        if order == "js":
            m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            return kl(p, m) / 2 + kl(q, m) / 2
        return kl(p, q) if order == "forward" else kl(q, p)

    return token_mean(made, row, value)


def fitted(made: Quantities, row: int, goal: Callable[[int], list[float]]) -> Tensor:
    return token_mean(made, row, lambda i: kl(softmax(goal(i)), softmax(list(made.logits[i]))))


def undial_goal(made: Quantities, i: int, beta: float) -> list[float]:
    return [float(z) - (beta if v == int(made.target[i]) else 0.0) for v, z in enumerate(made.reference[i])]


def whp_goal(made: Quantities, i: int, alpha: float) -> list[float]:
    return [float(z) - alpha * max(0.0, float(r) - float(z)) for z, r in zip(made.reference[i], made.anchor[i], strict=True)]


def weighted(made: Quantities, row: int, weight: Callable[[float], float]) -> Tensor:
    def value(i: int) -> Tensor:
        token = nll(made.logits[i], made.target[i])
        return -weight(math.exp(-float(token.detach()))) * token

    return token_mean(made, row, value)


def preference(made: Quantities, row: int, beta: float) -> Tensor:
    won = bound(made.preferred, row, made.preferred.reference) - bound(made.preferred, row)
    lost = bound(made, row, made.reference) - bound(made, row)
    return -2 / beta * log_sigmoid(beta * (won - lost))


def pushed(made: Quantities, row: int, coefficient: float) -> Tensor:
    rng_entries = direction(D, 0).tolist()
    return token_mean(made, row, lambda i: sum((made.hidden[i][k] - coefficient * rng_entries[k]) ** 2 for k in range(D)) / D)


CASES: list[tuple[str, dict[str, Any], Callable[[Quantities, int], Tensor]]] = [
    ("mdu", {}, pulled),
    ("mdu", {"tau": 1.0}, lambda q, r: pulled(q, r, 1.0)),
    ("mdu", {"tau": 0.0}, lambda q, r: pulled(q, r, 0.0)),
    ("mdu", {"tau": 1.5, "eta": 0.7}, lambda q, r: pulled(q, r, 1.5, 0.7)),
    ("mdu", {"tau": 0.5, "direction": "reverse"}, lambda q, r: pulled(q, r, 0.5, order="reverse")),
    ("mdu", {"tau": 0.5, "direction": "js"}, lambda q, r: pulled(q, r, 0.5, order="js")),
    ("me", {}, lambda q, r: token_mean(q, r, lambda i: math.log(V) + sum(p * p.log() for p in softmax(list(q.logits[i]))))),
    ("ga", {}, lambda q, r: -bound(q, r) / int(q.length[r])),
    ("ga", {"normalised": False}, lambda q, r: -bound(q, r)),
    ("graddiff", {}, lambda q, r: -bound(q, r) / int(q.length[r])),
    ("kl", {}, lambda q, r: -bound(q, r) / int(q.length[r])),
    ("capped", {"cap": 1.5}, lambda q, r: -token_mean(q, r, lambda i: nll(q.logits[i], q.target[i]).clamp(max=1.5))),
    ("npo", {"beta": 0.3}, lambda q, r: -2 / 0.3 * log_sigmoid(0.3 * (bound(q, r) - bound(q, r, q.reference)))),
    (
        "npo",
        {"normalised": True},
        lambda q, r: -2 / 0.1 * log_sigmoid(0.1 * (bound(q, r) - bound(q, r, q.reference)) / LENGTHS[r]),
    ),
    ("simnpo", {"beta": 2.5, "delta": 0.4}, lambda q, r: -2 / 2.5 * log_sigmoid(2.5 * (bound(q, r) / LENGTHS[r] - 0.4))),
    ("dpo", {}, lambda q, r: preference(q, r, 0.1)),
    ("dpo", {"beta": 0.5}, lambda q, r: preference(q, r, 0.5)),
    ("idk", {}, lambda q, r: bound(q.preferred, r) / LENGTHS[r]),
    ("wga", {"beta": 0.7}, lambda q, r: weighted(q, r, lambda p: p**0.7)),
    ("satimp", {}, lambda q, r: weighted(q, r, lambda p: p**5 * (1 - p))),
    ("undial", {"beta": 3.0}, lambda q, r: fitted(q, r, lambda i: undial_goal(q, i, 3.0))),
    ("whp", {"alpha": 2.0}, lambda q, r: fitted(q, r, lambda i: whp_goal(q, i, 2.0))),
    ("task-vector", {}, lambda q, r: bound(q, r) / LENGTHS[r]),
    ("rmu", {}, lambda q, r: pushed(q, r, 20.0)),
    ("adaptive-rmu", {"coefficient": 3.0}, lambda q, r: pushed(q, r, 3.0)),
]


def leaves(made: Quantities) -> list[Tensor]:
    own = [made.logits, made.hidden]
    return own + (leaves(made.preferred) if made.preferred is not None else [])


def gradients(rows: Tensor, made: Quantities) -> list[Tensor]:
    """Of every row's loss, each with a factor of its own."""
    factors = torch.tensor([1.0, -0.3, 2.5], dtype=rows.dtype)[: len(rows)]
    found = torch.autograd.grad((rows * factors).sum(), leaves(made), allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves(made), strict=True)]


@pytest.mark.parametrize(("name", "options", "by_hand"), CASES, ids=[f"{name}-{options}" for name, options, _ in CASES])
def test_value_and_gradient_of_every_loss(name: str, options: dict[str, Any], by_hand: Any) -> None:
    made = with_refusal(quantities())
    method = METHODS[name]
    loss = method.loss(made, method.parse(options))
    expected = torch.stack([by_hand(made, r) for r in range(len(LENGTHS))])
    torch.testing.assert_close(loss.rows, expected, atol=1e-10, rtol=1e-7)
    assert float(expected.detach().abs().min()) > 1e-4
    for got, wanted in zip(gradients(loss.rows, made), gradients(expected, made), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-6)
    assert all(part.shape == (3,) and not part.requires_grad and part.isfinite().all() for part in loss.parts.values())


RETAIN_CASES = {
    "mask-loss": lambda q, r: bound(q, r) / LENGTHS[r],
    "kl": lambda q, r: token_mean(q, r, lambda i: kl(softmax(list(q.reference[i])), softmax(list(q.logits[i])))),
    "hidden": lambda q, r: token_mean(
        q, r, lambda i: sum((a - b) ** 2 for a, b in zip(q.hidden[i], q.hidden_reference[i], strict=True)) / D
    ),
}


@pytest.mark.parametrize("name", RETAIN)
def test_retain_terms(name: str) -> None:
    made = quantities(3)
    loss = RETAIN[name].loss(made)
    expected = torch.stack([RETAIN_CASES[name](made, r) for r in range(len(LENGTHS))])
    torch.testing.assert_close(loss.rows, expected, atol=1e-10, rtol=1e-8)
    for got, wanted in zip(gradients(loss.rows, made), gradients(expected, made), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


def test_sums_over_states_and_rows() -> None:
    made = quantities()
    assert torch.equal(made.logprob("reference"), -made.cross_entropy("reference"))
    values = torch.arange(len(made.target), dtype=torch.float64)
    assert made.per_state(values).tolist() == [0, 1 + 2 + 3, 4 + 5 + 6 + 7 + 8, 9 + 10, 11, 12 + 13]
    assert made.per_row(values).tolist() == [(0 + 6) / 2, (30 + 19 * 5 / 2) / 2, (11 * 2 + 25) / 2]
    assert made.per_token(values).tolist() == [1.0, (6 + 9.5) / 2, (11 + 12.5) / 2]


@pytest.mark.parametrize("name", ALL)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    """Also under fresh numbers for the other rows: one sigmoid, one mean a row."""
    made, method = with_refusal(quantities()), METHODS[name]
    options = method.parse({"coefficient": 2.0} if name == "adaptive-rmu" else {})
    rows = method.loss(made, options).rows

    def cut(full: Quantities) -> Quantities:
        """The second row alone."""
        keep = full.row[full.state] == 1
        tensors = {"logits", "target", "reference", "anchor", "hidden", "hidden_reference"}
        parts = {f.name: getattr(full, f.name)[keep] for f in fields(full) if f.name in tensors}
        states = full.row == 1
        state = full.state[keep] - int(full.state[keep].min())
        preferred = None if full.preferred is None else cut(full.preferred)
        return Quantities(
            **parts,
            state=state,
            row=full.row[states] * 0,
            weight=full.weight[states],
            length=full.length[1:2],
            preferred=preferred,
        )

    torch.testing.assert_close(method.loss(cut(made), options).rows, rows[1:2], atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------ MDU and ME
def mdu(made: Quantities, **options: Any) -> Tensor:
    return METHODS["mdu"].loss(made, METHODS["mdu"].parse(options)).rows


def me(made: Quantities, **options: Any) -> Tensor:
    return METHODS["me"].loss(made, METHODS["me"].parse(options)).rows


def test_mdu_at_tau_zero_is_maximum_entropy() -> None:
    made = quantities()
    p = made.logits.detach().softmax(dim=-1)
    entropy = -(p * p.log()).sum(dim=-1)
    expected = torch.stack([token_mean(made, r, lambda i: math.log(V) - entropy[i]) for r in range(3)])
    for rows in (mdu(made, tau=0.0), me(made), mdu(replace(made, anchor=1e4 * made.anchor), tau=0.0)):
        torch.testing.assert_close(rows.detach(), expected, atol=1e-12, rtol=1e-12)
    for got, wanted in zip(gradients(mdu(made, tau=0.0), made), gradients(me(made), made), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("order", ["forward", "reverse", "js"])
def test_mdu_is_exactly_zero_where_the_policy_is_its_anchor(order: str) -> None:
    for dtype in (torch.float32, torch.float64):
        made = quantities(dtype=dtype)
        made = replace(made, anchor=made.logits.detach().clone())
        rows = mdu(made, tau=1.0, direction=order)
        if order == "js":  # log of a mean is rounded
            assert rows.abs().max() < 1e-6
        else:
            assert rows.tolist() == [0.0] * 3
            assert all(not g.any() for g in gradients(rows, made))
        assert (mdu(made, tau=0.5) > 0).all()


@pytest.mark.parametrize("mean", ["row", "token"])
def test_mdu_of_the_start_model_is_exactly_zero_once_the_prompt_is_masked(toy, mean: str) -> None:
    mask = toy.spec.mask_id
    rows = [Encoded("a", (mask,) * 3, (10, 11, 12), (0, 1)), Encoded("b", (mask,) * 5, (13, 14), (0, 1))]
    states = draw_states(toy.spec, rows, Noise(draws=2), (0,), tail=1)
    made = Quantities(
        logits=toy.logits(states.ids, states.attention, states.scored),
        target=states.clean[states.scored],
        state=states.scored.nonzero()[:, 0],
        row=states.row,
        weight=states.weight,
        length=states.length,
        anchor=toy.logits(states.anchored(mask), states.attention, states.scored),
    )
    assert mdu(made, tau=1.0, mean=mean).tolist() == [0.0, 0.0]
    assert (mdu(made, tau=0.5, mean=mean) > 0).all()


def test_gradient_of_mdu_in_closed_form() -> None:
    """d kl / d z_k = p_k (log p_k / p*_k - kl) at every position, here with one state of one position a row."""
    made = quantities(scored=((0, 1), (1, 1), (2, 1)))
    mdu(made, tau=0.6).sum().backward()
    for i in range(3):
        p = softmax(made.logits[i].tolist())
        goal = softmax([0.6 * u for u in made.anchor[i].tolist()])
        value = sum(a * math.log(a / b) for a, b in zip(p, goal, strict=True))
        expected = [a * (math.log(a / b) - value) for a, b in zip(p, goal, strict=True)]
        assert made.logits.grad[i].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_constant_added_to_anchor_logits_changes_nothing() -> None:
    made = quantities()
    shifted = replace(made, anchor=made.anchor + torch.linspace(-50, 70, len(made.anchor), dtype=torch.float64)[:, None])
    for options in ({"tau": 1.0}, {"tau": 0.3, "eta": 0.5}, {"direction": "js"}):
        torch.testing.assert_close(mdu(shifted, **options), mdu(made, **options), atol=1e-11, rtol=1e-11)


def test_mean_over_tokens_weighs_positions_alike() -> None:
    made = quantities()
    values = []
    for i in range(len(made.target)):
        p = softmax(made.logits[i].tolist())
        goal = softmax([0.25 * u for u in made.anchor[i].tolist()])
        values.append(sum(a * math.log(a / b) for a, b in zip(p, goal, strict=True)))
    assert mdu(made, mean="token").mean().item() == pytest.approx(sum(values) / len(values))
    owners = made.row[made.state].tolist()
    expected = [3 * sum(v for v, r in zip(values, owners, strict=True) if r == row) / len(values) for row in range(3)]
    assert mdu(made, mean="token").tolist() == pytest.approx(expected)
    assert mdu(made, mean="row").mean().item() != pytest.approx(sum(values) / len(values), rel=1e-3)


@pytest.mark.parametrize("order", ["forward", "reverse", "js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excluded_ids_leave_the_distribution_on_both_sides(order: str, dtype: torch.dtype) -> None:
    """As an option, or as -inf that came with the logits: the loss of the vocabulary without them, no gradient on them."""
    made = quantities(dtype=dtype)
    keep, gone = [0, 1, 3, 4, 6], [2, 5]
    small = replace(
        made, logits=made.logits.detach()[:, keep].clone().requires_grad_(), anchor=made.anchor[:, keep], target=made.target * 0
    )
    for options in ({"tau": 0.0}, {"tau": 0.7}, {"tau": 0.7, "eta": 0.3}):
        expected = mdu(small, direction=order, **options)
        wanted = gradients(expected, small)[0]
        given = replace(made, logits=made.logits.detach().clone(), anchor=made.anchor.clone())
        given.logits[:, gone] = given.anchor[:, gone] = -torch.inf
        given.logits.requires_grad_()
        for case, extra in ((made, {"exclude_special": (2, 5)}), (given, {})):
            rows = mdu(case, direction=order, **options, **extra)
            torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
            got = gradients(rows, case)[0]
            torch.testing.assert_close(got[:, keep], wanted, atol=1e-5, rtol=1e-4)
            assert not got[:, gone].any()
    torch.testing.assert_close(me(given), me(small), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(me(made, exclude_special=(2, 5)), mdu(small, tau=0.0), atol=1e-5, rtol=1e-5)


def test_an_excluded_id_outside_of_the_vocabulary_is_named() -> None:
    with pytest.raises(RemaskError, match="exclude_special: id 7 is outside the vocabulary of 7"):
        me(quantities(), exclude_special=(7,))


@pytest.mark.parametrize("name", ["undial", "whp", "kl-retain", "ga", "npo"])
def test_minus_infinity_on_both_sides_is_finite_elsewhere(name: str) -> None:
    made = quantities()
    logits = made.logits.detach().clone()
    logits[:, 2] = -torch.inf
    cut = [None if part is None else part.clone() for part in (made.reference, made.anchor)]
    for part in cut:
        part[:, 2] = -torch.inf
    made = replace(
        made,
        logits=logits.requires_grad_(),
        reference=cut[0],
        anchor=cut[1],
        target=made.target.masked_fill(made.target == 2, 3),
    )
    loss = RETAIN["kl"].loss(made) if name == "kl-retain" else METHODS[name].loss(made, METHODS[name].parse({}))
    assert loss.rows.isfinite().all()
    got = gradients(loss.rows, made)[0]
    assert got.isfinite().all()
    assert not got[:, 2].any()


def test_extreme_logits_in_fp32_agree_with_float64() -> None:
    wide = quantities(5)
    logits = (40 * wide.logits.detach()).requires_grad_()
    wide = replace(wide, logits=logits, anchor=40 * wide.anchor)
    narrow = replace(wide, logits=logits.detach().float().requires_grad_(), anchor=wide.anchor.float(), hidden=wide.hidden)
    for options in ({"tau": 0.0}, {"tau": 1.0}, {"tau": 1.0, "direction": "reverse"}, {"tau": 1.0, "direction": "js"}):
        one, two = mdu(wide, **options), mdu(narrow, **options)
        torch.testing.assert_close(two.double(), one, atol=1e-4, rtol=1e-5)
        for a, b in zip(gradients(one, wide)[:1], gradients(two, narrow)[:1], strict=True):
            assert b.isfinite().all()
            torch.testing.assert_close(b.double(), a, atol=1e-3, rtol=1e-4)


def test_half_precision_anchor_and_reference_are_widened() -> None:
    made = quantities(dtype=torch.float32)
    half = replace(made, anchor=made.anchor.bfloat16(), reference=made.reference.bfloat16())
    same = replace(made, anchor=half.anchor.float(), reference=half.reference.float())
    for name in ("mdu", "npo", "undial", "whp"):
        options = METHODS[name].parse({})
        assert torch.equal(METHODS[name].loss(half, options).rows, METHODS[name].loss(same, options).rows)
    assert torch.equal(RETAIN["kl"].loss(half).rows, RETAIN["kl"].loss(same).rows)


def test_a_divergence_leaves_its_inputs_alone() -> None:
    made = quantities()
    target = made.anchor.log_softmax(dim=-1)
    before = made.logits.detach().clone(), target.clone()
    for order in ("forward", "reverse", "js"):
        values = divergence(made.logits, target, order)
        values.sum().backward()
        assert torch.equal(made.logits.detach(), before[0])
        assert torch.equal(target, before[1])
        made.logits.grad = None
        assert torch.autograd.gradcheck(lambda z, order=order: divergence(z, target, order), (made.logits,))


# ------------------------------------------------------------------ ascent
@pytest.mark.parametrize(("name", "options"), [("wga", {"beta": 2.0}), ("satimp", {})])
def test_weights_are_detached(name: str, options: dict[str, Any]) -> None:
    """The gradient is that of the cross-entropies with the weights as constants."""
    made = quantities()
    loss = METHODS[name].loss(made, METHODS[name].parse(options))
    p = torch.tensor([softmax(z)[t] for z, t in zip(made.logits.tolist(), made.target.tolist(), strict=True)])
    weight = p**2 if name == "wga" else p**5 * (1 - p)
    got = gradients(loss.rows, made)[0]
    factors = [1.0, -0.3, 2.5]
    for i, z in enumerate(made.logits.tolist()):
        row = int(made.row[made.state[i]])
        state = positions(made, row)
        size = next(len(s) for s in state if i in s)
        share = factors[row] / len(state) / size * float(weight[i])
        expected = [-share * (a - (v == int(made.target[i]))) for v, a in enumerate(softmax(z))]
        assert got[i].tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.allclose(
        loss.parts["weight"], torch.stack([token_mean(made, r, lambda i: weight[i]) for r in range(3)]).double()
    )


def test_capped_tokens_get_no_gradient() -> None:
    made = quantities()
    nats = made.cross_entropy().detach()
    loss = METHODS["capped"].loss(made, METHODS["capped"].parse({"cap": float(nats.median())}))
    got = gradients(loss.rows, made)[0].abs().sum(dim=1) > 0
    assert got.tolist() == (nats <= nats.median()).tolist()


# ------------------------------------------------------------------ preference losses
@pytest.mark.parametrize("normalised", [False, True])
def test_npo_tends_to_gradient_ascent(normalised: bool) -> None:
    """Error of order beta: a tenth of beta, a tenth of the difference."""
    made = quantities()
    ascent = gradients(METHODS["ga"].loss(made, METHODS["ga"].parse({"normalised": normalised})).rows, made)[0]
    errors = []
    for beta in (1e-3, 1e-4, 1e-5):
        options = METHODS["npo"].parse({"beta": beta, "normalised": normalised})
        errors.append(float((gradients(METHODS["npo"].loss(made, options).rows, made)[0] - ascent).abs().max()))
    assert errors[2] < 1e-4 * float(ascent.abs().max())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.02)


def test_one_sigmoid_a_row_not_one_a_batch() -> None:
    made = quantities()
    options = METHODS["npo"].parse({"beta": 1.0})
    loss = METHODS["npo"].loss(made, options)
    gaps = [(bound(made, r) - bound(made, r, made.reference)).item() for r in range(3)]
    assert loss.rows.tolist() == pytest.approx([2 * math.log(1 + math.exp(-gap)) for gap in gaps])
    of_the_mean = 2 * math.log(1 + math.exp(-sum(gaps) / 3))
    assert loss.rows.mean().item() > of_the_mean + 0.1
    assert loss.parts["gap"].tolist() == pytest.approx(gaps)
    # A row that is forgotten already keeps its small share of the gradient whatever the others do.
    pulls = torch.autograd.grad(loss.rows.sum(), made.logits)[0]
    ascent = torch.autograd.grad(made.bound().sum(), made.logits)[0]
    for r in range(3):
        mine = made.row[made.state] == r
        torch.testing.assert_close(pulls[mine], -2 / (1 + math.exp(gaps[r])) * ascent[mine])


# ------------------------------------------------------------------ paired noise
LENGTH = 4
SUBSETS = [m for m in itertools.product([False, True], repeat=LENGTH) if any(m)]
LAW = np.array([1 / (LENGTH * math.comb(LENGTH, sum(m))) for m in SUBSETS])


def toy_table(answer: Sequence[int], change: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of policy and reference under every mask of `answer`: a model ids -> logits, and one whose weights are moved."""
    rng = np.random.default_rng(seed)
    embed, out, noise = (
        rng.normal(size=(V + 1, 8)),
        rng.normal(size=(LENGTH, 8 * LENGTH, V)),
        rng.normal(size=(8 * LENGTH, V)),
    )

    def model(ids: Tensor, moved: float) -> Tensor:
        """[B, LENGTH] to [B, LENGTH, V]."""
        features = torch.tensor(np.tanh(embed[ids.numpy()].reshape(len(ids), -1)))
        return torch.einsum("bf,lfv->blv", features, torch.tensor(out)) + moved * (features @ torch.tensor(noise))[:, None]

    hidden = torch.tensor(SUBSETS)
    ids = torch.where(hidden, V, torch.tensor(answer))
    state = hidden.nonzero()[:, 0]
    made = Quantities(
        logits=model(ids, change)[hidden],
        target=torch.tensor(answer).expand(len(ids), -1)[hidden],
        state=state,
        row=torch.arange(len(ids)),
        weight=LENGTH / hidden.sum(dim=1),
        length=torch.full((len(ids),), LENGTH),
        reference=model(ids, 0.0)[hidden],
    )
    return made.bound().numpy(), made.bound("reference").numpy()


def spread(values: np.ndarray, shares: np.ndarray) -> float:
    return float((shares * values**2).sum() - (shares * values).sum() ** 2)


def preference_loss(margin: np.ndarray, beta: float = 0.1) -> np.ndarray:
    return 2 / beta * np.log1p(np.exp(-beta * margin))


ANSWER, REFUSAL = (0, 1, 2, 3), (4, 5, 6, 4)


@pytest.mark.parametrize(("change", "of_loss", "of_gap"), [(0.05, 158, 146), (0.2, 13.2, 11.7), (0.6, 2.97, 2.66)])
def test_shared_masks_cancel_the_noise_of_npo(change: float, of_loss: float, of_gap: float) -> None:
    """Every mask, or pair of masks, with its probability: how much less variance than with fresh masks.

    It shrinks as the policy leaves its reference.
    """
    policy, reference = toy_table(ANSWER, change)
    pairs = np.multiply.outer(LAW, LAW)
    shared = spread(preference_loss(policy - reference), LAW)
    fresh = spread(preference_loss(policy[:, None] - reference[None, :]), pairs)
    assert fresh / shared == pytest.approx(of_loss, rel=0.01)
    assert (spread(policy, LAW) + spread(reference, LAW)) / spread(policy - reference, LAW) == pytest.approx(of_gap, rel=0.01)


@pytest.mark.parametrize(("change", "of_loss"), [(0.05, 379), (0.2, 28.1), (0.6, 4.71)])
def test_shared_masks_cancel_the_noise_of_dpo(change: float, of_loss: float) -> None:
    """The same; answer and refusal have masks of their own, fresh ones two more for the references."""
    policy, reference = toy_table(ANSWER, change)
    policy_w, reference_w = toy_table(REFUSAL, change)
    lost, won = policy - reference, reference_w - policy_w
    shared = spread(preference_loss(won[:, None] + lost[None, :]), np.multiply.outer(LAW, LAW))
    a = (policy[:, None] - reference[None, :]).ravel()
    b = (reference_w[:, None] - policy_w[None, :]).ravel()
    pairs = np.multiply.outer(LAW, LAW).ravel()
    fresh = spread(preference_loss(a[:, None] + b[None, :]), np.multiply.outer(pairs, pairs))
    assert fresh / shared == pytest.approx(of_loss, rel=0.01)


def test_four_draws_reduce_variance_and_bias() -> None:
    """Against the loss at the exact bound: bias 1.50 with one draw, 0.29 with four free ones, 0.11 with four as they are drawn.

    Variance: 14.5, 0.77 and 0.06.
    """
    policy, reference = toy_table(ANSWER, 0.6)
    gap = policy - reference
    beta = 1.0
    exact = float(preference_loss(np.array((LAW * gap).sum()), beta))

    def of_free_draws(n: int) -> tuple[float, float]:
        means, shares = gap, LAW
        for _ in range(n - 1):
            means, shares = np.add.outer(means, gap).ravel(), np.multiply.outer(shares, LAW).ravel()
        values = preference_loss(means / n, beta)
        return spread(values, shares), float((shares * values).sum()) - exact

    index = {mask: i for i, mask in enumerate(SUBSETS)}
    spec, made = BackboneSpec("llada", 1, 2, 2), Encoded("a", (5,), tuple(range(10, 9 + LENGTH)), (0, 1))
    drawn = []
    for step in range(1500):
        states = draw_states(spec, [made], Noise(law="fixed-count", draws=4), (0, step), 0)
        drawn.append(np.mean([gap[index[tuple(mask[1:].tolist())]] for mask in states.scored]))
    values = preference_loss(np.array(drawn), beta)
    (variance_1, bias_1), (variance_4, bias_4) = of_free_draws(1), of_free_draws(4)
    assert (bias_1, bias_4) == (pytest.approx(1.50, abs=0.01), pytest.approx(0.289, abs=0.002))
    assert (variance_1, variance_4) == (pytest.approx(14.5, abs=0.1), pytest.approx(0.767, abs=0.002))
    assert 0 < values.mean() - exact < bias_4 / 2
    assert values.var() < variance_4 / 5
    assert np.mean(drawn) == pytest.approx((LAW * gap).sum(), abs=5 * np.std(drawn) / math.sqrt(1500))  # the bound is unbiased


# ------------------------------------------------------------------ hidden states
def test_direction_is_a_positive_unit_vector_of_its_seed() -> None:
    u = direction(64, 3)
    assert float(u.norm()) == pytest.approx(1.0)
    assert (u >= 0).all()
    assert u.std() > 0.02
    assert torch.equal(u, direction(64, 3))
    assert not torch.equal(u, direction(64, 4))


def test_adaptive_coefficient_is_measured_once() -> None:
    made, method = quantities(), METHODS["adaptive-rmu"]
    with pytest.raises(RemaskError, match="coefficient is not measured"):
        method.loss(made, method.parse({}))
    norms = [math.sqrt(sum(x * x for x in h)) for h in made.hidden.tolist()]
    measured = method.calibrate(made, method.parse({"scale": 2.0}))
    assert measured.coefficient == pytest.approx(2 * sum(norms) / len(norms))
    assert method.calibrate(quantities(8), measured) == measured
    plain = METHODS["rmu"].parse({"coefficient": measured.coefficient})
    assert torch.equal(method.loss(made, measured).rows, METHODS["rmu"].loss(made, plain).rows)


def test_hidden_states_in_bf16_are_compared_in_fp32() -> None:
    made = quantities(dtype=torch.float32)
    half = replace(made, hidden=made.hidden.detach().bfloat16(), hidden_reference=made.hidden_reference.bfloat16())
    same = replace(made, hidden=half.hidden.float(), hidden_reference=half.hidden_reference.float())
    options = METHODS["rmu"].parse({})
    assert METHODS["rmu"].loss(half, options).rows.tolist() == METHODS["rmu"].loss(same, options).rows.tolist()
    assert RETAIN["hidden"].loss(half).rows.tolist() == RETAIN["hidden"].loss(same).rows.tolist()


# ------------------------------------------------------------------ the registry
def test_every_method_is_there_and_described() -> None:
    assert list(METHODS) == ALL
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary and method.source
        assert method.retain in {*RETAIN, "none"}
        assert method.parse({}) == method.options()
        assert not (method.needs_retain and method.retain == "none")
    assert {name for name, method in METHODS.items() if method.draws >= 4} == {"npo", "simnpo", "dpo"}
    assert {name for name, method in METHODS.items() if method.retain == "hidden"} == {"rmu", "adaptive-rmu"}
    assert {name for name, method in METHODS.items() if method.needs_retain} == {"graddiff", "kl", "rmu", "adaptive-rmu"}
    assert {n: METHODS[n].retain for n in ("ga", "graddiff", "kl")} == {"ga": "none", "graddiff": "mask-loss", "kl": "kl"}


@pytest.mark.parametrize("name", ALL)
def test_a_loss_reads_what_it_needs_and_nothing_else(name: str) -> None:
    method = METHODS[name]
    options = method.parse({"coefficient": 1.0} if name == "adaptive-rmu" else {})
    full = with_refusal(quantities())
    field = {"reference": "reference", "anchor": "anchor", "reinforced": "anchor", "hidden": "hidden", "preferred": "preferred"}
    held = {field[need] for need in method.needs}
    bare = replace(full, **dict.fromkeys({"reference", "anchor", "hidden", "hidden_reference", "preferred"} - held))
    assert method.loss(bare, options).rows.isfinite().all()
    for need in method.needs:
        with pytest.raises(RemaskError, match=f"{need}.*was not computed"):
            method.loss(replace(full, **{field[need]: None}), options)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mdu", {"tua": 1}, "mdu has no option 'tua'; it has exclude_special, tau"),
        ("idk", {"beta": 1}, "idk has no option 'beta'; it has none"),
        ("npo", {"beta": 0}, "npo: option beta: .*greater than 0"),
        ("mdu", {"direction": "sideways"}, "mdu: option direction"),
        ("rmu", {"coefficient": "far"}, "rmu: option coefficient"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RemaskError, match=words):
        METHODS[name].parse(options)
