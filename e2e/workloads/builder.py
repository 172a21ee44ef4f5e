"""Recipes become images, without Docker and without a hub: one layer for each step, gzip, as an OCI layout.

Everything downloaded or built is kept under the cache directory, keyed by the recipe, so that a second run
costs nothing. Called by what runs workloads; one build at a time for all processes. Needs root (debootstrap,
chroot).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from e2e.workloads import layout
from e2e.workloads.recipe import SUITE, BuildError, Kitchen, Recipe, Workload

_BUILD = 3
"""Part of the cache key: raise it when images are built in another way from the same recipe."""

Seen = dict[str, tuple[int, int]]
"""Path, relative to the root, to what changes with the file: inode number and ctime in nanoseconds."""


def build(recipe: Recipe, cache: Path, say: Callable[[str], None]) -> Workload:
    """The workload of `recipe`, built under `cache` unless an earlier run left it there."""
    done = cache / f"{recipe.name}-{key(recipe)}"
    if not done.exists():  # who has it need not wait for who builds another
        if os.geteuid() != 0:
            raise BuildError(f"building the {recipe.name} image needs root (debootstrap, chroot)")
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                say(f"building the {recipe.name} image: the first time only; {recipe.note}")
                _build(recipe, cache, done, say)
    facts = json.loads((done / "workload.json").read_text())
    return Workload(
        name=recipe.name,
        layout=done / "layout",
        command=recipe.command,
        url=recipe.url,
        layers=tuple(step.title for step in recipe.steps),
        **facts,
    )


def key(recipe: Recipe) -> str:
    """Names what the image holds: two recipes with one key make the same image."""
    return hashlib.sha256(repr((_BUILD, SUITE, recipe.steps, recipe.command)).encode()).hexdigest()[:12]


def _build(recipe: Recipe, cache: Path, done: Path, say: Callable[[str], None]) -> None:
    """Make `done`, whole or not at all; what older recipes or killed runs left is removed first."""
    for stale in cache.glob(f"{recipe.name}-*"):
        shutil.rmtree(stale)
    work = done.with_suffix(".building")
    kitchen = Kitchen(work / "root", cache, say)
    kitchen.root.mkdir(parents=True)
    try:
        written = _layers(recipe, kitchen, work / "layout")
    except BaseException:
        shutil.rmtree(work)
        raise
    shutil.rmtree(kitchen.root)
    layout.write_image(recipe.command, written, work / "layout")
    facts = {
        "compressed_bytes": sum(layer.size for layer in written),
        "unpacked_bytes": sum(layer.tar_bytes for layer in written),
        "entries": sum(layer.entries for layer in written),
    }
    (work / "workload.json").write_text(json.dumps(facts))
    work.rename(done)


def _layers(recipe: Recipe, kitchen: Kitchen, into: Path) -> list[layout.Layer]:
    """Apply the steps, each layer written before the next step may change what is in it."""
    into.mkdir()
    written, seen = [], Seen()
    for step in recipe.steps:
        kitchen.say(f"{recipe.name}: {step.title}")
        step.apply(kitchen)
        now = _look(kitchen.root)
        if gone := sorted(seen.keys() - now.keys()):
            raise BuildError(f"{step!r} removes {gone[0]} of a layer below: a layer here cannot say that")
        new = {path for path, state in now.items() if seen.get(path) != state}
        parents = {str(parent) for path in new for parent in Path(path).parents if str(parent) != "."}
        written.append(layout.write_layer(kitchen.root, sorted(new | parents), into))
        seen = now
    return written


def _look(root: Path) -> Seen:
    """Every path below `root`, links not followed."""
    seen = Seen()
    for folder, folders, files in os.walk(root):
        prefix = os.path.relpath(folder, root)
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            seen[os.path.normpath(os.path.join(prefix, name))] = (status.st_ino, status.st_ctime_ns)
    return seen
