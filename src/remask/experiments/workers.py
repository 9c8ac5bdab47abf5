"""The processes that work on one job together, under whatever launcher started them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import RemaskError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Workers:
    """This process among those that a launcher started (torchrun, accelerate launch); one process without it.

    Attributes:
        index, count: of this process, of all.
        device: of this process; None = the loader's default.
        wait: returns when all processes have called it.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    wait: Callable[[], None] = lambda: None

    @classmethod
    def here(cls) -> Workers:
        """Who we are.

        Raises:
            RemaskError: several processes without accelerate.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError:
            raise RemaskError("several processes need accelerate; install remask[train]") from None
        state = PartialState(cpu=not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes, state.device, state.wait_for_everyone)

    def share(self, items: Sequence[Item], purpose: str) -> Iterator[Item]:
        """The items that fall to this process: whoever is free takes the next one."""
        if self.count == 1:
            yield from items
            return
        store = torch.distributed.distributed_c10d._get_default_store()
        while (place := store.add(f"remask/{purpose}", 1) - 1) < len(items):
            yield items[place]

    def bar(self, console: Console | None) -> Progress:
        """A progress bar with elapsed and remaining time; silent without a console and in every process but the first."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=console, disable=console is None or self.index > 0)
