"""A document's text: YAML with the line of each key, and what is wrong with it in its writer's words. Pure.

Called by `endpoint`. Keys repeated in one mapping are errors, because YAML would silently take the last; an
unknown key is an error that suggests the right one; every error names line, key and remedy.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

import pydantic
import yaml

from serving import errors

_ENGINES = ("vllm", "command", "mlflow", "triton")
"""Tags of a union, which stand in pydantic's locations and are no keys."""

Lines = Mapping[tuple[str, ...], int]
"""The line, from 1, on which each key path stands."""


def parse(text: str, where: str) -> tuple[Any, Lines]:
    """The plain values, and the line (from 1) of each key path."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[tuple[str, ...], int] = {}
        _walk(node, (), lines, where)
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as exc:
        line = f":{exc.problem_mark.line + 1}" if exc.problem_mark else ""
        raise errors.DocumentError(f"{where}{line}: not YAML: {exc.problem or exc}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise errors.DocumentError(f"{where}: not YAML: {exc}") from exc
    if not isinstance(document, dict):
        raise errors.DocumentError(f"{where}: an endpoint document is a mapping of keys, as in `name: chat`")
    return document, lines


def _walk(
    node: yaml.Node | None, path: tuple[str, ...], lines: dict[tuple[str, ...], int], where: str
) -> None:
    if node is None:
        return
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(item, (*path, str(number)), lines, where)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        line = key.start_mark.line + 1
        if name in seen:
            shown = ".".join((*path, name))
            raise errors.DocumentError(f"{where}:{line}: {shown} is given twice; keep one of them")
        seen.add(name)
        lines[(*path, name)] = line
        _walk(value, (*path, name), lines, where)


# -- what is wrong, in the reader's words --------------------------------------------------------------


def explained(
    exc: pydantic.ValidationError, lines: Lines, where: str, model: type[pydantic.BaseModel]
) -> errors.DocumentError:
    """All that is wrong with a document of `model`, each with its line, key and remedy."""
    found = [_explained(each, lines, where, model) for each in exc.errors(include_url=False)]
    return errors.DocumentError("\n".join(dict.fromkeys(found)))


def _explained(found: Any, lines: Lines, where: str, model: type[pydantic.BaseModel]) -> str:
    path = _keys(found["loc"])
    message, kind = str(found["msg"]), found["type"]
    if kind == "string_pattern_mismatch" and path == ("name",):
        message = f"{found['input']!r} is no name; use up to 40 lower-case letters, digits and inner dashes"
    elif kind == "value_error":  # one of ours: it opens with the key below `path`
        key, _, message = message.removeprefix("Value error, ").partition(": ")
        path = (*path, *key.split("."))
    elif kind == "extra_forbidden":
        message = f"unknown key{_suggestion(path, model)}"
    elif kind == "missing":
        message = "is required"
    elif kind == "union_tag_invalid":
        path = (*path, "kind")
        message = f"{found['ctx']['tag']!r} is no engine; use vllm or command"
    elif kind == "union_tag_not_found":
        path = (*path, "kind")
        message = "is required: vllm or command"
    else:
        given = found.get("input")
        shown = f", not {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
        message = message[:1].lower() + message[1:].replace("Input should", "should") + shown[:80]
        message = message.replace("input should", "should")
    return f"{where}{_line(path, lines)}: {'.'.join(path) or 'document'}: {message}"


def _line(path: tuple[str, ...], lines: Lines) -> str:
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return f":{lines[path[:end]]}"
    return ""


def _keys(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """A pydantic location as the document's keys: the union's tag is no key."""
    keys = [str(each) for each in location]
    if len(keys) > 1 and keys[0] == "engine" and keys[1] in _ENGINES:
        del keys[1]
    return tuple(keys)


def _suggestion(path: tuple[str, ...], model: type[pydantic.BaseModel]) -> str:
    known = frozenset(_paths(model, ()))
    *above, wrong = path
    here = sorted(each[-1] for each in known if each[:-1] == tuple(above))
    near = difflib.get_close_matches(wrong, here, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join((*above, near[0]))}?"
    elsewhere = [
        ".".join(each) for each in sorted(known, key=lambda each: (len(each), each)) if each[-1] == wrong
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(here)}" if here else ""


def _paths(model: type[pydantic.BaseModel], above: tuple[str, ...]) -> typing.Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        for part in _models(field.annotation):
            yield from _paths(part, (*above, name))


def _models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [each for argument in typing.get_args(annotation) for each in _models(argument)]
    return []
