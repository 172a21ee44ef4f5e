"""Pull secrets: parsed, watched on an API server, never shown."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import pullsecrets
from cluster import objects
from cluster.api import Api
from cluster.connection import Connection, Where
from cluster.watching import Watcher
from imagefs import errors
from imagefs.origin.credentials import Credential
from tests.fixtures.kubernetes_api import KubernetesApi

CONFIG_JSON, CFG = "kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


def encode(content: object) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.b64encode(data).decode()


def secret(
    name: str, host: str, password: str, namespace: str = "default", kind: str = CONFIG_JSON
) -> dict[str, Any]:
    auths = {host: {"auth": encode(f"user:{password}".encode())}}
    content, field = ({"auths": auths}, ".dockerconfigjson") if kind == CONFIG_JSON else (auths, ".dockercfg")
    return {
        "metadata": {"name": name, "namespace": namespace},
        "type": kind,
        "data": {field: encode(content)},
    }


def parse(item: dict[str, Any]) -> pullsecrets.Entries | None:
    return pullsecrets.parse(objects.parse(item, "secrets"))


def api_at(url: str) -> Api:
    return Api(Connection(Where(url=url)))


class TestParse:
    @pytest.mark.parametrize("kind", [CONFIG_JSON, CFG])
    def test_both_types(self, kind: str) -> None:
        found = parse(secret("s", "https://r.example/v1/", "p", kind=kind))
        assert found == {"r.example": Credential("user", "p")}

    def test_others_are_none_of_ours(self) -> None:
        assert parse({"metadata": {"name": "s"}, "type": "Opaque", "data": {"a": "b"}}) is None

    def test_helpers_in_a_secret_are_not_run(self) -> None:
        content = {"credsStore": "evil", "credHelpers": {"r.example": "evil"}, "auths": {}}
        item = {"type": CONFIG_JSON, "data": {".dockerconfigjson": encode(content)}}
        assert parse(item) == {}

    @pytest.mark.parametrize(
        "data",
        [
            None,
            {},
            {".dockerconfigjson": 5},
            {".dockerconfigjson": "p4ss!"},
            {".dockerconfigjson": encode(b"p4ss")},
            {".dockerconfigjson": encode([1])},
            {".dockerconfigjson": encode({"auths": {"h": {"auth": "p4ss!"}}})},
        ],
    )
    def test_broken(self, data: object) -> None:
        item = {"metadata": {"name": "name", "namespace": "space"}, "type": CONFIG_JSON, "data": data}
        with pytest.raises(errors.InvalidInputError, match="space/name") as caught:
            parse(item)
        assert "p4ss" not in str(caught.value)

    @given(st.sampled_from([CONFIG_JSON, CFG]), JSON)
    def test_any_content(self, kind: str, content: object) -> None:
        field = ".dockerconfigjson" if kind == CONFIG_JSON else ".dockercfg"
        try:
            parse({"type": kind, "data": {field: encode(content)}})
        except errors.InvalidInputError:
            return

    @given(JSON)
    def test_any_object(self, item: object) -> None:
        try:
            parse({"type": CONFIG_JSON, "data": item})
        except errors.InvalidInputError:
            return


@pytest.fixture
def started(kubernetes_api: KubernetesApi) -> Iterator[Callable[..., pullsecrets.PullSecrets]]:
    made: list[pullsecrets.PullSecrets] = []

    def start(*namespaces: str) -> pullsecrets.PullSecrets:
        secrets = pullsecrets.PullSecrets(api_at(kubernetes_api.url), namespaces)
        secrets.start()
        made.append(secrets)
        return secrets

    yield start
    for secrets in made:
        secrets.stop()


def passwords(secrets: pullsecrets.PullSecrets, host: str = "r.example") -> list[str]:
    return [found.password for found in secrets.candidates(host, "a/b", set())]


def until(secrets: pullsecrets.PullSecrets, *wanted: str) -> None:
    ticker = threading.Event()
    for _ in range(400):
        if passwords(secrets) == list(wanted):
            return
        ticker.wait(0.05)
    raise AssertionError(passwords(secrets))


class TestWatched:
    def test_found_rotated_removed(
        self,
        kubernetes_api: KubernetesApi,
        started: Callable[..., pullsecrets.PullSecrets],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        kubernetes_api.put("v1/secrets", secret("a", "r.example", "f1rst"))
        with caplog.at_level(logging.DEBUG):
            secrets = started()
            assert passwords(secrets) == ["f1rst"], "the first question waits for the first list"
            kubernetes_api.put("v1/secrets", secret("a", "r.example", "r0tated"))
            until(secrets, "r0tated")
            kubernetes_api.put("v1/secrets", secret("b", "r.example", "s3cond", kind=CFG))
            until(secrets, "r0tated", "s3cond")
            kubernetes_api.delete("v1/secrets", "default", "a")
            until(secrets, "s3cond")
        for word in ("f1rst", "r0tated", "s3cond"):
            assert word not in caplog.text

    def test_only_the_namespaces_that_are_named(
        self, kubernetes_api: KubernetesApi, started: Callable[..., pullsecrets.PullSecrets]
    ) -> None:
        for namespace in ("one", "two", "three"):
            kubernetes_api.put("v1/secrets", secret("s", "r.example", namespace, namespace))
        assert passwords(started("one", "two")) == ["one", "two"]
        assert all(seen.path.startswith("/api/v1/namespaces/") for seen in kubernetes_api.requests)

    def test_only_pull_secrets_are_asked_for(
        self, kubernetes_api: KubernetesApi, started: Callable[..., pullsecrets.PullSecrets]
    ) -> None:
        passwords(started())
        assert {seen.query["fieldSelector"] for seen in kubernetes_api.requests} == {
            f"type={CONFIG_JSON}",
            f"type={CFG}",
        }

    def test_a_dead_api_server_holds_up_no_pull(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[float] = []
        monkeypatch.setattr(Watcher, "wait", lambda self, seconds: waits.append(seconds))
        clock = [1000.0]
        secrets = pullsecrets.PullSecrets(api_at("http://127.0.0.1:1"), now=lambda: clock[0])
        secrets.start()
        try:
            passwords(secrets)
            assert waits == [5, 5]
            clock[0] += 60
            passwords(secrets)
            assert waits == [5, 5, 0, 0]
        finally:
            secrets.stop()

    def test_wildcards_and_docker_hub(
        self, kubernetes_api: KubernetesApi, started: Callable[..., pullsecrets.PullSecrets]
    ) -> None:
        kubernetes_api.put("v1/secrets", secret("a", "*.r.example", "wild"))
        kubernetes_api.put("v1/secrets", secret("b", "https://index.docker.io/v1/", "hub"))
        secrets = started()
        assert passwords(secrets, "eu.r.example") == ["wild"]
        assert passwords(secrets, "docker.io") == ["hub"]
        assert passwords(secrets, "r.example") == []
