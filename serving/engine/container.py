"""The engine's program in a container, as words for `ctr`: its supervisor stays outside. Pure.

Called by `kinds` for the plan of a start, and by the containerd provider for what must be removed. The
container shares the host's network, because the port is the supervisor's choice; what the program needs of
the host is bound to the same paths. A supervisor that was killed leaves its container behind, so each start
begins by removing the one of that name.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.engine.settings import Container

_SHARED_MEMORY = "type=tmpfs,src=shm,dst=/dev/shm,options=nosuid:nodev:mode=1777"
"""Over containerd's own, whose 64 MiB vLLM's processes outgrow; as any tmpfs, at most half of the memory."""


@dataclass(frozen=True, slots=True)
class Bind:
    """A path of the host's, in the container."""

    source: str
    target: str
    writable: bool = False


def command(
    container: Container, program: Sequence[str], environment: Mapping[str, str], binds: Sequence[Bind]
) -> list[str]:
    """What the supervisor runs as its child."""
    before = "; ".join(
        f"{shlex.join(each)} >/dev/null 2>&1" for each in removal(container.ctr, container.name)
    )
    words = [*container.ctr, "run", "--rm", "--net-host", "--snapshotter", container.snapshotter]
    for name, value in environment.items():
        words += ["--env", f"{name}={value}"]
    for bind in binds:
        how = "rbind:rw" if bind.writable else "rbind:ro"
        words += ["--mount", f"type=bind,src={bind.source},dst={bind.target},options={how}"]
    words += ["--mount", _SHARED_MEMORY, *container.options, container.image, container.name, *program]
    return ["sh", "-c", f"{before}; exec {shlex.join(words)}"]


def removal(ctr: Sequence[str], name: str) -> list[list[str]]:
    """The commands that remove it, running or not. Of one that is not there they say so, and fail."""
    return [[*ctr, "tasks", "rm", "--force", name], [*ctr, "containers", "rm", name]]
