"""numpy and scipy: a start of little more than a second, where each round trip counts."""

from __future__ import annotations

from e2e.workloads import debian, imports, wheels
from e2e.workloads.recipe import Recipe

RECIPE = Recipe(
    name="small",
    steps=(debian.Base(("python3",)), wheels.Wheels(("numpy==2.3.4",)), wheels.Wheels(("scipy==1.16.3",))),
    command=imports.command("import numpy, scipy.linalg; value = float(scipy.linalg.det(numpy.eye(64)))"),
    note="downloads about 110 MB, then builds for a minute or two",
)
