"""`glowplug operator run` as a process of its own, against the fake API server."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.api import Api
from cluster.connection import Connection, Where
from serving.operator import definition
from tests.fixtures import kubernetes_kinds
from tests.fixtures.kubernetes_api import KubernetesApi, Object
from tests.serving.served import GLOWPLUG, document

COLLECTION = f"{definition.KIND.group_version}/{definition.KIND.plural}"
_LEASES = "coordination.k8s.io/v1/leases"
_WAIT_SECONDS = 60.0
TOKEN = "operator"
"""Whose requests are the operator's, and not the test's."""


def spec(version: str = "one", replicas: int = 2, **sections: Any) -> dict[str, Any]:
    """What a ModelEndpoint called chat says: a document without its name."""
    made = document(
        version,
        replicas,
        image="registry.example/team/engine:1",
        kubernetes={"supervisor": "registry.example/glowplug-serving:0.1"},
        routing={"port": 8080},
        autoscaling={"mode": "off"},
        **sections,
    )
    del made["name"]
    return made


class Operator:
    """Started by `start`, in `directory`."""

    def __init__(self, server: KubernetesApi, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.api = Api(Connection(Where(url=server.url)), "default")
        self.process: subprocess.Popen[bytes] | None = None
        server.put(kubernetes_kinds.DEFINITIONS, definition.document())
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": server.url}}],
            "users": [{"name": "me", "user": {"token": TOKEN}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }
        (directory / "kubeconfig").write_text(yaml.safe_dump(config))

    @property
    def control(self) -> Path:
        return self.directory / "xds.sock"

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*GLOWPLUG, "operator", "run", "--listen", f"unix:{self.control}"),
                    *("--state", str(self.directory / "state")),
                    *("--metrics", "127.0.0.1:0"),
                ],
                env={**os.environ, "KUBECONFIG": str(self.directory / "kubeconfig")},
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """Without a word, and its lease as if it had run out."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(KeyError):
            self.server.delete(_LEASES, "default", "glowplug-operator")

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_WAIT_SECONDS)

    def said(self) -> str:
        return (self.directory / "log").read_text()

    def metrics(self) -> str:
        """Of the operator that was started last."""
        url = re.findall(r"metrics: (\S+)", self.said())[-1]
        with urllib.request.urlopen(url) as answer:
            return str(answer.read().decode())

    def put(self, wanted: dict[str, Any]) -> None:
        """Create the resource or give it another spec, as kubectl does."""
        self.api.apply(definition.KIND, "chat", {"spec": wanted}, manager="kubectl")

    def status(self) -> Object:
        found: Object = self.server.get(COLLECTION, "default", "chat").get("status", {})
        return found

    def condition(self, kind: str) -> Object:
        listed = self.status().get("conditions", [])
        return next((each for each in listed if each["type"] == kind), {"status": "?", "message": ""})

    def events(self, reason: str) -> list[str]:
        return [each["message"] for each in self.server.objects("v1/events") if each["reason"] == reason]

    def until(self, holds: Any) -> None:
        def look() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            return bool(holds())

        try:
            self.server.wait(look, _WAIT_SECONDS)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.status()}\n{self.said()[-6000:]}") from exc


@contextlib.contextmanager
def operating(server: KubernetesApi, directory: Path) -> Iterator[Operator]:
    """One for the block."""
    made = Operator(server, directory)
    try:
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.process.kill()
            made.process.wait()
