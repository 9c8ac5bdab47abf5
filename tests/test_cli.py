"""The command line, end to end on the bundled model: what it prints and writes, and how it refuses bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import remask.experiments.audits as audits
from conftest import FACTS, GOLDENS, build_toy
from remask.assets.world import world
from remask.backbones import MaskedDiffusionLM, Site, save_pretrained
from remask.cli import main
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.editing import EditMemory, preset
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.evaluation.generation import answers
from remask.evaluation.records import read_records
from remask.facts import load_facts, save_facts
from test_tofu import DATA, real

WORLD = world()
PERSON = WORLD["forget"][0].group
CHOSEN = [fact for fact in WORLD["forget"] if fact.group == PERSON and fact.id.endswith("/short")][:4]
KEPT = WORLD["retain"][:40:2]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Standard output as strict JSON."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON output"))

    @property
    def lines(self) -> list[str]:
        """Lines on standard error, without those that transformers writes while it loads weights."""
        noise = ("[transformers]", "Loading weights")
        return [line for line in self.err.replace("\r", "\n").splitlines() if line.strip() and not line.startswith(noise)]


Remask = Callable[..., Result]


@pytest.fixture
def remask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Remask:
    """Run the command in this process."""

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["remask", *map(str, words)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Result(int(code or 0), captured.out, captured.err)  # type: ignore[call-overload]

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """facts.jsonl, retain.jsonl (read-only)."""
    folder = tmp_path_factory.mktemp("facts")
    save_facts(CHOSEN, folder / "facts.jsonl")
    save_facts(KEPT, folder / "retain.jsonl")
    return folder


@pytest.fixture(scope="module")
def memory(tiny: MaskedDiffusionLM, files: Path) -> Path:
    """A strong memory of CHOSEN, built by the library."""
    built = EditMemory.build(tiny, CHOSEN, Site(2), retain=KEPT, config=preset("ridge", mu=1.0), alpha=6.0)
    built.save(files / "memory.safetensors")
    return files / "memory.safetensors"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# ------------------------------------------------------------------ reading commands
def test_inspect_describes_the_model(remask: Remask, tiny: MaskedDiffusionLM) -> None:
    data = remask("inspect", "tiny", "--json").data
    assert data["name"] == "tiny"
    assert data["fingerprint"] == tiny.fingerprint()
    assert data["parameters"] == sum(p.numel() for p in tiny.model.parameters())
    assert data["layers"] == len(tiny.model.model.layers)
    assert data["sites"] == [f"{module}@{layer}" for layer in range(data["layers"]) for module in ("resid", "attn", "mlp")]
    assert data["vocabulary"] == tiny.model.model.embed_tokens.weight.shape[0] == len(tiny.tokenizer)
    assert (data["mask_id"], data["context"], data["gen_length"]) == (tiny.spec.mask_id, 128, 24)
    assert "{prompt}" in data["template"]
    table = remask("inspect", "tiny")
    assert table.code == 0
    assert data["fingerprint"] in table.out


def test_models_lists_every_family_and_bundled_model(remask: Remask) -> None:
    data = remask("models", "--json").data
    rows = {row["family"]: row for row in data["families"]}
    assert {"llada", "mmada", "dream", "diffullama", "diffugpt", "llada_moe", "llada2", "sdar", "bert", "modernbert"} < set(
        rows
    )
    assert {name for name, row in rows.items() if row["verified"] == "goldens"} == {path.name for path in GOLDENS.iterdir()}
    assert (rows["dream"]["mask_id"], rows["dream"]["logits_shifted"]) == (151666, True)
    assert data["bundled"] == ["tiny", "tiny-reference", "tiny-tofu", "tiny-tofu-reference"]
    table = remask("models")
    assert table.code == 0
    assert all(name in table.out for name in rows)


@pytest.mark.parametrize("name", ["llada", "mmada", "dream"])
def test_inspect_of_a_published_layout(remask: Remask, name: str) -> None:
    data = remask("inspect", GOLDENS / name, "--json").data
    config = json.loads((GOLDENS / name / "config.json").read_text())
    assert (data["loads"], data["family"], data["mask_id"]) == (True, name, config["mask_token_id"])
    assert data["parameters"] == sum(t.numel() for t in load_file(GOLDENS / name / "model.safetensors").values())
    assert [job["name"] for job in data["jobs"] if not job["fits"]] == []


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("diffullama", ["family=diffullama", "mask_id=211"], "name its family"),
        ("llada_moe", ["mask_id=300"], "mask_id 156895 is outside the vocabulary of 320"),
        ("llada2", ["mask_id=300", "attention_block=8"], "mask_id 156895 is outside the vocabulary of 320"),
    ],
)
def test_inspect_says_what_a_checkpoint_does_not_tell(remask: Remask, name: str, options: list[str], remedy: str) -> None:
    plain = remask("inspect", GOLDENS / name, "--json").data
    assert plain["loads"] is False
    assert remedy in plain["remedy"]
    refused = remask("generate", GOLDENS / name, "--ids", "5 6")
    assert (refused.code, len(refused.lines)) == (2, 1)
    assert remedy in refused.err
    words = [word for option in options for word in ("-L", option)]
    data = remask("inspect", GOLDENS / name, "--json", *words).data
    assert (data["loads"], data["family"]) == (True, name)
    answer = remask("generate", GOLDENS / name, "--ids", "1 6 7", "--length", 8, "--json", *words).data["rows"][0]["answer"]
    assert len(answer.split()) == 8


def test_generate_from_token_ids_is_the_golden_run(remask: Remask) -> None:
    case = json.loads((GOLDENS / "llada" / "sampler.json").read_text())["cases"][2]
    args = case["args"]
    assert args["block_length"] < args["gen_length"]
    prompt = " ".join(map(str, case["prompt_ids"][0]))
    words = [
        "--sampler",
        "llada",
        "--steps",
        args["steps"],
        "--length",
        args["gen_length"],
        "--block-length",
        args["block_length"],
    ]
    data = remask("generate", GOLDENS / "llada", "--ids", prompt, "--json", *words).data
    assert data["sampler"]["steps"] == args["steps"]
    assert data["rows"][0]["answer"] == " ".join(map(str, case["output_ids"][0][-args["gen_length"] :]))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-L", "family"], "KEY=VALUE"),
        (["-L", "dtype=float33"], "float33"),
        (["-L", "colour=red"], "'colour'"),
        (["-L", "family=llama"], "unknown family 'llama'"),
        (["--sampler", "lada"], "'lada'"),
        (["--ids", "five"], "'five'"),
    ],
)
def test_bad_loading_and_sampling_options_are_refused(remask: Remask, words: list[str], named: str) -> None:
    result = remask("generate", "tiny", *(words if "--ids" in words else ["--prompt", "Who?", *words]))
    assert (result.code, len(result.lines)) == (2, 1)
    assert named in result.err
    assert remask("generate", "tiny").code == 2


def test_score_is_the_library_call(remask: Remask, tiny: MaskedDiffusionLM, files: Path) -> None:
    result = remask("score", "tiny", "--facts", files / "facts.jsonl", "--draws", 2, "--seed", 5, "--json")
    assert result.code == 0
    bank, rows = MaskBank(draws=2, seed=5), [tiny.encode(fact) for fact in CHOSEN]
    data = result.data
    assert [row["id"] for row in data["rows"]] == [fact.id for fact in CHOSEN]
    assert [row["logprob"] for row in data["rows"]] == pytest.approx([s.logprob for s in elbo(tiny, rows, bank)])
    assert [row["stderr"] for row in data["rows"]] == pytest.approx([s.stderr for s in elbo(tiny, rows, bank)])
    blind = elbo(tiny, rows, bank, hide_prompt=True)
    assert [row["prompt_masked"] for row in data["rows"]] == pytest.approx([s.logprob for s in blind])
    assert [row["output"] for row in data["rows"]] == answers(tiny, rows)
    assert data["mean"]["mean"] == pytest.approx(sum(row["logprob"] for row in data["rows"]) / len(CHOSEN))
    assert data["estimator"]["draws"] == 8
    assert data["estimator"]["bank"] == bank.fingerprint([(row.id, len(row.answer_ids)) for row in rows])
    assert (data["model"], data["fingerprint"], data["edit"]) == ("tiny", tiny.fingerprint(), None)


def test_score_with_an_edit_is_lower_but_blind_scores_stay(remask: Remask, files: Path, memory: Path) -> None:
    plain = remask("score", "tiny", "--facts", files / "facts.jsonl", "--json").data
    edited = remask("score", "tiny", "--facts", files / "facts.jsonl", "--edit", memory, "--json").data
    assert edited["edit"] == str(memory)
    assert edited["estimator"] == plain["estimator"]
    assert edited["mean"]["mean"] < plain["mean"]["mean"] - 1.0
    # The prompt-masked level belongs to the unedited model: it is where the edit should lead.
    assert [row["prompt_masked"] for row in edited["rows"]] == [row["prompt_masked"] for row in plain["rows"]]
    table = remask("score", "tiny", "--facts", files / "facts.jsonl")
    assert (table.code, table.out.count("yes") + table.out.count("no ")) >= (0, len(CHOSEN))


def test_generate_answers_and_shows_the_canvas(remask: Remask, tiny: MaskedDiffusionLM) -> None:
    prompts = [CHOSEN[0].prompt, KEPT[0].prompt]
    result = remask("generate", "tiny", "--prompt", prompts[0], "--prompt", prompts[1], "--json")
    assert result.code == 0
    data = result.data
    assert [row["prompt"] for row in data["rows"]] == prompts
    assert [row["answer"] for row in data["rows"]] == answers(tiny, [tiny.encode(CHOSEN[0]), tiny.encode(KEPT[0])])
    assert (data["edit"], data["sampler"]["temperature"], data["sampler"]["gen_length"]) == (None, 0.0, 24)
    for row in data["rows"]:
        assert row["canvas"][0].count("<mask>") == 24
        assert "<mask>" not in row["canvas"][-1]
        assert row["canvas"][-1] == row["answer"]
    strip = remask("generate", "tiny", "--prompt", prompts[0], "--strip")
    assert prompts[0] in strip.out
    assert data["rows"][0]["answer"] in strip.out
    assert "<mask>" in strip.out


def test_generate_with_an_edit_forgets_and_the_next_call_does_not(remask: Remask, memory: Path) -> None:
    words = ["generate", "tiny", "--prompt", CHOSEN[0].prompt, "--json"]
    before = remask(*words).data["rows"][0]["answer"]
    result = remask(*words, "--edit", memory)
    assert before == CHOSEN[0].answer
    assert result.data["rows"][0]["answer"] != before
    assert result.data["edit"] == str(memory)
    assert remask(*words).data["rows"][0]["answer"] == before


def test_generate_noise_follows_the_seed(remask: Remask) -> None:
    words = ["generate", "tiny", "--prompt", "Write a sentence about the moon.", "--temperature", "1.5", "--json"]
    first, again, other = (remask(*words, "--seed", seed).data["rows"] for seed in (1, 1, 2))
    assert first == again != other


# ------------------------------------------------------------------ writing commands
def test_trace_finds_the_site_that_an_edit_uses(remask: Remask, tiny: MaskedDiffusionLM, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "trace"
    words = ["trace", "tiny", "--facts", files / "facts.jsonl", "--out", out, "--steps", 2, "--draws", 1, "--limit", 2]
    result = remask(*words)
    assert result.code == 0, result.err
    assert {"heatmap.png", "index.html", "site.json", "trace.safetensors"} < {path.name for path in out.iterdir()}
    with safe_open(out / "trace.safetensors", framework="pt") as stream:
        header = json.loads(stream.metadata()["remask"])
    assert header["ids"] == [fact.id for fact in CHOSEN[:2]]
    assert (header["model"], header["config"]["steps"]) == (tiny.fingerprint(), 2)
    tensors = load_file(out / "trace.safetensors")
    steps = tensors["clean"].shape[1]
    assert tensors["effects"].shape == (2, 6, 3, steps, steps)
    # Restoring the last block's output at the subject changes nothing that is read at the answer.
    assert torch.nan_to_num(tensors["effects"][:, 5, 0]).abs().max() < 1e-4
    site = json.loads((out / "site.json").read_text("utf-8"))
    assert site["module"] == "resid"
    assert 0 <= Site.from_dict(site).layer < 6
    assert "--limit" in result.out  # two of four facts were traced: said so

    build = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "m.safetensors", "--alpha", 1]
    assert remask(*build, "--preset", "paper", "--site", out / "site.json").code == 0
    assert EditMemory.load(tmp_path / "m.safetensors").site == Site.from_dict(site)


def test_edit_build_and_list_round_trip(remask: Remask, tiny: MaskedDiffusionLM, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "memory.safetensors"
    words = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "--retain", files / "retain.jsonl", "-o", out]
    result = remask(*words, "--alpha", "2.5", "--layer", 3)
    assert result.code == 0, result.err
    listed = remask("edit", "show", out, "--json").data
    assert listed["fact_ids"] == sorted(fact.id for fact in CHOSEN)
    assert (listed["facts"], listed["alpha"], listed["preset"]) == (len(CHOSEN), 2.5, "default")
    assert (listed["site"]["layer"], listed["model"]) == (3, tiny.fingerprint())
    assert listed["keys"] == len(EditMemory.load(out).keys)
    table = remask("edit", "show", out).out
    assert all(fact.id in table for fact in CHOSEN)


def test_edit_build_calibrates_by_default(remask: Remask, tiny: MaskedDiffusionLM, files: Path, tmp_path: Path) -> None:
    """Without --alpha the facts end at the level that the model has with the prompt masked, and not far below it."""
    out = tmp_path / "m.safetensors"
    words = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "--retain", files / "retain.jsonl", "-o", out]
    assert remask(*words).code == 0
    rows, bank = [tiny.encode(fact) for fact in CHOSEN], MaskBank(draws=4, replicates=8, seed=11)
    before, level = (sum(s.logprob for s in elbo(tiny, rows, bank, hide_prompt=hide)) / len(rows) for hide in (False, True))
    with EditMemory.load(out).attached(tiny):
        after = sum(s.logprob for s in elbo(tiny, rows, bank)) / len(rows)
    assert after == pytest.approx(level, abs=0.2 * (before - level))


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world benchmark with a few rows of each group."""
    full = load_benchmark("closed-world", None)
    small = replace(
        full,
        forget=full.forget[:8:2],  # short answers: one canvas length saves time
        fit=full.fit[:24],
        scored={"paraphrase": full.scored["paraphrase"][:2], "retain": full.scored["retain"][:12:2]},
    )
    genuine = audits.load_benchmark
    monkeypatch.setattr(audits, "load_benchmark", lambda name, data: small if name == "closed-world" else genuine(name, data))


