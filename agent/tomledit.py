"""Setting keys in a TOML file that belongs to somebody else: every line of theirs stays, all can be undone.

Pure. Called by containerdconfig.py. A line of ours ends in `MARK`; a line that one of ours replaces stays
above it as a comment that begins with `REPLACED`. So `revert` needs nothing but the text, and an
administrator who opens the file sees what was changed. What this cannot do (a key written as a dotted key or
in an inline table) is found by parsing the result: ConfigurationError then, never a file that says something
else.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from imagefs import errors

MARK = "# glowplug"
REPLACED = "# glowplug replaced: "

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")
_HEADER = re.compile(r"\s*\[(?!\[).*")


@dataclasses.dataclass(frozen=True, slots=True)
class _Statement:
    """Lines [start, end): a table's header (`table` is its path), or one key and its value in it."""

    start: int
    end: int
    table: tuple[str, ...]
    key: str | None


def parse(text: str, where: str) -> dict[str, Any]:
    """A TOML document. ConfigurationError names `where`."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise errors.ConfigurationError(f"{where}: not TOML: {exc}") from exc


def apply(text: str, wanted: Mapping[str, Any], where: str) -> str:
    """The text with all of `wanted` (tables as mappings) set in it. What an earlier `apply` set and this one
    does not is reverted. ConfigurationError if the text is written in a way that this cannot extend."""
    text = revert(text)
    document = parse(text, where)
    expected = merge(document, wanted)
    if expected == document:
        return text
    lines = _lines(text)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    for table, values in _tables(wanted, ()):
        current = _table_at(document, table)
        if current is None:
            lines += _fresh_table(table, values)
        else:
            _set(
                lines, table, {k: v for k, v in values.items() if k not in current or current[k] != v}, where
            )
    result = "".join(lines)
    try:
        if tomllib.loads(result) == expected:
            return result
    except tomllib.TOMLDecodeError:
        pass
    raise errors.ConfigurationError(
        f"{where}: cannot be extended as it is written (dotted keys or inline tables); set this by hand:\n"
        + "".join(_fresh(wanted))
    )


def revert(text: str) -> str:
    """The text as it was before `apply`."""
    kept = []
    for line in _lines(text):
        before, replaced, original = line.partition(REPLACED)
        if replaced and not before.strip():
            kept.append(original)
        elif not line.rstrip().endswith(MARK):
            kept.append(line)
    return "".join(kept)


def merge(document: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A document with `wanted` laid over it, table by table."""
    merged = copy.deepcopy(dict(document))
    for key, value in wanted.items():
        below = merged.get(key)
        merged[key] = (
            merge(below if isinstance(below, dict) else {}, value) if isinstance(value, Mapping) else value
        )
    return merged


# -- writing -------------------------------------------------------------------------------------------


def _set(lines: list[str], table: tuple[str, ...], values: Mapping[str, Any], where: str) -> None:
    if not values:
        return
    statements = list(_statements(lines, where))
    header = next((each for each in statements if each.table == table and each.key is None), None)
    if table and header is None:
        lines += _fresh_table(table, values)
        return
    own = {each.key: each for each in statements if each.table == table and each.key is not None}
    indent = ""
    if own:
        first = lines[min(each.start for each in own.values())]
        indent = first[: len(first) - len(first.lstrip())]
    new: list[str] = []
    edits: list[tuple[int, int, list[str]]] = []
    for key, value in values.items():
        line = f"{indent}{_key(key)} = {_literal(value)} {MARK}\n"
        if key in own:
            start, end = own[key].start, own[key].end
            edits.append((start, end, [f"{REPLACED}{each}" for each in lines[start:end]] + [line]))
        else:
            new.append(line)
    # Keys outside of tables go behind the version, which reads best first.
    before = header or own.get("version")
    at = before.end if before is not None else 0
    edits.append((at, at, new))
    # From the end, so that the numbers of the lines before stay what they are.
    for start, end, replacement in sorted(edits, key=lambda edit: edit[:2], reverse=True):
        lines[start:end] = replacement


def _fresh(wanted: Mapping[str, Any]) -> Iterator[str]:
    for table, values in _tables(wanted, ()):
        yield from _fresh_table(table, values)


def _fresh_table(table: tuple[str, ...], values: Mapping[str, Any]) -> Iterator[str]:
    path = ".".join(map(_key, table))
    arrays = {key: value for key, value in values.items() if _is_array_of_tables(value)}
    if table and (not values or len(arrays) < len(values)):
        yield f"[{path}] {MARK}\n"
    for key, value in values.items():
        if key not in arrays:
            yield f"{'  ' if table else ''}{_key(key)} = {_literal(value)} {MARK}\n"
    for key, entries in arrays.items():
        for entry in entries:
            yield f"[[{path}{'.' if path else ''}{_key(key)}]] {MARK}\n"
            for name, value in entry.items():
                yield f"  {_key(name)} = {_literal(value)} {MARK}\n"


def _key(name: str) -> str:
    return name if _BARE_KEY.match(name) else _string(name)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_literal(each)}" for key, each in value.items()) + "}"
    assert isinstance(value, list | tuple)
    return "[" + ", ".join(map(_literal, value)) + "]"


def _string(value: str) -> str:
    """JSON's strings are TOML's, but for DEL, and for characters beyond 16 bits, which stay as they are."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# -- reading -------------------------------------------------------------------------------------------


def _lines(text: str) -> list[str]:
    """Lines as TOML has them: str.splitlines knows more line ends."""
    return [f"{line}\n" for line in text.split("\n")[:-1]] + [each for each in text.split("\n")[-1:] if each]


def _statements(lines: list[str], where: str) -> Iterator[_Statement]:
    """The statements of a valid document: each is valid by itself, which says where it ends."""
    table: tuple[str, ...] = ()
    start = 0
    while start < len(lines):
        if not lines[start].strip() or lines[start].lstrip().startswith("#"):
            start += 1
            continue
        end, parsed = _statement_end(lines, start, where)
        if lines[start].lstrip().startswith("["):
            if _HEADER.match(lines[start]):
                table = _single_path(parsed)
                yield _Statement(start, end, table, None)
            else:
                table = ("[[", str(start))  # an array of tables: nothing is set in its entries
        else:
            yield _Statement(start, end, table, next(iter(parsed)))
        start = end


def _statement_end(lines: list[str], start: int, where: str) -> tuple[int, dict[str, Any]]:
    for end in range(start + 1, len(lines) + 1):
        try:
            return end, tomllib.loads("".join(lines[start:end]))
        except tomllib.TOMLDecodeError:
            continue
    raise errors.ConfigurationError(f"{where}: line {start + 1} cannot be understood")


def _single_path(parsed: Mapping[str, Any]) -> tuple[str, ...]:
    path: list[str] = []
    while parsed:
        ((key, parsed),) = parsed.items()
        path.append(key)
    return tuple(path)


def _tables(
    wanted: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each table of `wanted` that has values of its own."""
    own = {key: value for key, value in wanted.items() if not isinstance(value, Mapping)}
    if own or not wanted:
        yield path, own
    for key, value in wanted.items():
        if isinstance(value, Mapping):
            yield from _tables(value, (*path, key))


def _table_at(document: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    found: Any = document
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _is_array_of_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)
