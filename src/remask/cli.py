"""The `remask` command. Reading commands take `--json`; bad input is one sentence on stderr and exit code 2."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperGroup

from .errors import RemaskError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Knowledge editing and machine unlearning in masked diffusion language models.",
)
edit_app = typer.Typer(no_args_is_help=True, help="Build edit memories and look into their files.")
app.add_typer(edit_app, name="edit")


class _RunGroup(TyperGroup):
    """`remask audit MODEL ...` is `remask audit run MODEL ...`; so for `remask trace`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


audit_app = typer.Typer(
    cls=_RunGroup,
    no_args_is_help=True,
    help="Prove what an edit forgot: `remask audit MODEL --benchmark NAME -o DIR`, then compare two folders with `diff`.",
)
app.add_typer(audit_app, name="audit")
trace_app = typer.Typer(
    cls=_RunGroup,
    no_args_is_help=True,
    help="Find where and when facts are carried: `remask trace MODEL --facts FILE -o DIR`; compare two traces with `diff`.",
)
app.add_typer(trace_app, name="trace")

console = Console()
progress = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="bundled name (tiny, tiny-tofu, ...) or checkpoint folder")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Facts = Annotated[Path, typer.Option("--facts", help="facts to work on, JSON Lines")]
Load = Annotated[
    list[str] | None,
    typer.Option("-L", "--load", metavar="KEY=VALUE", help="how to load the model: family, mask_id, dtype, device, chat, ..."),
]
SiteOption = Annotated[
    str | None, typer.Option("--site", metavar="auto|PATH", help="trace the facts now (auto), or the folder of a trace")
]
Data = Annotated[Path | None, typer.Option("--data", help="folder with the benchmark's files")]


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder of the report")] = Path("report")) -> None:
    """Trace, forget, prove and undo one person on the bundled model; writes report/index.html."""
    from .experiments.demo import run_demo

    run_demo(out, console)


@app.command()
def models(as_json: Json = False) -> None:
    """List the families of models that load, how each is verified, ids and limits; and the bundled models."""
    from .assets import bundled_models
    from .backbones.inspection import list_families

    rows = list_families()
    if as_json:
        _print_json({"families": rows, "bundled": bundled_models()})
        return
    table = Table(
        Column("family", no_wrap=True),
        Column("models, limits"),
        Column("verified", no_wrap=True),
        Column("mask", no_wrap=True),
        title="families",
        show_lines=True,
    )
    for row in rows:
        mask = "\n".join(str(row[key]) for key in ("mask_token", "mask_id") if row[key] is not None) or "in its config"
        title = escape(row["models"]) + (f"\n[dim]{escape(row['note'])}[/]" if row["note"] else "")
        table.add_row(row["family"], title, row["verified"], escape(mask))
    console.print(table)
    console.print(
        "verified: goldens = numbers of the original code; adapted = trained with this library; read = source only\n"
        f"bundled: {', '.join(bundled_models())}"
    )


@app.command()
def inspect(model: Model, load_options: Load = None, as_json: Json = False) -> None:
    """Show what a model is (family, size, ids, template, sites) and which jobs fit this machine's memory."""
    from .backbones.inspection import inspect as run

    report = run(model, **_load_options(load_options))
    if as_json:
        _print_json(report)
        return
    table = Table("property", "value", title=str(model))
    for key, value in report.items():
        if key not in ("jobs", "memory_free"):
            table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    console.print(table)
    if report["loads"]:
        jobs = Table("job", "GB", "fits", title=f"memory, estimated; {report['memory_free'] / 1e9:.1f} GB free")
        for job in report["jobs"]:
            jobs.add_row(job["name"], f"{job['bytes'] / 1e9:.1f}", "yes" if job["fits"] else "[red]no[/]")
        console.print(jobs)


@app.command()
def teach(
    recipe: Annotated[str, typer.Argument(help="bundled recipe (tiny, tiny-tofu, ...) or YAML file")],
    out: Annotated[Path, typer.Option("--out", help="folder for the model")],
    data: Data = None,
    resume: Annotated[bool, typer.Option(help="continue from the checkpoint in --out")] = False,
) -> None:
    """Teach a model facts by masked-diffusion fine-tuning."""
    from .experiments.teaching import read_recipe
    from .experiments.teaching import teach as run

    log = run(read_recipe(recipe), out, data, resume=resume)
    table = Table("split", "rows", "exact match", title=f"{out}: {log['epochs']} epochs in {log['seconds']:.0f} s")
    for kind, splits in log["exact_match"].items():
        for name, rate in splits.items():
            table.add_row(f"{name} ({kind})", str(rate["rows"]), f"{rate['exact_match']:.1%}")
    console.print(table)


