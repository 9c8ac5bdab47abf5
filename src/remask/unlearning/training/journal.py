"""What a run writes while it trains: metrics as JSON Lines, TensorBoard where it is installed, a progress bar."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...facts import write_atomically


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Lines of a file, one a step and one a point of the curve; silent on every process but the first.

    Args:
        path: of the file; TensorBoard's are in `tensorboard/<title>` beside it.
        first: steps that are done; lines of later ones, of a run that was killed, are dropped.
    """

    def __init__(self, path: Path, title: str, first: int, total: int, *, live: bool, console: Console | None) -> None:
        self._live, self._title, self._tensorboard = live, title, None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console or Console(stderr=True), disable=not live)
        self._task = self._progress.add_task(title, total=total, completed=first)
        if not live:
            return
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first] if first else []
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._stream = path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(path.parent / "tensorboard" / title), purge_step=first + 1)

    def __enter__(self) -> Journal:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._live:
            self._stream.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line; `kind` is train or validation."""
        if not self._live:
            return
        self._stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._stream.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def advance(self, caption: str) -> None:
        """One step is done."""
        self._progress.update(self._task, advance=1, description=f"{self._title}, {caption}")


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that may end in a torn one."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
