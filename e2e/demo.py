"""`make demo`: one image, one command, started three times over the same 1 Gbit/s link.

By containerd, which downloads and unpacks everything; lazily, by blocks; lazily, with a boot pack. Prints the
figures, and writes results/demo.html (with every block that was fetched) and results/demo.json. It is
`glowplug bench startup` with one run of each. Needs root: namespaces, mounts, debootstrap.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from e2e import startup, workloads
from glowplug.startup import machine, result, table
from glowplug.startup.speed import Speed

_MODES = (result.CONTAINERD, result.BLOCKS, result.PACK)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", choices=sorted(workloads.RECIPES), default="torch")
    parser.add_argument("--results", type=Path, default=startup.RESULTS)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("demo: needs root, for network namespaces, mounts and debootstrap")
    try:
        with machine.interruptible():
            run(options.image, options.results)
    except (machine.CommandError, workloads.BuildError) as exc:
        sys.exit(f"demo: {exc}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; everything it started is gone")


def run(image: str, results: Path) -> None:
    """The whole demo."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    workload = workloads.build(image, startup.CACHE, say)
    say(
        f"image: {table.megabytes(workload.unpacked_bytes)} in {workload.entries:,} files, "
        f"{table.megabytes(workload.compressed_bytes)} as gzip, {len(workload.layers)} layers"
    )
    (measured,) = startup.measure(workload, [Speed(10**9)], _MODES, 1, (), say)
    startup.write([measured], results, "demo")
    print(f"\n{table.text(measured)}\n")
    say(f"every block that was fetched: {results / 'demo.html'}")


if __name__ == "__main__":
    main()
