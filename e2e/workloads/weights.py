"""2 GB of weights in one file, read from the first byte to the last: where throughput is all that counts."""

from __future__ import annotations

from e2e.workloads import debian, files, wheels
from e2e.workloads.recipe import Recipe

_FILE = "/opt/weights/model.safetensors"
_READER = "srv/read_weights.py"
_MATRICES = 60


def command(processes: int) -> tuple[str, ...]:
    """Reads the whole file, so many processes a part of it each."""
    return ("python3", f"/{_READER}", _FILE, str(processes))


RECIPE = Recipe(
    name="weights",
    steps=(
        debian.Base(("python3",)),
        wheels.Wheels(("numpy==2.3.4",)),
        files.program("read_weights.py", _READER),
        files.run("make_weights.py", _FILE, str(_MATRICES), title="2 GB of bf16 weights"),
    ),
    command=command(1),
    note="computes 2 GB and compresses them: about two minutes, 1.7 GB on disk",
)