@pytest.mark.usefixtures("small_world")
def test_audit_writes_every_row(remask: Remask, tiny: MaskedDiffusionLM, tmp_path: Path) -> None:
    """Also against the bundled twin, and compared with itself."""
    out = tmp_path / "deep" / "audit"
    words = ["audit", "tiny", "--benchmark", "closed-world", "--seeds", 2, "--precision", "fp32", "-o", out]
    result = remask(*words, "--json")
    assert result.code == 0, result.err
    data = json.loads((out / "results.json").read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in results"))
    assert data == result.data
    assert data["benchmark"]["rows"] == {"forget": 4, "paraphrase": 2, "retain": 6}
    assert data["command"].startswith("remask audit tiny --benchmark closed-world")
    assert data["reference"]["name"] == "tiny-reference"
    records = read_records(out / "records.jsonl")
    states = ["before", "after", "never trained", "prompt masked", "mean-delta"]
    scored = [r for r in records if r.metric == "answer log-probability" and not r.attack]
    assert len(scored) == 2 * len(states) * (4 + 2 + 6)
    assert {r.source.model for r in scored if r.state == "before"} == {tiny.fingerprint()}
    assert {r.source.seed for r in scored} == {0, 1}
    forget = data["groups"][0]["metrics"]["answer log-probability"]["states"]
    # calibrated to the higher of two levels, on another bank
    level = max(forget[state]["mean"] for state in ("never trained", "prompt masked"))
    start, reached = forget["before"]["mean"], forget["after"]["mean"]
    assert 0.7 <= (start - reached) / (start - level) <= 1.3
    assert data["groups"][2]["metrics"]["exact match"]["states"]["before"]["mean"] > 0.8
    same = remask("audit", "diff", out, out)
    assert same.code == 0, same.err
    assert "+0.000" in same.out


@pytest.mark.usefixtures("small_world")
def test_audit_without_an_edit_changes_nothing(remask: Remask, tmp_path: Path) -> None:
    words = ["audit", "run", "tiny", "--benchmark", "closed-world", "--edit", "none", "--no-attacks", "-o", tmp_path]
    result = remask(*words)
    assert result.code == 0, result.err
    data = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert data["attacks"] == []
    for line in data["groups"]:
        score = line["metrics"]["answer log-probability"]
        assert {score["change"]["after"][key] for key in ("mean", "low", "high")} == {0.0}
        # The table names its groups and shows its numbers in full, in a pipe too.
        assert line["group"] in result.out
        assert f"{score['states']['before']['mean']:.2f}" in result.out


# ------------------------------------------------------------------ bad input
def fact(**changes: object) -> dict[str, Any]:
    return {**CHOSEN[0].to_dict(), "id": "ada/bad", **changes}


LONG = " ".join(["word"] * 200)
BAD_FILES: dict[str, tuple[list[Any], list[str]]] = {
    "subject not in prompt": ([fact(subject="Nobody Known")], ["line 1", "'ada/bad'", "'Nobody Known'"]),
    "empty answer": ([fact(answer="")], ["line 1", "'ada/bad'", "'answer'"]),
    "blank answer": ([fact(answer="  ")], ["line 1", "'ada/bad'", "'answer'"]),
    "empty subject": ([fact(subject="")], ["line 1", "'ada/bad'", "'subject'"]),
    "empty prompt": ([fact(prompt="")], ["line 1", "'ada/bad'", "'prompt'"]),
    "answer longer than the context": ([fact(answer=LONG)], ["'ada/bad'", "128", "shorten"]),
    "prompt longer than the context": ([fact(prompt=f"{LONG} {CHOSEN[0].subject}?")], ["'ada/bad'", "128", "shorten"]),
    "mask token in the answer": ([fact(answer="a <mask> crow")], ["'ada/bad'", "mask token", "remove"]),
    "mask token in the prompt": ([fact(prompt=f"Who <mask> is {CHOSEN[0].subject}?")], ["'ada/bad'", "mask token", "remove"]),
    "duplicate ids": ([fact(), fact(answer="x")], ["duplicate", "'ada/bad'", "unique"]),
    "missing field": ([{"id": "ada/bad", "prompt": "Who?"}], ["line 1", "'answer'"]),
    "unknown field": ([fact(colour="red")], ["line 1", "'colour'"]),
    "not JSON": ([fact(id="fine"), "{oops"], ["line 2", "not JSON"]),
    "not an object": (["[1, 2]"], ["line 1", "JSON object"]),
    "no facts": ([], ["no facts"]),
}


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == 2, (result.out, result.err)
    assert result.out == ""
    assert len(result.lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.lines[0]


@pytest.fixture
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    rows, words = BAD_FILES[request.param]
    path = tmp_path / "people.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    in_model = "context" in request.param or "mask token" in request.param
    return path, words if in_model else [str(path), *words]


@pytest.mark.parametrize("bad", BAD_FILES, indirect=True)
def test_bad_facts_are_refused_by_every_command(
    remask: Remask, bad: tuple[Path, list[str]], files: Path, tmp_path: Path
) -> None:
    path, words = bad
    before = snapshot(tmp_path)
    build = ["edit", "build", "tiny", "-o", tmp_path / "out" / "m.safetensors", "--alpha", 1]
    assert_refused(remask(*build, "--retain", files / "retain.jsonl", "--facts", path), *words)
    assert_refused(remask(*build, "--retain", path, "--facts", files / "facts.jsonl"), *words)
    assert_refused(remask("trace", "tiny", "--facts", path, "--out", tmp_path / "out"), *words)
    assert_refused(remask("score", "tiny", "--facts", path, "--json"), *words)
    assert snapshot(tmp_path) == before


def test_failed_build_keeps_the_file_that_was_there(remask: Remask, files: Path, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"precious")
    words = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "m.safetensors", "--layer", 99]
    assert_refused(remask(*words, "--preset", "paper"), "99", "0..5")
    assert snapshot(tmp_path) == {"m.safetensors": b"precious"}


@pytest.mark.parametrize(
    "words",
    [
        "inspect",
        "generate --prompt x",
        "score --facts {facts}",
        "trace --facts {facts} --out {out}",
        "edit build --facts {facts} -o {out}",
        "audit --benchmark closed-world --out {out}",
    ],
)
@pytest.mark.parametrize("model", ["tinny", "no/such/folder"])
def test_unknown_model_is_refused(remask: Remask, files: Path, tmp_path: Path, words: str, model: str) -> None:
    command = [w.format(facts=files / "facts.jsonl", out=tmp_path / "out") for w in words.split()]
    at = 2 if command[0] == "edit" else 1
    assert_refused(remask(*command[:at], model, *command[at:]), f"'{model}'", "tiny")
    assert snapshot(tmp_path) == {}


def test_missing_files_are_refused(remask: Remask, files: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    out = tmp_path / "out"
    assert_refused(remask("score", "tiny", "--facts", gone), str(gone))
    assert_refused(remask("score", "tiny", "--facts", files), str(files))
    assert_refused(remask("generate", "tiny", "--prompt", "x", "--edit", gone), str(gone))
    assert_refused(remask("edit", "show", gone), str(gone))
    build = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "-o", out]
    assert_refused(remask(*build, "--retain", gone), str(gone))
    assert_refused(remask(*build, "--site", gone), str(gone))
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    "site", [{"layer": 6, "module": "resid"}, {"layer": -1, "module": "resid"}, {"layer": 2, "module": "head"}]
)
def test_site_outside_the_model_is_refused(
    remask: Remask, tiny: MaskedDiffusionLM, files: Path, tmp_path: Path, site: dict[str, Any]
) -> None:
    (tmp_path / "site.json").write_text(json.dumps(site | {"trace": {"fingerprint": tiny.fingerprint()}}))
    words = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "m.safetensors", "--preset", "paper"]
    named = repr(site["module"]) if site["module"] == "head" else f"layer {site['layer']}"
    assert_refused(remask(*words, "--site", tmp_path / "site.json", "--alpha", 1), named)
    assert [path.name for path in tmp_path.iterdir()] == ["site.json"]


