"""`make demo`: one image, one command, started twice over the same 1 Gbit/s link.

First by containerd, which downloads and unpacks everything; then lazily. Prints both time lines, and writes
results/demo.html (the block waterfall) and results/demo.json. Everything goes through the command and the
sockets, as it would for a user. Needs root: namespaces, mounts, debootstrap.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from e2e import containerd, lazy, registry, report, timeline, waterfall, workloads
from glowplug.startup import link, machine

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "workloads"
RESULTS = ROOT / "results"
BITS_PER_SECOND = 10**9

_REASONS = {
    "demand": "a read waited for it",
    "boot": "in the boot pack",
    "read_ahead": "read ahead",
    "fill": "filled in the background",
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", choices=sorted(workloads.RECIPES), default="torch")
    parser.add_argument("--results", type=Path, default=RESULTS)
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

    workload = workloads.build(image, CACHE, say)
    say(
        f"image: {report.megabytes(workload.unpacked_bytes)} in {workload.entries:,} files, "
        f"{report.megabytes(workload.compressed_bytes)} as gzip, {len(workload.layers)} layers"
    )
    with tempfile.TemporaryDirectory(prefix="glowplug-demo-") as name:
        measured = _measure(workload, Path(name), say)
    results.mkdir(parents=True, exist_ok=True)
    page = results / "demo.html"
    page.write_text(report.page(measured), encoding="utf-8")
    (results / "demo.json").write_text(json.dumps(report.document(measured), indent=1) + "\n")
    print(f"\n{report.terminal(measured)}\n\nThe block waterfall: {page}")


def _measure(workload: workloads.Workload, folder: Path, say: Callable[[str], None]) -> report.Report:
    with link.open_link(BITS_PER_SECOND) as over, registry.serve(over, folder) as server:
        say("pushing the image to a registry behind a link of 1 Gbit/s")
        name = server.push(workload)
        with lazy.use(over, folder / "glowplug") as glowplug:
            say("glowplug convert: the block image goes to the same repository, as a referrer")
            converted = glowplug.convert(name)
            say("containerd: download, unpack, run")
            with containerd.serve(over, folder / "containerd") as daemon:
                machine.drop_page_cache()
                pulled = daemon.start(name, workload.command)
            say(f"ready after {report.seconds(pulled.ready_seconds)}; now glowplug run, with an empty cache")
            machine.drop_page_cache()
            started, events = glowplug.start(name, workload.command)
            say(f"ready after {report.seconds(started.ready_seconds)}")
    return report.Report(
        image=f"demo/{workload.name}",
        command=shlex.join(workload.command),
        compressed_bytes=workload.compressed_bytes,
        unpacked_bytes=workload.unpacked_bytes,
        entries=workload.entries,
        bits_per_second=over.bits_per_second,
        machine=machine.facts(),
        pulled=pulled,
        lazy=started,
        layers=[
            waterfall.LayerFacts(text, layer["blocks"], layer["blob_bytes"])
            for text, layer in zip(workload.layers, converted["layers"], strict=True)
        ],
        fetches=_fetches(events, started, [layer["map_digest"] for layer in converted["layers"]]),
    )


def _fetches(
    events: Sequence[dict[str, Any]], start: timeline.Start, map_digests: Sequence[str]
) -> list[waterfall.Fetch]:
    """What came from the origin, in seconds since the start."""

    def since(moment_ns: int) -> float:
        return (moment_ns - start.began_ns) / 1e9

    return [
        waterfall.Fetch(
            layer=map_digests.index(event["map_digest"]),
            block=event["block"],
            demand=event["reason"] == "demand",
            reason=_REASONS.get(event["reason"], event["reason"]),
            compressed_bytes=event["compressed_bytes"],
            wanted_seconds=since(event["wanted_ns"]),
            started_seconds=since(event["started_ns"]),
            arrived_seconds=since(event["arrived_ns"]),
        )
        for event in events
        if event["outcome"] == "origin" and event["map_digest"] in map_digests
    ]


if __name__ == "__main__":
    main()
