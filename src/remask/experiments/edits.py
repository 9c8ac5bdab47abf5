"""From a name on the command line to an intervention: presets, tuned settings, calibration, files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..assets import RECIPES
from ..backbones.intervention import Intervention, NoEdit
from ..backbones.model import MaskedDiffusionLM, Site
from ..editing.calibrate import anchor_level, calibrate
from ..editing.files import read_edit
from ..editing.memory import PRESETS, EditMemory, preset
from ..editing.steering import SteeringVector, mean_delta
from ..errors import RemaskError
from ..facts import Fact

NAMED = (*PRESETS, "mean-delta", "none")
KINDS: dict[str, type[EditMemory] | type[SteeringVector]] = {kind.kind: kind for kind in (EditMemory, SteeringVector)}


def load_edit(path: str | Path) -> EditMemory | SteeringVector:
    """An edit of any kind from its file.

    Raises:
        RemaskError: missing, unreadable or damaged file, or a kind that this version does not know.
    """
    kind = read_edit(path)[0]["kind"]
    if kind not in KINDS:
        raise RemaskError(f"{path}: unknown kind of edit {kind!r}; known are {', '.join(KINDS)}")
    return KINDS[kind].load(path)


def tuned(model: str, name: str) -> dict[str, Any]:
    """Settings chosen on a validation split for a bundled model: `layer` and fields of MemoryConfig; {} for other models."""
    table = yaml.safe_load((RECIPES.parent / "edits.yaml").read_text(encoding="utf-8"))
    return dict(table.get(model, {}).get(name, {}))


def build_edit(
    lm: MaskedDiffusionLM,
    name: str,
    facts: Sequence[Fact],
    retain: Sequence[Fact] = (),
    *,
    site: Site | None = None,
    alpha: float | None = None,
    level: float | None = None,
    seed: int = 0,
    **changes: Any,
) -> Intervention:
    """Build `default`, `paper` or `mean-delta` for `facts`, or load the edit file that `name` points at.

    Args:
        site: where; by default the layer chosen on a validation split for a bundled model.
        alpha: strength; None = calibrated to `level`.
        level: target log-probability of the forget set, nats a row; None = the prompt-masked level.
        seed: of the partial states.
        changes: fields of MemoryConfig to change.

    Raises:
        RemaskError: unknown name, no site for this model, or anything `EditMemory.build` and `calibrate` raise.
    """
    if name == "none":
        return NoEdit()
    if name not in NAMED:
        if not Path(name).is_file():
            raise RemaskError(f"unknown edit {name!r}: not one of {', '.join(NAMED)} and no such file")
        return load_edit(name)
    settings = tuned(lm.name, name)
    if site is None:
        if "layer" not in settings:
            raise RemaskError(f"no layer is known for {lm.name}; give --layer, or --site with the site.json of a trace")
        site = Site(settings["layer"])
    base = "default" if name == "mean-delta" else name
    changes = {key: value for key, value in settings.items() if key != "layer"} | changes
    if name == "mean-delta":
        changes["mu"] = 0.0  # only the captured deltas are used
    config = preset(base, **changes)
    config = replace(config, state_seed=config.state_seed + seed)
    memory = EditMemory.build(lm, facts, site, retain=retain if config.mu > 0 else (), config=config)
    edit: EditMemory | SteeringVector = mean_delta(memory) if name == "mean-delta" else memory
    if alpha is not None:
        return edit.with_alpha(alpha)
    rows = [lm.encode(fact) for fact in facts]
    return calibrate(lm, edit, rows, anchor_level(lm, rows) if level is None else level)
