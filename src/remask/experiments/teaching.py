"""Recipes: what a model is taught, from which data, with which architecture; `remask teach` runs one.

The bundled recipes under `assets/recipes` rebuild the bundled models. A reference twin is the same recipe with the splits to
be forgotten left out; both share the tokenizer, the seed and every hyper-parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from ..assets import RECIPES
from ..assets.world import world
from ..backbones import load, save_pretrained
from ..backbones.model import Encoded, MaskedDiffusionLM
from ..backbones.native import new_model, train_tokenizer
from ..errors import RemaskError
from ..evaluation.benchmarks.tofu import load_tofu
from ..evaluation.generation import exact_match_rows
from ..facts import Fact, load_facts, write_json
from ..unlearning.trainer import TrainConfig, train


class DataConfig(BaseModel):
    """Where rows come from: the built-in world, a TOFU folder, or a facts file (JSON Lines)."""

    model_config = ConfigDict(extra="forbid")

    source: Literal["world", "tofu", "facts"]
    taught: list[str] = Field(min_length=1, description="splits (world, tofu) or paths (facts) that are taught")
    repeat: dict[str, int] = Field(default={}, description="times a taught split is shown in each epoch; 1 by default")
    withheld: list[str] = Field(default=[], description="splits never taught, only probed for exact match")
    language: list[str] = Field(default=[], description="splits for `pretrain`, less the rows that are taught or withheld")
    seed: int = 0


class ArchitectureConfig(BaseModel):
    """Size of a new model in the library's own layout."""

    model_config = ConfigDict(extra="forbid")

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    mlp_size: int
    max_length: int
    gen_length: int
    block_length: int


class Recipe(BaseModel):
    """One `remask teach` run; either `architecture` (from scratch) or `start` (a model to continue from)."""

    model_config = ConfigDict(extra="forbid")

    name: str
    data: DataConfig
    architecture: ArchitectureConfig | None = None
    start: str | None = None
    pretrain: TrainConfig | None = Field(default=None, description="a first run, on the language rows alone")
    train: TrainConfig
    polish: list[TrainConfig] = Field(default=[], description="further, shorter runs, each from the weights before it")


def read_recipe(name: str) -> Recipe:
    """A bundled recipe by name, or a YAML file by path.

    Raises:
        RemaskError: unknown name, malformed YAML, unknown or missing key (named).
    """
    path = RECIPES / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise RemaskError(f"unknown recipe {name!r}: not a bundled one ({names}) and no YAML file")
    try:
        recipe = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise RemaskError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise RemaskError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if (recipe.architecture is None) == (recipe.start is None):
        raise RemaskError(f"{path}: give either 'architecture' (a new model) or 'start' (a model to continue from)")
    if bool(recipe.data.language) != (recipe.pretrain is not None):
        raise RemaskError(f"{path}: data.language and pretrain belong together; give both or neither")
    strange = sorted(set(recipe.data.repeat) - set(recipe.data.taught))
    if strange:
        raise RemaskError(f"{path}: data.repeat: {strange[0]!r} is not among the taught splits")
    return recipe


class Splits(NamedTuple):
    """Facts of a recipe, by split."""

    taught: dict[str, list[Fact]]
    withheld: dict[str, list[Fact]]
    language: dict[str, list[Fact]]


def recipe_facts(data: DataConfig, folder: Path | None) -> Splits:
    """Taught, withheld and language facts by split; a language fact is one that no other split asks for."""
    if data.source == "world":
        splits = world(data.seed)
        unknown = sorted({*data.taught, *data.withheld, *data.language} - set(splits))
        if unknown:
            raise RemaskError(f"the world has no split {unknown[0]!r}; choose from {', '.join(splits)}")
        source = lambda split: splits[split]  # noqa: E731
    elif data.source == "tofu":
        if folder is None:
            raise RemaskError("this recipe reads TOFU; point --data at a folder with its files")
        source = lambda split: load_tofu(folder, split)  # noqa: E731
    else:
        source = load_facts
    taught, withheld = {s: source(s) for s in data.taught}, {s: source(s) for s in data.withheld}
    asked = {fact.prompt for split in (*taught.values(), *withheld.values()) for fact in split}
    return Splits(taught, withheld, {s: [fact for fact in source(s) if fact.prompt not in asked] for s in data.language})


