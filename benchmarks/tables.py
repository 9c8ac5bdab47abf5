"""Write the tables of README, docs/attacks.md, models.md, adapt.md, editing.md and tracing.md from the committed result files.

python benchmarks/tables.py
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from remask.reporting.numbers import interval
from remask.tracing.positions import CLASSES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ROOT / "src" / "remask" / "assets" / "models"
LOGPROB = "answer log-probability"
EDITS = ("default", "mean-delta", "paper", "default_never-trained")


def audit_table() -> str:
    """One line an edit and group, means over seeds."""
    lines = [
        "| edit | group (rows) | before | after | change [95 %] | never trained | prompt masked | exact | ROUGE-L | junk |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for edit in EDITS:
        result = json.loads((RESULTS / f"tofu_forget01_{edit}.json").read_text())
        summary, name = result["summary"], edit.replace("_", ", ")
        lines += [_line(name, line) for line in result["groups"] if LOGPROB in line["metrics"]]
        selectivity, closed = summary["selectivity"]["after"], summary["gap_closed"]
        alphas = ", ".join(f"{seed['alpha']:.2f}" for seed in result["edit"]["seeds"])
        utility, quality = summary["model_utility"], summary["forget_quality"]["after"]
        notes.append(
            f"- **{name}**: gap to the never-trained level closed {', '.join(f'{v:.0%}' for v in closed)}; selectivity "
            f"{selectivity['mean']:.1f} [{selectivity['low']:.1f}, {selectivity['high']:.1f}] nats forgotten for each "
            f"nat that a retain row changed (seeds: {', '.join(f'{v:.1f}' for v in selectivity['seeds'])}); model utility "
            f"{utility['before']:.3f} → {utility['after']:.3f} (never trained {utility['never trained']:.3f}); forget quality "
            f"p = {quality['pvalue']:.2g} (n = {quality['n']}); alpha {alphas}."
        )
    return "\n".join([*lines, "", *notes])


def _line(edit: str, line: dict[str, Any]) -> str:
    score = line["metrics"][LOGPROB]
    states, change = score["states"], score["change"]["after"]
    cells = [edit, f"{line['group']} ({line['n']})", *(f"{states[state]['mean']:.1f}" for state in ("before", "after"))]
    cells.append(f"{change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]")
    cells += [f"{states[state]['mean']:.1f}" for state in ("never trained", "prompt masked")]
    for metric in ("exact match", "ROUGE-L recall", "junk rate"):
        before, after = (line["metrics"][metric]["states"][state]["mean"] for state in ("before", "after"))
        cells.append(f"{before:.2f} → {after:.2f}")
    return "| " + " | ".join(cells) + " |"


def attack_table() -> str:
    """What attacks regain of what the default edit forgot."""
    result = json.loads((RESULTS / "tofu_forget01_default.json").read_text())
    lines = ["| attack | rows | read off | before | after | never trained | regained [95 %] |", "|---|---|---|---|---|---|---|"]
    for line in result["attacks"]:
        digits = 1 if line["measure"] == LOGPROB else 2
        levels = [f"{line[key]:.{digits}f}" for key in ("before", "after", "never")]
        gained = line["note"] if line["regained"] is None else interval({"mean": line["regained"], **line}, 0, unit=" %")
        read = "nats a row" if line["measure"] == LOGPROB else "share of the text"
        lines.append("| " + " | ".join([line["attack"], str(line["n"]), read, *levels, gained]) + " |")
    return "\n".join(lines)


def model_table() -> str:
    """What each bundled model was taught and recalls."""
    lines = [
        "| model | parameters | rows | epochs | steps | training time | split | rows | exact match |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for folder in sorted(MODELS.iterdir()):
        log = json.loads((folder / "teach.json").read_text())
        head = [folder.name, f"{log['parameters'] / 1e6:.1f}M", str(log["rows"]), str(log["epochs"]), str(log["steps"])]
        head.append(f"{log['seconds'] / 60:.0f} min")
        for kind, splits in log["exact_match"].items():
            for name, rate in splits.items():
                lines.append(
                    "| " + " | ".join([*head, f"{name} ({kind})", str(rate["rows"]), f"{rate['exact_match']:.1%}"]) + " |"
                )
                head = [""] * len(head)
        taught = log["exact_match"]["taught"].values()
        total = sum(rate["rows"] for rate in taught)
        hits = sum(rate["rows"] * rate["exact_match"] for rate in taught)
        lines.append("| " + " | ".join([*[""] * len(head), "**all taught**", str(total), f"**{hits / total:.1%}**"]) + " |")
    return "\n".join(lines)


def adapt_table() -> str:
    """SmolLM2 before and after adaptation, with its yardsticks."""
    record = json.loads((RESULTS / "adapt_smollm2.json").read_text())
    curve = {point["step"]: point["held_out"] for point in record["curve"]}
    first, last = min(curve), max(curve)
    tokens = record["curve"][-1]["tokens"]
    states = {
        "token frequencies": record["unigram"],
        "start, causal mask": record["start_causal"],
        "start, full attention": curve[first],
        f"after {last} steps ({tokens / 1000:.0f} thousand tokens)": curve[last],
        "the same, read back from its bf16 file": record["saved_bf16"],
    }
    rates = list(curve[first])
    lines = ["| | " + " | ".join(f"{float(rate):.0%} hidden" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for state, scores in states.items():
        cells = []
        for rate in rates:
            score, errors = scores[rate], scores[rate].get("accuracy_stderr")
            accuracy = f"{score['accuracy']:.1%}" + (f" ± {errors:.1%}" if errors is not None else "")
            nats = f"{score['nats']:.2f}" + (f" ± {score['nats_stderr']:.2f}" if errors is not None else "")
            cells.append(f"{accuracy}, {nats}")
        lines.append(f"| {state} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tracing_ratios() -> str:
    """Work of the tracers on `tiny`, and how many times less it is than the reference's."""
    record = json.loads((RESULTS / "tracing.json").read_text())
    runs, ratios = record["runs"], record["ratios"]
    notes = {
        "reference": "hooks, one site at a time, all steps",
        "hooks, batched": "hooks, many sites at a time, from the restored step",
        "exact": "",
        "sweep": "another estimand",
    }
    lines = ["| tracer | block executions | fewer | seconds | faster |", "|---|---|---|---|---|"]
    for name, run in runs.items():
        fewer, faster = (runs["reference"][key] / run[key] for key in ("blocks", "seconds"))
        note = f" ({notes[name]})" if notes[name] else ""
        lines.append(f"| {name}{note} | {run['blocks']:,} | {fewer:.1f} x | {run['seconds']:.1f} | {faster:.1f} x |")
    worst = record["largest difference of effects, nats"]
    rounding = record["bf16"]["bf16 autocast"]
    other = rounding["exact against exact in fp32"]
    started, many = ratios["blocks, from the restored step / exact"], ratios["blocks, rerun / sweep, 16 steps"]
    notes_below = [
        f"`exact` runs {started} times fewer blocks than starting every site at its restored step;",
        f"`sweep` {many} times fewer than rerunning everything, at 16 steps on facts that have as many tokens.",
        "Largest difference of an effect, exact against reference:",
        f"{worst['exact and reference']:.1g} nats of {worst['largest effect']:.1f} in fp32,",
        f"{rounding['exact against reference']['largest']:.1g} under bf16 autocast. Exact under bf16 autocast against exact in",
        f"fp32: mean {other['mean']:.3f}, largest {other['largest']:.1f} nats, correlation {other['correlation']:.2f}.",
    ]
    return "\n".join([*lines, "", *notes_below])


