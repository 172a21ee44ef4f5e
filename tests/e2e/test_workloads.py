"""Workloads: recipes are pinned, each layer holds what its step changed, and other tools read the layout."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from e2e import workloads
from e2e.workloads import builder, files, layout, recipe, wheels

RECIPES = pytest.mark.parametrize(
    "made", workloads.RECIPES.values(), ids=[made.name for made in workloads.RECIPES.values()]
)


@RECIPES
def test_every_wheel_is_pinned(made: workloads.Recipe) -> None:
    steps = [step for step in made.steps if isinstance(step, wheels.Wheels)]
    assert all("==" in requirement for step in steps for requirement in step.requirements)


@RECIPES
def test_programs_are_programs(made: workloads.Recipe) -> None:
    if made.command[:2] == ("python3", "-c"):
        compile(made.command[-1], made.name, "exec")
    for step in made.steps:
        if isinstance(step, files.Run) or (isinstance(step, files.Program) and step.path.endswith(".py")):
            compile(step.text, step.title, "exec")


@RECIPES
def test_the_ready_line_is_in_what_runs(made: workloads.Recipe) -> None:
    assert re.search(rf"[\"'`]{workloads.READY}\b", repr((made.command, made.steps)))


def test_keys_say_what_is_in_the_image() -> None:
    made = workloads.RECIPES["small"]
    others = [
        dataclasses.replace(made, command=("true",)),
        dataclasses.replace(made, steps=made.steps[:-1]),
        dataclasses.replace(made, steps=(*made.steps, files.Program("a", "1"))),
        dataclasses.replace(made, steps=(*made.steps, files.Program("a", "2"))),
    ]
    assert len({builder.key(each) for each in (made, *others)}) == len(others) + 1
    assert builder.key(dataclasses.replace(made, note="quick")) == builder.key(made)


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """Writes files by path; without a text, it removes one."""

    texts: tuple[tuple[str, str | None], ...]
    title: str = "files"

    def apply(self, kitchen: recipe.Kitchen) -> None:
        for path, text in self.texts:
            target = kitchen.root / path
            if text is None:
                target.unlink()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)


def build(folder: Path, *steps: recipe.Step) -> workloads.Workload:
    made = workloads.Recipe("tiny", steps, ("/usr/bin/tool",), "takes no time")
    return builder.build(made, folder, lambda text: None)


@pytest.mark.root
def test_a_layer_has_what_its_step_wrote_and_the_folders_above(tmp_path: Path) -> None:
    bottom = Write((("usr/bin/tool", "#!/bin/sh\n"), ("usr/lib/one", "1"), ("usr/lib/two", "2")))
    top = Write((("usr/lib/two", "changed"), ("usr/share/three", "3")))
    made = build(tmp_path, bottom, top)
    assert made.entries == 6 + 5
    unpacked = tmp_path / "unpacked"
    image = f"{made.layout}:{workloads.TAG}"
    subprocess.run(
        ["umoci", "unpack", "--rootless", "--image", image, unpacked], check=True, capture_output=True
    )
    root = unpacked / "rootfs"
    texts = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
    assert texts == {
        "usr/bin/tool": "#!/bin/sh\n",
        "usr/lib/one": "1",
        "usr/lib/two": "changed",
        "usr/share/three": "3",
    }


@pytest.mark.root
def test_a_built_image_is_found_again_and_an_older_one_goes(tmp_path: Path) -> None:
    first = build(tmp_path, Write((("a", "1"),)))
    marker = first.layout / "still here"
    marker.touch()
    assert build(tmp_path, Write((("a", "1"),))) == first
    assert marker.exists()
    second = build(tmp_path, Write((("a", "2"),)))
    assert not first.layout.exists()
    assert second.layout.exists()


@pytest.mark.root
def test_a_step_that_removes_what_lies_below_is_refused(tmp_path: Path) -> None:
    with pytest.raises(workloads.BuildError, match=r"usr/gone"):
        build(tmp_path, Write((("usr/gone", "1"),)), Write((("usr/gone", None),)))


def test_the_layout_is_read_by_skopeo(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    layer = layout.write_layer(tmp_path, ["tool"], tmp_path)
    layout.write_image(("/tool",), [layer], tmp_path)
    said = subprocess.run(
        ["skopeo", "inspect", "--config", f"oci:{tmp_path}:{workloads.TAG}"],
        capture_output=True,
        text=True,
        check=True,
    )
    config = json.loads(said.stdout)
    assert config["rootfs"]["diff_ids"] == [layer.diff_id]
    assert config["config"]["Cmd"] == ["/tool"]


@pytest.mark.root
@pytest.mark.soak
@pytest.mark.parametrize("name", workloads.RECIPES)
def test_each_image_starts_lazily_and_answers(name: str, tmp_path: Path) -> None:
    """Built, converted, started on a network of its own until the ready line; then the URL, if any."""
    built = workloads.build(name, Path(__file__).parents[2] / ".cache" / "workloads", print)
    shutil.copytree(built.layout, tmp_path / "layout")
    glowplug = str(Path(sys.executable).with_name("glowplug"))
    ref = f"oci:{tmp_path / 'layout'}:{workloads.TAG}"
    subprocess.run([glowplug, "convert", ref], check=True, capture_output=True)
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    storage = ["--state", str(tmp_path / "state"), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(
        [*alone, glowplug, "run", *storage, ref, "--", *built.command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert any(line.split()[:1] == [workloads.READY] for line in process.stdout)
        if built.url is not None:
            inside = ["nsenter", f"--target={process.pid}", "--net"]
            subprocess.run([*inside, "curl", "-sSf", built.url], check=True)
        process.stdin.close()
        for _ in process.stdout:
            pass
    assert process.returncode == 0
