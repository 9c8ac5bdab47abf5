"""A trace from beginning to end into a folder: what is written, killed and resumed, shared by processes, compared, used."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import remask.experiments.tracing as tracing
from remask.assets.world import world
from remask.backbones import MaskedDiffusionLM, Site
from remask.editing import EditMemory
from remask.errors import RemaskError
from remask.experiments.tracing import AUTO_FACTS, TraceJob, diff_traces, find_site, run_trace
from remask.facts import Fact, save_facts
from remask.tracing import SiteRule, Trace, TraceConfig, Weights, choose_site, cluster_sites, site_scores, trace
from test_audit_run import environment
from test_cli import Remask, assert_refused, remask, small_world, snapshot

__all__ = ["remask", "small_world"]  # fixtures

KNOWN = {fact.id.split("/")[1]: fact for fact in world()["forget"][:18] if fact.id.endswith("/short")}
CHOSEN = [KNOWN["pet"], KNOWN["food"], KNOWN["city"]]  # 3, 2 and 1 tokens: as many steps, three batches
NEAR = [replace(KNOWN["instrument"], id="near/instrument"), replace(KNOWN["work"], id="near/work")]
UNKNOWN = replace(KNOWN["city"], id="unknown/city", answer="Sligo")
CONFIG = TraceConfig(steps=3, draws=2)
PICTURES = [f"{name}.{kind}" for name in ("facts", "heatmap", "layers", "steps") for kind in ("png", "svg")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fact files (read-only)."""
    folder = tmp_path_factory.mktemp("facts")
    save_facts(CHOSEN, folder / "facts.jsonl")
    save_facts(CHOSEN[:1], folder / "one.jsonl")
    save_facts(NEAR, folder / "near.jsonl")
    save_facts([CHOSEN[0], UNKNOWN], folder / "mixed.jsonl")
    save_facts([UNKNOWN], folder / "unknown.jsonl")
    worded = Fact("pet", CHOSEN[0].prompt, "Zora Yates", CHOSEN[0].answer, paraphrases=(CHOSEN[0].paraphrases[0], "And hers?"))
    save_facts([worded], folder / "worded.jsonl")
    return folder


