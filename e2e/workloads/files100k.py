"""A Python monorepo of 100,000 files; a start lists a part and imports a part: where metadata counts."""

from __future__ import annotations

from e2e.workloads import debian, files
from e2e.workloads.recipe import Recipe

_ROOT = "/srv/monorepo"
_FILES = 100_000

RECIPE = Recipe(
    name="files100k",
    steps=(
        debian.Base(("python3",)),
        files.run("make_monorepo.py", _ROOT, str(_FILES), title="a monorepo of 100,000 files"),
        files.program("use_monorepo.py", "srv/use_monorepo.py"),
    ),
    command=("python3", "/srv/use_monorepo.py", _ROOT),
    note="writes and compiles 100,000 files: some minutes",
)
