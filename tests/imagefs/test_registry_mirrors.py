"""Reading through containerd's mirrors: real registries, one of which is the mirror of the other."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs import artifact, errors
from imagefs.origin import BytesSource, connect, mirrors, registry, retry, transport
from imagefs.reference import parse
from tests.fixtures import servers
from tests.fixtures.servers import Fault, FaultProxy, RegistryServer

QUICK = retry.Policy(attempts=2, first_delay_seconds=0.001, max_delay_seconds=0.002)
DATA = bytes(range(256)) * 64


@pytest.fixture
def mirror(registry: RegistryServer) -> Iterator[FaultProxy]:
    """A mirror that has everything the registry has, and can misbehave."""
    proxy = FaultProxy(registry.host)
    yield proxy
    proxy.close()


@pytest.fixture
def server(registry: RegistryServer) -> Iterator[FaultProxy]:
    """The registry itself, watched."""
    proxy = FaultProxy(registry.host)
    yield proxy
    proxy.close()


def configure(directory: Path, host: str, text: str) -> Path:
    name, _, port = host.rpartition(":")
    folder = directory / f"{name}_{port}_"
    folder.mkdir(exist_ok=True)
    (folder / "hosts.toml").write_text(text)
    return directory


def table(host: str, *lines: str) -> str:
    return f'[host."http://{host}"]\n' + "".join(f"{line}\n" for line in lines)


def origin_at(host: str, directory: Path | None, repository: str = "") -> registry.RegistryOrigin:
    return registry.RegistryOrigin(
        host,
        repository or servers.unique_name("mirrors"),
        transport.Settings(connect_timeout_seconds=2, read_timeout_seconds=2),
        Path("/absent"),
        QUICK,
        hosts_directory=directory,
    )


def put(origin: registry.RegistryOrigin, data: bytes = DATA) -> str:
    digest = artifact.digest_of(data)
    origin.put_blob(digest, len(data), BytesSource(data))
    return digest


def put_manifest(origin: registry.RegistryOrigin, tag: str | None, subject: str | None = None) -> str:
    config = put(origin, b"{}")
    descriptor = {"mediaType": artifact.OCI_CONFIG, "digest": config, "size": 2}
    document = {
        "schemaVersion": 2,
        "mediaType": artifact.OCI_MANIFEST,
        "artifactType": "application/x-test",
        "config": descriptor,
        "layers": [],
        "annotations": {"made-for": origin.repository},
    }
    if subject is not None:
        document["subject"] = {"mediaType": artifact.OCI_MANIFEST, "digest": subject, "size": 1}
    return origin.put_manifest(artifact.canonical_json(document), artifact.OCI_MANIFEST, tag)


class TestOrder:
    def test_reads_go_to_the_mirror_and_writes_to_the_registry(
        self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path
    ) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        digest = put(origin)
        made = put_manifest(origin, "v1")
        assert not mirror.seen("PUT")
        assert not mirror.seen("POST")
        assert not mirror.seen("HEAD"), "whether a blob must be written is the registry's to say"
        server.clear()
        assert origin.read_manifest("v1").digest == made
        assert origin.read_manifest(made).digest == made
        assert origin.read_blob(digest, len(DATA)) == DATA
        assert b"".join(origin.stream_range(digest, 100, 1000)) == DATA[100:1100]
        assert not server.seen()
        assert all(f"?ns={server.host.replace(':', '%3A')}" in seen.path for seen in mirror.seen())

    def test_in_the_order_of_the_file(
        self, server: FaultProxy, mirror: FaultProxy, fault_server: FaultProxy, tmp_path: Path
    ) -> None:
        fault_server.upstream = server.upstream
        text = table(fault_server.host) + table(mirror.host)
        origin = origin_at(server.host, configure(tmp_path, server.host, text))
        digest = put(origin)
        origin.read_blob(digest, len(DATA))
        assert fault_server.seen("GET", digest)
        assert not mirror.seen()

    def test_a_mirror_that_may_only_pull_is_not_asked_for_tags(
        self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path
    ) -> None:
        text = table(mirror.host, 'capabilities = ["pull"]')
        origin = origin_at(server.host, configure(tmp_path, server.host, text))
        made = put_manifest(origin, "v1")
        assert origin.read_manifest("v1").digest == made
        assert not mirror.seen()
        origin.referrers(made)
        assert not mirror.seen()
        server.clear()
        origin.read_manifest(made)
        assert mirror.seen()
        assert not server.seen()

    def test_path_and_header(self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
        name = f'host."{mirror.url}/proxy/hub"'
        text = f'[{name}]\noverride_path = true\n[{name}.header]\nX-A = "b"\n'
        origin = origin_at(server.host, configure(tmp_path, server.host, text))
        digest = put(origin)
        mirror.serve(f"/proxy/hub/{origin.repository}/blobs/{digest}", DATA)
        assert origin.read_blob(digest, len(DATA)) == DATA
        [seen] = mirror.seen()
        assert seen.fields["x-a"] == "b"
        assert all("x-a" not in seen.fields for seen in server.seen())

    def test_the_default_folder(self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
        (tmp_path / "_default").mkdir()
        (tmp_path / "_default" / "hosts.toml").write_text(table(mirror.host))
        origin = origin_at(server.host, tmp_path)
        digest = put(origin)
        origin.read_blob(digest, len(DATA))
        assert mirror.seen("GET", digest)

    def test_by_the_options_that_travel(self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
        directory = configure(tmp_path, server.host, table(mirror.host))
        options = connect.Options.from_json(connect.Options(hosts_directory=directory).to_json())
        origin = connect.connect(parse(f"docker://{server.host}/a/b"), options)
        with pytest.raises(errors.NotFoundError):
            origin.read_manifest("v1")
        assert mirror.seen()

    def test_a_change_counts_while_layers_are_attached(
        self,
        server: FaultProxy,
        mirror: FaultProxy,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(mirrors, "LOOK_SECONDS", 0)
        origin = origin_at(server.host, tmp_path)
        digest = put(origin)
        configure(tmp_path, server.host, table(mirror.host))
        origin.read_blob(digest, len(DATA))
        assert len(mirror.seen("GET", digest)) == 1
        configure(tmp_path, server.host, "broken")
        origin.read_blob(digest, len(DATA))
        assert len(mirror.seen("GET", digest)) == 2
        assert "hosts.toml" in caplog.text
        configure(tmp_path, server.host, "")
        server.clear()
        origin.read_blob(digest, len(DATA))
        assert server.seen("GET", digest)

    def test_no_mirrors_for_this_registry(self, server: FaultProxy, tmp_path: Path) -> None:
        origin = origin_at(server.host, tmp_path)
        put(origin)

    def test_a_file_that_is_broken_is_named(self, server: FaultProxy, tmp_path: Path) -> None:
        with pytest.raises(errors.ConfigurationError, match=r"hosts\.toml"):
            origin_at(server.host, configure(tmp_path, server.host, "broken"))


class TestFallingOver:
    @pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503, 416])
    def test_statuses(self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path, status: int) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        digest = put(origin)
        mirror.add(Fault(status=status, times=None))
        assert b"".join(origin.stream_range(digest, 5, 50)) == DATA[5:55]
        assert mirror.seen("GET", digest)

    def test_nobody_there(self, server: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table("127.0.0.1:1")))
        digest = put(origin)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert origin.read_blob(digest, len(DATA)) == DATA
        assert caplog.text.count("mirror 127.0.0.1:1 is passed over") == 1

    def test_a_dead_mirror_is_asked_again_later(
        self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        digest = put(origin)
        mirror.add(Fault(status=503))
        origin.read_blob(digest, len(DATA))
        mirror.clear()
        origin.read_blob(digest, len(DATA))
        assert not mirror.seen()
        later = time.monotonic() + mirrors.DOWN_SECONDS
        monkeypatch.setattr(mirrors.time, "monotonic", lambda: later)
        origin.read_blob(digest, len(DATA))
        assert mirror.seen("GET", digest)

    def test_a_dead_registry_behind_a_mirror_that_stumbled(
        self, registry: RegistryServer, mirror: FaultProxy, tmp_path: Path
    ) -> None:
        repository = servers.unique_name("mirrors")
        digest = put(origin_at(registry.host, None, repository))
        directory = configure(tmp_path, "127.0.0.1:1", table(mirror.host))
        origin = origin_at("127.0.0.1:1", directory, repository)
        mirror.add(Fault(status=503))
        with pytest.raises(errors.UnavailableError, match=r"127\.0\.0\.1:1"):
            origin._open_blob(digest, 0, 10, None)
        assert origin.read_blob(digest, len(DATA)) == DATA, "the mirror is the last resort"

    def test_a_mirror_that_breaks_off(self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        digest = put(origin)
        mirror.add(Fault(close_after_bytes=1000, times=None))
        assert b"".join(origin.stream_range(digest, 0, len(DATA))) == DATA
        assert server.seen("GET", digest)

    def test_a_mirror_that_hangs_uses_half_the_time(
        self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path
    ) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        digest = put(origin)
        mirror.add(Fault(hang=True, times=None))
        deadline = time.monotonic() + 3
        assert b"".join(origin.stream_range(digest, 0, 10, deadline)) == DATA[:10]

    def test_a_mirror_that_lies(self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        digest = put(origin)
        made = put_manifest(origin, "v1")
        mirror.add(Fault(flip=True, times=None))
        assert origin.read_manifest(made).digest == made
        assert origin.read_blob(digest, len(DATA)) == DATA

    def test_a_mirror_that_lies_in_a_range_is_passed_over_once_its_reader_says_so(
        self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path
    ) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        digest = put(origin)
        mirror.add(Fault(flip=True, times=None))
        assert b"".join(origin.stream_range(digest, 0, 5000)) != DATA[:5000]
        origin.doubt(digest, errors.IntegrityError("not what the block map says"))
        assert b"".join(origin.stream_range(digest, 0, 5000)) == DATA[:5000]

    def test_what_is_not_there_is_not_there(
        self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path
    ) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        with pytest.raises(errors.NotFoundError, match=f"{server.host}"):
            origin.read_manifest("v1")
        assert mirror.seen()
        assert server.seen()

    def test_no_host_may(self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
        text = 'capabilities = ["push"]\n' + table(mirror.host, 'capabilities = ["pull"]')
        origin = origin_at(server.host, configure(tmp_path, server.host, text))
        with pytest.raises(errors.ConfigurationError, match="resolve"):
            origin.read_manifest("v1")


class TestReferrers:
    def test_a_mirror_that_knows_none_hides_none(
        self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path
    ) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        subject = put_manifest(origin, "v1")
        mirror.add(Fault(path="referrers/|manifests/sha256-", status=404, times=None))
        referrer = put_manifest(origin, None, subject)
        assert [found.digest for found in origin.referrers(subject)] == [referrer]
        empty = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
        mirror.clear()
        mirror.add(Fault(path="referrers/", status=200, body=empty, times=None))
        assert [found.digest for found in origin.referrers(subject)] == [referrer]

    def test_from_the_mirror(self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
        origin = origin_at(server.host, configure(tmp_path, server.host, table(mirror.host)))
        subject = put_manifest(origin, "v1")
        referrer = put_manifest(origin, None, subject)
        server.clear()
        assert [found.digest for found in origin.referrers(subject)] == [referrer]
        assert not server.seen()

    def test_an_unreachable_registry_is_not_an_image_without_referrers(
        self, registry: RegistryServer, mirror: FaultProxy, tmp_path: Path
    ) -> None:
        repository = servers.unique_name("mirrors")
        subject = put_manifest(origin_at(registry.host, None, repository), "v1")
        directory = configure(tmp_path, "127.0.0.1:1", table(mirror.host))
        with pytest.raises(errors.UnavailableError):
            origin_at("127.0.0.1:1", directory, repository).referrers(subject)


class TestSecrets:
    def test_credentials_of_the_registry_never_go_to_a_mirror(
        self, server: FaultProxy, mirror: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        auth = base64.b64encode(b"me:s3cret").decode()
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
        challenge = {"WWW-Authenticate": 'Basic realm="r"'}
        mirror.hook = lambda seen: (401, challenge, b"")
        server.hook = lambda seen: None if "authorization" in seen.fields else (401, challenge, b"")
        origin = registry.RegistryOrigin(
            server.host,
            servers.unique_name("mirrors"),
            transport.Settings(),
            config,
            QUICK,
            hosts_directory=configure(tmp_path, server.host, table(mirror.host)),
        )
        with caplog.at_level(logging.DEBUG):
            digest = put(origin)
            assert origin.read_blob(digest, len(DATA)) == DATA
        assert mirror.seen()
        assert all("authorization" not in seen.fields for seen in mirror.seen())
        assert "s3cret" not in caplog.text
        assert auth not in caplog.text


def test_tls_with_an_authority_and_without_verification(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", "/CN=t", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    with servers.run_registry(tmp_path / "registry", tls=(certificate, key)) as server:
        for line in (f'ca = "{certificate}"', "skip_verify = true"):
            directory = configure(tmp_path, server.host, f'server = "https://{server.host}"\n{line}\n')
            origin = origin_at(server.host, directory)
            assert origin.read_blob(put(origin), len(DATA)) == DATA
        folder = tmp_path / f"{server.host.replace(':', '_')}_"
        (folder / "hosts.toml").unlink()
        (folder / "ca.crt").write_bytes(certificate.read_bytes())
        origin = origin_at(server.host, tmp_path)
        assert origin.read_blob(put(origin), len(DATA)) == DATA


@pytest.mark.root
def test_asks_where_containerd_asks(server: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
    """containerd itself, with the same hosts.toml, is the oracle: same hosts, order, paths and queries."""
    hosts_file = f"""
