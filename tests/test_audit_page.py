"""The page of `remask audit` and its figures, on an invented audit whose numbers are known."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure

from remask.evaluation import summary
from remask.evaluation.records import Record, Source
from remask.evaluation.summary import Scores
from remask.figures import png
from remask.reporting.audit import SHOWN, audit_figures, audit_page

LOGPROB = "answer log-probability"
SIDES = {"forget": "forget", "neighbours": "retain", "retain": "retain", "holdout": "holdout"}
SIZES = {"forget": 22, "neighbours": 9, "retain": 31, "holdout": 12}
MEANS = {  # of the log-probability, nats, by state and group
    "before": {"forget": -4.0, "neighbours": -5.0, "retain": -4.5},
    "after": {"forget": -21.0, "neighbours": -6.5, "retain": -5.0},
    "never trained": {"forget": -22.0, "neighbours": -5.2, "retain": -4.4},
    "prompt masked": {"forget": -25.0, "neighbours": -24.0, "retain": -26.0},
    "mean-delta": {"forget": -12.0, "neighbours": -13.0, "retain": -11.0},
}
EVIL = "<script>alert(1)</script>"


# ------------------------------------------------------------------ an invented audit
def make_records(
    states: tuple[str, ...] = tuple(MEANS), text: bool = True, groups: tuple[str, ...] = tuple(SIZES)
) -> list[Record]:
    rng = np.random.default_rng(7)
    found = []
    base = {(g, i): rng.normal(0, 1.5) for g in SIZES for i in range(SIZES[g])}
    for state, means in MEANS.items():
        for group in SIZES:
            for i in range(SIZES[group]):
                noise = rng.normal(0, 1.0, 12)  # drawn for left-out parts too, so that the others stay the same
                if state not in states or group not in groups:
                    continue
                full = state in ("before", "after", "never trained")

                def record(metric: str, value: float | str, seed: int = 0, _at: Any = (state, group, i), **more: Any) -> Record:
                    at_state, at_group, at_row = _at
                    defaults = {"stderr": None, "tokens": 5, "replicates": None, "attack": ""} | more
                    source = Source("m0", "" if at_state != "after" else "e1", "default", seed, bank=f"bank-{at_group}-{seed}")
                    return Record(
                        "invented", at_state, at_group, f"{at_group}/{at_row}", metric, value, source=source, **defaults
                    )

                if group == "holdout" or (group == "forget" and full):
                    for name in ("MIA loss", "MIA zlib", "MIA Min-K", "MIA Min-K++") if full else ():
                        found.append(record(name, 2.0 + abs(noise[0]) + (group == "holdout")))
                if group == "holdout":
                    continue
                level = means[group] + base[group, i]
                found += [record(LOGPROB, level + noise[s], seed=s, stderr=0.05, replicates=(level, level)) for s in (0, 1)]
                if not full:
                    continue
                if group == "forget":
                    ratio = {"before": -2.0, "after": 0.1, "never trained": 0.0}[state] + noise[3]
                    spread = tuple(math.exp(ratio + e) for e in (-0.1, 0.1, 0.05, -0.05))
                    found.append(record("truth ratio", math.exp(ratio), replicates=spread))
                found.append(record("exact match", float(i % 2 if state == "before" else i % 5 == 0)))
                found.append(record("ROUGE-L recall", 0.9 if state == "before" else 0.3))
                found.append(record("junk rate", float(state == "after" and i == 3)))
                if text:
                    said = EVIL if (state, group, i) == ("after", "forget", 4) else f"{state} says {group} {i}"
                    found.append(record("output", "" if state == "after" and i == 3 else said))
    attacked = {"stderr": None, "tokens": 5, "replicates": None, "attack": "half given", "source": Source("m0")}
    found += [Record("invented", "after", "forget", f"forget/{i}", LOGPROB, 99.0, **attacked) for i in range(SIZES["forget"])]
    return found


def attack(name: str, regained: float | None, spread: float = 8.0, note: str = "") -> dict[str, Any]:
    none = regained is None
    return {
        "attack": name,
        "describe": {"kind": name, "evil": EVIL},
        "measure": LOGPROB,
        "n": 22,
        "floor": "never trained",
        "before": -3.0,
        "after": -20.0,
        "never": -21.0,
        "known": 0.05,
        "known_attacked": None if none else 0.3,
        "regained": regained,
        "low": None if regained is None else regained - spread,
        "high": None if regained is None else regained + spread,
        "note": note,
    }


ATTACKS = [
    attack("masks", 12.0),
    attack("too weak", None, note="shows no more than the floor"),
    attack("half given", 63.5),
    attack("edit off", 100.0, 0.0),
    attack("jailbreak", -3.0),
]


def make_result(
    records: list[Record], attacks: list[dict[str, Any]] | None = None, note: str | None = None, quick: bool = True
) -> dict[str, Any]:
    """As `remask audit` makes it; `quick` leaves out what takes long and what the page only copies: p-values and AUCs."""
    scores = Scores(records)
    with pytest.MonkeyPatch.context() as patch:
        if quick:
            patch.setattr(summary, "paired_permutation", lambda first, second: SimpleNamespace(pvalue=0.01))
            patch.setattr(summary, "memberships", lambda scores, sides: {})
        return _result(scores, ATTACKS if attacks is None else attacks, note)


def _result(scores: Scores, attacks: list[dict[str, Any]], note: str | None) -> dict[str, Any]:
    groups = summary.group_table(scores, SIDES)
    reference = {"name": "twin", "fingerprint": "feed"} if "never trained" in scores.states else None
    return {
        "schema": 2,
        "command": "remask audit small --benchmark invented",
        "benchmark": {
            "name": "invented",
            "licence": "see https://example.org/licence",
            "notes": ["a sample", EVIL],
            "rows": {name: SIZES[name] for name in scores.groups},
            "sides": {name: SIDES[name] for name in scores.groups},
            "too_long": {"retain": ["retain/100", "retain/101"]},
        },
        "model": {"name": "small", "fingerprint": "c0ffee"},
        "reference": reference,
        "edit": {
            "name": "default",
            "note": note,
            "seeds": [{"kind": "memory", "preset": "default", "alpha": a} for a in (1.2, 1.3)],
        },
        "estimator": {"name": "elbo", "draws": 8, "replicates": 4, "seeds": [0, 1]},
        "sampler": {"gen_length": 32, "temperature": 0.0},
        "precision": "fp32",
        "versions": {"torch": "2.9"},
        "groups": groups,
        "summary": {
            "gap_closed": summary.gap_closed(scores),
            "selectivity": summary.selectivity(scores),
            "forget_quality": summary.forget_qualities(scores),
            "model_utility": summary.utilities(scores),
            "membership": summary.memberships(scores, SIDES),
        },
        "attacks": attacks,
        "tests": summary.tests_used(groups),
    }


TEXTS = {f"{group}/{i}": (f"Who is {group} {i}?", f"person & {i}") for group in SIZES for i in range(SIZES[group])}


def page_of(result: dict[str, Any], records: list[Record], texts: Any = TEXTS) -> str:
    figures = {name: png(figure, 40) for name, figure in audit_figures(result, records).items()}
    return audit_page(result, records, figures, texts)


# ------------------------------------------------------------------ reading it
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Tables with the caption below them, resources, visible text; complains where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.tags: list[str] = []
        self.tables: list[dict[str, Any]] = []
        self.images: list[str] = []
        self.words: list[str] = []
        self.alerts = self.verdict = ""
        self._classes: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.resources += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")
        ]
        if tag == "img":
            self.images.append(given["alt"] or "")
        if tag in VOID:
            return
        self.open.append(tag)
        self._classes.append(given.get("class") or "")
        if tag == "table":
            self.tables.append({"rows": [], "caption": "", "folded": "details" in self.open})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        self._classes.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1]["rows"][-1][-1] += data
        elif "figcaption" in self.open and self.tables and not {"table"} & set(self.open):
            self.tables[-1]["caption"] += data
        if "alert" in self._classes:
            self.alerts += data
        if "verdict" in self._classes:
            self.verdict += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def captions(page: str) -> list[tuple[str, str]]:
    """Every table with the caption of its own figure, read from the source."""
    return re.findall(r"<table>(.*?)</table>\s*</div>\s*<figcaption>(.*?)</figcaption>", page, re.S)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return make_records()


@pytest.fixture(scope="module")
def result(records: list[Record]) -> dict[str, Any]:
    return make_result(records, quick=False)


@pytest.fixture(scope="module")
def source(result: dict[str, Any], records: list[Record]) -> str:
    return page_of(result, records)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


@pytest.fixture(scope="module")
def figures(result: dict[str, Any], records: list[Record]) -> dict[str, Figure]:
    return audit_figures(result, records)


def row_tables(page: Page, kept: bool) -> list[list[list[str]]]:
    """Body rows of the tables of single rows of one side, the open one first."""
    last = "change" if kept else "above never trained"
    return [t["rows"][1:] for t in page.tables if t["rows"][0][0] == "row" and last in t["rows"][0]]


# ------------------------------------------------------------------ the page
def test_page_is_one_file_that_runs_nothing(source: str, page: Page) -> None:
    assert page.resources and all(value.startswith("data:image/png;base64,") for value in page.resources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in source and "url(" not in source
    assert len(page.images) == 4 and all(page.images)


def test_everything_is_escaped(source: str, page: Page) -> None:
    assert "<script" not in source
    assert source.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 1 + 1 + len(
        ATTACKS
    )  # an answer, a note, the attacks' parameters
    assert EVIL in page.text and "person & 4" in page.text


def test_n_and_test_are_named_under_every_table(source: str, page: Page) -> None:
    found = captions(source)
    assert len(found) == len(page.tables) == 8
    for _, caption in found:
        assert re.search(r"\bn = \d|\bn is a column", caption), caption
        assert re.search(r"\btest\b", caption), caption
    first = found[0][1]
    for words in (
        "n = 22 (forget)",
        "2,000 resamples",
        "permutation",
        "Holm over",
        "8 masks a row",
        "seeds 0, 1",
        "Monte-Carlo",
    ):
        assert words in first


def test_summary_holds_the_numbers_of_the_results(page: Page, result: dict[str, Any]) -> None:
    rows = page.tables[0]["rows"][1:]
    assert [row[0].removesuffix(s) for row, s in zip(rows, ("should go", "should stay", "should stay"), strict=True)] == [
        "forget",
        "neighbours",
        "retain",
    ]
    for row, group in zip(rows, result["groups"], strict=False):
        score = group["metrics"][LOGPROB]
        change = score["change"]["after"]
        assert row[1] == str(group["n"])
        assert row[2].startswith(f"{score['states']['before']['mean']:.2f}[{score['states']['before']['low']:.2f}, ")
        assert row[4] == f"{change['mean']:+.2f}[{change['low']:+.2f}, {change['high']:+.2f}]"
        assert math.isclose(float(row[5].lstrip("<")), change["p_holm"], rel_tol=0.06)
        assert row[6].startswith(f"{score['change']['mean-delta']['mean']:+.2f}[")
        assert row[7].startswith(f"{score['states']['never trained']['mean']:.2f}[")
        assert row[8].startswith(f"{score['states']['prompt masked']['mean']:.2f}[")
        junk = group["metrics"]["junk rate"]["states"]
        assert row[11] == f"{junk['before']['mean']:.2f} → {junk['after']['mean']:.2f}"


@pytest.mark.parametrize("kept", [False, True])
def test_worst_rows_come_first(page: Page, records: list[Record], kept: bool) -> None:
    means: dict[tuple[str, str], list[float]] = {}
    for r in records:
        if r.metric == LOGPROB and not r.attack:
            means.setdefault((r.state, r.id), []).append(float(r.value))
    level = "before" if kept else "never trained"
    names = [r.id for r in records if r.state == "after" and r.metric == LOGPROB and r.source.seed == 0 and not r.attack]
    names = [name for name in names if name.startswith("forget/") != kept]
    above = {name: sum(means["after", name]) / 2 - sum(means[level, name]) / 2 for name in names}
    expected = sorted(names, key=lambda name: above[name] if kept else -above[name])
    tables = row_tables(page, kept)
    shown = [row for table in tables for row in table]
    assert [row[0].split("person & ")[1].lstrip("0123456789") for row in shown] == expected
    assert [len(table) for table in tables] == [SHOWN, len(names) - SHOWN]
    place = 5 if kept else 4
    for row, name in zip(shown, expected, strict=True):
        assert float(row[place]) == pytest.approx(above[name], abs=0.0051)
        assert float(row[place - 2]) == pytest.approx(sum(means["after", name]) / 2, abs=0.0051)


def test_rows_show_texts_and_junk(page: Page) -> None:
    rows = {row[0]: row for table in row_tables(page, False) for row in table}
    four = next(row for key, row in rows.items() if key.endswith("forget/4"))
    assert four[0].startswith("Who is forget 4?true answer: person & 4")
    assert four[5:] == ["before says forget 4", EVIL]
    three = next(row for key, row in rows.items() if key.endswith("forget/3"))
    assert three[6] == "(empty) junk"
    assert [t["folded"] for t in page.tables if t["rows"][0][0] == "row"] == [False, True, False, True]


def test_verdict_says_what_the_numbers_say(page: Page, result: dict[str, Any], records: list[Record]) -> None:
    text = " ".join(page.verdict.split())
    change = result["groups"][0]["metrics"][LOGPROB]["change"]["after"]
    assert f"a change of {change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}] (p" in text
    share = sum(result["summary"]["gap_closed"]) / 2
    assert f"{100 * share:.0f} % of the way" in text
    assert "nats above the never-trained level, so the true answers are still likelier" in text
    for part in (
        "retain -0.",
        "neighbours -1.",
        "mean-delta control",
        "Junk answers after the edit: 5 % of the forget answers",
    ):
        assert part in text
    assert "strongest attack (half given) regains 64 % [56, 72]" in text
    assert "Rows too long for the model, and in no number: 2." in text


def test_left_out_rows_and_protocol_are_named(page: Page) -> None:
    for words in (
        "retain, 2 rows: retain/100 , retain/101",
        "c0ffee",
        "feed",
        "remask audit small",
        "bank-forget-0",
        "torch 2.9",
    ):
        assert words in page.text
    assert "see https://example.org/licence" in page.text  # as text, not as a link


@pytest.mark.parametrize(("seen", "words"), [(-3.0, "over-forgetting"), (0.0, "not told apart")])
def test_verdict_against_the_never_trained_level(seen: float, words: str) -> None:
    moved = []
    never = {(r.id, r.source.seed): r.value for r in make_records() if r.state == "never trained" and r.metric == LOGPROB}
    for r in make_records():
        if r.state == "after" and r.group == "forget" and r.metric == LOGPROB and not r.attack:
            wobble = 0.1 if int(r.id.split("/")[1]) % 2 else -0.1
            r = Record(**{**vars(r), "value": float(never[r.id, r.source.seed]) + seen + wobble})
        moved.append(r)
    assert words in Page(page_of(make_result(moved), moved)).verdict


def test_verdict_gives_no_share_of_a_way_that_was_not_to_go() -> None:
    records = [
        Record(**{**vars(r), "value": float(r.value) + 30}) if r.state == "never trained" and r.metric == LOGPROB else r
        for r in make_records()
    ]
    text = " ".join(Page(page_of(make_result(records), records)).verdict.split())
    assert "already stood at or below" in text and "% of the way" not in text


# ------------------------------------------------------------------ what may be absent
def without_reference() -> tuple[dict[str, Any], list[Record], Any]:
    records = make_records(tuple(state for state in MEANS if state != "never trained"))
    return make_result(records), records, TEXTS


def without_attacks() -> tuple[dict[str, Any], list[Record], Any]:
    records = [r for r in make_records() if not r.attack]
    return make_result(records, attacks=[]), records, TEXTS


def without_text() -> tuple[dict[str, Any], list[Record], Any]:
    records = make_records(text=False)
    return make_result(records), records, None


def without_anything_to_forget() -> tuple[dict[str, Any], list[Record], Any]:
    records = make_records(tuple(state for state in MEANS if state != "mean-delta"))
    return make_result(records, note="nothing to forget: the rows are at -22.00 nats"), records, TEXTS


def without_retain() -> tuple[dict[str, Any], list[Record], Any]:
    records = make_records(groups=("forget",))
    return make_result(records), records, TEXTS


def with_nulls() -> tuple[dict[str, Any], list[Record], Any]:
    records = make_records()
    result = copy.deepcopy(make_result(records))

    def blank(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(value, dict | list):
                blank(value)
            elif isinstance(value, float):
                node[key] = None

    blank(result["groups"])
    blank(result["attacks"])
    result["summary"] |= {
        "gap_closed": [None, None],
        "selectivity": {},
        "forget_quality": {},
        "model_utility": {},
        "membership": {},
    }
    return result, records, None


Case = Callable[[], tuple[dict[str, Any], list[Record], Any]]


@pytest.mark.parametrize(
    ("case", "words", "absent"),
    [
        (
            without_reference,
            ["No never-trained model was given", "level that forgetting should reach is unknown"],
            "gap closed",
        ),
        (without_attacks, ["No attacks were run"], "How to read it: 0 ="),
        (without_text, ["No generated text was kept"], "answer before"),
        (without_anything_to_forget, ["Nothing to forget.", "No edit was built"], "The strongest attack"),
        (
            without_retain,
            ["what it cost is unknown", "No rows that should stay", "No figure of forget against retain"],
            "neighbours",
        ),
        (with_nulls, ["not scored both before and after", "No attack could be measured"], "nan"),
    ],
)
def test_absent_parts_are_said_to_be_absent(case: Case, words: list[str], absent: str) -> None:
    result, records, texts = case()
    source = page_of(result, records, texts)
    page = Page(source)
    for word in words:
        assert word in page.text
    assert absent not in page.text
    assert len(captions(source)) == len(page.tables)


def test_nothing_to_forget_is_prominent() -> None:
    result, records, texts = without_anything_to_forget()
    page = Page(page_of(result, records, texts))
    assert page.alerts.startswith("Nothing to forget.") and "-22.00 nats" in page.text
    assert Page(page_of(*without_attacks())).alerts == ""


def test_rows_are_measured_from_prompt_masked_without_a_reference() -> None:
    result, records, texts = without_reference()
    page = Page(page_of(result, records, texts))
    header = next(t["rows"][0] for t in page.tables if t["rows"][0][0] == "row")
    assert header[3:5] == ["prompt masked", "above prompt masked"]
    assert "above what the model says without seeing the question" in page.text
    assert list(audit_figures(result, records)) == ["levels", "forget_retain", "truth_ratio", "attacks"]


# ------------------------------------------------------------------ figures
def test_figures_are_those_that_were_measured(figures: dict[str, Figure]) -> None:
    assert list(figures) == ["levels", "forget_retain", "truth_ratio", "attacks"]
    assert list(audit_figures(*without_retain()[:2])) == ["levels", "truth_ratio", "attacks"]
    assert "attacks" not in audit_figures(*without_attacks()[:2])


def test_forget_retain_has_a_point_a_state(figures: dict[str, Figure], result: dict[str, Any]) -> None:
    axis = figures["forget_retain"].axes[0]
    points = {c.get_label(): (c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in axis.containers}
    assert list(points) == [
        "prompt masked",
        "never trained (goal)",
        "before",
        "after the edit",
        "mean-delta control, equal strength",
    ]
    groups = {g["group"]: g["metrics"][LOGPROB]["states"] for g in result["groups"] if LOGPROB in g["metrics"]}
    for state, label in (("after", "after the edit"), ("never trained", "never trained (goal)")):
        assert points[label] == (groups["forget"][state]["mean"], groups["retain"][state]["mean"])
    whiskers = [bar.get_segments()[0] for bar in axis.containers[3].lines[2]]
    after = groups["forget"]["after"]
    assert whiskers[0][:, 0] == pytest.approx([after["low"], after["high"]])
    arrows = [text for text in axis.texts if text.arrow_patch is not None]
    assert [arrow.xy for arrow in arrows] == [points["after the edit"], points["mean-delta control, equal strength"]]
    assert {arrow.xyann for arrow in arrows} == {points["before"]}
    assert [text.get_text() for text in axis.texts if text.arrow_patch is None] == ["goal"]
    assert len(figures["forget_retain"].legends[0].get_texts()) == 5


def test_points_that_coincide_stay_apart_in_the_legend_and_size() -> None:
    records = [
        Record(**{**vars(r), "value": -4.0}) if r.metric == LOGPROB and r.state != "prompt masked" else r
        for r in make_records()
    ]
    axis = audit_figures(make_result(records), records)["forget_retain"].axes[0]
    sizes = {c.get_label(): c.lines[0].get_markersize() for c in axis.containers}
    assert sizes["never trained (goal)"] > sizes["before"] > sizes["after the edit"]
    assert not [text for text in axis.texts if text.arrow_patch is not None]  # nothing moved, so there is no arrow
    assert np.ptp(axis.get_ylim()) >= 1.0


def brute_force(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Largest distance of two empirical distribution functions, and the stretch on which it is attained."""
    points = sorted({*first, *second})
    share = lambda sample, x: sum(value <= x for value in sample) / len(sample)  # noqa: E731
    gaps = [abs(share(first, x) - share(second, x)) for x in points]
    best = max(range(len(points)), key=lambda i: gaps[i])
    return gaps[best], points[best], points[best + 1]


