"""Real images for demo, benchmarks and tests: `RECIPES` by name, built by `build`.

Each has a command that prints a line of which the first word is `READY` when it could serve, and then
stays; a server's `url` answers then, too. One module for each workload; `recipe.py` says what a recipe is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from e2e.workloads import builder, files100k, jvm, layers70, node, server, small, torch, weights
from e2e.workloads.debian import mirror
from e2e.workloads.recipe import READY, TAG, BuildError, Recipe, Workload

__all__ = ["READY", "RECIPES", "TAG", "BuildError", "Recipe", "Workload", "build", "mirror"]

RECIPES = {
    module.RECIPE.name: module.RECIPE
    for module in (torch, small, server, node, jvm, layers70, files100k, weights)
}


def build(name: str, cache: Path, say: Callable[[str], None]) -> Workload:
    """The workload `name`, built under `cache` unless an earlier run left it there."""
    return builder.build(RECIPES[name], cache, say)