def taught_rows(lm: MaskedDiffusionLM, facts: Sequence[Fact], source: str) -> list[Encoded]:
    """Every fact under its prompt; world facts also under their first paraphrase (the last one is never taught)."""
    rows = [lm.encode(fact) for fact in facts]
    if source == "world":
        rows += [lm.encode(fact, prompt=fact.paraphrases[0]) for fact in facts if fact.paraphrases]
    return rows


def teach(recipe: Recipe, out: Path, data: Path | None, *, resume: bool = False) -> dict[str, Any]:
    """Run a recipe; the model lands in `out` with `teach.json` (what was done, exact match per split)."""
    console = Console(stderr=True)
    splits = recipe_facts(recipe.data, data)
    if recipe.architecture is None:
        lm = load(str(recipe.start))
    else:
        # The twin's tokenizer sees the withheld texts too, so that model and twin share one vocabulary.
        facts = [fact for group in splits for split in group.values() for fact in split]
        texts = sorted(text for fact in facts for text in (fact.prompt, *fact.paraphrases[:1], fact.answer))
        size = recipe.architecture.model_dump()
        tokenizer = train_tokenizer(texts, size.pop("vocab_size"))
        with torch.random.fork_rng():
            torch.manual_seed(recipe.train.seed)
            model, spec = new_model(tokenizer, **size)
        lm = MaskedDiffusionLM(model=model, tokenizer=tokenizer, spec=spec, name=recipe.name)
    repeat = recipe.data.repeat
    rows = [
        row for name, split in splits.taught.items() for row in taught_rows(lm, split, recipe.data.source) * repeat.get(name, 1)
    ]
    language = [row for split in splits.language.values() for row in taught_rows(lm, split, recipe.data.source)]
    console.print(
        f"[bold]{recipe.name}[/]: {lm.num_parameters / 1e6:.1f}M parameters, {len(rows)} rows, "
        f"{sum(len(row.ids) for row in rows)} tokens, {len(language)} language rows"
    )
    stages = [("pretrain", language, recipe.pretrain)] if recipe.pretrain else []
    stages += [("train", rows, recipe.train), *((f"polish-{i}", rows, config) for i, config in enumerate(recipe.polish))]
    out.mkdir(parents=True, exist_ok=True)  # only now: what is wrong with the data leaves no folder behind
    logs = {name: train(lm, stage_rows, config, out / name, resume=resume) for name, stage_rows, config in stages}
    save_pretrained(lm, out)
    lm = load(out)  # what was written is what is measured: bf16 weights
    taught = [logs[name] for name, _, _ in stages if name != "pretrain"]
    log: dict[str, Any] = taught[-1] | {key: sum(part[key] for part in taught) for key in ("epochs", "steps", "seconds")}
    log["losses"] = [loss for part in taught for loss in part["losses"]]
    log |= {"pretrain": logs["pretrain"]} if recipe.pretrain else {}
    log |= {"recipe": recipe.model_dump(mode="json"), "parameters": lm.num_parameters, "fingerprint": lm.fingerprint()}
    log["exact_match"] = {
        "taught": {name: _rate(lm, taught_rows(lm, split, recipe.data.source)) for name, split in splits.taught.items()},
        "withheld": {name: _rate(lm, [lm.encode(fact) for fact in split]) for name, split in splits.withheld.items()},
    }
    write_json(out / "teach.json", log)
    for name in logs:
        (out / name / "checkpoint.safetensors").unlink()
        (out / name).rmdir()
    return log


def _rate(lm: MaskedDiffusionLM, rows: list[Encoded]) -> dict[str, float]:
    hits = exact_match_rows(lm, rows)
    return {"rows": len(hits), "exact_match": round(sum(hits) / len(hits), 4)}
