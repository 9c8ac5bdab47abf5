"""Edit files: tensors with a header that tells the kind of edit, its site and its settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import RemaskError
from .tensorfile import read_tensors, write_tensors

FORMAT = 3
EDIT = "edit.safetensors"  # name of the file in a folder of `remask unlearn` and in a repository of edits


def write_edit(path: str | Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an edit file, atomically."""
    write_tensors(path, {"format": FORMAT, "kind": kind, **header}, tensors)


def read_edit(path: str | Path, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header (with `kind`) and tensors of an edit file, all of them finite; `kind` is what it must hold, None = any.

    Raises:
        RemaskError: missing or unreadable file, one of another format or kind, or numbers that are not finite.
    """
    header, tensors = read_tensors(path, "edit file", FORMAT)
    if "kind" not in header:
        raise RemaskError(f"{path}: not an edit file; build it again")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RemaskError(f"{path}: damaged edit file ({name} holds numbers that are not finite); build it again")
    if kind is not None and header["kind"] != kind:
        article = "an" if kind[0] in "aeiou" else "a"
        raise RemaskError(f"{path}: holds a {header['kind']}, not {article} {kind}")
    return header, tensors


@contextlib.contextmanager
def rebuilt(path: str | Path) -> Iterator[None]:
    """Inside the block an edit is made of what `read_edit` gave; whatever does not fit is a damaged file.

    Raises:
        RemaskError: a part that is missing, of another type or shape, or refused by the edit.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, RemaskError) as error:
        raise RemaskError(f"{path}: damaged edit file ({error}); build it again") from None
