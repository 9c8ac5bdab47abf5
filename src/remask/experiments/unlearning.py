"""`remask unlearn`: one method of unlearning on a model, a forget set and a retain set; the result is an edit file.

| file | what it is |
|---|---|
| `edit.safetensors` | the change of the weights: an edit file, for `--edit` and `load_edit` |
| `unlearn.json` | settings, cost, what was done |
| `metrics.jsonl`, `tensorboard/`, `checkpoint.safetensors` | of methods that train |
| `moments/` | second moments of the preserved keys (`rome`, `memit`, `alphaedit`), for a later run on the same rows |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from rich.console import Console

from ..backbones import MaskedDiffusionLM, load
from ..backbones.weight_edit import WeightEdit
from ..editfile import EDIT
from ..editing.alphaedit import AlphaEditConfig, alphaedit
from ..editing.build import in_order
from ..editing.memit import MemitConfig, memit
from ..editing.rome import RomeConfig, rome
from ..errors import RemaskError
from ..facts import Fact, load_facts, write_json
from ..unlearning.objectives import METHODS, Method
from ..unlearning.training.config import UnlearnConfig
from ..unlearning.unlearn import LOG, unlearn
from .workers import Workers


@dataclass(frozen=True)
class Editor:
    """A locate-then-edit method, described by the fields that also a `Method` that trains has.

    Attributes:
        tell: a function of model, facts, encoded text to preserve, and options.
        options: its settings.
        retain, needs_retain, needs: as of a `Method`; the same for all editors.
    """

    tell: Callable[..., WeightEdit]
    options: type[BaseModel]
    summary: str
    source: str
    retain: str = "preserved keys"
    needs_retain: bool = True
    needs: frozenset[str] = frozenset()


EDITORS = {
    "rome": Editor(rome, RomeConfig, "write a refusal, or a new object, into one MLP, fact by fact", "arXiv 2202.05262"),
    "memit": Editor(memit, MemitConfig, "write them into several MLPs at once", "arXiv 2210.07229"),
    "alphaedit": Editor(alphaedit, AlphaEditConfig, "MEMIT in the null space of preserved keys", "arXiv 2410.02355"),
}
NAMES = (*METHODS, *EDITORS)


@dataclass(frozen=True)
class EditorConfig:
    """An editor by its name, with its options; what `UnlearnConfig` is for a method that trains."""

    method: str
    options: BaseModel


def describe_methods() -> list[dict[str, Any]]:
    """Name, summary, source, needs, draws (None: it does not train), and options with their defaults, of every method."""
    methods: dict[str, Method | Editor] = {**METHODS, **EDITORS}
    return [
        {
            "name": name,
            "summary": method.summary,
            "source": method.source,
            "retain": method.retain,
            "needs_retain": method.needs_retain,
            "needs": sorted(method.needs),
            "draws": method.draws if isinstance(method, Method) else None,
            "options": _defaults(method.options),
        }
        for name, method in methods.items()
    ]


def trainer_options() -> dict[str, Any]:
    """Settings that all methods that train share, with their defaults."""
    own = ("method", "options")
    return {name: value for name, value in _defaults(UnlearnConfig).items() if name not in own}


def _defaults(config: type[BaseModel]) -> dict[str, Any]:
    return {name: spec.get_default(call_default_factory=True) for name, spec in config.model_fields.items()}


@dataclass(frozen=True)
class UnlearnJob:
    """What `remask unlearn` is asked for.

    Attributes:
        model, reference: names or folders; reference: for mdu's anchor `never-trained`.
        method: of NAMES.
        forget, retain, validation: JSON Lines; validation rows are watched and not trained on.
        settings: options of the method, or of the trainer.
    """

    model: str
    method: str
    forget: Path
    retain: Path | None = None
    validation: Path | None = None
    reference: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in NAMES:
            raise RemaskError(f"unknown method {self.method!r}; choose one of {', '.join(NAMES)}")


def config_of(method: str, settings: Mapping[str, Any]) -> UnlearnConfig | EditorConfig:
    """The method's settings, typed: those of its own options, and of the trainer for methods that train.

    Raises:
        RemaskError: a setting that neither has, or a value that it refuses.
    """
    for name in ("method", "options"):
        if name in settings:
            raise RemaskError(f"{method}: {name} is no setting; give the method by its name and its options one by one")
    try:
        if method in EDITORS:
            return EditorConfig(method, EDITORS[method].options(**settings))
        own = METHODS[method].options.model_fields
        options = {key: value for key, value in settings.items() if key in own}
        shared = UnlearnConfig.model_fields  # a seed is also the trainer's
        rest = {key: value for key, value in settings.items() if key not in own or key in shared}
        return UnlearnConfig(method=method, options=options, **rest)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise RemaskError(
            f"{method}: {name or 'settings'}: {first['msg']}; `remask unlearn --help` lists the settings"
        ) from None


def run_unlearn(
    job: UnlearnJob,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    load_options: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Run the method, write `out`, and return what `unlearn.json` holds; None in every process but the first.

    Raises:
        RemaskError: unknown settings, files or models, or whatever the method refuses.
    """
    config = config_of(job.method, job.settings)
    lm = load(job.model, **(load_options or {}))
    twin = None if job.reference is None else load(job.reference, **(load_options or {}))
    forget = load_facts(job.forget)
    retain = [] if job.retain is None else load_facts(job.retain)
    validation = [] if job.validation is None else load_facts(job.validation)
    apply(lm, forget, retain, config, out, validation=validation, reference=twin, resume=resume, console=console)
    if Workers.here().index:
        return None
    return dict(json.loads((out / LOG).read_text(encoding="utf-8")))


def apply(
    lm: MaskedDiffusionLM,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    config: UnlearnConfig | EditorConfig,
    out: Path,
    *,
    validation: Sequence[Fact] = (),
    reference: MaskedDiffusionLM | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> WeightEdit:
    """One method, whatever its kind, on loaded rows; the same files."""
    if isinstance(config, UnlearnConfig):
        watched: dict[str, Any] = {"validation": validation, "reference": reference}
        return unlearn(lm, forget, retain, config, out, **watched, resume=resume, console=console)
    name = config.method
    if validation or reference is not None or resume:
        raise RemaskError(f"{name} does not train: it reads no validation rows or reference, and there is nothing to resume")
    facts = in_order(forget, retain, name)
    if not retain:
        raise RemaskError(f"{name} preserves the keys of retain rows and the retain set is empty; give it rows")
    edit = EDITORS[name].tell(lm, facts, [lm.encode(fact) for fact in retain], config.options, cache=out / "moments")
    edit.save(out / EDIT)
    record = {
        "method": name,
        "model": {"name": lm.name, "fingerprint": edit.model},
        "config": config.options.model_dump(mode="json"),
        "rows": {"forget": len(facts), "retain": len(retain)},
        **edit.details,
    }
    write_json(out / LOG, record)
    return edit