def tracing_findings() -> dict[str, str]:
    """Tables of docs/tracing.md by marker."""
    record = json.loads((RESULTS / "tracing_study.json").read_text())
    models = record["models"]
    sites = [
        "| model | layers | lost to the corruption | residual site chosen (3 seeds) | its share of resamples | strongest site |"
    ]
    sites.append("|---|---|---|---|---|---|")
    shares = ["| model | module | " + " | ".join(f"layer {part}" for part in ("0", "1/4", "1/2", "3/4", "last")) + " |"]
    shares.append("|---|---|---|---|---|---|---|")
    bands = ["| model | module | layers | early steps | middle steps | late steps |", "|---|---|---|---|---|---|"]
    contrasts = ["| account: what should be positive | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    classes = ["| model | module (window) | " + " | ".join(CLASSES) + " |", "|---" * (len(CLASSES) + 2) + "|"]
    for name, found in models.items():
        layers = [str(site[1]) for site in found["sites"]["mean absolute"]]
        share = next((share for layer, share in found["stability"] if str(layer) == layers[0]), 0.0)
        best = ", ".join(f"{module} {layer} at step {step}" for module, layer, step, _ in found["strongest"])
        sites.append(f"| {name} | {found['layers']} | {_band(found['lost'])} | {', '.join(layers)} | {share:.0%} | {best} |")
        for module, by_layer in found["restored"].items():
            picks = [by_layer[round(part * (found["layers"] - 1))] for part in (0, 0.25, 0.5, 0.75, 1)]
            shares.append(f"| {name} | {module} | " + " | ".join(_band(pick, 2) for pick in picks) + " |")
        for module, cells in found["bands"].items():
            for third in ("lower", "middle", "upper"):
                row = [_band(cell["effect"], 3) for cell in cells if cell["layers"] == third]
                if "-" not in row:
                    bands.append(f"| {name} | {module} | {third} | " + " | ".join(row) + " |")
        for module, by_class in found["classes"].items():
            window = found["window"] if module != "resid" else 1
            cells = [f"{by_class[c][0]:+.3f} (layer {by_class[c][1]})" if c in by_class else "-" for c in CLASSES]
            classes.append(f"| {name} | {module} ({window}) | " + " | ".join(cells) + " |")
    for key in next(iter(models.values()))["contrasts"]:
        contrasts.append(f"| {key} | " + " | ".join(_band(found["contrasts"][key], 3) for found in models.values()) + " |")
    edits = [
        "| model | edit | rule | layers (folds) | retain loss there | random layer | best layer | mean rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in models.items():
        for line in found.get("edits", {}).get("compared", []):
            cells = [name, line["edit"], line["rule"], ", ".join(map(str, line["layers"]))]
            cells += [f"{line[key]:.2f}" for key in ("traced", "random", "best")]
            cells.append(f"{line['rank']:.1f} of {found['layers']}")
            edits.append("| " + " | ".join(cells) + " |")
    tables = {"sites": sites, "shares": shares, "bands": bands, "classes": classes, "contrasts": contrasts, "edits": edits}
    return {name: "\n".join(lines) for name, lines in tables.items()}


def _band(value: list[float | None], digits: int = 2) -> str:
    """Mean and interval; a dash where nothing could be measured."""
    numbers = [number for number in value if number is not None]
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*numbers, d=digits) if numbers else "-"


def editing_table() -> str:
    """Every kind of edit on `tiny`: changes of log-probability by group, and what generations say."""
    record = json.loads((RESULTS / "editing.json").read_text())
    names = ("forget", "own wording", "paraphrase", "neighbours", "retain", "general")
    lines = [
        "| edit | layer | " + " | ".join(names) + " | selectivity | forget exact | forget junk | retain exact |",
        "|---" * (len(names) + 6) + "|",
    ]
    for name, found in record.items():
        groups = {line["group"]: line["metrics"] for line in found["groups"]}
        own = found["own_wording"]
        changes = [own if group == "own wording" else groups[group][LOGPROB]["change"]["after"] for group in names]
        cells = [name, str(found["edit"]["seeds"][0]["site"]["layer"])]
        cells += [f"{c['mean']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]" for c in changes]
        ratio = found["summary"]["selectivity"].get("after")
        if ratio is None or ratio["low"] > 10_000:  # the retain rows changed by rounding only
            cells.append("-")
        else:
            cells.append(f"{ratio['mean']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}]")
        for group, metric in (("forget", "exact match"), ("forget", "junk rate"), ("retain", "exact match")):
            before, after = (groups[group][metric]["states"][state]["mean"] for state in ("before", "after"))
            cells.append(f"{before:.2f} → {after:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars_table() -> str:
    """What the default edit is asked for, and what it does: `tiny`'s people and TOFU forget01."""
    world = json.loads((RESULTS / "editing.json").read_text())
    tofu = {name: json.loads((RESULTS / f"tofu_forget01_{name}.json").read_text()) for name in EDITS[:3]}
    columns = {"`tiny`, six people": world, "`tiny-tofu`, forget01": tofu}
    found = {name: _bars(audits["default"], audits["mean-delta"], audits["paper"]) for name, audits in columns.items()}
    lines = ["| asked for | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for bar in next(iter(found.values())):
        lines.append(f"| {bar} | " + " | ".join(cells[bar] for cells in found.values()) + " |")
    return "\n".join(lines)


def _bars(default: dict[str, Any], control: dict[str, Any], paper: dict[str, Any]) -> dict[str, str]:
    groups = {line["group"]: line["metrics"] for line in default["groups"]}
    attacks = {line["attack"].split(",")[0]: line for line in default["attacks"]}
    states = groups["forget"][LOGPROB]["states"]
    before, after, twin, blind = (states[name]["mean"] for name in ("before", "after", "never trained", "prompt masked"))
    direct, levels = after - before, {"prompt-masked": blind, "never-trained": twin}
    shares = [f"{direct / (level - before):.0%} of the gap to the {name} one" for name, level in levels.items()]
    losses = []
    for name in ("retain", "neighbours"):
        if name in groups:
            change = groups[name][LOGPROB]["change"]["after"]
            losses.append(f"{name} {change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]")
    times = [
        default["summary"]["selectivity"]["after"]["mean"] / other["summary"]["selectivity"]["after"]["mean"]
        for other in (paper, control)
    ]
    if "own_wording" in default:
        same, other = default["own_wording"]["mean"], groups["paraphrase"][LOGPROB]["change"]["after"]["mean"]
    else:
        same, other = direct, attacks["question paraphrase"]["after"] - attacks["question paraphrase"]["before"]
    context, junk = attacks["in-context"], groups["forget"]["junk rate"]["states"]
    return {
        "forget rows within 5 % of the gap to the level": ", ".join(shares),
        "unseen rows lose at most 1 nat": "; ".join(losses),
        "20 times as selective as `paper` and mean-delta": f"{times[0]:.0f} and {times[1]:.0f} times",
        "other wordings lose at least 80 % of the direct effect": f"{other / same:.0%} ({other:+.1f} against {same:+.1f} nats)",
        "in context at most 10 % regained": context["note"] or interval({"mean": context["regained"], **context}, 0, unit=" %"),
        "junk at most 5 points above the never-trained model": " against ".join(
            f"{junk[state]['mean']:.2f}" for state in ("after", "never trained")
        ),
    }


def said_table() -> str:
    """What the default edit makes of forget questions, and of retain questions, on `tiny`."""
    found = json.loads((RESULTS / "editing.json").read_text())["default"]["said"]
    lines = ["| group | question | answer | said |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {row['group']} | {row['prompt']} | {row['answer']} | {row['said'] or '(nothing)'} |" for row in found)]
    )


def cost_table() -> str:
    """What an edit memory costs on `tiny`: at every forward, to install, to change."""
    record = json.loads((RESULTS / "edit_cost.json").read_text())
    batches = sorted({line["batch"] for line in record["forward"]})
    forward = [
        "| memory | keys | " + " | ".join(f"batch of {batch}" for batch in batches) + " |",
        "|---" * (len(batches) + 2) + "|",
    ]
    for name, lines in itertools.groupby(sorted(record["forward"], key=lambda line: line["edit"]), lambda line: line["edit"]):
        by_batch = {line["batch"]: line for line in lines}
        cells = [name, f"{by_batch[batches[0]]['keys']:,}"]
        for batch in batches:
            low, high = by_batch[batch]["quartiles"]
            cells.append(f"{by_batch[batch]['ratio'] - 1:+.1%} [{low - 1:+.1%}, {high - 1:+.1%}]")
        forward.append("| " + " | ".join(cells) + " |")
    install = [
        "| preset | blocks a forward | sequences through a block | seconds | one epoch, seconds | epoch / install |",
        "|---" * 6 + "|",
    ]
    epoch = record["install"]["epoch_seconds"]
    for line in record["install"]["builds"]:
        cells = [line["preset"], f"{line['blocks_a_forward']} of {line['of']}", f"{line['sequence_blocks']:,}"]
        install.append(
            "| " + " | ".join([*cells, f"{line['seconds']:.3f}", f"{epoch:.3f}", f"{line['epoch_over_install']:.2f}"]) + " |"
        )
    change = [
        "| d | ridge | new solve, ms | insert, ms | remove, ms | times faster | times fewer operations |",
        "|---" * 7 + "|",
    ]
    for line in record["streaming"]:
        cells = [str(line["width"]), line["ridge"]]
        cells += [f"{1e3 * line[f'{what}_seconds']:.2f}" for what in ("rebuild", "insert", "remove")]
        for end in ("", "_operations"):
            cells.append(" and ".join(f"{line[f'rebuild_over_{what}{end}']:.0f}" for what in ("insert", "remove")))
        change.append("| " + " | ".join(cells) + " |")
    return "\n".join([*forward, "", *install, "", *change])


def unlearning_table(name: str, only: tuple[str, ...] = ()) -> str:
    """Every method of `remask unlearn` beside the edit memory, or some: own strength, common level, answers, cost."""
    record = json.loads((RESULTS / f"unlearning_{name}.json").read_text())
    groups = [name for name in record["rows"] if name in ("forget", "retain", "neighbours", "paraphrase")]
    lines = [
        "| method | rate | collapses | "
        + " | ".join(groups)
        + " | gap closed | exact | ROUGE-L | junk | at one level: scale | retain | neighbours | seconds | forwards |",
        "|---" * (len(groups) + 12) + "|",
    ]
    chosen = [line for line in record["methods"] if not only or line["name"] in only]
    lines += ["| " + " | ".join(_unlearned(line, groups)) + " |" for line in chosen]
    levels = record["levels"]
    before = ", ".join(f"{name} {levels[name]['before']:.2f} ({levels[name]['never trained']:.2f})" for name in groups)
    first = record["answers before"]["forget"]
    lines += [
        "",
        f"Before, nats a row (never trained): {before}; the common level is {levels['auto']:.2f}; forget answers exact "
        f"{first['exact']:.2f}, junk {first['junk']:.2f}, of {first['rows']} generated.",
    ]
    return "\n".join(lines)


COLLAPSE = 10.0  # nats a held row of the validation split


def _unlearned(line: dict[str, Any], groups: list[str]) -> list[str]:
    own, scaled = line["own"], line["calibrated"]
    gone = [tried["rate"] for tried in line["validation"] if tried.get("retain_loss", math.inf) > COLLAPSE]
    cells = [line["name"], "-" if line["rate"] is None else f"{line['rate']:g}", f"{min(gone):g}" if gone else "-"]
    if own is None:
        return [*cells, line["failed"][0], *[""] * (len(groups) + 8)]
    cells += [f"{own[name]['mean']:+.2f} [{own[name]['low']:+.2f}, {own[name]['high']:+.2f}]" for name in groups]
    cells.append(", ".join(f"{share:.0%}" for share in own["closed"]))
    cells += [f"{line['answers']['forget'][key]:.2f}" for key in ("exact", "rouge", "junk")]
    for name in ("alpha", "retain", "neighbours"):
        if scaled is None or name not in scaled:
            cells.append("-")
        else:
            cells.append(f"{scaled[name][0]:.2f}" if name == "alpha" else f"{scaled[name]['mean']:+.2f}")
    return [*cells, *(f"{line['cost'][key]:.0f}" if line["cost"] else "-" for key in ("seconds", "forwards"))]


def noise_tables() -> str:
    """What of a step is chance, by draws and masks; and what a step costs."""
    record = json.loads((RESULTS / "unlearning_noise.json").read_text())
    found = {(line["method"], line["scheme"], line["steps"]): line for line in record["noise"]}
    methods, schemes, steps = (list(dict.fromkeys(key[place] for key in found)) for place in range(3))
    heads = [f"{method}, {step} steps" for method in methods for step in steps]
    lines = ["| states of a row | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for scheme in schemes:
        cells = [found.get((method, scheme, step)) for method in methods for step in steps]
        shown = [f"{cell['noise']:.2f} ({cell['loss standard deviation a row']:.2g})" if cell else "-" for cell in cells]
        lines.append("| " + " | ".join([scheme, *shown]) + " |")
    cost = record["cost"]["methods"]
    lines += ["", "| | " + " | ".join(line["method"] for line in cost) + " |", "|---" * (len(cost) + 1) + "|"]
    over = [f"{line['over ga']:.2f} [{line['quartiles'][0]:.2f}, {line['quartiles'][1]:.2f}]" for line in cost]
    lines.append("| seconds of a step over those of `ga` | " + " | ".join(over) + " |")
    return "\n".join(lines)


REWRITE_COLUMNS = {
    "efficacy": "efficacy",
    "paraphrase": "paraphrase",
    "neighbourhood": "neighbourhood",
    "S": "score",
    "says the new object": "said exact",
    "still the old one": "said old",
    "in other words": "paraphrase said exact",
    "other answers unchanged": "kept unchanged",
}


def rewriting_table() -> str:
    """Rewrites of `tiny`'s facts and their controls: means over seeds of the estimates and of their intervals' ends."""
    record = json.loads((RESULTS / "rewriting.json").read_text())
    lines = ["| edit | " + " | ".join(REWRITE_COLUMNS) + " | their change, nats |", "|---" * (len(REWRITE_COLUMNS) + 2) + "|"]
    states = {"none": [record["rewrite"][0]["before"]]}
    states |= {name: [run["after"] for run in runs] for name, runs in record.items()}
    for name, found in states.items():
        cells = [name, *(_over_seeds(found, key) for key in REWRITE_COLUMNS.values()), _over_seeds(found, "kept change", "+")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _over_seeds(found: list[dict[str, Any]], key: str, sign: str = "") -> str:
    mean, low, high = (sum(one[key][part] for one in found) / len(found) for part in ("mean", "low", "high"))
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def put(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers `<!-- name -->` and `<!-- /name -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    page = path.read_text(encoding="utf-8")
    assert pattern.search(page), f"{path}: no marker {name}"
    path.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    put(ROOT / "README.md", "audit", audit_table())
    put(ROOT / "docs" / "attacks.md", "attacks", attack_table())
    put(ROOT / "docs" / "models.md", "models", model_table())
    put(ROOT / "docs" / "adapt.md", "adapt", adapt_table())
    put(ROOT / "docs" / "editing.md", "editing", editing_table())
    put(ROOT / "docs" / "editing.md", "bars", bars_table())
    for split in ("forget05", "forget10"):
        put(ROOT / "docs" / "editing.md", split, unlearning_table(f"tiny-tofu_{split}", ("default", "mean-delta", "paper")))
    put(ROOT / "docs" / "editing.md", "said", said_table())
    put(ROOT / "docs" / "editing.md", "edit_cost", cost_table())
    put(ROOT / "docs" / "unlearning.md", "unlearning_tiny", unlearning_table("tiny"))
    put(ROOT / "docs" / "unlearning.md", "unlearning_tofu", unlearning_table("tiny-tofu_forget10"))
    put(ROOT / "docs" / "unlearning.md", "noise", noise_tables())
    put(ROOT / "docs" / "editing.md", "rewriting", rewriting_table())
    put(ROOT / "docs" / "tracing.md", "ratios", tracing_ratios())
    for marker, table in tracing_findings().items():
        put(ROOT / "docs" / "tracing.md", marker, table)
