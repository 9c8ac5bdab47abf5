"""The page of `remask trace`, on an invented trace whose numbers are known."""

from __future__ import annotations

import copy
import math
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from remask.backbones import Encoded, Site
from remask.figures import png
from remask.reporting.trace import SHOWN, trace_figures, trace_page
from remask.tracing import Trace, TraceConfig, Weights
from remask.tracing.effects import ESTIMANDS
from remask.tracing.positions import PositionTrace

EVIL = "<script>alert('1')</script>"
LAYERS, STEPS, FACTS = 4, 3, 16
IDS = (EVIL, *(f"person-{i}/city" for i in range(1, FACTS)))


def make_trace(mode: Any = "exact", view: Any = "subject", corruption: Any = "add") -> Trace:
    effects = torch.zeros(FACTS, LAYERS, 3, STEPS, STEPS)
    effects[:, 2, 0] = 1.0
    effects[..., torch.ones(STEPS, STEPS).tril(-1).bool()] = math.nan
    flat = torch.zeros(FACTS, STEPS)
    tokens = torch.full((FACTS,), 4)
    placed = torch.linspace(0, 1, STEPS).expand(FACTS, 2, STEPS)
    config = TraceConfig(steps=STEPS, draws=2, view=view, noise=2.5, corruption=corruption, seed=7)
    return Trace(effects, effects**2, flat - 2, flat - 12, placed, tokens, IDS, IDS, ("nobody",), config, mode, "c0ffee")


def make_record(mode: Any = "exact", **changes: Any) -> dict[str, Any]:
    own = {name: {"layer": 2 if i % 4 else 1, "module": "resid", "effect": 0.5 + i / 100} for i, name in enumerate(IDS)}
    record: dict[str, Any] = {
        "layer": 2,
        "module": "resid",
        "strongest": {"layer": 1, "module": "mlp", "step": 2, "effect": 0.8765},
        "stability": [{"layer": 1, "module": "resid", "share": 0.13}, {"layer": 2, "module": "resid", "share": 0.87}],
        "facts": own,
        "clusters": [
            {"layer": 2, "module": "resid", "facts": list(IDS[3:])},
            {"layer": 1, "module": "attn", "facts": list(IDS[:3])},
        ],
        "unknown": ["nobody", "<b>bold</b>"],
        "skipped": {"odd/1": f"its prompt holds {EVIL}"},
        "capped": dict.fromkeys(IDS[:14], 2),
        "trace": {
            "model": "toy & co",
            "fingerprint": "c0ffee",
            "facts": FACTS,
            "steps": STEPS,
            "draws": 2,
            "corruption": "add",
            "mode": mode,
            "estimand": ESTIMANDS[mode],
            "precision": "bf16 autocast",
            "command": "remask trace toy --facts 'a b.jsonl'",
            "blocks": 1234567,
            "seconds": 12.345,
        },
        "rule": {
            "gamma": 0.7,
            "strict": False,
            "normalise": True,
            "per_token": True,
            "signed": False,
            "beta": 0.0,
            "smooth": 0,
        },
    }
    return copy.deepcopy(record) | changes


def make_positions() -> PositionTrace:
    rows = (Encoded("a", (1, 2, 3), (4,), (0, 2)),)
    effects = (torch.ones(LAYERS, 3, 4),)
    return PositionTrace(effects, (("A", "b", "c", "d"),), rows, ("resid", "attn", "mlp"), 2, 0, 2, "c0ffee")


PICTURES = {name: b"\x89PNG " + name.encode() for name in ("heatmap", "facts", "layers", "steps")}


def page_of(record: dict[str, Any], weights: Weights | None = None, figures: Any = PICTURES, **options: Any) -> Page:
    trace = make_trace(record["trace"]["mode"], **options)
    return Page(trace_page({"subject": trace}, weights or Weights(gamma=0.7), record, figures))


