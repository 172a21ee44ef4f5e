"""The router's own document: which services it routes where it stands alone. Pure.

Called by `sources`, with the text of the file and of those that it names. `docs/router.md` has the keys. The
document of an endpoint (`serving.endpoint`) is another: it says what is to run, this one only what is routed.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import Field

from serving import errors
from serving import service as services

_MAX_BYTES = 8 << 20


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class TlsFiles(_Part):
    certificate: str
    key: str
    client_ca: str | None = None


class ListenAt(_Part):
    port: int
    address: str = "127.0.0.1"
    tls: TlsFiles | None = None


class StaticBackend(_Part):
    address: str
    port: int
    version: str = ""
    zone: str = ""
    draining: bool = False


class Reference(_Part):
    """A Kubernetes Service, whose EndpointSlices are the backends. `port`: name or number, where it has
    several."""

    service: str = Field(min_length=1)
    namespace: str = "default"
    port: str | int | None = None
    version: str = ""


class Entry(_Part):
    name: str
    listen: ListenAt
    hosts: list[str] = ["*"]
    prefix: str = "/"
    backends: list[StaticBackend] = []
    kubernetes: list[Reference] = []
    version_weights: dict[str, int] = {}
    prefer_zone: bool = False
    activator: str | None = None
    keys: str | None = None
    settings: dict[str, Any] = {}


class Cluster(_Part):
    """The Kubernetes API. Left out: as a pod finds it."""

    url: str | None = None
    ca: str | None = None
    token: str | None = None


class Document(_Part):
    services: Annotated[list[Entry], Field(min_length=1)]
    kubernetes: Cluster = Cluster()

    def files(self) -> set[str]:
        """The other files that it names."""
        found = set()
        for entry in self.services:
            tls = entry.listen.tls
            found |= {entry.keys, *((tls.certificate, tls.key, tls.client_ca) if tls else ())}
        return {name for name in found if name is not None}

    def references(self) -> set[Reference]:
        return {reference for entry in self.services for reference in entry.kubernetes}


def parse(text: str, where: str) -> Document:
    """DocumentError names the key."""
    if len(text) > _MAX_BYTES:
        raise errors.DocumentError(f"{where}: over {_MAX_BYTES >> 20} MiB")
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise errors.DocumentError(f"{where}: is not YAML: {exc}") from exc
    try:
        return Document.model_validate(found)
    except pydantic.ValidationError as exc:
        raise errors.DocumentError("\n".join(_said(where, each) for each in exc.errors())) from exc


def settings(entry: Entry, where: str) -> services.RouteSettings:
    """DocumentError."""
    for key in entry.settings.keys() - set(services.RouteSettings.__slots__):
        raise errors.DocumentError(f"{where}: services.{entry.name}.settings.{key}: {_unknown(key)}")
    try:
        return _SETTINGS.validate_python(entry.settings)
    except pydantic.ValidationError as exc:
        prefix = f"{where}: services.{entry.name}.settings"
        raise errors.DocumentError("\n".join(_said(prefix, each) for each in exc.errors())) from exc


def place(text: str, where: str) -> tuple[str, int]:
    """HOST:PORT. DocumentError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        raise errors.DocumentError(f"{where}: {text!r} is not ADDRESS:PORT")
    return host.strip("[]"), int(port)


_SETTINGS = pydantic.TypeAdapter(services.RouteSettings)


def _said(where: str, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    what = _unknown(str(problem["loc"][-1])) if problem["type"] == "extra_forbidden" else problem["msg"]
    return f"{where}: {key}: {what}"


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, {name for part in _PARTS for name in part}, n=1)
    return "there is no such key" + (f"; did you mean {near[0]!r}?" if near else "")


_PARTS = (
    *(part.model_fields for part in (TlsFiles, ListenAt, StaticBackend, Reference, Entry, Cluster, Document)),
    services.RouteSettings.__slots__,
)
