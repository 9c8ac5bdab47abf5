"""How long a model taught from scratch sits on the unigram plateau: Muon on the matrices against AdamW on everything.

    python benchmarks/optimizer_plateau.py --data DIR

256 TOFU rows, the architecture of tiny-tofu, the same batches, masks and schedule; AdamW at its own best of two learning rates.
Writes benchmarks/results/optimizer_plateau.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import torch

from remask.backbones.model import MaskedDiffusionLM
from remask.backbones.native import new_model, train_tokenizer
from remask.experiments.teaching import read_recipe, recipe_facts
from remask.unlearning import trainer

ROWS, EPOCHS = 256, 25
CASES = (("adamw", 2e-3), ("adamw", 4e-3), ("muon", 4e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    recipe = read_recipe("tiny-tofu")
    assert recipe.architecture is not None
    taught = recipe_facts(recipe.data, data).taught
    facts = [fact for split in taught.values() for fact in split]
    size = recipe.architecture.model_dump()
    tokenizer = train_tokenizer(sorted(t for f in facts for t in (f.prompt, f.answer)), size.pop("vocab_size"))
    results = []
    for name, rate in CASES:
        torch.manual_seed(0)
        model, spec = new_model(tokenizer, **size)
        lm = MaskedDiffusionLM(model=model, tokenizer=tokenizer, spec=spec)
        config = recipe.train.model_copy(
            update={"epochs": EPOCHS, "learning_rate": rate, "weight_decay": 0.01, "checkpoint_every": EPOCHS + 1}
        )
        optimizers = trainer._optimizers if name == "muon" else adamw
        with mock.patch.object(trainer, "_optimizers", optimizers), mock.patch.object(trainer, "save_checkpoint"):
            log = trainer.train(lm, [lm.encode(fact) for fact in facts[:ROWS]], config, Path())
        results.append({"optimizer": name, "learning_rate": rate, "seed": config.seed} | log)
        print(name, rate, log["losses"][-1])
    out = Path(__file__).parent / "results" / "optimizer_plateau.json"
    out.write_text(json.dumps({"rows": ROWS, "epochs": EPOCHS, "cases": results}, indent=1) + "\n")


def adamw(lm: MaskedDiffusionLM, config: trainer.TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW on every parameter."""
    return [
        torch.optim.AdamW(
            lm.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
    ]


if __name__ == "__main__":
    main()
