"""`remask trace`: facts x a model into one folder: raw effects, the chosen site, pictures and a page.

| file | what it is |
|---|---|
| `trace.safetensors` | raw effects of the first view; `trace-first.safetensors` ... of further ones, `neighbours.safetensors` |
| `positions.safetensors` | with `--positions`: effects of single positions |
| `site.json` | the chosen site, its stability, sites of facts and clusters, and how all was measured |
| `index.html`, `*.png`, `*.svg` | the same to look at |
| `parts/` | finished batches; a killed trace goes on from them, and another weighting is read from them |
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..backbones import Encoded, MaskedDiffusionLM, Site, load
from ..errors import RemaskError
from ..facts import Fact, load_facts, write_atomically, write_json
from ..figures import png, save_figure
from ..random import digest
from ..reporting.trace import trace_figures, trace_page
from ..tracing.batch import batches
from ..tracing.effects import Mode, Trace, aggregate, check_mode, join, largest_difference
from ..tracing.positions import PositionTrace, trace_positions
from ..tracing.protocol import TraceConfig, View, check_rows
from ..tracing.sites import Choice, SiteRule, choose_site, cluster_sites, fact_sites, stability
from ..tracing.tie import check_known, trace, trace_batch
from .workers import Workers

AUTO_FACTS = 8  # traced for `--site auto`; Figure 2 of TimeROME-DLM traces as many


@dataclass(frozen=True)
class TraceJob:
    """What `remask trace` is asked for.

    Attributes:
        model: name or folder.
        facts: JSON Lines file; neighbours: another one, for the penalty beta of the rule.
        limit: facts to trace at most; None = all.
        config: the protocol of the first view; views: the subject tokens that are restored, each a trace of its own.
        rule: how the site is chosen.
        mode: how the numbers are computed.
        paraphrases: also trace the facts' other wordings.
        positions: also restore single positions, ROME's protocol.
        clusters: groups of facts that get a site of their own.
        keep_unknown: keep facts whose object the model does not produce.
        memory: bytes of activations; None = the default.
        bfloat16: run under bf16 autocast.
    """

    model: str
    facts: Path
    neighbours: Path | None = None
    limit: int | None = None
    config: TraceConfig = field(default_factory=TraceConfig)
    views: tuple[View, ...] = ("subject",)
    rule: SiteRule = field(default_factory=lambda: SiteRule(module="resid"))
    mode: Mode = "exact"
    paraphrases: bool = False
    positions: bool = False
    clusters: int = 1
    keep_unknown: bool = False
    memory: int | None = None
    bfloat16: bool = False


@dataclass(frozen=True)
class Wordings:
    """Rows to trace: token ids, the fact that each words, and what was left out (id -> reason)."""

    rows: tuple[Encoded, ...]
    facts: tuple[str, ...]
    skipped: Mapping[str, str]


def wordings(lm: MaskedDiffusionLM, facts: Sequence[Fact], *, paraphrases: bool = False) -> Wordings:
    """The facts as rows, with their paraphrases as `id#1`, `id#2`, ... when asked for."""
    rows, owners, skipped = [], [], {}
    for fact in facts:
        rows.append(lm.encode(fact))
        owners.append(fact.id)
        for number, prompt in enumerate(fact.paraphrases if paraphrases else (), start=1):
            name = f"{fact.id}#{number}"
            if fact.subject not in prompt:
                skipped[name] = f"the paraphrase does not hold the subject {fact.subject!r}"
                continue
            rows.append(replace(lm.encode(fact, prompt), id=name))
            owners.append(fact.id)
    return Wordings(tuple(rows), tuple(owners), skipped)


def run_trace(
    job: TraceJob, out: Path, console: Console | None = None, load_options: Mapping[str, Any] | None = None, command: str = ""
) -> dict[str, Any] | None:
    """Trace into `out`; returns the content of site.json, None in every process but the first.

    Raises:
        RemaskError: whatever the facts, the model or the options are refused for.
    """
    check_mode(job.mode)
    configs = {view: replace(job.config, view=view) for view in job.views}
    workers, started = Workers.here(), time.perf_counter()
    options = dict(load_options or {})
    if workers.device is not None:
        options.setdefault("device", workers.device)
    lm = load(job.model, **options)
    chosen = load_facts(job.facts)
    asked = wordings(lm, chosen[: job.limit], paraphrases=job.paraphrases)
    others = None if job.neighbours is None else wordings(lm, load_facts(job.neighbours))
    runner = _Runner(lm, lm.fingerprint(), job, workers, out / "parts", console)
    traces = {view: runner.trace(asked, config, f"view {view}") for view, config in configs.items()}
    near = None if others is None else runner.trace(others, configs[job.views[0]], "neighbours")
    if workers.index:
        return None
    first, undefined = _defined(traces[job.views[0]], job.rule)
    asked = replace(asked, skipped={**asked.skipped, **undefined})
    positions = runner.positions(asked, first) if job.positions else None
    record = _record(job, first, near, asked, len(chosen))
    record["trace"] |= {
        "command": command,
        "blocks": lm.counters.sequence_blocks,
        "seconds": round(time.perf_counter() - started, 1),
        "processes": workers.count,
    }
    _write(out, record, traces, near, positions, job.rule)
    return record


@dataclass(frozen=True)
class _Runner:
    """Traces row sets batch by batch into files, shared with the other processes."""

    lm: MaskedDiffusionLM
    model: str  # its fingerprint, a pass over all weights
    job: TraceJob
    workers: Workers
    folder: Path
    console: Console | None

    def trace(self, asked: Wordings, config: TraceConfig, purpose: str) -> Trace:
        """Every process traces its share; all of them return the whole."""
        check_rows(asked.rows)
        job, model = self.job, self.model
        owners = dict(zip((row.id for row in asked.rows), asked.facts, strict=True))
        parts = [[asked.rows[i] for i in batch] for batch in batches(asked.rows, config)]
        # The fingerprint is of the weights alone: equal for bf16 weights in fp32, or with another mask token.
        shared = [model, self.lm.spec, self.lm.embedding.weight.dtype, config, job.mode, job.bfloat16, job.keep_unknown]
        files = [self.folder / f"{digest(*shared, part, [owners[row.id] for row in part])}.safetensors" for part in parts]
        weights = [sum(len(row.ids) * config.steps_of(row) ** 2 for row in part) for part in parts]
        with self.workers.bar(self.console) as progress:
            task = progress.add_task(f"tracing, {purpose}", total=sum(weights))
            for part, file in self.workers.share(list(zip(parts, files, strict=True)), purpose):
                if not file.is_file():
                    with torch.autocast(self.lm.device.type, torch.bfloat16, enabled=job.bfloat16):
                        found = trace_batch(
                            self.lm,
                            part,
                            config,
                            mode=job.mode,
                            facts=owners,
                            model=model,
                            keep_unknown=job.keep_unknown,
                            memory=job.memory,
                        )
                    found.save(file)
                done = sum(weight for weight, path in zip(weights, files, strict=True) if path.is_file())  # by all processes
                progress.update(task, completed=done)
            self.workers.wait()
            progress.update(task, completed=sum(weights))
        whole = join([Trace.load(file, model=model) for file in files], [row.id for row in asked.rows])
        check_known(whole, self.lm.name, purpose)
        return whole

    def positions(self, asked: Wordings, known: Trace) -> PositionTrace:
        """Single positions of the rows that were traced."""
        rows = [row for row in asked.rows if row.id in known.ids]
        with torch.autocast(self.lm.device.type, torch.bfloat16, enabled=self.job.bfloat16):
            return trace_positions(
                self.lm, rows, self.job.config, keep_unknown=True, memory=self.job.memory, progress=self.console is not None
            )


def _defined(found: Trace, rule: SiteRule) -> tuple[Trace, dict[str, str]]:
    """The rows that have an effect under the rule's weights, and why the others have none."""
    has = (~aggregate(found, rule.weights).isnan()).flatten(1).any(dim=1).tolist()
    reason = "one step, and no later one that --strict could read"
    kept = found.take([i for i, defined in enumerate(has) if defined])
    return kept, {name: reason for name, defined in zip(found.ids, has, strict=True) if not defined}


