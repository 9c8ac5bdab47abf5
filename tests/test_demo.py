"""`remask demo`, run once: the newcomer's first five minutes hold what they promise."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from remask.assets.world import world
from remask.evaluation.records import read_records
from remask.evaluation.summary import LOGPROB, Scores
from remask.experiments.demo import run_demo

STATES = ["before", "after", "never trained", "prompt masked", "mean-delta"]
WORLD = world()
FACTS = [fact for split in WORLD.values() for fact in split]


class Tables(HTMLParser):
    """Cell texts of every table row, and every resource that the page names."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.resources: list[str] = []
        self.tags: Counter[str] = Counter()
        self._cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.resources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th")
        if self._cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


class Demo(NamedTuple):
    scores: Scores
    page: str
    tables: Tables
    results: dict[str, Any]
    printed: str
    out: Path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo") / "report"
    stream = io.StringIO()
    scores = run_demo(out, Console(file=stream, width=220))
    page = (out / "index.html").read_text("utf-8")
    tables = Tables()
    tables.feed(page)
    results = json.loads(
        (out / "results.json").read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in results.json")
    )
    return Demo(scores, page, tables, results, stream.getvalue(), out)


def test_only_the_report_is_written(demo: Demo) -> None:
    assert sorted(path.name for path in demo.out.iterdir()) == [
        "heatmap.png",
        "index.html",
        "levels.png",
        "records.jsonl",
        "results.json",
    ]
    assert str(demo.out / "index.html") in demo.printed.replace("\n", "")


def test_page_is_self_contained(demo: Demo) -> None:
    assert all(resource.startswith(("data:", "#")) for resource in demo.tables.resources)
    assert not demo.tables.tags["script"] + demo.tables.tags["link"] + demo.tables.tags["iframe"]
    assert not re.search(r"url\(|@import", demo.page)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', demo.page)
    assert len(pictures) >= 2  # the heat map and the levels
    for picture in pictures:
        assert base64.b64decode(picture, validate=True)[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(set(pictures)) == len(pictures)


def test_undo_is_proved_bit_identical(demo: Demo) -> None:
    for text in (demo.page, demo.printed):
        assert "bit-identical" in text
        assert "logits differ" not in text


def test_asked_questions_are_known_before_and_forgotten_after(demo: Demo) -> None:
    by_prompt = {fact.prompt: fact for fact in FACTS if fact.group == WORLD["forget"][0].group}
    asked = [row for row in demo.tables.rows if len(row) >= 5 and row[0] in by_prompt]
    assert len(asked) == 5
    for prompt, truth, *_ in asked:
        assert truth == by_prompt[prompt].answer
        assert prompt in demo.printed
    before, after, never = ([row[i] == row[1] for row in asked] for i in (2, 3, 4))
    assert sum(before) >= 4
    assert sum(after) <= 1
    assert sum(never) <= 1


def test_neighbours_and_strangers_answer_as_before(demo: Demo) -> None:
    """The last two cells of a row are the answers before and after."""
    near = [row for row in demo.tables.rows if row and row[0] == "neighbour"]
    far = [row for row in demo.tables.rows if row and row[0] == "unrelated"]
    assert len(near) >= 2
    assert len(far) >= 2
    assert all(row[-2] == row[-1] != "" for row in far)
    assert sum(row[-2] == row[-1] for row in near) >= len(near) - 1
    assert all(row[1] in demo.printed for row in near + far)


def test_forget_set_is_forgotten_and_the_rest_is_not(demo: Demo) -> None:
    lines = {line["group"]: line["metrics"] for line in demo.results["groups"]}
    levels = {state: entry["mean"] for state, entry in lines["forget"][LOGPROB]["states"].items()}
    assert levels["never trained"] < levels["after"] < levels["prompt masked"]
    assert lines["forget"][LOGPROB]["change"]["after"]["high"] < 0
    exact = {group: {state: e["mean"] for state, e in lines[group]["exact match"]["states"].items()} for group in lines}
    assert exact["forget"]["before"] >= 0.9
    assert exact["forget"]["after"] <= 0.2
    assert exact["retain"]["after"] >= exact["retain"]["before"] - 0.2


def test_memory_is_more_selective_than_its_control(demo: Demo) -> None:
    selectivity = demo.results["selectivity"]
    assert selectivity["after"]["low"] > selectivity["mean-delta"]["mean"]


def test_records_hold_every_row_of_every_state(demo: Demo) -> None:
    records = read_records(demo.out / "records.jsonl")
    assert [record.to_json() for record in records] == [record.to_json() for record in demo.scores.records]
    counts = Counter((r.state, r.group, r.id) for r in records if r.metric == LOGPROB)
    assert set(counts.values()) == {1}
    groups = {line["group"]: line["n"] for line in demo.results["groups"]}
    assert {"forget", "paraphrase", "neighbours", "retain"} <= set(groups)
    assert Counter((state, group) for state, group, _ in counts) == {(s, g): n for s in STATES for g, n in groups.items()}
    known = {fact.id for fact in FACTS}
    assert all(name.removesuffix("/paraphrase") in known for _, _, name in counts)
    assert {r.state for r in records if r.metric == "output"} == {"before", "after", "never trained"}
    for line in demo.results["groups"]:  # and the page shows the table
        assert any(row and row[0] == line["group"] and row[1] == str(line["n"]) for row in demo.tables.rows)


def test_strip_shows_the_canvas_from_all_masked_to_the_answer(demo: Demo) -> None:
    """Two strips; each opens with an all-masked row and leaves no mask in its last one."""
    strips = re.findall(r'<table class="strip">(.*?)</table>', demo.page, re.DOTALL)
    assert len(strips) == 2
    for strip in strips:
        rows = [re.findall(r'<td class="([^"]*)"', row) for row in strip.split("<tr>")[1:]]
        assert set(rows[0]) == {"m"}
        assert "m" not in rows[-1]
        masked = [row.count("m") for row in rows]
        assert masked == sorted(masked, reverse=True)
    assert strips[0] != strips[1]
