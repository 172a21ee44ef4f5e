"""A fetcher with peers: each block once from its home, and from the origin whatever a home does instead."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from imagefs import cache, errors, fetcher, peerhealth, peers, peersettings, plan, readahead, rendezvous
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


def test_each_block_comes_from_its_home(tmp_path: pathlib.Path, peer: Peer) -> None:
    with bench(tmp_path, peer) as made:
        made.read()
        there = made.at_peer()
        assert 0 < len(there) < BLOCKS
        assert sorted(peer.asked) == there
        assert made.from_origin() == sorted(set(range(BLOCKS)) - set(there))
        stats = made.fetcher.stats()
        lengths = [made.layer.block_map.block_length(index) for index in there]
        assert (stats.peer_blocks, stats.peer_bytes) == (len(there), sum(lengths))
        assert stats.fetched_blocks == BLOCKS - len(there)
        assert {event.outcome for event in made.fetcher.events()} == {"peer", "origin"}
        assert peer.connections <= POLICY.threads_per_peer, "connections are not kept"


def test_thousands_who_want_a_block_ask_its_home_once(tmp_path: pathlib.Path, peer: Peer) -> None:
    gate = threading.Event()
    with bench(tmp_path, peer) as made:
        peer.behave = lambda handler, block: not gate.wait(30)
        index = made.at_peer()[0]
        for number in range(1000):
            done = made.answers.expect(number)
            made.fetcher.request(made.layer.map_digest, index, Priority.DEMAND, done)
        gate.set()
        assert all(isinstance(result, int) for result in made.answers.wait(list(range(1000))))
        assert peer.asked == [index]
        assert not made.origin.calls


@pytest.mark.parametrize("priority", [Priority.READ_AHEAD, Priority.FILL])
def test_what_nobody_waits_for_uses_peers_too(tmp_path: pathlib.Path, peer: Peer, priority: Priority) -> None:
    with bench(tmp_path, peer) as made:
        made.read(priority=priority)
        assert sorted(peer.asked) == made.at_peer()


def test_what_a_peer_asks_for_never_goes_to_a_peer(tmp_path: pathlib.Path, peer: Peer) -> None:
    with bench(tmp_path, peer) as made:
        index = made.at_peer()[0]
        done = made.answers.expect("peer's")
        made.fetcher.request(made.layer.map_digest, index, Priority.DEMAND, done, from_peer=True)
        assert isinstance(made.answers.wait(["peer's"])[0], int)
        assert not peer.asked
        assert made.from_origin() == [index]


def test_what_a_peer_asks_for_gets_the_first_error(tmp_path: pathlib.Path, peer: Peer) -> None:
    def refuse(call: scripted.Call) -> None:
        raise errors.UnavailableError("the origin is away")

    with bench(tmp_path, peer) as made:
        made.origin.before = refuse
        done = made.answers.expect("peer's")
        made.fetcher.request(made.layer.map_digest, 0, Priority.DEMAND, done, from_peer=True)
        assert isinstance(made.answers.wait(["peer's"])[0], errors.UnavailableError)


# -- peers that do not do what they should ------------------------------------------------------------


def flipped(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    reply(handler, bytes(byte ^ 1 for byte in block))
    return True


def one_bit(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    reply(handler, block[:-1] + bytes([block[-1] ^ 1]))
    return True


def too_short(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    reply(handler, block[:-1])
    return True


def too_long(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    reply(handler, block + b"x")
    return True


def without_length(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    handler.close_connection = True
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(block)
    return True


def chunked_without_end(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(10_000):
            handler.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
    return True


def endless_headers(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(10_000):
            handler.wfile.write(b"X-%d: x\r\n" % number)
    return True


def no_http(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    handler.close_connection = True
    handler.wfile.write(b"\x16\x03\x01 what is this")
    return True


def breaks_off(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    handler.close_connection = True
    reply(handler, block[: len(block) // 2], length=len(block))
    return True


def moved(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:1/")
    handler.send_header("Content-Length", "0")
    handler.end_headers()
    return True


def hangs(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    server_closing(handler)
    return True


def hangs_in_the_body(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    reply(handler, block[: len(block) // 2], length=len(block))
    server_closing(handler)
    return True


def trickles(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
    reply(handler, b"", length=len(block))
    with contextlib.suppress(OSError):
        for start in range(len(block)):
            handler.wfile.write(block[start : start + 1])
            time.sleep(0.01)
    return True


def server_closing(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.settimeout(30)
        handler.connection.recv(1)  # until who asked has had enough


LIES = [flipped, one_bit, too_short, too_long, without_length, chunked_without_end]
FAULTS = [endless_headers, no_http, breaks_off, moved]
HANGS = [hangs, hangs_in_the_body, trickles]


@pytest.mark.parametrize("fault", [*LIES, *FAULTS], ids=lambda fault: fault.__name__)
def test_a_bad_peer_costs_a_retry_and_never_a_byte(
    tmp_path: pathlib.Path,
    peer: Peer,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[http.server.BaseHTTPRequestHandler, bytes], bool],
) -> None:
    peer.behave = fault
    with bench(tmp_path, peer) as made, caplog.at_level(logging.WARNING):
        made.read()
        assert made.from_origin() == list(range(BLOCKS)), "each block once from the origin"
        down = made.peers.status()["down"]
        why = peerhealth.Why.LIED if fault in LIES else peerhealth.Why.FAILED
        assert down == {peer.address: why.value}
        told = [record for record in caplog.records if peer.address in record.getMessage()]
        assert len(told) == 1
        asked = len(peer.asked)
        assert asked <= POLICY.threads_per_peer, "it was asked after it was known to be bad"


@pytest.mark.parametrize("fault", HANGS, ids=lambda fault: fault.__name__)
def test_a_peer_that_hangs_is_given_up(
    tmp_path: pathlib.Path,
    peer: Peer,
    fault: Callable[[http.server.BaseHTTPRequestHandler, bytes], bool],
) -> None:
    peer.behave = fault
    with bench(tmp_path, peer, dataclasses.replace(POLICY, longest_wait_seconds=0.3)) as made:
        made.read()
        assert made.from_origin() == list(range(BLOCKS))
        assert made.peers.status()["down"] == {peer.address: peerhealth.Why.FAILED.value}


def test_a_dead_peer_is_asked_no_more_and_comes_back_by_a_probe(tmp_path: pathlib.Path, peer: Peer) -> None:
    with bench(tmp_path, peer) as made:
        peer.behave = no_http
        peer.lives = False
        made.configure(down_seconds=0.02)
        there = made.at_peer()
        made.read(there[:1])
        scripted.eventually(lambda: peer.probes > 1)
        assert made.peers.status()["down"]
        made.read(there[1:2])
        assert peer.asked == there[:1], "a reader was used as the probe"
        peer.behave = lambda handler, block: False
        peer.lives = True
        scripted.eventually(lambda: not made.peers.status()["down"])
        made.read(there[2:3])
        assert peer.asked == [there[0], there[2]]


def test_nobody_listens(tmp_path: pathlib.Path, peer: Peer) -> None:
    peer.close()
    with bench(tmp_path, peer) as made:
        made.read()
        assert made.from_origin() == list(range(BLOCKS))


def test_a_layer_that_is_refused_is_not_asked_for_again(tmp_path: pathlib.Path, peer: Peer) -> None:
    def refuse(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
        reply(handler, b"no", 403)
        return True

    peer.behave = refuse
    with bench(tmp_path, peer) as made:
        first, *others = made.at_peer()
        made.read([first])
        made.read(others)
        assert peer.asked == [first]
        assert not made.peers.status()["down"]


def test_a_busy_peer_is_asked_again(tmp_path: pathlib.Path, peer: Peer) -> None:
    def busy(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
        reply(handler, b"busy", 503)
        return True

    peer.behave = busy
    with bench(tmp_path, peer) as made:
        first, second, *_ = made.at_peer()
        made.read([first])
        peer.behave = lambda handler, block: False
        made.read([second])
        assert peer.asked == [first, second]
        assert made.from_origin() == [first]


def test_a_kept_connection_that_the_peer_closed_is_no_failure(tmp_path: pathlib.Path, peer: Peer) -> None:
    def last_one(handler: http.server.BaseHTTPRequestHandler, block: bytes) -> bool:
        handler.close_connection = True  # and does not say so
        reply(handler, block)
        return True

    peer.behave = last_one
    with bench(tmp_path, peer) as made:
        for index in made.at_peer():
            made.read([index])
        assert not made.peers.status()["down"]
        assert made.fetcher.stats().peer_failures == 0


# -- hedging ------------------------------------------------------------------------------------------


def test_a_slow_home_is_raced_by_the_origin_and_then_left_alone(
    tmp_path: pathlib.Path, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    peer.behave = hangs
    with bench(tmp_path, peer) as made, caplog.at_level(logging.WARNING):
        made.configure(hedge_seconds=0.02)
        first, second, *others = made.at_peer()
        made.read([first])
        made.read([second])
        assert made.fetcher.stats().peer_hedges == 2
        assert made.peers.status()["down"] == {peer.address: peerhealth.Why.SLOW.value}
        made.read(others)
        assert sorted(peer.asked) == [first, second]
        assert made.fetcher.stats().peer_hedges == 2


def test_a_home_that_wins_the_race_is_not_slow(tmp_path: pathlib.Path, peer: Peer) -> None:
    hedged, answer = threading.Event(), threading.Event()

    def slow_origin(call: scripted.Call) -> None:
        hedged.set()
        assert answer.wait(30)

    peer.behave = lambda handler, block: not hedged.wait(30)
    with bench(tmp_path, peer) as made:
        made.origin.before = slow_origin
        made.configure(hedge_seconds=0.02)
        made.read(made.at_peer()[:1])
        answer.set()
        assert not made.peers.status()["down"]
        assert made.fetcher.stats().peer_blocks == 1


def test_without_a_right_to_hedge_the_longest_wait_holds(tmp_path: pathlib.Path, peer: Peer) -> None:
    peer.behave = hangs
    policy = dataclasses.replace(
        POLICY,
        longest_wait_seconds=0.2,
        health=dataclasses.replace(POLICY.health, hedge_burst=0, hedge_share=0.0),
    )
    with bench(tmp_path, peer, policy) as made:
        made.configure(hedge_seconds=0.02)
        made.read(made.at_peer()[:1])


def test_a_demand_overtakes_what_waits_at_a_lower_priority(tmp_path: pathlib.Path, peer: Peer) -> None:
    gate = threading.Event()
    peer.behave = lambda handler, block: not gate.wait(30)
    policy = dataclasses.replace(POLICY, threads=3, threads_per_peer=3, demand_threads=1)
    with bench(tmp_path, peer, policy) as made:
        there = made.at_peer()
        for index in there:
            done = made.answers.expect(index)
            made.fetcher.request(made.layer.map_digest, index, Priority.FILL, done)
        scripted.eventually(lambda: len(peer.asked) == 2)
        made.fetcher.request(made.layer.map_digest, there[-1], Priority.DEMAND, made.answers.expect("demand"))
        scripted.eventually(lambda: len(peer.asked) == 3)
        assert peer.asked[-1] == there[-1]
        gate.set()
        made.answers.wait([*there, "demand"])


# -- life ---------------------------------------------------------------------------------------------


def test_a_layer_that_goes_takes_its_readers_along(tmp_path: pathlib.Path, peer: Peer) -> None:
    peer.behave = hangs
    with bench(tmp_path, peer) as made:
        index = made.at_peer()[0]
        made.fetcher.request(made.layer.map_digest, index, Priority.DEMAND, made.answers.expect("reader"))
        scripted.eventually(lambda: peer.asked == [index])
        made.fetcher.detach(made.layer.map_digest)
        assert isinstance(made.answers.wait(["reader"])[0], errors.NotFoundError)


def test_closing_answers_who_waits(tmp_path: pathlib.Path, peer: Peer) -> None:
    peer.behave = hangs
    with bench(tmp_path, peer) as made:
        made.fetcher.request(
            made.layer.map_digest, made.at_peer()[0], Priority.DEMAND, made.answers.expect("reader")
        )
        scripted.eventually(lambda: len(peer.asked) == 1)
        made.fetcher.close()
        assert isinstance(made.answers.wait(["reader"])[0], errors.ImagefsError)


def test_members_that_leave_are_not_waited_for(tmp_path: pathlib.Path, peer: Peer) -> None:
    peer.behave = hangs
    with bench(tmp_path, peer) as made:
        index = made.at_peer()[0]
        made.fetcher.request(made.layer.map_digest, index, Priority.DEMAND, made.answers.expect(index))
        scripted.eventually(lambda: peer.asked == [index])
        made.configure(members=(OURS,))
        assert isinstance(made.answers.wait([index])[0], int)
        assert made.from_origin() == [index]


def test_a_folder_is_never_asked_of_peers(tmp_path: pathlib.Path, peer: Peer) -> None:
    with bench(tmp_path, peer) as made:
        origin = scripted.ScriptedOrigin("oci:/a/folder/of/ours")
        data = scripted.image(8, seed=12)
        layer = scripted.layer(data, origin)
        made.fetcher.attach(layer)
        assert made.fetcher.read(layer.map_digest, 0, len(data)) == data
        assert not peer.asked


def test_the_token_goes_to_peers_and_an_unreadable_one_turns_them_off(
    tmp_path: pathlib.Path, peer: Peer
) -> None:
    token = tmp_path / "token"
    token.write_text("first-secret\nsecond-secret\n")
    with bench(tmp_path, peer) as made:
        made.configure(token_file=token)
        there = made.at_peer()
        made.read(there[:1])
        assert peer.tokens == ["Bearer first-secret"]
        token.write_text("new-secret\n")
        made.configure(stamp="2")
        made.read(there[1:2])
        assert peer.tokens[-1] == "Bearer new-secret"
        token.unlink()
        with pytest.raises(errors.ConfigurationError) as raised:
            made.configure(stamp="3")
        assert "secret" not in str(raised.value)
        made.read(there[2:])
        assert len(peer.asked) == 2


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"address": "a:1"},
        {"address": "a:1", "members": ["a"]},
        {"address": "a:1", "members": ["a:0"]},
        {"address": "a:1", "members": ["[::1:1"]},
        {"address": "a:1", "members": [1]},
        {"address": "a:1", "members": [], "token_file": 1},
        {"address": "a:1", "members": [], "hedge_seconds": True},
        {"address": "a:1", "members": [], "unknown": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidInputError):
        peersettings.PeerSettings.from_json(document)


def test_settings_travel_as_json() -> None:
    value = peersettings.PeerSettings(
        "[::1]:2", ("[::1]:2", "node:3"), token_file=pathlib.Path("/a"), stamp="x", down_seconds=1.5
    )
    assert peersettings.PeerSettings.from_json(value.to_json()) == value
    assert peersettings.split_address("[::1]:2") == ("::1", 2)