def _record(job: TraceJob, found: Trace, near: Trace | None, asked: Wordings, given: int) -> dict[str, Any]:
    """The content of site.json, without what the run itself cost."""
    rule, config = job.rule, found.config
    alone = replace(rule, beta=0.0)  # a fact's own site knows of no neighbours
    best = choose_site(found, rule, near)
    steps = (~found.clean.isnan()).sum(dim=1).tolist()
    groups = cluster_sites(found, job.clusters, alone)
    return {
        **best.site.to_dict(),
        "strongest": _choice(choose_site(found, replace(rule, module=None), near)),
        "stability": [
            {"layer": site.layer, "module": site.module, "share": share} for site, share in stability(found, rule, near)
        ],
        "facts": {name: _choice(choice) for name, choice in fact_sites(found, alone).items()},
        "clusters": [{**_choice(choice), "facts": list(names)} for choice, names in groups],
        "unknown": list(found.unknown),
        "skipped": dict(asked.skipped),
        "capped": {name: count for name, count in zip(found.ids, steps, strict=True) if count < config.steps},
        "rule": rule.to_dict(),
        "trace": {
            "model": job.model,
            "fingerprint": found.model,
            "facts": len(set(found.facts)),
            "rows": len(found.ids),
            "given": given,
            "asked": given if job.limit is None else min(job.limit, given),
            "steps": config.steps,
            "draws": config.draws,
            "corruption": config.corruption,
            "mode": found.mode,
            "estimand": found.estimand,
            "precision": found.precision,
        },
    }


