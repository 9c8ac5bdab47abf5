"""Render a page from a template; pictures are inlined, so that one file is the whole report."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ..backbones.model import MaskedDiffusionLM


def render(template: str, **context: Any) -> str:
    """Render `reporting/templates/<template>`; unknown names in it are errors."""
    environment = Environment(
        loader=PackageLoader("remask.reporting"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline_png"] = lambda data: "data:image/png;base64," + base64.b64encode(data).decode()
    return environment.get_template(template).render(**context)


@dataclass(frozen=True)
class Cell:
    """One response slot at one step: its text, and whether it is still masked or was just committed."""

    text: str
    masked: bool
    new: bool


def denoising_strip(lm: MaskedDiffusionLM, prompt_length: int, history: Sequence[Sequence[int]]) -> list[list[Cell]]:
    """The canvas of one generation, a row a step that changed something, up to the answer's last real token."""
    states = [list(canvas[prompt_length:]) for canvas in history]
    final = states[-1]
    width = (final.index(lm.spec.eos_id) if lm.spec.eos_id in final else len(final)) + 1
    rows: list[list[Cell]] = []
    previous = [lm.spec.mask_id] * width
    for step, state in enumerate(states):
        current = state[:width]
        if step and current == previous:
            continue
        rows.append(
            [
                Cell(_text(lm, token), token == lm.spec.mask_id, token != old)
                for token, old in zip(current, previous, strict=False)
            ]
        )
        previous = current
    return rows


def _text(lm: MaskedDiffusionLM, token: int) -> str:
    if token == lm.spec.mask_id:
        return ""
    if token == lm.spec.eos_id:
        return "(end)"
    return str(lm.tokenizer.decode([token])).strip() if lm.tokenizer is not None else str(token)
