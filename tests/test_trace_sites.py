"""Choice of a site from synthetic effects, against hand-computed scores, exact bootstrap probabilities and explicit loops."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from remask.backbones import Site
from remask.errors import RemaskError
from remask.random import numpy_generator
from remask.tracing import Trace, TraceConfig, Weights
from remask.tracing.sites import Choice, SiteRule, choose_site, cluster_sites, fact_sites, site_scores, stability

NAN, INF = math.nan, math.inf
MODULES = ("resid", "mlp")


def synthetic(tie: Tensor, facts: list[str] | None = None, tokens: list[int] | None = None, **changes) -> Trace:
    """A trace whose TIE under the default weights is `tie` [row, layer, module, step]; one object token a row unless told.

    With normalised weights, an effect that is the same at every later step is its own weighted mean.
    """
    rows, steps = len(tie), tie.shape[-1]
    effects = tie[..., None].expand(*tie.shape, steps).clone()
    effects[..., ~torch.ones(steps, steps).triu().bool()] = NAN
    names = facts or [f"f{i}" for i in range(rows)]
    run = torch.zeros(rows, steps)
    config = changes.pop("config", TraceConfig(steps=steps, draws=1, modules=MODULES))
    return Trace(
        effects,
        effects**2,
        run,
        run,
        torch.zeros(rows, 2, steps),
        torch.tensor(tokens or [1] * rows),
        tuple(f"row{i}" for i in range(rows)),
        tuple(names),
        (),
        config,
        **{"mode": "exact", "model": "a model", **changes},
    )


def column(*facts: list[float]) -> Tensor:
    """One number a layer for every fact, as [fact, layer, 1 module, 1 step]."""
    return torch.tensor(facts)[:, :, None, None]


def one_module(tie: Tensor, **changes) -> Trace:
    return synthetic(tie, config=TraceConfig(steps=tie.shape[-1], draws=1, modules=("resid",)), **changes)


@pytest.fixture
def tie() -> Tensor:
    """[2 facts, 4 layers, resid/mlp, 2 steps]: small everywhere but at three places."""
    tensor = torch.full((2, 4, 2, 2), 0.1)
    tensor[:, 2, 1, 1] = torch.tensor([-5.0, 5.0])  # strong, of either sign
    tensor[:, 1, 0, 0] = 2.0  # strongest residual site
    tensor[0, 3, 1, 1] = 4.0  # strong for one fact only: mean 2.05
    return tensor


# ------------------------------------------------------------------ equation (5)
def test_absolute_value_comes_before_the_mean_over_facts(tie) -> None:
    scores = site_scores(synthetic(tie))
    assert scores.shape == (4, 2, 2)
    assert scores[2, 1].tolist() == pytest.approx([0.1, 5.0])
    assert scores[3, 1].tolist() == pytest.approx([0.1, 2.05])
    assert choose_site(synthetic(tie)) == Choice(Site(2, "mlp"), 1, pytest.approx(5.0))


def test_signed_scores_let_opposite_facts_cancel(tie) -> None:
    rule = SiteRule(signed=True)
    assert site_scores(synthetic(tie), rule)[2, 1, 1] == 0
    assert choose_site(synthetic(tie), rule) == Choice(Site(3, "mlp"), 1, pytest.approx(2.05))
    negative = one_module(column([1.0, -3.0]))
    assert choose_site(negative) == Choice(Site(1), 0, 3.0)
    assert choose_site(negative, rule) == Choice(Site(0), 0, 1.0)


def test_module_can_be_restricted(tie) -> None:
    rule = SiteRule(module="resid")
    assert choose_site(synthetic(tie), rule) == Choice(Site(1, "resid"), 0, 2.0)
    scores = site_scores(synthetic(tie), rule)
    assert (scores[:, 1] == -INF).all() and scores[:, 0].isfinite().all()


def test_facts_without_a_step_do_not_count_for_it(tie) -> None:
    tie[0, :, :, 1] = NAN
    assert choose_site(synthetic(tie)).score == 5.0  # of the other fact alone
    tie[1, :, :, 1] = NAN
    scores = site_scores(synthetic(tie))
    assert (scores[..., 1] == -INF).all()
    assert choose_site(synthetic(tie)) == Choice(Site(1, "resid"), 0, 2.0)


def test_weights_of_the_rule_reach_the_scores() -> None:
    effects = torch.tensor([[1.0, 4.0], [NAN, 3.0]])  # one layer and module, two steps
    trace = replace(one_module(torch.zeros(1, 1, 1, 2), tokens=[2]), effects=effects[None, None, None])

    def scores(**fields) -> list[float]:
        return site_scores(trace, SiteRule(Weights(**fields)))[0, 0].tolist()

    assert scores(gamma=0.5) == pytest.approx([(1 + 0.5 * 4) / 1.5 / 2, 1.5])
    assert scores(gamma=0.5, per_token=False, normalise=False) == pytest.approx([3.0, 3.0])
    assert scores(gamma=0.5, strict=True) == pytest.approx([2.0, -INF])


def test_effects_are_per_object_token_unless_told_otherwise() -> None:
    trace = one_module(column([8.0, 2.0], [0.0, 2.0]), tokens=[8, 1])  # per token: 1, 0.25 and 0, 2
    assert choose_site(trace) == Choice(Site(1), 0, 1.125)
    assert choose_site(trace, SiteRule(Weights(per_token=False))) == Choice(Site(0), 0, 4.0)


def test_paraphrases_are_averaged_before_facts() -> None:
    tie = column([6.0, 0.0], [6.0, 0.0], [6.0, 0.0], [0.0, 8.0])  # three wordings of one fact, one of another
    assert choose_site(one_module(tie)) == Choice(Site(0), 0, 4.5)
    assert choose_site(one_module(tie, facts=["a", "a", "a", "b"])) == Choice(Site(1), 0, 4.0)
    assert choose_site(one_module(tie, facts=["a", "b", "a", "a"])) == Choice(Site(0), 0, 5.0)


def test_a_sign_that_depends_on_the_wording_is_no_effect_of_the_fact() -> None:
    tie = column([4.0, 1.0], [-4.0, 1.0])
    assert choose_site(one_module(tie, facts=["a", "a"])) == Choice(Site(1), 0, 1.0)
    assert choose_site(one_module(tie)) == Choice(Site(0), 0, 4.0)


def test_equal_scores_go_to_the_lowest_layer_then_module_then_step() -> None:
    tie = torch.ones(3, 4, 2, 3)
    assert choose_site(synthetic(tie)) == Choice(Site(0, "resid"), 0, 1.0)
    tie[:, 0] = tie[:, 1, 0] = tie[:, 1, 1, 0] = 0.5
    assert choose_site(synthetic(tie)) == Choice(Site(1, "mlp"), 1, 1.0)


def test_order_of_facts_changes_neither_choice_nor_shares_of_ties() -> None:
    values = np.random.default_rng(3).lognormal(-8, 4, 40)  # so far apart that the order of a sum changes its last bits
    trace = one_module(torch.tensor(values, dtype=torch.float32)[:, None, None, None].repeat(1, 37, 1, 1))
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(40).tolist()
        assert choose_site(trace.take(order)) == choose_site(trace)
    assert choose_site(trace).site == Site(0)
    assert stability(trace, resamples=200) == [(Site(0), 1.0)]


# ------------------------------------------------------------------ neighbours
def test_beta_trades_a_strong_site_for_a_selective_one() -> None:
    trace = one_module(column([5.0, 4.0], [5.0, 4.0]))
    neighbours = one_module(column([-3.0, 0.0], [3.0, 1.0], [3.0, 0.5]))  # means of |.|: 3 and 0.5
    assert choose_site(trace, SiteRule(), neighbours).site == Site(0)
    rule = SiteRule(beta=0.5)
    assert site_scores(trace, rule, neighbours).flatten().tolist() == pytest.approx([3.5, 3.75])
    assert choose_site(trace, rule, neighbours) == Choice(Site(1), 0, 3.75)
    # A site that pushes the neighbours down is not rewarded for it.
    assert choose_site(trace, replace(rule, signed=True), one_module(column([-3.0, 0.5]))).site == Site(1)


def test_neighbours_with_other_numbers_of_steps() -> None:
    config = TraceConfig(steps=3, draws=1, modules=("resid",))
    two, three = torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1, 3), 5.0)
    short, long = synthetic(torch.ones(1, 1, 1, 1), config=config), synthetic(torch.ones(1, 1, 1, 3), config=config)
    rule = SiteRule(beta=2.0)
    assert site_scores(synthetic(three, config=config), rule, short).flatten().tolist() == [3.0, 5.0, 5.0]
    assert site_scores(synthetic(two, config=config), rule, long).flatten().tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "another"}, "another model: another against a model"),
        ({"mode": "sweep"}, "another mode: sweep against exact"),
        ({"config": TraceConfig(steps=1, draws=2, modules=MODULES)}, "another protocol: draws 2 against 1"),
        ({"config": TraceConfig(steps=1, draws=1, modules=MODULES, view="last")}, "view 'last' against 'subject'"),
    ],
)
def test_neighbours_of_another_kind_are_refused(changes: dict, message: str) -> None:
    tie = torch.ones(1, 2, 2, 1)
    with pytest.raises(RemaskError, match=message):
        choose_site(synthetic(tie), SiteRule(beta=1.0), synthetic(tie, **changes))


def test_neighbours_may_differ_in_seed_but_not_in_layers() -> None:
    trace, seed = synthetic(torch.ones(1, 2, 2, 1)), TraceConfig(steps=1, draws=1, modules=MODULES, seed=9)
    assert choose_site(trace, SiteRule(beta=0.25), synthetic(torch.ones(1, 2, 2, 1), config=seed)).score == 0.75
    with pytest.raises(RemaskError, match="another number of layers: 3 against 2"):
        choose_site(trace, SiteRule(beta=1.0), synthetic(torch.ones(1, 3, 2, 1)))


@pytest.mark.parametrize("choose", [choose_site, stability, site_scores, fact_sites, lambda t, r: cluster_sites(t, 1, r)])
def test_beta_without_neighbours_is_refused(choose, tie) -> None:
    with pytest.raises(RemaskError, match=r"beta 0\.5 weighs neighbour facts, but none were given"):
        choose(synthetic(tie), SiteRule(beta=0.5))


def test_a_neighbour_trace_without_facts_is_none(tie) -> None:
    with pytest.raises(RemaskError, match="none were given"):
        choose_site(synthetic(tie), SiteRule(beta=0.5), synthetic(tie).take([]))


# ------------------------------------------------------------------ smoothing
def test_smoothing_prefers_a_broad_band_to_a_lone_peak() -> None:
    trace = one_module(column([6.0, 0.0, 0.0, 4.0, 5.0, 4.0, 0.0]))
    assert choose_site(trace).site == Site(0)
    smooth = site_scores(trace, SiteRule(smooth=1)).flatten().tolist()
    assert smooth == pytest.approx([3.0, 2.0, 4 / 3, 3.0, 13 / 3, 3.0, 2.0])  # ends: of two layers
    assert choose_site(trace, SiteRule(smooth=1)) == Choice(Site(4), 0, pytest.approx(13 / 3))
    assert site_scores(trace, SiteRule(smooth=99)).flatten().tolist() == pytest.approx([19 / 7] * 7)


def test_smoothing_ignores_undefined_layers_and_does_not_define_them() -> None:
    trace = one_module(column([6.0, NAN, 2.0, 3.0]))
    assert site_scores(trace, SiteRule(smooth=1)).flatten().tolist() == pytest.approx([6.0, -INF, 2.5, 2.5])


def test_smoothing_keeps_modules_and_steps_apart() -> None:
    tie = torch.zeros(1, 3, 2, 2)
    tie[0, 1, 0, 1] = 3.0
    expected = torch.zeros(3, 2, 2, dtype=torch.float64)
    expected[:, 0, 1] = torch.tensor([1.5, 1.0, 1.5])
    assert torch.equal(site_scores(synthetic(tie), SiteRule(smooth=1)), expected)


# ------------------------------------------------------------------ the rule
def test_rule_as_json_is_flat() -> None:
    rule = SiteRule(Weights(0.5, strict=True), "mlp", signed=True, beta=0.25, smooth=2)
    fields = json.loads(json.dumps(rule.to_dict()))
    assert fields == {
        "gamma": 0.5,
        "strict": True,
        "normalise": True,
        "per_token": True,
        "module": "mlp",
        "signed": True,
        "beta": 0.25,
        "smooth": 2,
    }
    assert SiteRule().to_dict()["module"] is None


@pytest.mark.parametrize("fields", [{"beta": -0.1}, {"beta": NAN}, {"beta": INF}, {"smooth": -1}, {"module": "mpl"}])
def test_impossible_rules_are_refused(fields: dict) -> None:
    with pytest.raises(RemaskError, match=r"beta|smooth|'mpl' is unknown; choose one of resid, attn, mlp"):
        SiteRule(**fields)


def test_an_untraced_module_is_refused(tie) -> None:
    with pytest.raises(RemaskError, match="'attn' was not traced; traced: resid, mlp"):
        choose_site(synthetic(tie), SiteRule(module="attn"))


@pytest.mark.parametrize("choose", [choose_site, stability])
def test_nothing_defined_is_an_error(choose, tie) -> None:
    one_step = synthetic(torch.ones(1, 2, 2, 1))
    for trace, rule in [
        (synthetic(tie * NAN), SiteRule()),
        (synthetic(tie).take([]), SiteRule()),
        (one_step, SiteRule(Weights(strict=True))),
    ]:
        assert (site_scores(trace, rule) == -INF).all()
        with pytest.raises(RemaskError, match="no effect is defined"):
            choose(trace, rule)


# ------------------------------------------------------------------ stability
def test_shares_of_two_facts_match_the_exact_probabilities() -> None:
    # Resamples AA, AB, BA, BB with 1/4 each; layer 0 wins but for BB.
    trace = one_module(column([5.0, 1.0], [1.0, 3.0]))
    shares = dict(stability(trace, resamples=4000))
    assert shares[Site(0)] == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))
    assert sum(shares.values()) == pytest.approx(1.0)
    assert choose_site(trace).site == next(iter(shares))


def test_neighbours_are_resampled_independently() -> None:
    # Facts: the lead of layer 0 is 4 (AA), 1 (AB, BA), -2 (BB). Neighbours take off 5, 2.5, 2.5, 0 with 1/4 each.
    trace = one_module(column([5.0, 1.0], [1.0, 3.0]))
    neighbours = one_module(column([5.0, 0.0], [0.0, 0.0]))
    expected = 1 / 4 * 3 / 4 + 1 / 2 * 1 / 4  # AA survives all but 5, AB and BA only 0
    shares = dict(stability(trace, SiteRule(beta=1.0), neighbours, resamples=4000))
    assert shares[Site(0)] == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))


def hostile(seed: int, facts: int, steps: int) -> Trace:
    """Random effects of facts with different numbers of steps, one of them without any."""
    tie = torch.tensor(np.random.default_rng(seed).standard_normal((facts, 5, 2, steps)), dtype=torch.float32)
    for fact in range(facts):
        tie[fact, ..., 1 + fact % steps :] = NAN
    tie[2] = NAN
    return synthetic(tie, config=TraceConfig(steps=3, draws=1, modules=MODULES))


@pytest.mark.parametrize("rule", [SiteRule(), SiteRule(module="mlp", signed=True), SiteRule(beta=0.7, smooth=1)])
@pytest.mark.parametrize("chunk", [None, 1, 700])
def test_stability_equals_a_loop_over_the_same_resamples(rule: SiteRule, chunk: int | None, monkeypatch) -> None:
    trace, neighbours, resamples = hostile(0, 7, 3), hostile(1, 5, 2), 60
    if chunk is not None:
        monkeypatch.setattr("remask.tracing.sites._CHUNK", chunk)

    def drawn(source: Trace, *key: str) -> list[Trace]:
        rows = [i for i in range(len(source.ids)) if i != 2]
        counts = numpy_generator(5, "site stability", *key).multinomial(len(rows), [1 / len(rows)] * len(rows), resamples)
        parts = [source.take(np.repeat(rows, count).tolist()) for count in counts]
        return [replace(part, facts=tuple(map(str, range(len(rows))))) for part in parts]  # a fact drawn twice counts twice

    pairs = zip(drawn(trace), drawn(neighbours, "neighbours"), strict=True)
    winners = [choose_site(facts, rule, others).site for facts, others in pairs]
    shares = stability(trace, rule, neighbours, resamples, seed=5)
    assert dict(shares) == {site: pytest.approx(winners.count(site) / resamples) for site in set(winners)}
    assert len(shares) > 1
    assert [share for _, share in shares] == sorted((share for _, share in shares), reverse=True)


def test_identical_facts_always_choose_the_same_site(tie) -> None:
    trace = synthetic(tie[:1].repeat(9, 1, 1, 1) / 3)
    for rule in (SiteRule(), SiteRule(module="resid"), SiteRule(smooth=1)):
        assert stability(trace, rule, resamples=100) == [(choose_site(trace, rule).site, 1.0)]


def test_paraphrases_are_drawn_with_their_fact() -> None:
    tie = column([5.0, 1.0], [5.0, 1.0], [5.0, 1.0], [1.0, 3.0])
    shares = dict(stability(one_module(tie, facts=["a", "a", "a", "b"]), resamples=2000))
    assert shares == dict(stability(one_module(column([5.0, 1.0], [1.0, 3.0])), resamples=2000))


def test_stability_depends_on_its_seed_alone() -> None:
    trace = hostile(0, 7, 3)
    assert stability(trace, resamples=300, seed=1) == stability(trace, resamples=300, seed=1)
    assert stability(trace, resamples=300, seed=1) != stability(trace, resamples=300, seed=2)


def test_no_resamples_are_refused(tie) -> None:
    with pytest.raises(RemaskError, match="at least one resample, not 0"):
        stability(synthetic(tie), resamples=0)


# ------------------------------------------------------------------ sites of single facts and of groups
def test_every_fact_has_its_own_site() -> None:
    trace = one_module(column([5.0, 1.0], [-1.0, 3.0], [9.0, 1.0]), facts=["a", "b", "a"])
    assert fact_sites(trace) == {"a": Choice(Site(0), 0, 7.0), "b": Choice(Site(1), 0, 3.0)}
    assert list(fact_sites(trace)) == ["a", "b"]
    assert fact_sites(trace, SiteRule(smooth=5))["b"] == Choice(Site(0), 0, 2.0)


@pytest.mark.parametrize("choose", [fact_sites, lambda trace: cluster_sites(trace, 1)])
def test_facts_without_effects_are_named(choose) -> None:
    with pytest.raises(RemaskError, match=r"fact 'f1' has no defined effect \(2 of 3 facts\)"):
        choose(one_module(column([5.0, 1.0], [NAN, NAN], [NAN, NAN])))


@pytest.fixture
def separated() -> Trace:
    """Seven facts: three carried by layer 1, two by layer 3 and two by layer 4, with strengths from 1 to 1,000."""
    tie = torch.tensor(np.random.default_rng(0).normal(0, 0.02, (7, 6, 2, 2)), dtype=torch.float32)
    for fact, layer in enumerate([1, 4, 3, 1, 3, 1, 4]):
        tie[fact, layer, layer % 2] = torch.tensor([1.0, 0.5]) * (-1) ** fact
        tie[fact] *= 10.0 ** (fact % 4)
    tie[5, ..., 1] = NAN  # a short fact belongs to its shape as well
    return synthetic(tie, facts=list("gfedcba"))


def test_clusters_follow_the_shape_of_the_maps_not_their_strength(separated) -> None:
    result = cluster_sites(separated, 3)
    # Groups of two: by their first names, "e" before "f".
    assert [names for _, names in result] == [("g", "d", "b"), ("e", "c"), ("f", "a")]
    assert [choice.site for choice, _ in result] == [Site(1, "mlp"), Site(3, "mlp"), Site(4, "resid")]
    for choice, names in result:
        assert choice == choose_site(separated.take([separated.facts.index(name) for name in names]))


def test_one_cluster_is_the_choice_of_all_and_single_facts_their_own(separated) -> None:
    assert cluster_sites(separated, 1) == [(choose_site(separated), tuple("gfedcba"))]
    own = fact_sites(separated)
    assert cluster_sites(separated, 7) == [(own[name], (name,)) for name in "abcdefg"]
    assert cluster_sites(separated.take([0]), 1) == [(own["g"], ("g",))]


def test_clusters_use_the_rule(separated) -> None:
    rule = SiteRule(module="mlp")
    assert all(choice.site.module == "mlp" for choice, _ in cluster_sites(separated, 3, rule))
    signed = cluster_sites(separated, 3, SiteRule(signed=True))
    assert {names for _, names in signed} == {("g", "d", "b"), ("e", "c"), ("f", "a")}  # the shape has no sign


def test_clusters_do_not_depend_on_the_order_of_facts(separated) -> None:
    shuffled = cluster_sites(separated.take([4, 0, 6, 2, 5, 1, 3]), 3)
    assert {frozenset(names) for _, names in shuffled} == {frozenset("gdb"), frozenset("ec"), frozenset("fa")}
    assert {choice.site for choice, _ in shuffled} == {choice.site for choice, _ in cluster_sites(separated, 3)}


def test_equal_maps_are_one_cluster() -> None:
    trace = one_module(column([1.0, 2.0], [1.0, 2.0], [2.0, 4.0], [0.0, 0.0]))
    assert [names for _, names in cluster_sites(trace, 3)] == [("f0", "f1", "f2"), ("f3",)]


@pytest.mark.parametrize("clusters", [0, 3])
def test_impossible_numbers_of_clusters_are_refused(clusters: int) -> None:
    with pytest.raises(RemaskError, match=rf"{clusters} clusters of 2 facts: choose 1 \.\.\. 2"):
        cluster_sites(one_module(column([1.0, 2.0], [2.0, 1.0])), clusters)
