"""The bottom of every image: Debian, by debootstrap, and more of its packages by apt inside the image.

Base systems are kept in the cache, one for each list of packages, so that images share their bottom layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from e2e.workloads.recipe import SUITE, BuildError, Kitchen
from glowplug.startup import machine


def mirror() -> str:
    """The Debian mirror that this machine's apt uses."""
    command = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(COMPONENT) $(RELEASE)",
        "Created-By: Packages",
    ]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for line in lines:
        uri, component, release = line.split()
        if component == "main" and "-" not in release and "debian" in uri:
            return uri
    raise BuildError("apt's sources name no Debian mirror: debootstrap needs one")


@dataclasses.dataclass(frozen=True, slots=True)
class Base:
    """A minimal Debian with `include`: the first step of a recipe."""

    include: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For people."""
        return ", ".join((f"Debian {SUITE}", *self.include))

    def apply(self, kitchen: Kitchen) -> None:
        """Copy it into the empty root."""
        done = self.made(kitchen)
        machine.check_call(["cp", "-a", "--reflink=auto", f"{done}/.", str(kitchen.root)])

    def made(self, kitchen: Kitchen) -> Path:
        """The base system itself, made unless it is there."""
        key = hashlib.sha256(repr((SUITE, self)).encode()).hexdigest()[:12]
        done = kitchen.cache / f"debian-{SUITE}-{key}"
        if not done.exists():
            kitchen.say(f"debootstrap of {self.title}: about a minute")
            building = done.with_suffix(".building")
            shutil.rmtree(building, ignore_errors=True)
            include = [f"--include={','.join(self.include)}"] if self.include else []
            command = ["debootstrap", "--variant=minbase", *include, SUITE, str(building), mirror()]
            with (kitchen.cache / "debootstrap.log").open("wb") as log:
                if subprocess.run(command, check=False, stdout=log, stderr=log).returncode:
                    raise BuildError(f"debootstrap failed; its output is in {log.name}")
            _forget_downloads(building)
            building.rename(done)
        return done


@dataclasses.dataclass(frozen=True, slots=True)
class Packages:
    """A layer as `RUN apt-get install` leaves it."""

    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """For people."""
        return _abridged(self.names)

    def apply(self, kitchen: Kitchen) -> None:
        """Install them, with what they need and nothing that they recommend."""
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LANG": "C.UTF-8"}
        install = ["install", "-y", "--no-install-recommends", *self.names]
        with proc(kitchen.root):
            for command in (["update"], install):
                said = subprocess.run(
                    ["chroot", str(kitchen.root), "apt-get", "-q", *command],
                    check=False,
                    capture_output=True,
                    text=True,
                    env=environment,
                )
                if said.returncode:
                    raise BuildError(f"apt-get {' '.join(command)} in the image: {said.stderr[-2000:]}")
        _forget_downloads(kitchen.root)


@contextlib.contextmanager
def proc(root: Path) -> Iterator[None]:
    """/proc in the image, without which no Java runs."""
    machine.check_call(["mount", "-t", "proc", "proc", str(root / "proc")])
    try:
        yield
    finally:
        machine.check_call(["umount", "--lazy", str(root / "proc")])


def _forget_downloads(root: Path) -> None:
    for folder in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir()


def _abridged(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
