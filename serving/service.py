"""What a router routes: services and their backends, as values. Pure.

Made by sources (`serving.router.sources`) and by `serving.server`; read by `serving.router`. A `Service` is
one Envoy cluster: its versions, zones and ramps are localities of that one cluster, so that within each of
them Envoy goes on choosing the less busy of two.

Invariants: a value that was constructed can be turned into Envoy's resources; what cannot is refused here, by
a `DocumentError` that names the field. Backends of a service differ in their (address, port).
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import re
from collections.abc import Mapping

from serving import errors

_NAME = re.compile(r"[a-z0-9]([-a-z0-9_.]{0,126}[a-z0-9])?\Z")
_MOST_PER_SECOND = 1e15
_MOST_PRIORITY = 1_000
"""Health probes are far beyond it."""
TENANT_HEADER = "x-glowplug-tenant"
"""Set by the router from the key; a client's own is taken away."""
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+\Z")


class Balancing(enum.Enum):
    """How Envoy chooses among the backends of one locality."""

    P2C = "p2c"
    """The less busy, by requests in flight, of two drawn at random."""
    FULL_SCAN = "full_scan"
    """The least busy of all: for few replicas whose requests differ much in cost."""
    STICKY = "sticky"
    """Maglev on a header of the request, with bounded load."""
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """One replica. `healthy`: what its source knows (None: only Envoy's own checks decide). `since`: Unix
    time at which it became ready, where it is to be ramped up; None where it is warm."""

    address: str
    port: int
    version: str = ""
    zone: str = ""
    draining: bool = False
    healthy: bool | None = None
    since: float | None = None

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.address)
        except ValueError as exc:
            raise errors.DocumentError(
                f"backends: {self.address!r} is not an IP address; resolve names before"
            ) from exc
        _require_port("backends", self.port)


@dataclasses.dataclass(frozen=True, slots=True)
class Tls:
    """A certificate chain with its key, as PEM. With `client_ca_pem`, clients must show one of its own."""

    certificate_pem: bytes
    key_pem: bytes = dataclasses.field(repr=False)
    client_ca_pem: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Tracing:
    """A collector of spans (OTLP over HTTP), and which requests have them: `sample_percent` of those whose
    caller did not decide. `service`: what the Envoys are called in traces."""

    host: str
    port: int
    service: str
    sample_percent: float

    def __post_init__(self) -> None:
        _require_port("tracing", self.port)
        if not 0 <= self.sample_percent <= 100:
            raise errors.DocumentError("tracing.sample_percent: must be between 0 and 100")


@dataclasses.dataclass(frozen=True, slots=True)
class Listen:
    """Where Envoy accepts requests. Services with the same address and port share one listener."""

    port: int
    address: str = "127.0.0.1"
    tls: Tls | None = None
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.address)
        except ValueError as exc:
            raise errors.DocumentError(
                f"listen: {self.address!r} is not an IP address; 0.0.0.0 is every interface"
            ) from exc
        _require_port("listen", self.port)


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """An API key and the tenant that it stands for, with what the tenant may have of the whole service; None
    is no limit. Requests are counted by the Envoys; tokens, or model units, by the engines, which also keep
    the requests' `priority` (lower is earlier) from being below this one."""

    tenant: str
    secret: str = dataclasses.field(repr=False)
    requests_per_second: int | None = None
    tokens_per_second: float | None = None
    units_per_second: float | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if not _NAME.match(self.tenant):
            raise errors.DocumentError(f"keys: tenant {self.tenant!r} must match {_NAME.pattern}")
        if not self.secret or not self.secret.isascii() or not self.secret.isprintable():
            raise errors.DocumentError(f"keys: the key of {self.tenant} must be printable ASCII, not empty")
        if self.requests_per_second is not None and self.requests_per_second < 1:
            raise errors.DocumentError(f"keys: requests of {self.tenant} must be at least 1")
        for name in ("tokens", "units"):
            rate = getattr(self, f"{name}_per_second")
            if rate is not None and not 0 < rate < _MOST_PER_SECOND:
                raise errors.DocumentError(f"keys: {name} of {self.tenant} must be above 0")
        if self.tokens_per_second is not None and self.units_per_second is not None:
            raise errors.DocumentError(f"keys: {self.tenant} has tokens and units; one of them limits it")
        if abs(self.priority) > _MOST_PRIORITY:
            raise errors.DocumentError(f"keys: priority of {self.tenant} is beyond {_MOST_PRIORITY}")

    @property
    def limits(self) -> tuple[int | None, float | None, float | None, int]:
        """What all keys of a tenant say alike."""
        return self.requests_per_second, self.tokens_per_second, self.units_per_second, self.priority


