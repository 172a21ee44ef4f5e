"""The command itself: what it says when it was installed without a part of it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from glowplug import cli

_WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
from glowplug import cli
cli.main()
"""


@pytest.mark.parametrize(
    ("package", "verb"),
    [("aiohttp", ["agent", "run"]), ("grpc", ["pull", "host/app"]), ("isal", ["convert", "oci:none"])],
)
def test_a_package_that_is_not_installed_is_named(package: str, verb: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(package=package), *verb],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
    )
    assert result.returncode == 8, result.stderr
    assert f"needs the Python package '{package}'" in result.stderr
    assert all(f"'glowplug[{extra}]'" in result.stderr for extra in cli.EXTRAS)
    assert "Traceback" not in result.stderr


def test_every_extra_is_named() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert cli.EXTRAS.keys() == project["optional-dependencies"].keys() - {"dev"}
