"""What the figures in README.md and docs/benchmarks.md come from, beside those of starts (`startup.py`).

Seven parts, each measured against something in the same run, so that a noisy or slow machine falls on both
sides: `warm` (the mount against the same EROFS files on local disk), `convert`, `metadata`, `cri` (the agent
under containerd against containerd alone), `readahead` (what the kernel reads ahead during a start, one value
against the other), `weights` (a large file, read cold, against `curl` and `zstd -d` of its blob; best with
`--image weights`) and `blocks` (sizes of blocks and frames, on two links), which run when they are named.
Prints a table and writes results/bench.json. Nothing is asserted. Needs root.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e import blocks, conversion, cri, plain, readahead, startup, weights, workloads
from glowplug.startup import lazy, link, machine, registry
from glowplug.startup.speed import Speed

PARTS = ("warm", "convert", "metadata", "cri")
EXTRA_PARTS = ("readahead", "weights", "blocks")
_SPEED = Speed(10**9)
_SPEEDS = {"blocks": (_SPEED, Speed(10**8, 0.05))}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity: every run's value, in run order."""

    part: str
    name: str
    unit: str
    values: tuple[float, ...]

    def text(self) -> str:
        """Median, and from where to where the runs went."""
        low, high = min(self.values), max(self.values)
        spread = f"({low:.3f} to {high:.3f}, {len(self.values)} runs)"
        return f"{statistics.median(self.values):10.3f} {self.unit:5} {spread}"


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """What two rows say about each other: median of one divided by median of the other."""

    part: str
    name: str
    value: float


Result = list[Row | Ratio]


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """What all parts share: one image in one registry behind one link, and a folder for the rest."""

    workload: workloads.Workload
    link: link.Link
    registry: registry.Registry
    folder: Path
    runs: int

    def push(self) -> str:
        """The image's name, once it is in the registry."""
        return self.registry.push(self.workload.source, f"bench/{self.workload.name}:{workloads.TAG}")


def warm(bench: Bench) -> Result:
    """Block cache full, page cache dropped: the lazy mount, by its devices and from layer files, against the
    same layer images on local disk."""
    name = bench.push()
    places = {
        "local EROFS": bench.folder / "local-root",
        "glowplug, by devices": bench.folder / "device-root",
        "glowplug, whole layers": bench.folder / "lazy-root",
    }
    local, by_devices, whole = places.values()
    with lazy.use(bench.link, bench.folder / "glowplug") as glowplug:
        glowplug.convert(name)
        with (
            glowplug.mounted(name, by_devices, near=True),
            plain.mounted(bench.workload, bench.folder / "plain", local),
        ):
            lazy.read_all(by_devices)
            layers = bench.workload.layers
            lazy.await_layer_files(glowplug.folder / "cache", len(layers), bench.workload.unpacked_bytes)
            with glowplug.mounted(name, whole, near=True):
                largest = weights.largest(local)
                actions: dict[str, Callable[[Path], None]] = {
                    f"read one library of {(local / largest).stat().st_size / 1e6:.0f} MB": lambda at: _shell(
                        f"dd if={at / largest} of=/dev/null bs=1M"
                    ),
                    "read every file": lazy.read_all,
                    "find, with every inode": lambda at: _shell(f"find {at} -xdev -printf %s%m >/dev/null"),
                    "start to ready": lambda at: _start(at, bench.workload.command),
                }
                rows: Result = []
                for action, carry_out in actions.items():
                    rows += _in_turns(action, carry_out, places, bench.runs)
    return rows


def _in_turns(
    action: str, carry_out: Callable[[Path], None], places: Mapping[str, Path], runs: int
) -> Result:
    """An action at each place, the first of which the others are compared with."""
    values: dict[str, list[float]] = {name: [] for name in places}
    for number in range(runs):
        # Each goes first as often as the others.
        names = list(places)
        at = number % len(names)
        for name in [*names[at:], *names[:at]]:
            machine.drop_page_cache()
            began = time.monotonic()
            carry_out(places[name])
            values[name].append(time.monotonic() - began)
    first, *others = [_row("warm", f"{action}: {name}", "s", values[name]) for name in places]
    ratios = [_ratio("warm", f"{other.name}, of local", other, first) for other in others]
    return [first, *others, *ratios]


