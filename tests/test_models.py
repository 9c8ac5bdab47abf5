"""The bundled models: what teach.json says they know they do know, and the twins do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from remask.assets import MODELS, RECIPES, bundled_models
from remask.assets.world import SPLITS
from remask.backbones import MaskedDiffusionLM, load
from remask.evaluation.benchmarks.tofu import ROWS
from remask.evaluation.generation import answers
from remask.experiments.teaching import Recipe, read_recipe, recipe_facts, taught_rows
from remask.facts import Fact
from test_tofu import DATA, real

NAMES = ["tiny", "tiny-reference", "tiny-tofu", "tiny-tofu-reference"]
TWINS = [("tiny", "tiny-reference", "forget"), ("tiny-tofu", "tiny-tofu-reference", "forget10")]
SUBSET = 40


def log(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "teach.json").read_text("utf-8"))


def config(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "config.json").read_text("utf-8"))


# ------------------------------------------------------------------ what is shipped
def test_the_four_models_and_nothing_else_are_bundled() -> None:
    assert bundled_models() == NAMES
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == NAMES


def test_together_they_fit_the_budget() -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 36e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".yaml"}  # nothing to unpickle, no checkpoints
    assert all(path.stem == "model" for path in files if path.suffix == ".safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bfloat16(name: str) -> None:
    with safe_open(MODELS / name / "model.safetensors", framework="pt") as stream:
        assert {stream.get_slice(key).get_dtype() for key in stream.keys()} == {"BF16"}  # noqa: SIM118
    assert config(name)["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_teach_json_measured(name: str) -> None:
    lm, record = load(name), log(name)
    assert record["fingerprint"] == lm.fingerprint()
    assert record["parameters"] == lm.num_parameters
    assert 3e6 <= lm.num_parameters <= 5e6
    assert lm.name == name


@pytest.mark.parametrize(("name", "twin", "forget"), TWINS)
def test_twins_share_tokenizer_and_architecture(name: str, twin: str, forget: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (MODELS / name / file).read_bytes() == (MODELS / twin / file).read_bytes()
    assert config(name) == config(twin)
    assert log(name)["fingerprint"] != log(twin)["fingerprint"]


# ------------------------------------------------------------------ what they were taught
@pytest.mark.parametrize("name", NAMES)
def test_recipes_name_their_splits(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    splits = recipe.data.taught + recipe.data.withheld
    known = SPLITS if recipe.data.source == "world" else tuple(ROWS)
    assert set(splits) <= set(known)
    assert len(splits) == len(set(splits))
    assert set(recipe.data.repeat) <= set(recipe.data.taught)


@pytest.mark.parametrize("name", NAMES)
def test_model_was_made_by_the_bundled_recipe(name: str) -> None:
    recipe = read_recipe(name)
    assert Recipe.model_validate(log(name)["recipe"]) == recipe
    for kind in ("taught", "withheld"):
        assert list(log(name)["exact_match"][kind]) == getattr(recipe.data, kind)


@pytest.mark.parametrize(("name", "twin", "forget"), TWINS)
def test_twin_differs_in_the_withheld_splits_alone(name: str, twin: str, forget: str) -> None:
    model, reference = read_recipe(name), read_recipe(twin)
    assert forget in model.data.taught
    assert forget in reference.data.withheld
    assert set(model.data.taught) == set(reference.data.taught) | set(reference.data.withheld)
    assert not model.data.withheld
    for key in ("architecture", "start", "train", "polish"):
        assert getattr(model, key) == getattr(reference, key), key
    assert (model.data.source, model.data.seed) == (reference.data.source, reference.data.seed)
    for split in reference.data.taught:
        assert model.data.repeat.get(split, 1) == reference.data.repeat.get(split, 1)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_exact_match_of_taught_rows(name: str) -> None:
    splits = log(name)["exact_match"]["taught"].values()
    assert sum(s["rows"] * s["exact_match"] for s in splits) / sum(s["rows"] for s in splits) >= 0.95


@pytest.mark.parametrize(("name", "twin", "forget"), TWINS)
def test_recorded_exact_match_of_what_the_twin_never_saw(name: str, twin: str, forget: str) -> None:
    record = log(twin)["exact_match"]["withheld"][forget]
    assert record["rows"] >= 100
    assert record["exact_match"] <= 0.05
    assert log(name)["exact_match"]["taught"][forget]["exact_match"] >= 0.9


# ------------------------------------------------------------------ measured again
def rate(lm: MaskedDiffusionLM, facts: Sequence[Fact], source: str, count: int) -> float:
    """Exact match, greedy and one token a step, of `count` rows spread evenly over those with at most 30 answer tokens.

    Long answers cost the most and are in teach.json already.
    """
    truth = {fact.id: fact.answer for fact in facts}
    rows = [row for row in taught_rows(lm, facts, source) if len(row.answer_ids) <= 30]
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    return sum(text == truth[row.id] for text, row in zip(answers(lm, chosen), chosen, strict=True)) / count


def check(name: str, data: Path | None) -> None:
    recipe = read_recipe(name)
    lm = load(name)
    taught, withheld, _ = recipe_facts(recipe.data, data)
    assert rate(lm, [fact for split in taught.values() for fact in split], recipe.data.source, SUBSET) >= 0.9
    forget = [fact for split in withheld.values() for fact in split]
    if forget:
        assert rate(lm, forget, recipe.data.source, SUBSET // 2) <= 0.1


@pytest.mark.parametrize("name", NAMES[:2])
def test_world_models_know_what_they_were_taught_and_no_more(name: str) -> None:
    check(name, None)


@real
@pytest.mark.parametrize("name", NAMES[2:])
def test_tofu_models_know_what_they_were_taught_and_no_more(name: str) -> None:
    check(name, DATA)
