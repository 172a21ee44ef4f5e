"""A fetcher whose origin and peer are watched: who was asked for what."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import os
import pathlib
import threading
from collections.abc import Callable, Iterator

import pytest

from imagefs import cache, fetcher, peerhealth, peers, peersettings, plan, readahead, rendezvous
from imagefs.fetcher import Priority
from tests.imagefs import scripted

BLOCKS = 24
DATA = scripted.image(BLOCKS, seed=11)
OURS = "192.0.2.1:7311"
"""Nothing listens there, and nobody asks: it is this node."""
POLICY = peers.Policy(
    longest_wait_seconds=5.0,
    health=peerhealth.Policy(down_seconds=60.0, slow_losses=2, hedge_burst=100),
)


class Peer:
    """A node that serves blocks of DATA, or does what a test tells it to: `behave` gets the handler and the
    block, and may answer in place of it. Probes are answered while it `lives`."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.tokens: list[str | None] = []
        self.connections = 0
        self.probes = 0
        self.lives = True
        self.closing = threading.Event()
        self.behave: Callable[[http.server.BaseHTTPRequestHandler, bytes], bool] = lambda handler, block: (
            False
        )
        peer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                peer.connections += 1

            def do_GET(self) -> None:
                peer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.tokens.append(handler.headers.get("Authorization"))
        if handler.path == "/peer/v1/health":
            self.probes += 1
            reply(handler, b"", 204 if self.lives else 503)
            return
        index = int(handler.path.rpartition("/")[2])
        self.asked.append(index)
        block = DATA[index * scripted.BLOCK_BYTES :][: scripted.BLOCK_BYTES]
        if not self.behave(handler, block):
            reply(handler, block)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


def reply(
    handler: http.server.BaseHTTPRequestHandler, body: bytes, status: int = 200, length: int = -1
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length < 0 else length))
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(body)


class Bench:
    """A fetcher whose one layer has homes here and at `peer`."""

    def __init__(self, path: pathlib.Path, peer: Peer, policy: peers.Policy) -> None:
        self.origin = scripted.ScriptedOrigin("docker://registry.test/layers")
        self.layer = scripted.layer(DATA, self.origin)
        self.cache = cache.BlockCache(path / "cache", 1 << 30, 0)
        self.peers = peers.Peers(self.cache, lambda name, index, priority: f"/blocks/{name}/{index}", policy)
        self.fetcher = fetcher.Fetcher(
            self.cache,
            fetcher.FetchSettings(
                policy=plan.Policy(
                    retry_seconds=0.005, read_ahead=readahead.ReadAheadPolicy(initial_blocks=0, max_blocks=0)
                )
            ),
            self.peers,
        )
        self.fetcher.attach(self.layer)
        self.settings = peersettings.PeerSettings(
            OURS, (OURS, peer.address), connect_timeout_seconds=0.5, down_seconds=60.0, hedge_seconds=60.0
        )
        self.configure()
        self.answers = scripted.Answers()

    def configure(self, **changes: object) -> None:
        self.settings = dataclasses.replace(self.settings, **changes)  # type: ignore[arg-type]
        self.peers.configure(self.settings)

    def at_peer(self) -> list[int]:
        """The blocks whose home is not here."""
        blocks = self.layer.block_map.blocks
        return [
            index
            for index, block in enumerate(blocks)
            if rendezvous.home(block.digest, self.settings.members) != OURS
        ]

    def read(self, indices: list[int] | None = None, priority: Priority = Priority.DEMAND) -> None:
        """Ask for blocks, all at once, and compare every byte."""
        wanted = list(range(BLOCKS)) if indices is None else indices
        for index in wanted:
            self.fetcher.request(self.layer.map_digest, index, priority, self.answers.expect(index))
        for index, result in zip(wanted, self.answers.wait(wanted), strict=True):
            assert isinstance(result, int), result
            expected = DATA[index * scripted.BLOCK_BYTES :][: scripted.BLOCK_BYTES]
            assert os.pread(result, scripted.BLOCK_BYTES + 1, 0) == expected

    def from_origin(self) -> list[int]:
        offsets = {block.offset: index for index, block in enumerate(self.layer.block_map.blocks)}
        return sorted(offsets[call.offset] for call in self.origin.calls)

    def close(self) -> None:
        self.fetcher.close()
        self.cache.close()
        for result in self.answers.results.values():
            if isinstance(result, int):
                os.close(result)
        assert not self.answers.repeated


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


@contextlib.contextmanager
def bench(path: pathlib.Path, peer: Peer, policy: peers.Policy = POLICY) -> Iterator[Bench]:
    made = Bench(path, peer, policy)
    try:
        yield made
    finally:
        peer.closing.set()
        made.close()


def hangs(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    server_closing(handler)
    return True


def server_closing(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.settimeout(30)
        handler.connection.recv(1)  # until who asked has had enough
