"""The families that `load` knows: the library's own, those of installed packages, and those registered by hand."""

from __future__ import annotations

from importlib.metadata import entry_points

from ..errors import RemaskError
from . import bert, diffugpt, diffullama, dream, llada, llada2, llada_moe, mmada, native, sdar
from .family import Config, Family

ENTRY_POINTS = "remask.families"
_FAMILIES: list[Family] = [
    native.FAMILY,
    llada.FAMILY,
    mmada.FAMILY,
    dream.FAMILY,
    diffullama.FAMILY,
    diffugpt.FAMILY,
    llada_moe.FAMILY,
    llada2.FAMILY,
    sdar.FAMILY,
    bert.BERT,
    bert.MODERNBERT,
]


def register(family: Family) -> None:
    """Make `load` know a family; it is tried before those registered earlier.

    Raises:
        RemaskError: the name is taken.
    """
    if any(family.name == other.name for other in families()):
        raise RemaskError(f"a family named {family.name!r} exists already; choose another name")
    _FAMILIES.insert(0, family)


def unregister(name: str) -> None:
    """Forget a family that was registered by hand."""
    _FAMILIES[:] = [family for family in _FAMILIES if family.name != name]


def families() -> list[Family]:
    """Every known family; packages add theirs in the entry-point group `remask.families`."""
    return [*(point.load() for point in entry_points(group=ENTRY_POINTS)), *_FAMILIES]


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        RemaskError: unknown; lists the names.
    """
    known = families()
    found = next((family for family in known if family.name == name), None)
    if found is None:
        raise RemaskError(f"unknown family {name!r}; choose one of {', '.join(family.name for family in known)}")
    return found


def recognise(config: Config) -> Family | None:
    """The family whose checkpoints have such a config.json, or None."""
    return next((family for family in families() if family.recognises(config)), None)
