"""What a listener asks of requests: TLS, keys, shares, sizes; and how these change while it serves."""

from __future__ import annotations

import dataclasses
import datetime
import http.client
import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serving import errors
from serving import service as services
from serving.router import bootstrap, control, envoy
from tests.serving.router import world

SETTINGS = services.RouteSettings(health_path=None)


class Authority:
    """A CA, and certificates of it."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = _certificate(self._name, self._name, self._key, self._key, authority=True)

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str) -> tuple[bytes, bytes]:
        """Certificate and key of `name`.localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = _certificate(subject, self._name, key, self._key, authority=False)
        return made.public_bytes(serialization.Encoding.PEM), key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    authority: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(signer, hashes.SHA256())
    )


def _is_refused(port: int, context: ssl.SSLContext) -> bool:
    try:
        _over_tls(port, context)
    except (ssl.SSLError, ConnectionError):
        return True
    return False


@pytest.fixture
def front(tmp_path: Path) -> Iterator[world.Front]:
    with world.Front(tmp_path / "e") as made:
        yield made


def _over_tls(port: int, context: ssl.SSLContext) -> tuple[int, str]:
    """The status, and the name in the certificate that was shown."""
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=world.WAIT_SECONDS)
    connection.connect()
    shown = connection.sock.getpeercert()
    connection.request("GET", "/")
    status = connection.getresponse().status
    connection.close()
    return status, shown["subject"][0][0][1]


def test_tls_and_its_rotation_drain_no_connection(front: world.Front) -> None:
    ours, theirs = Authority("ours"), Authority("theirs")
    client = ssl.create_default_context(cadata=ours.pem.decode())
    with world.backends("a") as (a,):

        def service(tls: services.Tls) -> services.Service:
            listen = services.Listen(front.port, tls=tls)
            return services.Service("s", listen, (a.value(),), settings=SETTINGS)

        front.serve(service(services.Tls(*ours.issue("first"))))
        assert _over_tls(front.port, client) == (200, "first")
        kept = http.client.HTTPSConnection("localhost", front.port, context=client)
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"a"
        front.serve(service(services.Tls(*ours.issue("second"))))
        world.until(lambda: _over_tls(front.port, client) == (200, "second"))
        kept.request("GET", "/")
        answer = kept.getresponse()
        assert answer.read() == b"a"
        assert answer.getheader("connection") != "close"
        kept.close()

        front.serve(service(services.Tls(*ours.issue("third"), client_ca_pem=theirs.pem)))
        world.until(lambda: _is_refused(front.port, client))
        certificate, key = theirs.issue("client")
        pair = front.directory / "client.pem"
        pair.write_bytes(certificate + key)
        client.load_cert_chain(pair)
        world.until(lambda: _over_tls(front.port, client) == (200, "third"))


def test_keys_are_needed_name_the_tenant_and_rotate(front: world.Front) -> None:
    with world.backends("a") as (a,):
        service = services.Service(
            "s", front.listen, (a.value(),), keys=(services.Key("acme", "old"),), settings=SETTINGS
        )
        front.serve(service)
        forged = {"x-glowplug-tenant": "other"}
        assert front.get(headers=forged)[0] == 401
        assert front.get(headers={"authorization": "Bearer olda"})[0] == 401
        assert a.served == 0
        assert front.get(headers={"authorization": "Bearer old", **forged}) == (200, "a")
        assert front.get(headers={"x-api-key": "old"}) == (200, "a")
        for seen in a.headers:
            names = {name.lower(): value for name, value in seen.items()}
            assert names["x-glowplug-tenant"] == "acme"
            assert not names.keys() & {"authorization", "x-api-key"}
        both = (services.Key("acme", "old"), services.Key("acme", "new"))
        front.serve(dataclasses.replace(service, keys=both))
        world.until(lambda: front.get(headers={"x-api-key": "new"})[0] == 200)
        assert front.get(headers={"x-api-key": "old"})[0] == 200
        front.serve(dataclasses.replace(service, keys=both[1:]))
        world.until(lambda: front.get(headers={"x-api-key": "old"})[0] == 401)
        assert front.get(headers={"x-api-key": "new"})[0] == 200


def test_without_keys_no_client_names_its_tenant(front: world.Front) -> None:
    with world.backends("a") as (a,):
        front.serve(services.Service("s", front.listen, (a.value(),), settings=SETTINGS))
        front.get(headers={"x-glowplug-tenant": "forged"})
        assert "x-glowplug-tenant" not in {name.lower() for name in a.headers[0]}


def test_a_tenant_has_one_share_whatever_its_keys(front: world.Front) -> None:
    with world.backends("a") as (a,):
        keys = (
            services.Key("small", "one", requests_per_second=2),
            services.Key("small", "two", requests_per_second=2),
            services.Key("large", "three"),
        )
        front.serve(services.Service("s", front.listen, (a.value(),), keys=keys, settings=SETTINGS))
        statuses = [front.get(headers={"x-api-key": name})[0] for name in ("one", "two") * 20]
        assert 0 < statuses.count(200) < 40
        assert set(statuses) == {200, 429}
        error = json.loads(next(text for status, text in _until_refused(front) if status == 429))["error"]
        assert (error["type"], error["limit"]) == ("rate_limit_exceeded", "requests_per_second")
        assert {front.get(headers={"x-api-key": "three"})[0] for _ in range(20)} == {200}


def _until_refused(front: world.Front) -> Iterator[tuple[int, str]]:
    while True:
        yield front.get(headers={"x-api-key": "one"})


