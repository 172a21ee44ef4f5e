"""The agent from outside, over its sockets: on a device server that is scripted, dead, replaced, and real."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from agent import announce, api, client, config, devicefeed, kubernetes, observer, outside, starts, store
from agent.images import Images
from imagefs import errors
from tests.agent import outside_world
from tests.agent.lazy_node import BASE, LazyNode
from tests.agent.lazy_node import node as node
from tests.agent.outside_world import BLOCK_DIGEST, REFERENCE, event
from tests.fixtures import images
from tests.fixtures.kubernetes_api import KubernetesApi
from tests.imagefs.fuse import stack


def test_status_events_and_starts_over_both_sockets(tmp_path: Path) -> None:
    server = outside_world.DeviceServer(tmp_path)
    with outside_world.running(tmp_path) as world:
        world.outside.observer.pulled(REFERENCE, lazy=True, seconds=0.2, layers=3)
        inside = client.AgentClient(world.settings.api_socket)
        status = inside.get("/api/v1/status")
        assert status["images"][0]["reference"] == REFERENCE
        assert status["server"]["processes"]["server"] == 100
        assert status["not_ready"] == {}
        code, body, _ = world.tcp("/api/v1/events")
        assert code == 200
        (only,) = json.loads(body)["events"]
        assert only["kind"] == "lazy_pull"
        assert inside.get("/api/v1/events", {"after": str(only["number"])})["events"] == []
        assert inside.get("/api/v1/starts")["starts"][0]["reference"] == REFERENCE
        for after in ("-1", "²", "9" * 5000):
            with pytest.raises(errors.InvalidInputError, match="after"):
                inside.get("/api/v1/events", {"after": after})
        said = "GET https://r.example/v2/?token=abcdefghijkl failed"
        world.outside.observer.event("lookup_failed", said, level="warning")
        for path in ("/api/v1/events", "/"):
            _, body, _ = world.tcp(path)
            assert "r.example" in body
            assert "abcdefghijkl" not in body
    server.close()


def test_ready_means_that_everything_answers(tmp_path: Path) -> None:
    with outside_world.running(tmp_path) as world:
        code, body, _ = world.tcp("/readyz")
        assert code == 503
        assert list(json.loads(body)["not_ready"]) == ["device server"]
        assert world.tcp("/healthz")[0] == 200
        assert "glowplug_device_server_up 0.0" in world.tcp("/metrics")[1]
        assert world.tcp("/")[0] == 200
    server = outside_world.DeviceServer(tmp_path)
    with outside_world.running(tmp_path) as world:
        assert world.tcp("/readyz")[:2] == (200, '{"ready": true, "not_ready": {}}')
        world.settings.socket.unlink()
        assert "No such file" in json.loads(world.tcp("/readyz")[1])["not_ready"]["snapshotter socket"]
    server.close()


def test_a_start_is_followed_by_its_events_and_nothing_is_asked_when_idle(tmp_path: Path) -> None:
    server = outside_world.DeviceServer(tmp_path)
    with outside_world.running(tmp_path) as world:
        now = time.monotonic()
        world.outside.observer.pulled(REFERENCE, lazy=True, seconds=0.2, layers=3)
        assert server.asked == []
        server.events = [event(5, now + 3600, now + 3600.5), event(6, now + 3600, now + 3601)]
        world.outside.observer.phase(REFERENCE, "mount", 0.1)
        stack.eventually(lambda: len(server.asked) >= 2, "the feed reads twice")
        assert [asked["after"] for asked in server.asked[:2]] == [0, 6]
        (start,) = json.loads(world.tcp("/api/v1/starts")[1])["starts"]
        assert (start["state"], start["misses"]) == ("running", 2)
    server.close()


def test_replaced_processes_are_counted_whatever_a_new_server_counts(tmp_path: Path) -> None:
    server = outside_world.DeviceServer(tmp_path)
    clock = [0.0]
    recorder = observer.Recorder()
    feed = devicefeed.DeviceFeed(tmp_path, starts.Starts(), recorder, lambda: clock[0])

    def look(**processes: int) -> dict[str, int]:
        clock[0] += 2
        server.status["processes"].update(processes)
        assert feed.status().error is None
        return feed.replaced()

    assert look() == {"server": 0, "worker": 0, "keeper": 0}
    assert look(workers_replaced=2) == {"server": 0, "worker": 2, "keeper": 0}
    assert look(server=200, workers_replaced=1, keepers_replaced=1) == {"server": 1, "worker": 3, "keeper": 1}
    assert look(workers_replaced=1) == {"server": 1, "worker": 3, "keeper": 1}
    feed.status()
    assert len(server.asked) == 4  # the last one was fresh
    told = [(each.fields["process"], each.fields["count"]) for each in recorder.events()]
    assert told == [("worker", 2), ("server", 1), ("worker", 1), ("keeper", 1)]
    server.close()
    clock[0] += 2
    look_now = feed.status()
    assert look_now.status is None
    assert "does not answer" in str(look_now.error)


class _Cluster:
    def __init__(self) -> None:
        self.posted: list[tuple[str, str, bool]] = []
        self.refused = 0
        self.broken = False

    def post(self, reason: str, message: str, *, warning: bool) -> None:
        if self.broken:
            self.refused += 1
            raise errors.UnavailableError("no API server")
        self.posted.append((reason, message, warning))


def test_warnings_reach_the_cluster_but_not_in_floods() -> None:
    cluster, clock = _Cluster(), [0.0]
    announcer = announce.Announcer(cluster, lambda: clock[0])
    recorder = observer.Recorder([announcer])
    announcer.start()
    recorder.event("mounted", "nobody cares")
    recorder.pulled("r", lazy=False, seconds=1, layers=0, reason="no block image")
    for _ in range(20):
        recorder.event("quarantined", "token=abcdefghijkl", level="warning")
    clock[0] = 61
    recorder.event("quarantined", "again", level="error")
    stack.eventually(lambda: len(cluster.posted) == 7, "seven events")
    announcer.stop()
    assert cluster.posted[0] == ("OrdinaryPull", "r: ordinary pull: no block image", False)
    assert cluster.posted[1] == ("Quarantined", "token=***", True)
    assert cluster.posted[-1] == ("Quarantined", "again (and 15 more of this kind)", True)


def test_a_cluster_that_is_away_stops_nothing() -> None:
    cluster = _Cluster()
    cluster.broken = True
    announcer = announce.Announcer(cluster)
    recorder = observer.Recorder([announcer])
    announcer.start()
    recorder.event("quarantined", "one", level="warning")
    stack.eventually(lambda: cluster.refused == 1, "it was tried")
    cluster.broken = False
    recorder.event("refused", "two", level="warning")
    stack.eventually(lambda: bool(cluster.posted), "the next one is posted")
    announcer.stop()


def test_a_node_event_is_what_the_api_server_takes(kubernetes_api: KubernetesApi) -> None:
    api = kubernetes.connect(config.Kubernetes(api_url=kubernetes_api.url))
    assert api is not None
    announce.Node(api, "node-7").post("Quarantined", "why", warning=True)
    (document,) = kubernetes_api.objects("v1/events")
    assert document["involvedObject"]["name"] == "node-7"
    assert document["metadata"]["namespace"] == "default"
    assert (document["type"], document["reason"], document["message"]) == ("Warning", "Quarantined", "why")


@pytest.mark.root
def test_on_the_real_device_server(tmp_path: Path) -> None:
    blobs = stack.BlobServer()
    layer = stack.make_layer(stack.random_image(1 << 20, 1))
    values = stack.settings(tmp_path)
    try:
        with stack.running(values) as devices:
            (device,) = devices.attach(f"image:{BLOCK_DIGEST}", [blobs.add(layer)], stack.OPTIONS)
            with outside_world.running(values.state_dir) as world:
                world.outside._starts.layers_of = lambda reference: [layer.map_digest]
                world.outside.observer.pulled(REFERENCE, lazy=True, seconds=0.2, layers=1)
                world.outside.observer.phase(REFERENCE, "mount", 0.0)
                assert device.read_bytes() == layer.image
                (start,) = json.loads(world.tcp("/api/v1/starts")[1])["starts"]
                assert len(start["bars"]) == 16
                assert start["misses"] >= 1
                assert {bar["source"] for bar in start["bars"]} == {"origin"}
                assert all(
                    bar["wanted"] <= bar["started"] <= bar["served"] <= bar["arrived"]
                    for bar in start["bars"]
                )
                text = world.tcp("/metrics")[1]
                assert 'glowplug_read_blocks_total{source="origin"} 16.0' in text
                assert f'glowplug_demand_misses_total{{when="start"}} {start["misses"]}.0' in text
                assert world.tcp("/readyz")[0] == 200
                assert "from origins, 16 blocks" in world.tcp("/")[1]
    finally:
        blobs.close()


@pytest.mark.root
def test_a_real_start_from_its_lookup_to_its_reads(node: LazyNode) -> None:
    seen = outside.Outside(node.settings)
    routes = api.Api(node.settings.api_socket, None)
    seen.show(node.store, routes)
    routes.start()
    seen.start()
    try:
        lazily = Images(node.settings, node.store, node.devices, node.mounts, seen.observer, node.origins)
        source = node.push([BASE, images.tar_of([("big", os.urandom(3_000_000))])])
        found = lazily.find_layer(source.chain_ids[-1], source.labels)
        assert found is not None
        assert len((lazily.directory(found.block_digest, found.layer) / "big").read_bytes()) == 3_000_000
        inside = client.AgentClient(node.settings.api_socket)
        (start,) = inside.get("/api/v1/starts")["starts"]
        assert start["reference"] == source.name
        assert start["state"] == "running"
        phases = {phase["phase"]: phase for phase in start["phases"]}
        assert list(phases) == ["lookup", "metadata", "mount", "first_read", "reads"]
        assert all(phase["begin"] <= phase["end"] for phase in phases.values())
        assert phases["metadata"]["end"] <= phases["mount"]["begin"] + 0.001
        assert start["layers"] == 2
        assert {bar["layer"] for bar in start["bars"]} == {0, 1}
        assert sum(bar["compressed_bytes"] for bar in start["bars"]) >= 3_000_000
        (image,) = inside.get("/api/v1/status")["images"]
        assert image["reference"] == source.name
    finally:
        seen.stop()
        routes.stop()


def test_a_database_that_fails_is_not_ready_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> Any:
        raise errors.UnavailableError("the disk is gone")

    with outside_world.running(tmp_path) as world:
        monkeypatch.setattr(store.Store, "walk", broken)
        monkeypatch.setattr(store.Store, "images", broken)
        world.outside.observer.phase(REFERENCE, "mount", 0.1)
        assert json.loads(world.tcp("/readyz")[1])["not_ready"]["database"] == "the disk is gone"
        assert "glowplug_store_up 0.0" in world.tcp("/metrics")[1]
        assert world.tcp("/")[0] == 200
        assert len(json.loads(world.tcp("/api/v1/starts")[1])["starts"]) == 1
