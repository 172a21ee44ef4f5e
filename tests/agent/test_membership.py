"""Who the members are, from each source; and that the device server is told, once and again."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from agent import config, kubernetes, membership
from agent.observer import Observer
from imagefs import errors
from imagefs.peersettings import PeerSettings
from tests.fixtures.kubernetes_api import KubernetesApi
from tests.imagefs import scripted

SETTINGS = config.Peers(listen="10.0.0.1:7311", members=("10.0.0.2:7311",), insecure=True)


class Told(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def event(self, kind: str, message: str, **fields: object) -> None:
        self.messages.append(message)


class Devices:
    """A device server that remembers, and can be away."""

    def __init__(self) -> None:
        self.told: list[PeerSettings] = []
        self.away = False
        self.tries = 0
        self.asked = threading.Semaphore(0)

    def __call__(self) -> Any:
        return self

    def set_peers(self, settings: PeerSettings) -> None:
        self.tries += 1
        self.asked.release()
        if self.away:
            raise errors.UnavailableError("away")
        self.told.append(settings)


class Source:
    """A discovery that a test changes."""

    def __init__(self, *members: str) -> None:
        self.found: tuple[str, ...] | None = members

    def members(self) -> tuple[str, ...]:
        if self.found is None:
            raise errors.UnavailableError("nobody knows")
        return self.found

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(membership, "_RETRY_SECONDS", 0.01)


def test_the_device_server_is_told_what_changed_and_nothing_else() -> None:
    devices, source, told = Devices(), Source("10.0.0.3:7311", "10.0.0.2:7311"), Told()
    members = membership.Membership(SETTINGS, source, devices, told)
    members.start()
    try:
        scripted.eventually(lambda: len(devices.told) == 1)
        assert devices.told[0].members == ("10.0.0.1:7311", "10.0.0.2:7311", "10.0.0.3:7311")
        assert devices.told[0].address == "10.0.0.1:7311"
        source.found = ("10.0.0.2:7311",)
        scripted.eventually(lambda: len(devices.told) == 2)
        assert members.members == ("10.0.0.1:7311", "10.0.0.2:7311")
        source.found = None
        scripted.eventually(lambda: len(told.messages) == 3)
        members.say_again()
        scripted.eventually(lambda: len(devices.told) == 3)
        assert devices.told[2] == devices.told[1], "a failing source takes nobody away"
        assert "nobody knows" in told.messages[2]
    finally:
        members.stop()
    assert devices.tries == 3
    assert len(told.messages) == 3


def test_a_device_server_that_was_away_is_told_when_it_is_back() -> None:
    devices, told = Devices(), Told()
    devices.away = True
    members = membership.Membership(SETTINGS, Source("10.0.0.2:7311"), devices, told)
    members.start()
    try:
        scripted.eventually(lambda: devices.tries > 3)
        assert len(told.messages) == 1, "said more than once"
        devices.away = False
        scripted.eventually(lambda: len(devices.told) == 1)
    finally:
        members.stop()


def test_a_renewed_secret_is_taken_up(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one\n")
    devices = Devices()
    settings = config.Peers(listen="10.0.0.1:7311", token_file=token)
    members = membership.Membership(settings, Source(), devices, Observer())
    members.start()
    try:
        scripted.eventually(lambda: len(devices.told) == 1)
        renewed = tmp_path / "renewed"
        renewed.write_text("two\n")
        renewed.rename(token)
        scripted.eventually(lambda: len(devices.told) == 2)
        assert devices.told[0].stamp != devices.told[1].stamp
        assert "two" not in str(devices.told[1].to_json())
    finally:
        members.stop()


def test_the_listed_ones() -> None:
    found = membership.discovery(SETTINGS, None)
    assert list(found.members()) == ["10.0.0.2:7311"]
    with pytest.raises(errors.InvalidInputError):
        membership.Static(["no port"])


def test_the_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        if name != "agents.test":
            raise socket.gaierror("unknown")
        places = [("10.0.0.2", port), ("10.0.0.1", port), ("fd00::1", port, 0, 0), ("10.0.0.2", port)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    settings = config.Peers(listen="10.0.0.1:7311", discovery="dns", dns_name="agents.test")
    assert membership.discovery(settings, None).members() == [
        "10.0.0.1:7311",
        "10.0.0.2:7311",
        "[fd00::1]:7311",
    ]
    with pytest.raises(errors.UnavailableError):
        membership.Dns("other.test", 1).members()


@pytest.mark.parametrize(
    "settings",
    [
        config.Peers(listen="10.0.0.1:1", discovery="dns"),
        config.Peers(listen="10.0.0.1:1", discovery="endpointslice"),
        config.Peers(listen="10.0.0.1:1", discovery="endpointslice", service="a/b"),
    ],
)
def test_a_source_without_what_it_needs_is_refused(settings: config.Peers) -> None:
    with pytest.raises(errors.ConfigurationError):
        membership.discovery(settings, None)


def test_an_address_that_is_no_address_must_be_advertised() -> None:
    for listen in ("0.0.0.0:7311", "[::]:7311"):
        with pytest.raises(errors.ConfigurationError, match="advertise"):
            membership.own_address(config.Peers(listen=listen))
    assert membership.own_address(config.Peers(listen="0.0.0.0:1", advertise="node:2")) == "node:2"


def _slice(name: str, *addresses: str, ready: bool | None = True, service: str = "agents") -> dict[str, Any]:
    conditions = {} if ready is None else {"ready": ready}
    return {
        "metadata": {
            "namespace": "system",
            "name": name,
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 7310}, {"name": "peers", "port": 7311}],
        "endpoints": [{"addresses": [address], "conditions": conditions} for address in addresses],
    }


def test_the_ready_endpoints_of_a_service() -> None:
    with KubernetesApi() as api:
        api.put("discovery.k8s.io/v1/endpointslices", _slice("one", "10.0.0.2", "10.0.0.1"))
        api.put("discovery.k8s.io/v1/endpointslices", _slice("two", "10.0.0.9", ready=False))
        api.put("discovery.k8s.io/v1/endpointslices", _slice("other", "10.9.9.9", service="web"))
        settings = config.Peers(listen="10.0.0.1:7311", discovery="endpointslice", service="system/agents")
        found = membership.discovery(settings, kubernetes.connect(config.Kubernetes(api_url=api.url)))
        try:
            assert found.members() == ["10.0.0.1:7311", "10.0.0.2:7311"]
            api.put("discovery.k8s.io/v1/endpointslices", _slice("two", "10.0.0.9", ready=None))
            scripted.eventually(lambda: "10.0.0.9:7311" in found.members())
            api.delete("discovery.k8s.io/v1/endpointslices", "system", "one")
            scripted.eventually(lambda: found.members() == ["10.0.0.9:7311"])
        finally:
            found.close()


@pytest.mark.parametrize(
    "change",
    [
        {"ports": []},
        {"ports": None},
        {"ports": [{"port": 0}]},
        {"ports": "x"},
        {"endpoints": [1]},
        {"endpoints": [{"addresses": "10.0.0.1"}]},
    ],
)
def test_a_slice_that_is_none_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidInputError):
        membership.slice_members({**_slice("one", "10.0.0.1"), **change})
    assert membership.slice_members({**_slice("one", "x"), "addressType": "FQDN"}) is None