def job(files: Path, **changes: Any) -> TraceJob:
    return TraceJob("tiny", **{"facts": files / "facts.jsonl", "config": CONFIG, **changes})


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact trace of CHOSEN (read-only)."""
    folder = tmp_path_factory.mktemp("done")
    assert run_trace(job(files), folder) is not None
    return folder


def site_of(folder: Path) -> dict[str, Any]:
    return json.loads(
        (folder / "site.json").read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in site.json")
    )


def lasting(folder: Path) -> dict[str, Any]:
    """site.json without what the run itself cost."""
    record = site_of(folder)
    return record | {"trace": {k: v for k, v in record["trace"].items() if k not in ("seconds", "blocks", "processes")}}


def no_batch(*_args: Any, **_options: Any) -> Trace:
    raise AssertionError("a batch was traced")


# ------------------------------------------------------------------ what is written
def test_the_folder_holds_trace_site_pictures_and_page(done: Path) -> None:
    names = sorted(path.name for path in done.iterdir())
    assert names == sorted([*PICTURES, "index.html", "parts", "site.json", "trace.safetensors"])
    starts = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml"}
    assert all((done / name).read_bytes().startswith(starts[name[-3:]]) for name in PICTURES)
    assert len(list((done / "parts").iterdir())) == 3
    page = (done / "index.html").read_text("utf-8")
    assert "tiny" in page
    assert all(fact.id in page for fact in CHOSEN)


def test_the_trace_is_the_librarys(done: Path, tiny: MaskedDiffusionLM) -> None:
    found = Trace.load(done, model=tiny.fingerprint())
    alone = trace(tiny, [tiny.encode(fact) for fact in CHOSEN], CONFIG)
    assert (found.ids, found.config, found.mode, found.precision) == (alone.ids, CONFIG, "exact", "fp32")
    assert torch.equal(found.effects.nan_to_num(9), alone.effects.nan_to_num(9))
    assert found.effects.abs().nan_to_num().max() > 0.1


def test_site_says_where_how_sure_and_of_what(done: Path, tiny: MaskedDiffusionLM) -> None:
    record, found = site_of(done), Trace.load(done)
    scores = site_scores(found, SiteRule(module="resid"))
    best = scores[:, 0].amax(-1)
    assert (record["module"], record["steps"], record["layer"]) == ("resid", None, int(best.argmax()))
    overall, strongest = site_scores(found), record["strongest"]
    place = (strongest["layer"], found.config.modules.index(strongest["module"]), strongest["step"])
    assert strongest["effect"] == pytest.approx(float(overall.max()))
    assert float(overall[place]) == float(overall.max())
    assert sum(line["share"] for line in record["stability"]) == pytest.approx(1)
    assert {line["module"] for line in record["stability"]} == {"resid"}
    assert list(record["facts"]) == [fact.id for fact in CHOSEN]
    assert [cluster["facts"] for cluster in record["clusters"]] == [[fact.id for fact in CHOSEN]]
    assert (record["unknown"], record["skipped"]) == ([], {})
    assert record["capped"] == {KNOWN["food"].id: 2, KNOWN["city"].id: 1}
    assert record["rule"] == SiteRule(module="resid").to_dict()
    ran = record["trace"]
    assert (ran["model"], ran["fingerprint"]) == ("tiny", tiny.fingerprint())
    assert (ran["facts"], ran["rows"], ran["given"], ran["steps"], ran["draws"]) == (3, 3, 3, 3, 2)
    assert (ran["mode"], ran["corruption"], ran["precision"], ran["processes"]) == ("exact", "add", "fp32", 1)
    assert ran["estimand"].startswith("free-running")
    assert ran["blocks"] > 0


def test_the_command_prints_and_records_itself(remask: Remask, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep er" / "trace"
    words = ["trace", "tiny", "--facts", files / "facts.jsonl", "-o", out, "--steps", 2, "--draws", 1, "--limit", 2]
    result = remask(*words)
    assert result.code == 0, result.err
    record = site_of(out)
    assert f"{record['module']} at layer {record['layer']}" in result.out
    assert "2 of the 3 facts" in " ".join(result.out.split())
    assert (record["trace"]["rows"], record["trace"]["given"]) == (2, 3)
    command = record["trace"]["command"]
    assert command.startswith("remask trace tiny --facts ")
    assert f"'{out}'" in command  # a path with a space can be pasted
    assert command.endswith("--steps 2 --draws 1 --limit 2")
    again = remask(*words, "--json")
    assert again.data == site_of(out)
    assert {**lasting(out), "trace": None} == {**record, "trace": None}


def test_options_reach_the_protocol_and_the_rule(remask: Remask, files: Path, tmp_path: Path) -> None:
    words = ["trace", "tiny", "--facts", files / "one.jsonl", "-o", tmp_path, "--preset", "paper", "--draws", 1]
    words += ["--corruption", "replace", "--noise", 2, "--fresh", "--view", "last", "--seed", 3, "--gamma", 0.5, "--strict"]
    result = remask(*words, "--per-token", "--module", "any", "--signed", "--smooth", 1, "--json")
    assert result.code == 0, result.err
    config = TraceConfig(8, 1, "replace", 2.0, True, "last", "raw", seed=3)
    assert Trace.load(tmp_path).config == config
    weights = Weights(0.5, strict=True, normalise=False, per_token=True)
    assert result.data["rule"] == SiteRule(weights, None, signed=True, smooth=1).to_dict()


def test_several_views_are_traces_of_their_own(files: Path, tmp_path: Path) -> None:
    run_trace(job(files, facts=files / "one.jsonl", views=("subject", "first", "last")), tmp_path)
    names = {"subject": "trace", "first": "trace-first", "last": "trace-last"}
    found = {view: Trace.load(tmp_path / f"{name}.safetensors") for view, name in names.items()}
    assert {view: one.config.view for view, one in found.items()} == {view: view for view in names}
    assert not torch.equal(found["first"].effects, found["last"].effects)
    assert torch.equal(found["first"].clean, found["subject"].clean)


def test_positions_are_written_and_drawn(remask: Remask, tiny: MaskedDiffusionLM, files: Path, tmp_path: Path) -> None:
    words = ["trace", "tiny", "--facts", files / "one.jsonl", "-o", tmp_path, "--steps", 2, "--draws", 1, "--positions"]
    result = remask(*words, "--json")
    assert result.code == 0, result.err
    assert result.data["trace"]["rows"] == 1  # standard output is JSON and nothing else
    with safe_open(tmp_path / "positions.safetensors", framework="pt") as stream:
        length = len(tiny.encode(CHOSEN[0]).ids)
        assert stream.get_tensor(CHOSEN[0].id).shape == (tiny.num_layers, 3, length)
    assert (tmp_path / "positions.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------ neighbours, clusters, wordings
def test_neighbours_are_traced_and_weighed(remask: Remask, files: Path, tmp_path: Path) -> None:
    words = ["trace", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path, "--steps", 3, "--draws", 2]
    result = remask(*words, "--neighbours", files / "near.jsonl", "--beta", 3, "--json")
    assert result.code == 0, result.err
    near = Trace.load(tmp_path / "neighbours.safetensors")
    assert near.ids == ("near/instrument", "near/work")
    best = choose_site(Trace.load(tmp_path), SiteRule(module="resid", beta=3.0), near)
    assert Site.from_dict(result.data) == best.site
    assert result.data["rule"]["beta"] == 3
    assert list(result.data["facts"]) == [fact.id for fact in CHOSEN]
    plain = remask(*words, "--neighbours", files / "near.jsonl", "--json").data  # from the parts
    assert (plain["rule"]["beta"], plain["trace"]["blocks"]) == (1, 0)


def test_beta_alone_is_refused(remask: Remask, files: Path, tmp_path: Path) -> None:
    words = ["trace", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "out", "--beta", 1]
    assert_refused(remask(*words), "--beta", "--neighbours")
    assert snapshot(tmp_path) == {}


def test_bad_neighbours_are_refused_before_anything_is_traced(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "trace_batch", no_batch)
    with pytest.raises(RemaskError, match=r"gone\.jsonl: no such file"):
        run_trace(job(files, neighbours=tmp_path / "gone.jsonl"), tmp_path / "out")


def test_clusters_have_sites_of_their_own(files: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(done / "parts", tmp_path / "parts")
    monkeypatch.setattr(tracing, "trace_batch", no_batch)
    record = run_trace(job(files, clusters=2), tmp_path)
    assert record is not None
    expected = cluster_sites(Trace.load(done), 2, SiteRule(module="resid"))
    assert [tuple(group["facts"]) for group in record["clusters"]] == [names for _, names in expected]
    assert [group["layer"] for group in record["clusters"]] == [choice.site.layer for choice, _ in expected]
    with pytest.raises(RemaskError, match=r"4 clusters of 3 facts: choose 1 \.\.\. 3"):
        run_trace(job(files, clusters=4), tmp_path)


def test_paraphrases_are_rows_of_their_fact(remask: Remask, files: Path, tmp_path: Path) -> None:
    words = ["trace", "tiny", "--facts", files / "worded.jsonl", "-o", tmp_path, "--steps", 2, "--draws", 1]
    result = remask(*words, "--paraphrases")
    assert result.code == 0, result.err
    found, record = Trace.load(tmp_path), site_of(tmp_path)
    assert (found.ids, found.facts) == (("pet", "pet#1"), ("pet", "pet"))
    assert list(record["skipped"]) == ["pet#2"]
    assert "Zora Yates" in record["skipped"]["pet#2"]
    assert "pet#2" in result.out
    assert (record["trace"]["facts"], record["trace"]["rows"], list(record["facts"])) == (1, 2, ["pet"])
    assert remask(*words, "--json").data["trace"]["rows"] == 1


# ------------------------------------------------------------------ facts that the model does not know
def test_unknown_facts_are_left_out_and_named_or_kept(remask: Remask, files: Path, tmp_path: Path) -> None:
    words = ["trace", "tiny", "--facts", files / "mixed.jsonl", "-o", tmp_path, "--steps", 2, "--draws", 1]
    result = remask(*words)
    assert result.code == 0, result.err
    assert "unknown/city" in result.out
    assert "--keep-unknown" in " ".join(result.out.split())
    record = site_of(tmp_path)
    assert (record["unknown"], list(record["facts"])) == (["unknown/city"], [CHOSEN[0].id])
    assert Trace.load(tmp_path).ids == (CHOSEN[0].id,)
    kept = remask(*words, "--keep-unknown", "--json").data
    assert (kept["unknown"], list(kept["facts"])) == ([], [CHOSEN[0].id, "unknown/city"])


def test_nothing_known_is_one_sentence_and_no_site(remask: Remask, files: Path, tmp_path: Path) -> None:
    result = remask("trace", "tiny", "--facts", files / "unknown.jsonl", "-o", tmp_path, "--steps", 2, "--draws", 1)
    assert (result.code, result.out) == (2, "")
    assert "tiny does not produce the object of any of the 1 facts" in result.lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


# ------------------------------------------------------------------ killed, resumed, shared
def test_a_killed_trace_goes_on_where_it_was(files: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, traced = tracing.trace_batch, []

    def counted(lm: Any, rows: Any, *args: Any, **options: Any) -> Trace:
        traced.append([row.id for row in rows])
        if len(traced) == 2:
            raise KeyboardInterrupt
        return genuine(lm, rows, *args, **options)

    monkeypatch.setattr(tracing, "trace_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        run_trace(job(files), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    assert len(list((tmp_path / "parts").iterdir())) == 1
    run_trace(job(files), tmp_path)
    assert traced[2:] == [[fact.id] for fact in CHOSEN[1:]]
    assert (tmp_path / "trace.safetensors").read_bytes() == (done / "trace.safetensors").read_bytes()
    assert lasting(tmp_path) == lasting(done)
    assert all((tmp_path / name).read_bytes() == (done / name).read_bytes() for name in PICTURES)


def test_another_weighting_traces_nothing(
    remask: Remask, files: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done, tmp_path / "out")
    monkeypatch.setattr(tracing, "trace_batch", no_batch)
    words = ["trace", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "out", "--steps", 3, "--draws", 2]
    result = remask(*words, "--gamma", 0.5, "--signed", "--json")
    assert result.code == 0, result.err
    best = choose_site(Trace.load(done), SiteRule(Weights(0.5), "resid", signed=True)).site
    assert Site.from_dict(result.data) == best
    assert (tmp_path / "out" / "trace.safetensors").read_bytes() == (done / "trace.safetensors").read_bytes()
    assert lasting(tmp_path / "out")["rule"]["gamma"] == 0.5


@pytest.mark.parametrize(
    ("changes", "load_options"),
    [
        ({"config": replace(CONFIG, seed=1)}, {}),
        ({"mode": "sweep"}, {}),
        ({"bfloat16": True}, {}),
        ({"keep_unknown": True}, {}),
        ({}, {"dtype": torch.bfloat16}),  # the bundled weights are bf16 numbers: their fingerprint is the same
        ({}, {"mask_id": 5}),
    ],
    ids=str,
)
def test_parts_of_another_protocol_are_not_reused(
    files: Path,
    done: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    load_options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(done / "parts", tmp_path / "parts")
    monkeypatch.setattr(tracing, "trace_batch", no_batch)
    with pytest.raises(AssertionError, match="a batch was traced"):
        run_trace(job(files, **changes), tmp_path, load_options=load_options)


SHARED = """
from pathlib import Path
import torch
torch.set_num_threads(1)
import remask.experiments.tracing as tracing
from remask.experiments.workers import Workers
from remask.tracing import TraceConfig
genuine, traced, here = tracing.trace_batch, [], Workers.here()
assert here.count == 2
def trace_batch(lm, rows, *args, **options):
    if not traced:
        here.wait()  # nobody takes a second batch before everybody has a first one
    traced.extend(row.id for row in rows)
    return genuine(lm, rows, *args, **options)
