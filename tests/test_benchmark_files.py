"""Readers of data files and the hub: every suffix and layout, and bad files, each refused in one sentence with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remask.errors import RemaskError
from remask.evaluation.benchmarks import hub, rows
from remask.evaluation.benchmarks.base import Choice, Probe, Text, find_subject
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.evaluation.benchmarks.rows import find_file, need_file, read_rows, sample_note
from remask.facts import Fact

COLUMNS: dict[str, rows.ColumnKind] = {"question": "text", "answer": "text"}
GOOD = [{"question": f"Who is number {i}?", "answer": f"Nobody {i}."} for i in range(4)]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(error: pytest.ExceptionInfo[RemaskError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(map(json.dumps, GOOD)),
        "\n".join(map(json.dumps, GOOD)) + "\n\n",
        json.dumps(GOOD),
        "\n " + json.dumps(GOOD, indent=4) + "\n",
        json.dumps(GOOD[:2]) + "\n" + json.dumps(GOOD[2:]),
        json.dumps(GOOD[:2]) + "[]" + json.dumps(GOOD[2:]),
    ],
)
def test_lines_and_arrays_hold_the_same_rows(tmp_path: Path, text: str) -> None:
    assert [row for _, row in read_rows(write(tmp_path / "a.json", text), COLUMNS)] == GOOD


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with remask[bench]")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(GOOD), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet", COLUMNS)] == GOOD
    with pytest.raises(RemaskError, match=r"a\.parquet, row 1: unknown column 'answer'"):
        read_rows(tmp_path / "a.parquet", {"question": "text"})
    write(tmp_path / "b.parquet", "no parquet")
    with pytest.raises(RemaskError, match=r"b\.parquet: not a Parquet file .*fetch"):
        read_rows(tmp_path / "b.parquet", COLUMNS)


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(GOOD, indent=1))
    lines = path.read_text().splitlines()
    for (place, row), number in zip(read_rows(path, COLUMNS), range(1, 5), strict=True):
        line = int(place.split("line ")[1].split(",")[0])
        assert lines[line - 1].strip() == "{" and json.dumps(row["question"]) in lines[line]
        assert place == f"{path}, line {line}, row {number}"


@pytest.mark.parametrize("size", range(1, len(json.dumps(GOOD))))
def test_an_array_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(RemaskError) as error:
        read_rows(write(tmp_path / "a.json", json.dumps(GOOD)[:size]), COLUMNS)
    assert "a.json, line 1" in refused(error) and "fetch it again" in str(error.value)


def test_a_cut_line_is_refused(tmp_path: Path) -> None:
    text = "\n".join(map(json.dumps, GOOD))
    with pytest.raises(RemaskError) as error:
        read_rows(write(tmp_path / "a.json", text[:-9]), COLUMNS)
    assert "a.json, line 4: not JSON" in refused(error) and "fetch the file again" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a.json: holds no rows"),
        ("[]", "a.json: holds no rows"),
        ("[1]", "line 1, row 1: expected a JSON object, found int"),
        ('[{"question": "a", "answer": "b"} {"question": "a", "answer": "b"}]', "line 1, row 1: expected a comma"),
        ("[] {}", "line 1: expected a JSON array"),
        ('{"question": "a"}', "line 1: column 'answer' is missing or empty; a row has question, answer"),
        ('{"question": "a", "answer": "b"}\n{"question": "a", "answer": ""}', "line 2: column 'answer' is missing or empty"),
        ('{"question": "a", "answer": 3}', "line 1: column 'answer' must be a text"),
        ('{"question": "a", "answer": "b", "task_id": 1}', "line 1: unknown column 'task_id'.*question, answer"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "a.json: a Git LFS pointer"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RemaskError, match=words) as error:
        read_rows(write(tmp_path / "a.json", text), COLUMNS)
    refused(error)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [("blank", "", 1), ("texts", [], ["a", 1]), ("integer", 0, True), ("object", {}, []), ("flag", False, 0)],
)
def test_kinds_of_columns(tmp_path: Path, kind: rows.ColumnKind, good: object, bad: object) -> None:
    path = tmp_path / "a.json"
    assert read_rows(write(path, json.dumps([{"x": good}])), {"x": kind})[0][1] == {"x": good}
    assert read_rows(path, {}, {"x": kind})
    with pytest.raises(RemaskError, match=r"column 'x' must be"):
        read_rows(write(path, json.dumps([{"x": bad}])), {"x": kind})
    with pytest.raises(RemaskError, match=r"column 'x' is missing"):
        read_rows(write(path, '[{"y": 1}]'), {"x": kind}, {"y": "integer"})


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for start in (b"[", b"{"):
        (tmp_path / "a.json").write_bytes(start + b'"\xff\xfe')
        with pytest.raises(RemaskError, match=r"a\.json: not a UTF-8"):
            read_rows(tmp_path / "a.json", COLUMNS)


def test_files_are_found_by_stem(tmp_path: Path) -> None:
    assert find_file(tmp_path, ["a", "b/c"]) is None
    last = write(tmp_path / "b" / "c-00000-of-00001.parquet", "")
    assert find_file(tmp_path, ["a", "b/c"]) == last
    first = write(tmp_path / "a.jsonl", "")
    assert find_file(tmp_path, ["a", "b/c"]) == first
    with pytest.raises(RemaskError, match=r"x\.json: no such file \(nor y\); point --data at a folder with the MUSE files"):
        need_file(tmp_path, ["x", "y"], "MUSE")


def test_samples_are_stated_and_too_many_rows_refused() -> None:
    path, complete = Path("bio.json"), {"new": 5, "old": 7}
    assert sample_note(path, 7, complete) == "bio.json: all 7 rows of old"
    assert "a sample of 6 rows" in sample_note(path, 6, complete)
    with pytest.raises(RemaskError, match="8 rows, more than the 7"):
        sample_note(path, 8, complete)


# ------------------------------------------------------------------ hub ids
@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, object]]:
    """Calls of snapshot_download; nothing reaches the network."""
    calls: list[dict[str, object]] = []

    def download(repository: str, **options: object) -> str:
        calls.append({"repository": repository, **options})
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return calls


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "data", "revision"),
    [
        ("tofu:forget01", "locuslab/TOFU", None),
        ("tofu:forget01", Path("locuslab/TOFU@" + COMMIT), COMMIT),
        ("rwku:1_Stephen_King", "jinzhuoran/RWKU", None),
        ("muse:books", "muse-bench/MUSE-Books", None),
        ("muse:news", "muse-bench/MUSE-News", None),
        ("wmdp:bio", "cais/wmdp", "ef23edde7c8cf8bc53ce769f3faa8ce57499c903"),
        ("wmdp:bio", "cais/wmdp@" + COMMIT, COMMIT),
    ],
)
def test_published_ids_are_downloaded_when_named(
    downloads: list[dict[str, object]], name: str, data: str | Path, revision: str | None
) -> None:
    with pytest.raises(RemaskError):  # the stand-in of the download is empty
        load_benchmark(name, data)
    (call,) = downloads
    assert (call["repository"], call["revision"], call["repo_type"]) == (str(data).split("@")[0], revision, "dataset")
    assert call["allow_patterns"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("tofu:forget01", None, "needs its files; point --data at a folder, or locuslab/TOFU"),
        ("tofu:forget01", "data/tofu", "data/tofu: no such folder"),
        ("tofu:forget01", "jinzhuoran/RWKU", "no such folder.*locuslab/TOFU"),
        ("muse:books", "muse-bench/MUSE-News", "no such folder.*MUSE-Books"),
        ("zsre:eval", "some/zsre", "no such folder.*point --data at a folder$"),
        ("whp", None, "point --data at a folder$"),
        ("wmdp:bio", "cais/wmdp@main", "a revision is a commit of 40"),
    ],
)
def test_nothing_else_reaches_the_network(downloads: list[dict[str, object]], name: str, data: str | None, words: str) -> None:
    with pytest.raises(RemaskError, match=words) as error:
        load_benchmark(name, data)
    refused(error)
    assert downloads == []


def test_a_refusing_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("offline\nand more")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(RemaskError, match=r"locuslab/TOFU is no folder, and the hub gave no such data set \(offline\)"):
        load_benchmark("tofu:forget01", "locuslab/TOFU")


# ------------------------------------------------------------------ probes
def test_probes_hold_the_rows_of_their_kind() -> None:
    fact, choice = Fact("a", "Who is Ada?", "Ada", "a baker"), Choice("c", "Who?", ("Ada", "Bruno"), 1)
    assert len(Probe("cloze", "forget", [fact])) == len(Probe("choice", "forget", choices=[choice])) == 1
    assert len(Probe("membership", "holdout", texts=[Text("t", "words")])) == 1
    assert Probe("question", "retain", [fact], template="Q: {prompt}\nA:").wrap("a {b}") == "Q: a {b}\nA:"
    for bad in (
        lambda: Probe("question", "forget"),
        lambda: Probe("choice", "forget", [fact]),
        lambda: Probe("text", "forget", [fact], texts=[Text("t", "words")]),
        lambda: Probe("question", "forget", [fact], template="Q:"),
        lambda: Probe("riddle", "forget", [fact]),  # type: ignore[arg-type]
        lambda: Choice("c", "Who?", ("Ada",), 0),
        lambda: Choice("c", "Who?", ("Ada", "Bruno"), 2),
    ):
        with pytest.raises(RemaskError):
            bad()


def test_subject_is_the_longest_part_of_the_name_in_the_prompt() -> None:
    assert find_subject("What did King write?", "Stephen King") == "King"
    assert find_subject("Who wrote it?", "Stephen King") == "Who wrote it?"
