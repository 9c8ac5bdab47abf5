"""`remask audit`: a benchmark x an edit, with the never-trained twin, the mean-delta control and attacks, into one folder.

| file | what it is |
|---|---|
| `audit.json` | what was asked for and with what: models, edit, protocol |
| `edits/` | the edits that were built, one a seed |
| `parts/` | finished cells; a killed audit goes on from them |
| `records.jsonl` | every number and text, one a line |
| `results.json` | aggregates, computed from the records |
| `index.html`, `*.png` | the same to look at |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..assets import bundled_models
from ..backbones import MaskedDiffusionLM, Site, load
from ..backbones.intervention import Intervention, NoEdit
from ..diffusion.sampler import SamplerConfig
from ..editing.calibrate import Level, target_level
from ..editing.memory import EditMemory
from ..editing.steering import mean_delta
from ..errors import NothingToForgetError, RemaskError
from ..evaluation.audit import ATTACK_ROWS, Cell, Plan, State, run_cells, states_of
from ..evaluation.benchmarks.base import Benchmark
from ..evaluation.benchmarks.registry import load_benchmark
from ..evaluation.records import ESTIMATOR, SCHEMA, Record, package_versions, read_records, write_records
from ..evaluation.summary import (
    Scores,
    attack_table,
    forget_qualities,
    gap_closed,
    group_table,
    memberships,
    selectivity,
    tests_used,
    utilities,
)
from ..evaluation.tasks import Precision
from ..facts import Fact, write_atomically, write_json
from ..figures import png
from ..random import digest
from ..reporting.audit import audit_figures, audit_page
from ..unlearning.trainer import fast_bfloat16
from .edits import NAMED, build_edit, edit_file, load_edit, load_edits
from .tracing import find_site, site_file
from .workers import Workers


@dataclass(frozen=True)
class AuditConfig:
    """What `remask audit` is asked for.

    Attributes:
        model, benchmark, edit: names; `edit` may be a file.
        also: files of further edits, which act together with the file `edit`, each as strong as its file says.
        alpha, layer: of the edit; None = calibrated, tuned; of a file: as it says.
        site: instead of a layer: `auto` or the folder of a trace.
        reference: model that never saw the forget set; None = `<model>-reference` where that is bundled.
        level: what alpha is calibrated to.
        seeds: repetitions; each has its own bank and partial states. All but log-probabilities is measured under the first.
        precision: of the measurement; None = bf16 autocast where the machine is fast at it. Edits are built in fp32.
        steps: denoising steps of generations; None = one token a step.
        attacks, relearn, extraction: what to measure beside likelihoods and generations.
        attack_rows: rows that attacks on the sampler are run on.
        text: keep generated text.
    """

    model: str
    benchmark: str
    edit: str = "default"
    alpha: float | None = None
    layer: int | None = None
    site: str | None = None
    reference: str | None = None
    level: Level = "auto"
    seeds: int = 1
    precision: Precision | None = None
    steps: int | None = None
    attacks: bool = True
    relearn: bool = False
    extraction: bool = False
    attack_rows: int = ATTACK_ROWS
    text: bool = True
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.also:
            for name in self.edits:
                if not Path(name).exists():
                    raise RemaskError(f"edit {name!r} is no file or folder; several edits are read from files, build it first")
            if self.alpha is not None:
                raise RemaskError("several edits are as strong as their files say; leave out --alpha")
        if self.from_file and (self.layer is not None or self.site is not None or self.level != "auto"):
            raise RemaskError(f"{self.edit} stays where and as strong as it says; leave out --layer, --site and --level")

    @property
    def from_file(self) -> bool:
        """Whether the edit is read and not built."""
        return self.edit not in NAMED and Path(self.edit).exists()

    @property
    def edits(self) -> tuple[str, ...]:
        """Every edit, in the order in which they are attached."""
        return self.edit, *self.also

    def command(self) -> str:
        """The command line that asks for this."""
        parts = ["remask audit", self.model, "--benchmark", self.benchmark]
        parts += [part for name in self.edits for part in ("--edit", name)]
        parts += ["--data", "DIR"] if self.benchmark != "closed-world" else []
        given = {"alpha": self.alpha, "layer": self.layer, "site": self.site, "reference": self.reference, "steps": self.steps}
        given["level"] = None if self.level == "auto" else self.level
        given["attack-rows"] = None if self.attack_rows == ATTACK_ROWS else self.attack_rows
        given["seeds"] = None if self.seeds == 1 else self.seeds
        given["precision"] = None if self.precision is None else self.precision.split()[0]
        parts += [part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))]
        flags = {"--no-attacks": not self.attacks, "--relearn": self.relearn, "--extraction": self.extraction}
        return " ".join([*parts, *(flag for flag, on in flags.items() if on), *([] if self.text else ["--no-text"])])


def run_benchmark(
    config: AuditConfig,
    out: Path,
    data: Path | None = None,
    *,
    parts: Path | None = None,
    console: Console | None = None,
    load_options: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Run an audit into `out` and return its results; None in every process but the first.

    The edit is built from the benchmark's forget and fit sets and scored on rows that it never read. Model and reference are
    loaded with the same `load_options`. `parts` is the folder of finished cells; audits that share one score the states that
    no edit touches once.

    Raises:
        RemaskError: whatever the benchmark's files, the model, the edit or the options are refused for.
    """
    workers = Workers.here()
    options = dict(load_options or {})
    if workers.device is not None:
        options.setdefault("device", workers.device)
    lm = load(config.model, **options)
    twin_name = config.reference or (f"{config.model}-reference" if f"{config.model}-reference" in bundled_models() else None)
    twin = load(twin_name, **options) if twin_name else None
    benchmark = load_benchmark(config.benchmark, data)
    plan = Plan.of(
        lm,
        benchmark,
        SamplerConfig.default(lm, steps=config.steps),
        precision=config.precision or ("bf16 autocast" if fast_bfloat16(lm.device) else "fp32"),
        attacks=config.attacks,
        relearn=config.relearn,
        extraction=config.extraction,
        attack_rows=config.attack_rows,
    )
    builder = _Builder(config, lm, twin, benchmark, plan, out / "edits")
    folder, seeds = parts or out / "parts", range(config.seeds)
    if workers.index == 0:
        for seed in seeds:
            builder.build(seed)
    with workers.bar(console) as progress:
        task = progress.add_task("auditing")

        def measure(cells: Sequence[Cell], purpose: str) -> None:
            files = {cell.key: folder / f"{cell.key}.jsonl" for cell in cells}
            for cell in workers.share(cells, purpose):  # all of them: every process has to count through the same list
                if files[cell.key].is_file():
                    continue
                what = cell.task if cell.setting.attack is None else cell.setting.attack.name
                done = sum(path.is_file() for path in files.values())  # by all processes
                progress.update(task, total=len(files), completed=done, description=f"{cell.state.name}: {what}")
                run_cells([cell], benchmark.name, folder)

        # What needs no edit comes first: the other processes measure it while the first one builds.
        bare = [state for state in states_of(lm, NoEdit(), twin) if state.name != "after"]
        measure([cell for seed in seeds for cell in replace(plan, attacks=()).cells(bare, seed)], "without edit")
        workers.wait()
        edits = [builder.read(seed) for seed in seeds]
        if isinstance(edits[0], NoEdit):  # nothing was forgotten that an attack could bring back
            plan = replace(plan, attacks=())
        cells = [cell for seed in seeds for cell in plan.cells(builder.states(edits[seed]), seed)]
        measure(cells, "with edit")
        workers.wait()
    if workers.index:
        return None
    records = [record for part in run_cells(cells, benchmark.name, folder) for record in part]
    if not config.text:
        records = [record for record in records if record.metric != "output"]
    write_json(out / "audit.json", builder.header(edits, plan), allow_nan=False)
    write_records(out / "records.jsonl", records)
    texts = {fact.id: (fact.prompt, fact.answer) for facts in [benchmark.forget, *benchmark.scored.values()] for fact in facts}
    return write_results(out, texts if config.text else None)


