"""Records: one number (or one generated text) about one row, with everything that it depends on. Aggregates follow from them.

A record file is JSON Lines, one object a (row, metric) under one state of the model, keys in a fixed order. Every line stands
for itself: it names benchmark, group, row, metric, both fingerprints, and either estimator, draws and bank (likelihoods) or
the sampler's settings (generations). The last line closes the file with the number of records, so that a cut file is found.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import RemaskError
from ..facts import write_atomically

SCHEMA = 2
ESTIMATOR = "elbo, exact count, stratified"


@cache
def package_versions() -> dict[str, str]:
    """Versions of what computes, as they stand in every record."""
    from .. import __version__

    computing = {"remask": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), **computing}


@dataclass(frozen=True)
class Source:
    """What a number depends on beside its row.

    Attributes:
        model, intervention: fingerprints; intervention "" = none attached.
        preset: name of the intervention's settings.
        seed: of the bank and of the intervention's partial states.
        precision: `fp32`, or `bf16 autocast`.
        estimator, draws, bank: of a likelihood: its name, masks a row, hash of all masks of the group.
        sampler: settings of a generation.
        versions: of the packages that compute.
    """

    model: str
    intervention: str = ""
    preset: str = "none"
    seed: int = 0
    precision: str = "fp32"
    estimator: str | None = None
    draws: int | None = None
    bank: str | None = None
    sampler: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=package_versions)


@dataclass(frozen=True)
class Record:
    """One value.

    Attributes:
        benchmark: e.g. `tofu:forget01`.
        state: of the model: `before`, `after`, `never trained`, `prompt masked`, `mean-delta`.
        group: set of rows.
        id: row id.
        metric: name in `metrics.registry.METRICS`, or `output` for generated text.
        value: number or text.
        stderr: Monte-Carlo standard error; None where nothing is random or it was not measured.
        tokens: answer tokens that were scored; None where the metric does not count tokens.
        replicates: the value under each independent part of the bank; None where there are none.
        attack: how the row was asked, "" = as it stands.
        source: what else it depends on.
    """

    benchmark: str
    state: str
    group: str
    id: str
    metric: str
    value: float | str
    stderr: float | None
    tokens: int | None
    replicates: tuple[float, ...] | None
    attack: str
    source: Source

    def to_json(self) -> str:
        """One line, fields of `source` beside the others."""
        flat = {"schema": SCHEMA, **{k: v for k, v in vars(self).items() if k != "source"}, **asdict(self.source)}
        return json.dumps({key: value for key, value in flat.items() if value is not None}, ensure_ascii=False, allow_nan=False)


_SOURCE = {item.name for item in fields(Source)}
_RECORD = {item.name for item in fields(Record)} - {"source"}
_OPTIONAL = {"stderr", "tokens", "replicates", "estimator", "draws", "bank", "sampler"}


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write a record file, atomically."""
    lines = [record.to_json() for record in records]
    lines.append(json.dumps({"records": len(lines)}))
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_records(path: str | Path) -> list[Record]:
    """Read a record file.

    Raises:
        RemaskError: missing file, other schema, or a file that is cut or damaged (the line is named).
    """
    path = Path(path)
    if not path.is_file():
        raise RemaskError(f"{path}: no such record file; run `remask audit` with that folder as --out")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if number == len(lines) and set(row) == {"records"}:
                if row["records"] != len(records):
                    raise ValueError(f"{len(records)} records where {row['records']} were written")
                return records
            records.append(_record(row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RemaskError(f"{path}, line {number}: cut or damaged ({error}); run the audit again, it resumes") from None
    raise RemaskError(f"{path}, line {len(lines)}: the file is cut here; run the audit again, it resumes")


def _record(row: dict[str, Any]) -> Record:
    if row.pop("schema") != SCHEMA:
        raise ValueError(f"schema is not {SCHEMA}")
    unknown, missing = set(row) - _SOURCE - _RECORD, (_SOURCE | _RECORD) - _OPTIONAL - set(row)
    if unknown or missing:
        raise ValueError(f"unknown or missing field {min(unknown or missing)!r}")
    source = Source(**{key: value for key, value in row.items() if key in _SOURCE})
    own: dict[str, Any] = dict.fromkeys(("stderr", "tokens", "replicates")) | {
        key: value for key, value in row.items() if key in _RECORD
    }
    own["replicates"] = own["replicates"] and tuple(own["replicates"])
    return Record(**own, source=source)
