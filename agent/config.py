"""The agent's settings: what its TOML file may say, with units, defaults and reasons. Pure but for `load`.

`glowplug agent run` reads the file once, at start; command line options replace single values (`replace`).
The file's tables and keys are the dataclasses and fields below, by the same names; sizes may be written as
"20G". An unknown key is an error that names it: a misspelt limit would else be no limit.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from imagefs import errors, size

DEFAULT_FILE = Path("/etc/glowplug/agent.toml")

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):\d{1,5}\Z")
_SIZE_SUFFIXES = ("_bytes", "_bytes_per_second")


@dataclasses.dataclass(frozen=True, slots=True)
class Cache:
    """The block cache. `free_floor_percent` of its filesystem stays free: more than the 15 % below which
    kubelet begins to delete images, so that our blocks go before anybody's images do. `layer_files`: a
    layer that is here whole gets a file of its own, where there is room, and is mounted from it."""

    directory: Path = Path("/var/lib/glowplug/cache")
    quota_bytes: int = 20 << 30
    free_floor_percent: int = 17
    layer_files: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Reads:
    """`deadline_seconds`: how long a read waits for an origin that does not answer, before it gets EIO.
    `connections`: parallel requests to one origin. `workers`: FUSE processes, 0 for the device
    server's default."""

    deadline_seconds: float = 60.0
    connections: int = 8
    workers: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Pin:
    """The one block image that is accepted for a source image: two manifest digests."""

    source: str
    block_image: str


@dataclasses.dataclass(frozen=True, slots=True)
class Images:
    """How block images are found. `lookup_deadline_seconds`: after that, a pull is an ordinary one;
    `negative_seconds`: for so long nobody asks again for an image that had none. `block_repositories` maps a
    repository ("host/name", or a prefix of it that ends in "/") to the REF (docker:// or s3://) where its
    block images lie, for registries and mirrors that keep no referrers.

    `trust`: "repository" takes what the repository lists, "pinned" only what `pins` say, "signed" only what
    one of the cosign public keys `signature_keys` (PEM files) signed. `repositories` are the places (REFs, or
    prefixes of them that end in "/") that "repository" believes; empty: all.
    """

    lookup_deadline_seconds: float = 10.0
    negative_seconds: float = 300.0
    trust: Literal["repository", "pinned", "signed"] = "repository"
    pins: tuple[Pin, ...] = ()
    signature_keys: tuple[Path, ...] = ()
    repositories: tuple[str, ...] = ()
    block_repositories: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Registries:
    """`hosts_directory` is containerd's own (certs.d/HOST/hosts.toml), so that mirrors are configured once.
    `plain_http` allows registries without TLS that are not on loopback. The rest as for the command."""

    hosts_directory: Path | None = Path("/etc/containerd/certs.d")
    plain_http: bool = False
    ca_file: Path | None = None
    s3_endpoint_url: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """Asked in this order, for each image: `docker_config` (a config.json or its folder, helpers included),
    kubelet's credential provider plugins (its CredentialProviderConfig file and the plugins' folder), then
    the Kubernetes pull secrets of `kubernetes.pull_secrets`."""

    docker_config: Path | None = None
    kubelet_provider_config: Path | None = None
    kubelet_provider_directory: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Kubernetes:
    """The API server, for pull secrets, EndpointSlices and events. `api_url` None and `in_cluster` false:
    none. `token_file` is read again when it changes. `pull_secrets`: watch secrets of the type
    kubernetes.io/dockerconfigjson in `namespaces` (empty: all)."""

    in_cluster: bool = False
    api_url: str | None = None
    ca_file: Path | None = None
    token_file: Path | None = None
    node_name: str | None = None
    pull_secrets: bool = False
    namespaces: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Fill:
    """The full copy of a started image, so that a pod outlives its registry. `start`: "off", "immediately",
    or "settled": once no read of the image has missed the cache for `settle_seconds`.
    `bandwidth_bytes_per_second` 0 is no cap."""

    start: Literal["off", "settled", "immediately"] = "off"
    settle_seconds: float = 30.0
    bandwidth_bytes_per_second: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Traces:
    """Traces of real starts, for boot packs: of the first starts here of images without one, this `share` is
    recorded (0: none, 1: all) for `seconds`, and published beside the block image: which ranges were read, no
    data. The node's credentials must be allowed to push."""

    share: float = 0.0
    seconds: float = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Peers:
    """Sharing blocks with the agents of other nodes. `listen` is "ADDRESS:PORT", None for no sharing.
    `discovery`: "static" (`members`, "host:port"), "dns" (`dns_name` and the port of `listen`) or
    "endpointslice" (`service`, "namespace/name"). `advertise` is this node's own "host:port" as the others
    know it. Authentication: `token_file` (a secret of the cluster in each line: the first is sent, each is
    accepted) or the three `tls_` files (mTLS); none only with `insecure`. `origins` are the REFs
    ("docker://registry.example/team/", "s3://bucket/") from which we fetch what peers ask for; empty: from
    every registry and bucket, or, with `insecure`, only what this node has mounted itself. A read that waits
    for a peer goes to the origin as well after `hedge_seconds`."""

    listen: str | None = None
    advertise: str | None = None
    discovery: Literal["static", "dns", "endpointslice"] = "static"
    members: tuple[str, ...] = ()
    dns_name: str | None = None
    service: str | None = None
    token_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    insecure: bool = False
    origins: tuple[str, ...] = ()
    connect_timeout_seconds: float = 0.5
    down_seconds: float = 10.0
    hedge_seconds: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Http:
    """Metrics, health and the status page on `listen` ("ADDRESS:PORT", None for none), without
    authentication: read-only, no secrets. What changes anything is on the agent's own unix socket."""

    listen: str | None = "127.0.0.1:7310"


