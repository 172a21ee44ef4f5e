"""Peers that lie, break off, hang or are gone: a retry, and never a byte."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import logging
import pathlib
import time
from collections.abc import Callable

import pytest

from imagefs import peerhealth
from tests.imagefs import scripted
from tests.imagefs.peer_bench import BLOCKS, POLICY, Peer, bench, hangs, reply, server_closing
from tests.imagefs.peer_bench import peer as peer

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
