"""The `remask` command. Reading commands take `--json`; bad input is one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..errors import RemaskError
from .audit import audit_app
from .common import Data, Facts, Json, Load, Model, console, load_options_of, print_json
from .diagnose import diagnose
from .edit import edit_app
from .trace import trace_app
from .unlearn import WithMethods, unlearn

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Knowledge editing and machine unlearning in masked diffusion language models.",
)
app.add_typer(edit_app, name="edit")
app.add_typer(audit_app, name="audit")
app.add_typer(trace_app, name="trace")
app.command(cls=WithMethods)(unlearn)
app.command()(diagnose)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder of the report")] = Path("report")) -> None:
    """Trace, forget, prove and undo one person on the bundled model; writes report/index.html."""
    from ..experiments.demo import run_demo

    run_demo(out, console)


@app.command()
def models(as_json: Json = False) -> None:
    """List the families of models that load, how each is verified, ids and limits; and the bundled models."""
    from ..assets import bundled_models
    from ..backbones.inspection import list_families

    rows = list_families()
    if as_json:
        print_json({"families": rows, "bundled": bundled_models()})
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
    from ..backbones.inspection import inspect as run

    report = run(model, **load_options_of(load_options))
    if as_json:
        print_json(report)
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
    from ..experiments.teaching import read_recipe
    from ..experiments.teaching import teach as run

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
    from ..experiments.adapting import adapt as run
    from ..experiments.adapting import read_groups
    from ..unlearning.adapting import AdaptConfig

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


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="question; may be given several times")] = None,
    ids: Annotated[list[str] | None, typer.Option("--ids", help="prompt as token ids, for a folder without tokenizer")] = None,
    edit: Annotated[list[Path] | None, typer.Option(help="edit file to attach; may be given several times")] = None,
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
    from ..backbones import load
    from ..diffusion.sampler import SamplerConfig
    from ..diffusion.sampler import generate as run

    lm = load(model, **load_options_of(load_options))
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
        print_json({"model": lm.name, "edit": _named(edit), "sampler": config.to_dict(), "rows": records})
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
    edit: Annotated[list[Path] | None, typer.Option(help="edit file to attach; may be given several times")] = None,
    draws: Annotated[int, typer.Option(help="masks a replicate (4 replicates)")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the mask bank")] = 0,
    load_options: Load = None,
    as_json: Json = False,
) -> None:
    """Log-probability and greedy answer of every fact."""
    from ..backbones import load
    from ..diffusion.masks import MaskBank
    from ..diffusion.sampler import SamplerConfig
    from ..evaluation.records import ESTIMATOR
    from ..evaluation.statistics import mean_interval
    from ..evaluation.tasks import Setting, generation, log_probability
    from ..facts import load_facts

    lm = load(model, **load_options_of(load_options))
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
        print_json(
            {
                "model": lm.name,
                "fingerprint": lm.fingerprint(),
                "edit": _named(edit),
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


def _attached(lm: Any, edits: list[Path] | None) -> Any:
    from ..experiments.edits import load_edits

    return load_edits(edits or ()).attached(lm)


def _named(edits: list[Path] | None) -> str | None:
    return " + ".join(map(str, edits)) if edits else None


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise RemaskError(f"--ids {text!r} is not a list of token ids") from None


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
