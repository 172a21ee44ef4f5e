"""Credentials from the node agent: asked over a socket, kept while it is away, renewed under a reader."""

from __future__ import annotations

import base64
import json
import logging
import socketserver
import threading
from collections.abc import Iterator, Mapping, Set
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import artifact, errors
from imagefs.origin import BytesSource, agentcredentials, connect, credentials, registry, retry, transport
from imagefs.origin.credentials import Credential
from imagefs.reference import parse
from tests.fixtures import servers
from tests.fixtures.servers import FaultProxy, RegistryServer, Reply, Seen

QUICK = retry.Policy(attempts=2, first_delay_seconds=0.001, max_delay_seconds=0.002)
OLD, NEW, FILE = Credential("u", "0ld-s3cret"), Credential("u", "n3w-s3cret"), Credential("u", "f1le")
DATA = bytes(range(256))


class Agent:
    """The agent's end of the socket; `credential` is what it has now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.have: list[Credential] = []
        self.questions: list[dict[str, Any]] = []
        self.reply: tuple[int, bytes] | None = None
        self._server: socketserver.ThreadingUnixStreamServer | None = None
        agent = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = agent.answer(self.path, question)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

            def address_string(self) -> str:
                return "unix"

        self._handler = Handler

    def answer(self, path: str, question: dict[str, Any]) -> tuple[int, bytes]:
        assert path == agentcredentials.PATH
        self.questions.append(question)
        if self.reply is not None:
            return self.reply
        found = next((c for c in self.have if c.fingerprint not in question["refused"]), None)
        encoded = None if found is None else credentials.encode(found)
        return 200, json.dumps({"credential": encoded, "sources": "the test's agent"}).encode()

    def start(self) -> None:
        self._server = socketserver.ThreadingUnixStreamServer(str(self.path), self._handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            self.path.unlink()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path / "agent.sock")
    made.start()
    yield made
    made.stop()


class Files:
    """What docker's files have."""

    def __init__(self, credential: Credential | None = None) -> None:
        self.credential = credential

    def look_up(self, refused: Set[str] = frozenset()) -> Credential | None:
        if self.credential is None or self.credential.fingerprint in refused:
            return None
        return self.credential

    def describe(self) -> str:
        return "files"


def source(agent: Agent, files: Credential | None = None) -> agentcredentials.AgentSource:
    return agentcredentials.AgentSource(agent.path, "r.example", "a/b", Files(files))


class TestSource:
    def test_asks_for_this_repository(self, agent: Agent) -> None:
        agent.have = [OLD, NEW]
        asked = source(agent)
        assert asked.look_up() == OLD
        assert asked.look_up({OLD.fingerprint}) == NEW
        assert agent.questions == [
            {"host": "r.example", "repository": "a/b", "refused": []},
            {"host": "r.example", "repository": "a/b", "refused": [OLD.fingerprint]},
        ]
        assert asked.describe() == "the test's agent"

    def test_no_secret_in_a_question(self, agent: Agent) -> None:
        agent.have = [OLD]
        source(agent).look_up({OLD.fingerprint})
        assert "s3cret" not in json.dumps(agent.questions)

    def test_a_dead_agent_costs_nothing_that_was_known(self, agent: Agent) -> None:
        agent.have = [OLD]
        asked = source(agent, FILE)
        asked.look_up()
        agent.stop()
        assert asked.look_up() == OLD
        assert asked.look_up({OLD.fingerprint}) == FILE
        with pytest.raises(errors.UnavailableError, match="agent"):
            asked.look_up({OLD.fingerprint, FILE.fingerprint})
        agent.have = [NEW]
        agent.start()
        assert asked.look_up({OLD.fingerprint}) == NEW

    def test_anonymous_stays_anonymous(self, agent: Agent) -> None:
        asked = source(agent)
        assert asked.look_up() is None
        agent.stop()
        assert asked.look_up() is None

    def test_never_asked(self, agent: Agent) -> None:
        agent.stop()
        assert source(agent, FILE).look_up() == FILE
        with pytest.raises(errors.UnavailableError):
            source(agent).look_up()

    @pytest.mark.parametrize(
        "reply",
        [
            (500, b"{}"),
            (200, b"s3cret"),
            (200, b"[]"),
            (200, b'{"credential": "s3cret"}'),
            (200, b'{"credential": {"username": "s3cret"}}'),
            (200, b'{"credential": {"username":1,"password":"","identity_token":"","registry_token":""}}'),
            (200, b" " * (2 << 20)),
        ],
    )
    def test_answers_that_are_none(self, agent: Agent, reply: tuple[int, bytes]) -> None:
        agent.reply = reply
        with pytest.raises(errors.UnavailableError, match="agent") as caught:
            source(agent).look_up()
        assert "s3cret" not in str(caught.value)

    def test_in_the_agents_own_process(self, agent: Agent) -> None:
        def look_up(host: str, repository: str, refused: Set[str]) -> tuple[Credential | None, str]:
            return Credential(f"{host}/{repository}", "p"), "here"

        agentcredentials.answer_here(agent.path, look_up)
        try:
            assert source(agent).look_up() == Credential("r.example/a/b", "p")
            assert not agent.questions
        finally:
            agentcredentials.answer_here(agent.path, None)
        assert source(agent).look_up() is None

    @given(st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=5)) | st.none() | st.text())
    def test_any_credential(self, document: object) -> None:
        with pytest.raises(errors.InvalidInputError):
            credentials.decode(document, "where")

    @given(st.builds(Credential, *[st.text(max_size=10)] * 4))
    def test_there_and_back(self, credential: Credential) -> None:
        assert credentials.decode(json.loads(json.dumps(credentials.encode(credential))), "w") == credential