tracing.trace_batch = trace_batch
job = tracing.TraceJob("tiny", Path({facts!r}), config=TraceConfig(steps=3, draws=2))
record = tracing.run_trace(job, Path({out!r}))
assert (record is None) == (here.index == 1)
Path({out!r}, f"traced-{{here.index}}").write_text(" ".join(traced))
"""


def test_two_processes_share_the_facts_and_write_the_same_trace(files: Path, done: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="several processes need remask[train]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    (tmp_path / "shared.py").write_text(SHARED.format(facts=str(files / "facts.jsonl"), out=str(out)), "utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    ran = subprocess.run([*launch, str(tmp_path / "shared.py")], env=environment(), capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stderr.decode()
    shares = [(out / f"traced-{index}").read_text("utf-8").split() for index in (0, 1)]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(fact.id for fact in CHOSEN)
    assert (out / "trace.safetensors").read_bytes() == (done / "trace.safetensors").read_bytes()
    assert lasting(out) == lasting(done)
    assert site_of(out)["trace"]["processes"] == 2


# ------------------------------------------------------------------ two traces
@pytest.fixture(scope="module")
def others(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces beside `done`: by hooks, a sweep, of one fact, of other steps."""
    root = tmp_path_factory.mktemp("others")
    run_trace(job(files, mode="reference"), root / "reference")
    run_trace(job(files, mode="sweep"), root / "sweep")
    run_trace(job(files, limit=1), root / "one")
    run_trace(job(files, config=TraceConfig(steps=2, draws=2)), root / "steps")
    return root


