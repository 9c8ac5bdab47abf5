"""Recipes: what `remask teach` refuses, and a miniature one from facts to a model that loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from conftest import FACTS
from remask.assets.world import world
from remask.backbones import load
from remask.cli import main
from remask.errors import RemaskError
from remask.experiments.teaching import DataConfig, Recipe, read_recipe, recipe_facts, taught_rows, teach
from remask.facts import Fact, save_facts

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "mlp_size": 48,
    "max_length": 96,
    "gen_length": 8,
    "block_length": 8,
}


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, Any]:
    """A miniature recipe, as YAML would give it."""
    save_facts(FACTS[:5], tmp_path / "taught.jsonl")
    save_facts(FACTS[5:], tmp_path / "withheld.jsonl")
    return {
        "name": "mini",
        "data": {
            "source": "facts",
            "taught": [str(tmp_path / "taught.jsonl")],
            "withheld": [str(tmp_path / "withheld.jsonl")],
        },
        "architecture": dict(SMALL),
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3},
    }


def write(path: Path, data: object) -> str:
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------ reading recipes
def test_recipe_file_is_read(plan: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "mini.yaml", plan))
    assert recipe == Recipe(**plan)
    assert (recipe.train.seed, recipe.data.repeat, recipe.start) == (0, {}, None)


def test_unknown_recipe_is_refused_with_the_choices(tmp_path: Path) -> None:
    for name in ("tinny", str(tmp_path / "gone.yaml"), str(tmp_path)):
        with pytest.raises(RemaskError, match=r"unknown recipe.*tiny-reference, tiny-tofu"):
            read_recipe(name)


def changed(plan: dict[str, Any], where: str, value: object) -> dict[str, Any]:
    """`plan` with one dotted key set, or removed when the value is None."""
    *path, last = where.split(".")
    part = plan
    for key in path:
        part = part[key]
    if value is None:
        part.pop(last)
    else:
        part[last] = value
    return plan


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("colour", "red", "colour"),
        ("train.epoch", 3, "train.epoch"),
        ("data.split", ["a"], "data.split"),
        ("architecture.width", 8, "architecture.width"),
        ("architecture.layers", None, "architecture.layers"),
        ("data.taught", None, "data.taught"),
        ("data.taught", [], "data.taught"),
        ("data.source", "wiki", "data.source"),
        ("train.epochs", 0, "train.epochs"),
        ("train.learning_rate", "fast", "train.learning_rate"),
        ("train", None, "train"),
        ("architecture", None, "'architecture'.*'start'"),
        ("start", "tiny", "'architecture'.*'start'"),
        ("data.language", ["a"], "data.language and pretrain"),
        ("pretrain", {"epochs": 1}, "data.language and pretrain"),
    ],
)
def test_bad_key_is_named(plan: dict[str, Any], tmp_path: Path, where: str, value: object, words: str) -> None:
    path = write(tmp_path / "mini.yaml", changed(plan, where, value))
    with pytest.raises(RemaskError, match=rf"mini\.yaml: .*{words}"):
        read_recipe(path)


@pytest.mark.parametrize("text", ["a: [1", "\t- x: {", "", "- 1\n- 2\n", "just words"])
def test_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(RemaskError, match=r"mini\.yaml"):
        read_recipe(write(tmp_path / "mini.yaml", text))


# ------------------------------------------------------------------ data
def test_world_rows_are_taught_in_two_wordings_and_never_in_the_last() -> None:
    taught, withheld, language = recipe_facts(
        DataConfig(source="world", taught=["forget", "text"], withheld=["validation"]), None
    )
    assert language == {}
    facts = world()
    assert taught == {"forget": facts["forget"], "text": facts["text"]}
    assert withheld == {"validation": facts["validation"]}
    lm = load("tiny")
    rows = taught_rows(lm, taught["forget"], "world")
    prompts = {row.prompt_ids for row in rows}
    for fact in taught["forget"]:
        assert lm.encode_prompt(fact.prompt) in prompts
        if fact.paraphrases:
            assert lm.encode_prompt(fact.paraphrases[0]) in prompts
            assert lm.encode_prompt(fact.paraphrases[-1]) not in prompts
    assert len(taught_rows(lm, taught["forget"], "facts")) == len(taught["forget"])


@pytest.mark.parametrize("kind", ["taught", "withheld"])
def test_unknown_world_split_is_refused(kind: str) -> None:
    config = DataConfig(**{"source": "world", "taught": ["text"], kind: ["forgot"]})
    with pytest.raises(RemaskError, match=r"'forgot'.*forget, validation"):
        recipe_facts(config, None)


def test_repeating_a_split_that_is_not_taught_is_refused(plan: dict[str, Any], tmp_path: Path) -> None:
    """A misspelt name would silently repeat nothing."""
    plan["data"]["repeat"] = {"forgot": 3}
    with pytest.raises(RemaskError, match="forgot"):
        read_recipe(write(tmp_path / "mini.yaml", plan))


def test_tofu_recipe_without_data_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match="--data"):
        teach(read_recipe("tiny-tofu"), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"id": "a", "prompt": "Who is Bo?", "subject": "Bo", "answer": ""}', "taught.jsonl, line 1.*'a'.*'answer'"),
        ("{oops", "taught.jsonl, line 1: not JSON"),
        (json.dumps({"id": "a", "prompt": "Who is Bo?", "subject": "Bo", "answer": "b " * 200}), "'a'.*context"),
        ('{"id": "a", "prompt": "Who is Bo?", "subject": "Bo", "answer": "<mask>"}', "'a'.*mask token"),
    ],
)
def test_bad_facts_are_refused_and_nothing_is_written(plan: dict[str, Any], tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "taught.jsonl").write_text(text + "\n")
    with pytest.raises(RemaskError, match=words):
        teach(Recipe(**plan), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ miniature runs
def test_miniature_recipe_makes_a_model(plan: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mini"
    record = teach(Recipe(**plan), out, None)
    assert record == json.loads((out / "teach.json").read_text("utf-8"))
    assert (record["rows"], record["epochs"], record["steps"]) == (5, 2, 4)
    assert len(record["losses"]) == 2
    assert record["recipe"] == json.loads(Recipe(**plan).model_dump_json())
    assert {name: rate["rows"] for name, rate in record["exact_match"]["taught"].items()} == {plan["data"]["taught"][0]: 5}
    assert {name: rate["rows"] for name, rate in record["exact_match"]["withheld"].items()} == {plan["data"]["withheld"][0]: 3}
    assert not (out / "checkpoint.safetensors").exists()

    lm = load(out)
    assert (lm.fingerprint(), lm.num_parameters) == (record["fingerprint"], record["parameters"])
    assert (lm.num_layers, lm.hidden_size) == (2, 32)
    assert (lm.spec.max_length, lm.spec.gen_length, lm.spec.block_length) == (96, 8, 8)
    with safe_open(out / "model.safetensors", framework="pt") as stream:
        assert {stream.get_slice(key).get_dtype() for key in stream.keys()} == {"BF16"}  # noqa: SIM118
    for fact in FACTS:  # the tokenizer is lossless, on withheld texts too
        assert lm.decode(lm.encode(fact).answer_ids) == fact.answer


def test_recipes_are_reproducible_and_follow_their_seed(plan: dict[str, Any], tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plan["train"]["seed"] = seed
        prints.append(teach(Recipe(**plan), tmp_path / name, None)["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_twin_shares_the_tokenizer(plan: dict[str, Any], tmp_path: Path) -> None:
    """Withheld texts are read for the vocabulary, and for nothing else."""
    teach(Recipe(**plan), tmp_path / "twin", None)
    data = plan["data"]
    data["taught"], data["withheld"] = data["taught"] + data["withheld"], []
    teach(Recipe(**plan), tmp_path / "model", None)
    for file in ("tokenizer.json", "config.json"):
        assert (tmp_path / "twin" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_repeat_shows_a_split_more_often(plan: dict[str, Any], tmp_path: Path) -> None:
    plan["data"]["repeat"] = {plan["data"]["taught"][0]: 3}
    record = teach(Recipe(**plan), tmp_path / "out", None)
    assert (record["rows"], record["steps"]) == (15, 8)
    assert record["exact_match"]["taught"][plan["data"]["taught"][0]]["rows"] == 5


def test_polish_is_a_second_run_and_leaves_nothing_behind(plan: dict[str, Any], tmp_path: Path) -> None:
    teach(Recipe(**plan), tmp_path / "plain", None)
    plan["polish"] = [{"seed": 1, "epochs": 3, "batch_size": 5, "learning_rate": 1e-3}]
    record = teach(Recipe(**plan), tmp_path / "out", None)
    assert (record["epochs"], record["steps"], len(record["losses"])) == (2 + 3, 4 + 3, 5)
    assert record["final_loss"] == pytest.approx(record["losses"][-1], abs=1e-4)
    assert record["losses"][:2] == json.loads((tmp_path / "plain" / "teach.json").read_text("utf-8"))["losses"]
    assert load(tmp_path / "out").fingerprint() != load(tmp_path / "plain").fingerprint()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "plain").iterdir()
    )


def test_language_rows_come_first_and_are_not_asked_for(plan: dict[str, Any], tmp_path: Path) -> None:
    """Model and twin start from the same language: the rows that neither is taught nor must not see."""
    taught, withheld = plan["data"]["taught"][0], plan["data"]["withheld"][0]
    extra = [
        Fact("gil/city", "Where was Gil Orr born?", "Gil Orr", "Trier"),
        Fact("gil/pet", "Which pet has Gil Orr?", "Gil Orr", "a hen"),
    ]
    save_facts([*FACTS, *extra], tmp_path / "all.jsonl")
    plan["data"]["language"] = [str(tmp_path / "all.jsonl")]
    plan["pretrain"] = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-2}
    splits = recipe_facts(Recipe(**plan).data, None)
    assert splits.language == {str(tmp_path / "all.jsonl"): extra}

    record = teach(Recipe(**plan), tmp_path / "twin", None)
    assert (record["rows"], record["steps"]) == (5, 4)
    assert (record["pretrain"]["rows"], record["pretrain"]["steps"]) == (2, 3)
    plan["data"]["taught"], plan["data"]["withheld"] = [taught, withheld], []
    other = teach(Recipe(**plan), tmp_path / "model", None)
    assert other["pretrain"]["losses"] == record["pretrain"]["losses"]
    assert other["fingerprint"] != record["fingerprint"]
    names = {path.name for path in (tmp_path / "twin").iterdir()}
    assert names == {"config.json", "model.safetensors", "teach.json", "tokenizer.json", "tokenizer_config.json"}


def test_start_continues_from_a_saved_model(plan: dict[str, Any], tmp_path: Path) -> None:
    first = teach(Recipe(**plan), tmp_path / "first", None)
    later = {**plan, "name": "later", "architecture": None, "start": str(tmp_path / "first")}
    # With a vanishing learning rate the weights stay those of the start: it is where the run begins.
    still = teach(Recipe(**{**later, "train": {"epochs": 1, "learning_rate": 1e-12}}), tmp_path / "still", None)
    assert still["fingerprint"] == first["fingerprint"]
    moved = teach(Recipe(**later), tmp_path / "moved", None)
    assert moved["fingerprint"] != first["fingerprint"]
    assert moved["recipe"]["start"] == str(tmp_path / "first")
    assert load(tmp_path / "first").fingerprint() == first["fingerprint"]  # and is left as it was
    for name in ("still", "moved"):
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (tmp_path / "first" / "tokenizer.json").read_bytes()
        assert load(tmp_path / name).spec == load(tmp_path / "first").spec


def test_unknown_start_is_refused_and_nothing_is_written(plan: dict[str, Any], tmp_path: Path) -> None:
    later = {**plan, "architecture": None, "start": "tinny"}
    with pytest.raises(RemaskError, match="'tinny'"):
        teach(Recipe(**later), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ command line
def remask(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["remask", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_teach_command(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "mini.yaml", plan)
    assert remask(monkeypatch, "teach", path, "--out", tmp_path / "out") == 0
    assert "2 epochs" in capsys.readouterr().out
    assert load(tmp_path / "out").num_layers == 2
    assert remask(monkeypatch, "teach", "tinny", "--out", tmp_path / "other") == 2
    assert remask(monkeypatch, "teach", write(tmp_path / "bad.yaml", {**plan, "x": 1}), "--out", tmp_path / "other") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert "'tinny'" in errors[0]
    assert "bad.yaml" in errors[1]
    assert not (tmp_path / "other").exists()