class Door:
    """Basic authentication in front of a registry; `password` may change at any time."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.password = OLD.password
        proxy.hook = self.answer

    def answer(self, seen: Seen) -> Reply | None:
        wanted = "Basic " + base64.b64encode(f"u:{self.password}".encode()).decode()
        if seen.fields.get("authorization") == wanted:
            return None
        return 401, {"WWW-Authenticate": 'Basic realm="r"'}, b""


class TestReader:
    @pytest.fixture
    def door(self, fault_server: FaultProxy, registry: RegistryServer) -> Door:
        fault_server.upstream = registry.host
        return Door(fault_server)

    def origin(self, host: str, agent: Agent) -> registry.RegistryOrigin:
        return registry.RegistryOrigin(
            host,
            servers.unique_name("agent"),
            transport.Settings(),
            Path("/absent"),
            QUICK,
            credentials_socket=agent.path,
        )

    def put(self, origin: registry.RegistryOrigin) -> str:
        digest = artifact.digest_of(DATA)
        origin.put_blob(digest, len(DATA), BytesSource(DATA))
        return digest

    def test_a_rotated_password_in_the_middle_of_a_layer(
        self, fault_server: FaultProxy, door: Door, agent: Agent, caplog: pytest.LogCaptureFixture
    ) -> None:
        agent.have = [OLD]
        origin = self.origin(fault_server.host, agent)
        with caplog.at_level(logging.DEBUG):
            digest = self.put(origin)
            door.password = NEW.password
            with pytest.raises(errors.DeniedError, match="the test's agent") as caught:
                origin.read_blob(digest, 1000)
            agent.have = [NEW]
            assert origin.read_blob(digest, 1000) == DATA
        for secret in (OLD.password, NEW.password):
            assert secret not in caplog.text + str(caught.value)

    def test_the_second_secret_when_the_first_does_not_fit(
        self, fault_server: FaultProxy, door: Door, agent: Agent
    ) -> None:
        agent.have = [Credential("u", "wrong"), Credential("u", "wrong too"), OLD]
        origin = self.origin(fault_server.host, agent)
        assert origin.read_blob(self.put(origin), 1000) == DATA

    def test_the_agent_is_asked_only_when_the_registry_asks(
        self, fault_server: FaultProxy, door: Door, agent: Agent
    ) -> None:
        agent.have = [OLD]
        origin = self.origin(fault_server.host, agent)
        digest = self.put(origin)
        asked = len(agent.questions)
        agent.stop()
        for _ in range(3):
            assert origin.read_blob(digest, 1000) == DATA
        assert len(agent.questions) == asked

    def test_bearer_tokens_with_the_second_secret(self, fault_server: FaultProxy, agent: Agent) -> None:
        made: dict[str, str] = {}

        def answer(seen: Seen) -> Reply | None:
            if seen.path.startswith("/token"):
                user = base64.b64decode(seen.fields["authorization"].removeprefix("Basic ")).decode()
                if user == "u:wrong":
                    return 401, {}, b""
                made[f"token{len(made)}"] = user
                return 200, {}, json.dumps({"token": f"token{len(made) - 1}"}).encode()
            user = made.get(seen.fields.get("authorization", "").removeprefix("Bearer "), "")
            if user == "u:right":
                return 200, {}, DATA
            return 401, {"WWW-Authenticate": f'Bearer realm="{fault_server.url}/token"'}, b""

        fault_server.hook = answer
        agent.have = [Credential("u", word) for word in ("wrong", "other repository", "right")]
        origin = self.origin(fault_server.host, agent)
        assert origin.read_blob(artifact.digest_of(DATA), 1000) == DATA
        assert sorted(made.values()) == ["u:other repository", "u:right"]

    def test_by_the_options_that_travel(self, fault_server: FaultProxy, door: Door, agent: Agent) -> None:
        agent.have = [OLD]
        written: Mapping[str, Any] = connect.Options(credentials_socket=agent.path).to_json()
        options = connect.Options.from_json(json.loads(json.dumps(written)))
        origin = connect.connect(parse(f"docker://{fault_server.host}/a/b"), options)
        with pytest.raises(errors.NotFoundError):
            origin.read_manifest("v1")
