"""Settings: every default of the command, its environment variable, and the options that verbs share.

Owns the defaults and nothing else. A verb takes `@settings.origin_options` and gets an `origins` keyword
(imagefs.origin.connect.Options), `@settings.storage_options` and gets `storage` (Storage). Precedence:
option, then environment variable, then default. imagefs is imported when a verb runs, not for its help.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from imagefs import size

if TYPE_CHECKING:
    from imagefs.fuse.control import ServerSettings
    from imagefs.origin.connect import Options

_F = TypeVar("_F", bound=Callable[..., Any])

CACHE_QUOTA_BYTES = 20 << 30
FREE_FLOOR_PERCENT = 17
"""The cache leaves this much of its filesystem free. Kubelet starts to delete images below 15%: staying above
that, our blocks go before anybody's images do."""
READ_DEADLINE_SECONDS = 60.0
"""How long a read waits for an origin that does not answer, before it gets EIO."""
CONNECTIONS = 8
"""Parallel requests to one origin."""


class SizeType(click.ParamType[int]):
    """Bytes: a number with K, M, G or T (powers of 1024), as in 64K, 4MiB, 20G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = size.parse(str(value))
        if found is None:
            self.fail(f"{value!r} is not a size; write 64K, 4M, 20G", param, ctx)
        return found


SIZE = SizeType()


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Where the device server keeps its state and its blocks. One state directory is one set of processes."""

    state_dir: Path
    cache_dir: Path
    cache_quota_bytes: int
    free_floor_percent: int
    read_deadline_seconds: float


def default_state_dir() -> Path:
    """/run/glowplug, or the user's runtime directory when not root."""
    if os.geteuid() == 0:
        return Path("/run/glowplug")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "glowplug" if runtime else Path(f"/tmp/glowplug-{os.geteuid()}")  # noqa: S108


def default_cache_dir() -> Path:
    """/var/lib/glowplug/cache, or the user's cache directory when not root."""
    if os.geteuid() == 0:
        return Path("/var/lib/glowplug/cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glowplug"


def state_option(function: _F) -> _F:
    """`--state DIR`, as keyword `state_dir`, for verbs that only talk to a running server."""
    return click.option(
        "--state",
        "state_dir",
        # The kernel names mounts by whole paths without links.
        type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
        envvar="GLOWPLUG_STATE",
        show_envvar=True,
        default=default_state_dir,
        help="State directory of the device server (default /run/glowplug).",
    )(function)


def agent_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The agent's settings, read from its file, as keyword `agent_settings`."""

    @click.option(
        "--config",
        "file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        envvar="GLOWPLUG_AGENT_CONFIG",
        show_envvar=True,
        help="The agent's settings, TOML (default /etc/glowplug/agent.toml, if it is there).",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, file: Path | None, **kwargs: Any) -> Any:
        from agent import config

        if file is None and config.DEFAULT_FILE.exists():
            file = config.DEFAULT_FILE
        agent_settings = config.load(file) if file is not None else config.Settings()
        return function(*args, agent_settings=agent_settings, **kwargs)

    return wrapper


def origin_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How origins are reached, as keyword `origins`."""

    @click.option(
        "--plain-http", is_flag=True, help="Speak HTTP to registries that are not on loopback, too."
    )
    @click.option(
        "--docker-config",
        type=click.Path(path_type=Path),
        envvar="DOCKER_CONFIG",
        show_envvar=True,
        help="Credentials: a config.json or its folder (default ~/.docker and podman's auth.json).",
    )
    @click.option(
        "--ca-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        envvar="GLOWPLUG_CA_FILE",
        show_envvar=True,
        help="Certificates to trust instead of the system's.",
    )
    @click.option(
        "--s3-endpoint-url",
        envvar="GLOWPLUG_S3_ENDPOINT_URL",
        show_envvar=True,
        help="S3 server to use instead of AWS.",
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        plain_http: bool,
        docker_config: Path | None,
        ca_file: Path | None,
        s3_endpoint_url: str | None,
        **kwargs: Any,
    ) -> Any:
        from imagefs.origin import connect

        # Whole paths, and no variable left to look at: the device server has another working directory,
        # and the environment of whichever command started it.
        options = connect.Options(
            plain_http=plain_http,
            docker_config=Path(os.path.abspath(docker_config)) if docker_config else None,
            ca_file=Path(os.path.abspath(ca_file)) if ca_file else None,
            s3_endpoint_url=s3_endpoint_url,
        )
        return function(*args, origins=options, **kwargs)

    return wrapper


def storage_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """State, cache and read deadline, as keyword `storage`."""

    @state_option
    @click.option(
        "--cache",
        "cache_dir",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="GLOWPLUG_CACHE",
        show_envvar=True,
        default=default_cache_dir,
        help="Block cache (default /var/lib/glowplug/cache, ~/.cache/glowplug when not root).",
    )
    @click.option(
        "--cache-quota",
        "cache_quota_bytes",
        type=SIZE,
        envvar="GLOWPLUG_CACHE_QUOTA",
        show_envvar=True,
        default=CACHE_QUOTA_BYTES,
        help="Bytes of blocks to keep (default 20G).",
    )
    @click.option(
        "--free-floor",
        "free_floor_percent",
        type=click.IntRange(0, 100),
        envvar="GLOWPLUG_FREE_FLOOR",
        show_envvar=True,
        default=FREE_FLOOR_PERCENT,
        show_default=True,
        help="Percent of the cache's filesystem to leave free.",
    )
    @click.option(
        "--read-deadline",
        "read_deadline_seconds",
        type=click.FloatRange(min=0, min_open=True),
        envvar="GLOWPLUG_READ_DEADLINE",
        show_envvar=True,
        default=READ_DEADLINE_SECONDS,
        show_default=True,
        help="Seconds that a read waits for its origin before it fails.",
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        state_dir: Path,
        cache_dir: Path,
        cache_quota_bytes: int,
        free_floor_percent: int,
        read_deadline_seconds: float,
        **kwargs: Any,
    ) -> Any:
        storage = Storage(
            state_dir,
            Path(os.path.abspath(cache_dir)),
            cache_quota_bytes,
            free_floor_percent,
            read_deadline_seconds,
        )
        return function(*args, storage=storage, **kwargs)

    return wrapper


def free_floor_bytes(storage: Storage) -> int:
    """The floor in bytes on the filesystem that holds (or will hold) the cache."""
    from imagefs.fuse import control

    return control.free_floor_bytes(storage.cache_dir, storage.free_floor_percent)


def server_settings(storage: Storage, origins: Options) -> ServerSettings:
    """What the device server of `storage.state_dir` is started with, if it does not run yet."""
    from imagefs.fuse import control

    return control.ServerSettings(
        state_dir=storage.state_dir,
        cache_dir=storage.cache_dir,
        cache_quota_bytes=storage.cache_quota_bytes,
        free_floor_bytes=free_floor_bytes(storage),
        read_deadline_seconds=storage.read_deadline_seconds,
        connections=CONNECTIONS,
        origins=origins,
    )
