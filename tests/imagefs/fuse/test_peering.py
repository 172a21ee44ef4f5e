"""What nodes ask each other for, and the socket between device server and agent."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors, plan
from imagefs.fuse import control, peering
from tests.imagefs.fuse import stack

DIGEST = st.binary(min_size=32, max_size=32).map(lambda data: "sha256:" + data.hex())
SIZE = st.integers(1, 2**63)
SPEC = st.builds(control.LayerSpec, st.text(max_size=60), DIGEST, SIZE, DIGEST, SIZE)


@given(spec=SPEC, index=st.integers(0, 2**40), priority=st.sampled_from(plan.Priority))
def test_a_target_says_it_all(spec: control.LayerSpec, index: int, priority: plan.Priority) -> None:
    target = peering.encode_target(spec, index, priority)
    assert target.isascii()
    assert not set(target) & set(" \r\n#")
    if spec.origin_ref:
        assert peering.decode_target(target) == (spec, index, priority)


@given(st.text(max_size=200) | st.text(max_size=100).map(lambda text: "/peer/v1/blocks/" + text))
def test_any_other_path_is_refused(target: str) -> None:
    with pytest.raises(errors.InvalidInputError):
        peering.decode_target(target)


@pytest.mark.root
def test_blocks_come_as_descriptors(tmp_path: Path, blobs: stack.BlobServer) -> None:
    image = stack.random_image(200_704, 5, zero_blocks=(1,), block_bytes=65536)
    layer = stack.make_layer(image)
    spec = blobs.add(layer)
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        client.attach("test", [spec], stack.OPTIONS)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(30)
            stack.eventually(
                lambda: not connection.connect_ex(os.fspath(values.state_dir / "peer.sock")), "up"
            )
            for tag, index in enumerate([3, 0, 1, 2, 0]):
                question = peering.encode_question(tag, spec.map_digest, index, plan.Priority.DEMAND)
                connection.send(question)
            found = {}
            for _ in range(5):
                answer = peering.receive_answer(connection)
                assert answer is not None
                tag, fd, length = answer
                assert isinstance(fd, int)
                found[tag] = os.pread(fd, length, 0)
                os.close(fd)
            blocks = [image[start : start + 65536] for start in range(0, len(image), 65536)]
            assert [found[tag] for tag in range(5)] == [blocks[index] for index in (3, 0, 1, 2, 0)]
            for index in (4, -1):
                connection.send(peering.encode_question(9, spec.map_digest, index, plan.Priority.DEMAND))
                answer = peering.receive_answer(connection)
                assert answer is not None
                assert isinstance(answer[1], errors.NotFoundError)
        fetch = client.status()["fetch"]
        assert (fetch["served_blocks"], fetch["served_bytes"]) == (5, len(image) + 65536)


@pytest.mark.root
def test_nonsense_costs_the_connection_and_nothing_else(tmp_path: Path) -> None:
    values = stack.settings(tmp_path)
    with stack.running(values) as client:
        path = os.fspath(values.state_dir / "peer.sock")
        stack.eventually(lambda: Path(path).exists(), "up")
        for nonsense in (b"{", b"[]", b"{}", b'{"tag": 1, "index": null}'):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.settimeout(30)
                connection.connect(path)
                connection.send(nonsense)
                assert peering.receive_answer(connection) is None
        assert client.status()["fetch"]["served_blocks"] == 0
