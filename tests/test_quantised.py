"""Loading through transformers' quantisers and accelerate's device maps, where they are installed."""

from __future__ import annotations

import pytest
import torch

from remask.backbones import MaskedDiffusionLM, load

IDS = torch.arange(5, 29)[None]


@pytest.mark.parametrize("placed", ["auto", {"": "cpu"}])
def test_device_map_changes_nothing(tiny: MaskedDiffusionLM, placed: object) -> None:
    pytest.importorskip("accelerate", reason="device maps need accelerate")
    with torch.inference_mode():
        assert torch.equal(load("tiny", device_map=placed).logits(IDS), tiny.logits(IDS))


@pytest.mark.parametrize(("bits", "agreement"), [(8, 0.95), (4, 0.75)])
def test_bitsandbytes(tiny: MaskedDiffusionLM, bits: int, agreement: float) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised loading needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    lm = load("tiny", quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16)
    with torch.inference_mode():
        same = lm.logits(IDS).argmax(-1) == tiny.logits(IDS).argmax(-1)
    assert float(same.float().mean()) >= agreement
    assert type(lm.model.model.layers[0].mlp.down_proj) is not torch.nn.Linear
