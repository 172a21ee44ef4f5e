"""What others in the cluster may ask an agent to prepare: over the port for peers, as a member only."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.agent.agent_process import Agent, push
from tests.fixtures import images, servers
from tests.imagefs.fuse import stack

pytestmark = pytest.mark.root

_TARS = [images.tar_of([("data", b"d" * 300_000)])]


class _Node:
    """An agent with a port for peers, and somebody who asks it."""

    def __init__(self, folder: Path, peers: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.agent = Agent(folder, extra=f'[peers]\nlisten = "{self.address}"\n{peers}')

    def __enter__(self) -> _Node:
        self.agent.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.agent.clean_up()

    def ask(
        self, method: str, path: str, body: bytes = b"", token: str | None = "secret"
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(self.address, timeout=30)
        fields = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, f"/api/v1/{path}", body, fields)
        response = connection.getresponse()
        said = response.read()
        connection.close()
        return response.status, json.loads(said) if said.startswith(b"{") else {}


def _image(name: str) -> bytes:
    return json.dumps({"image": name}).encode()


def test_a_member_has_an_image_prepared(tmp_path: Path, registry: servers.RegistryServer) -> None:
    source = push(registry, _TARS)
    token = tmp_path / "token"
    token.write_text("secret\n")
    peers = f'token_file = "{token}"\norigins = ["docker://{registry.host}/daemon/"]\n'
    with _Node(tmp_path, peers) as node:
        for method, path in (("POST", "prefetch"), ("POST", "pin"), ("POST", "unpin"), ("GET", "warm")):
            for wrong in (None, "another"):
                assert node.ask(method, path, _image(source.name), token=wrong)[0] == 401
        assert node.ask("GET", "warm") == (200, {"images": []})
        status, said = node.ask("POST", "prefetch", _image(source.name))
        assert (status, said["source_digest"], said["prefetched"]) == (200, source.digest, True)
        warm = f"warm?image={source.name}"
        stack.eventually(lambda: node.ask("GET", warm)[1]["complete"], "all of it is here")
        status, said = node.ask("POST", "pin", _image(source.digest))
        assert (status, said["pinned"]) == (200, True)
        assert node.ask("POST", "unpin", _image(source.name)) == (200, {})
        # What is wrong is said, as on the agent's own socket.
        status, said = node.ask("POST", "prefetch", _image(f"{registry.host}/elsewhere/app:v1"))
        assert (status, said["error"]) == (403, "DeniedError")
        assert "peers.origins" in said["message"]
        assert node.ask("POST", "prefetch", _image(f"{registry.host}/daemon/none:v1"))[0] == 404
        assert node.ask("POST", "pin", b"{")[0] == 400
        assert node.ask("POST", "pin", bytes(100_000))[0] == 400
        assert node.ask("POST", "cache/gc")[0] == 404, "that is for who is on the node"
        assert node.ask("POST", "pull", _image(source.name))[0] == 404


def test_strangers_prepare_nothing(tmp_path: Path, registry: servers.RegistryServer) -> None:
    source = push(registry, _TARS)
    peers = f'insecure = true\norigins = ["docker://{registry.host}/"]\n'
    with _Node(tmp_path, peers) as node:
        assert node.ask("POST", "prefetch", _image(source.name))[0] == 403
        assert node.ask("GET", "warm")[0] == 403
        assert node.agent.api.get("/api/v1/warm")["images"] == []
