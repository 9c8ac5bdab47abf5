"""An audit from beginning to end into a folder: what is written, killed and resumed, shared by processes, compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import FACTS, build_toy
from remask.backbones import MaskedDiffusionLM, Site, load
from remask.backbones.loading import save_pretrained
from remask.editing import EditMemory, preset
from remask.errors import RemaskError
from remask.evaluation.records import read_records, write_records
from remask.experiments.audits import AuditConfig, run_benchmark, write_results
from remask.experiments.diffs import diff_audits
from remask.reporting.tables import audit_tables, diff_tables

FINAL = ("audit.json", "records.jsonl", "results.json", "index.html", "levels.png", "forget_retain.png", "attacks.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, taught: MaskedDiffusionLM) -> Path:
    """A model that knows, its twin that does not, an edit of it, and a benchmark of the user's own completions."""
    root = tmp_path_factory.mktemp("audit")
    save_pretrained(taught, root / "model")
    save_pretrained(build_toy(seed=7), root / "twin")
    lm = load(root / "model")
    memory = EditMemory.build(lm, _facts(FACTS[:2]), Site(1), config=preset("ridge", mu=0.0), alpha=1.0)
    memory.save(root / "edit.safetensors")
    (root / "data").mkdir()
    for name, facts in (("forget", FACTS[:2]), ("retain", FACTS[4:6]), ("fit", FACTS[6:8])):
        rows = [{"prompt": f.prompt, "completion": f.answer, "subject": f.subject, "group": f.group} for f in facts]
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return root


def _facts(facts: list[Any]) -> list[Any]:
    return [replace(fact, id=f"whp/forget/{i:04d}") for i, fact in enumerate(facts)]


def config(place: Path, **changes: Any) -> AuditConfig:
    asked = {"edit": "default", "layer": 1, "reference": str(place / "twin"), "precision": "fp32", "seeds": 2, **changes}
    return AuditConfig(str(place / "model"), "whp", **asked)


@pytest.fixture(scope="module")
def done(place: Path) -> tuple[Path, dict[str, Any]]:
    result = run_benchmark(config(place), place / "done", place / "data")
    assert result is not None
    return place / "done", result


def finals(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FINAL}


# ------------------------------------------------------------------ what is written
def test_everything_is_written(done: tuple[Path, dict[str, Any]]) -> None:
    folder, result = done
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FINAL, "edits", "parts"])
    assert len(list((folder / "edits").iterdir())) == 2  # one a seed
    assert json.loads((folder / "results.json").read_text("utf-8")) == json.loads(json.dumps(result))
    assert [line["group"] for line in result["groups"]] == ["forget", "retain"]
    assert result["edit"]["note"] is None
    forget = result["groups"][0]["metrics"]["answer log-probability"]
    assert forget["change"]["after"]["high"] < 0
    assert len(forget["states"]["after"]["seeds"]) == 2
    attacks = {line["attack"]: line for line in result["attacks"]}
    assert attacks["edit off"]["regained"] == pytest.approx(100)
    forget = {f"whp/forget/{i:04d}" for i in range(2)}
    assert all(line["n"] + len(line["left_out"]) == 2 and set(line["left_out"]) <= forget for line in attacks.values())
    assert {"prefill 25 %", "guidance 1.5", "4-bit weights"} <= set(attacks)
    assert result["command"].startswith(f"remask audit {folder.parent / 'model'} --benchmark whp --edit default --data DIR")


