"""The process behind a file-level mount: `python -m imagefs.fuse.files_daemon`, one per mounted directory.

`start` gives it a Job as JSON on its stdin and waits for its answer on its stdout: one JSON line, either
{"pid": ...} once the kernel has the mount, or {"error": ..., "kind": ...}. It ends when the directory is
unmounted. Cache and fetcher live inside it; the cache directory may be shared with others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from imagefs import errors, reference
from imagefs import image as image_module
from imagefs.fuse import files
from imagefs.origin import connect


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What to mount where. `reference` is the block image's own REF, by digest: its choice was made.
    `origins` is the JSON form of connect.Options."""

    reference: str
    directory: str
    origins: dict[str, Any]
    cache_dir: str
    cache_quota_bytes: int
    free_floor_bytes: int
    read_deadline_seconds: float
    suid: bool
    dev: bool


def start(job: Job, log: Path) -> int:
    """Mount in the background; returns the pid of the process that serves it. Its messages go to `log`."""
    with open(log, "ab") as messages:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "imagefs.fuse.files_daemon"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            cwd="/",
            start_new_session=True,
        )
    assert daemon.stdin is not None
    assert daemon.stdout is not None
    try:
        with daemon.stdout as source:
            # One that ended already has said why in its log.
            with contextlib.suppress(BrokenPipeError), daemon.stdin as sink:
                sink.write(json.dumps(dataclasses.asdict(job)).encode())
            line = source.readline()
    except BaseException:
        daemon.kill()
        daemon.wait()
        raise
    answer = json.loads(line) if line else {"error": "the process of the mount ended"}
    if "error" in answer:
        daemon.wait()
        kind = getattr(errors, str(answer.get("kind")), errors.ConfigurationError)
        said = log.read_text(errors="replace").strip().splitlines()
        raise kind("; ".join([answer["error"], *said[-1:]]))
    return int(answer["pid"])


def serve(job: Job, answers: TextIO) -> None:
    """Mount and serve until unmounted; answers once on `answers`."""
    from imagefs import cache, fetcher

    options = connect.Options.from_json(job.origins)
    image = image_module.open_image(reference.parse(job.reference), options=options)
    blocks = cache.BlockCache(job.cache_dir, job.cache_quota_bytes, job.free_floor_bytes)
    source = fetcher.Fetcher(blocks, fetcher.FetchSettings(read_deadline_seconds=job.read_deadline_seconds))
    try:
        for layer in image.layers:
            source.attach(layer)
        for layer in image.layers:
            for index in layer.block_map.metadata_blocks():
                source.request(layer.map_digest, index, fetcher.Priority.BOOT, _close)
        view = files.ImageFiles(image.layers, source.read, lambda: _answer(answers, {"pid": os.getpid()}))
        files.serve(view, Path(job.directory), suid=job.suid, dev=job.dev)
    finally:
        source.close()
        blocks.close()


def pinned(image: image_module.LazyImage) -> str:
    """The REF of the block image that `image` turned out to be, by digest."""
    return f"{image.origin.name}@{image.manifest.digest}"


def _close(result: int | Exception) -> None:
    """A block that arrived before its reader is in the cache now; a failed one is fetched on demand."""
    if isinstance(result, int):
        os.close(result)


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
    # The command that waits reads to the end of the line; nothing may keep its terminal's pipe open.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, answers.fileno())
    os.close(null)


def main() -> None:
    """Entry point of the process."""
    job = Job(**json.load(sys.stdin))
    try:
        serve(job, sys.stdout)
    except errors.ImagefsError as exc:
        _answer(sys.stdout, {"error": str(exc), "kind": type(exc).__name__})
        sys.exit(1)


if __name__ == "__main__":
    main()