@app.command()
def adapt(
    model: Annotated[str, typer.Argument(help="causal model: folder or hub id")],
    text: Annotated[list[Path], typer.Option("--text", help="text to train on, .jsonl or plain; may be given several times")],
    out: Annotated[Path, typer.Option("--out", help="folder for the model, adapt.json and curve.png")],
    steps: Annotated[int, typer.Option(min=1, help="training steps")],
    held_out: Annotated[
        list[Path] | None, typer.Option("--held-out", help="text to score on; by default 10 % of --text")
    ] = None,
    mask_token: Annotated[str | None, typer.Option(help="special token to reuse as mask, or text of a new one")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences a step, over all processes")] = 8,
    length: Annotated[int, typer.Option(min=2, help="tokens a sequence")] = 128,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="peak of the schedule")] = 2e-4,
    anneal: Annotated[float, typer.Option(min=0, max=1, help="share of the steps that open the causal mask; 0 drops it")] = 0.0,
    lora: Annotated[int, typer.Option(min=0, help="rank of adapters; 0 trains all weights")] = 0,
    seed: Annotated[int, typer.Option(help="seed of batches and masks")] = 0,
    resume: Annotated[bool, typer.Option(help="continue from the checkpoint in --out")] = False,
) -> None:
    """Turn a causal language model into a masked diffusion model; launch with accelerate to use several devices."""
    from .experiments.adapting import adapt as run
    from .experiments.adapting import read_groups
    from .unlearning.adapting import AdaptConfig

    config = AdaptConfig(
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        length=length,
        learning_rate=learning_rate,
        anneal=anneal,
        lora=lora,
    )
    apart = read_groups(held_out) if held_out else None
    record = run(model, read_groups(text), out, config, held_out=apart, mask_token=mask_token, resume=resume)
    if record is None:  # not the first process
        return
    table = Table("step", "tokens", "hidden", "nats a hidden token", "accuracy", title=f"{out}: held-out text")
    for point in (record["curve"][0], record["curve"][-1]):
        for rate, score in point["held_out"].items():
            table.add_row(
                str(point["step"]),
                str(point["tokens"]),
                f"{float(rate):.0%}",
                f"{score['nats']:.2f} ± {score['nats_stderr']:.2f}",
                f"{score['accuracy']:.1%} ± {score['accuracy_stderr']:.1%}",
            )
    console.print(table)


