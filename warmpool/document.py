"""The document of `glowplug warmpool`: one YAML text in, one frozen `Settings` out, or an error that names
key, line and remedy. Pure.

Called by the verbs. No file is opened here that the document names. Unknown keys are errors that suggest the
right one; a key repeated in a mapping is an error, because YAML would silently take the last.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
import yaml

from warmpool import errors
from warmpool.settings import Settings

MAX_DOCUMENT_BYTES = 1 << 20


def parse(text: str, where: str) -> Settings:
    """The settings in a YAML text. InvalidInputError with `where`, line, key and remedy."""
    if len(text) > MAX_DOCUMENT_BYTES:
        raise errors.InvalidInputError(f"{where}: over {MAX_DOCUMENT_BYTES} bytes: no document of ours")
    lines: dict[tuple[str, ...], int] = {}
    try:
        _walk(yaml.compose(text, Loader=yaml.SafeLoader), (), lines, where)
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as exc:
        line = f":{exc.problem_mark.line + 1}" if exc.problem_mark else ""
        raise errors.InvalidInputError(f"{where}{line}: not YAML: {exc.problem or exc}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise errors.InvalidInputError(f"{where}: not YAML: {exc}") from exc
    if not isinstance(document, dict):
        raise errors.InvalidInputError(f"{where}: the document is a mapping of keys, as in `name: gpu`")
    try:
        return Settings.model_validate(document)
    except pydantic.ValidationError as exc:
        found = [_explained(each, lines, where) for each in exc.errors(include_url=False)[:10]]
        raise errors.InvalidInputError("\n".join(found)) from exc


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
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise errors.InvalidInputError(
                f"{where}:{line}: {'.'.join((*path, name))} is given twice; keep one of them"
            )
        seen.add(name)
        lines[(*path, name)] = line
        _walk(value, (*path, name), lines, where)


def _explained(found: Any, lines: Mapping[tuple[str, ...], int], where: str) -> str:
    path = _keys(found["loc"])
    message, kind = str(found["msg"]), found["type"]
    if kind == "value_error":  # one of ours: it opens with the key below `path`
        key, _, message = message.removeprefix("Value error, ").partition(": ")
        path = (*path, *key.split("."))
    elif kind == "extra_forbidden":
        message = f"unknown key{_suggestion(path)}"
    elif kind == "missing":
        message = "is required"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, "kind")
        message = f"must be one of {found['ctx'].get('expected_tags', _kinds(path))}"
    else:
        given = found.get("input")
        shown = f", not {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
        message = (message[:1].lower() + message[1:] + shown[:80]).replace("input should", "should")
    line = next((f":{lines[path[:end]]}" for end in range(len(path), 0, -1) if path[:end] in lines), "")
    return f"{where}{line}: {'.'.join(path) or 'document'}: {message}"


_TAGS = ("kubernetes", "ec2", "simulated", "serve", "file")


def _keys(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """A pydantic location as the document's keys: a union's tag is no key."""
    keys = [str(each) for each in location]
    if len(keys) > 1 and keys[0] in ("provider", "demand") and keys[1] in _TAGS:
        del keys[1]
    return tuple(keys)


def _kinds(path: tuple[str, ...]) -> str:
    return "kubernetes, ec2, simulated" if path[0] == "provider" else "kubernetes, serve, file"


def _suggestion(path: tuple[str, ...]) -> str:
    """Names of classes are the user's: below `classes`, one key is any."""
    known = frozenset(_paths(Settings, ()))
    wrong, above = path[-1], _anonymous(path[:-1])
    here = sorted({each[-1] for each in known if each[:-1] == above})
    near = difflib.get_close_matches(wrong, here, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join((*path[:-1], near[0]))}?"
    elsewhere = sorted(".".join(each) for each in known if each[-1] == wrong)
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(here)}" if here else ""


def _anonymous(path: tuple[str, ...]) -> tuple[str, ...]:
    """Without what the user names or counts."""
    return tuple(
        each
        for number, each in enumerate(path)
        if not each.isdigit() and not (number and path[number - 1] == "classes")
    )


def _paths(model: type[pydantic.BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        for part in _models(field.annotation):
            yield from _paths(part, (*above, name))


def _models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for each in typing.get_args(annotation) for model in _models(each)]
