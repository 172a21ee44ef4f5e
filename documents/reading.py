"""A document's text to the pydantic model that it is to be: `load`. Pure.

Called with text that was read by somebody else, and bounded there; errors are wrapped by the caller, in words
of its own package.
"""

from __future__ import annotations

from typing import TypeVar

import pydantic

from documents import lines, wording
from documents.lines import InvalidError as InvalidError
from documents.lines import Path
from documents.wording import Found, Words

T = TypeVar("T", bound=pydantic.BaseModel)


def _none(path: Path, found: Found) -> str | None:
    return None


def load(text: str, where: str, model: type[T], *, called: str, example: str, words: Words = _none) -> T:
    """What `text` (YAML or JSON) says. `where` names the text in errors, `called` what it is to be and
    `example` a line of it. InvalidError names all that is wrong."""
    values, places = lines.parse(text, where)
    if not isinstance(values, dict):
        raise InvalidError(f"{where}: {called} is a mapping of keys, as in `{example}`")
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as exc:
        raise InvalidError(wording.explained(exc, places, where, model, words)) from exc
