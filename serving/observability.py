"""How an endpoint is watched: the parts of its document for the request log and for traces. Pure.

Used by `endpoint` and, with the same words, by the engine's settings. The request log is changed in place;
where traces go is told to an engine when it is started.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import Annotated

import pydantic
from pydantic import Field

_SECRET_HEADERS = frozenset(
    ("authorization", "proxy-authorization", "x-api-key", "api-key", "cookie", "set-cookie")
)
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+\Z")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_S3 = "s3://"


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


_Seconds = Annotated[float, Field(gt=0, le=86_400, strict=False, allow_inf_nan=False)]


class RequestLog(_Part):
    """A sample of the requests with their bodies, as Parquet files. Bodies are what clients wrote and were
    told: whoever may read the destination reads that. Nothing here restarts anything."""

    destination: str
    """A directory of this machine (absolute), or s3://BUCKET/PREFIX with the machine's own credentials."""
    sample_rate: float = Field(default=0.01, gt=0, le=1, strict=False)
    """Part of the requests, chosen by a hash of the request's id."""
    body_bytes: int = Field(default=64 << 10, ge=0, le=16 << 20)
    """Of each body, request's and answer's, streams put together; what lies beyond is not kept."""
    headers: tuple[str, ...] = Field(
        default=("content-type", "user-agent", "x-request-id"), strict=False, max_length=64
    )
    """Request headers that are kept, in lower case; all others are left out. Those that carry keys are
    refused."""
    file_bytes: int = Field(default=64 << 20, ge=64 << 10, le=4 << 30)
    """A file of about that size is closed, and the next begun."""
    file_seconds: _Seconds = 300.0
    """So is one that is so old; until then its requests cannot be read."""
    spool_bytes: int = Field(default=512 << 20, ge=1 << 20)
    """Of files that wait for s3://; beyond that, the oldest are dropped."""

    @pydantic.model_validator(mode="after")
    def _sound(self) -> RequestLog:
        if self.destination.startswith(_S3):
            bucket = s3_place(self.destination)[0]
            if not _BUCKET.match(bucket):
                raise ValueError(f"destination: {bucket!r} is no bucket's name; write s3://BUCKET/PREFIX")
        elif not self.destination.startswith("/"):
            raise ValueError("destination: name an absolute directory, or s3://BUCKET/PREFIX")
        for name in self.headers:
            if not _HEADER.match(name):
                raise ValueError(f"headers: {name!r} is not a header's name in lower case")
            if name in _SECRET_HEADERS:
                raise ValueError(f"headers: {name} carries keys and is never logged; leave it out")
        return self


class Tracing(_Part):
    """Where spans go. Envoy begins or continues a trace, the engine's spans are its children."""

    collector: str
    """http://HOST:PORT of an OpenTelemetry collector (OTLP over HTTP); changing it restarts replicas."""
    sample_percent: float = Field(default=1.0, ge=0, le=100, strict=False)
    """Of the requests whose caller has not decided by a `traceparent` of its own."""

    @pydantic.model_validator(mode="after")
    def _sound(self) -> Tracing:
        try:
            collector_place(self.collector)
        except ValueError as exc:
            raise ValueError(f"collector: {exc}") from exc
        return self

    @property
    def url(self) -> str:
        """Where spans are posted."""
        return f"{self.collector.rstrip('/')}/v1/traces"


def collector_place(url: str) -> tuple[str, int]:
    """Host and port of a collector. ValueError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"{url!r} is no address of a collector; write http://HOST:4318")
    return parts.hostname, parts.port or 4318


def s3_place(url: str) -> tuple[str, str]:
    """Bucket and prefix (without slashes at its ends) of s3://BUCKET/PREFIX."""
    bucket, _, prefix = url.removeprefix(_S3).partition("/")
    return bucket, prefix.strip("/")
