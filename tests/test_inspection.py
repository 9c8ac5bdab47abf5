"""`remask inspect` before any weight is read: parameter counts and memory against what is really allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import remask.backbones.inspection as inspection
from conftest import GOLDEN_OPTIONS, GOLDENS
from remask.backbones import MaskedDiffusionLM, load
from remask.backbones.inspection import available_memory, count_parameters, inspect, job_memory
from remask.backbones.loading import read_checkpoint
from remask.diffusion.likelihood import target_logprobs
from remask.errors import RemaskError


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDENS.iterdir()))
def test_parameters_are_counted_without_weights(name: str) -> None:
    options = GOLDEN_OPTIONS[name]
    assert count_parameters(read_checkpoint(GOLDENS / name, **options)) == load(GOLDENS / name, **options).num_parameters


def test_forward_estimate_is_near_the_peak(tiny: MaskedDiffusionLM) -> None:
    """Within a factor of two of what the allocator saw, for a forward and its likelihoods, weights aside."""
    ids = torch.randint(5, tiny.embedding.num_embeddings, (64, 128), generator=torch.Generator().manual_seed(0))
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, 64:] = True
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        target_logprobs(tiny.logits(ids, positions=positions), ids[positions])
    held = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    estimate = job_memory(read_checkpoint("tiny"), tiny.num_parameters, torch.float32)["generate, score, audit"]
    estimate -= 4 * tiny.num_parameters
    assert peak / 2 < estimate < 2 * peak


def test_weights_that_do_not_fit_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "available_memory", lambda device: 1_000_000)
    monkeypatch.setattr(inspection, "load", lambda *_, **__: pytest.fail("weights were read"))
    report = inspect("tiny")
    assert report["fingerprint"] is None
    assert report["parameters"] == 3_413_760
    assert not any(job["fits"] for job in report["jobs"])


def test_free_memory_is_that_of_the_machine() -> None:
    free = available_memory("cpu")
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < free <= int(lines["MemTotal"].split()[0]) * 1024
    with pytest.raises(RemaskError, match="'abacus'"):
        available_memory("abacus")
