"""What a request asks for and what its answer cost, in tokens: read from the bytes of both. Pure.

Called by `toll`, in the process that serves the request; needs nothing but Python's library. Nothing is taken
from the client's word: the prompt is measured, what may be asked for is clamped, and the engine's own usage
settles it.

`read` looks at a request's body. `Meter` is fed the pieces of an answer, cut anywhere, and gives back what is
to be passed on: all of it, but for the one event with the usage that we asked a stream for and its client did
not. It holds at most one event.

Formats: the OpenAI API (completions, chat, responses) and what else says `usage` in the same words; an answer
without it is measured by its events, or by its bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

_MOST_EVENT_BYTES = 1 << 20
_MOST_ANSWER_BYTES = 8 << 20
"""What is longer is measured by its bytes, not read."""
_MOST_TOKENS = 1 << 40

_OUTPUT_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_UNSAID: Mapping[str, str] = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/completions": "max_tokens",
}
"""Where a request that names no bound would get the model's."""
_WITH_STREAM_OPTIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
_EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r(?!\Z))")
"""A blank line. A carriage return at the end of what has come may be half of one."""
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclasses.dataclass(frozen=True, slots=True)
class Terms:
    """What a client may ask for, None for anything. `priority`: the lowest number, hence the earliest, that
    its requests may have, and what those have that say nothing. `output_tokens`: the most of one answer."""

    priority: int | None = None
    output_tokens: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """A request. `input_tokens` are those that came as numbers, `input_bytes` is the text. `output_tokens`:
    the most that it can get, None where nothing bounds it. `body`: as it is to be passed on; with
    `usage_added` the client did not ask for the usage that its stream will bring."""

    body: bytes
    input_tokens: int
    input_bytes: int
    output_tokens: int | None
    usage_added: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What an engine counted. `cached` is a part of `input`."""

    input: int
    output: int
    cached: int = 0


def names_priority(body: bytes) -> bool:
    """Whether a JSON body may have the key, however it is spelt: escaped, or in another Unicode form."""
    return b"priority" in body or b"\\u" in body or b"\0" in body


def read(path: str, body: bytes, terms: Terms, *, measure: bool) -> Reading:
    """A request's body under its terms. `measure`: ask a stream for its usage."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):  # the engine's to refuse; it is not free
        return Reading(body, 0, len(body), terms.output_tokens)
    if not isinstance(document, dict):
        return Reading(body, *_measured(document), terms.output_tokens)
    before = dict(document)
    if terms.priority is not None and ("priority" in document or terms.priority != 0):
        document["priority"] = max(terms.priority, _whole(document.get("priority"), terms.priority))
    most = _clamp(document, path, terms.output_tokens)
    options = document.get("stream_options")
    added = (
        measure
        and path in _WITH_STREAM_OPTIONS
        and document.get("stream") is True
        and not (isinstance(options, dict) and options.get("include_usage"))
    )
    if added:
        document["stream_options"] = {
            **(options if isinstance(options, dict) else {}),
            "include_usage": True,
        }
    if document != before or any(type(document[key]) is not type(before[key]) for key in before):
        body = json.dumps(document, separators=(",", ":")).encode()
    if most is not None:
        most *= max(1, _whole(document.get("n"), 1)) * _prompts(document.get("prompt"))
    return Reading(body, *_measured(before), most, added)


def usage(document: Any) -> Usage | None:
    """The usage that an answer, or one event of it, names; None where it names none."""
    if not isinstance(document, dict):
        return None
    found = document.get("usage")
    if found is None:
        for name in ("response", "message"):  # events of the responses and the messages API
            if isinstance(document.get(name), dict):
                found = document[name].get("usage")
    if not isinstance(found, dict):
        return None
    given = _first(found, "prompt_tokens", "input_tokens")
    made = _first(found, "completion_tokens", "output_tokens")
    if given is None and made is None:
        return None
    cached = _first(found, "cache_read_input_tokens")
    for name in ("prompt_tokens_details", "input_tokens_details"):
        if cached is None and isinstance(found.get(name), dict):
            cached = _first(found[name], "cached_tokens")
    return Usage(given or 0, made or 0, min(cached or 0, given or 0))


