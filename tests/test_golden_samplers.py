"""Every preset against the ids and canvases of the originals' own samplers (goldens/*/NOTES.md says how they were made)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from conftest import GOLDEN_OPTIONS, GOLDENS
from remask.backbones import MaskedDiffusionLM, load
from remask.diffusion import sampler
from remask.diffusion.sampler import SamplerConfig, generate, infill
from remask.errors import RemaskError

Case = dict[str, Any]
PRESET = {"llada_moe": "llada"}
STORED = {name: json.loads((GOLDENS / name / "sampler.json").read_text()) for name in GOLDEN_OPTIONS}
RENAMED = {"max_new_tokens": "gen_length", "diffusion_steps": "steps", "logits_temp": "temperature", "topp_temp": "top_p"}
RENAMED |= {"alg_temp": "order_temperature"}
CONFIDENCE = {"low_confidence": "probability", "maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}
OTHER = ("remasking", "alg", "logits_eos_inf", "confidence_eos_eot_inf", "mask_id", "eos_id", "eps", "shift", "total_length")
OTHER += ("torch_seed", "minimal_topk", "eos_early_stop")


@cache
def model(family: str) -> MaskedDiffusionLM:
    return load(GOLDENS / family, **GOLDEN_OPTIONS[family])


def lm_of(family: str, case: Case) -> MaskedDiffusionLM:
    """The golden model; block-causal goldens vary the block."""
    lm = model(family)
    if lm.spec.attention_block:
        lm.spec = replace(lm.spec, attention_block=case["args"]["block_length"])
    return lm


def config_of(family: str, case: Case) -> SamplerConfig:
    """The preset with the golden's arguments, in our names."""
    args, stored = case["args"], STORED[family]
    changes = {RENAMED.get(name, name): value for name, value in args.items() if name not in OTHER}
    if family == "dream":  # the golden runs leave out what the README's recipe sets
        changes = {"top_p": 1.0} | changes
    if family == "diffullama":
        changes["gen_length"] = args["total_length"] - len(case["prompt_ids"][0])
    if family == "llada2":  # steps are a block's here
        changes["steps"] = args["steps"] * -(-args["gen_length"] // args["block_length"])
    if name := args.get("remasking") or args.get("alg"):
        changes["confidence"] = CONFIDENCE[name]
    changes["suppress_eos"] = args.get("logits_eos_inf", False)
    if args.get("confidence_eos_eot_inf"):
        changes["suppress_eos_confidence"] = (stored["eos_token_id"], stored["eot_token_id"])
    return SamplerConfig.preset(PRESET.get(family, family), **changes)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch):
    """Commit with the golden's draws: 1 where the original's uniform number lay under the step's probability."""

    def inject(family: str, case: Case) -> None:
        if family != "diffullama":
            return
        mask_id, drawn = STORED[family]["mask_id"], sampler._uniform

        def uniform(shape, seed, purpose, key, step):
            if purpose != "remask":
                return drawn(shape, seed, purpose, key, step)
            masked = torch.tensor(case["history"][step][0]) == mask_id
            last = step == case["args"]["diffusion_steps"] - 1
            draws = torch.ones(int(masked.sum())) if last else torch.tensor(case["commit_draws"][step]).reshape(-1)[masked]
            assert draws.shape == shape
            return draws.double()

        monkeypatch.setattr(sampler, "_uniform", uniform)

    return inject


def rows_of(case: Case) -> list[list[int]]:
    """Prompt plus expected response, one a row, as far as the original returns them."""
    if "commit_draws" in case:  # position 0 is dropped
        return [[prompt[0], *row] for prompt, row in zip(case["prompt_ids"], case["output_ids"], strict=True)]
    if "eos_early_stop" in case["args"]:  # only the response
        return [prompt + row for prompt, row in zip(case["prompt_ids"], case["output_ids"], strict=True)]
    return list(case["output_ids"])