@dataclass(frozen=True)
class _Builder:
    """Edits of an audit, one a seed, built by one process into files that all of them read."""

    config: AuditConfig
    lm: MaskedDiffusionLM
    twin: MaskedDiffusionLM | None
    benchmark: Benchmark
    plan: Plan
    folder: Path

    def build(self, seed: int) -> None:
        """Build the edit of a seed, unless its file is there; where there is nothing to forget, leave a note instead.

        Raises:
            RemaskError: an edit that cannot be built, or one of another model; nothing has been measured then.
        """
        path, config, lm = self.path(seed), self.config, self.lm
        if config.also:
            self._copy(seed)
            return
        if config.edit == "none" or path.is_file() or path.with_suffix(".txt").is_file():
            return
        forget, fit = self.rows()
        try:
            calibrated = config.alpha is None and not config.from_file
            level = target_level(lm, forget, self.twin, config.level) if calibrated else None
            site = None if config.layer is None else Site(config.layer)
            if config.site is not None and site is None:
                site = find_site(lm, config.site, forget)
            edit = build_edit(lm, config.edit, forget, fit, site=site, alpha=config.alpha, level=level, seed=seed)
        except NothingToForgetError as error:
            write_atomically(path.with_suffix(".txt"), str(error).encode())
            return
        edit.attach(lm).detach()
        edit.save(path)

    def _copy(self, seed: int) -> None:
        """Several files into the folder, once they have been attached together."""
        paths = self.paths(seed)
        if all(path.is_file() for path in paths):
            return
        load_edits(self.config.edits).attach(self.lm).detach()
        for name, path in zip(self.config.edits, paths, strict=True):
            load_edit(name).save(path)

    def read(self, seed: int) -> Intervention:
        """The edit of a seed; none where there is nothing to forget."""
        return load_edits([path for path in self.paths(seed) if path.is_file()])

    def note(self) -> str | None:
        """Why no edit was built."""
        path = self.path(0).with_suffix(".txt")
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def states(self, edit: Intervention) -> list[State]:
        """States of the audit of one edit; a memory has its mean delta as control."""
        return states_of(self.lm, edit, self.twin, mean_delta(edit) if isinstance(edit, EditMemory) else None)

    def rows(self) -> tuple[list[Fact], list[Fact]]:
        """Forget and fit facts that fit the model's context."""
        left_out = {name for rows in self.plan.too_long.values() for name in rows}
        forget, fit = self.benchmark.forget, self.benchmark.fit
        return [fact for fact in forget if fact.id not in left_out], [fact for fact in fit if fact.id not in left_out]

    def paths(self, seed: int) -> list[Path]:
        """Files of a seed's edits, in their order."""
        return [self.path(seed, edit) for edit in self.config.edits]

    def path(self, seed: int, edit: str | None = None) -> Path:
        """File of a seed's edit, named by a hash of all that it depends on; of several the first unless told."""
        config, forget_fit = self.config, self.rows()
        edit = config.edit if edit is None else edit
        asked: list[Any] = [edit, config.alpha, config.layer, config.site, config.level, seed]
        asked += [path.read_bytes() for path in (edit_file(edit), site_file(config.site or "")) if path.is_file()]
        prints = [self.lm.fingerprint(), None if self.twin is None else self.twin.fingerprint()]
        return self.folder / f"{digest(*asked, *prints, forget_fit, package_versions())}.safetensors"

    def header(self, edits: Sequence[Intervention], plan: Plan) -> dict[str, Any]:
        """What was asked for and with what."""
        benchmark, twin = self.benchmark, self.twin
        return {
            "schema": SCHEMA,
            "command": self.config.command(),
            "benchmark": {
                "name": benchmark.name,
                "licence": benchmark.licence,
                "notes": list(benchmark.notes),
                "rows": {group.name: len(group.rows) for group in plan.groups},
                "sides": {group.name: group.side for group in plan.groups},
                "too_long": {name: list(rows) for name, rows in plan.too_long.items()},
            },
            "model": {"name": self.lm.name, "fingerprint": self.lm.fingerprint()},
            "reference": None if twin is None else {"name": twin.name, "fingerprint": twin.fingerprint()},
            "edit": {
                "name": " + ".join(self.config.edits),
                "note": self.note(),
                "seeds": [{"kind": edit.kind, **edit.describe()} for edit in edits],
            },
            "attacks": [
                {"attack": a.name, "measure": a.measure, "describe": a.describe(), "rows": [fact.id for fact in facts]}
                for a, facts in plan.attacks
            ],
            "estimator": {
                "name": ESTIMATOR,
                "draws": plan.draws * plan.replicates,
                "replicates": plan.replicates,
                "seeds": list(range(self.config.seeds)),
            },
            "sampler": plan.sampler.to_dict(),
            "precision": plan.precision,
            "versions": package_versions(),
        }


