"""Edit files: safetensors with a JSON header (format version, kind, site, settings). Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..backbones.model import canonical_json
from ..errors import RemaskError
from ..facts import write_atomically

FORMAT = 1


def write_edit(path: str | Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an edit file, atomically."""
    metadata = {"remask": canonical_json({"format": FORMAT, "kind": kind, **header})}
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read_edit(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header (with `kind`) and tensors of an edit file.

    Raises:
        RemaskError: missing or unreadable file, or one of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise RemaskError(f"{path}: no such edit file")
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {}).get("remask", "{}"))
            tensors = {key: stream.get_tensor(key) for key in list(stream.keys())}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise RemaskError(f"{path}: not an edit file ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT or "kind" not in header:
        raise RemaskError(f"{path}: not an edit file of format {FORMAT}; build it again with this version")
    return header, tensors