CASES = [
    pytest.param(family, case, id=f"{family}-{case['name']}") for family, stored in STORED.items() for case in stored["cases"]
]
PADDABLE = [param for param in CASES if param.values[0] != "llada2"]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_ids_and_canvases_are_the_originals(family: str, case: Case, recorded) -> None:
    lm, prompts = lm_of(family, case), case["prompt_ids"]
    recorded(family, case)
    mask = None if case.get("attention_mask") is None else torch.tensor(case["attention_mask"])
    seen: list[list[list[int]]] = []
    hook = lm.embedding.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].tolist()))
    results = generate(lm, prompts, config_of(family, case), attention_mask=mask, history=True)
    hook.remove()
    for prompt, result, expected in zip(prompts, results, rows_of(case), strict=True):
        assert (prompt + result.response)[: len(expected)] == expected
        if family == "llada2":  # the original cuts behind the first end token, ours goes on with end tokens
            rest = result.response[len(expected) - len(prompt) :]
            assert not rest or expected[-1] == lm.spec.eos_id
    if family == "llada2":  # stored: what each forward saw, which grows by a block
        assert seen == case["history"]
        return
    canvases = [[result.history[step] for result in results] for step in range(len(results[0].history))]
    stored = case["history"]
    if family == "diffullama":  # what each forward saw; the original goes on when nothing is left, ours has the final canvas
        stored = [canvas for canvas in stored if lm.spec.mask_id in canvas[0]] + [rows_of(case)]
    assert canvases == stored


@pytest.mark.parametrize(("family", "case"), [param for param in CASES if param.values[0] != "llada2"])
def test_left_padded_batch_gives_the_ids_of_unpadded_rows(family: str, case: Case, recorded) -> None:
    """All rows padded further, beside a longer row that is not padded."""
    lm = lm_of(family, case)
    recorded(family, case)
    given = case.get("attention_mask") or [[1] * len(prompt) for prompt in case["prompt_ids"]]
    real = [prompt[len(prompt) - sum(mask) :] for prompt, mask in zip(case["prompt_ids"], given, strict=True)]
    rows = [*real, [*range(20, 33), *real[0]]]
    padding = [len(rows[-1]) - len(row) for row in rows]
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(padding, rows, strict=True)])
    prompts = [[lm.spec.pad_id] * pad + row for pad, row in zip(padding, rows, strict=True)]
    results = generate(lm, prompts, config_of(family, case), attention_mask=mask)
    for prompt, expected, result in zip(case["prompt_ids"], rows_of(case), results, strict=False):
        assert result.response == expected[len(prompt) :]


@pytest.mark.parametrize("family", GOLDEN_OPTIONS)
def test_rows_of_any_length_give_what_each_gives_alone(family: str) -> None:
    """Prompts and responses of several lengths, sampled at the preset's own temperature, in every batch size."""
    cases = {len(case["prompt_ids"][0]): case for case in STORED[family]["cases"] if case.get("attention_mask") is None}
    prompts = [case["prompt_ids"][0] for case in cases.values()] * 2
    lengths = [8] * len(cases) + [16] * len(cases)
    lm = lm_of(family, next(iter(cases.values())))
    blocks = {"block_length": 8} if SamplerConfig.preset(lm.spec.sampler).block_length else {}
    config = SamplerConfig.preset(lm.spec.sampler, gen_length=16, steps=16, **blocks)
    names = [f"{row}" for row in range(len(prompts))]
    together = generate(lm, prompts, config, gen_lengths=lengths, keys=names)
    assert [len(result.response) for result in together] == lengths
    for i, prompt in enumerate(prompts):
        alone = generate(lm, [prompt], config, gen_lengths=lengths[i : i + 1], keys=names[i : i + 1])
        assert alone[0].response == together[i].response
    assert len({tuple(result.response[:8]) for result in together}) >= len(cases)


def test_infilling_continues_a_golden_run_from_its_middle() -> None:
    """With one token a step under the equal split, what is left of a run does not depend on how it began."""
    for family in ("llada", "mmada", "llada_moe"):
        case = STORED[family]["cases"][0]
        lm, history = lm_of(family, case), case["history"]
        config = SamplerConfig.preset(PRESET.get(family, family), block_length=None)
        for start in (0, 5, 12):
            [result] = infill(lm, history[start], config, history=True)
            assert result.response == case["output_ids"][0]
            assert result.history == [canvas[0] for canvas in history[start:]]


def test_padding_of_a_block_causal_model_is_refused() -> None:
    lm = lm_of("llada2", STORED["llada2"]["cases"][0])
    config = SamplerConfig.preset("llada2", gen_length=8, block_length=8)
    with pytest.raises(RemaskError, match="block-causal"):
        generate(lm, [[290, 5, 6]], config, attention_mask=torch.tensor([[0, 1, 1]]))
    assert len(generate(lm, [[290, 5, 6]], config, attention_mask=torch.ones(1, 3))[0].response) == 8