def write_results(out: Path, texts: Mapping[str, tuple[str, str]] | None = None) -> dict[str, Any]:
    """Derive results.json, the page and its pictures from `audit.json` and `records.jsonl`; returns the results.

    Args:
        out: folder of an audit.
        texts: row id -> prompt and answer, shown on the page.
    """
    header = read_header(out)
    records = read_records(out / "records.jsonl")
    result = summarise(header, records)
    write_json(out / "results.json", result, allow_nan=False)
    figures = {name: png(figure) for name, figure in audit_figures(result, records).items()}
    for name, data in figures.items():
        write_atomically(out / f"{name}.png", data)
    write_atomically(out / "index.html", audit_page(result, records, figures, texts).encode())
    return result


def read_header(out: Path) -> dict[str, Any]:
    """`audit.json` of a finished audit.

    Raises:
        RemaskError: no finished audit there, or one of another version.
    """
    path = out / "audit.json"
    if not path.is_file():
        raise RemaskError(f"{out}: holds no finished audit (no audit.json); run `remask audit ... -o {out}` to its end")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RemaskError(f"{path}: damaged ({error}); run the audit again, it resumes") from None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise RemaskError(f"{path}: not an audit of schema {SCHEMA}; run it again with this version")
    return header


def summarise(header: Mapping[str, Any], records: list[Record]) -> dict[str, Any]:
    """The content of results.json: the header, and aggregates of the records alone."""
    scores = Scores(records)
    sides = header["benchmark"]["sides"]
    groups = group_table(scores, sides)
    return {
        **{key: value for key, value in header.items() if key != "attacks"},
        "groups": groups,
        "summary": {
            "gap_closed": gap_closed(scores),
            "selectivity": selectivity(scores),
            "forget_quality": forget_qualities(scores),
            "model_utility": utilities(scores),
            "membership": memberships(scores, sides),
        },
        "attacks": attack_table(scores, header["attacks"]),
        "tests": tests_used(groups),
    }