class Page(HTMLParser):
    """Tables, visible text with what is folded apart, resources; complains where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.open, self.tags = source, list[str](), list[str]()
        self.resources, self.headings = list[str](), list[str]()
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.words, self.folded = list[str](), list[str]()
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag in ("meta", "img"):
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self._chosen = ("class", "chosen") in attrs
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "tr" and self._chosen:
            self.bold.append(self.rows[-1][0])

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if "details" in self.open:
            self.folded.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "h2" in self.open:
            self.headings[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page() -> Page:
    return page_of(make_record())


# ------------------------------------------------------------------ the file
def test_page_is_one_file_that_runs_nothing(page: Page) -> None:
    assert len(page.resources) == len(PICTURES)
    assert all(value.startswith("data:image/png;base64,") for value in page.resources)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert "http" not in page.source and "@import" not in page.source and "url(" not in page.source


def test_names_are_escaped(page: Page) -> None:
    assert "<script" not in page.source and "<b>" not in page.source
    assert page.text.count(EVIL) >= 4  # own site, cluster, reason, fewer steps
    assert "<b>bold</b>" in page.text and "toy & co" in page.text


def test_every_fact_is_named(page: Page) -> None:
    for name in (*IDS, "nobody", "odd/1"):
        assert name in page.text


def test_long_lists_are_folded(page: Page) -> None:
    folded = " ".join(page.folded)
    own = [row for row in page.rows if len(row) == 3 and row[2].startswith("0.")]
    assert [row[0] for row in own] == list(IDS)
    assert page.folded.count(IDS[SHOWN]) == 3  # its own site, its cluster of 13, the 14 with fewer steps
    assert page.folded.count(IDS[0]) == 1  # fewer steps alone: its own site and its cluster of 3 stand open
    assert "14 facts" in folded and "nobody" not in folded


# ------------------------------------------------------------------ what it says
def test_lead_says_what_was_found(page: Page) -> None:
    assert "cost the object 2.50 nats per object token at the first step" in page.text  # (12 - 2) / 4 tokens
    assert "matters most at the MLP output of layer 1, at step 2: a mean absolute effect of 0.876 nats per object" in page.text
    assert "Chosen as the place to edit: the residual stream of layer 2, which wins in 87 % of resamples" in page.text
    assert "They do not say where an edit is most selective" in page.text


def test_numbers_of_the_record_stand_in_the_tables(page: Page) -> None:
    assert ["residual stream of layer 2 (chosen)", "87 %"] in page.rows
    assert ["residual stream of layer 1", "13 %"] in page.rows
    assert page.rows.index(["residual stream of layer 2 (chosen)", "87 %"]) == 1  # the most frequent first
    assert ["person-5/city", "residual stream of layer 2", "0.550"] in page.rows
    assert ["person-4/city", "residual stream of layer 1", "0.540"] in page.rows
    assert "12 of 16 facts have their own strongest site at the chosen one" in page.text
    assert "person-5/city" in page.bold and "person-4/city" not in page.bold
    assert [row[1] for row in page.rows if row[0] == "attention output of layer 1"] == ["3"]


def test_sites_that_rarely_win_are_counted() -> None:
    many = [{"layer": i, "module": "mlp", "share": 1 / 20} for i in range(20)]
    page = page_of(make_record(stability=many))
    assert sum(row[1:] == ["5 %"] for row in page.rows) == SHOWN
    assert f"{20 - SHOWN} more sites win in fewer resamples" in page.text


def test_protocol_is_told(page: Page) -> None:
    for words in (
        "fingerprint c0ffee, bf16 autocast",
        "16 traced, 2 draws each",
        "noise of 2.5 standard deviations of the subject's embedding entries, the same at all steps, seed 7",
        ESTIMANDS["exact"],
        "sum over later steps s' ≥ s of γ^(s' − s) · effect at s', γ = 0.7, divided by the sum of the weights; nats per object",
        "the largest mean absolute effect over facts",
        "1,234,567 passes of a sequence through a block in 12.3 s of this run",
        "remask trace toy --facts 'a b.jsonl'",
    ):
        assert words in page.text


def test_other_weights_and_rules_are_told() -> None:
    rule = make_record()["rule"] | {"signed": True, "beta": 0.25, "smooth": 1, "per_token": False}
    text = page_of(make_record(rule=rule), Weights(strict=True, normalise=False, per_token=False)).text
    assert "s' > s of γ^(s' − s) · effect at s', γ = 0.9, not divided by the sum of the weights" in text
    score = "mean effect over facts, less 0.25 times the mean absolute effect over neighbour facts, averaged over 1 layer to"
    assert text.count(score) == 2  # the number is a score, no effect
    assert "cost the object 10.00 nats, summed over object tokens" in text
    assert "+0.550" in text


def test_sweep_is_called_another_estimand(page: Page) -> None:
    sweep = page_of(make_record("sweep"))
    assert "This is a sweep, another estimand" in sweep.text and sweep.text.count("fixed trajectory") == 2
    assert "equation 4 has one term" in sweep.text
    assert "another estimand" not in page.text and "fixed trajectory" not in page.text


def test_masked_subjects_have_no_noise() -> None:
    assert "standard deviations" not in page_of(make_record(), corruption="mask").text


def test_what_was_left_out_is_explained(page: Page) -> None:
    assert "not known (2)" in page.text and "skipped (1)" in page.text and "fewer steps (14)" in page.text
    assert "its prompt holds" in page.text and "(2), person-1/city (2)" in page.text
    whole = page_of(make_record(unknown=[], skipped={}, capped={}))
    assert "every fact was traced at all 3 steps" in whole.text and "not known" not in whole.text


def test_what_was_not_measured_is_absent() -> None:
    bare = page_of(make_record(stability=[], facts={}, clusters=[]))
    assert "The facts were not resampled" in bare.text and "wins in" not in bare.text
    assert "own strongest site" not in bare.text and "Facts by site" not in bare.text


def test_positions_are_a_section_of_their_own(page: Page) -> None:
    with_positions = page_of(make_record(), figures={**PICTURES, "positions": b"\x89PNG positions"})
    assert "5. Effect by token position" in with_positions.headings and len(with_positions.resources) == 5
    for found, count in ((page, 6), (with_positions, 7)):
        assert [heading.split(".")[0] for heading in found.headings] == [str(i + 1) for i in range(count)]


# ------------------------------------------------------------------ its figures
def test_figures_of_a_trace() -> None:
    traces = {view: make_trace(view=view) for view in ("subject", "first")}
    figures = trace_figures(traces, Weights(), Site(1, "mlp"), make_positions())
    assert list(figures) == ["heatmap", "facts", "layers", "steps", "positions"]
    assert sum(bool(axis.images) for axis in figures["heatmap"].axes) == 6
    assert figures["facts"].get_suptitle().startswith("Restoring the MLP output")  # the module of the site
    assert list(trace_figures(traces, Weights(), None)) == ["heatmap", "facts", "layers", "steps"]
    pictures = {name: png(figure, 30) for name, figure in figures.items()}
    page = Page(trace_page(traces, Weights(), make_record(), pictures))
    assert len(page.resources) == 5 and "Restored: all subject tokens; then first subject token." in page.text
