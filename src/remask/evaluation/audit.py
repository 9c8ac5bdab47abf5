"""Audits: the same rows under several states of a model, as cells that can be computed in any order, anywhere, once.

- `before`, `after`: without and with the intervention;
- `never trained`: the reference model, which never saw the forget set: the level to reach, not to pass;
- `prompt masked`: the unedited model with every prompt token hidden: what it says without knowing the question;
- `mean-delta`: the control, a single steering vector of the same strength. A memory that does no better is steering.

A *cell* is one task on up to `CELL_ROWS` rows of one group under one state. It is named by a hash of all that its numbers
depend on, so a cell that is on disk is never wrong, whichever run wrote it: a killed audit resumes, a larger one starts from
what a smaller one measured, and processes that share a folder share the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..backbones.intervention import Intervention, NoEdit
from ..backbones.model import MaskedDiffusionLM
from ..diffusion.masks import MaskBank
from ..diffusion.sampler import SamplerConfig
from ..errors import RemaskError
from ..facts import Fact
from ..random import digest
from ..tensorfile import canonical_json
from .attacks.base import Attack
from .attacks.registry import attacks_for, targets
from .benchmarks.base import Benchmark, Probe, Side, Text
from .records import ESTIMATOR, SCHEMA, Record, Source, read_records, write_records
from .tasks import TASKS, Precision, Row, Setting, fits, lettered

CELL_ROWS = 64
ATTACK_ROWS = 24  # rows that an attack on the sampler is run on
EXAMPLES = 8  # rows that an attack on the log-probability also answers on the edited model, to be read
GENERATED = ("generation", "extraction", "knowledge", "verbatim")  # tasks whose numbers depend on the sampler alone


@dataclass(frozen=True)
class State:
    """One state of the model."""

    name: str
    lm: MaskedDiffusionLM
    intervention: Intervention = field(default_factory=NoEdit)
    hide_prompt: bool = False

    @property
    def source(self) -> Source:
        """Fingerprints and preset; the rest is the cell's."""
        act = "" if isinstance(self.intervention, NoEdit) else self.intervention.fingerprint()
        return Source(self.lm.fingerprint(), act, str(self.intervention.describe()["preset"]))


@dataclass(frozen=True)
class Group:
    """Rows that are reported together.

    Attributes:
        name: unique in the audit.
        side: forget (should go), retain (should stay), holdout (no model saw it).
        rows: facts or texts.
        tasks: what is measured on them, names in `tasks.TASKS`.
        context: worked examples before each question.
    """

    name: str
    side: Side
    rows: tuple[Row, ...]
    tasks: tuple[str, ...] = ("likelihood", "generation")
    context: tuple[tuple[str, str], ...] = ()

    @property
    def scored(self) -> bool:
        """Whether the log-probability of its answers is reported."""
        return bool({"likelihood", "log-probability"} & set(self.tasks))


@dataclass(frozen=True)
class Cell:
    """One task on some rows of a group under one state and seed."""

    state: State
    group: Group
    task: str
    rows: tuple[Row, ...]
    setting: Setting
    source: Source

    @property
    def key(self) -> str:
        """Hash of all that the numbers depend on."""
        attack, setting = self.setting.attack, self.setting
        parts = {
            "schema": SCHEMA,
            "state": [self.state.name, self.state.hide_prompt],
            "group": self.group.name,
            "task": self.task,
            "rows": [asdict(row) for row in self.rows],
            "known": sorted((name, fact.answer) for name, fact in setting.known.items()),
            "context": setting.context,
            "attack": None if attack is None else [attack.name, attack.describe(), setting.answered],
            "bank": asdict(setting.bank),
            "sampler": setting.sampler.to_dict(),
            "source": asdict(self.source),
        }
        return digest(canonical_json(parts))

    def run(self, benchmark: str) -> list[Record]:
        """Measure it."""
        lm, setting = self.state.lm, self.setting
        with self.state.intervention.attached(lm), setting.arithmetic(lm):
            values = TASKS[self.task](lm, self.rows, setting, self.state.hide_prompt)
        attack = "" if setting.attack is None else setting.attack.name
        name, group = self.state.name, self.group.name
        return [
            Record(
                benchmark, name, group, v.id, v.metric, v.value, v.stderr, v.tokens, v.replicates, attack, self._of(v.tokens)
            )
            for v in values
        ]

    def _of(self, tokens: int | None) -> Source:
        """The source with what the metric depends on: a bank or a sampler."""
        if self.task in GENERATED or (self.task == "attack" and tokens is None):
            return replace(self.source, sampler=self.setting.sampler.to_dict())
        return self.source


