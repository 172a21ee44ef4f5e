"""HTTP header fields that registries answer with: parsed and, where we send them, written.

Pure: strings in, values out. Everything here comes from the network, so nothing raises on odd input: what
cannot be understood is None or left out, and the caller says what that means. RFC 9110 (WWW-Authenticate,
Content-Range, Retry-After), RFC 8288 (Link), OCI distribution spec (Range of an upload).
"""

from __future__ import annotations

import dataclasses
import email.utils
import re
from collections.abc import Iterable, Mapping

_MAX_FIELD_CHARS = 16384
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_SCHEME = re.compile(rf"\s*({_WORD})(?:\s+|\s*\Z|\s*(?=,))")
_PARAMETER = re.compile(rf"\s*({_WORD})\s*=\s*({_QUOTED}|[^\s,\"]*)\s*(?:,|\Z)")
_TOKEN68 = re.compile(r"\s*[A-Za-z0-9._~+/-]+=*\s*(?:,|\Z)")
_LINK = re.compile(rf"\s*<([^<>]*)>((?:\s*;\s*{_WORD}\s*(?:=\s*(?:{_QUOTED}|[^\s,;\"]*))?)*)\s*(?:,|\Z)")
_LINK_PARAMETER = re.compile(rf";\s*({_WORD})\s*(?:=\s*({_QUOTED}|[^\s,;\"]*))?")
_CONTENT_RANGE = re.compile(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*\Z", re.ASCII | re.IGNORECASE)
_UPLOAD_RANGE = re.compile(r"\s*(?:bytes\s*[=\s])?\s*(\d{1,19})-(\d{1,19})\s*\Z", re.ASCII | re.IGNORECASE)
_SECONDS = re.compile(r"\s*(\d{1,9})(?:\.\d{0,9})?\s*\Z", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of WWW-Authenticate; `scheme` and the names of `parameters` in lower case."""

    scheme: str
    parameters: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class ContentRange:
    """First and last byte of a 206 answer; `total` None when the server does not tell."""

    first: int
    last: int
    total: int | None


def challenges(fields: Iterable[str]) -> list[Challenge]:
    """The challenges of all WWW-Authenticate fields, in order, up to the first that is malformed."""
    out: list[Challenge] = []
    for field in fields:
        field = field[:_MAX_FIELD_CHARS]
        position = 0
        while match := _SCHEME.match(field, position):
            position = match.end()
            parameters: dict[str, str] = {}
            while parameter := _PARAMETER.match(field, position):
                parameters.setdefault(parameter[1].lower(), _unquote(parameter[2]))
                position = parameter.end()
            if not parameters and (token68 := _TOKEN68.match(field, position)):
                position = token68.end()
            out.append(Challenge(match[1].lower(), parameters))
            while field[position : position + 1] in (",", " "):
                position += 1
    return out


def next_link(fields: Iterable[str]) -> str | None:
    """The target of the first Link with rel=next, as written (it may be relative)."""
    for field in fields:
        field = field[:_MAX_FIELD_CHARS]
        position = 0
        while match := _LINK.match(field, position):
            position = match.end()
            for name, value in _LINK_PARAMETER.findall(match[2]):
                if name.lower() == "rel" and "next" in _unquote(value).lower().split():
                    return match[1]
    return None


def content_range(field: str | None) -> ContentRange | None:
    """`bytes FIRST-LAST/TOTAL` of a 206; None if absent, malformed or contradictory."""
    match = _CONTENT_RANGE.match(field or "")
    if not match:
        return None
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < first or (total is not None and last >= total):
        return None
    return ContentRange(first, last, total)


def upload_offset(field: str | None) -> int | None:
    """How many bytes of an upload the registry has, from the `0-LAST` of its Range field.

    The form `0-0` is ambiguous, an empty upload or one byte, and registries use it for the former; whoever
    takes it for empty sends one byte again at worst, and is told so by a 416.
    """
    match = _UPLOAD_RANGE.match(field or "")
    if not match or int(match[1]) != 0:
        return None
    last = int(match[2])
    return 0 if last == 0 else last + 1


def content_length(field: str | None) -> int | None:
    """Content-Length as a count, None if absent or malformed."""
    return int(field) if field and re.fullmatch(r"\d{1,19}", field, re.ASCII) else None


def retry_after_seconds(field: str | None, now: float) -> float | None:
    """Retry-After (seconds or an HTTP date) as seconds from `now` (time.time()), never negative."""
    if not field:
        return None
    if _SECONDS.match(field):
        return float(field)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(field[:64]).timestamp() - now)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value
