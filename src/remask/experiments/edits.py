"""From a name on the command line to an intervention: presets, tuned settings, calibration, files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..assets import RECIPES
from ..backbones.intervention import Intervention, NoEdit
from ..backbones.model import MaskedDiffusionLM, Site
from ..backbones.several import Several
from ..backbones.weight_edit import WeightEdit
from ..editfile import EDIT, read_edit
from ..editing.calibrate import calibrate
from ..editing.codebook import Codebook
from ..editing.config import PRESETS, MemoryConfig, preset
from ..editing.live import Edit, LiveEdit
from ..editing.live import attach as attach_live
from ..editing.memory import EditMemory
from ..editing.steering import SteeringVector, caa, mean_delta, random_layer, repe
from ..errors import RemaskError
from ..facts import Fact

BASELINES = ("mean-delta", "caa", "repe", "random-layer", "codebook")  # built with the settings of `default`
NAMED = (*PRESETS, *BASELINES, "none")
KINDS: dict[str, type[EditMemory] | type[SteeringVector] | type[Codebook] | type[WeightEdit]] = {
    kind.kind: kind for kind in (EditMemory, SteeringVector, Codebook, WeightEdit)
}


def load_edit(path: str | Path) -> EditMemory | SteeringVector | Codebook | WeightEdit:
    """An edit of any kind from its file, or from the folder of `remask unlearn`.

    Raises:
        RemaskError: missing, unreadable or damaged file, or a kind that this version does not know.
    """
    path = edit_file(path)
    kind = read_edit(path)[0]["kind"]
    if kind not in KINDS:
        raise RemaskError(f"{path}: unknown kind of edit {kind!r}; known are {', '.join(KINDS)}")
    return KINDS[kind].load(path)


def edit_file(path: str | Path) -> Path:
    """The edit file that a path means: itself, or the one in the folder of `remask unlearn`."""
    return Path(path) / EDIT if Path(path).is_dir() else Path(path)


def load_edits(paths: Sequence[str | Path]) -> Intervention:
    """The edits of files or folders as one intervention, attached in their order; no edit where there are none.

    Raises:
        RemaskError: what `load_edit` refuses.
    """
    edits = tuple(load_edit(path) for path in paths)
    return Several(edits) if len(edits) > 1 else edits[0] if edits else NoEdit()


def attach(model: nn.Module, edit: str | Path | Edit, **options: Any) -> LiveEdit:
    """Put an edit, or the edit of a file, on any torch module tree; options as in `remask.editing.live.attach`.

    Raises:
        RemaskError: what `load_edit` or the attaching refuse.
    """
    loaded = load_edit(edit) if isinstance(edit, str | Path) else edit
    if isinstance(loaded, WeightEdit):
        raise RemaskError(f"a {loaded.kind} changes weights, not the output of a module; attach it to a MaskedDiffusionLM")
    return attach_live(model, loaded, **options)


def tuned(model: str, name: str) -> dict[str, Any]:
    """Settings chosen on a validation split for a bundled model: `layer` and fields of MemoryConfig; {} for other models."""
    table = yaml.safe_load((RECIPES.parent / "edits.yaml").read_text(encoding="utf-8"))
    return dict(table.get(model, {}).get(name, {}))


def _of_sibling(model: str, name: str) -> dict[str, Any]:
    """Layer and anchor of the tuned preset that captures in the same way, for one that was not tuned itself."""
    if preset(name).rewrites:
        return {}  # where facts are best forgotten says nothing about where they are best rewritten
    found = tuned(model, "default" if preset(name).keys == "answer" else "paper")
    return {key: value for key, value in found.items() if key in ("layer", "anchor", "unknown")}


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
    """Build a memory preset or a baseline for `facts`, or load the edit file that `name` points at.

    Args:
        name: a preset; `mean-delta`, `caa`, `repe`, `codebook`; `random-layer` (the preset `default` at a layer that is drawn);
            or a file, which stays where and, unless `alpha` is given, as strong as it says.
        site: where; by default the layer chosen on a validation split for a bundled model. `random-layer` avoids its layer.
        alpha: strength; None = calibrated to `level`, except for a rewrite, which has no level: its deltas are whole at 1.
        level: target log-probability of the forget set, nats a row; None = the prompt-masked level.
        seed: of the partial states, and of the layer that is drawn.
        changes: fields of MemoryConfig to change.

    Raises:
        RemaskError: unknown name, no site for this model, or anything `EditMemory.build` and `calibrate` raise.
    """
    if name == "none":
        return NoEdit()
    if name not in NAMED:
        if not Path(name).exists():
            raise RemaskError(f"unknown edit {name!r}: not one of {', '.join(NAMED)} and no such file or folder")
        if site is not None or changes:
            raise RemaskError(f"{name} was captured where and as its file says; leave out the site and the settings")
        loaded = load_edit(name)
        return loaded if alpha is None else loaded.with_alpha(alpha)
    settings = _settings(lm.name, name)
    site = _site(lm, name, settings, site, facts, seed)
    config = _config(name, {key: value for key, value in settings.items() if key != "layer"} | changes, seed)
    edit = _built(lm, name, facts, retain, site, config)
    if alpha is not None:
        return edit.with_alpha(alpha)
    if config.rewrites:
        return edit
    return calibrate(lm, edit, [lm.encode(fact) for fact in facts], level)


def _settings(model: str, name: str) -> dict[str, Any]:
    """Tuned settings of an edit, or those of the tuned preset that is nearest to it."""
    if name == "random-layer":
        return tuned(model, "default")
    return tuned(model, name) or _of_sibling(model, "default" if name in BASELINES else name)


def _site(
    lm: MaskedDiffusionLM, name: str, settings: dict[str, Any], site: Site | None, facts: Sequence[Fact], seed: int
) -> Site:
    """The given site or the tuned layer; for `random-layer` another layer than that."""
    if site is None and "layer" in settings:
        site = Site(settings["layer"])
    if name == "random-layer":
        drawn = random_layer(lm, facts, avoid=None if site is None else site.layer, seed=seed)
        return Site(drawn) if site is None else replace(site, layer=drawn)
    if site is None:
        raise RemaskError(f"no layer is known for {lm.name}; give --layer, or --site auto to trace the facts")
    return site


def _config(name: str, changes: dict[str, Any], seed: int) -> MemoryConfig:
    """The preset's settings with changes; a baseline's are those of `default` under its own name."""
    if name not in PRESETS and name != "random-layer":
        changes |= {"mu": 0.0, "readout": "ridge", "compress": 0}  # only the captures are used
    config = preset("default" if name in BASELINES else name, **changes)
    return replace(config, preset=name, state_seed=config.state_seed + seed)


def _built(
    lm: MaskedDiffusionLM, name: str, facts: Sequence[Fact], retain: Sequence[Fact], site: Site, config: MemoryConfig
) -> EditMemory | SteeringVector | Codebook:
    """The edit at strength 1; the mean-delta vector at that of its memory."""
    if name in ("caa", "repe"):
        return (caa if name == "caa" else repe)(lm, site, facts, refusal=config.refusal, states=config.bank)
    if name == "codebook":
        return Codebook.build(lm, facts, site, retain=retain, config=config)
    memory = EditMemory.build(lm, facts, site, retain=retain if config.reads_retain else (), config=config)
    return mean_delta(memory) if name == "mean-delta" else memory