def test_exact_and_reference_agree(remask: Remask, done: Path, others: Path) -> None:
    result = remask("trace", "diff", done, others / "reference", "--json")
    assert result.code == 0, result.err
    data = result.data
    assert (data["modes"], data["precisions"], data["rows"]) == (["exact", "reference"], ["fp32", "fp32"], 3)
    assert set(data["largest"]) == {"effects", "squares", "clean", "corrupted", "placed"}
    assert 0 <= data["largest"]["effects"] <= 1e-5
    assert data["scale"] == pytest.approx(float(Trace.load(done).effects.nan_to_num().abs().max()))
    table = remask("trace", "diff", done / "trace.safetensors", others / "reference")
    assert table.code == 0
    assert "exact against reference" in table.out
    assert all(name in table.out for name in data["largest"])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("sweep", ["sweep (fixed trajectory", "exact (free-running"]),
        ("one", ["ids", KNOWN["city"].id]),
        ("steps", ["config", "steps=2"]),
        (".", ["trace.safetensors: no such trace"]),
    ],
)
def test_what_cannot_be_compared_is_refused(remask: Remask, done: Path, others: Path, other: str, named: list[str]) -> None:
    assert_refused(remask("trace", "diff", done, others / other), *named)
    with pytest.raises(RemaskError):
        diff_traces(others / other, done)


