"""Workloads: recipes are pinned, and the OCI layout that is written is one that other tools read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from e2e import workloads

RECIPE = workloads.Recipe("tiny", (("one==1",),), "value = 1", "")


@pytest.mark.parametrize("recipe", workloads.RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_wheel_is_pinned(recipe: workloads.Recipe) -> None:
    assert all("==" in requirement for layer in recipe.layers for requirement in layer)


@pytest.mark.parametrize("recipe", workloads.RECIPES.values(), ids=lambda recipe: recipe.name)
def test_the_command_is_a_program(recipe: workloads.Recipe) -> None:
    compile(recipe.command[-1], recipe.name, "exec")


def write(folder: Path) -> Path:
    root, layout = folder / "root", folder / "layout"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/tool").write_text("#!/bin/sh\n")
    (root / "bin").symlink_to("usr/bin")
    layout.mkdir()
    layer = workloads.write_layer(root, ["bin", "usr", "usr/bin", "usr/bin/tool"], layout)
    workloads.write_image(RECIPE, [layer], layout)
    return layout


def test_the_layout_is_read_by_skopeo_and_unpacked_by_umoci(tmp_path: Path) -> None:
    layout = write(tmp_path)
    said = subprocess.run(
        ["skopeo", "inspect", f"oci:{layout}:{workloads.TAG}"], capture_output=True, text=True, check=True
    )
    assert len(json.loads(said.stdout)["Layers"]) == 1
    unpacked = tmp_path / "unpacked"
    image = f"{layout}:{workloads.TAG}"
    subprocess.run(
        ["umoci", "unpack", "--rootless", "--image", image, unpacked], check=True, capture_output=True
    )
    assert (unpacked / "rootfs/bin/tool").read_text() == "#!/bin/sh\n"
