"""The command itself: what it says when it was installed without a part of it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import click.testing
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


def _groups(command: click.Command, *words: str) -> Iterator[tuple[click.Group, tuple[str, ...]]]:
    if isinstance(command, click.Group):
        yield command, words
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _groups(found, *words, name)


_GROUPS = list(_groups(cli.cli))


@pytest.mark.parametrize(
    ("group", "words"), _GROUPS, ids=[" ".join(words) or "glowplug" for _, words in _GROUPS]
)
def test_no_list_of_commands_is_cut(group: click.Group, words: tuple[str, ...]) -> None:
    said = click.testing.CliRunner().invoke(cli.cli, [*words, "--help"]).output
    assert all(f"\n  {name} " in said for name in group.list_commands(click.Context(group)))
    assert "..." not in said.partition("Commands:")[2]


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["mont", "x"], "mount"), (["endpoint", "stat"], "status"), (["agent", "uprade"], "upgrade")],
)
def test_a_verb_that_there_is_not_is_answered_with_the_one_that_was_meant(
    words: list[str], meant: str
) -> None:
    result = click.testing.CliRunner().invoke(cli.cli, words)
    assert result.exit_code == 2
    assert f"did you mean {meant}?" in result.output
