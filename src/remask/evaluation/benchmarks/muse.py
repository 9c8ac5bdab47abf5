"""MUSE (Shi et al., 2024): Harry Potter books or BBC news to forget; verbatim memory, knowledge, privacy.

Layouts, tried in this order, each as JSON, JSON Lines or Parquet: the folders of the hub sets `muse-bench/MUSE-Books` and
`MUSE-News` (`knowmem/forget_qa`, ...), directly or under `books/` and `news/`; the same under the older names `hp/` and `bbc/`;
flat files with the folder in the name (`hp_knowmem_forget_qa.json`). The retain set of questions and of texts is called
`retain` or, before July 2024, `retain2`.

| files | columns | rows | probe, published metric |
|---|---|---|---|
| knowmem/forget_qa, retain_qa | question, answer | 100 each | `knowmem_forget`, `knowmem_retain`: ROUGE-L F1, 32 tokens |
| knowmem/..._qa_icl | question, answer | 10 each | ten examples before every question (`Probe.context`) |
| verbmem/forget | prompt, gt | 100 | `verbmem`: VerbMem, ROUGE-L F1 of 128 tokens |
| privleak/forget, retain, holdout | text, or plain texts | 100 each | `privleak_...`: PrivLeak from Min-40 % |

The questions are needed; the texts are under third-party copyright and are used where the user has them. No file is shipped.
"""

from __future__ import annotations

from pathlib import Path

from ...facts import Fact
from .base import Benchmark, Probe, Side, Text
from .rows import ColumnKind, check_count, find_file, need_file, read_rows

CORPORA = {"books": "hp", "news": "bbc"}
HUB: dict[str, dict[str, str | None]] = {
    "books": {"muse-bench/MUSE-Books": None},
    "news": {"muse-bench/MUSE-News": None},
}
FILES = ("knowmem/*", "verbmem/*", "privleak/*")
LICENCE = (
    "The data card says CC-BY-4.0; the texts remain under copyright of their authors (J. K. Rowling; BBC): do not pass on."
)
PROBE_ROWS, EXAMPLE_ROWS = 100, 10
QA: dict[str, ColumnKind] = {"question": "text", "answer": "text"}
TEMPLATE = "Question: {prompt}\nAnswer:"


def load_benchmark(corpus: str, folder: Path) -> Benchmark:
    """The groups of `books` or `news`.

    An edit reads the forget questions; the ten worked examples about retained texts are its `fit` set, those about forgotten
    texts the validation set, less any that are asked too. All 100 retain questions are scored.

    Raises:
        RemaskError: missing question file, malformed row, wrong row count.
    """
    forget, retain = _questions(folder, corpus, "forget_qa"), _questions(folder, corpus, "retain_qa")
    forget_examples, retain_examples = _questions(folder, corpus, "forget_qa_icl"), _questions(folder, corpus, "retain_qa_icl")
    asked = {fact.prompt for fact in [*forget, *retain]}
    probes = {
        "knowmem_forget": Probe("question", "forget", forget, context=forget_examples, template=TEMPLATE),
        "knowmem_retain": Probe("question", "retain", retain, context=retain_examples, template=TEMPLATE),
    }
    notes = []
    path = find_file(folder, _stems(corpus, "verbmem", "forget"))
    if path:
        rows = read_rows(path, {"prompt": "text", "gt": "text"})
        check_count(path, len(rows), PROBE_ROWS, f"MUSE {corpus}")
        ids = [f"muse/{corpus}/verbmem/{index:03d}" for index in range(len(rows))]
        facts = [Fact(name, row["prompt"], row["prompt"], row["gt"]) for name, (_, row) in zip(ids, rows, strict=True)]
        probes["verbmem"] = Probe("completion", "forget", facts)
    else:
        notes.append("no verbmem file: VerbMem cannot be computed")
    sides: tuple[Side, ...] = ("forget", "retain", "holdout")
    texts = {side: _texts(folder, corpus, side) for side in sides}
    probes |= {f"privleak_{side}": Probe("membership", side, texts=rows) for side, rows in texts.items() if rows}
    if not (texts["forget"] and texts["holdout"]):
        notes.append("no privleak forget and holdout files: PrivLeak cannot be computed")
    return Benchmark(
        name=f"muse:{corpus}",
        forget=forget,
        fit=[fact for fact in retain_examples if fact.prompt not in asked],
        scored={"retain": retain},
        validation=[fact for fact in forget_examples if fact.prompt not in asked],
        validation_retain=[],
        probes=probes,
        licence=LICENCE,
        notes=tuple(notes),
    )


def _stems(corpus: str, kind: str, name: str) -> list[str]:
    """File names without suffix, newest layout first."""
    names = [name, name.replace("retain", "retain2")] if "retain" in name else [name]
    old = CORPORA[corpus]
    places = [f"{kind}/", f"{corpus}/{kind}/", f"{old}/{kind}/", f"{corpus}_{kind}_", f"{old}_{kind}_"]
    return [place + name for place in places for name in names]


def _questions(folder: Path, corpus: str, name: str) -> list[Fact]:
    path = need_file(folder, _stems(corpus, "knowmem", name), f"MUSE {corpus}")
    rows = read_rows(path, QA)
    check_count(path, len(rows), EXAMPLE_ROWS if name.endswith("icl") else PROBE_ROWS, f"MUSE {corpus} {name}")
    return [
        Fact(f"muse/{corpus}/{name}/{index:03d}", row["question"], row["question"], row["answer"])
        for index, (_, row) in enumerate(rows)
    ]


def _texts(folder: Path, corpus: str, name: str) -> list[Text]:
    path = find_file(folder, _stems(corpus, "privleak", name))
    if path is None:
        return []
    rows = read_rows(path, {"text": "text"}, bare="text")
    check_count(path, len(rows), PROBE_ROWS, f"MUSE {corpus} privleak")
    return [Text(f"muse/{corpus}/privleak_{name}/{index:03d}", row["text"]) for index, (_, row) in enumerate(rows)]
