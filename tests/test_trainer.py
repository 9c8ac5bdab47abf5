"""Fine-tuning: it learns, and a run that was killed ends exactly where it would have ended."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest
import torch

import remask.unlearning.trainer as trainer
from conftest import FACTS, build_toy
from remask.backbones import MaskedDiffusionLM
from remask.errors import RemaskError
from remask.evaluation.generation import answers
from remask.facts import Fact
from remask.unlearning.trainer import TrainConfig, train

CONFIG = TrainConfig(epochs=4, batch_size=3, learning_rate=1e-3, checkpoint_every=2)


def weights(lm: MaskedDiffusionLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.model.named_parameters()}


def run(lm: MaskedDiffusionLM, out: Path, config: TrainConfig = CONFIG, **options: bool) -> dict:
    return train(lm, [lm.encode(fact) for fact in FACTS], config, out, **options)


def test_teaching_lowers_the_loss_and_reports_the_work(toy, tmp_path: Path) -> None:
    config = TrainConfig(epochs=15, batch_size=4, learning_rate=3e-3)
    result = run(toy, tmp_path, config)
    assert (result["rows"], result["epochs"], result["steps"]) == (8, 15, 30)
    losses = result["losses"]
    assert sum(losses[-3:]) / 3 < 0.8 * sum(losses[:3]) / 3
    assert not any(parameter.requires_grad for parameter in toy.model.parameters())


def test_taught_model_knows_its_facts(taught) -> None:
    rows = [taught.encode(fact) for fact in FACTS]
    right = sum(text == fact.answer for text, fact in zip(answers(taught, rows), FACTS, strict=True))
    assert right >= 2  # a random model writes none of them


@pytest.mark.parametrize(("tails", "tokens"), [((1.0, 0.0, 0.0), 0), ((0.0, 0.0, 1.0), 16)])
def test_tails_decide_how_many_end_tokens_stand_behind_the_answer(
    toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tails: tuple[float, float, float], tokens: int
) -> None:
    """None at all, or so many that prompt and response fill the model's own gen_length (16)."""
    seen = []
    logits = toy.logits
    monkeypatch.setattr(toy, "logits", lambda ids, **options: seen.append(ids.shape[1]) or logits(ids, **options))
    rows = [toy.encode(fact) for fact in FACTS]
    train(toy, rows, TrainConfig(epochs=1, batch_size=1, tails=tails), tmp_path)
    full = [len(row.prompt_ids) + tokens if tokens else len(row.ids) for row in rows]
    assert sorted(seen) == sorted(max(length, len(row.ids)) for length, row in zip(full, rows, strict=True))


@pytest.mark.parametrize("killed_at", [(2, 0), (3, 1)])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: tuple[int, int]
) -> None:
    whole = build_toy()
    expected = run(whole, tmp_path / "whole")

    genuine = trainer.masked_loss

    def killed(lm, batch, config, key):
        if key == killed_at:
            raise KeyboardInterrupt
        return genuine(lm, batch, config, key)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "masked_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run(build_toy(), tmp_path / "cut")
    resumed = build_toy(seed=9)  # everything must come from the checkpoint
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(trainer, "masked_loss", lambda *args: steps.append(args[3]) or genuine(*args))
    result = run(resumed, tmp_path / "cut", resume=True)
    assert steps == [(epoch, batch) for epoch in (2, 3) for batch in range(3)]
    assert result["losses"] == expected["losses"]
    for (name, value), other in zip(weights(resumed).items(), weights(whole).values(), strict=True):
        assert torch.equal(value, other), name


def test_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first = build_toy()
    expected = run(first, tmp_path)
    again = build_toy(seed=9)
    assert run(again, tmp_path, resume=True)["losses"] == expected["losses"]
    assert again.fingerprint() == first.fingerprint()


def test_runs_are_deterministic_and_follow_the_seed(tmp_path: Path) -> None:
    prints = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        torch.manual_seed(len(prints))
        lm = build_toy()
        run(lm, tmp_path / name, CONFIG.model_copy(update={"seed": seed, "epochs": 1}))
        prints.append(lm.fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_checkpoint_of_other_hyper_parameters_is_refused(toy, tmp_path: Path) -> None:
    run(toy, tmp_path, CONFIG.model_copy(update={"epochs": 2}))
    with pytest.raises(RemaskError, match="other hyper-parameters"):
        run(build_toy(), tmp_path, CONFIG, resume=True)


def test_checkpoint_of_other_data_is_refused(toy, tmp_path: Path) -> None:
    """Resuming on other rows would mix two runs in silence."""
    run(toy, tmp_path)
    lm = build_toy()
    with pytest.raises(RemaskError, match="other data"):
        train(lm, [lm.encode(fact) for fact in FACTS[:5]], CONFIG, tmp_path, resume=True)


def test_damaged_checkpoint_is_refused_by_name(toy, tmp_path: Path) -> None:
    run(toy, tmp_path, CONFIG.model_copy(update={"epochs": 1}))
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RemaskError, match=r"checkpoint\.safetensors"):
        run(build_toy(), tmp_path, CONFIG.model_copy(update={"epochs": 1}), resume=True)


def test_empty_data_is_refused(toy, tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match="no rows"):
        train(toy, [], CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loss_that_is_not_finite_is_reported_with_the_remedy(toy, tmp_path: Path) -> None:
    with torch.no_grad():
        toy.model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(RemaskError, match=r"epoch 1.*not finite.*learning_rate"):
        run(toy, tmp_path)


def test_failed_run_leaves_the_model_frozen(toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "masked_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path)
    assert not any(parameter.requires_grad for parameter in toy.model.parameters())


def test_rows_near_the_context_limit_can_be_taught(toy, tmp_path: Path) -> None:
    """The tail of end tokens is cut at the context instead of failing in the middle of a run."""
    fact = Fact("long", "Who is Ada?", "Ada", "q z " * 20)
    row = toy.encode(fact)
    room = toy.spec.max_length - len(row.ids)
    assert 0 <= room < 16
    train(toy, [row], TrainConfig(epochs=12, batch_size=1, checkpoint_every=100), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"prompt_dropout": 1.5},
        {"epoch": 3},
        {"tails": (0.5, 0.2, 0.1)},
    ],
)
def test_impossible_hyper_parameters_are_refused(changes: dict) -> None:
    with pytest.raises(pydantic.ValidationError):
        TrainConfig(**{"epochs": 1, **changes})
