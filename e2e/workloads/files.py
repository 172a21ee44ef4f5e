"""Layers of our own making: a program that runs inside the image, as `COPY` leaves it, and what a program
wrote while the image was built, as `RUN` does. The programs are in `programs/`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from e2e.workloads.recipe import Kitchen
from glowplug.startup import machine

_PROGRAMS = Path(__file__).with_name("programs")
_SCRATCH = "tmp/program"


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A text file at `path` in the image."""

    path: str
    text: str

    @property
    def title(self) -> str:
        """For people."""
        return f"/{self.path}"

    def apply(self, kitchen: Kitchen) -> None:
        """Write it."""
        target = kitchen.root / self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What `text`, a Python program, writes when the image's Python runs it with `arguments`."""

    title: str
    text: str
    arguments: tuple[str, ...]

    def apply(self, kitchen: Kitchen) -> None:
        """Run it; the program itself is no part of the image."""
        program = kitchen.root / _SCRATCH
        program.write_text(self.text)
        machine.check_call(["chroot", str(kitchen.root), "python3", f"/{_SCRATCH}", *self.arguments])
        program.unlink()


def program(name: str, path: str) -> Program:
    """The step that puts `programs/NAME` at `path`."""
    return Program(path, _text(name))


def run(name: str, *arguments: str, title: str) -> Run:
    """The step that runs `programs/NAME`."""
    return Run(title, _text(name), arguments)


def _text(name: str) -> str:
    return (_PROGRAMS / name).read_text()