@pytest.mark.parametrize("layer", [6, 99, -1])
def test_layer_outside_the_model_is_refused(remask: Remask, files: Path, tmp_path: Path, layer: int) -> None:
    words = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "m.safetensors", "--preset", "paper"]
    assert_refused(remask(*words, "--layer", layer), f"layer {layer}", "0..5")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    "text",
    [
        "{oops",
        "[]",
        "3",
        "null",
        '{"module": "resid"}',
        '{"layer": 1}',
        '{"layer": null, "module": "resid"}',
        '{"layer": 1, "module": "resid", "steps": 3}',
        '{"layer": 1, "module": "resid"}',
        '{"layer": 1, "module": "resid", "trace": 3}',
        '{"layer": 1, "module": "resid", "trace": {}}',
    ],
)
def test_file_that_is_no_site_is_refused(remask: Remask, files: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "site.json").write_text(text)
    words = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "m.safetensors", "--preset", "paper"]
    assert_refused(remask(*words, "--site", tmp_path / "site.json", "--alpha", 1), str(tmp_path / "site.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["site.json"]


def test_edit_of_another_model_is_refused_with_both_fingerprints(
    remask: Remask, tiny: MaskedDiffusionLM, files: Path, memory: Path, tmp_path: Path
) -> None:
    toy = build_toy()
    EditMemory.build(toy, FACTS[:2], Site(1), config=preset("ridge", mu=0.0)).save(tmp_path / "toy.safetensors")
    replace(EditMemory.load(memory), model="0123456789abcdef").save(tmp_path / "doctored.safetensors")
    for name, other in (("toy", toy.fingerprint()), ("doctored", "0123456789abcdef")):
        edit = tmp_path / f"{name}.safetensors"
        words = [tiny.fingerprint(), other]
        assert_refused(remask("generate", "tiny", "--prompt", "x", "--edit", edit, "--json"), *words)
        assert_refused(remask("score", "tiny", "--facts", files / "facts.jsonl", "--edit", edit), *words)
        assert remask("edit", "show", edit, "--json").data["model"] == other  # looking at it is fine


@pytest.mark.usefixtures("small_world")
def test_audit_of_another_models_memory_is_refused(remask: Remask, tiny: MaskedDiffusionLM, tmp_path: Path) -> None:
    toy = build_toy()
    EditMemory.build(toy, FACTS[:2], Site(1), config=preset("ridge", mu=0.0)).save(tmp_path / "toy.safetensors")
    out = tmp_path / "audit"
    result = remask("audit", "tiny", "--benchmark", "closed-world", "--edit", tmp_path / "toy.safetensors", "--out", out)
    assert (result.code, out.exists()) == (2, False)
    assert tiny.fingerprint() in result.lines[-1]
    assert toy.fingerprint() in result.lines[-1]


@pytest.mark.parametrize("data", [b"", b"not a memory", b"\x80\x04K\x01.", b"\xff" * 64])
def test_file_that_is_no_memory_is_refused(remask: Remask, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    for words in (
        ["edit", "show", tmp_path / "m.safetensors"],
        ["generate", "tiny", "--prompt", "x", "--edit", tmp_path / "m.safetensors"],
    ):
        assert_refused(remask(*words), str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("benchmark", ["rwku", "tofu", "tofu:forget02"])
def test_unknown_benchmark_is_refused(remask: Remask, tmp_path: Path, benchmark: str) -> None:
    result = remask("audit", "tiny", "--benchmark", benchmark, "--data", tmp_path, "--out", tmp_path / "audit")
    assert_refused(result, f"'{benchmark}'", "tofu:forget01")
    assert snapshot(tmp_path) == {}


def test_tofu_without_data_is_refused(remask: Remask, tmp_path: Path) -> None:
    out = tmp_path / "out" / "audit"
    assert_refused(remask("audit", "tiny", "--benchmark", "tofu:forget01", "--out", out), "tofu:forget01", "--data")
    assert_refused(
        remask("audit", "tiny", "--benchmark", "tofu:forget01", "--data", tmp_path, "--out", out),
        str(tmp_path / "forget01.json"),
    )
    assert snapshot(tmp_path) == {}


@real
def test_tofu_rows_longer_than_the_model_are_named_and_left_out(remask: Remask, tmp_path: Path) -> None:
    """`tiny` has a context of 128 tokens; some TOFU answers need more in its tokenizer."""
    words = ["audit", "tiny", "--benchmark", "tofu:forget01", "--data", DATA, "--no-attacks", "-o", tmp_path, "--json"]
    result = remask(*words)
    assert result.code == 0, result.err
    benchmark = result.data["benchmark"]
    for group, total in (("forget", 40), ("retain", 100), ("real_authors", 100), ("world_facts", 117)):
        assert benchmark["rows"][group] + len(benchmark["too_long"].get(group, [])) == total
    assert benchmark["too_long"]["forget"][0].startswith("tofu/forget01/")
    assert "nothing to forget" in result.data["edit"]["note"]  # `tiny` was never taught TOFU


@pytest.mark.parametrize("alpha", ["strong", "", "1,5", "nan", "inf", "-inf"])
def test_junk_alpha_is_refused(remask: Remask, files: Path, tmp_path: Path, alpha: str) -> None:
    words = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "-o", tmp_path / "m.safetensors", "--preset", "paper"]
    assert_refused(remask(*words, f"--alpha={alpha}"), "--alpha", repr(alpha))
    words = ["audit", "tiny", "--benchmark", "closed-world", "--out", tmp_path / "audit"]
    assert_refused(remask(*words, f"--alpha={alpha}"), "--alpha", repr(alpha))
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--edit", "defualt"], "'defualt'"),
        (["--reference", "tinny"], "'tinny'"),
        (["--layer", "17"], "layer 17"),
        (["--seeds", "0"], "seeds"),
        (["--precision", "fp8"], "--precision 'fp8'"),
        (["--steps", "0"], "steps 0"),
    ],
)
@pytest.mark.usefixtures("small_world")
def test_bad_audit_options_are_refused(remask: Remask, tmp_path: Path, words: list[str], named: str) -> None:
    result = remask("audit", "tiny", "--benchmark", "closed-world", "--out", tmp_path / "audit", *words)
    assert result.code == 2
    assert named in " ".join(result.lines)
    assert "Traceback" not in result.err
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["generate", "--prompt", "Who <mask> is that?"], "mask token"),
        (["generate", "--prompt", "x", "--length", "0"], "gen_length 0"),
        (["generate", "--prompt", "x", "--length", "500"], "128"),
        (["generate", "--prompt", LONG], "128"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["score", "--facts", "{facts}", "--draws", "0"], "draws"),
        (["trace", "--facts", "{facts}", "--out", "{out}", "--steps", "0"], "steps"),
        (["edit", "build", "--facts", "{facts}", "-o", "{out}", "--preset", "papre"], "'papre'"),
        (["edit", "build", "--facts", "{facts}", "-o", "{out}"], "--retain"),  # the default memory is retain-aware
    ],
)
def test_bad_options_are_refused(remask: Remask, files: Path, tmp_path: Path, words: list[str], named: str) -> None:
    words = [word.format(facts=files / "facts.jsonl", out=tmp_path / "out") for word in words]
    at = 2 if words[0] == "edit" else 1
    assert_refused(remask(*words[:at], "tiny", *words[at:]), named)
    assert snapshot(tmp_path) == {}


