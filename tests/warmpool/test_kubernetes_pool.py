"""`glowplug warmpool run` as processes, on a cluster whose scheduler, kubelets and node maker are played."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures import block_images
from tests.fixtures.kubernetes_api import KubernetesApi, Seen
from tests.warmpool.providers import nodemaker
from tests.warmpool.providers.nodemaker import NAMESPACE, NODES, PODS, Cluster

_LIMIT_SECONDS = 60.0


class Running:
    """A cluster that lives, and controllers on it."""

    def __init__(self, server: KubernetesApi, folder: Path) -> None:
        self.server = server
        self.cluster = Cluster(server)
        self._folder = folder
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        self.controllers: list[Controller] = []

    def controller(self, floor: int = 2, *options: str) -> Controller:
        made = Controller(self._folder, self.server.url, floor, len(self.controllers), options)
        self.controllers.append(made)
        return made

    @contextlib.contextmanager
    def still(self) -> Iterator[Cluster]:
        """The cluster, while it does nothing by itself."""
        with self._lock:
            yield self.cluster

    def placeholders(self) -> list[dict[str, Any]]:
        return [each for each in self.server.objects(PODS) if each["metadata"]["namespace"] == NAMESPACE]

    def admitted(self) -> list[str]:
        return [
            each["metadata"]["name"]
            for each in self.server.objects(NODES)
            if "glowplug.dev/warming" not in [taint["key"] for taint in each["spec"].get("taints") or []]
        ]

    def deleted(self) -> list[str]:
        return [each.path for each in self.server.seen() if each.method == "DELETE"]

    def asked(self) -> set[tuple[str, str]]:
        """(verb, resource) of every request so far."""
        return {(_verb(each), _resource(each.path)) for each in self.server.seen()}

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for each in self.controllers:
            each.kill()

    def _live(self) -> None:
        while not self._stopped.wait(0.05):
            with self._lock:
                self.cluster.step()


class Controller:
    """One process."""

    def __init__(self, folder: Path, url: str, floor: int, number: int, options: tuple[str, ...]) -> None:
        self.log = folder / f"log-{number}"
        config = folder / f"pool-{number}.yaml"
        config.write_text(
            json.dumps(
                {
                    "interval_seconds": 0.3,
                    "provider": {
                        **nodemaker.SETTINGS.model_dump(mode="json"),
                        "access": {"url": url},
                    },
                    "demand": {"kind": "kubernetes"},
                    "election": {"kind": "lease", "lease_seconds": 3},
                    "status": {"listen": "127.0.0.1:0"},
                    "policy": {"classes": {"gpu": {"floor": floor, "cap": 6}, "big": {"cap": 6}}},
                }
            )
        )
        self.config = config
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [block_images.GLOWPLUG, "warmpool", "run", "--config", config, *options],
                stdout=log,
                stderr=log,
            )

    @property
    def listen(self) -> str:
        """Where it is seen; nowhere yet: ""."""
        said = re.search(r"status on (\S+)", self.log.read_text())
        return said[1] if said else ""

    def status(self) -> dict[str, Any]:
        """Empty until it answers."""
        if not self.listen:
            return {}
        try:
            with urllib.request.urlopen(f"http://{self.listen}/api/v1/status", timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except OSError:
            return {}

    def pool(self) -> dict[str, Any]:
        pools = self.status().get("pools") or [{}]
        return next((each for each in pools if each.get("node_class") == "gpu"), {})

    def kill(self, signum: int = signal.SIGKILL) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(30)


@pytest.fixture
def running(kubernetes_api: KubernetesApi, tmp_path: Path) -> Iterator[Running]:
    made = Running(kubernetes_api, tmp_path)
    yield made
    made.close()


def _verb(seen: Seen) -> str:
    if seen.method != "GET":
        return {"POST": "create", "PATCH": "patch", "DELETE": "delete"}[seen.method]
    if seen.query.get("watch"):
        return "watch"
    return "list" if seen.path.rsplit("/", 1)[1] == _resource(seen.path) else "get"


def _resource(path: str) -> str:
    return next(
        each for each in reversed(path.split("/")) if each in ("pods", "nodes", "leases", "configmaps")
    )


def _granted() -> set[tuple[str, str]]:
    text = (Path(__file__).parents[2] / "deploy/kustomize/warmpool/rbac.yaml").read_text()
    return {
        (verb, resource)
        for each in yaml.safe_load_all(text)
        for rule in each.get("rules", [])
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }


def eventually(condition: Callable[[], object], running: Running) -> None:
    until = time.monotonic() + _LIMIT_SECONDS
    while not condition():
        logs = "\n".join(each.log.read_text()[-2_000:] for each in running.controllers)
        assert time.monotonic() < until, logs
        time.sleep(0.05)


def test_a_pool_is_made_taken_and_made_again(running: Running) -> None:
    controller = running.controller()
    eventually(lambda: len(running.admitted()) == 2, running)
    eventually(lambda: controller.pool().get("states", {}).get("warm") == 2, running)
    with running.still() as cluster:
        name = cluster.add_pod("gpu")
        cluster.step(make=False)
        (pod,) = [each for each in running.server.objects(PODS) if each["metadata"]["name"] == name]
        assert pod["spec"]["nodeName"], "the placeholder gave way at once"
    eventually(lambda: controller.pool().get("hits") == 1, running)
    eventually(lambda: len(running.admitted()) >= 3, running)
    assert controller.pool()["misses"] == 0
    text = subprocess.check_output(
        [block_images.GLOWPLUG, "warmpool", "explain", "--status", controller.listen], text=True
    )
    assert "gpu: " in text
    assert "is admitted: warm" in text
    with urllib.request.urlopen(f"http://{controller.listen}/metrics", timeout=5) as answer:
        said = answer.read().decode()
    assert 'glowplug_warmpool_handed_total{node_class="gpu",result="hit"} 1' in said
    assert controller.kill(signal.SIGTERM) == 0
    assert len(running.placeholders()) >= 2, "what is held stays held"
    assert running.asked() <= _granted(), "the manifests allow what is done"


def test_a_leader_that_is_killed_releases_nothing_and_is_followed(running: Running) -> None:
    first = running.controller()
    eventually(lambda: first.pool().get("states", {}).get("warm") == 2, running)
    second = running.controller()
    eventually(lambda: second.status().get("holder"), running)
    assert not second.status()["leading"]
    before = {each["metadata"]["uid"] for each in running.placeholders()}
    nodes = {each["metadata"]["name"] for each in running.server.objects(NODES)}
    first.kill()
    eventually(lambda: second.status().get("leading"), running)
    eventually(lambda: second.pool().get("states", {}).get("warm") == 2, running)
    assert {each["metadata"]["uid"] for each in running.placeholders()} == before
    assert {each["metadata"]["name"] for each in running.server.objects(NODES)} == nodes
    assert running.deleted() == []
    assert not any("begins without" in each["text"] for each in second.status()["events"])


def test_an_api_server_that_is_away_stops_nothing_for_good(running: Running) -> None:
    controller = running.controller(1)
    eventually(lambda: controller.pool().get("states", {}).get("warm") == 1, running)
    running.server.refuse("GET", "/nodes$", 503, "ordered by the test")
    eventually(lambda: "provider" in controller.status().get("trouble", {}), running)
    running.server.accept()
    with running.still() as cluster:
        cluster.finish(running.admitted()[0])
    eventually(lambda: len(running.placeholders()) == 1 and not controller.status()["trouble"], running)


def test_a_plan_shows_what_would_be_done_and_does_nothing(running: Running) -> None:
    dry = running.controller(2, "--dry-run")
    eventually(lambda: dry.status().get("orders"), running)
    text = subprocess.check_output(
        [block_images.GLOWPLUG, "warmpool", "plan", "--config", dry.config], text=True, env={**os.environ}
    )
    assert "would: gpu: hold 2 (now 0)" in text
    assert running.placeholders() == []
    dry.kill()
    running.server.refuse("GET", "/nodes$", 503, "ordered by the test")
    away = subprocess.run(
        [block_images.GLOWPLUG, "warmpool", "plan", "--config", dry.config], text=True, capture_output=True
    )
    assert away.returncode == 7
    assert "look at nodes" in away.stderr
