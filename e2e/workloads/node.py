"""A Node service: Debian's nodejs and 20,000 files of modules, of which it requires some hundred packages."""

from __future__ import annotations

from e2e.workloads import debian, files
from e2e.workloads.recipe import Recipe

_PORT = 8000

RECIPE = Recipe(
    name="node",
    steps=(
        debian.Base(),
        debian.Packages(("nodejs",)),
        debian.Packages(("node-express", "node-axios", "node-moment", "node-ws", "node-winston", "node-ajv")),
        files.program("service.js", "srv/service.js"),
    ),
    command=("node", "/srv/service.js", str(_PORT)),
    note="downloads about 100 MB, then builds for a minute or two",
    url=f"http://127.0.0.1:{_PORT}/health",
)
