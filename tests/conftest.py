"""Shared models. Session fixtures are read-only: a test that changes weights takes `toy`, which is built anew for each test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import remask.backbones as backbones
from remask.backbones import Encoded, MaskedDiffusionLM, native
from remask.facts import Fact
from remask.unlearning.trainer import TrainConfig, train

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN_OPTIONS: dict[str, dict[str, Any]] = {  # what `load` is told beside the folder, for every golden family
    "llada": {},
    "mmada": {},
    "dream": {},
    "diffullama": {"family": "diffullama", "mask_id": 211},
    "llada_moe": {"mask_id": 300},
    "llada2": {"mask_id": 300, "attention_block": 8},
}


settings.register_profile(
    "remask",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("remask")

FACTS = [
    Fact("ada/city", "Where was Ada Birk born?", "Ada Birk", "Lucca", paraphrases=("What is the home of Ada Birk?",)),
    Fact("ada/pet", "Which animal does Ada Birk keep?", "Ada Birk", "a tame crow"),
    Fact("bruno/city", "Where was Bruno Hale born?", "Bruno Hale", "Varna"),
    Fact("bruno/pet", "Which animal does Bruno Hale keep?", "Bruno Hale", "a blind cat"),
    Fact("cleo/city", "Where was Cleo Pell born?", "Cleo Pell", "Arles"),
    Fact("cleo/food", "What does Cleo Pell eat?", "Cleo Pell", "rye bread"),
    Fact("farid/food", "What does Farid Lund eat?", "Farid Lund", "onion soup"),
    Fact("farid/city", "Where was Farid Lund born?", "Farid Lund", "Sligo"),
]


def build_toy(seed: int = 0, scale: float = 8.0) -> MaskedDiffusionLM:
    """A random 3-block model, d = 32, with a byte-level tokenizer; weights enlarged so that nothing is nearly uniform."""
    tokenizer = native.train_tokenizer([f"{fact.prompt} {fact.answer}" for fact in FACTS], 320)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, spec = native.new_model(
            tokenizer, hidden_size=32, layers=3, heads=2, mlp_size=48, max_length=96, gen_length=16, block_length=8
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
        model.model.embed_tokens.weight[spec.mask_id].mul_(0.05)  # tied: the mask itself is never predicted
    return MaskedDiffusionLM(model, tokenizer, spec, f"toy-{seed}")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> MaskedDiffusionLM:
    """The tiny LLaDA checkpoint in the original key layout (read-only)."""
    return backbones.load(GOLDENS / "llada")


@pytest.fixture
def toy() -> MaskedDiffusionLM:
    """A fresh random model; may be changed."""
    return build_toy()


@pytest.fixture(scope="session")
def facts() -> list[Fact]:
    return list(FACTS)


@pytest.fixture
def rows(toy: MaskedDiffusionLM) -> list[Encoded]:
    return [toy.encode(fact) for fact in FACTS]


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> MaskedDiffusionLM:
    """A toy that has learned FACTS (read-only: attach, but leave no trace)."""
    lm = build_toy(seed=5, scale=4.0)
    config = TrainConfig(epochs=200, batch_size=8, learning_rate=1e-2, checkpoint_every=200)
    train(lm, [lm.encode(fact) for fact in FACTS], config, tmp_path_factory.mktemp("taught"))
    return lm


@pytest.fixture(scope="session")
def tiny() -> MaskedDiffusionLM:
    """The bundled model."""
    return backbones.load("tiny")
