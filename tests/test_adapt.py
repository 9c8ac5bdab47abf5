"""A causal model becomes a masked diffusion model: the same numbers under the causal mask, full attention after; it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

import remask.unlearning.adapting as adapting
from conftest import FACTS
from remask.backbones import MaskedDiffusionLM, load, native, save_pretrained
from remask.backbones.adapt import adapt_model, opened_mask
from remask.errors import RemaskError
from remask.experiments.adapting import adapt, read_groups, sequences, split_groups
from remask.facts import save_facts
from remask.unlearning.adapting import AdaptConfig, add_lora, evaluate, mask_bank, train_adapted

pytest.importorskip("accelerate", reason="adapting needs remask[train]")
pytest.importorskip("peft", reason="LoRA needs remask[train]")

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG = AdaptConfig(steps=6, batch_size=4, length=12, learning_rate=3e-3, anneal=0.5, evaluate_every=3, checkpoint_every=2)
ARCHITECTURES = ("llama", "qwen2", "gpt2")


def causal(kind: str, vocabulary: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            model = LlamaForCausalLM(
                LlamaConfig(**SIZE, vocab_size=vocabulary, max_position_embeddings=64, tie_word_embeddings=True)
            )
        elif kind == "qwen2":
            model = Qwen2(Qwen2Config(**SIZE, vocab_size=vocabulary, max_position_embeddings=64, tie_word_embeddings=False))
        else:
            model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=2))
        for parameter in model.parameters():  # nothing nearly uniform, no bias left at zero
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A causal checkpoint of each architecture, as transformers writes it; its tokenizer has no mask token."""
    folders = {}
    for kind in ARCHITECTURES:
        folders[kind] = tmp_path_factory.mktemp("causal") / kind
        tokenizer = native.train_tokenizer([f"{fact.prompt} {fact.answer}" for fact in FACTS], 300)
        tokenizer.mask_token = None
        tokenizer.save_pretrained(folders[kind])
        causal(kind, len(tokenizer)).save_pretrained(folders[kind])
    return folders


@pytest.fixture
def groups() -> dict[str, list]:
    return {fact.id: [fact] * 4 for fact in FACTS}


def rows_of(lm: MaskedDiffusionLM, groups: dict[str, list]) -> tuple[np.ndarray, np.ndarray]:
    train, held_out = split_groups(groups, seed=0)
    return sequences(lm, train, CONFIG.length), sequences(lm, held_out, CONFIG.length)


def run(folder: Path, groups: dict[str, list], out: Path, config: AdaptConfig = CONFIG, **options) -> tuple:
    lm = adapt_model(folder)
    rows, held_out = rows_of(lm, groups)
    return train_adapted(lm, rows, held_out, config, out / "checkpoint.safetensors", **options), lm


