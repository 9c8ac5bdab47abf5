"""`remask demo`: the library's main job on the bundled model, from question to proof, in under a minute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..backbones import MaskedDiffusionLM, load
from ..backbones.intervention import Intervention, NoEdit
from ..diffusion.sampler import SamplerConfig, generate
from ..editing.memory import EditMemory
from ..editing.steering import mean_delta
from ..evaluation.audit import Group, Plan, run_cells, states_of
from ..evaluation.benchmarks.base import Benchmark
from ..evaluation.benchmarks.registry import load_benchmark
from ..evaluation.generation import answers
from ..evaluation.records import ESTIMATOR, write_records
from ..evaluation.summary import LOGPROB, Scores, group_table, selectivity
from ..facts import Fact, write_atomically, write_json
from ..figures import png
from ..reporting import levels, render
from ..reporting.html import denoising_strip
from ..reporting.tables import group_tables
from ..tracing import SiteRule, TraceConfig, choose_site, trace
from ..tracing.plots import heatmap
from .edits import build_edit, tuned

QUESTIONS = 5
ALPHA = 1.0  # the natural strength: at its keys the residual becomes the anchor's
KINDS = ("work", "city", "instrument", "book", "pet")  # attributes that are asked about


def run_demo(out: Path, console: Console) -> Scores:
    """Trace, forget, prove and undo one person of the closed world; the page lands in `out/index.html`."""
    started = time.perf_counter()
    lm, twin = load("tiny"), load("tiny-reference")
    groups = load_benchmark("closed-world", None)
    person = groups.forget[0].group
    forget = [fact for fact in groups.forget if fact.group == person]
    asked = [fact for kind in KINDS for fact in forget if f"/{kind}/short" in fact.id][:QUESTIONS]
    probe = torch.tensor([lm.encode(asked[0]).ids])
    original = lm.logits(probe)

    console.rule(f"[bold]1. What the model knows about {person}")
    before, never = _ask(lm, asked), _ask(twin, asked)
    _print_answers(console, asked, {"before": before, "never taught": never})

    console.rule("[bold]2. Where the facts are carried")
    traced = trace(lm, [lm.encode(fact) for fact in forget], TraceConfig(draws=2), progress=True)
    traced_site = choose_site(traced, SiteRule(module="resid")).site
    note = (
        f"The residual stream carries them most at layer {traced_site.layer}; the memory acts at layer "
        f"{tuned('tiny', 'default')['layer']}, the best edit layer on other people (a trace says where a fact passes, not "
        "where an edit is most selective)."
    )
    console.print(note)

    console.rule("[bold]3. Forget")
    memory = build_edit(lm, "default", forget, groups.fit, alpha=ALPHA)
    assert isinstance(memory, EditMemory)
    console.print(
        f"memory: {len(forget)} facts, {len(memory.keys)} keys at layer {memory.site.layer}, alpha {memory.alpha:.3g}: "
        "no gradient, no weight changed"
    )
    bystanders = _bystanders(groups.scored, person)
    with memory.attached(lm):
        after, others_after = _ask(lm, asked), _ask(lm, [fact for _, fact in bystanders])
    others_before = _ask(lm, [fact for _, fact in bystanders])
    _print_answers(console, asked, {"before": before, "after": after, "never taught": never})
    _print_answers(
        console,
        [fact for _, fact in bystanders],
        {"before": others_before, "after": others_after},
        [who for who, _ in bystanders],
    )

    console.rule("[bold]4. Prove")
    plan = _plan(lm, forget, groups, person)
    cells = list(plan.cells(states_of(lm, memory, twin, mean_delta(memory)), seed=0))
    scores = Scores([record for part in run_cells(cells, groups.name) for record in part])
    table, ratios = group_table(scores, {group.name: group.side for group in plan.groups}), selectivity(scores)
    summary = _summary(table, ratios)
    for part in (*group_tables(table, "control: a mean-delta vector of equal strength"), summary):
        console.print(part)

    console.rule("[bold]5. Undo")
    identical = torch.equal(lm.logits(probe), original)
    undone = (
        "The memory was detached: the logits are bit-identical to those before it was attached."
        if identical
        else "The logits differ from those before the memory was attached."
    )
    console.print(undone)

    pictures = {"heatmap": png(heatmap(traced, site=traced_site)), "levels": png(levels(scores))}
    for name, data in pictures.items():
        write_atomically(out / f"{name}.png", data)
    page = render(
        "demo.html.j2",
        person=person,
        model={"name": lm.name, "parameters": lm.num_parameters, "fingerprint": lm.fingerprint()},
        memory=memory.describe(),
        version=__version__,
        questions=[
            {"prompt": fact.prompt, "truth": fact.answer, "before": b, "after": a, "never": n}
            for fact, b, a, n in zip(asked, before, after, never, strict=True)
        ],
        bystanders=[
            {"who": who, "prompt": fact.prompt, "before": b, "after": a}
            for (who, fact), b, a in zip(bystanders, others_before, others_after, strict=True)
        ],
        site_note=note,
        **pictures,
        table=table,
        summary=summary,
        draws=plan.draws * plan.replicates,
        strip=_strip(lm, memory, next(fact for fact in forget if fact.id.endswith("/book/long"))),
        undone=undone,
        seconds=time.perf_counter() - started,
    )
    write_atomically(out / "index.html", page.encode())
    write_records(out / "records.jsonl", scores.records)
    results = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint()},
        "edit": {"kind": memory.kind, **memory.describe()},
        "estimator": {"name": ESTIMATOR, "draws": plan.draws * plan.replicates, "seed": 0},
        "sampler": plan.sampler.to_dict(),
        "groups": table,
        "selectivity": ratios,
    }
    write_json(out / "results.json", results, indent=None, allow_nan=False)
    console.print(f"\n[bold]{out / 'index.html'}[/] written in {time.perf_counter() - started:.0f} s")
    return scores


def _ask(lm: MaskedDiffusionLM, facts: Sequence[Fact]) -> list[str]:
    return answers(lm, [lm.encode(fact) for fact in facts])


def _bystanders(scored: dict[str, list[Fact]], person: str) -> list[tuple[str, Fact]]:
    """Two facts of a neighbour of `person` and two of an unrelated person."""
    near = [fact for fact in scored["neighbours"] if fact.id in _near_ids(scored, person)]
    pick = lambda facts: [fact for kind in KINDS[:2] for fact in facts if f"/{kind}/short" in fact.id]  # noqa: E731
    first = [fact for fact in near if fact.group == near[0].group]
    other = [fact for fact in scored["retain"] if fact.group == scored["retain"][0].group]
    return [("neighbour", fact) for fact in pick(first)] + [("unrelated", fact) for fact in pick(other)]


def _near_ids(scored: dict[str, list[Fact]], person: str) -> set[str]:
    return {other for fact in scored["paraphrase"] if fact.group == person for other in fact.neighbours} | {
        other.replace("/short", "/long") for fact in scored["paraphrase"] if fact.group == person for other in fact.neighbours
    }


def _plan(lm: MaskedDiffusionLM, forget: list[Fact], benchmark: Benchmark, person: str) -> Plan:
    """Groups of a size that suits a demonstration; no attacks."""
    scored, near = benchmark.scored, _near_ids(benchmark.scored, person)
    rows = {
        "forget": forget,
        "paraphrase": [fact for fact in scored["paraphrase"] if fact.group == person],
        "neighbours": [fact for fact in scored["neighbours"] if fact.id in near],
        "retain": scored["retain"][::2],
        "general": scored["general"][::2],
        "unknown": scored["unknown"][::3],
    }
    tasks = ("log-probability", "generation")
    groups = tuple(
        Group(name, "forget" if name == "forget" else benchmark.side(name), tuple(facts), tasks) for name, facts in rows.items()
    )
    return Plan(benchmark.name, groups, {}, (), 4, 4, SamplerConfig.default(lm), "fp32", {})


def _strip(lm: MaskedDiffusionLM, edit: Intervention, fact: Fact) -> dict[str, Any]:
    ids = lm.encode_prompt(fact.prompt)
    strips = {}
    for name, intervention in (("before", NoEdit()), ("after", edit)):
        with intervention.attached(lm):
            run = generate(lm, [ids], SamplerConfig.default(lm), history=True)[0]
        strips[name] = denoising_strip(lm, len(ids), run.history)
    return {"prompt": fact.prompt, **strips}


def _summary(table: list[dict[str, Any]], ratios: dict[str, Any]) -> str:
    forget = table[0]["metrics"][LOGPROB]["change"]["after"]
    memory, control = ratios["after"], ratios["mean-delta"]
    return (
        f"The facts lost {-forget['mean']:.1f} nats a row [{-forget['high']:.1f}, {-forget['low']:.1f}]. For each nat that a "
        f"retained row lost, {memory['mean']:.0f} were forgotten [{memory['low']:.0f}, {memory['high']:.0f}] (the mean-delta "
        f"control: {control['mean']:.1f})."
    )


def _print_answers(
    console: Console, facts: Sequence[Fact], columns: dict[str, list[str]], who: Sequence[str] | None = None
) -> None:
    table = Table(*(["who"] if who else []), "question", *columns)
    for i, fact in enumerate(facts):
        table.add_row(*([who[i]] if who else []), fact.prompt, *(values[i] or "(empty)" for values in columns.values()))
    console.print(table)