def test_a_sweep_says_that_it_is_another_estimand(others: Path) -> None:
    record = site_of(others / "sweep")
    assert record["trace"]["estimand"].startswith("fixed trajectory")
    assert "fixed trajectory" in (others / "sweep" / "index.html").read_text("utf-8")


# ------------------------------------------------------------------ the site of an edit
def test_auto_traces_the_first_facts_now(tiny: MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, seen = tracing.trace, []

    def recorded(lm: Any, rows: Any, *args: Any, **options: Any) -> Trace:
        seen.extend(row.id for row in rows)
        return genuine(lm, rows, *args, **options)

    monkeypatch.setattr(tracing, "trace", recorded)
    many = [replace(CHOSEN[2], id=f"copy/{i}") for i in range(AUTO_FACTS + 2)]
    found = find_site(tiny, "auto", many)
    assert seen == [f"copy/{i}" for i in range(AUTO_FACTS)]
    alone = trace(tiny, [tiny.encode(fact) for fact in many[:AUTO_FACTS]])
    assert found == choose_site(alone, SiteRule(module="resid")).site


def layer_four(done: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the site.json of `done` that names layer 4."""
    record = site_of(done)
    assert record["layer"] != 4
    folder.mkdir(exist_ok=True)
    record["trace"] |= changes
    (folder / "site.json").write_text(json.dumps(record | {"layer": 4}), "utf-8")
    return folder


def test_edit_build_takes_auto_a_folder_or_a_file(
    remask: Remask, tiny: MaskedDiffusionLM, files: Path, done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    words = ["edit", "build", "tiny", "--facts", files / "one.jsonl", "-o", out, "--preset", "paper", "--alpha", 1, "--site"]
    folder = layer_four(done, tmp_path / "trace")
    expected = {
        "auto": find_site(tiny, "auto", CHOSEN[:1]),
        str(folder): Site(4),
        str(folder / "site.json"): Site(4),
        str(done): Site(site_of(done)["layer"]),
    }
    for where, site in expected.items():
        result = remask(*words, where)
        assert result.code == 0, result.err
        assert EditMemory.load(out).site == site
        out.unlink()


@pytest.mark.usefixtures("small_world")
@pytest.mark.parametrize("where", ["folder", "auto"])
def test_an_audit_edits_at_the_site(remask: Remask, done: Path, tmp_path: Path, where: str) -> None:
    site = where if where == "auto" else layer_four(done, tmp_path / "trace")
    words = ["audit", "tiny", "--benchmark", "closed-world", "--edit", "paper", "--alpha", 1, "--no-attacks"]
    result = remask(*words, "--steps", 1, "-o", tmp_path / "audit", "--site", site, "--json")
    assert result.code == 0, result.err
    assert f"--site {site}" in result.data["command"]  # standard output is JSON and nothing else
    (edit,) = (tmp_path / "audit" / "edits").iterdir()
    assert EditMemory.load(edit).site.module == "resid"
    assert where == "auto" or EditMemory.load(edit).site == Site(4)


@pytest.mark.usefixtures("small_world")
def test_sites_of_other_models_and_other_files_are_refused(
    remask: Remask, tiny: MaskedDiffusionLM, files: Path, done: Path, tmp_path: Path
) -> None:
    build = ["edit", "build", "tiny", "--facts", files / "one.jsonl", "-o", tmp_path / "m", "--preset", "paper", "--alpha", 1]
    audit = ["audit", "tiny", "--benchmark", "closed-world", "-o", tmp_path / "audit"]
    foreign = layer_four(done, tmp_path / "foreign", fingerprint="0123456789abcdef")
    assert_refused(remask(*build, "--site", foreign), "0123456789abcdef", tiny.fingerprint(), "trace again")
    assert_refused(remask(*build, "--site", done / "trace.safetensors"), "trace.safetensors", "not a site.json")
    assert_refused(remask(*build, "--site", files), "site.json", "'auto'")
    for words in (build, audit):
        assert_refused(remask(*words, "--site", done, "--layer", 2), "--layer and --site")
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


# ------------------------------------------------------------------ bad options
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--mode", "exakt"], ["'exakt'", "exact, sweep, reference"]),
        (["--corruption", "blur"], ["'blur'", "add, replace, mask"]),
        (["--view", "middle"], ["'middle'", "subject, first, last"]),
        (["--view", "subject", "--view", "middle"], ["'middle'", "subject, first, last"]),
        (["--readout", "cold"], ["'cold'", "frozen, raw"]),
        (["--preset", "papre"], ["'papre'", "default, paper"]),
        (["--precision", "fp8"], ["'fp8'", "fp32", "bf16"]),
        (["--module", "head"], ["'head'", "resid, attn, mlp"]),
        (["--steps", "0"], ["steps >= 1"]),
        (["--gamma", "2"], ["gamma 2.0"]),
        (["--smooth", "-1"], ["smooth -1"]),
        (["-L", "colour=red"], ["'colour'"]),
    ],
    ids=" ".join,
)
def test_bad_options_are_refused_with_the_choices(
    remask: Remask, files: Path, tmp_path: Path, words: list[str], named: list[str]
) -> None:
    assert_refused(remask("trace", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "out", *words), *named)
    assert snapshot(tmp_path) == {}


def test_too_little_memory_says_how_much_is_needed(remask: Remask, files: Path, tmp_path: Path) -> None:
    result = remask("trace", "tiny", "--facts", files / "one.jsonl", "-o", tmp_path / "out", "--memory", 0.0001)
    assert (result.code, result.out) == (2, "")
    assert "tiny needs" in result.lines[-1]
    assert " MB, more than the" in result.lines[-1]
    needed = float(result.lines[-1].split("needs ")[1].split(" MB")[0])
    again = remask("trace", "tiny", "--facts", files / "one.jsonl", "-o", tmp_path / "out", "--memory", (needed + 1) / 1000)
    assert again.code == 0, again.err
