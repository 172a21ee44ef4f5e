"""The router on its own: files that change, EndpointSlices of a (fake) Kubernetes API, the command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving import service as services
from serving.router import document, endpointslices, sources
from tests.fixtures.kubernetes_api import KubernetesApi
from tests.serving.router import world

SLICES = "discovery.k8s.io/v1/endpointslices"


class Seen:
    """What a source said."""

    def __init__(self) -> None:
        self.updates: list[list[services.Service]] = []

    def __call__(self, found: Sequence[services.Service]) -> None:
        self.updates.append(list(found))

    def backends(self) -> dict[str, list[str]]:
        return {each.name: [b.address for b in each.backends] for each in self.updates[-1]}


@pytest.fixture
def seen() -> Seen:
    return Seen()


def _write(path: Path, *entries: dict[str, Any], **more: Any) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(yaml.safe_dump({"services": list(entries), **more}))
    draft.rename(path)


def _entry(*addresses: str, **more: Any) -> dict[str, Any]:
    backends = [{"address": each, "port": 80} for each in addresses]
    return {"name": "s", "listen": {"port": 8080}, "backends": backends, **more}


@pytest.fixture
def started() -> Iterator[list[sources.Sources]]:
    made: list[sources.Sources] = []
    yield made
    for each in made:
        each.stop()


def _start(started: list[sources.Sources], path: Path, seen: Seen) -> None:
    started.append(sources.Sources(path, seen))
    started[-1].start()


def test_a_file_and_what_it_names_are_followed(
    tmp_path: Path, seen: Seen, started: list[sources.Sources]
) -> None:
    path = tmp_path / "router.yaml"
    (tmp_path / "keys").write_text("tenant one\n")
    _write(path, _entry("10.0.0.1", keys="keys"))
    _start(started, path, seen)
    world.until(lambda: seen.updates)
    _write(path, _entry("10.0.0.1", "10.0.0.2", keys="keys"))
    world.until(lambda: seen.backends() == {"s": ["10.0.0.1", "10.0.0.2"]})
    (tmp_path / "keys").write_text("tenant one\ntenant another\n")
    world.until(lambda: [key.secret for key in seen.updates[-1][0].keys] == ["one", "another"])


def test_a_bad_document_never_replaces_a_good_one(
    tmp_path: Path, seen: Seen, started: list[sources.Sources], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "router.yaml"
    _write(path, _entry("10.0.0.1"))
    _start(started, path, seen)
    world.until(lambda: seen.updates)
    _write(path, _entry("not an address"))
    world.until(lambda: "stays so" in caplog.text)
    assert seen.backends() == {"s": ["10.0.0.1"]}
    _write(path, _entry("10.0.0.3"))
    world.until(lambda: seen.backends() == {"s": ["10.0.0.3"]})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (_entry(backendz=[]), "services.0.backendz: there is no such key; did you mean 'backends'"),
        (_entry(settings={"retires": 2}), "settings.retires: there is no such key; did you mean 'retries'"),
        (_entry(settings={"balancing": "best"}), "balancing"),
        (_entry("10.0.0.1", "10.0.0.1"), "there twice"),
        (_entry(keys="absent"), "absent is not there"),
        (_entry(activator="nowhere"), "ADDRESS:PORT"),
        (_entry(listen={"port": "8080"}), "listen.port"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    path = tmp_path / "router.yaml"
    _write(path, entry)
    with pytest.raises(errors.ServingError, match=said.replace("(", r"\(")):
        sources.load(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(text=st.text(max_size=200) | _JSON.map(lambda each: json.dumps({"services": each})))
def test_any_text_is_a_document_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(errors.DocumentError):
        document.parse(text, "f")


def _slice(name: str, *endpoints: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {endpointslices.SERVICE_LABEL: "chat"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8000}],
        "endpoints": list(endpoints),
        **more,
    }


def _endpoint(address: str, **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions, "zone": "z"}


def test_endpointslices_are_followed_through_410_and_an_api_server_that_is_away(
    tmp_path: Path, seen: Seen, started: list[sources.Sources]
) -> None:
    path = tmp_path / "router.yaml"
    token = tmp_path / "token"
    token.write_text("secret\n")
    with KubernetesApi(token="secret") as api:
        _write(
            path,
            _entry(kubernetes=[{"service": "chat", "port": "http", "version": "v1"}]),
            kubernetes={"url": api.url, "token": str(token)},
        )
        api.put(SLICES, _slice("one", _endpoint("10.0.0.1", ready=True)))
        _start(started, path, seen)
        world.until(lambda: seen.updates)
        assert seen.updates[0][0].backends == (
            services.Backend("10.0.0.1", 8000, "v1", "z", draining=False, healthy=True),
        )
        api.put(SLICES, _slice("two", _endpoint("10.0.0.2")))
        world.until(lambda: seen.backends() == {"s": ["10.0.0.1", "10.0.0.2"]})
        api.put(SLICES, _slice("one", _endpoint("10.0.0.1", ready=False, terminating=True)))
        world.until(lambda: seen.updates[-1][0].backends[0].draining)
        api.delete(SLICES, "default", "one")
        world.until(lambda: seen.backends() == {"s": ["10.0.0.2"]})
        api.compact()
        api.put(SLICES, _slice("three", _endpoint("10.0.0.3")))
        world.until(lambda: seen.backends() == {"s": ["10.0.0.2", "10.0.0.3"]})
        api.fail_next(500, 503)
        api.drop_watches()
        api.put(SLICES, _slice("three", _endpoint("10.0.0.4")))
        world.until(lambda: seen.backends() == {"s": ["10.0.0.2", "10.0.0.4"]})
        # What goes while nobody can see it is found missing.
        api.fail_next(500)
        api.drop_watches()
        api.delete(SLICES, "default", "two")
        api.compact()
        world.until(lambda: seen.backends() == {"s": ["10.0.0.4"]})
        updates = len(seen.updates)
    assert all(seen.updates[n] != seen.updates[n + 1] for n in range(updates - 1))


def test_nothing_is_said_before_kubernetes_was_listed(
    tmp_path: Path, seen: Seen, started: list[sources.Sources]
) -> None:
    path = tmp_path / "router.yaml"
    with KubernetesApi() as api:
        api.fail_next(500, 500)
        api.put(SLICES, _slice("one", _endpoint("10.0.0.1")))
        static = {**_entry("10.0.0.9"), "name": "static", "prefix": "/static"}
        _write(path, _entry(kubernetes=[{"service": "chat"}]), static, kubernetes={"url": api.url})
        _start(started, path, seen)
        world.until(lambda: seen.updates)
        assert seen.backends() == {"s": ["10.0.0.1"], "static": ["10.0.0.9"]}
        assert len(api.requests) >= 3


@given(st.lists(_JSON.filter(lambda each: isinstance(each, dict)), max_size=3))
def test_slices_without_sense_have_no_backends(slices: list[dict[str, Any]]) -> None:
    assert endpointslices.backends(slices, None, "") == ()


def test_one_endpoint_in_two_slices_counts_once() -> None:
    leaving = _slice("one", _endpoint("10.0.0.1", ready=False))
    there = _slice("two", _endpoint("10.0.0.1", ready=True))
    for order in ([leaving, there], [there, leaving]):
        (backend,) = endpointslices.backends(order, "http", "")
        assert backend.healthy


def test_the_command_routes_follows_and_drains(tmp_path: Path) -> None:
    with world.backends("a", "b") as (a, b):
        port = world.free_port()
        path, state = tmp_path / "router.yaml", tmp_path / "state"

        def write(backend: world.Backend) -> None:
            there = [{"address": "127.0.0.1", "port": backend.port}]
            _write(path, {"name": "s", "listen": {"port": port}, "backends": there})

        def answers(name: str) -> bool:
            try:
                return world.request(port) == (200, name)
            except OSError:
                return False

        write(a)
        arguments = ["run", "--config", str(path), "--state", str(state), "--envoy", "--workers", "1"]
        process = subprocess.Popen(
            [sys.executable, "-c", "from glowplug.cli import main; main()", "router", *arguments]
        )
        try:
            world.until(lambda: answers("a"))
            write(b)
            world.until(lambda: answers("b"))
        finally:
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(world.WAIT_SECONDS) == 0
        with pytest.raises(ConnectionRefusedError):
            world.request(port)