def test_aggregates_and_pages_are_derived_from_the_records(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = done
    for name in ("audit.json", "records.jsonl"):
        shutil.copy(folder / name, tmp_path / name)
    write_results(tmp_path)
    for name in ("results.json", "levels.png", "forget_retain.png", "attacks.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_records_of_an_attack_name_it(done: tuple[Path, dict[str, Any]]) -> None:
    records = read_records(done[0] / "records.jsonl")
    attacked = [record for record in records if record.attack]
    assert {record.state for record in attacked} == {"before", "after", "never trained"}
    assert {record.group for record in attacked} == {"forget"}
    assert {record.attack for record in attacked} == {line["attack"] for line in done[1]["attacks"]} - {"edit off"}
    texts = [record for record in attacked if record.metric == "output"]
    assert {record.attack for record in texts if record.state == "after"} >= {"prefill 25 %", "4-bit weights"}
    assert all(record.source.sampler is not None for record in texts)
    assert all(record.source.bank for record in attacked if record.metric == "answer log-probability")


def test_without_text_no_generated_word_is_kept(place: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    result = run_benchmark(config(place, text=False), tmp_path, place / "data", parts=done[0] / "parts")
    assert result is not None
    records = read_records(tmp_path / "records.jsonl")
    assert not [record for record in records if record.metric == "output"]
    assert all(isinstance(record.value, float) for record in records)
    assert result["groups"] == done[1]["groups"]
    page = (tmp_path / "index.html").read_text("utf-8")
    assert all(fact.answer not in page for fact in FACTS[:2])


def test_tables_fit_a_terminal_and_name_what_they_show(done: tuple[Path, dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for part in audit_tables(done[1]):
        console.print(part)
    text = console.export_text()
    assert "…" not in text
    for word in ("forget", "retain", "prefill 25 %", "edit off", "bootstrap"):
        assert word in text


# ------------------------------------------------------------------ killed, resumed, shared
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from remask.evaluation.audit import Cell
from remask.experiments.audits import AuditConfig, run_benchmark
genuine, left = Cell.run, [{cells}]
def run(cell, benchmark):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(cell, benchmark)
Cell.run = run
config = AuditConfig({model!r}, "whp", layer=1, reference={twin!r}, precision="fp32", seeds=2)
run_benchmark(config, Path({out!r}), Path({data!r}))
"""


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.mark.parametrize("cells", [0, 7])
def test_an_audit_killed_anywhere_resumes_to_the_same_files(
    place: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, cells: int
) -> None:
    paths = {
        "model": str(place / "model"),
        "twin": str(place / "twin"),
        "out": str(tmp_path / "out"),
        "data": str(place / "data"),
    }
    killed = subprocess.run([sys.executable, "-c", KILLED.format(cells=cells, **paths)], env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    parts = tmp_path / "out" / "parts"
    assert len(list(parts.glob("*.jsonl"))) == cells if cells else not parts.exists()
    assert not (tmp_path / "out" / "records.jsonl").exists()
    run_benchmark(config(place), tmp_path / "out", place / "data")
    assert finals(tmp_path / "out") == finals(done[0])


SHARED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from remask.evaluation.audit import Cell
from remask.experiments.audits import AuditConfig, run_benchmark
from remask.experiments.workers import Workers
genuine, ran, here = Cell.run, [], Workers.here()
assert here.count == 2
def run(cell, benchmark):
    ran.append(cell.key)
    return genuine(cell, benchmark)
Cell.run = run
config = AuditConfig({model!r}, "whp", layer=1, reference={twin!r}, precision="fp32", seeds=2)
result = run_benchmark(config, Path({out!r}), Path({data!r}))
assert (result is None) == (here.index == 1)
Path({out!r}, f"ran-{{here.index}}").write_text(" ".join(ran))
"""


def test_two_processes_share_the_work_and_write_the_same_files(
    place: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="several processes need remask[train]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    paths = {"model": str(place / "model"), "twin": str(place / "twin"), "out": str(out), "data": str(place / "data")}
    (tmp_path / "shared.py").write_text(SHARED.format(**paths), "utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    ran = subprocess.run([*launch, str(tmp_path / "shared.py")], env=environment(), capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stderr.decode()
    shares = [(out / f"ran-{index}").read_text("utf-8").split() for index in (0, 1)]
    assert all(shares)
    assert not set(shares[0]) & set(shares[1])
    assert len(shares[0]) + len(shares[1]) == len(list((out / "parts").iterdir()))
    assert finals(out) == finals(done[0])


# ------------------------------------------------------------------ nothing to forget, other edits
def test_a_model_that_knows_nothing_is_reported_as_such(place: Path, tmp_path: Path) -> None:
    ignorant = replace(config(place, seeds=1), model=str(place / "twin"))
    result = run_benchmark(ignorant, tmp_path, place / "data")
    assert result is not None
    assert "nothing to forget" in result["edit"]["note"]
    for line in result["groups"]:
        for metric in line["metrics"].values():
            assert metric["change"]["after"]["mean"] == 0.0
    texts = [part for part in audit_tables(result) if isinstance(part, str)]
    assert "does not know the forget set" in texts[0]
    assert result["attacks"] == []
    assert "Nothing to forget" in (tmp_path / "index.html").read_text("utf-8")


@pytest.mark.parametrize("edit", ["none", "mean-delta", "paper", "file"])
def test_every_kind_of_edit_is_audited(place: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, edit: str) -> None:
    name = str(place / "edit.safetensors") if edit == "file" else edit
    asked = config(place, edit=name, layer=None if edit == "file" else 1, alpha=1.0, seeds=1, attacks=False)
    result = run_benchmark(asked, tmp_path, place / "data", parts=done[0] / "parts")
    assert result is not None
    change = result["groups"][0]["metrics"]["answer log-probability"]["change"]
    assert (change["after"]["mean"] == 0) == (edit == "none")
    assert ("mean-delta" in change) == (edit in ("paper", "file"))
    # a second audit of the same edit reads its file back
    again = run_benchmark(asked, tmp_path, place / "data", parts=done[0] / "parts")
    assert again == result


def test_an_edit_of_another_model_is_refused_before_anything_is_measured(place: Path, tmp_path: Path) -> None:
    other = replace(config(place, edit=str(place / "edit.safetensors"), layer=None), model=str(place / "twin"))
    with pytest.raises(RemaskError, match="was built on model"):
        run_benchmark(other, tmp_path / "out", place / "data")
    assert not (tmp_path / "out").exists()


def test_a_file_is_as_strong_as_it_says_or_as_it_is_asked_to_be(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unlearned"  # as `remask unlearn` leaves it
    folder.mkdir()

    def audited(**asked: Any) -> tuple[float, float]:
        chosen = config(place, edit=str(folder), layer=None, seeds=1, attacks=False, **asked)
        result = run_benchmark(chosen, tmp_path / "audit", place / "data")
        assert result is not None
        change = result["groups"][0]["metrics"]["answer log-probability"]["change"]["after"]["mean"]
        return result["edit"]["seeds"][0]["alpha"], change

    memory = EditMemory.load(place / "edit.safetensors")
    memory.with_alpha(0.75).save(folder / "edit.safetensors")
    own, half = audited(), audited(alpha=0.5)
    memory.with_alpha(0.5).save(folder / "edit.safetensors")
    remade = audited()  # the file of that name is another one now
    assert (own[0], half[0], remade[0]) == (0.75, 0.5, 0.5)
    assert half[1] == remade[1] != own[1]
    for asked in ({"layer": 1}, {"site": "auto"}, {"level": "never-trained"}):
        with pytest.raises(RemaskError, match="as strong as it says; leave out --layer"):
            config(place, edit=str(folder), **({"layer": None} | asked))


def test_precision_is_recorded_and_close(place: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    result = run_benchmark(config(place, precision="bf16 autocast", seeds=1, attacks=False), tmp_path, place / "data")
    assert result is not None
    records = read_records(tmp_path / "records.jsonl")
    assert {record.source.precision for record in records} == {"bf16 autocast"}
    for mine, exact in zip(result["groups"], done[1]["groups"], strict=True):
        levels = [line["metrics"]["answer log-probability"]["states"]["before"] for line in (mine, exact)]
        assert levels[0]["seeds"][0] == pytest.approx(levels[1]["seeds"][0], abs=0.5)
        assert levels[0]["seeds"][0] != levels[1]["seeds"][0]
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16  # the library's default, untouched
    assert not torch.is_autocast_enabled("cpu")


# ------------------------------------------------------------------ two audits
def test_an_audit_differs_from_itself_in_nothing(done: tuple[Path, dict[str, Any]]) -> None:
    result = diff_audits(done[0], done[0])
    assert result["lines"]
    assert all(line["change"]["mean"] == 0 and line["p_holm"] == 1 for line in result["lines"])
    assert diff_tables(result)


def test_two_edits_are_compared_row_by_row(place: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run_benchmark(config(place, edit="paper", alpha=1.0), tmp_path, place / "data", parts=done[0] / "parts")
    result = diff_audits(done[0], tmp_path)
    values = [
        {
            (r.group, r.metric, r.id): float(r.value)
            for r in read_records(folder / "records.jsonl")
            if r.state == "after" and not r.attack and r.source.seed == 0 and r.metric != "output"
        }
        for folder in (done[0], tmp_path)
    ]
    for line in result["lines"]:
        if line["state"] != "after":
            assert line["state"] == "mean-delta" or line["change"]["mean"] == 0
            continue
        keys = [key for key in values[0] if key[:2] == (line["group"], line["metric"])]
        assert line["change"]["mean"] == pytest.approx(np.mean([values[1][key] - values[0][key] for key in keys]))
        worst = max(keys, key=lambda key: abs(values[1][key] - values[0][key]))
        assert abs(line["rows"][0]["change"]) == pytest.approx(abs(values[1][worst] - values[0][worst]))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("bank", "0" * 16, "bank"),
        ("draws", 99, "draws"),
        ("precision", "bf16 autocast", "precision"),
        ("sampler", {}, "sampler"),
    ],
)
def test_two_protocols_are_not_compared(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, field: str, value: object, named: str
) -> None:
    shutil.copy(done[0] / "audit.json", tmp_path / "audit.json")
    records = read_records(done[0] / "records.jsonl")
    changed = [
        replace(record, source=replace(record.source, **{field: value}))
        if getattr(record.source, field) is not None
        else record
        for record in records
    ]
    write_records(tmp_path / "records.jsonl", changed)
    with pytest.raises(RemaskError, match=f"two protocols cannot be compared: {named}"):
        diff_audits(done[0], tmp_path)


def test_other_benchmarks_other_rows_and_unfinished_audits_are_not_compared(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(RemaskError, match="holds no finished audit"):
        diff_audits(done[0], tmp_path)
    header = json.loads((done[0] / "audit.json").read_text("utf-8"))
    records = read_records(done[0] / "records.jsonl")
    (tmp_path / "audit.json").write_text(json.dumps(header), "utf-8")
    write_records(tmp_path / "records.jsonl", [r for r in records if r.id != records[0].id])
    with pytest.raises(RemaskError, match="group 'forget' holds other rows"):
        diff_audits(done[0], tmp_path)
    header["benchmark"]["name"] = "whp2"
    (tmp_path / "audit.json").write_text(json.dumps(header), "utf-8")
    with pytest.raises(RemaskError, match="benchmark 'whp' against 'whp2'"):
        diff_audits(done[0], tmp_path)
    data = (done[0] / "records.jsonl").read_bytes()
    (tmp_path / "audit.json").write_bytes((done[0] / "audit.json").read_bytes())
    (tmp_path / "records.jsonl").write_bytes(data[: len(data) // 2])
    with pytest.raises(RemaskError, match=r"records\.jsonl, line \d+: .*run the audit again, it resumes"):
        diff_audits(done[0], tmp_path)
