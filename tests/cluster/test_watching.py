"""A collection stays current over 410, ends of watches and an API server that is away."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cluster import errors, objects, watching
from cluster.api import Api
from cluster.connection import Connection, Where
from cluster.objects import Object
from cluster.watching import Watcher
from tests.cluster.waiting import until
from tests.fixtures.kubernetes_api import KubernetesApi


def _names(found: Object) -> str | None:
    if found.meta.name == "bad":
        raise errors.InvalidError("bad: makes no sense")
    return None if found.meta.name == "unwanted" else found.meta.name


def test_a_collection_stays_current(api: Api, kubernetes_api: KubernetesApi) -> None:
    told: list[Mapping[str, str]] = []
    kubernetes_api.put("v1/pods", {"metadata": {"name": "a"}})
    kubernetes_api.put("v1/pods", {"metadata": {"name": "bad"}})
    kubernetes_api.put("v1/pods", {"metadata": {"name": "unwanted"}})
    watcher = Watcher(api, objects.POD, _names, changed=told.append)
    watcher.start()
    try:
        assert watcher.wait(30)
        assert watcher.current() == {"default/a": "a"}
        kubernetes_api.put("v1/pods", {"metadata": {"name": "b"}})
        until(lambda: set(watcher.current()) == {"default/a", "default/b"})
        kubernetes_api.delete("v1/pods", "default", "a")
        until(lambda: set(watcher.current()) == {"default/b"})
        kubernetes_api.compact()
        kubernetes_api.put("v1/pods", {"metadata": {"name": "c"}})
        until(lambda: set(watcher.current()) == {"default/b", "default/c"})
        kubernetes_api.drop_watches()
        kubernetes_api.delete("v1/pods", "default", "b")
        until(lambda: set(watcher.current()) == {"default/c"})
        assert told[-1] == {"default/c": "c"}
        kubernetes_api.refuse("GET", "/pods", 503, "away")
        kubernetes_api.drop_watches()
        until(lambda: isinstance(watcher.trouble(), errors.UnavailableError))
        assert set(watcher.current()) == {"default/c"}, "what was known stays"
        kubernetes_api.accept()
        until(lambda: watcher.trouble() is None)
    finally:
        watcher.stop()


def test_stop_ends_a_watch_that_says_nothing(api: Api, kubernetes_api: KubernetesApi) -> None:
    watcher = Watcher(api, objects.POD, _names)
    watcher.start()
    until(lambda: bool(kubernetes_api.seen(watch="true")))
    watcher.stop()
    assert not watcher._thread.is_alive()


def test_a_watch_goes_on_where_it_ended(api: Api, kubernetes_api: KubernetesApi) -> None:
    kubernetes_api.put("v1/pods", {"metadata": {"name": "a"}})
    watcher = Watcher(api, objects.POD, _names)
    watcher.start()
    try:
        until(lambda: bool(kubernetes_api.seen(watch="true")))
        kubernetes_api.bookmark()
        kubernetes_api.drop_watches()
        kubernetes_api.fail_next(500)
        kubernetes_api.put("v1/pods", {"metadata": {"name": "b"}})
        until(lambda: set(watcher.current()) == {"default/a", "default/b"})
        assert len(kubernetes_api.seen(limit="500")) == 1, "no second list"
    finally:
        watcher.stop()


def test_a_server_that_goes_on_refusing_is_asked_for_all_of_it(
    api: Api, kubernetes_api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_MAX_DELAY_SECONDS", 0.1)
    watcher = Watcher(api, objects.POD, _names)
    watcher.start()
    try:
        until(lambda: bool(kubernetes_api.seen(watch="true")))
        kubernetes_api.fail_next(*[500] * watching._FAILURES_BEFORE_LIST)
        kubernetes_api.drop_watches()
        until(lambda: len(kubernetes_api.seen(limit="500")) == 2)
    finally:
        watcher.stop()


def test_selectors(api: Api, kubernetes_api: KubernetesApi) -> None:
    def put(name: str, app: str) -> None:
        kubernetes_api.put("v1/secrets", {"metadata": {"name": name, "labels": {"app": app}}, "type": "t"})

    put("a", "x")
    put("b", "y")
    watcher = Watcher(api, objects.SECRET, _names, labels={"app": "x"}, fields={"type": "t"}, everywhere=True)
    watcher.start()
    try:
        until(lambda: set(watcher.current()) == {"default/a"})
        put("c", "y")
        put("d", "x")
        until(lambda: set(watcher.current()) == {"default/a", "default/d"})
    finally:
        watcher.stop()


def test_what_was_known_stays_while_the_server_is_away() -> None:
    with KubernetesApi() as server:
        server.put("v1/pods", {"metadata": {"name": "a"}})
        watcher = Watcher(Api(Connection(Where(url=server.url))), objects.POD, _names)
        watcher.start()
        until(lambda: set(watcher.current()) == {"default/a"})
        port = server.port
    try:
        assert set(watcher.current()) == {"default/a"}
        with KubernetesApi(port=port) as server:
            server.compact()
            server.compact()
            server.put("v1/pods", {"metadata": {"name": "b"}})
            until(lambda: set(watcher.current()) == {"default/b"})
    finally:
        watcher.stop()
