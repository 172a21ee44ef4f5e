"""The Kubernetes client against a real HTTP server: lists, watches, tokens, and all that goes wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent import config, kubernetes
from agent import errors as agent_errors
from imagefs import errors
from tests.fixtures.kubernetes_api import KubernetesApi

SECRETS = kubernetes.collection("v1", "secrets", None)


def secret(name: str, value: str = "1", namespace: str = "default", **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, "labels": labels}, "type": "t", "value": value}


class Follower:
    """A watcher whose states a test can wait for."""

    def __init__(self, client: kubernetes.Client, query: Mapping[str, str] | None = None) -> None:
        self._condition = threading.Condition()
        self.states: list[dict[str, str]] = []
        self.watcher = kubernetes.Watcher(client, SECRETS, query or {}, self._parse, self._note)

    def _parse(self, item: kubernetes.Object) -> str | None:
        if item["value"] == "broken":
            raise errors.InvalidInputError("not to be understood")
        return str(item["value"]) or None

    def _note(self, values: Mapping[str, str]) -> None:
        with self._condition:
            self.states.append(dict(values))
            self._condition.notify_all()

    def until(self, wanted: Callable[[dict[str, str]], bool]) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: bool(self.states) and wanted(self.states[-1]), 20), (
                self.states
            )

    def until_is(self, **values: str) -> None:
        self.until(lambda state: state == {f"default/{name}": value for name, value in values.items()})


@pytest.fixture
def client(kubernetes_api: KubernetesApi) -> Iterator[kubernetes.Client]:
    made = kubernetes.Client(kubernetes_api.url)
    yield made
    made.close()


@pytest.fixture
def follow(client: kubernetes.Client) -> Iterator[Callable[..., Follower]]:
    made: list[Follower] = []

    def start(query: Mapping[str, str] | None = None) -> Follower:
        follower = Follower(client, query)
        made.append(follower)
        follower.watcher.start()
        return follower

    yield start
    for follower in made:
        follower.watcher.stop()


def wait_for_watch(api: KubernetesApi, count: int = 1) -> None:
    ticker = threading.Event()
    for _ in range(400):
        if len(api.seen(watch="1")) >= count:
            return
        ticker.wait(0.05)
    raise AssertionError("no watch came")


class TestRequests:
    def test_get_create_list(self, kubernetes_api: KubernetesApi, client: kubernetes.Client) -> None:
        events = kubernetes.collection("v1", "events", "default")
        made = client.create(events, {"metadata": {"name": "a"}, "reason": "Pulled"})
        assert made["metadata"]["resourceVersion"]
        assert client.get(f"{events}/a")["reason"] == "Pulled"
        with pytest.raises(agent_errors.AlreadyExistsError):
            client.create(events, {"metadata": {"name": "a"}})
        with pytest.raises(errors.NotFoundError):
            client.get(f"{events}/b")
        [item] = kubernetes_api.objects("v1/events")
        assert item["metadata"]["namespace"] == "default"

    def test_all_pages(self, kubernetes_api: KubernetesApi, client: kubernetes.Client) -> None:
        for number in range(1001):
            kubernetes_api.put("v1/secrets", secret(f"s{number}"))
        items, version = client.list(SECRETS)
        assert len({item["metadata"]["name"] for item in items}) == 1001
        assert version == items[-1]["metadata"]["resourceVersion"] or int(version) >= 1101
        assert len(kubernetes_api.seen(limit="500")) == 3

    def test_more_objects_than_a_node_should_hold(
        self, kubernetes_api: KubernetesApi, client: kubernetes.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kubernetes, "_MAX_OBJECTS", 3)
        for number in range(4):
            kubernetes_api.put("v1/secrets", secret(f"s{number}"))
        with pytest.raises(errors.InvalidInputError, match="namespaces"):
            client.list(SECRETS)

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (401, errors.DeniedError),
            (403, errors.DeniedError),
            (410, kubernetes.ExpiredError),
            (429, errors.UnavailableError),
            (503, errors.UnavailableError),
            (418, errors.InvalidInputError),
        ],
    )
    def test_statuses(
        self,
        kubernetes_api: KubernetesApi,
        client: kubernetes.Client,
        status: int,
        error: type[errors.ImagefsError],
    ) -> None:
        kubernetes_api.fail_next(status)
        with pytest.raises(error, match=f"/api/v1/secrets: HTTP {status}: ordered by the test"):
            client.get(SECRETS)

    def test_nobody_there(self) -> None:
        with pytest.raises(errors.UnavailableError, match="/api/v1/secrets"):
            kubernetes.Client("http://127.0.0.1:1").get(SECRETS)

    @pytest.mark.parametrize("url", ["http://10.0.0.1:6443", "ftp://x", "https://", "https://u:p4ss@h", "x"])
    def test_urls_that_no_token_goes_to(self, url: str) -> None:
        with pytest.raises(errors.ConfigurationError, match="api_url") as caught:
            kubernetes.Client(url)
        assert "p4ss" not in str(caught.value)

    def test_paths(self) -> None:
        assert kubernetes.collection("v1", "secrets", "a") == "/api/v1/namespaces/a/secrets"
        assert (
            kubernetes.collection("discovery.k8s.io/v1", "endpointslices", None)
            == "/apis/discovery.k8s.io/v1/endpointslices"
        )


class TestTokens:
    def test_read_again_when_rotated(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        token = tmp_path / "token"
        token.write_text("first\n")
        with KubernetesApi(token="first") as api, caplog.at_level(logging.DEBUG):
            client = kubernetes.Client(api.url, token_file=token)
            client.list(SECRETS)
            api.token = "sec0nd"
            with pytest.raises(errors.DeniedError) as caught:
                client.list(SECRETS)
            token.write_text("sec0nd")
            client.list(SECRETS)
        assert "first" not in str(caught.value) + caplog.text
        assert "sec0nd" not in caplog.text

    @pytest.mark.parametrize("content", ["", "two words", "a\r\nX-Evil: 1"])
    def test_files_that_hold_none(self, tmp_path: Path, content: str) -> None:
        token = tmp_path / "token"
        token.write_text(content)
        with pytest.raises(errors.ConfigurationError, match="token_file"):
            kubernetes.Client("http://127.0.0.1:1", token_file=token).get(SECRETS)

    def test_tls(self, tmp_path: Path) -> None:
        certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
                *("-nodes", "-days", "2", "-subj", "/CN=t", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", str(key), "-out", str(certificate)),
            ],
            check=True,
            capture_output=True,
        )
        with KubernetesApi(tls=(certificate, key)) as api:
            client = kubernetes.connect(config.Kubernetes(api_url=api.url, ca_file=certificate))
            assert client is not None
            assert client.list(SECRETS)[0] == []
            with pytest.raises(errors.UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
                kubernetes.Client(api.url).list(SECRETS)


class TestSettings:
    def test_none(self) -> None:
        assert kubernetes.connect(config.Kubernetes()) is None

    def test_in_cluster_but_in_no_pod(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        with pytest.raises(errors.ConfigurationError, match="api_url"):
            kubernetes.connect(config.Kubernetes(in_cluster=True))


class TestWatcher:
    def test_follows(self, kubernetes_api: KubernetesApi, follow: Callable[..., Follower]) -> None:
        kubernetes_api.put("v1/secrets", secret("a"))
        follower = follow()
        follower.until_is(a="1")
        kubernetes_api.put("v1/secrets", secret("b"))
        follower.until_is(a="1", b="1")
        kubernetes_api.put("v1/secrets", secret("a", "2"))
        follower.until_is(a="2", b="1")
        kubernetes_api.delete("v1/secrets", "default", "b")
        follower.until_is(a="2")
        assert len(kubernetes_api.seen(limit="500")) == 1, "listed once"

    def test_selectors(self, kubernetes_api: KubernetesApi, follow: Callable[..., Follower]) -> None:
        kubernetes_api.put("v1/secrets", secret("a", app="x"))
        kubernetes_api.put("v1/secrets", secret("b", app="y"))
        follower = follow({"labelSelector": "app=x", "fieldSelector": "type=t"})
        follower.until_is(a="1")
        kubernetes_api.put("v1/secrets", secret("c", app="y"))
        kubernetes_api.put("v1/secrets", secret("d", app="x"))
        follower.until_is(a="1", d="1")

    def test_listed_again_after_410(
        self, kubernetes_api: KubernetesApi, follow: Callable[..., Follower]
    ) -> None:
        kubernetes_api.put("v1/secrets", secret("a"))
        follower = follow()
        follower.until_is(a="1")
        wait_for_watch(kubernetes_api)
        kubernetes_api.compact()
        kubernetes_api.put("v1/secrets", secret("b"))
        follower.until_is(a="1", b="1")
        assert len(kubernetes_api.seen(limit="500")) >= 2

    def test_keeps_what_it_knew_while_the_server_is_away(self, tmp_path: Path) -> None:
        with KubernetesApi() as api:
            api.put("v1/secrets", secret("a"))
            follower = Follower(kubernetes.Client(api.url))
            follower.watcher.start()
            follower.until_is(a="1")
            port = api.port
        assert follower.watcher.current() == {"default/a": "1"}
        with KubernetesApi(port=port) as api:
            api.compact()
            api.compact()
            api.put("v1/secrets", secret("b"))
            follower.until_is(b="1")
            follower.watcher.stop()

    def test_goes_on_where_a_watch_ended(
        self, kubernetes_api: KubernetesApi, follow: Callable[..., Follower]
    ) -> None:
        kubernetes_api.put("v1/secrets", secret("a"))
        follower = follow()
        follower.until_is(a="1")
        wait_for_watch(kubernetes_api)
        kubernetes_api.bookmark()
        kubernetes_api.drop_watches()
        kubernetes_api.fail_next(500)
        kubernetes_api.put("v1/secrets", secret("b"))
        follower.until_is(a="1", b="1")
        assert len(kubernetes_api.seen(limit="500")) == 1, "no second list"

    def test_an_object_that_cannot_be_parsed_is_left_out_and_named(
        self,
        kubernetes_api: KubernetesApi,
        follow: Callable[..., Follower],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        kubernetes_api.put("v1/secrets", secret("good"))
        kubernetes_api.put("v1/secrets", secret("bad", "broken"))
        follower = follow()
        follower.until_is(good="1")
        assert "default/bad" in caplog.text

    def test_stop_does_not_wait_for_the_watch(
        self, kubernetes_api: KubernetesApi, follow: Callable[..., Follower]
    ) -> None:
        follower = follow()
        follower.until(lambda state: state == {})
        wait_for_watch(kubernetes_api)
        follower.watcher.stop()
        assert not follower.watcher._thread.is_alive()
        assert follower.watcher.wait(0)


class TestNonsense:
    @pytest.mark.parametrize(
        "body", [b"", b"[]", b"nonsense p4ss", b'{"items": 5}', b'{"items": ["p4ss"]}', b"\xff\xfe"]
    )
    def test_lists(self, fault_server: Any, body: bytes) -> None:
        fault_server.serve("/api/v1/secrets", body)
        with pytest.raises(errors.InvalidInputError) as caught:
            kubernetes.Client(fault_server.url).list(SECRETS)
        assert "p4ss" not in str(caught.value)

    @pytest.mark.parametrize(
        "line", [b"nonsense p4ss", b'{"type": 5}', b'{"type": "ADDED", "object": "p4ss"}']
    )
    def test_watches(self, fault_server: Any, line: bytes) -> None:
        fault_server.serve("/api/v1/secrets", line + b"\n")
        with pytest.raises(errors.InvalidInputError) as caught:
            list(kubernetes.Client(fault_server.url).watch(SECRETS, None, "1"))
        assert "p4ss" not in str(caught.value)

    def test_an_endless_line(self, fault_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kubernetes, "_MAX_LINE_BYTES", 1000)
        fault_server.serve("/api/v1/secrets", b"x" * 100_000)
        with pytest.raises(errors.InvalidInputError, match="more than"):
            list(kubernetes.Client(fault_server.url).watch(SECRETS, None, "1"))

    def test_an_error_in_a_watch(self, fault_server: Any) -> None:
        event = {"type": "ERROR", "object": {"code": 500, "message": "etcd\nis away"}}
        fault_server.serve("/api/v1/secrets", json.dumps(event).encode() + b"\n")
        with pytest.raises(errors.UnavailableError, match="etcd is away"):
            list(kubernetes.Client(fault_server.url).watch(SECRETS, None, "1"))