class Meter:
    """One answer. `feed` every piece, `end` once."""

    def __init__(self, content_type: str, *, usage_added: bool = False) -> None:
        self._stream = content_type.partition(";")[0].strip().lower() == "text/event-stream"
        self._hides = usage_added and self._stream
        self._kept = bytearray()
        self._too_long = False
        self.usage: Usage | None = None
        """What the engine said so far: of each number the largest."""
        self.events = 0
        """Of a stream; at least as many tokens."""
        self.bytes = 0

    def feed(self, piece: bytes) -> bytes:
        """What is to be passed on now."""
        self.bytes += len(piece)
        if self._stream:
            passed = self._events(piece)
            return passed if self._hides else piece
        if len(self._kept) + len(piece) > _MOST_ANSWER_BYTES:
            self._too_long = True
            self._kept.clear()
        if not self._too_long:
            self._kept += piece
        return piece

    def end(self) -> bytes:
        """What is left to be passed on. The answer may have been cut off."""
        rest = bytes(self._kept)
        self._kept.clear()
        if self._stream:
            alone = self._note(rest)
            return rest if self._hides and not alone else b""
        if not self._too_long:
            self._learn(rest)
        return b""

    def _events(self, piece: bytes) -> bytes:
        self._kept += piece
        passed = bytearray()
        begin = 0
        for end in _EVENT_END.finditer(self._kept, max(0, len(self._kept) - len(piece) - 3)):
            event = bytes(self._kept[begin : end.end()])
            if not self._note(event) or not self._hides:
                passed += event
            begin = end.end()
        del self._kept[:begin]
        if len(self._kept) > _MOST_EVENT_BYTES:  # no usage is as long
            passed += self._kept
            self._kept.clear()
        return bytes(passed)

    def _note(self, event: bytes) -> bool:
        """Count an event. Whether it is the one that brings the usage alone."""
        data = b"\n".join(line[5:].strip() for line in _LINE_END.split(event) if line.startswith(b"data:"))
        if not data or data == b"[DONE]":
            return False
        if b'"usage"' in data:
            document = self._learn(data)
            if isinstance(document, dict) and document.get("choices") == [] and self.usage is not None:
                return True
        self.events += 1
        return False

    def _learn(self, text: bytes) -> Any:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return None
        found = usage(document)
        if found is not None:
            before = self.usage or Usage(0, 0)
            self.usage = Usage(
                max(found.input, before.input),
                max(found.output, before.output),
                max(found.cached, before.cached),
            )
        return document


def _clamp(document: dict[str, Any], path: str, most: int | None) -> int | None:
    """Bound what is asked for. What the answer can have then."""
    asked = [name for name in _OUTPUT_FIELDS if document.get(name) is not None]
    if most is not None:
        for name in asked:
            document[name] = max(0, min(most, _whole(document[name], most)))
        if not asked and path in _UNSAID:
            document[_UNSAID[path]] = most
    bounds = [_whole(document[name], 0) for name in _OUTPUT_FIELDS if document.get(name) is not None]
    return max(bounds) if bounds else most


def _measured(document: Any) -> tuple[int, int]:
    """Tokens that came as numbers, and bytes of text, anywhere in a document; but a file in a data: URL is no
    text."""
    tokens = size = 0
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if not value.startswith("data:"):
                size += len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            if value and isinstance(value[0], int):
                tokens += len(value)
            else:
                waiting.extend(value)
    return tokens, size


def _prompts(prompt: Any) -> int:
    """How many prompts one request has."""
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
    return len(prompt) if several else 1


def _whole(value: Any, otherwise: int) -> int:
    """A number as engines take it, text too; `otherwise` for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise
    if not math.isfinite(number):
        return otherwise
    return max(-_MOST_TOKENS, min(_MOST_TOKENS, int(number)))


def _first(found: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = found.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS:
            return value
    return None
