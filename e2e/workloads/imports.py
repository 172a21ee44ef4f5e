"""The command of workloads whose start is an import."""

from __future__ import annotations

from e2e.workloads.recipe import READY


def command(script: str) -> tuple[str, ...]:
    """Prints one line when Python runs, and the ready line with `value` when `script` has set it; then it
    stays until its standard input ends."""
    lines = (
        "print('python runs', flush=True)",
        script,
        f"print('{READY}', value, flush=True)",
        "import sys; sys.stdin.read()",
    )
    return ("python3", "-c", "\n".join(lines))
