"""What peers save: one image, started on one node alone, and on a whole fleet at once.

Each node is an agent in a network namespace of its own, with its own cache; the origin's link has the speed
of a real one, and its counter is the measure. Prints a table and writes results/peers.json. Nothing is
asserted (tests/agent/test_peer_fleet.py does that). Needs root.

    python -m e2e.peers [--image small] [--nodes 8] [--runs 3]

All nodes share this machine's processors: the times say how much a start waits for the origin, not how fast
a fleet of real machines is. The bytes are what they would be there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e import fleet, startup, workloads
from glowplug.startup import lazy, machine
from imagefs.fuse import control

_ORIGIN_BITS_PER_SECOND = 10**9


def measure(workload: workloads.Workload, nodes: int, runs: int) -> dict[str, Any]:
    """Every run's figures, in run order."""
    alone: list[dict[str, Any]] = []
    together: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="glowplug-peers-") as name:
        folder = Path(name)
        try:
            with fleet.open_fleet(nodes, folder, _ORIGIN_BITS_PER_SECOND) as made:
                ref = _publish(made, workload)
                for _ in range(runs):
                    alone.append(_start_on(made, made.nodes[:1], ref, workload))
                    together.append(_start_on(made, made.nodes, ref, workload))
        finally:
            machine.unmount_below(folder)
    return {
        "machine": machine.facts(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "image": workload.name,
        "nodes": nodes,
        "origin_bits_per_second": _ORIGIN_BITS_PER_SECOND,
        "alone": alone,
        "together": together,
        "origin_bytes_ratio": round(_median(together) / _median(alone), 3),
    }


def _publish(made: fleet.Fleet, workload: workloads.Workload) -> str:
    """The image and its block image in the fleet's registry; its REF."""
    ref = f"docker://{made.registry}/demo/{workload.name}:{workloads.TAG}"
    copy = ["skopeo", "copy", "-q", "--dest-tls-verify=false", workload.source, ref]
    machine.check_call(made.origin.command(copy))
    machine.check_call(made.origin.command([str(lazy.COMMAND), "convert", "--plain-http", ref]))
    return ref


def _start_on(
    made: fleet.Fleet, nodes: Sequence[fleet.Node], ref: str, workload: workloads.Workload
) -> dict[str, Any]:
    """Agents with empty caches; then the workload's command on all of them at once, until the last ended."""
    for node in made.nodes:
        fleet.forget(node)
    machine.drop_page_cache()
    with made.agents(nodes):
        before_bytes, began = made.origin_sent_bytes(), time.monotonic()
        with contextlib.ExitStack() as stack:
            started = []
            for node in nodes:
                stack.callback(fleet.unmount, node)
                command = _start_command(node, ref, workload)
                started.append(stack.enter_context(machine.daemon(command, node.folder / "run.log")))
            for node, process in zip(nodes, started, strict=True):
                _wait(node, process)
            seconds = time.monotonic() - began
            sent_bytes = made.origin_sent_bytes() - before_bytes
            fetched = [_fetched(node) for node in nodes]
    return {
        "seconds": round(seconds, 2),
        "origin_sent_bytes": sent_bytes,
        "peer_bytes": sum(counters["peer_bytes"] for counters in fetched),
        "peer_failures": sum(counters["peer_failures"] for counters in fetched),
        "hedges": sum(counters["peer_hedges"] for counters in fetched),
    }


def _start_command(node: fleet.Node, ref: str, workload: workloads.Workload) -> list[str]:
    """Mount the image, and run its command in it. A mount is `nodev`: devices come from a bind mount."""
    node.mount_point.mkdir(exist_ok=True)
    root = shlex.quote(str(node.mount_point))
    mount = shlex.join(node.command("mount", "--plain-http", ref, str(node.mount_point)))
    environment = "env -i PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8"
    inside = (
        f"mount --rbind /dev {root}/dev && exec chroot {root} {environment} {shlex.join(workload.command)}"
    )
    return ["sh", "-c", f"{mount} && exec unshare --mount sh -c {shlex.quote(inside)}"]


def _fetched(node: fleet.Node) -> dict[str, int]:
    client = control.DeviceClient.connect(node.folder / "state")
    if client is None:
        raise machine.CommandError(f"the device server of {node.name} is gone")
    counters: dict[str, int] = client.status()["fetch"]
    return counters


def _wait(node: fleet.Node, process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        said = (node.folder / "run.log").read_text(errors="replace")[-2000:]
        raise machine.CommandError(f"the start on {node.name} failed: {said}")


def _median(runs: Sequence[dict[str, Any]]) -> float:
    return float(statistics.median(run["origin_sent_bytes"] for run in runs))


def _table(result: dict[str, Any]) -> str:
    lines = []
    for name, nodes in (("alone", 1), ("together", result["nodes"])):
        seconds = statistics.median(run["seconds"] for run in result[name])
        megabytes = _median(result[name]) / 1e6
        lines.append(f"{nodes:3} node(s): origin sent {megabytes:8.1f} MB, all ended after {seconds:6.2f} s")
    lines.append(f"origin, of what one node needs: {result['origin_bytes_ratio']:.3f} times")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="What peers save of the origin's bytes.")
    parser.add_argument("--image", choices=sorted(workloads.RECIPES), default="small")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=startup.RESULTS)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("peers: needs root, for network namespaces and mounts")
    try:
        with machine.interruptible():
            workload = workloads.build(
                options.image, startup.CACHE, lambda text: print(text, file=sys.stderr)
            )
            result = measure(workload, options.nodes, options.runs)
    except (machine.CommandError, workloads.BuildError) as exc:
        sys.exit(f"peers: {exc}")
    except KeyboardInterrupt:
        sys.exit("peers: interrupted; everything it started is gone")
    print(_table(result), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    target = options.results / "peers.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"peers: {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