def test_ks_bar_stands_where_the_gap_is_largest(
    figures: dict[str, Figure], result: dict[str, Any], records: list[Record]
) -> None:
    axis = figures["truth_ratio"].axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert [name for name in lines if "(n = 22)" in name] == [
        "before (n = 22)",
        "after the edit (n = 22)",
        "never trained (n = 22)",
    ]

    def logs(state: str) -> list[float]:
        return [sum(map(math.log10, r.replicates or ())) / 4 for r in records if r.metric == "truth ratio" and r.state == state]

    distance, left, right = brute_force(logs("after"), logs("never trained"))
    bar = lines["KS distance"]
    place, (low, high) = bar.get_xdata()[0], bar.get_ydata()
    assert left <= place < right and place == bar.get_xdata()[1]
    assert high - low == pytest.approx(distance)
    for state, end in (("after", 0), ("never trained", 1)):  # the bar reaches from one curve to the other
        share = sum(x <= place for x in logs(state)) / 22
        assert share == pytest.approx(low) or share == pytest.approx(high), (state, end)
    quality = result["summary"]["forget_quality"]["after"]
    assert quality["statistic"] == pytest.approx(distance)
    for words in (f"D = {distance:.3f}", f"p = {quality['pvalue']:.2g}", f"at least {quality['critical']:.3f}"):
        assert words in axis.get_title()


