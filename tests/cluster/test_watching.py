"""A collection stays current over 410, ends of watches and an API server that is away."""

from __future__ import annotations

from collections.abc import Mapping

from cluster import errors, objects
from cluster.api import Api
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