@dataclasses.dataclass(frozen=True, slots=True)
class RouteSettings:
    """How requests of one service are treated. Seconds; None is "no limit" where it is allowed.

    `upstream_idle_seconds` must be below the engine's keep-alive, or a connection that both ends consider
    differently is a failed request.
    """

    balancing: Balancing = Balancing.P2C
    sticky_header: str = "x-session-id"
    request_timeout_seconds: float | None = None
    """From the request's last byte to the response's last: None suits streams."""
    stream_idle_seconds: float = 300.0
    """Longest silence on one request, both ways."""
    upstream_idle_seconds: float = 4.0
    connect_timeout_seconds: float = 1.0
    retries: int = 2
    """Attempts on other backends after the first could not be reached; what was sent is not sent twice."""
    retry_budget_percent: float = 20.0
    max_requests: int = 1_024
    """In flight at each Envoy, more get 429; `Router.set_max_requests` changes it without a new cluster."""
    max_request_bytes: int | None = 32 << 20
    health_path: str | None = "/livez"
    health_interval_seconds: float = 1.0
    health_timeout_seconds: float = 1.0
    unhealthy_after: int = 3
    healthy_after: int = 1
    eject_seconds: float = 5.0
    """How long a backend that cannot be reached is left out at first."""
    ramp_seconds: float = 0.0
    """Over how long a backend with `since` grows to its full share."""
    http2: bool = False
    """Speak HTTP/2 (prior knowledge) to the backends."""
    access_log: bool = False

    def __post_init__(self) -> None:
        positive = (
            "stream_idle_seconds",
            "upstream_idle_seconds",
            "connect_timeout_seconds",
            "max_requests",
            "health_interval_seconds",
            "health_timeout_seconds",
            "unhealthy_after",
            "healthy_after",
            "eject_seconds",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise errors.DocumentError(f"settings.{name}: must be above 0")
        for name in ("request_timeout_seconds", "max_request_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise errors.DocumentError(f"settings.{name}: must be above 0, or left out for no limit")
        for name in ("retries", "ramp_seconds"):
            if getattr(self, name) < 0:
                raise errors.DocumentError(f"settings.{name}: must not be negative")
        if not 0 < self.retry_budget_percent <= 100:
            raise errors.DocumentError("settings.retry_budget_percent: must be above 0, at most 100")
        if self.health_path is not None and not self.health_path.startswith("/"):
            raise errors.DocumentError(f"settings.health_path: {self.health_path!r} must begin with /")
        if not _HEADER.match(self.sticky_header):
            raise errors.DocumentError(
                f"settings.sticky_header: {self.sticky_header!r} is not a header's name in lower case"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """One routed service.

    `hosts` and `prefix` choose its requests among those of its listener. `version_weights`: relative shares;
    empty, every version gets what its number of backends says; a version that is not named gets none.
    `prefer_zone`: an Envoy keeps to the backends of its own zone as far as their share reaches, and spills
    the rest over. `activator` gets requests only while no backend is healthy. With `keys`, a request needs
    one of them, in `Authorization: Bearer` or `x-api-key`.
    """

    name: str
    listen: Listen
    backends: tuple[Backend, ...] = ()
    hosts: tuple[str, ...] = ("*",)
    prefix: str = "/"
    version_weights: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prefer_zone: bool = False
    activator: tuple[str, int] | None = None
    keys: tuple[Key, ...] = ()
    settings: RouteSettings = RouteSettings()

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise errors.DocumentError(f"services: name {self.name!r} must match {_NAME.pattern}")
        if not self.prefix.startswith("/"):
            raise errors.DocumentError(f"services.{self.name}.prefix: {self.prefix!r} must begin with /")
        if not self.hosts or not all(self.hosts):
            raise errors.DocumentError(f"services.{self.name}.hosts: name a host, or '*' for any")
        places = {(each.address, each.port) for each in self.backends}
        if len(places) != len(self.backends):
            raise errors.DocumentError(
                f"services.{self.name}.backends: an address and port stand there twice"
            )
        for version, weight in self.version_weights.items():
            if not 0 <= weight <= 10_000:
                raise errors.DocumentError(
                    f"services.{self.name}.version_weights.{version}: {weight} is not between 0 and 10000"
                )
        if self.activator is not None:
            Backend(*self.activator)
        if len({each.secret for each in self.keys}) != len(self.keys):
            raise errors.DocumentError(f"services.{self.name}.keys: two tenants have the same key")
        by_tenant: dict[str, Key] = {}
        for key in self.keys:
            if by_tenant.setdefault(key.tenant, key).limits != key.limits:
                raise errors.DocumentError(
                    f"services.{self.name}.keys: the keys of {key.tenant} differ in limits; make them alike"
                )


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What the Envoys said of one backend for the last interval, summed over them. `in_flight` is a sample at
    its end; `issued` and `errors` (5xx, resets) are counts over `seconds`."""

    service: str
    address: str
    port: int
    in_flight: int
    issued: int
    errors: int
    seconds: float


def _require_port(where: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise errors.DocumentError(f"{where}: port {port} is not between 1 and 65535")