def groups_of(benchmark: Benchmark) -> list[Group]:
    """What is measured on each group of a benchmark and on the probes that ask in ways of their own.

    Every group of facts gets likelihoods and a greedy answer; the forget group exact memorisation too, membership scores where
    there is a holdout, and success scores where its facts have targets. Probes that repeat a group as it stands add nothing.
    """
    holdout = {name: probe for name, probe in benchmark.probes.items() if probe.side == "holdout"}
    forget: tuple[str, ...] = ("likelihood", "generation", "memorisation")
    forget += ("membership",) if any(probe.facts for probe in holdout.values()) else ()
    forget += ("rewrite",) if any(fact.target for fact in benchmark.forget) else ()
    attacks = {fact.id for probe in benchmark.probes.values() if probe.kind == "attack" for fact in probe.facts}
    found = [Group("forget", "forget", tuple(benchmark.forget), forget)]
    for name, facts in benchmark.scored.items():
        if not all(fact.id in attacks for fact in facts):
            found.append(Group(name, benchmark.side(name), tuple(facts)))
    known = {group.name for group in found}
    for name, probe in benchmark.probes.items():
        group = _probe_group(name if name not in known else f"{name} probe", probe)
        if group is not None:
            found.append(group)
    return found


def _probe_group(name: str, probe: Probe) -> Group | None:
    """A probe as a group, where it says more than the benchmark's groups do."""
    rows: tuple[Row, ...] = tuple(probe.facts)
    if probe.kind == "membership":
        return Group(name, probe.side, tuple(probe.texts), ("membership",))
    if probe.kind == "choice":
        rows = tuple(lettered(choice, probe.wrap) for choice in probe.choices)
        return Group(name, probe.side, rows, ("choice",))
    if probe.side == "holdout":
        return Group(name, probe.side, rows, ("membership",))
    if probe.context:
        context = tuple((fact.prompt, fact.answer) for fact in probe.context)
        return Group(name, probe.side, rows, ("knowledge",), context)
    if name == "verbmem":
        return Group(name, probe.side, rows, ("verbatim",))
    if probe.kind in ("question", "cloze") and probe.template != "{prompt}":
        asked = tuple(replace(fact, prompt=probe.wrap(fact.prompt)) for fact in probe.facts)
        return Group(name, probe.side, asked, ("generation",))
    return None