def test_equal_truth_ratios_have_no_distance() -> None:
    same = {r.id: (r.value, r.replicates) for r in make_records() if r.metric == "truth ratio" and r.state == "never trained"}
    records = [
        Record(**{**vars(r), "value": same[r.id][0], "replicates": same[r.id][1]}) if r.metric == "truth ratio" else r
        for r in make_records()
    ]
    axis = audit_figures(make_result(records), records)["truth_ratio"].axes[0]
    assert "D = 0.000, p = 1" in axis.get_title()


def test_attacks_are_bars_sorted_by_what_they_regain(figures: dict[str, Figure]) -> None:
    axis = figures["attacks"].axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == [f"{name} (22)" for name in ("half given", "masks", "jailbreak", "edit off", "too weak")]
    heights = [bar.get_y() + bar.get_height() / 2 for bar in axis.patches]
    assert [bar.get_width() for bar in axis.patches] == [63.5, 12.0, -3.0, 100.0]
    assert heights == sorted(heights, reverse=True)
    whiskers = [c.lines[2][0].get_segments()[0][:, 0] for c in axis.containers if hasattr(c, "has_xerr")]
    assert [w.tolist() for w in whiskers] == [[55.5, 71.5], [4.0, 20.0], [-11.0, 5.0], [100.0, 100.0]]
    texts = [text.get_text() for text in axis.texts]
    assert "shows no more than the floor" in texts and "64 % [56, 72]" in texts and "edit off" in texts
    grey = matplotlib.colors.to_rgb("#8a8a8a")
    assert [matplotlib.colors.to_rgb(label.get_color()) == grey for label in axis.get_yticklabels()] == [False] * 4 + [True]
    assert {0, 100} <= {line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 2}


def test_an_interval_without_bound_does_not_hide_the_other_bars() -> None:
    records = make_records()
    result = make_result(records, attacks=[attack("wild", 40.0, 5000.0), attack("tame", 20.0)])
    low, high = audit_figures(result, records)["attacks"].axes[0].get_xlim()
    assert low == -100 and high == 250


@pytest.fixture(autouse=True)
def _figures_are_not_global() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    assert not plt.get_fignums()
