"""The model of an engine, brought to where it can be opened before the engine starts.

Owned by `kinds`, on the supervisor's event loop; what takes time runs on a thread. A directory is there
already. s3:// is streamed by vLLM itself where its environment has the run:ai streamer, so that nothing is
written to disk; else it is downloaded to the node's store. oci: is mounted, and read as it is needed. What
was brought stays held for all starts of this supervisor.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from serving import errors
from serving.models import place, store
from serving.models.settings import ModelCache

_STREAMERS = ("runai_model_streamer", "runai_model_streamer_s3")


class Model:
    """`ready` before each start; `where` is a directory, or an s3:// that the engine streams. `streams` says
    whether it can."""

    def __init__(
        self,
        model: str | None,
        cache: ModelCache,
        say: Callable[[str], None],
        streams: Callable[[], Awaitable[bool]],
    ) -> None:
        self._model, self._streams = model, streams
        self._store = store.Store(Path(cache.directory), cache.quota_bytes, say)
        self._held: store.Held | None = None
        self.where = model

    @property
    def elsewhere(self) -> bool:
        """Whether it has to be brought."""
        return self._held is None and self._model is not None and self._model.startswith(("s3://", "oci:"))

    async def ready(self) -> None:
        """Have it. Errors as `store.Store.acquire`. Cancelled, it stops what it began."""
        if self._model is None or self._held is not None:
            return
        try:
            wanted = place.parse(self._model)
        except ValueError as exc:
            raise errors.DocumentError(f"model: {exc}") from exc
        if isinstance(wanted, place.Directory):
            return
        if isinstance(wanted, place.Bucket) and await self._streams():
            return
        stop = threading.Event()
        bringing = asyncio.create_task(asyncio.to_thread(self._store.acquire, wanted, stop))
        try:
            self._held = await asyncio.shield(bringing)
        except asyncio.CancelledError:
            stop.set()
            brought = await asyncio.gather(bringing, return_exceptions=True)
            if isinstance(brought[0], store.Held):
                brought[0].close()
            raise
        self.where = str(self._held.path)

    async def close(self) -> None:
        """It may go."""
        if self._held is not None:
            await asyncio.to_thread(self._held.close)


async def can_stream(python: str) -> bool:
    """Whether an interpreter has the run:ai streamer for S3."""
    code = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {_STREAMERS!r})))"
    try:
        process = await asyncio.create_subprocess_exec(
            *(python, "-c", code), stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return False  # the start itself says it better
    return await process.wait() == 0
