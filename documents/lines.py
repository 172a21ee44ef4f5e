"""YAML text to plain values, and the line on which each key stands. Pure.

Called by `reading`. Invariants: a key repeated in one mapping is an error, because YAML would silently take
the last; what a text holds is bounded with its aliases followed, because each level of aliases may multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

_MAX_PLACES = 200_000

Path = tuple[str, ...]
"""Keys from the top of a document; items of a list by their number."""
Lines = Mapping[Path, int]
"""The line, from 1, on which each key path stands."""


class InvalidError(ValueError):
    """The text is no such document; the message begins with where, and the line if it is known."""


def parse(text: str, where: str) -> tuple[Any, Lines]:
    """The values, and the line of each key path. `where` names the text in errors. InvalidError."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            lines: dict[Path, int] = {}
            _walk(node, (), lines, where)
            return None if node is None else loader.construct_document(node), lines
        finally:
            loader.dispose()
    except InvalidError:
        raise
    except yaml.MarkedYAMLError as exc:
        line = f":{exc.problem_mark.line + 1}" if exc.problem_mark else ""
        raise InvalidError(f"{where}{line}: not YAML: {exc.problem or exc}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise InvalidError(f"{where}: not YAML: {exc}") from exc


def _walk(node: yaml.Node | None, path: Path, lines: dict[Path, int], where: str) -> None:
    if node is None:
        return
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > _MAX_PLACES:
        raise InvalidError(f"{where}: more than {_MAX_PLACES} values, aliases followed; say less")
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(item, (*path, str(number)), lines, where)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            shown = ".".join((*path, name))
            raise InvalidError(f"{where}:{line}: {shown} is given twice; keep one of them")
        seen.add(name)
        lines[(*path, name)] = line
        _walk(value, (*path, name), lines, where)
