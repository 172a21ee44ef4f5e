"""A layer as `RUN pip install` leaves it: pinned wheels, for the image's Python, compiled by it."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
from pathlib import Path

from e2e.workloads.recipe import PYTHON_VERSION, BuildError, Kitchen
from glowplug.startup import machine

SITE = f"usr/local/lib/python{PYTHON_VERSION}/dist-packages"


@dataclasses.dataclass(frozen=True, slots=True)
class Wheels:
    """`requirements` are pinned (name==version), and all that is installed: what they depend on is said."""

    requirements: tuple[str, ...]

    @property
    def title(self) -> str:
        """For people."""
        names = [requirement.partition("==")[0] for requirement in self.requirements]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def apply(self, kitchen: Kitchen) -> None:
        """Download, once for all images, and install."""
        wheels = kitchen.cache / "wheels"
        arch = platform.machine()
        platforms = [
            f"--platform={name}_{arch}" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
        ]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        target = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON_VERSION}", *platforms]
        machine.check_call([*pip, "download", *target, "-d", str(wheels), *self.requirements])
        _refuse_cuda(wheels)
        options = ["--no-index", f"--find-links={wheels}", "--no-compile", "--root-user-action=ignore"]
        site = f"--target={kitchen.root / SITE}"
        machine.check_call([*pip, "install", *target, *options, "--upgrade", site, *self.requirements])
        # Scripts that name the wrong interpreter; the next pip would remove those of the last.
        shutil.rmtree(kitchen.root / SITE / "bin", ignore_errors=True)
        command = ["python3", "-m", "compileall", "-q", "-j", "0", f"/{SITE}"]
        machine.check_call(
            ["chroot", str(kitchen.root), *command], allow=(0, 1)
        )  # 1: some are for other Pythons


def _refuse_cuda(wheels: Path) -> None:
    for found in wheels.glob("torch-*.whl"):
        if platform.machine() == "x86_64" and "cpu" not in found.name:
            found.unlink()
            raise BuildError(
                "pip found a CUDA build of PyTorch, which is 10 times larger and cannot be imported without"
                " a driver; point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels, or use DEMO=small"
            )