def test_a_request_that_is_too_large_is_413(front: world.Front) -> None:
    with world.backends("a") as (a,):
        settings = dataclasses.replace(SETTINGS, max_request_bytes=10_000)
        front.serve(services.Service("s", front.listen, (a.value(),), settings=settings))
        assert world.request(front.port, body=b"x" * 9_000) == (200, "a")
        status, text = world.request(front.port, body=b"x" * 50_000)
        assert status == 413
        assert json.loads(text)["error"]["code"] == 413


def test_services_share_a_listener_by_host_and_prefix(front: world.Front) -> None:
    with world.backends("a", "b", "c") as (a, b, c):
        front.serve(
            services.Service("a", front.listen, (a.value(),), settings=SETTINGS),
            services.Service("b", front.listen, (b.value(),), prefix="/b", settings=SETTINGS),
            services.Service("c", front.listen, (c.value(),), hosts=("c.test",), settings=SETTINGS),
        )
        assert front.get("/x")[1] == "a"
        assert front.get("/b/x")[1] == "b"
        assert front.get("/x", {"host": "c.test"})[1] == "c"
        assert front.get("/x", {"host": f"c.test:{front.port}"})[1] == "c"


def test_http2_on_both_sides(front: world.Front) -> None:
    """Envoy speaks HTTP/2 to its own second listener, which speaks HTTP/1 to the backend."""
    with world.backends("a") as (a,):
        second = services.Listen(world.free_port())
        inner = services.Service("inner", second, (a.value(),), settings=SETTINGS)
        there = (services.Backend("127.0.0.1", second.port),)
        http2 = dataclasses.replace(SETTINGS, http2=True)
        front.serve(inner, services.Service("outer", front.listen, there, settings=http2))
        assert front.get() == (200, "a")
        # A backend without HTTP/2 is not tried in HTTP/1.
        front.serve(services.Service("outer", front.listen, (a.value(),), settings=http2))
        assert front.get()[0] in (502, 503)
        assert a.served == 1


def test_what_fails_is_logged_and_all_where_it_is_wanted(front: world.Front) -> None:
    log = front.directory / "access.log"
    with world.backends("a") as (a,):
        service = services.Service("s", front.listen, (a.value(),), settings=SETTINGS)
        front.serve(service)
        front.get("/quiet")
        a.status = 500
        front.get("/failed?secret=1")
        a.status = 200
        wanted = dataclasses.replace(SETTINGS, access_log=True)
        front.serve(dataclasses.replace(service, settings=wanted))
        front.get("/wanted")

        def logged() -> list[dict[str, object]]:
            return [json.loads(line) for line in log.read_text().splitlines()]

        world.until(lambda: any(line["path"] == "/wanted" for line in logged()))
        assert [line["path"] for line in logged()] == ["/failed", "/wanted"]
        assert logged()[0]["status"] == 500
        assert logged()[0]["service"] == "s"


def test_xds_and_load_reports_by_mutual_tls_and_their_rotation(tmp_path: Path) -> None:
    ours, strangers = Authority("ours"), Authority("strangers")
    at_router, at_envoy = tmp_path / "router", tmp_path / "envoy"
    for directory in (at_router, at_envoy):
        directory.mkdir(mode=0o700)

    def install(directory: Path, by: Authority, ca: Authority) -> None:
        certificate, key = by.issue("x")
        for name, data in (("tls.crt", certificate), ("tls.key", key), ("ca.crt", ca.pem)):
            draft = directory / f".{name}"
            draft.write_bytes(data)
            draft.rename(directory / name)

    install(at_router, ours, ours)
    install(at_envoy, strangers, ours)
    files = control.ServerTls(at_router / "tls.crt", at_router / "tls.key", at_router / "ca.crt")
    router = control.Router("127.0.0.1:0", files)
    router.start()
    names = [f"{at_envoy}/{name}" for name in ("tls.crt", "tls.key", "ca.crt")]
    tls = bootstrap.ClientTls(str(at_envoy), str(at_envoy), *names, "localhost")
    for file, secret in bootstrap.secrets(tls).items():
        (at_envoy / file).write_text(json.dumps(secret))
    admin = f"{at_envoy}/admin.sock"
    settings = bootstrap.Settings(node="far", control=("127.0.0.1", router.port), admin=admin, tls=tls)
    far = envoy.Envoy(at_envoy, settings, workers=1)
    port = world.free_port()
    try:
        with world.backends("a") as (a,):
            service = services.Service("s", services.Listen(port), (a.value(),), settings=SETTINGS)
            router.update([service])
            far.start()
            world.until(lambda: _refused(far))
            assert router.nodes() == []
            install(at_envoy, ours, ours)
            world.until(router.nodes)
            far.wait_ready()
            assert world.request(port) == (200, "a")
            world.until(router.loads)
            assert oct((at_envoy / "admin.sock").stat().st_mode)[-3:] == "600"
    finally:
        far.stop()
        router.stop()


def _refused(far: envoy.Envoy) -> bool:
    """TLS 1.3 tells a client after its handshake that its certificate is not wanted."""
    return b"connected_state: 0" in far.administer("GET", "/stats?filter=control_plane.connected_state")


def test_xds_for_other_machines_needs_certificates(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="certificate"):
        control.Router("0.0.0.0:0").start()
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(errors.ConfigurationError, match="chmod 700"):
        control.Router(f"unix:{tmp_path}/open/xds.sock").start()
