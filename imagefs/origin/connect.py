"""From a REF to its origin.

The one place that knows which class serves which transport, and the settings that they take. `Options`
travels as JSON to the device server, which opens the same origins with it. Each origin is imported when it
is asked for: a mount from a registry does not load boto3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagefs import errors
from imagefs.origin import Origin
from imagefs.reference import Reference


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How origins are reached; no credentials, only where they are.

    `plain_http` allows registries without TLS; on loopback (127.0.0.0/8, ::1, localhost) plain HTTP is
    spoken anyway, unless `ca_file` says that there is TLS. `ca_file` replaces the system's certificate
    authorities. `docker_config` is a config.json or its folder, by default docker's and podman's own places.
    `s3_endpoint_url` is for S3 servers other than AWS. `connections` is the number kept open to one host.
    `hosts_directory` is containerd's certs.d, whose mirrors are read from first. `credentials_socket` is
    where the node agent answers for credentials; while it does, `docker_config` is its business.
    """

    plain_http: bool = False
    ca_file: Path | None = None
    docker_config: Path | None = None
    hosts_directory: Path | None = None
    credentials_socket: Path | None = None
    s3_endpoint_url: str | None = None
    connections: int = 16
    connect_timeout_seconds: float = 10.0
    read_timeout_seconds: float = 30.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives this value back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Options:
        """The value that `to_json` wrote. ConfigurationError for an unknown field or a wrong type."""
        values: dict[str, Any] = {}
        for name, value in document.items():
            kinds = _FIELDS.get(name, ())
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise errors.ConfigurationError(f"origin options: {name}: {value!r} is not understood")
            values[name] = Path(value) if name in _PATHS and isinstance(value, str) else value
        return cls(**values)


_PATHS = ("ca_file", "docker_config", "hosts_directory", "credentials_socket")
_FIELDS: dict[str, tuple[type, ...]] = {
    "plain_http": (bool,),
    "ca_file": (str, type(None)),
    "docker_config": (str, type(None)),
    "hosts_directory": (str, type(None)),
    "credentials_socket": (str, type(None)),
    "s3_endpoint_url": (str, type(None)),
    "connections": (int,),
    "connect_timeout_seconds": (int, float),
    "read_timeout_seconds": (int, float),
}


def connect(ref: Reference, options: Options) -> Origin:
    """The origin that `ref` lies in; its tag and digest play no part. Opens no connection yet.

    ConfigurationError for transports that hold images but can neither be read lazily nor written.
    """
    if ref.transport == "docker":
        from imagefs.origin import registry, transport

        return registry.RegistryOrigin(
            ref.host,
            ref.repository,
            transport.Settings(
                plain_http=options.plain_http,
                ca_file=options.ca_file,
                connections=options.connections,
                connect_timeout_seconds=options.connect_timeout_seconds,
                read_timeout_seconds=options.read_timeout_seconds,
            ),
            options.docker_config,
            credentials_socket=options.credentials_socket,
            hosts_directory=options.hosts_directory,
        )
    if ref.transport == "oci":
        from imagefs.origin import folder

        return folder.FolderOrigin(Path(ref.location))
    if ref.transport == "s3":
        from imagefs.origin import s3

        return s3.connect(ref.host, ref.repository, options)
    raise errors.ConfigurationError(
        f"{ref}: {ref.transport}: is a source only, block images cannot be stored there or read from there; "
        "name a place for them with --to docker://..., oci:DIR or s3://BUCKET/PREFIX"
    )


def selector(ref: Reference) -> str:
    """What `read_manifest` of `ref`'s origin is to be asked for: its digest, its tag, or what stands for
    neither: "latest", and for oci: the empty string, the folder's only image (or only block image)."""
    if ref.digest or ref.tag:
        return ref.digest or ref.tag or ""
    return "" if ref.transport == "oci" else "latest"