@dataclass(frozen=True)
class Plan:
    """An audit before it is run.

    Attributes:
        benchmark: name.
        groups: rows that fit the context.
        too_long: ids of rows that do not, by group.
        attacks: each with the facts that it is run on.
        draws, replicates: of every bank.
        sampler, precision: of every cell.
        known: facts by id.
    """

    benchmark: str
    groups: tuple[Group, ...]
    too_long: Mapping[str, tuple[str, ...]]
    attacks: tuple[tuple[Attack, tuple[Fact, ...]], ...]
    draws: int
    replicates: int
    sampler: SamplerConfig
    precision: Precision
    known: Mapping[str, Fact]

    @classmethod
    def of(
        cls,
        lm: MaskedDiffusionLM,
        benchmark: Benchmark,
        sampler: SamplerConfig,
        *,
        draws: int = 2,
        replicates: int = 4,
        precision: Precision = "fp32",
        attacks: bool = True,
        relearn: bool = False,
        extraction: bool = False,
        attack_rows: int = ATTACK_ROWS,
    ) -> Plan:
        """Plan the audit of a benchmark; rows that do not fit the model's context are set aside.

        Attacks that are measured by generated text are run on at most `attack_rows` rows, drawn by id.

        Raises:
            RemaskError: no forget row fits.
        """
        groups, too_long = [], {}
        for group in groups_of(benchmark):
            slots = sampler.gen_length if set(group.tasks) & {"generation"} else 0
            fit = tuple(row for row in group.rows if fits(lm, row, slots, group.context))
            if len(fit) < len(group.rows):
                left = {row.id for row in fit}
                too_long[group.name] = tuple(row.id for row in group.rows if row.id not in left)
            if fit:
                tasks = group.tasks + (("extraction",) if extraction and group.name == "forget" else ())
                groups.append(replace(group, rows=fit, tasks=tasks))
        if "forget" not in {group.name for group in groups}:
            raise RemaskError(f"{benchmark.name}: no forget row fits the context of {lm.name} ({lm.spec.max_length} tokens)")
        unread = tuple(fact.id for fact in benchmark.fit if not fits(lm, fact, 0))
        if unread:
            too_long["fit"] = unread
        fitting = {row.id for group in groups for row in group.rows}
        chosen = []
        for attack in attacks_for(benchmark, lm, relearn=relearn) if attacks else []:
            facts = targets(attack, benchmark)
            rows = tuple(fact for fact in facts if fact.id in fitting or fits(lm, fact, sampler.gen_length))
            if attack.measure == "recovered":  # each of them answers every row three times over
                kept = {fact.id for fact in sorted(rows, key=lambda fact: digest(fact.id))[:attack_rows]}
                rows = tuple(fact for fact in rows if fact.id in kept)
            if rows:
                chosen.append((attack, rows))
        known = {fact.id: fact for facts in [benchmark.forget, *benchmark.scored.values()] for fact in facts}
        return cls(benchmark.name, tuple(groups), too_long, tuple(chosen), draws, replicates, sampler, precision, known)

    def bank(self, seed: int) -> MaskBank:
        """The bank of a seed."""
        return MaskBank(self.draws, self.replicates, seed)

    def cells(self, states: Sequence[State], seed: int) -> Iterator[Cell]:
        """Cells of one seed; everything but log-probabilities is measured under seed 0 only.

        `before`, `after` and `never trained` are measured in full, the other states by log-probability. Attacks are run on the
        first two and on the floor: `never trained`, or without a reference `prompt masked`.
        """
        full = [state for state in states if state.name in ("before", "after", "never trained")]
        floor = "never trained" if any(state.name == "never trained" for state in states) else "prompt masked"
        hashes: dict[tuple[str, ...], str] = {}
        for state in states:
            source = state.source
            for group in self.groups:
                light = ("log-probability",) if group.scored else ()
                for task in group.tasks if seed == 0 and state in full else light:
                    yield from self._split(state, source, group, task, seed, hashes)
            if seed == 0 and state.name in ("before", "after", floor):
                for attack, facts in self.attacks:
                    text = attack.measure == "recovered"
                    if text and state.hide_prompt:
                        continue  # text has a floor of its own there: nothing recovered
                    read = len(facts) if text or attack.whole else EXAMPLES
                    read = read if text or state.name == "after" else 0
                    for rows, answered in ((facts[:read], True), (facts[read:], False)):
                        if rows:
                            group = Group("forget", "forget", rows)
                            change = {"attack": attack, "answered": answered}
                            yield from self._split(state, source, group, "attack", seed, hashes, **change)

    def _split(
        self,
        state: State,
        source: Source,
        group: Group,
        task: str,
        seed: int,
        hashes: dict[tuple[str, ...], str],
        **changes: Any,
    ) -> Iterator[Cell]:
        """Cells of one task; `hashes` remembers what banks were hashed to."""
        known = dict(self.known) if task == "rewrite" else {}
        bank = self.bank(seed)
        setting = Setting(bank, self.sampler, self.precision, group.context, known, **changes)
        source = replace(source, seed=seed, precision=self.precision)
        if task not in GENERATED:
            rows = tuple(row.id for row in group.rows)
            if rows not in hashes:
                hashes[rows] = _bank_hash(state.lm, group, bank)
            source = replace(source, estimator=ESTIMATOR, draws=bank.draws * bank.replicates, bank=hashes[rows])
        whole = "attack" in changes and changes["attack"].whole
        size = len(group.rows) if whole else CELL_ROWS
        for start in range(0, len(group.rows), size):
            yield Cell(state, group, task, group.rows[start : start + size], setting, source)


def states_of(
    lm: MaskedDiffusionLM,
    intervention: Intervention,
    reference: MaskedDiffusionLM | None = None,
    control: Intervention | None = None,
) -> list[State]:
    """The states of an audit, in the order of their reports."""
    states = [State("before", lm), State("after", lm, intervention)]
    states += [State("never trained", reference)] if reference is not None else []
    states += [State("prompt masked", lm, hide_prompt=True)]
    return states + ([State("mean-delta", lm, control)] if control is not None else [])


def run_cells(cells: Sequence[Cell], benchmark: str, folder: Path | None = None) -> list[list[Record]]:
    """Records of every cell, in order; with a folder, finished cells are read from it and new ones written to it."""
    return [_finish(cell, benchmark, folder) for cell in cells]


def _finish(cell: Cell, benchmark: str, folder: Path | None) -> list[Record]:
    if folder is None:
        return cell.run(benchmark)
    path = folder / f"{cell.key}.jsonl"
    if path.is_file():
        # Only something other than this library, which writes atomically, can have cut it: measure it again.
        with contextlib.suppress(RemaskError):
            return read_records(path)
    records = cell.run(benchmark)
    write_records(path, records)
    return records


def _bank_hash(lm: MaskedDiffusionLM, group: Group, bank: MaskBank) -> str:
    """Hash of a group's masks: what two audits must share to be compared."""
    rows = [lm.encode_text(row.id, row.text) if isinstance(row, Text) else lm.encode(row) for row in group.rows]
    return bank.fingerprint([(row.id, len(row.answer_ids)) for row in rows])
