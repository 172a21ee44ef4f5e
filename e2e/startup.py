"""All workloads on all links: what README's figures of starts come from. Needs root.

    python -m e2e.startup [--workloads torch small] [--links 1gbit 100mbit,50ms] [--modes ...] [--runs 3]

For each, all that `glowplug bench startup` measures, against Debian's containerd and a newer one, tuned.
Prints a table for each workload and link, and writes results/startup.json and results/startup.html.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from e2e import workloads
from glowplug.startup import containerd, machine, report, result, scratch, speed, table
from glowplug.startup import measure as startup
from glowplug.until import Until
from imagefs import duration, errors
from tests.fixtures import containerd as newer

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "workloads"
RESULTS = ROOT / "results"
_LINKS = ("1gbit", "100mbit,50ms")
_TUNED = "2.1"


def measure(
    workload: workloads.Workload,
    links: Sequence[speed.Speed],
    modes: Sequence[str],
    runs: int,
    rivals: Sequence[startup.Rival],
    say: Callable[[str], None],
) -> Iterator[result.Measurement]:
    """One workload, prepared once, on each link."""
    startup.check(modes)
    said = re.compile(f"^{workloads.READY}".encode())
    until = Until(address=workload.url) if workload.url else Until(log=said)
    started = scratch.Workload(workload.name, workload.source, workload.command, (), until)
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-") as name:
        folder = Path(name)
        prepared = scratch.prepare(started, modes, folder, say)
        for link in links:
            yield startup.measure(started, prepared, modes, rivals, link, runs, folder, say)


def write(measurements: Sequence[result.Measurement], results: Path, name: str) -> None:
    """The page, and every single start."""
    results.mkdir(parents=True, exist_ok=True)
    document = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "measurements": [measured.document() for measured in measurements],
    }
    (results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (results / f"{name}.html").write_text(report.page(measurements), encoding="utf-8")


def _link(text: str) -> speed.Speed:
    """RATE[,RTT], for argparse."""
    rate, _, rtt = text.partition(",")
    try:
        return speed.Speed(speed.parse_rate(rate), duration.parse(rtt or "0", "round-trip time"))
    except errors.InvalidInputError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(workloads.RECIPES)
    parser.add_argument("--workloads", nargs="+", choices=names, default=list(workloads.RECIPES))
    parser.add_argument("--links", nargs="+", type=_link, default=[_link(text) for text in _LINKS])
    parser.add_argument("--modes", nargs="+", choices=result.MODES, default=list(result.MODES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("startup: needs root, for network namespaces and mounts")
    try:
        with machine.interruptible():
            _run(options)
    except (errors.ImagefsError, workloads.BuildError) as exc:
        sys.exit(f"startup: {exc}")
    except KeyboardInterrupt:
        sys.exit("startup: interrupted; everything it started is gone")


def _run(options: argparse.Namespace) -> None:
    def say(text: str) -> None:
        print(f"startup: {text}", file=sys.stderr, flush=True)

    binaries = containerd.inspect(newer.binaries(_TUNED).directory)
    rivals = [startup.Rival(binaries, startup.rival_label(binaries))]
    measured: list[result.Measurement] = []
    for name in options.workloads:
        workload = workloads.build(name, CACHE, say)
        for each in measure(workload, options.links, options.modes, options.runs, rivals, say):
            print(f"{table.text(each)}\n", flush=True)
            measured.append(each)
            write(measured, options.results, "startup")


if __name__ == "__main__":
    main()
