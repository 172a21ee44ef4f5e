"""Blocks for other nodes: a real device server behind the listener, asked over real sockets."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.client
import ipaddress
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent import config, guests, membership, peers
from agent.observer import Observer
from imagefs import errors, peerhttp, plan
from imagefs.fuse import control, peering
from imagefs.peersettings import PeerSettings
from tests.imagefs.fuse import packing, stack

pytestmark = pytest.mark.root

BLOCK_BYTES = 65536
IMAGE = stack.layer_image(12 * BLOCK_BYTES, 77)
LAYER = stack.make_layer(IMAGE)
OTHER = stack.make_layer(stack.random_image(4 * BLOCK_BYTES, 78))


@pytest.fixture(scope="module")
def origin() -> Iterator[stack.BlobServer]:
    server = stack.BlobServer()
    server.add(LAYER)
    server.add(OTHER)
    yield server
    server.close()


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> control.ServerSettings:
    return stack.settings(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def home(values: control.ServerSettings, origin: stack.BlobServer) -> Iterator[control.DeviceClient]:
    """A device server that has LAYER."""
    with stack.running(values) as client:
        client.attach("image", [LAYER.spec(origin.ref())], stack.OPTIONS)
        yield client


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclasses.dataclass
class Node:
    """A listener that runs."""

    settings: config.Peers
    sharing: peers.Sharing

    @property
    def address(self) -> str:
        return str(self.settings.listen)

    def get(self, target: str, **fields: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", target, headers=fields)
            response = connection.getresponse()
            return response.status, response.read()

    def block(self, spec: control.LayerSpec, index: int, **fields: str) -> tuple[int, bytes]:
        return self.get(peering.encode_target(spec, index, plan.Priority.DEMAND), **fields)


@contextlib.contextmanager
def sharing(
    client: control.DeviceClient, values: control.ServerSettings, **changes: object
) -> Iterator[Node]:
    settings = config.Peers(listen=f"127.0.0.1:{free_port()}", insecure=True)
    settings = dataclasses.replace(settings, **changes)  # type: ignore[arg-type]
    made = peers.Sharing(
        settings,
        values.state_dir,
        lambda: client,
        stack.OPTIONS,
        membership.discovery(settings, None),
        Observer(),
    )
    made.start()
    node = Node(settings, made)
    try:
        stack.eventually(lambda: client.status()["peers"]["members"] > 0, "the device server was told")
        yield node
    finally:
        made.stop()
        client.set_peers(None)


def owners(client: control.DeviceClient, layer: stack.Layer) -> list[str]:
    devices = client.status()["devices"]
    return [owner for d in devices if d["map_digest"] == layer.map_digest for owner in d["owners"]]


def test_blocks_on_a_kept_connection(
    home: control.DeviceClient, values: control.ServerSettings, origin: stack.BlobServer
) -> None:
    with sharing(home, values) as node:
        connection = http.client.HTTPConnection(node.address, timeout=30)
        for index in (11, 0, 5):
            target = peering.encode_target(LAYER.spec(origin.ref()), index, plan.Priority.DEMAND)
            connection.request("GET", target)
            response = connection.getresponse()
            assert response.status == 200
            assert response.length == BLOCK_BYTES
            assert response.read() == IMAGE[index * BLOCK_BYTES :][:BLOCK_BYTES]
        sock = connection.sock
        connection.request("GET", peerhttp.PROBE_TARGET)
        assert connection.getresponse().status == 204
        assert connection.sock is sock
        connection.close()


def test_a_second_node_reads_through_the_first(
    tmp_path: Path, home: control.DeviceClient, values: control.ServerSettings, origin: stack.BlobServer
) -> None:
    with sharing(home, values) as node, stack.running(stack.settings(tmp_path)) as asker:
        (device,) = asker.attach("image", [LAYER.spec(origin.ref())], stack.OPTIONS)
        asker.set_peers(PeerSettings("127.0.0.1:1", (node.address,)))
        before = origin.requests
        assert stack.Reader(device).outcome() == stack.digest(IMAGE)
        fetch = asker.status()["fetch"]
        assert (fetch["peer_blocks"], fetch["peer_bytes"]) == (12, len(IMAGE))
        assert fetch["origin_requests"] == 0
        assert asker.status()["peers"] == {
            "address": "127.0.0.1:1",
            "members": 1,
            "down": {},
            "waiting": 0,
        }
        assert origin.requests - before <= 12, "the home asks for each block once"


def _frames(pack: packing.Pack, index: int) -> bytes:
    """What a frame of a pack of LAYER holds."""
    (piece, *others) = list(pack.table.pieces())[index]
    assert not others
    return IMAGE[piece.first_page * 4096 :][: piece.pages * 4096]


@pytest.mark.parametrize("home_starts_it", [True, False])
def test_a_boot_pack_comes_from_a_peer(
    tmp_path: Path,
    home: control.DeviceClient,
    values: control.ServerSettings,
    origin: stack.BlobServer,
    home_starts_it: bool,
) -> None:
    """Whether or not that node starts the image, too; a reader waits for what is on its way."""
    pack = packing.make([LAYER], [(0, 10, 100)] if home_starts_it else [(0, 20, 100)])
    spec = packing.add(origin, pack)
    with (
        sharing(home, values, origins=(origin.ref(),)) as node,
        stack.running(stack.settings(tmp_path)) as asker,
    ):
        if home_starts_it:
            home.attach("started", [LAYER.spec(origin.ref())], stack.OPTIONS, spec)
        asker.set_peers(PeerSettings("127.0.0.1:1", (node.address,)))
        (device,) = asker.attach("image", [LAYER.spec(origin.ref())], stack.OPTIONS, spec)
        assert stack.Reader(device).outcome() == stack.digest(IMAGE)
        stack.eventually(lambda: asker.status()["boot_packs"][0]["present_frames"] == 7, "all frames")
        assert asker.status()["fetch"]["origin_requests"] == 0
        as_layer = control.LayerSpec(
            origin.ref(), spec.table_digest, spec.table_size, spec.data_digest, spec.data_size
        )
        for index in (0, 6):
            assert node.block(as_layer, index) == (200, _frames(pack, index))
        found = [d for d in home.status()["devices"] if d["map_digest"] == spec.table_digest]
        assert [d["owners"] for d in found] == ([] if home_starts_it else [[f"peer:{spec.table_digest}"]])
        assert node.block(as_layer, 7)[0] == 404
        home.detach("started")


def test_frames_come_from_the_origin_where_the_peer_is_dead(tmp_path: Path, origin: stack.BlobServer) -> None:
    pack = packing.make([LAYER], [(0, 30, 100)])
    with stack.running(stack.settings(tmp_path)) as asker:
        asker.set_peers(PeerSettings("127.0.0.1:1", (f"127.0.0.1:{free_port()}",)))
        spec = packing.add(origin, pack)
        (device,) = asker.attach("image", [LAYER.spec(origin.ref())], stack.OPTIONS, spec)
        assert stack.Reader(device).outcome() == stack.digest(IMAGE)
        stack.eventually(lambda: asker.status()["boot_packs"][0]["present_frames"] == 7, "all frames")
        assert asker.status()["boot_packs"][0]["failed_frames"] == 0


def test_a_layer_that_only_others_use_is_attached_and_let_go(
    home: control.DeviceClient,
    values: control.ServerSettings,
    origin: stack.BlobServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = OTHER.spec(origin.ref(), with_map=False)
    with sharing(home, values, origins=(origin.ref(),)) as node:
        assert owners(home, OTHER) == []
        outcomes: list[tuple[int, bytes]] = []
        threads = [
            threading.Thread(target=lambda index=index: outcomes.append(node.block(spec, index % 4)))
            for index in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {status for status, _ in outcomes} == {200}
        assert b"".join(sorted({body for _, body in outcomes})) == b"".join(
            sorted(
                OTHER.image[start : start + BLOCK_BYTES] for start in range(0, 4 * BLOCK_BYTES, BLOCK_BYTES)
            )
        )
        assert owners(home, OTHER) == [f"peer:{OTHER.map_digest}"]
    assert owners(home, OTHER), "it stays over a restart of the agent"
    monkeypatch.setattr(guests, "_SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(guests, "_IDLE_SECONDS", 0.0)
    with sharing(home, values):
        stack.eventually(lambda: owners(home, OTHER) == [], "the next agent lets go of it")
    assert owners(home, LAYER) == ["image"]


@pytest.mark.parametrize(
    ("ref", "changes"),
    [
        ("docker://127.0.0.1:5000/a/b", {"insecure": False, "token": True}),
        ("docker://registry.test/a/b", {}),
        ("docker://registry.test/other/b", {"origins": ("docker://registry.test/team",)}),
        ("docker://registry.test/teams/b", {"origins": ("docker://registry.test/team",)}),
        ("oci:/etc", {"origins": ("oci:/etc",)}),
        ("docker://registry.test/a/b:tag", {"origins": ("docker://registry.test/",)}),
        ("nonsense", {"origins": ("nonsense",)}),
    ],
)
def test_origins_that_nobody_may_name(tmp_path: Path, ref: str, changes: dict[str, object]) -> None:
    token = changes.pop("token", False)
    settings = config.Peers(listen="127.0.0.1:1", insecure=True)
    if token:
        settings = dataclasses.replace(settings, token_file=tmp_path / "token")
    with pytest.raises(errors.DeniedError):
        guests.check_origin(dataclasses.replace(settings, **changes), ref)  # type: ignore[arg-type]


def test_origins_that_may_be_named(tmp_path: Path) -> None:
    with_token = config.Peers(token_file=tmp_path / "token")
    guests.check_origin(with_token, "docker://registry.test/a/b")
    guests.check_origin(with_token, "s3://bucket/prefix")
    listed = config.Peers(insecure=True, origins=("docker://registry.test/team/", "s3://bucket"))
    guests.check_origin(listed, "docker://registry.test/team/b")
    guests.check_origin(listed, "docker://registry.test/team")
    guests.check_origin(listed, "s3://bucket/any")


def test_a_stranger_gets_what_is_here_and_makes_us_fetch_nothing(
    home: control.DeviceClient, values: control.ServerSettings, origin: stack.BlobServer
) -> None:
    with sharing(home, values) as node:
        assert node.block(LAYER.spec(origin.ref()), 0)[0] == 200
        before = origin.requests
        assert node.block(OTHER.spec(origin.ref()), 0)[0] == 403
        assert origin.requests == before
        assert node.get("/peer/v1/blocks/x/0?origin_ref=y")[0] == 400
        assert node.get("/metrics")[0] == 404
        assert node.get("/peer/v1/health?" + "x" * 10_000)[0] == 400
        spec = dataclasses.replace(LAYER.spec(origin.ref()), map_size=2**62)
        assert node.block(spec, 99)[0] == 403, "no such block, and a map that is too large to look"


def test_the_token_decides(
    tmp_path: Path, home: control.DeviceClient, values: control.ServerSettings, origin: stack.BlobServer
) -> None:
    token = tmp_path / "token"
    token.write_text("new secret\nold\n".replace(" ", "-"))
    spec = LAYER.spec(origin.ref())
    with sharing(home, values, token_file=token, insecure=False) as node:
        for fields in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
            assert node.block(spec, 0, **fields)[0] == 401
            assert node.get(peerhttp.PROBE_TARGET, **fields)[0] == 401
        for secret in ("new-secret", "old"):
            assert node.block(spec, 0, Authorization=f"Bearer {secret}")[0] == 200
        token.write_text("newer\n")
        assert node.block(spec, 0, Authorization="Bearer old")[0] == 401
        assert node.block(spec, 0, Authorization="Bearer newer")[0] == 200


def test_no_listener_without_authentication(tmp_path: Path) -> None:
    for settings in (
        config.Peers(listen="127.0.0.1:1"),
        config.Peers(listen="127.0.0.1:1", tls_ca=tmp_path, tls_key=tmp_path),
        config.Peers(listen="127.0.0.1:1", insecure=True, tls_certificate=tmp_path),
    ):
        with pytest.raises(errors.ConfigurationError):
            peers.check(settings)
    with pytest.raises(errors.InvalidInputError):
        peers.check(config.Peers(listen="here", insecure=True))


# -- mTLS ---------------------------------------------------------------------------------------------


def _authority(directory: Path, name: str) -> tuple[Path, Path, Path]:
    """A CA, and a certificate with key that it gave to a node."""
    now = datetime.datetime.now(datetime.UTC)
    directory.mkdir()

    def build(subject: str, public: object, ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .public_key(public)  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = build(name, ca_key.public_key(), True).sign(ca_key, hashes.SHA256())
    node = (
        build("node", key.public_key(), False)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("192.0.2.9"))]), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    paths = directory / "ca.pem", directory / "node.pem", directory / "node.key"
    paths[0].write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(node.public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths


def test_only_the_cluster_s_certificates_are_let_in(
    tmp_path: Path, home: control.DeviceClient, values: control.ServerSettings, origin: stack.BlobServer
) -> None:
    ca, certificate, key = _authority(tmp_path / "cluster", "cluster")
    wrong_ca, wrong_certificate, wrong_key = _authority(tmp_path / "other", "other")
    target = peering.encode_target(LAYER.spec(origin.ref()), 2, plan.Priority.DEMAND)
    changes = {"tls_ca": ca, "tls_certificate": certificate, "tls_key": key, "insecure": False}
    with sharing(home, values, **changes) as node:
        ours = PeerSettings(
            "127.0.0.1:1",
            (node.address,),
            tls_ca=ca,
            tls_certificate=certificate,
            tls_key=key,
            connect_timeout_seconds=10,
        )
        deadline = time.monotonic() + 60
        connections = peerhttp.Connections(ours)
        body = connections.open(node.address, target, BLOCK_BYTES, deadline)
        data = bytearray()
        while len(data) < BLOCK_BYTES:
            data += body.read_piece(BLOCK_BYTES - len(data))
        assert data == IMAGE[2 * BLOCK_BYTES : 3 * BLOCK_BYTES]
        body.close()
        assert connections.probe(node.address, deadline)
        connections.close()
        for changed in (
            {"tls_ca": wrong_ca},
            {"tls_certificate": wrong_certificate, "tls_key": wrong_key},
            {"tls_certificate": None, "tls_key": None},
            {"tls_certificate": None, "tls_key": None, "tls_ca": None},
        ):
            other = peerhttp.Connections(dataclasses.replace(ours, **changed))  # type: ignore[arg-type]
            with pytest.raises(errors.UnavailableError):
                other.open(node.address, target, BLOCK_BYTES, deadline)
            assert not other.probe(node.address, deadline)
            other.close()
    with pytest.raises(errors.ConfigurationError), sharing(home, values, **{**changes, "tls_key": ca}):
        pass


# -- limits and faults --------------------------------------------------------------------------------


def test_an_origin_that_hangs_holds_nobody_for_ever(
    tmp_path: Path, origin: stack.BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_WAIT_SECONDS", 0.2)
    own = stack.settings(tmp_path)
    with stack.running(own) as client:
        client.attach("image", [LAYER.spec(origin.ref())], stack.OPTIONS)
        with sharing(client, own) as node:
            origin.open.clear()
            try:
                assert node.block(LAYER.spec(origin.ref()), 0)[0] == 503
            finally:
                origin.open.set()


def test_requests_at_a_time_are_bounded(
    tmp_path: Path, origin: stack.BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_MAX_REQUESTS_PER_ADDRESS", 3)
    own = stack.settings(tmp_path)
    spec = LAYER.spec(origin.ref())
    outcomes: list[int] = []
    with stack.running(own) as client:
        client.attach("image", [spec], stack.OPTIONS)
        with sharing(client, own) as node:
            before = origin.requests
            origin.open.clear()
            try:
                threads = [
                    threading.Thread(target=lambda index=index: outcomes.append(node.block(spec, index)[0]))
                    for index in range(3)
                ]
                for thread in threads:
                    thread.start()
                stack.eventually(lambda: origin.requests - before == 3, "three are under way")
                assert node.block(spec, 9)[0] == 503
            finally:
                origin.open.set()
            for thread in threads:
                thread.join()
            assert outcomes == [200, 200, 200]
            assert node.block(spec, 9)[0] == 200


def test_connections_are_bounded(
    home: control.DeviceClient,
    values: control.ServerSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "_MAX_CONNECTIONS", 2)
    with sharing(home, values) as node, contextlib.ExitStack() as stack_:
        host, _, port = node.address.partition(":")
        kept = []
        for _ in range(2):
            connection = http.client.HTTPConnection(host, int(port), timeout=30)
            stack_.callback(connection.close)
            connection.request("GET", peerhttp.PROBE_TARGET)
            assert connection.getresponse().status == 204
            kept.append(connection)
        third = stack_.enter_context(socket.create_connection((host, int(port)), 30))
        assert third.recv(1) == b""


def test_a_device_server_that_is_killed_is_found_again_and_told_again(
    tmp_path: Path, origin: stack.BlobServer
) -> None:
    own = stack.settings(tmp_path)
    spec = LAYER.spec(origin.ref())
    with stack.running(own) as client:
        client.attach("image", [spec], stack.OPTIONS)
        members = ("127.0.0.1:2", "127.0.0.1:3")
        with sharing(client, own, members=members) as node:
            assert node.block(spec, 1)[0] == 200
            for _ in range(2):
                before = client.status()["processes"]["server"]
                os.kill(before, signal.SIGKILL)
                stack.eventually(lambda: node.block(spec, 1)[0] == 200, "blocks again")
                assert client.status()["processes"]["server"] != before
                stack.eventually(lambda: client.status()["peers"]["members"] == 3, "told again")


def test_a_peer_that_leaves_in_the_middle_costs_nothing(
    home: control.DeviceClient, values: control.ServerSettings, origin: stack.BlobServer
) -> None:
    target = peering.encode_target(LAYER.spec(origin.ref()), 0, plan.Priority.DEMAND)
    with sharing(home, values) as node:
        host, _, port = node.address.partition(":")
        for _ in range(40):
            with socket.create_connection((host, int(port)), 30) as connection:
                connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        stack.eventually(lambda: node.block(LAYER.spec(origin.ref()), 0)[0] == 200, "it still serves")


def test_plain_http_is_not_spoken_where_tls_is(
    tmp_path: Path, home: control.DeviceClient, values: control.ServerSettings
) -> None:
    ca, certificate, key = _authority(tmp_path / "cluster", "cluster")
    changes = {"tls_ca": ca, "tls_certificate": certificate, "tls_key": key, "insecure": False}
    with sharing(home, values, **changes) as node:
        with pytest.raises((OSError, http.client.HTTPException)):
            node.get(peerhttp.PROBE_TARGET)
        context = ssl.create_default_context(cafile=ca)
        context.check_hostname = False
        connection = http.client.HTTPSConnection(node.address, timeout=30, context=context)

        def ask() -> None:
            connection.request("GET", peerhttp.PROBE_TARGET)
            connection.getresponse()

        with contextlib.closing(connection), pytest.raises((OSError, http.client.HTTPException)):
            ask()
