"""docs/agent.md against the code: settings and their defaults, events, the tests that it points to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from agent import config, observer

_ROOT = Path(__file__).resolve().parent.parent.parent
_DOCUMENT = (_ROOT / "docs/agent.md").read_text()
_ROW = re.compile(r"^\| `([a-z_.0-9]+)` \| (\S+) \|", re.MULTILINE)
_UNITS = ((1 << 30, "G"), (1 << 20, "M"))


def _defaults(table: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    assert dataclasses.is_dataclass(table)
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if dataclasses.is_dataclass(value):
            yield from _defaults(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, _shown(field.name, value)


def _shown(name: str, value: object) -> str:
    if value is None or isinstance(value, tuple | Mapping):
        assert not value
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and name.endswith("_bytes"):
        return next(f"`{value // unit}{letter}`" for unit, letter in _UNITS if not value % unit)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_every_setting_is_there_with_its_default() -> None:
    section = _DOCUMENT.partition("## Settings")[2].partition("\n## ")[0]
    assert dict(_ROW.findall(section)) == dict(_defaults(config.Settings()))


def _event_kinds() -> Iterator[str]:
    for file in (_ROOT / "agent").rglob("*.py"):
        yield from re.findall(r'\.event\(\s*"(\w+)"', file.read_text())
    yield observer.ORDINARY_PULL


def test_what_an_event_means_is_there() -> None:
    section = _DOCUMENT.partition("## Troubleshooting")[2].partition("\n## ")[0]
    kinds = set(_event_kinds())
    assert len(kinds) > 15
    assert {kind for kind in kinds if f"`{kind}`" not in section} == set()


def test_what_shows_something_exists() -> None:
    section = _DOCUMENT.partition("## What users ask")[2]
    named = re.findall(r"`((?:tests/\S+/)?test_\w+\.py)`", section)
    assert len(named) > 15
    folder = _ROOT
    for name in named:
        if "/" in name:
            folder = (_ROOT / name).parent
        assert (folder / Path(name).name).is_file(), name
