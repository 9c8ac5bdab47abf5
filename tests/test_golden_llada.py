"""Native LLaDA against numbers from the original code (goldens/llada/NOTES.md says how they were made)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDENS
from remask.backbones import Encoded, Site, capture, load
from remask.diffusion.likelihood import elbo
from remask.diffusion.sampler import SamplerConfig, generate
from remask.errors import RemaskError

FOLDER = GOLDENS / "llada"
TENSORS = load_file(FOLDER / "golden.safetensors")
SAMPLER = json.loads((FOLDER / "sampler.json").read_text())
LIKELIHOOD = json.loads((FOLDER / "likelihood.json").read_text())
TOLERANCE = 1e-5


def by_name(cases: list[dict]) -> list:
    return [pytest.param(case, id=case["name"]) for case in cases]


def test_logits_without_a_mask(golden) -> None:
    with torch.inference_mode():
        logits = golden.logits(TENSORS["input_ids"])
    assert (logits - TENSORS["logits_nomask"]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4), slice(4, 6)], ids=["unpadded", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_logits_of_padded_rows(golden, rows: slice, dtype: torch.dtype) -> None:
    mask = TENSORS["attention_mask"][rows]
    with torch.inference_mode():
        logits = golden.logits(TENSORS["input_ids"][rows], mask.to(dtype))
    real = mask.bool()
    assert (logits[real] - TENSORS["logits"][rows][real]).abs().max() <= TOLERANCE


def test_traces_of_every_site(golden) -> None:
    ids = TENSORS["input_ids"][:1]
    names = {"resid": "block_out", "attn": "attn_out", "mlp": "mlp_out"}
    sites = [Site(layer, module) for layer in range(golden.num_layers) for module in names]
    with torch.inference_mode(), capture(golden, sites) as store:
        logits = golden.logits(ids)
    for site in sites:
        expected = TENSORS[f"trace.{names[site.module]}.{site.layer}"]
        assert (store[site][0] - expected).abs().max() <= TOLERANCE, site
    assert (golden.model.model.embed_tokens(ids)[0] - TENSORS["trace.embed"]).abs().max() <= TOLERANCE
    assert (logits[0] - TENSORS["trace.logits"]).abs().max() <= TOLERANCE


def test_run_to_and_run_from_on_the_original_traces(golden) -> None:
    ids = TENSORS["input_ids"][:1]
    with torch.inference_mode():
        for layer in range(golden.num_layers):
            stored = TENSORS[f"trace.block_out.{layer}"][None]
            assert (golden.run_to(layer, ids) - stored).abs().max() <= TOLERANCE
            assert (golden.run_from(layer, stored)[0] - TENSORS["trace.logits"]).abs().max() <= TOLERANCE


def sampler_config(args: dict) -> SamplerConfig:
    args = {key: value for key, value in args.items() if key != "mask_id"}
    if args.pop("logits_eos_inf", False):
        args["suppress_eos"] = True
    if args.pop("confidence_eos_eot_inf", False):
        args["suppress_eos_confidence"] = (SAMPLER["eos_token_id"], SAMPLER["eot_token_id"])
    return SamplerConfig(**args)


@pytest.mark.parametrize("case", by_name(SAMPLER["cases"]))
def test_sampler_ids_and_order_of_commitment(golden, case: dict) -> None:
    mask = None if case["attention_mask"] is None else torch.tensor(case["attention_mask"])
    results = generate(
        golden, case["prompt_ids"], sampler_config(case["args"]), attention_mask=mask, history=bool(case.get("history"))
    )
    for row, (result, prompt) in enumerate(zip(results, case["prompt_ids"], strict=True)):
        assert prompt + result.response == case["output_ids"][row]
        if case.get("history"):
            assert result.history == [canvas[row] for canvas in case["history"]]


@pytest.mark.parametrize("case", by_name(LIKELIHOOD["cases"]))
def test_losses_on_the_stored_masked_inputs(golden, case: dict) -> None:
    start = len(case["prompt_ids"])
    truth = torch.tensor(case["prompt_ids"] + case["answer_ids"])
    scale = case["args"]["cfg_scale"]
    for inputs, shares, losses in zip(case["perturbed_ids"], case["p_mask"], case["per_sample_loss"], strict=True):
        canvas = torch.tensor(inputs)
        with torch.inference_mode():
            logits = golden.logits(canvas)
            if scale:
                blind = canvas.clone()
                blind[:, :start] = golden.spec.mask_id
                free = golden.logits(blind)
                logits = free + (scale + 1) * (logits - free)
        for row, (share, loss) in enumerate(zip(shares, losses, strict=True)):
            hidden = canvas[row] == golden.spec.mask_id
            entropy = torch.nn.functional.cross_entropy(logits[row, hidden], truth[hidden], reduction="sum")
            assert float(entropy) / share == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("case", by_name([case for case in LIKELIHOOD["cases"] if not case["args"]["cfg_scale"]]))
def test_elbo_under_the_originals_masks(golden, case: dict) -> None:
    """`elbo` with the original's masks in place of the bank's gives the original's result."""
    start = len(case["prompt_ids"])
    masks = np.array([row[start:] for batch in case["perturbed_ids"] for row in batch]) == golden.spec.mask_id
    bank = SimpleNamespace(draws=len(masks), replicates=1, masks=lambda row, length: masks)
    row = Encoded("case", tuple(case["prompt_ids"]), tuple(case["answer_ids"]), (0, 1))
    assert elbo(golden, [row], bank)[0].logprob == pytest.approx(case["result"], abs=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_type", "sequential"),
        ("activation_type", "swiglu"),
        ("layer_norm_type", "default"),
        ("rope", False),
        ("alibi", True),
        ("attention_layer_norm", True),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("block_group_size", 2),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("bias_for_layer_norm", True),
    ],
)
def test_unsupported_config_field_is_refused_by_name(tmp_path, field: str, value: object) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    (tmp_path / "model.safetensors").symlink_to(FOLDER / "model.safetensors")
    with pytest.raises(RemaskError, match=rf"\b{field}="):
        load(tmp_path)
