"""Files of tensors with a JSON header: safetensors, written atomically. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import RemaskError
from .facts import write_atomically


def write_tensors(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and their header; equal content gives equal bytes."""
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: the order of several would differ from file to file.
    text = canonical_json({**header, "checksum": _checksum(header, data)})
    write_atomically(path, save(data, {"remask": text}))


def read_tensors(path: str | Path, what: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of `write_tensors` whose header has `format` = version.

    Args:
        what: "edit file", "trace": how errors call it.

    Raises:
        RemaskError: missing or unreadable file, one of another format, or one that is not as it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise RemaskError(f"{path}: no such {what}")
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {}).get("remask", "{}"))
            tensors = {key: stream.get_tensor(key) for key in list(stream.keys())}
    except (SafetensorError, ValueError, OSError) as error:
        raise RemaskError(f"{path}: no readable {what} ({error}); make it again") from None
    if not isinstance(header, dict) or header.get("format") != version:
        raise RemaskError(f"{path}: this is no {what} of format {version}; make it again with this version")
    if header.pop("checksum", None) != _checksum(header, tensors):
        raise RemaskError(f"{path}: damaged {what} (its checksum is of other content); make it again")
    return header, tensors


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """32 hex digits over the header and every byte of the tensors."""
    digest = hashlib.blake2b(canonical_json(header).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def canonical_json(data: Any) -> str:
    """Deterministic JSON, for metadata and fingerprints."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
