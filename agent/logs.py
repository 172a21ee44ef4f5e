"""The agent's log: one line an event on standard error, as JSON or text, and no secret in it.

`set_up` is called once, by the daemon. A line has time (RFC 3339, UTC), level, logger and message; what the
observer recorded adds its kind, image, snapshot and fields. Authorization headers, tokens and passwords in
URLs are masked here, whoever wrote them: an error's text may carry what a registry sent back.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
from typing import IO, Any, Literal

from agent import observer

MASK = "***"

_SECRETS = (
    # An Authorization header, or its value alone.
    re.compile(r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}"),
    # key=value and "key": "value".
    re.compile(
        r"(?i)(\"?\b(?:password|passwd|secret|token|access_token|refresh_token|identitytoken|auth"
        r"|x-amz-signature|x-amz-security-token|x-amz-credential|sig)\"?\s*[=:]\s*\"?)[^\s\"&,}]{4,}"
    ),
    # https://user:password@host
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),
)


def masked(text: str) -> str:
    """The text without what looks like a secret."""
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


class _Formatter(logging.Formatter):
    """`as_json`: one object a line; else time, level, message and the fields."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        document: dict[str, Any] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        event = getattr(record, "event", None)
        if isinstance(event, observer.Event):
            recorded = event.to_json()
            document.update(kind=event.kind)
            document.update({name: recorded[name] for name in ("image", "snapshot") if recorded[name]})
            document.update({k: v for k, v in recorded["fields"].items() if k not in document})
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps({name: _clean(value) for name, value in document.items()}, ensure_ascii=False)
        return masked(_text(document))


def _clean(value: Any) -> Any:
    return masked(value) if isinstance(value, str) else value


def _text(document: dict[str, Any]) -> str:
    line = f"{document['time']} {document['level']:7} {document['message']}"
    shown = ("time", "level", "logger", "message", "exception")
    extra = [f"{name}={value}" for name, value in document.items() if name not in shown]
    if extra:
        line += f"  [{' '.join(extra)}]"
    # What a registry or an image put into a message must not forge lines or drive a terminal.
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
    return f"{line}\n{document['exception']}" if "exception" in document else line


def set_up(level: str, form: Literal["json", "text"], stream: IO[str] | None = None) -> None:
    """Have the whole process log to `stream` (standard error) from `level` on."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_Formatter(as_json=form == "json"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # What these say at INFO is about every request.
    for name in ("aiohttp", "asyncio", "urllib3", "botocore"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
