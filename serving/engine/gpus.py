"""Which of a machine's GPUs are an engine's, and what is said of them. Pure.

Used by `nvml`, which reads them, and by the supervisor. Names are NVML's UUIDs (`GPU-...`, `MIG-...`). Three
things narrow what an engine may use, each within what the one before leaves:

    settings.gpus            what a container was given from outside: numbers of the machine's, or UUIDs
    NVIDIA_VISIBLE_DEVICES   what a container was given, seen from within: its UUIDs count, and `none`;
                             numbers are the outer machine's, and NVML shows only what was given, anyway
    CUDA_VISIBLE_DEVICES     the program's own choice, by place or by the beginning of a UUID; as CUDA reads
                             it, what follows an entry that names nothing counts for nothing

CUDA numbers GPUs by speed where they differ, NVML by PCI bus; they agree on machines of one kind, and with
CUDA_DEVICE_ORDER=PCI_BUS_ID. Spec: the CUDA programming guide (environment variables), the NVIDIA container
toolkit's list of variables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

CUDA = "CUDA_VISIBLE_DEVICES"
CONTAINER = "NVIDIA_VISIBLE_DEVICES"
_PARTITION = "MIG-"
_WHOLE = "GPU-"
_NUMBER_DIGITS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """All GPUs of an engine at one moment. `busy` is the part of the last moments (driver: up to a second) in
    which the busiest of them had anything to do, whoever gave it; None where one of them does not say, as
    partitions do not."""

    count: int
    busy: float | None
    memory_bytes: int
    memory_limit_bytes: int


def visible(machine: Sequence[str], given: Sequence[str] | None, environment: Mapping[str, str]) -> list[str]:
    """The UUIDs of an engine's GPUs. `machine`: the UUIDs of all that NVML shows, in its order; `given`: what
    the settings say, None where they leave it to the environment."""
    mine = _given(machine, given) if given is not None else _injected(machine, environment.get(CONTAINER))
    wanted = environment.get(CUDA)
    if wanted is None:
        return mine
    found: list[str] = []
    for name in _names(wanted):
        uuid = _one(mine, name)
        if uuid is None:
            break
        found.append(uuid)
    return list(dict.fromkeys(found))


def _given(machine: Sequence[str], names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(uuid for name in names if (uuid := _one(machine, name)) is not None))


def _injected(machine: Sequence[str], wanted: str | None) -> list[str]:
    names = _names(wanted or "")
    if names == ["none"]:
        return []
    if names and all(name.startswith((_WHOLE, _PARTITION)) for name in names):
        return _given(machine, names)
    return list(machine)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")] if text.strip() else []


def _one(there: Sequence[str], name: str) -> str | None:
    """By its place, its UUID or the only one that begins so. A partition is taken at its word: NVML lists
    whole GPUs only."""
    if name.startswith(_PARTITION):
        return name
    if name.startswith(_WHOLE):
        found = [uuid for uuid in there if uuid.startswith(name)]
        return found[0] if len(found) == 1 else None
    if name.isascii() and name.isdecimal() and len(name) <= _NUMBER_DIGITS and int(name) < len(there):
        return there[int(name)]
    return None
