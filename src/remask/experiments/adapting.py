"""From a causal checkpoint and text to a masked diffusion checkpoint: what `remask adapt` runs, and its learning curve.

Text comes by groups (a file, an author, an entity). Groups are held out whole, so that held-out text tells of nobody and
nothing that was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..backbones import MaskedDiffusionLM, save_pretrained
from ..backbones.adapt import adapt_model
from ..errors import RemaskError
from ..facts import Fact, read_jsonl, write_atomically, write_json
from ..figures import png
from ..random import numpy_generator
from ..unlearning.adapting import RATES, AdaptConfig, train_adapted

matplotlib.use("Agg", force=False)
HELD_OUT = 0.1  # share of the groups, where no held-out text is given
SCORED = 48  # held-out sequences scored at each point of the curve

Groups = Mapping[str, Sequence[str | Fact]]
_FACT_FIELDS = {field.name for field in fields(Fact)}


def read_groups(paths: Iterable[Path]) -> dict[str, list[str | Fact]]:
    """Documents by group, in order.

    A `.jsonl` file holds one document a line: `{"text": ...}`, or a fact (prompt and answer become the text); its group is the
    field `group`, else the line. Any other file is one document of UTF-8 text, and a group.

    Raises:
        RemaskError: missing or unreadable file, or a line that is neither a text nor a fact; names file and line.
    """
    groups: dict[str, list[str | Fact]] = {}
    for path in paths:
        if path.suffix == ".jsonl":
            for number, row in read_jsonl(path):
                group, document = _document(path, number, row)
                groups.setdefault(group or f"{path}:{number}", []).append(document)
            continue
        if not path.is_file():
            raise RemaskError(f"{path}: no such file")
        try:
            groups.setdefault(str(path), []).append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise RemaskError(f"{path}: not a UTF-8 text file") from None
    return groups


def adapt(
    source: str | Path,
    groups: Groups,
    out: Path,
    config: AdaptConfig,
    *,
    held_out: Groups | None = None,
    mask_token: str | None = None,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Adapt a causal model on text; the model lands in `out` with `adapt.json` and `curve.png`.

    Args:
        source: folder or hub id of the causal model.
        groups: documents by group; without `held_out`, a tenth of the groups is held out, chosen by the seed.
        mask_token: of `adapt_model`.

    Returns:
        What `adapt.json` holds; None on every process but the first.

    Raises:
        RemaskError: of `adapt_model` and `train_adapted`; a sequence longer than the context; nothing to hold out.
    """
    responses = max(1, config.length // 2)
    lm = adapt_model(source, mask_token, gen_length=responses, block_length=responses)
    if config.length > lm.spec.max_length:
        raise RemaskError(f"length {config.length} exceeds the context of {lm.name} ({lm.spec.max_length}); shorten it")
    if held_out is None:
        groups, held_out = split_groups(groups, config.seed)
    rows, scored = sequences(lm, groups, config.length), sequences(lm, held_out, config.length)[:SCORED]
    checkpoint = out / "checkpoint.safetensors"
    log = train_adapted(lm, rows, scored, config, checkpoint, resume=resume)

    from accelerate import PartialState

    if not PartialState().is_main_process:
        return None
    save_pretrained(lm, out)
    record = {
        "source": Path(source).name,
        "config": config.model_dump(),
        "mask_id": lm.spec.mask_id,
        "fingerprint": lm.fingerprint(),
        "groups": len(groups),
        "held_out_groups": len(held_out),
        **log,
    }
    write_json(out / "adapt.json", record)
    write_atomically(out / "curve.png", png(curve_figure(record)))
    checkpoint.unlink()
    return record


def split_groups(groups: Groups, seed: int) -> tuple[Groups, Groups]:
    """Groups to train on and groups held out, `HELD_OUT` of them and at least one.

    Raises:
        RemaskError: fewer than two groups.
    """
    names = list(groups)
    if len(names) < 2:
        raise RemaskError("the text is one single group, so nothing can be held out; give held-out text as well")
    order = numpy_generator(seed, "held-out groups").permutation(len(names))
    chosen = {names[i] for i in order[: max(1, round(HELD_OUT * len(names)))]}
    return (
        {name: groups[name] for name in names if name not in chosen},
        {name: groups[name] for name in names if name in chosen},
    )


def sequences(lm: MaskedDiffusionLM, groups: Groups, length: int) -> np.ndarray:
    """Token ids [n, length]: documents, each between a start and an end token, laid end to end and cut; the rest is dropped.

    Raises:
        RemaskError: a document holds the mask token; names its group.
    """
    stream: list[int] = []
    for group, documents in groups.items():
        for document in documents:
            ids = _ids(lm, document)
            if lm.spec.mask_id in ids:
                raise RemaskError(f"group {group!r}: a document contains the mask token of {lm.name}; remove it from the text")
            stream += (*ids, lm.spec.eos_id)
    count = len(stream) // length
    return np.array(stream[: count * length], dtype=np.int64).reshape(count, length)


def curve_figure(record: Mapping[str, Any]) -> Figure:
    """Held-out accuracy and nats a hidden token against training tokens, with one standard error, one line a masking rate."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    curve = record["curve"]
    tokens = [point["tokens"] / 1000 for point in curve]
    for axis, key, label in zip(axes, ("accuracy", "nats"), ("accuracy", "nats a hidden token"), strict=True):
        for index, rate in enumerate(RATES):
            values = [point["held_out"][f"{rate:g}"] for point in curve]
            axis.errorbar(
                tokens,
                [value[key] for value in values],
                [value[f"{key}_stderr"] for value in values],
                color=f"C{index}",
                marker="o",
                markersize=3.5,
                label=f"{rate:.0%} hidden",
            )
        axis.set_xlabel("training tokens (thousands)")
        axis.set_title(f"held-out {label}", fontsize=11)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9, loc="upper left")
    return figure


def _document(path: Path, number: int, row: dict[str, Any]) -> tuple[str, str | Fact]:
    """Group (empty where none is given) and document of one line."""
    if "text" in row:
        strange = sorted(set(row) - {"text", "group"})
        if strange or not isinstance(row["text"], str):
            raise RemaskError(f"{path}, line {number}: expected a text and perhaps a group, found {strange or row['text']!r}")
        return str(row.get("group", "")), row["text"]
    if not {"id", "prompt", "subject", "answer"} <= set(row) <= _FACT_FIELDS:
        raise RemaskError(f'{path}, line {number}: neither {{"text": ...}} nor a fact (id, prompt, subject, answer)')
    try:
        fact = Fact(**row)
    except RemaskError as error:
        raise RemaskError(f"{path}, line {number}: {error}") from None
    return fact.group, fact


def _ids(lm: MaskedDiffusionLM, document: str | Fact) -> tuple[int, ...]:
    """A fact as the model is asked for it; a text under the start token."""
    if isinstance(document, Fact):
        return lm.encode(document).ids
    assert lm.tokenizer is not None
    text = lm.spec.template.replace("{prompt}", document)
    return tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