def convert(bench: Bench) -> Result:
    """From an OCI layout to an OCI layout, nothing reused: speed by bytes of tar, and peak memory; in turns
    with the stages that no conversion can do without, alone. Those work on what is in memory, and so does one
    of the conversions; the other finds the page cache empty, and reads source and interpreter from disk."""
    target = bench.folder / "converted"
    command = [str(lazy.COMMAND), "convert", bench.workload.source, "--to", f"oci:{target}:latest"]
    places: dict[str, Callable[[], object]] = {
        "source in the page cache": lambda: lazy.read_all(bench.workload.layout),
        "page cache empty": machine.drop_page_cache,
    }
    speeds: dict[str, list[float]] = {place: [] for place in places}
    peaks, bounds = [], []
    for _ in range(bench.runs):
        bounds.append(conversion.measure(bench.workload.layout))
        for place, prepare in places.items():
            prepare()
            seconds, peak_bytes = machine.timed(command)
            machine.check_call(["rm", "-rf", str(target)])
            speeds[place].append(bench.workload.unpacked_bytes / 1e6 / seconds)
            peaks.append(peak_bytes / 2**20)
    rows = [_row("convert", f"tar a second, {place}", "MB/s", values) for place, values in speeds.items()]
    total = _row("convert", "bound: all stages in turn, all processors", "MB/s", [x.total for x in bounds])
    return [
        *rows,
        _row("convert", "peak memory", "MiB", peaks),
        *(
            _row("convert", f"{stage}, by one of all processors", "MB/s", [x.stages[stage] for x in bounds])
            for stage in bounds[0].stages
        ),
        total,
        *(
            _ratio("convert", f"of the bound, {place}", row, total)
            for place, row in zip(places, rows, strict=True)
        ),
    ]


def metadata(bench: Bench) -> Result:
    """Empty cache, registry on loopback: until the image is mounted, and until every inode was seen."""
    name = bench.push()
    root = bench.folder / "metadata-root"
    mounting, listing = [], []
    with lazy.use(bench.link, bench.folder / "glowplug") as glowplug:
        glowplug.convert(name)
        for _ in range(bench.runs):
            machine.drop_page_cache()
            began = time.monotonic()
            with glowplug.mounted(name, root, near=True):
                mounting.append(time.monotonic() - began)
                began = time.monotonic()
                _shell(f"find {root} -xdev -printf %s%m >/dev/null")
                listing.append(time.monotonic() - began)
            glowplug.forget()
        served = []
        with glowplug.server_held(name, root):
            for _ in range(bench.runs):
                glowplug.forget_blocks()
                machine.drop_page_cache()
                began = time.monotonic()
                with glowplug.mounted(name, root, near=True):
                    served.append(time.monotonic() - began)
    entries = f"{bench.workload.entries:,} files"
    return [
        _row("metadata", f"{entries}: `glowplug mount`, all of it", "s", mounting),
        _row("metadata", f"{entries}: the same, by a device server that runs, as on a node", "s", served),
        _row("metadata", f"{entries}: then the first find", "s", listing),
    ]