# ------------------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_under_the_causal_mask_it_is_the_causal_model_shifted(checkpoints, kind: str) -> None:
    original = causal(kind, native_size := json.loads((checkpoints[kind] / "config.json").read_text())["vocab_size"])
    ids = torch.randint(5, native_size, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = original(ids).logits
        lm = adapt_model(checkpoints[kind])
        mask = opened_mask(11, 0.0, np.random.default_rng(0), lm.device)
        logits = lm.logits(ids, mask)
    assert logits.shape[-1] == lm.spec.mask_id + 1 == native_size + 1
    torch.testing.assert_close(logits[:, 1:, :-1], expected[:, :-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_full_attention_and_a_mask_that_is_never_predicted(checkpoints, kind: str) -> None:
    lm = adapt_model(checkpoints[kind])
    ids = torch.randint(5, lm.spec.mask_id, (2, 11), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % lm.spec.mask_id
    with torch.inference_mode():
        logits = lm.logits(ids)
        assert not torch.allclose(logits[:, 1], lm.logits(changed)[:, 1])
        assert torch.equal(logits, lm.logits(ids, torch.zeros(1, 1, 11, 11)))
    assert (logits.argmax(-1) != lm.spec.mask_id).all()
    old = logits[..., :-1]
    torch.testing.assert_close(logits[..., -1], old.mean(dim=-1), rtol=0, atol=1e-4)


def test_opened_mask_lies_between_causal_and_full() -> None:
    device = torch.device("cpu")
    shares = []
    for openness in (0.0, 0.25, 0.75):
        mask = opened_mask(64, openness, np.random.default_rng(0), device)
        assert mask is not None
        seen = mask[0, 0] == 0
        assert seen.tril().sum() == 64 * 65 // 2  # the past is never hidden
        shares.append(float(seen.triu(1).sum()) / (64 * 63 / 2))
    assert shares[0] == 0
    assert shares[1:] == pytest.approx([0.25, 0.75], abs=0.03)
    assert opened_mask(64, 1.0, np.random.default_rng(0), device) is None


def test_saved_folder_loads_by_name_and_gives_equal_logits(checkpoints, tmp_path: Path) -> None:
    for kind in ARCHITECTURES:
        lm = adapt_model(checkpoints[kind], gen_length=8)
        save_pretrained(lm, tmp_path / kind, dtype=torch.float32)
        again = load(tmp_path / kind)
        assert again.spec == lm.spec
        assert (again.spec.family, again.spec.shift) == ("remask", True)
        ids = torch.tensor([[*again.encode(FACTS[0]).ids[:5], again.spec.mask_id]])
        with torch.inference_mode():
            assert torch.equal(again.logits(ids), lm.logits(ids))


def test_mask_token_can_be_a_special_token_that_is_there(checkpoints) -> None:
    lm = adapt_model(checkpoints["llama"], "<sep>")
    assert lm.tokenizer is not None
    assert lm.spec.mask_id == lm.tokenizer.convert_tokens_to_ids("<sep>") == lm.tokenizer.mask_token_id
    assert lm.embedding.num_embeddings == len(lm.tokenizer)
    assert adapt_model(checkpoints["llama"], "[blank]").tokenizer.mask_token == "[blank]"


def test_what_cannot_be_adapted_is_refused(checkpoints, tmp_path: Path) -> None:
    for token, sentence in (("e", "ordinary token"), ("<eos>", "starts or ends"), ("<bos>", "starts or ends")):
        with pytest.raises(RemaskError, match=sentence):
            adapt_model(checkpoints["llama"], token)
    with pytest.raises(RemaskError, match="masked diffusion model already"):
        adapt_model("tiny")
    with pytest.raises(RemaskError, match="unknown model"):
        adapt_model(tmp_path / "nowhere")
    for change, sentence in (
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' cannot be adapted"),
        ({"architectures": None}, "cannot be adapted"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"num_hidden_layers": 3}, "missing keys"),
    ):
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for file in checkpoints["llama"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(RemaskError, match=sentence):
            adapt_model(folder)
    (folder / "config.json").write_bytes((checkpoints["llama"] / "config.json").read_bytes())
    (folder / "model.safetensors").unlink()
    with pytest.raises(RemaskError, match="cannot load"):
        adapt_model(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RemaskError, match="no tokenizer"):
        adapt_model(folder)


# ------------------------------------------------------------------------------------------------ the training
@pytest.mark.parametrize(("kind", "lora"), [("llama", 0), ("qwen2", 0), ("gpt2", 0), ("llama", 4)])
def test_it_learns(checkpoints, groups, tmp_path: Path, kind: str, lora: int) -> None:
    config = CONFIG.model_copy(update={"steps": 40, "learning_rate": 1e-2, "lora": lora, "evaluate_every": 20})
    log, lm = run(checkpoints[kind], groups, tmp_path, config)
    curve = log["curve"]
    assert [point["step"] for point in curve] == [0, 20, 40]
    assert curve[-1]["tokens"] == 40 * 4 * 12
    # Adapters around random frozen weights move little.
    assert curve[-1]["train_loss"] < (1.0 if lora else 0.9) * curve[1]["train_loss"]
    assert curve[-1]["held_out"]["0.3"]["nats"] < curve[0]["held_out"]["0.3"]["nats"]
    assert (log["trained_parameters"] < log["parameters"]) == bool(lora)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("killed_at", [2, 5])
def test_killed_and_resumed_equals_uninterrupted(
    checkpoints, groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, lora: int
) -> None:
    config = CONFIG.model_copy(update={"lora": lora})
    whole, lm = run(checkpoints["llama"], groups, tmp_path / "whole", config)
    genuine = adapting._batch

    def killed(rows, config, step):
        if step == killed_at:
            raise KeyboardInterrupt
        return genuine(rows, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(adapting, "_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints["llama"], groups, tmp_path / "cut", config)
    steps: list[int] = []
    monkeypatch.setattr(adapting, "_batch", lambda *args: steps.append(args[2]) or genuine(*args))
    resumed, other = run(checkpoints["llama"], groups, tmp_path / "cut", config, resume=True)
    assert steps == list(range(killed_at - killed_at % 2, config.steps))
    assert other.fingerprint() == lm.fingerprint()
    for log in (whole, resumed):
        for point in log["curve"]:
            point.pop("seconds")
    assert resumed == whole


def test_checkpoint_of_another_run_is_refused(checkpoints, groups, tmp_path: Path) -> None:
    run(checkpoints["llama"], groups, tmp_path)
    with pytest.raises(RemaskError, match="other hyper-parameters"):
        run(checkpoints["llama"], groups, tmp_path, CONFIG.model_copy(update={"seed": 1}), resume=True)
    with pytest.raises(RemaskError, match="other data"):
        run(checkpoints["qwen2"], groups, tmp_path, resume=True)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_merged_adapters_equal_attached_ones(checkpoints, kind: str) -> None:
    lm = adapt_model(checkpoints[kind])
    start = lm.fingerprint()
    ids = torch.tensor([[5, 6, lm.spec.mask_id, 8, lm.spec.mask_id, 9]])
    with torch.inference_mode():
        plain = lm.logits(ids)
    peft = add_lora(lm, rank=2, seed=0)
    trained = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
    assert sum("trainable_tokens" in name for name in trained) == 1
    assert all("lora" in name or "trainable_tokens" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(lm.logits(ids), plain)  # the adapters start at zero
        generator = torch.Generator().manual_seed(0)
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        attached = lm.logits(ids)
        assert peft.merge_and_unload() is lm.model
        merged = lm.logits(ids)
    assert not torch.allclose(merged, plain, atol=1e-2)
    torch.testing.assert_close(merged, attached, rtol=0, atol=1e-4)
    assert not any("lora" in name for name, _ in lm.model.named_parameters())
    if kind != "qwen2":
        assert lm.model.get_output_embeddings().weight is lm.embedding.weight  # still tied
    assert lm.fingerprint() != start


def test_every_process_takes_its_share_of_one_batch(checkpoints, groups) -> None:
    lm = adapt_model(checkpoints["llama"])
    rows, _ = rows_of(lm, groups)
    config = CONFIG.model_copy(update={"batch_size": len(rows) + 3})
    clean, hidden = adapting._batch(rows, config, 5)
    again, same = adapting._batch(rows, config, 5)
    assert np.array_equal(clean, again) and np.array_equal(hidden, same)
    assert not hidden[:, 0].any()
    counts = np.sort(hidden.sum(axis=1))  # spread evenly: one count in each of the batch's strata
    strata = 1 + (np.arange(config.batch_size) / config.batch_size * (config.length - 1)).astype(int)
    assert (np.abs(counts - strata) <= 1).all()
    shown = np.concatenate([adapting._batch(rows, CONFIG, step)[0] for step in range(len(rows))])
    order = {tuple(row): 0 for row in rows}
    for row in shown:
        order[tuple(row)] += 1
    assert min(order.values()) >= 4  # every sequence once an epoch, 4 epochs


def test_loss_is_the_mean_over_sequences(checkpoints, groups) -> None:
    lm = adapt_model(checkpoints["llama"])
    rows, _ = rows_of(lm, groups)
    clean, hidden = (torch.from_numpy(part) for part in adapting._batch(rows, CONFIG, 0))
    with torch.inference_mode():
        loss = float(adapting._Objective(lm)(clean, hidden, None))
        single = [float(adapting._Objective(lm)(clean[i : i + 1], hidden[i : i + 1], None)) for i in range(len(clean))]
    assert loss == pytest.approx(sum(single) / len(single), rel=0.02)  # bf16 where that is fast


def test_held_out_masks_hide_text_only(checkpoints, groups) -> None:
    lm = adapt_model(checkpoints["llama"])
    rows, _ = rows_of(lm, groups)
    special = adapting.special_ids(lm)
    bank = mask_bank(rows, special, seed=0)
    text = ~np.isin(rows, sorted(special))
    text[:, 0] = False
    for rate, hidden in bank.items():
        assert not (hidden & ~text).any()
        assert (hidden.sum(axis=1) == [round(rate * n) for n in text.sum(axis=1)]).all()
    scores = evaluate(lm, rows, bank)
    assert set(scores) == {"0.15", "0.3", "0.5"}
    assert all(0 <= score["accuracy"] <= 1 and score["nats_stderr"] > 0 for score in scores.values())


# ------------------------------------------------------------------------------------------------ from text to a folder
def test_adapt_writes_a_model_a_curve_and_its_picture(checkpoints, groups, tmp_path: Path) -> None:
    log = adapt(checkpoints["llama"], groups, tmp_path, CONFIG)
    assert log is not None
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("tokenizer")) == [
        "adapt.json",
        "config.json",
        "curve.png",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "adapt.json").read_text())["curve"] == log["curve"]
    assert (log["groups"], log["held_out_groups"]) == (7, 1)
    lm = load(tmp_path)
    assert lm.spec.gen_length == 6
    assert lm.spec.template == "<bos>{prompt}"


def test_text_comes_from_files(checkpoints, tmp_path: Path) -> None:
    save_facts(FACTS, tmp_path / "facts.jsonl")
    (tmp_path / "texts.jsonl").write_text('{"text": "a b", "group": "x"}\n{"text": "c"}\n{"text": "d", "group": "x"}\n')
    (tmp_path / "book.txt").write_text("Ada Birk eats.\n\nBruno Hale sleeps.")
    groups = read_groups(sorted(tmp_path.iterdir()))
    assert [len(documents) for documents in groups.values()] == [1] * 9 + [2, 1]
    assert groups["x"] == ["a b", "d"]
    lm = adapt_model(checkpoints["llama"])
    assert lm.tokenizer is not None
    ids = sequences(lm, {"x": ["Ada", FACTS[0]]}, 1)[:, 0]
    assert lm.tokenizer.decode(ids) == f"<bos>Ada<eos><bos>{FACTS[0].prompt} {FACTS[0].answer}<eos>"


def test_bad_text_is_refused(checkpoints, groups, tmp_path: Path) -> None:
    for line, sentence in (
        ('{"words": 1}', "line 1: neither"),
        ('{"text": 1}', "line 1: expected a text"),
        ('{"text": "a", "author": "b"}', "found \\['author'\\]"),
        ('{"id": "1", "prompt": "a", "subject": "b", "answer": "c"}', "line 1: .*subject"),
    ):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(RemaskError, match=sentence):
            read_groups([tmp_path / "bad.jsonl"])
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RemaskError, match="not a UTF-8"):
        read_groups([tmp_path / "bad.txt"])
    with pytest.raises(RemaskError, match="no such file"):
        read_groups([tmp_path / "none.txt"])
    with pytest.raises(RemaskError, match="nothing can be held out"):
        adapt(checkpoints["llama"], {"x": ["a"]}, tmp_path / "out", CONFIG)
    with pytest.raises(RemaskError, match="contains the mask token"):
        adapt(checkpoints["llama"], {"x": ["a <|mask|>"], "y": ["b"]}, tmp_path / "out", CONFIG)
    with pytest.raises(RemaskError, match="give more text"):
        adapt(checkpoints["llama"], {"x": ["a"], "y": ["b"]}, tmp_path / "out", CONFIG)
    with pytest.raises(RemaskError, match="exceeds the context"):
        adapt(checkpoints["llama"], groups, tmp_path / "out", CONFIG.model_copy(update={"length": 65}))
    assert not (tmp_path / "out").exists()