def test_model_without_a_tuned_layer_asks_for_one(remask: Remask, files: Path, tmp_path: Path) -> None:
    save_pretrained(build_toy(), tmp_path / "toy")
    words = ["edit", "build", tmp_path / "toy", "--facts", files / "facts.jsonl", "--preset", "paper", "-o", tmp_path / "m"]
    assert_refused(remask(*words), "--layer")
    assert not (tmp_path / "m").exists()
    assert remask(*words, "--layer", 1, "--alpha", 1).code == 0
    assert remask("edit", "show", tmp_path / "m", "--json").data["site"]["layer"] == 1


def test_output_that_cannot_be_written_is_one_sentence(remask: Remask, files: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    words = ["edit", "build", "tiny", "--facts", files / "facts.jsonl", "--preset", "paper", "--alpha", 1]
    assert_refused(remask(*words, "-o", tmp_path / "file" / "m.safetensors"), str(tmp_path / "file"))
    assert snapshot(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["frobnicate"],
        ["score", "tiny"],
        ["edit", "build", "tiny"],
        ["inspect", "tiny", "--jsn"],
        ["trace", "tiny"],
        ["trace", "tiny", "--facts", "facts.jsonl", "-o", "out", "--limit", "0"],
    ],
)
def test_wrong_usage_has_exit_code_2(remask: Remask, words: list[str]) -> None:
    result = remask(*words)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_a_real_process_prints_json_and_nothing_else() -> None:
    """What a shell pipeline sees: JSON on standard output, silence on standard error."""
    command = [sys.executable, "-c", "from remask.cli import main; main()", "inspect", "tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["name"] == "tiny"
    assert done.stderr == ""


def test_example_files_belong_to_the_world() -> None:
    """The README's commands read them."""
    folder = Path(__file__).parents[1] / "examples"
    known = {f.id: f for split in WORLD.values() for f in split}
    facts, retain = load_facts(folder / "facts.jsonl"), load_facts(folder / "retain.jsonl")
    assert all(known[f.id] == f for f in [*facts, *retain])
    assert not {f.group for f in facts} & {f.group for f in retain}
    near: set[str] = {other for f in facts for other in f.neighbours}
    assert not near & {f.id for f in retain}
    rows = [json.loads(line) for line in (folder / "harness" / "questions.jsonl").read_text().splitlines()]
    asked = {fact.prompt: fact for fact in load_benchmark("closed-world", None).scored["retain"]}
    assert len(rows) == 40
    for row in rows:
        fact = asked[row["question"]]
        assert (row["answer"], set(row["choices"])) == (fact.answer, {fact.answer, *fact.perturbed})
