"""What agents are asked, against real ones; and answers that no agent would give."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.agent_process import Agent, push
from tests.fixtures import images, servers
from tests.imagefs.fuse import stack
from warmpool import errors, warmth
from warmpool.nodeagents import NodeAgents
from warmpool.settings import Agents
from warmpool.warmth import Task, Verb, Wanted

_TARS = [images.tar_of([("data", b"d" * 300_000)])]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret\n")
    return path


@pytest.mark.root
def test_a_node_is_made_warm_and_let_go(
    tmp_path: Path, token: Path, registry: servers.RegistryServer
) -> None:
    source = push(registry, _TARS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    extra = f'[peers]\nlisten = "127.0.0.1:{port}"\ntoken_file = "{token}"\norigins = ["docker://{registry.host}/"]\n'
    agent = Agent(tmp_path, extra=extra)
    mine = tmp_path / "mine"
    mine.write_text("secret\n")
    asking = NodeAgents(Agents(port=port, token_file=str(mine)))
    nodes = {"node": "127.0.0.1", "nowhere": None}
    chosen = [Wanted(source.name, 1.0, True)]
    try:
        agent.start()

        def verdict() -> warmth.Verdict:
            readings = asking.read(nodes, {"node": [source.name]})
            assert readings["nowhere"].error
            assert not readings["node"].error, readings["node"].error
            return warmth.judge(chosen, readings["node"])

        first = verdict()
        assert not first.warm
        assert [task.verb for task in first.tasks] == [Verb.PREFETCH, Verb.PIN]
        assert asking.do(nodes, {"node": first.tasks}) == {}
        stack.eventually(lambda: verdict().warm, "the node is warm")
        assert verdict().tasks == ()
        assert asking.do(nodes, {"node": [Task(Verb.UNPIN, source.name)]}) == {}
        assert not verdict().warm
        assert asking.do(nodes, {"node": [Task(Verb.UNPIN, "never/heard:v1")]}) == {}
        wrong = asking.do(nodes, {"node": [Task(Verb.PREFETCH, f"{registry.host}/daemon/none:v1")]})
        assert "none" in wrong["node"]
        mine.write_text("another\n")
        assert "token_file" in asking.read(nodes, {"node": []})["node"].error
    finally:
        agent.clean_up()
        asking.close()
    assert "127.0.0.1" in asking_again(port, token).error


def asking_again(port: int, token: Path) -> warmth.Reading:
    asking = NodeAgents(Agents(port=port, token_file=str(token)))
    try:
        return asking.read({"node": "127.0.0.1"}, {"node": ["x"]})["node"]
    finally:
        asking.close()


class _Answers(http.server.BaseHTTPRequestHandler):
    said: tuple[int, bytes] = (200, b"")

    def do_GET(self) -> None:
        status, body = type(self).said
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def stranger() -> Iterator[int]:
    """Somebody who answers what a test says."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>"),
        (200, b"[]"),
        (200, b"[" * 100_000),
        (200, b'{"present_bytes": 2, "total_bytes": 1}'),
        (200, b" " * (2 << 20)),
        (500, b'{"message": "broken\\n\\u0007"}'),
        (401, b""),
    ],
)
def test_what_makes_no_sense_is_an_error_and_no_warmth(
    stranger: int, token: Path, status: int, body: bytes
) -> None:
    _Answers.said = (status, body)
    reading = asking_again(stranger, token)
    assert reading.error
    assert reading.error.isprintable()
    assert reading.images == {}


@pytest.mark.parametrize("text", ["", "two words\n", "\x00\n", "\xff\n"])
def test_a_file_without_a_token_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(errors.ConfigurationError, match="token_file"):
        NodeAgents(Agents(token_file=str(path)))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
_FIELDS = ("present_bytes", "total_bytes", "complete", "pinned", "prefetched", "error")


@given(_JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(_FIELDS, _JSON)))
def test_any_answer_is_a_value_or_our_error(document: object) -> None:
    try:
        cached = warmth.parse(document, "node")
    except errors.InvalidInputError:
        return
    assert 0 <= cached.present_bytes <= cached.total_bytes
    json.dumps(cached.error)
