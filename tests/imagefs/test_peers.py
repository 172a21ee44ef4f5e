"""A fetcher with peers: each block once from its home, and from the origin whatever a home does instead."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import threading

import pytest

from imagefs import errors, peerhealth
from imagefs.fetcher import Priority
from tests.imagefs import scripted
from tests.imagefs.peer_bench import BLOCKS, OURS, POLICY, Peer, bench, hangs
from tests.imagefs.peer_bench import peer as peer


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