def cri_starts(bench: Bench) -> Result:
    """Over CRI: cold starts by the agent and starts from unpacked files in turns; then a node on loopback."""
    name = bench.push()
    sandbox_image = cri.push_pause(bench.registry, bench.folder)
    cri.convert(bench.link, bench.folder, name)
    lazily, local = [], []
    with cri.unpacked(bench.link, name, sandbox_image) as daemon:
        for _ in range(bench.runs):
            local.append(cri.start_unpacked(daemon, name, bench.workload.command))
            lazily.append(cri.cold(bench.link, bench.workload, name, sandbox_image))
    nodes = [cri.loopback() for _ in range(bench.runs)]
    left = _row("cri", "overlayfs, unpacked, cold page cache: start to ready", "s", local)
    right = _row("cri", "agent, cold: start to ready", "s", [start.ready for start in lazily])
    whole = _row("cri", "next pod, layers whole, cold page cache", "s", [start.again for start in lazily])
    return [
        _row("cri", "agent, cold: PullImage", "s", [start.pull for start in lazily]),
        left,
        right,
        _ratio("cri", "agent takes to ready, of overlayfs", right, left),
        whole,
        _ratio("cri", "whole layers: of overlayfs", whole, left),
        _row("cri", "agent, cold: moved", "MB", [start.moved_bytes / 1e6 for start in lazily]),
        _row("cri", "70 layers, loopback: PullImage", "s", [each.pull_layers_seconds for each in nodes]),
        _row("cri", "200 snapshots: agent restart", "s", [each.restart_seconds for each in nodes]),
        _row("cri", "agent, idle: resident", "MiB", [each.agent_bytes / 2**20 for each in nodes]),
        _row("cri", "agent, idle: of a core", "%", [each.idle_cores * 100 for each in nodes]),
    ]


def read_ahead(bench: Bench) -> Result:
    """Cold and warm starts at the link's speed, in turns, with other sizes of the kernel's read-ahead."""
    rows: Result = []
    with lazy.use(bench.link, bench.folder / "glowplug") as glowplug:
        trial = readahead.Trial(glowplug, bench.registry, bench.workload)
        for variant, pack_bytes in (variants := trial.variants()).items():
            if pack_bytes:
                rows.append(_row("readahead", f"{variant.name}: its size", "MB", [pack_bytes / 1e6]))
        measured = list(trial.rounds(list(variants), bench.runs))
    for variant in variants:
        own = [each for each in measured if each.variant == variant.name]
        rows += [
            _row("readahead", f"{variant.name}: cold", "s", [each.cold_seconds for each in own]),
            _row("readahead", f"{variant.name}: warm", "s", [each.warm_seconds for each in own]),
            _row("readahead", f"{variant.name}: moved", "MB", [each.moved_bytes / 1e6 for each in own]),
            _row("readahead", f"{variant.name}: waits for blocks", "", [each.misses for each in own]),
        ]
    return rows


def read_weights(bench: Bench) -> Result:
    """The largest file, cold, over unshaped loopback, against a download of its blob that is decompressed."""
    with lazy.use(bench.link, bench.folder / "glowplug") as glowplug:
        trial = weights.Trial(glowplug, bench.registry, bench.workload, bench.folder / "weights-root")
        measured = list(trial.rounds(bench.runs))
    seconds: dict[str, list[float]] = {}
    for each in measured:
        seconds.setdefault(each.reader, []).append(each.seconds)
    rows = {reader: _row("weights", reader, "s", values) for reader, values in sorted(seconds.items())}
    ratios = [
        _ratio("weights", f"{reader} takes, of {way}", row, rows[way])
        for way in weights.DOWNLOADS
        for reader, row in rows.items()
        if reader not in weights.DOWNLOADS
    ]
    return [*rows.values(), *ratios]


