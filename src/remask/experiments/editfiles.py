"""What is done to edit files: their facts listed, two of them compared, one checked against its model."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..backbones import MaskedDiffusionLM
from ..backbones.weight_edit import WeightEdit
from ..diffusion.masks import MaskBank
from ..editing.build import fact_hash
from ..editing.calibrate import mean_logprob
from ..editing.memory import EditMemory
from ..editing.retained import Retained
from ..editing.site import SiteEdit
from ..facts import Fact
from ..random import digest, numpy_generator

PROBES, LENGTH = 4, 32  # canvases of random tokens that liveness and exact revert are tried on
BANK = MaskBank(draws=4, replicates=1, seed=5_000_005)


def show_memory(memory: EditMemory) -> dict[str, Any]:
    """What a memory holds, as JSON."""
    counts = torch.bincount(memory.owner, minlength=len(memory.fact_ids)).tolist()
    norms = [float(memory.deltas[memory.owner == i].norm(dim=1).mean()) for i in range(len(memory.fact_ids))]
    lines = zip(memory.fact_ids, memory.hashes, counts, norms, strict=True)
    held = [{"id": name, "hash": mark, "keys": count, "delta": norm} for name, mark, count, norm in lines]
    return {
        **memory.describe(),
        "retain_keys": memory.retained.count if memory.retained else 0,
        "retain_set": _mark(memory.retained) if memory.retained else "",
        "fact_ids": list(memory.fact_ids),
        "fact_list": held,
    }


def diff_memories(one: EditMemory, other: EditMemory) -> dict[str, Any]:
    """What two memories differ in: settings, and facts by id; `changed` facts have other texts, keys or deltas."""
    first, second = show_memory(one), show_memory(other)
    compared = ("model", "site", "alpha", "retain_keys", "retain_set")
    settings = {key: [first[key], second[key]] for key in compared if first[key] != second[key]}
    for key, value in first["config"].items():
        if value != second["config"][key]:
            settings[key] = [value, second["config"][key]]
    shared = sorted(set(one.fact_ids) & set(other.fact_ids))
    changed = [name for name in shared if not _same_rows(one, other, name)]
    return {
        "settings": settings,
        "removed": sorted(set(one.fact_ids) - set(other.fact_ids)),
        "added": sorted(set(other.fact_ids) - set(one.fact_ids)),
        "changed": changed,
        "same": len(shared) - len(changed),
    }


def _mark(retained: Retained) -> str:
    """Tells retain sets of one size apart."""
    tensors = (retained.mean, retained.moment, retained.keys)
    return digest(*(hashlib.blake2b(tensor.numpy().tobytes()).hexdigest() for tensor in tensors))


def _same_rows(one: EditMemory, other: EditMemory, name: str) -> bool:
    a, b = one.fact_ids.index(name), other.fact_ids.index(name)
    rows = [(edit.keys[edit.owner == i], edit.deltas[edit.owner == i]) for edit, i in ((one, a), (other, b))]
    return one.hashes[a] == other.hashes[b] and all(torch.equal(x, y) for x, y in zip(*rows, strict=True))


def verify_edit(lm: MaskedDiffusionLM, edit: SiteEdit | WeightEdit, facts: Sequence[Fact] = ()) -> dict[str, Any]:
    """Whether an edit acts on its model and goes away without a trace; with facts also whether it holds and moves them.

    One that is limited to steps is tried at its first.

    Raises:
        RemaskError: an edit of another model.
    """
    canvas = _probe(lm)
    with torch.inference_mode():
        before = lm.logits(canvas)
        with edit.attached(lm), _at_step(lm, edit.site.steps if isinstance(edit, SiteEdit) else None):
            during = lm.logits(canvas)
        after = lm.logits(canvas)
    checks = {
        "fits the model": True,  # attaching refuses anything else
        "numbers are finite": bool(during.isfinite().all()),
        "changes the logits": not torch.equal(before, during),
        "reverts to the same bits": torch.equal(before, after),
    }
    result: dict[str, Any] = {"checks": checks}
    if facts and isinstance(edit, EditMemory):
        held = dict(zip(edit.fact_ids, edit.hashes, strict=True))
        missing = [fact.id for fact in facts if held.get(fact.id) != fact_hash(fact)]
        checks["holds the facts"] = not missing
        result["missing"] = missing
    if facts:
        rows = [lm.encode(fact) for fact in facts]
        level = mean_logprob(lm, rows, BANK)
        with edit.attached(lm):
            result["log-probability"] = {"before": level, "after": mean_logprob(lm, rows, BANK)}
    result["passed"] = all(checks.values())
    return result


@contextlib.contextmanager
def _at_step(lm: MaskedDiffusionLM, steps: tuple[int, ...] | None) -> Iterator[None]:
    """The clock at the first of `steps`, where there are any."""
    lm.clock.step = steps[0] if steps else None
    try:
        yield
    finally:
        lm.clock.step = None


def _probe(lm: MaskedDiffusionLM) -> torch.Tensor:
    """Canvases of random tokens, half of them masked, the same for every edit."""
    rng = numpy_generator(0, "verify edit")
    length = min(LENGTH, lm.spec.max_length)
    ids = torch.from_numpy(rng.integers(0, lm.embedding.num_embeddings, (PROBES, length)))
    ids[torch.from_numpy(rng.random((PROBES, length)) < 0.5)] = lm.spec.mask_id
    return ids.to(lm.device)