def _choice(choice: Choice) -> dict[str, Any]:
    return {"layer": choice.site.layer, "module": choice.site.module, "step": choice.step, "effect": choice.score}


def _write(
    out: Path,
    record: dict[str, Any],
    traces: Mapping[View, Trace],
    near: Trace | None,
    positions: PositionTrace | None,
    rule: SiteRule,
) -> None:
    for stale in [*out.glob("trace-*.safetensors"), *out.glob("positions.*"), out / "neighbours.safetensors"]:
        stale.unlink(missing_ok=True)  # of an earlier run with other options
    for number, (view, found) in enumerate(traces.items()):
        found.save(out / (f"trace-{view}.safetensors" if number else "trace.safetensors"))
    if near is not None:
        near.save(out / "neighbours.safetensors")
    if positions is not None:
        positions.save(out / "positions.safetensors")
    write_json(out / "site.json", record)
    named = {str(view): found for view, found in traces.items()}
    drawn = trace_figures(named, rule.weights, Site.from_dict(record), positions)
    figures = {name: png(figure) for name, figure in drawn.items()}
    for name, figure in drawn.items():
        write_atomically(out / f"{name}.png", figures[name])
        save_figure(figure, out / f"{name}.svg")
    write_atomically(out / "index.html", trace_page(named, rule.weights, record, figures).encode())


def find_site(lm: MaskedDiffusionLM, where: str, facts: Sequence[Fact]) -> Site:
    """The site to edit: traced now on the first facts (`auto`), or read from a trace's folder or site.json.

    Raises:
        RemaskError: no such file, a file of another kind or of another model, or facts that cannot be traced.
    """
    if where == "auto":
        found = trace(lm, [lm.encode(fact) for fact in facts[:AUTO_FACTS]], progress=True)
        return choose_site(found, SiteRule(module="resid")).site
    path = site_file(where)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        site, model = Site.from_dict(data), str(data["trace"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RemaskError(f"{path}: not a site.json of a trace ({error}); give one, its folder, or 'auto'") from None
    if model != lm.fingerprint():
        raise RemaskError(f"{path}: a trace of another model: {model}, {lm.name} is {lm.fingerprint()}; trace again")
    return site


def site_file(where: str) -> Path:
    """The site.json that `--site` names, itself or by its folder."""
    return Path(where) / "site.json" if Path(where).is_dir() else Path(where)


def diff_traces(first: Path, second: Path) -> dict[str, Any]:
    """Largest differences of two traces of the same facts under the same protocol, nats.

    Raises:
        RemaskError: a folder without a trace, or traces that cannot be compared.
    """
    one, other = Trace.load(first), Trace.load(second)
    return {
        "modes": [one.mode, other.mode],
        "precisions": [one.precision, other.precision],
        "rows": len(one.ids),
        "largest": largest_difference(one, other),
        "scale": float(one.effects.nan_to_num().abs().max()),
    }
