"""A large file, read cold through the lazy mount as fast as it goes: the part `weights` of bench.py.

Against `curl` of the layer blob that holds the file, and `zstd -d`, in three ways: piped into one another and
the result thrown away, which no lazy reader can do without; the same with the result in a file, which is what
a read through the mount leaves on the node, verified as well; and one command after the other. All from the
same registry on unshaped loopback, whose files stay in the page cache, in turns; block cache, mount and files
are new for each read. By one process, then by several, each a part of its own in order.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from e2e import workloads
from glowplug.startup import lazy, machine, registry

PROCESSES = (1, 2, 4)
DOWNLOADS = {
    "curl | zstd -d": "curl -sf {url} | zstd -dc >/dev/null",
    "curl | zstd -d, to a file": "curl -sf {url} | zstd -dqo {folder}/layer",
    "curl, then zstd -d": "curl -sfo {folder}/blob {url} && zstd -dqo {folder}/layer {folder}/blob",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One read of the whole file, or of the blob that it is in."""

    reader: str
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One image whose largest file is read again and again, mounted at `root`."""

    glowplug: lazy.Glowplug
    registry: registry.Registry
    workload: workloads.Workload
    root: Path

    def rounds(self, runs: int) -> Iterator[Measured]:
        """Each way once a round."""
        repository = f"weights/{self.workload.name}"
        image = self.registry.push(self.workload.source, f"{repository}:{workloads.TAG}")
        self.glowplug.convert(image)
        found = self.glowplug.inspect(image)
        assert found is not None
        blob = max(found["layers"], key=lambda each: each["compressed_bytes"])["blob_digest"]
        url = f"http://{self.registry.host}/v2/{repository}/blobs/{blob}"
        for number in range(runs):
            turns: list[str | int] = [*DOWNLOADS, *PROCESSES]
            at = number % len(turns)
            for way in [*turns[at:], *turns[:at]]:
                yield self._downloaded(way, url) if isinstance(way, str) else self._mounted(image, way)

    def _downloaded(self, way: str, url: str) -> Measured:
        with tempfile.TemporaryDirectory(dir=self.glowplug.folder) as folder:
            script = DOWNLOADS[way].format(url=shlex.quote(url), folder=shlex.quote(folder))
            return Measured(way, self._timed(script))

    def _mounted(self, image: str, processes: int) -> Measured:
        self.glowplug.forget()
        with self.glowplug.mounted(image, self.root, near=True):
            file = self.root / largest(self.root)
            size = file.stat().st_size
            places = [size * number // processes for number in range(processes + 1)]
            script = "".join(
                f"dd if={shlex.quote(str(file))} of=/dev/null bs=1M status=none iflag=skip_bytes,count_bytes "
                f"skip={begin} count={end - begin} & readers+=($!)\n"
                for begin, end in itertools.pairwise(places)
            )
            script += 'for reader in "${readers[@]}"; do wait "$reader" || exit; done'
            return Measured(f"{processes} readers" if processes > 1 else "1 reader", self._timed(script))

    def _timed(self, script: str) -> float:
        os.sync()  # what an earlier read wrote is not this one's work
        command = self.registry.link.server.command(["bash", "-o", "pipefail", "-c", script])
        began = time.monotonic()
        machine.check_call(command)
        return time.monotonic() - began


def largest(root: Path) -> Path:
    """The largest file below `root`, relative to it."""
    files = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    return max(
        (path for path in files if path.is_file() and not path.is_symlink()),
        key=lambda path: path.stat().st_size,
    ).relative_to(root)