@dataclasses.dataclass(frozen=True, slots=True)
class Log:
    """`level` as Python names it; `format` "json" (one object a line) or "text"."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["json", "text"] = "json"


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Everything. `root` survives a reboot (snapshots, database, block maps), `state` does not (sockets, the
    device server). `socket` is what containerd's proxy plugin is given, mode 0600."""

    root: Path = Path("/var/lib/glowplug/agent")
    state: Path = Path("/run/glowplug")
    socket: Path = Path("/run/glowplug/snapshotter.sock")
    cache: Cache = dataclasses.field(default_factory=Cache)
    reads: Reads = dataclasses.field(default_factory=Reads)
    images: Images = dataclasses.field(default_factory=Images)
    registries: Registries = dataclasses.field(default_factory=Registries)
    credentials: Credentials = dataclasses.field(default_factory=Credentials)
    kubernetes: Kubernetes = dataclasses.field(default_factory=Kubernetes)
    fill: Fill = dataclasses.field(default_factory=Fill)
    traces: Traces = dataclasses.field(default_factory=Traces)
    peers: Peers = dataclasses.field(default_factory=Peers)
    http: Http = dataclasses.field(default_factory=Http)
    log: Log = dataclasses.field(default_factory=Log)

    @property
    def api_socket(self) -> Path:
        """Where other processes of this node talk to the agent: HTTP on a unix socket, ours alone."""
        return self.state / "agent.sock"


def load(file: Path) -> Settings:
    """Read a file. ConfigurationError names the file and the key."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise errors.ConfigurationError(f"cannot read settings from {file}: {exc}") from exc
    return parse(text, str(file))


def parse(text: str, where: str) -> Settings:
    """Parse TOML. ConfigurationError names `where` and the key, never a value that could be a secret."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise errors.ConfigurationError(f"{where}: not TOML: {exc}") from exc
    settings = _table(Settings, document, where, "")
    assert isinstance(settings, Settings)
    if settings.images.trust == "signed" and not settings.images.signature_keys:
        raise errors.ConfigurationError(
            f'{where}: images.trust is "signed": images.signature_keys must name a key'
        )
    if settings.http.listen is not None and not _ADDRESS.match(settings.http.listen):
        raise errors.ConfigurationError(f"{where}: http.listen is not ADDRESS:PORT")
    return settings


def _table(kind: type, document: Mapping[str, Any], where: str, prefix: str) -> object:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(document) - set(hints))
    if unknown:
        raise errors.ConfigurationError(
            f"{where}: unknown key {prefix}{unknown[0]}; known here: {', '.join(sorted(hints))}"
        )
    values = {name: _value(hints[name], value, where, prefix + name) for name, value in document.items()}
    try:
        return kind(**values)
    except TypeError:
        required = [
            field.name
            for field in dataclasses.fields(kind)
            if field.name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        raise errors.ConfigurationError(f"{where}: {prefix}{required[0]} is missing") from None


def _value(hint: Any, value: object, where: str, key: str) -> object:
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
        origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _table(hint, value, where, f"{key}.")
    if origin is tuple and isinstance(value, list):
        (item, _) = typing.get_args(hint)
        return tuple(_value(item, each, where, f"{key}[{number}]") for number, each in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {name: _value(str, each, where, f"{key}.{name}") for name, each in value.items()}
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        raise errors.ConfigurationError(f"{where}: {key} must be one of {', '.join(typing.get_args(hint))}")
    if hint is Path and isinstance(value, str):
        if not value.startswith("/"):
            raise errors.ConfigurationError(f"{where}: {key} must be an absolute path")
        return Path(value)
    if hint is int and isinstance(value, str) and key.endswith(_SIZE_SUFFIXES):
        found = size.parse(value)
        if found is not None:
            return found
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is hint and not (isinstance(value, int | float) and value < 0):
        return value
    raise errors.ConfigurationError(f"{where}: {key} is not {_NAMES.get(hint, 'of the right type')}")


_NAMES: Mapping[Any, str] = {
    int: "a number of 0 or more (or a size like 20G)",
    float: "a number of seconds",
    str: "a string",
    bool: "true or false",
    Path: "a path",
}
