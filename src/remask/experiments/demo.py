"""`remask demo`: the library's main job on the bundled model, from question to proof, in under a minute."""

from __future__ import annotations

import json
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
from ..diffusion.masks import MaskBank
from ..diffusion.sampler import SamplerConfig, generate
from ..editing.memory import EditMemory
from ..editing.steering import mean_delta
from ..evaluation.audit import Audit, run_audit
from ..evaluation.benchmarks.registry import load_benchmark
from ..evaluation.generation import answers
from ..evaluation.statistics import mean_interval
from ..facts import Fact, write_atomically
from ..reporting import levels, render
from ..reporting.html import denoising_strip
from ..tracing import TraceConfig, choose_site, heatmap, trace
from ..tracing.plots import png
from .edits import build_edit, tuned

QUESTIONS = 5
TRACED = 2
ALPHA = 1.5  # calibration stops at the prompt-masked level, where short answers can still be guessed; this goes past it
KINDS = ("work", "city", "instrument", "book", "pet")  # attributes that are asked about


def run_demo(out: Path, console: Console) -> Audit:
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
    traced = trace(
        lm, [lm.encode(fact) for fact in forget if "/book/" in fact.id][:TRACED], TraceConfig(draws=2), progress=True
    )
    traced_site = choose_site(traced, "resid")
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
    scored = _scored(forget, groups.scored, person)
    audit = run_audit(lm, memory, scored, MaskBank(), reference=twin, control=mean_delta(memory))
    _print_audit(console, audit)

    console.rule("[bold]5. Undo")
    identical = torch.equal(lm.logits(probe), original)
    undone = (
        "The memory was detached: the logits are bit-identical to those before it was attached."
        if identical
        else "The logits differ from those before the memory was attached."
    )
    console.print(undone)

    pictures = {"heatmap": png(heatmap(traced, traced_site)), "levels": png(levels(audit))}
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
        table=audit.table(),
        summary=_summary(audit),
        estimator=audit.header["estimator"],
        strip=_strip(lm, memory, next(fact for fact in forget if fact.id.endswith("/book/long"))),
        undone=undone,
        seconds=time.perf_counter() - started,
    )
    write_atomically(out / "index.html", page.encode())
    write_atomically(out / "results.json", (json.dumps(audit.to_dict(), ensure_ascii=False) + "\n").encode())
    console.print(f"\n[bold]{out / 'index.html'}[/] written in {time.perf_counter() - started:.0f} s")
    return audit


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


def _scored(forget: list[Fact], scored: dict[str, list[Fact]], person: str) -> dict[str, Sequence[Fact]]:
    """Groups of a size that suits a demonstration."""
    near = _near_ids(scored, person)
    return {
        "forget": forget,
        "paraphrase": [fact for fact in scored["paraphrase"] if fact.group == person],
        "neighbours": [fact for fact in scored["neighbours"] if fact.id in near],
        "retain": scored["retain"][::2],
        "general": scored["general"][::2],
        "unknown": scored["unknown"][::3],
    }


def _strip(lm: MaskedDiffusionLM, edit: Intervention, fact: Fact) -> dict[str, Any]:
    ids = lm.encode_prompt(fact.prompt)
    strips = {}
    for name, intervention in (("before", NoEdit()), ("after", edit)):
        with intervention.attached(lm):
            run = generate(lm, [ids], SamplerConfig.default(lm), history=True)[0]
        strips[name] = denoising_strip(lm, len(ids), run.history)
    return {"prompt": fact.prompt, **strips}


def _summary(audit: Audit) -> str:
    forget, memory, control = mean_interval(audit.change("forget")), audit.selectivity(), audit.selectivity("mean-delta")
    return (
        f"The facts lost {-forget.mean:.1f} nats a row [{-forget.high:.1f}, {-forget.low:.1f}]. For each nat that a retained "
        f"row lost, {memory['mean']:.0f} were forgotten [{memory['low']:.0f}, {memory['high']:.0f}] (the mean-delta control: "
        f"{control['mean']:.1f})."
    )


def _print_answers(
    console: Console, facts: Sequence[Fact], columns: dict[str, list[str]], who: Sequence[str] | None = None
) -> None:
    table = Table(*(["who"] if who else []), "question", *columns)
    for i, fact in enumerate(facts):
        table.add_row(*([who[i]] if who else []), fact.prompt, *(values[i] or "(empty)" for values in columns.values()))
    console.print(table)


def _print_audit(console: Console, audit: Audit) -> None:
    table = Table("group", "n", "before", "after", "change [95 %]", "mean-delta", "never trained", "exact", "junk")
    for line in audit.table():
        change = line["after"]["change"]
        table.add_row(
            line["group"],
            str(line["n"]),
            f"{line['before']['logprob']['mean']:.2f}",
            f"{line['after']['logprob']['mean']:.2f}",
            f"{change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]",
            f"{line['mean-delta']['change']['mean']:+.2f}",
            f"{line['never trained']['logprob']['mean']:.2f}",
            f"{line['before']['exact']['mean']:.2f} > {line['after']['exact']['mean']:.2f}",
            f"{line['before']['junk']['mean']:.2f} > {line['after']['junk']['mean']:.2f}",
        )
    console.print(table)
    console.print(_summary(audit))
