"""Platforms of multi-platform images: parse OS/ARCHITECTURE[/VARIANT], choose one entry of an OCI index.

Pure but for `host`, which asks the kernel for the machine's name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from imagefs import errors
from imagefs.artifact import Descriptor

_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "ppc64le": "ppc64le",
    "riscv64": "riscv64",
    "s390x": "s390x",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Platform:
    """`variant` is "" when any will do."""

    system: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.system, self.architecture, self.variant) if part)


def parse(text: str) -> Platform:
    """A platform from OS/ARCHITECTURE[/VARIANT]. Raises InvalidInputError."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise errors.InvalidInputError(
            f"platform {text!r}: expected OS/ARCHITECTURE[/VARIANT], as linux/amd64"
        )
    return Platform(*parts)


def host() -> Platform:
    """The platform of this machine."""
    machine = os.uname().machine
    return Platform("linux", _MACHINES.get(machine, machine))


def of_descriptor(descriptor: Descriptor) -> Platform | None:
    """The platform that an index entry names; None for none, and for entries that are not images (build
    attestations say unknown/unknown)."""
    value = descriptor.platform
    if not value or value.get("os", "unknown") == "unknown":
        return None
    return Platform(value["os"], value.get("architecture", ""), value.get("variant", ""))


def matching(entries: Sequence[Descriptor], wanted: Platform) -> list[Descriptor]:
    """The index entries for `wanted`, in the index's order."""
    out = []
    for entry in entries:
        own = of_descriptor(entry)
        if own is None or (own.system, own.architecture) != (wanted.system, wanted.architecture):
            continue
        if not wanted.variant or own.variant == wanted.variant:
            out.append(entry)
    return out


def choose(entries: Sequence[Descriptor], wanted: Platform, what: str) -> Descriptor:
    """The first index entry for `wanted`; the only entry when no entry names a platform.
    Raises NotFoundError with what `what` has instead."""
    found = matching(entries, wanted)
    if found:
        return found[0]
    named = [str(own) for entry in entries if (own := of_descriptor(entry)) is not None]
    if not named and len(entries) == 1:
        return entries[0]
    raise errors.NotFoundError(
        f"{what} has no image for {wanted}; it has {', '.join(named) or 'none that names a platform'}"
    )