server = "{server.url}"
[host."{mirror.url}/harbor/proxy"]
  capabilities = ["pull", "resolve"]
[host."{mirror.url}/over"]
  capabilities = ["pull", "resolve"]
  override_path = true
[host."{mirror.url}/v2"]
  capabilities = ["pull"]
"""
    name, repository = "reg.example:5000", servers.unique_name("oracle")
    directory = configure(tmp_path, name, hosts_file)

    def asked() -> list[str]:
        paths = [f"{seen.fields['host']}{seen.path}" for seen in (*mirror.seen(), *server.seen())]
        mirror.clear()
        server.clear()
        return paths

    with containerd(tmp_path) as socket:
        pull = ["images", "pull", "--hosts-dir", str(directory), f"{name}/{repository}:v1"]
        done = subprocess.run(["ctr", "--address", str(socket), *pull], capture_output=True, timeout=60)
    assert b"not found" in done.stderr
    expected = asked()
    assert len(expected) == 3
    with pytest.raises(errors.NotFoundError):
        origin_at(name, directory, repository).read_manifest("v1")
    assert asked() == expected


@contextlib.contextmanager
def containerd(directory: Path) -> Iterator[Path]:
    """A containerd of the test's own; yields its socket."""
    config, socket, log = directory / "config.toml", directory / "containerd.sock", directory / "log"
    config.write_text(
        f"""version = 2
root = "{directory / "root"}"
state = "{directory / "state"}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{socket}"
"""
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["containerd", "--config", str(config)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while not (process.poll() is not None or b"containerd successfully booted" in log.read_bytes()):
            time.sleep(0.05)
        assert process.poll() is None, log.read_text()
        yield socket
    finally:
        process.terminate()
        process.wait()