@trace_app.command("run")
def trace_run(
    model: Model,
    facts: Facts,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the trace, site.json, pictures and the page")],
    mode: Annotated[
        str, typer.Option(help="exact; sweep (fixed trajectory, another estimand); reference (hooks, slow)")
    ] = "exact",
    preset: Annotated[str, typer.Option(help="default, or paper: the literal equations, ten draws")] = "default",
    steps: Annotated[int | None, typer.Option(help="denoising steps, at most one a token")] = None,
    draws: Annotated[int | None, typer.Option(help="noise samples a fact")] = None,
    corruption: Annotated[str, typer.Option(help="of the subject: add noise, replace by noise, or mask")] = "add",
    noise: Annotated[float, typer.Option(help="noise in standard deviations of the subject's embeddings")] = 3.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="new noise at every step")] = False,
    readout: Annotated[
        str | None, typer.Option(help="committed object tokens: frozen (keep their value) or raw (read on, as the paper)")
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(help="restore the whole subject, its first or its last token; may be given several times"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    gamma: Annotated[float | None, typer.Option(help="weight gamma^(s' - s) of later steps")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="later steps only, not the restored one")] = False,
    normalise: Annotated[bool | None, typer.Option(help="divide by the sum of the weights")] = None,
    per_token: Annotated[bool | None, typer.Option(help="mean over object tokens; otherwise their sum")] = None,
    module: Annotated[str, typer.Option(help="module to edit: resid, attn, mlp, or any")] = "resid",
    signed: Annotated[bool, typer.Option("--signed", help="mean effect over facts instead of its absolute value")] = False,
    neighbours: Annotated[Path | None, typer.Option(help="facts that the site should not carry, JSON Lines")] = None,
    beta: Annotated[float | None, typer.Option(help="weight of the neighbours; 1 with --neighbours")] = None,
    smooth: Annotated[int, typer.Option(help="layers to each side that scores are averaged over")] = 0,
    clusters: Annotated[int, typer.Option(min=1, help="groups of facts with a site of their own")] = 1,
    paraphrases: Annotated[bool, typer.Option("--paraphrases", help="also trace the facts' other wordings")] = False,
    positions: Annotated[bool, typer.Option("--positions", help="also restore single positions (ROME)")] = False,
    keep_unknown: Annotated[
        bool, typer.Option("--keep-unknown", help="trace also facts whose object the model does not produce")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="trace at most this many facts")] = None,
    memory: Annotated[float | None, typer.Option(help="GB that activations may take")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 autocast")] = "fp32",
    processes: Annotated[int, typer.Option(min=1, help="processes on this machine that share the facts, by torchrun")] = 1,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Restore every module at every layer and denoising step, and see where the object comes back.

    A killed trace goes on where it was when the same command runs again; another weighting or rule is computed from the same
    effects. On several machines or GPUs start it with `accelerate launch -m remask trace ...`.
    """
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        _torchrun(processes)
        return
    from dataclasses import replace

    from .experiments.tracing import TraceJob, run_trace
    from .reporting.tables import trace_tables
    from .tracing import SiteRule
    from .tracing import preset as trace_preset

    config, weights = trace_preset(
        preset,
        **{k: value for k, value in (("steps", steps), ("draws", draws), ("readout", readout)) if value is not None},
        corruption=corruption,
        noise=noise,
        fresh=fresh,
        seed=seed,
    )
    given: dict[str, Any] = {"gamma": gamma, "normalise": normalise, "per_token": per_token, "strict": strict or None}
    weights = replace(weights, **{key: value for key, value in given.items() if value is not None})
    if beta is not None and neighbours is None:
        raise RemaskError("--beta weighs the facts of --neighbours; give that file")
    penalty = (1.0 if beta is None else beta) if neighbours is not None else 0.0
    if precision not in ("fp32", "bf16"):
        raise RemaskError(f"--precision {precision!r} is neither fp32 nor bf16")
    job = TraceJob(
        model,
        facts,
        neighbours=neighbours,
        limit=limit,
        config=config,
        views=tuple(dict.fromkeys(view or ["subject"])),  # type: ignore[arg-type]  # the protocol checks the names
        rule=SiteRule(weights, None if module == "any" else module, signed, penalty, smooth),  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        paraphrases=paraphrases,
        positions=positions,
        clusters=clusters,
        keep_unknown=keep_unknown,
        memory=None if memory is None else int(memory * 1e9),
        bfloat16=precision == "bf16",
    )
    record = run_trace(job, out, progress, _load_options(load_options), shlex.join(["remask", *sys.argv[1:]]))
    if record is None:  # not the first process
        return
    if as_json:
        _print_json(record)
        return
    for part in trace_tables(record):
        console.print(part)
    progress.print(f"page: {out / 'index.html'}; raw effects: {out / 'trace.safetensors'}")


@trace_app.command("diff")
def trace_diff(
    first: Annotated[Path, typer.Argument(help="folder of a trace, or its file")],
    second: Annotated[Path, typer.Argument(help="another one, of the same facts on the same model")],
    as_json: Json = False,
) -> None:
    """The largest differences of two traces; refuses other facts, models, protocols and estimands."""
    from .experiments.tracing import diff_traces

    result = diff_traces(first, second)
    if as_json:
        _print_json(result)
        return
    table = Table("tensor", "largest difference", title=f"{' against '.join(result['modes'])}, {result['rows']} rows")
    for name, value in result["largest"].items():
        table.add_row(name, f"{value:.2g}")
    console.print(table)
    console.print(f"the largest effect is {result['scale']:.3g} nats")


@edit_app.command("build")
def edit_build(
    model: Model,
    facts: Facts,
    output: Annotated[Path, typer.Option("-o", "--output", help="memory file to write")],
    retain: Annotated[Path | None, typer.Option("--retain", help="facts to leave alone, JSON Lines")] = None,
    preset: Annotated[str, typer.Option(help="default or paper")] = "default",
    layer: Annotated[int | None, typer.Option(help="layer to edit; bundled models have a tuned one")] = None,
    site: SiteOption = None,
    alpha: Annotated[str, typer.Option(help="strength, or 'calibrated'")] = "calibrated",
    reference: Annotated[str | None, typer.Option(help="model that never saw the facts: go no lower than its level")] = None,
    load_options: Load = None,
) -> None:
    """Build an edit memory that forgets facts, and write it to a file."""
    from .backbones import Site, load
    from .editing.calibrate import target_level
    from .editing.memory import PRESETS, EditMemory
    from .experiments.edits import build_edit
    from .experiments.tracing import find_site
    from .facts import load_facts

    if preset not in PRESETS:
        raise RemaskError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    _only_one(layer, site)
    lm = load(model, **_load_options(load_options))
    chosen = load_facts(facts)
    kept = load_facts(retain) if retain else []
    strength = _alpha(alpha)
    where = Site(layer) if layer is not None else find_site(lm, site, chosen) if site else None
    level = (
        target_level(lm, chosen, load(reference, **_load_options(load_options)) if reference else None)
        if strength is None
        else None
    )
    edit = build_edit(lm, preset, chosen, kept, site=where, alpha=strength, level=level)
    assert isinstance(edit, EditMemory)
    edit.save(output)
    console.print(
        f"{output}: {len(chosen)} facts, {len(edit.keys)} keys at layer {edit.site.layer}, alpha {edit.alpha:.3g}, "
        f"{output.stat().st_size / 1e6:.2f} MB"
    )


@edit_app.command("list")
def edit_list(file: Annotated[Path, typer.Argument(help="memory file")], as_json: Json = False) -> None:
    """Show what a memory file holds."""
    from .editing import EditMemory

    memory = EditMemory.load(file)
    if as_json:
        _print_json({**memory.describe(), "fact_ids": list(memory.fact_ids)})
        return
    console.print(
        f"preset [bold]{memory.config.preset}[/], layer {memory.site.layer} {memory.site.module}, alpha {memory.alpha:.3g}, "
        f"model {memory.model}, condition {memory.solution.condition:.1e}"
    )
    table = Table("fact", "keys", title=f"{len(memory.fact_ids)} facts")
    for index, name in enumerate(memory.fact_ids):
        table.add_row(name, str(int((memory.owner == index).sum())))
    console.print(table)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="question; may be given several times")] = None,
    ids: Annotated[list[str] | None, typer.Option("--ids", help="prompt as token ids, for a folder without tokenizer")] = None,
    edit: Annotated[Path | None, typer.Option(help="edit file to attach")] = None,
    length: Annotated[int | None, typer.Option(help="response slots")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="preset at its published settings; by default the model's, greedy")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; by default one token a step")] = None,
    block_length: Annotated[int | None, typer.Option(help="masks denoised together; length must be a multiple")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = greedy")] = None,
    cfg: Annotated[float, typer.Option(help="classifier-free guidance scale")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    strip: Annotated[bool, typer.Option(help="show the canvas after every step")] = False,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Answer prompts, with or without an edit."""
    from .backbones import load
    from .diffusion.sampler import SamplerConfig
    from .diffusion.sampler import generate as run

    lm = load(model, **_load_options(load_options))
    given = {"temperature": temperature, "steps": steps, "gen_length": length, "block_length": block_length}
    changes = {"cfg_scale": cfg, "seed": seed} | {key: value for key, value in given.items() if value is not None}
    config = SamplerConfig.preset(sampler, **changes) if sampler else SamplerConfig.default(lm, **changes)
    prompts = [(text, lm.encode_prompt(text)) for text in prompt or []] + [(text, _token_ids(text)) for text in ids or []]
    if not prompts:
        raise RemaskError("nothing to answer; give --prompt or --ids")
    show = lm.decode if lm.tokenizer is not None else lambda tokens: " ".join(map(str, tokens))
    with _attached(lm, edit):
        results = run(lm, [start for _, start in prompts], config, keys=[text for text, _ in prompts], history=strip or as_json)
    records = [
        {
            "prompt": text,
            "answer": show(result.response),
            "canvas": [show(state[len(start) :]) for state in result.history],
        }
        for (text, start), result in zip(prompts, results, strict=True)
    ]
    if as_json:
        _print_json({"model": lm.name, "edit": str(edit) if edit else None, "sampler": config.to_dict(), "rows": records})
        return
    for record in records:
        console.print(f"[dim]{record['prompt']}[/]\n{record['answer']}")
        if strip:
            for step, state in enumerate(record["canvas"]):
                console.print(f"  {step:>3}  {state}", markup=False, highlight=False)


@app.command()
def score(
    model: Model,
    facts: Facts,
    edit: Annotated[Path | None, typer.Option(help="edit file to attach")] = None,
    draws: Annotated[int, typer.Option(help="masks a replicate (4 replicates)")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the mask bank")] = 0,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Log-probability and greedy answer of every fact."""
    from .backbones import load
    from .diffusion.masks import MaskBank
    from .diffusion.sampler import SamplerConfig
    from .evaluation.records import ESTIMATOR
    from .evaluation.statistics import mean_interval
    from .evaluation.tasks import Setting, generation, log_probability
    from .facts import load_facts

    lm = load(model, **_load_options(load_options))
    chosen = load_facts(facts)
    bank = MaskBank(draws=draws, seed=seed)
    setting = Setting(bank, SamplerConfig.default(lm))
    with _attached(lm, edit):
        scores = log_probability(lm, chosen, setting, False)
        written = {(value.id, value.metric): value.value for value in generation(lm, chosen, setting, False)}
    blind = log_probability(lm, chosen, setting, True)
    mean = mean_interval([float(score.value) for score in scores])
    rows: list[dict[str, Any]] = [
        {
            "id": score.id,
            "tokens": score.tokens,
            "logprob": score.value,
            "stderr": score.stderr,
            "output": written[score.id, "output"],
            "exact": bool(written[score.id, "exact match"]),
            "rouge": written[score.id, "ROUGE-L recall"],
            "junk": bool(written[score.id, "junk rate"]),
            "prompt_masked": masked.value,
        }
        for score, masked in zip(scores, blind, strict=True)
    ]
    if as_json:
        lengths = [(row["id"], row["tokens"]) for row in rows]
        _print_json(
            {
                "model": lm.name,
                "fingerprint": lm.fingerprint(),
                "edit": str(edit) if edit else None,
                "estimator": {"name": ESTIMATOR, "draws": draws * bank.replicates, "bank": bank.fingerprint(lengths)},
                "mean": mean.to_dict(),
                "rows": rows,
            }
        )
        return
    table = Table("fact", "log p (nats)", "+-", "prompt masked", "greedy answer", "exact", title=f"{lm.name}")
    for row in rows:
        numbers = [f"{row[key]:.2f}" for key in ("logprob", "stderr", "prompt_masked")]
        table.add_row(row["id"], *numbers, row["output"], "yes" if row["exact"] else "no")
    console.print(table)
    console.print(f"mean {mean.mean:.2f} nats [{mean.low:.2f}, {mean.high:.2f}], {mean.n} facts, {draws * 4} masks each")


@audit_app.command("run")
def audit_run(
    model: Model,
    benchmark: Annotated[str, typer.Option(help="closed-world, tofu:forget01, rwku:NAME, ...; docs/benchmarks.md lists them")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for records, results and the page")],
    edit: Annotated[str, typer.Option(help="default, paper, mean-delta, none, or an edit file")] = "default",
    data: Data = None,
    alpha: Annotated[str, typer.Option(help="strength, or 'calibrated' to --level")] = "calibrated",
    layer: Annotated[int | None, typer.Option(help="layer to edit")] = None,
    site: SiteOption = None,
    reference: Annotated[str | None, typer.Option(help="model that never saw the forget set")] = None,
    level: Annotated[str, typer.Option(help="calibrate to: never-trained, prompt-masked, or auto (the higher)")] = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="repetitions of log-probabilities: mask bank and partial states")] = 1,
    precision: Annotated[str, typer.Option(help="of the measurement: fp32, bf16, or auto (bf16 where it is fast)")] = "auto",
    steps: Annotated[int | None, typer.Option(help="denoising steps of generations; by default one token a step")] = None,
    attacks: Annotated[bool, typer.Option(help="also attack the forgetting")] = True,
    relearn: Annotated[bool, typer.Option(help="also attack it by fine-tuning (LoRA)")] = False,
    extraction: Annotated[bool, typer.Option(help="also measure extraction strength (slow)")] = False,
    attack_rows: Annotated[int, typer.Option(min=1, help="rows that attacks on the sampler are run on")] = 24,
    text: Annotated[bool, typer.Option(help="keep generated answers in the records")] = True,
    processes: Annotated[int, typer.Option(min=1, help="processes on this machine that share the work, by torchrun")] = 1,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Measure what an edit forgot and what it cost, against the never-trained level and under attack.

    A killed audit goes on where it was when the same command runs again. On several machines or GPUs start it with
    `accelerate launch -m remask audit ...`.
    """
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        _torchrun(processes)
        return
    from .experiments.audits import AuditConfig, run_benchmark
    from .reporting.tables import audit_tables

    names: dict[str, Any] = {"auto": None, "fp32": "fp32", "bf16": "bf16 autocast"}
    if precision not in names:
        raise RemaskError(f"--precision {precision!r} is none of auto, fp32, bf16")
    _only_one(layer, site)
    config = AuditConfig(
        model,
        benchmark,
        edit,
        alpha=_alpha(alpha),
        layer=layer,
        site=site,
        reference=reference,
        level=_level(level),
        seeds=seeds,
        precision=names[precision],
        steps=steps,
        attacks=attacks,
        relearn=relearn,
        extraction=extraction,
        attack_rows=attack_rows,
        text=text,
    )
    result = run_benchmark(config, out, data, console=progress, load_options=_load_options(load_options))
    if result is None:  # not the first process
        return
    if as_json:
        _print_json(result)
        return
    for part in audit_tables(result):
        console.print(part)
    progress.print(f"page: {out / 'index.html'}; every number: {out / 'records.jsonl'}")


@audit_app.command("diff")
def audit_diff(
    first: Annotated[Path, typer.Argument(help="folder of a finished audit")],
    second: Annotated[Path, typer.Argument(help="folder of another one, measured in the same way")],
    as_json: Json = False,
) -> None:
    """Compare two audits row by row; refuses what was not measured under one protocol."""
    from .experiments.diffs import diff_audits
    from .reporting.tables import diff_tables

    result = diff_audits(first, second)
    if as_json:
        _print_json(result)
        return
    for table in diff_tables(result):
        console.print(table)


def _torchrun(processes: int) -> None:
    """This very command line in several processes."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run(["--standalone", "--nproc-per-node", str(processes), "-m", "remask", *sys.argv[1:]])
    except ChildFailedError:  # the process that failed has said why
        raise typer.Exit(2) from None


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise RemaskError(f"--ids {text!r} is not a list of token ids") from None


def _load_options(pairs: list[str] | None) -> dict[str, Any]:
    """`-L key=value` pairs as arguments of `load`; values are YAML scalars, dtype a torch name."""
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, found, value = pair.partition("=")
        if not found:
            raise RemaskError(f"-L {pair!r} is not KEY=VALUE")
        options[key] = yaml.safe_load(value)
    if "dtype" in options:
        import torch

        dtype = getattr(torch, str(options["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise RemaskError(f"-L dtype={options['dtype']!r} is no torch dtype; try float32 or bfloat16")
        options["dtype"] = dtype
    return options


def _level(text: str) -> Any:
    if text not in ("auto", "never-trained", "prompt-masked"):
        raise RemaskError(f"--level {text!r} is none of auto, never-trained, prompt-masked")
    return text


def _alpha(text: str) -> float | None:
    if text == "calibrated":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RemaskError(f"--alpha {text!r} is neither a finite number nor 'calibrated'")
    return value


def _only_one(layer: int | None, site: str | None) -> None:
    if layer is not None and site is not None:
        raise RemaskError("--layer and --site both say where to edit; give one of them")


def _attached(lm: Any, edit: Path | None) -> Any:
    from .backbones.intervention import NoEdit
    from .experiments.edits import load_edit

    return (load_edit(edit) if edit else NoEdit()).attached(lm)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


def main() -> None:
    """Entry point: RemaskError becomes one sentence and exit code 2."""
    try:
        app()
    except RemaskError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        sys.exit(2)
    except OSError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {error.filename}: {error.strerror or error}; choose another path", markup=False, highlight=False
        )
        sys.exit(2)