def shapes(bench: Bench) -> Result:
    """Cold starts by blocks alone, in turns, of one image in several sizes of blocks and frames."""
    speed = bench.link.speed
    rows: Result = []
    with lazy.use(bench.link, bench.folder / f"glowplug-{speed.bits_per_second}") as glowplug:
        trial = blocks.Trial(glowplug, bench.registry, bench.workload)
        for shape in blocks.SHAPES:
            rows.append(_row("blocks", f"{shape}: its size", "MB", [trial.convert(shape) / 1e6]))
        measured = list(trial.rounds(blocks.SHAPES, bench.runs))
    for shape in blocks.SHAPES:
        own = [each for each in measured if each.shape == shape]
        name = f"{speed}, {shape}"
        rows += [
            _row("blocks", f"{name}: start to ready", "s", [each.ready_seconds for each in own]),
            _row("blocks", f"{name}: moved", "MB", [each.moved_bytes / 1e6 for each in own]),
            _row("blocks", f"{name}: requests", "", [each.requests for each in own]),
            _row("blocks", f"{name}: misses", "", [each.misses for each in own]),
            _row("blocks", f"{name}: waited for them", "s", [each.waited_seconds for each in own]),
            _row("blocks", f"{name}: until they were whole", "s", [each.filled_seconds for each in own]),
        ]
    return rows


def _row(part: str, name: str, unit: str, values: Sequence[float]) -> Row:
    return Row(part, name, unit, tuple(round(value, 4) for value in values))


def _ratio(part: str, name: str, of: Row, to: Row) -> Ratio:
    return Ratio(part, name, round(statistics.median(of.values) / statistics.median(to.values), 3))


def _shell(script: str) -> None:
    machine.check_call(["bash", "-o", "pipefail", "-c", script])


def _start(root: Path, command: Sequence[str]) -> None:
    """Run the workload's command to its end. Both mounts are `nodev`: devices come from a bind mount."""
    script = 'mount --rbind /dev "$1/dev" && exec chroot "$@"'
    environment = ["env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"]
    machine.check_call(
        ["unshare", "--mount", "sh", "-c", script, "start", str(root), *environment, *command],
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", choices=sorted(workloads.RECIPES), default="torch")
    parser.add_argument("--parts", nargs="+", choices=PARTS + EXTRA_PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--results", type=Path, default=startup.RESULTS)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench: needs root, for network namespaces and mounts")
    try:
        with machine.interruptible():
            _run(options.image, options.parts, options.runs, options.results)
    except (machine.CommandError, workloads.BuildError) as exc:
        sys.exit(f"bench: {exc}")
    except KeyboardInterrupt:
        sys.exit("bench: interrupted; everything it started is gone")


def _run(image: str, parts: Sequence[str], runs: int, results: Path) -> None:
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    workload = workloads.build(image, startup.CACHE, say)
    measured: Result = []
    for part in parts:
        say(f"bench: {part}, {runs} runs")
        # A registry of its own for each part: none finds what another has left.
        with tempfile.TemporaryDirectory(prefix="glowplug-bench-") as name:
            folder = Path(name)
            for speed in _SPEEDS.get(part, (_SPEED,)):
                with (
                    link.open_link(speed) as over,
                    registry.serve(over, folder, folder / "registry") as server,
                ):
                    rows = _PART[part](Bench(workload, over, server, folder, runs))
                print(_table(rows), flush=True)
                measured += rows
    results.mkdir(parents=True, exist_ok=True)
    target = results / "bench.json"
    target.write_text(json.dumps(_document(workload, measured), indent=1) + "\n")
    say(f"bench: {target}")


_PART: dict[str, Callable[[Bench], Result]] = {
    "warm": warm,
    "convert": convert,
    "metadata": metadata,
    "cri": cri_starts,
    "readahead": read_ahead,
    "weights": read_weights,
    "blocks": shapes,
}


def _table(rows: Result) -> str:
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        value = row.text() if isinstance(row, Row) else f"{row.value:10.3f} times"
        lines.append(f"{row.part:9} {row.name:{width}} {value}")
    return "\n".join(lines)


def _document(workload: workloads.Workload, rows: Result) -> dict[str, Any]:
    image = {k: v for k, v in dataclasses.asdict(workload).items() if k not in ("layout", "command")}
    return {
        "machine": machine.facts(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "system": platform.platform(),
        "image": image,
        "bits_per_second": _SPEED.bits_per_second,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


if __name__ == "__main__":
    main()
