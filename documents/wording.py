"""What is wrong with a document, in its writer's words: each error with its line, key and remedy. Pure.

Called by `reading`, with what pydantic found. An unknown key is told the one that was meant, here or
elsewhere in the document. Rules of a model (`ValueError` of a validator) open with the key below the model,
as in "max: 3 is below min". A union's tags stand in pydantic's locations and are no keys of the document:
they are left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pydantic

from documents.lines import Lines, Path

_ANY = "*"
"""In a place: a key that the writer names, or an item's number."""

Found = Mapping[str, Any]
"""One of `pydantic.ValidationError.errors()`."""
Words = Callable[[Path, Found], str | None]
"""Better words for what was found at a key; None where there are none."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """A key that the model knows. `tag`: the key by which the union below is told apart, which may be one of
    `tags`."""

    path: Path
    tag: str | None
    tags: tuple[str, ...]


def explained(
    exc: pydantic.ValidationError, lines: Lines, where: str, model: type[pydantic.BaseModel], words: Words
) -> str:
    """All that is wrong with a document of `model`, a line for each."""
    places = tuple(_places(model, ()))
    found = [_explained(each, lines, where, places, words) for each in exc.errors(include_url=False)]
    return "\n".join(dict.fromkeys(found))


def _explained(found: Found, lines: Lines, where: str, places: Sequence[_Place], words: Words) -> str:
    path, union = _keys(found["loc"], places)
    kind = found["type"]
    if kind in ("union_tag_invalid", "union_tag_not_found") and union is not None and union.tag is not None:
        path = (*path, union.tag)
    message = words(path, found)
    if message is None and kind == "value_error":
        key, _, message = str(found["msg"]).removeprefix("Value error, ").partition(": ")
        path = (*path, *key.split("."))
    elif message is None:
        message = _message(path, found, union, places)
    return f"{where}{_line(path, lines)}: {'.'.join(path) or 'document'}: {message}"


def _message(path: Path, found: Found, union: _Place | None, places: Sequence[_Place]) -> str:
    match found["type"]:
        case "extra_forbidden":
            return f"unknown key{_suggestion(path, [each.path for each in places])}"
        case "missing":
            return "is required"
        case "union_tag_invalid":
            return f"must be one of {found['ctx']['expected_tags']}"
        case "union_tag_not_found" if union is not None:
            return f"must be one of {', '.join(union.tags)}"
    message, given = str(found["msg"]), found.get("input")
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    message = message[:1].lower() + message[1:].replace("Input should", "should") + shown[:80]
    return message.replace("input should", "should")


def _line(path: Path, lines: Lines) -> str:
    """Of the key, or of the nearest above it that is there."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return f":{lines[path[:end]]}"
    return ""


def _keys(location: tuple[int | str, ...], places: Sequence[_Place]) -> tuple[Path, _Place | None]:
    """A pydantic location as the document's keys, and the union that the last of them holds, if it does."""
    keys: Path = ()
    union: _Place | None = None
    for each in map(str, location):
        if union is not None and each in union.tags:
            union = None
            continue
        keys = (*keys, each)
        union = next((place for place in places if place.tags and _same(place.path, keys)), None)
    return keys, union


def _suggestion(path: Path, known: Sequence[Path]) -> str:
    *above, wrong = path
    here = sorted({each[-1] for each in known if _same(each[:-1], above)})
    near = difflib.get_close_matches(wrong, here, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join((*above, near[0]))}?"
    elsewhere = [
        _shown(each) for each in sorted(known, key=lambda each: (len(each), each)) if each[-1] == wrong
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(here)}" if here else ""


def _same(pattern: Sequence[str], path: Sequence[str]) -> bool:
    return len(pattern) == len(path) and all(a in (b, _ANY) for a, b in zip(pattern, path, strict=True))


def _shown(pattern: Path) -> str:
    return ".".join(each for each in pattern if each != _ANY)


# -- what a model knows ----------------------------------------------------------------------------------


def _places(model: type[pydantic.BaseModel], above: Path) -> Iterator[_Place]:
    for name, field in model.model_fields.items():
        here = (*above, name)
        parts = tuple(_parts(field.annotation, ()))
        tag = field.discriminator if isinstance(field.discriminator, str) else None
        tags = [] if tag is None else [each for _, part in parts for each in _literals(part, tag)]
        yield _Place(here, tag, tuple(tags))
        for below, part in parts:
            yield from _places(part, (*here, *below))


def _parts(annotation: Any, below: Path) -> Iterator[tuple[Path, type[pydantic.BaseModel]]]:
    """The models in an annotation, and how far below its key they stand."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield below, annotation
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        yield from _parts(arguments[1], (*below, _ANY))
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        for each in arguments:
            yield from _parts(each, (*below, _ANY))
    elif origin in (typing.Union, types.UnionType):
        for each in arguments:
            yield from _parts(each, below)
    elif origin is typing.Annotated:
        yield from _parts(arguments[0], below)


def _literals(model: type[pydantic.BaseModel], field: str) -> tuple[str, ...]:
    return tuple(map(str, typing.get_args(model.model_fields[field].annotation)))
