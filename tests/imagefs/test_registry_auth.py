"""Authorization of the registry client: Basic on the real registry, Bearer with a token server, TLS; and
that credentials go nowhere else."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import logging
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs import artifact, errors
from imagefs.origin import BytesSource, registry, retry, transport
from tests.fixtures import servers
from tests.fixtures.servers import FaultProxy, RegistryServer, Reply, Seen

USER, PASSWORD = "warm", "warm:start"
# bcrypt of PASSWORD; a fixed salt and the least work.
HTPASSWD = "warm:$2b$04$abcdefghijklmnopqrstuu682wou5jVma/AnRu6TNMWvwgTLVHYa2\n"
IDENTITY_TOKEN = "identity-tok3n"
QUICK = retry.Policy(attempts=3, first_delay_seconds=0.001, max_delay_seconds=0.01)


def docker_config(directory: Path, host: str, password: str = PASSWORD, **entry: str) -> Path:
    entry = entry or {"auth": base64.b64encode(f"{USER}:{password}".encode()).decode()}
    path = directory / "config.json"
    path.write_text(json.dumps({"auths": {host: entry}}))
    return path


def origin_at(
    host: str, config: Path, repository: str = "", settings: transport.Settings | None = None
) -> registry.RegistryOrigin:
    return registry.RegistryOrigin(
        host, repository or servers.unique_name("auth"), settings or transport.Settings(), config, QUICK
    )


def put(origin: registry.RegistryOrigin, data: bytes) -> str:
    digest = artifact.digest_of(data)
    origin.put_blob(digest, len(data), BytesSource(data))
    return digest


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    directory = tmp_path_factory.mktemp("basic")
    (directory / "htpasswd").write_text(HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: r, path: {directory / 'htpasswd'}}}}}\n"
    with servers.run_registry(directory, auth) as server:
        yield server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(
        ["openssl", "req", *options.split(), "-addext", "subjectAltName=IP:127.0.0.1", *files],
        check=True,
        capture_output=True,
    )
    return certificate, key


class TestBasic:
    def test_round_trip(self, server: RegistryServer, tmp_path: Path) -> None:
        origin = origin_at(server.host, docker_config(tmp_path, server.host))
        data = bytes(3 << 20)
        assert origin.read_blob(put(origin, data), len(data)) == data

    def test_refused_then_logged_in(self, server: RegistryServer, tmp_path: Path) -> None:
        config = docker_config(tmp_path, server.host, "wr0ng")
        origin = origin_at(server.host, config)
        with pytest.raises(errors.DeniedError, match="docker login") as caught:
            origin.has_blob("sha256:" + "0" * 64)
        message = str(caught.value)
        assert server.host in message
        assert origin.repository in message
        assert str(config) in message
        assert "wr0ng" not in message
        docker_config(tmp_path, server.host)
        put(origin, b"works without a restart")

    def test_anonymous(self, server: RegistryServer, tmp_path: Path) -> None:
        origin = origin_at(server.host, tmp_path / "absent.json")
        with pytest.raises(errors.DeniedError, match=r"absent\.json"):
            put(origin, b"x")


class TokenServer:
    """A proxy that wants Bearer tokens for what lies behind it, and hands them out itself."""

    def __init__(self, proxy: FaultProxy, realm: str = "") -> None:
        self.proxy = proxy
        self.realm = realm or f"{proxy.url}/token?x=y"
        self.valid: dict[str, frozenset[str]] = {}
        self.made = 0
        self.expires_in: object = 300
        self.accepted = {""}
        proxy.hook = self.answer

    def answer(self, seen: Seen) -> Reply | None:
        if seen.path.startswith("/token"):
            return self.token(seen)
        authorization = seen.fields.get("authorization", "")
        scopes = self.valid.get(authorization.removeprefix("Bearer "), frozenset())
        repository = seen.path.removeprefix("/v2/").rpartition("/blobs/")[0] or "manifests"
        action = "pull" if seen.method in ("GET", "HEAD") and "uploads" not in seen.path else "pull,push"
        wanted = f"repository:{repository}:{action}"
        if any(scope == wanted or scope.endswith(f":{action}") for scope in scopes):
            return None
        challenge = f'Bearer realm="{self.realm}",service="the service",scope="{wanted}"'
        return 401, {"WWW-Authenticate": challenge}, b'{"errors":[{"code":"UNAUTHORIZED"}]}'

    def token(self, seen: Seen) -> Reply:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(seen.path).query)
        used = seen.fields.get("authorization", "")
        if seen.method == "POST":
            query = urllib.parse.parse_qs(seen.body.decode())
            used = query["refresh_token"][0]
        if used not in self.accepted or query.get("service") != ["the service"]:
            return 401, {}, json.dumps({"details": used}).encode()
        self.made += 1
        token = f"secr3t-{self.made}"
        self.valid[token] = frozenset(scope for field in query["scope"] for scope in field.split())
        return 200, {}, json.dumps({"access_token": token, "expires_in": self.expires_in}).encode()


BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


class TestBearer:
    @pytest.fixture
    def tokens(self, fault_server: FaultProxy, registry: RegistryServer) -> TokenServer:
        fault_server.upstream = registry.host
        return TokenServer(fault_server)

    def test_anonymous_with_one_token_per_scope(self, tokens: TokenServer, tmp_path: Path) -> None:
        origin = origin_at(tokens.proxy.host, tmp_path / "absent")
        digest = put(origin, bytes(3 << 20))
        for _ in range(5):
            list(origin.stream_range(digest, 5, 100))
        assert sorted(tokens.valid.values(), key=sorted) == sorted(
            [{f"repository:{origin.repository}:pull"}, {f"repository:{origin.repository}:pull,push"}],
            key=sorted,
        )

    def test_credentials_only_at_the_token_server(self, tokens: TokenServer, tmp_path: Path) -> None:
        tokens.accepted = {BASIC}
        origin = origin_at(tokens.proxy.host, docker_config(tmp_path, tokens.proxy.host))
        put(origin, b"data")
        for seen in tokens.proxy.seen():
            basic = seen.fields.get("authorization", "").startswith("Basic")
            assert basic == seen.path.startswith("/token")

    def test_a_token_that_stops_working_is_renewed(self, tokens: TokenServer, tmp_path: Path) -> None:
        origin = origin_at(tokens.proxy.host, tmp_path / "absent")
        digest = put(origin, b"data")
        for _ in range(3):
            tokens.valid.clear()
            assert origin.read_blob(digest, 10) == b"data"
        tokens.valid.clear()
        put(origin, bytes(5 << 20))

    def test_a_token_about_to_expire_is_renewed_before(self, tokens: TokenServer, tmp_path: Path) -> None:
        tokens.expires_in = 0.001
        origin = origin_at(tokens.proxy.host, tmp_path / "absent")
        digest = put(origin, b"data")
        tokens.proxy.clear()
        made = tokens.made
        for _ in range(3):
            origin.read_blob(digest, 10)
        assert tokens.made == made + 3
        assert len(tokens.proxy.seen("GET", "/v2/")) == 3

    @pytest.mark.parametrize("expires_in", [None, "soon", -5, True])
    def test_odd_lifetimes(self, tokens: TokenServer, tmp_path: Path, expires_in: object) -> None:
        tokens.expires_in = expires_in
        put(origin_at(tokens.proxy.host, tmp_path / "absent"), b"data")

    def test_many_threads_share_one_renewal(self, tokens: TokenServer, tmp_path: Path) -> None:
        origin = origin_at(tokens.proxy.host, tmp_path / "absent")
        digest = put(origin, b"data")
        tokens.valid.clear()
        made = tokens.made
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert set(pool.map(lambda _: origin.read_blob(digest, 10), range(64))) == {b"data"}
        assert tokens.made == made + 1

    def test_identity_token_by_post(self, tokens: TokenServer, tmp_path: Path) -> None:
        tokens.accepted = {IDENTITY_TOKEN}
        config = docker_config(tmp_path, tokens.proxy.host, identitytoken=IDENTITY_TOKEN)
        put(origin_at(tokens.proxy.host, config), b"data")
        [*requests] = tokens.proxy.seen(path="/token")
        assert {seen.method for seen in requests} == {"POST"}
        assert all(IDENTITY_TOKEN not in seen.path for seen in requests)

    def test_refused(self, tokens: TokenServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tokens.accepted = set()
        origin = origin_at(tokens.proxy.host, docker_config(tmp_path, tokens.proxy.host))
        with caplog.at_level(logging.DEBUG), pytest.raises(errors.DeniedError) as caught:
            put(origin, b"data")
        said = str(caught.value) + caplog.text
        assert origin.name in said
        for secret in (PASSWORD, BASIC, BASIC.removeprefix("Basic ")):
            assert secret not in said

    def test_no_right_to_push(self, tokens: TokenServer, tmp_path: Path) -> None:
        token = tokens.token

        def pull_only(seen: Seen) -> Reply:
            reply = token(seen)
            tokens.valid = {t: frozenset({"repository:x:pull"}) for t in tokens.valid}
            return reply

        tokens.token = pull_only  # type: ignore[method-assign]
        origin = origin_at(tokens.proxy.host, tmp_path / "absent")
        with pytest.raises(errors.DeniedError, match="HTTP 401"):
            put(origin, b"never there")
        assert tokens.proxy.seen("POST", "uploads")
        assert not tokens.proxy.seen("PUT")

    @pytest.mark.parametrize(
        "realm", ["http://tokens.example/", "ftp://127.0.0.1/", "//x", "http://u:p@127.0.0.1/", "https://"]
    )
    def test_realms_that_credentials_do_not_go_to(
        self, fault_server: FaultProxy, tmp_path: Path, realm: str
    ) -> None:
        TokenServer(fault_server, realm)
        origin = origin_at(fault_server.host, docker_config(tmp_path, fault_server.host))
        with pytest.raises(errors.ConfigurationError, match="https"):
            origin.has_blob("sha256:" + "0" * 64)
        assert all("authorization" not in seen.fields for seen in fault_server.seen())

    @pytest.mark.parametrize("answer", [b"", b"[]", b'{"token": 5}', b'{"token": "a\\r\\nX: y"}', b"{}"])
    def test_token_servers_that_answer_nonsense(
        self, tokens: TokenServer, tmp_path: Path, answer: bytes
    ) -> None:
        tokens.token = lambda seen: (200, {}, answer)  # type: ignore[method-assign]
        with pytest.raises(errors.InvalidInputError, match="token"):
            put(origin_at(tokens.proxy.host, tmp_path / "absent"), b"data")

    def test_a_busy_token_server_is_asked_again(self, tokens: TokenServer, tmp_path: Path) -> None:
        token, busy = tokens.token, [503, 429]

        def first_busy(seen: Seen) -> Reply:
            return (busy.pop(), {}, b"") if busy else token(seen)

        tokens.token = first_busy  # type: ignore[method-assign]
        put(origin_at(tokens.proxy.host, tmp_path / "absent"), b"data")
        assert not busy


class TestRedirects:
    @pytest.fixture
    def storage(self) -> Iterator[FaultProxy]:
        proxy = FaultProxy()
        yield proxy
        proxy.close()

    def test_without_authorization_kept_and_renewed(
        self, fault_server: FaultProxy, storage: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = bytes(range(256)) * 16
        digest = artifact.digest_of(data)
        tokens = TokenServer(fault_server)
        signatures = iter(range(100))
        storage.serve(f"/bucket/{digest}", data)

        def redirect(seen: Seen) -> Reply | None:
            reply = tokens.answer(seen)
            if reply is not None:
                return reply
            target = f"{storage.url}/bucket/{digest}?Signature=s1gned{next(signatures)}"
            return 307, {"Location": target}, b""

        fault_server.hook = redirect
        origin = origin_at(fault_server.host, tmp_path / "absent", "repo")
        with caplog.at_level(logging.DEBUG):
            for offset in (0, 100, 200):
                assert b"".join(origin.stream_range(digest, offset, 50)) == data[offset : offset + 50]
            assert len(fault_server.seen("GET", "/blobs/")) == 2, "one 401, one redirect, kept"
            storage.add(servers.Fault(status=403, body=b"<Error>expired s1gned</Error>"))
            assert origin.read_blob(digest, 1 << 20) == data
            assert len(fault_server.seen("GET", "/blobs/")) == 3
            storage.add(servers.Fault(status=403, times=2))
            with pytest.raises(errors.DeniedError, match=digest) as caught:
                origin.read_blob(digest, 1 << 20)
        assert storage.host in str(caught.value)
        assert "s1gned" not in str(caught.value)
        assert "s1gned" not in caplog.text
        assert storage.connections > 0
        assert all("authorization" not in seen.fields for seen in storage.seen())

    @pytest.mark.parametrize(
        ("target", "error"),
        [
            ("http://storage.example/x", errors.ConfigurationError),
            ("file:///etc/passwd", errors.ConfigurationError),
            ("/v2/repo/blobs/again", errors.UnavailableError),
        ],
    )
    def test_bad_targets(
        self, fault_server: FaultProxy, tmp_path: Path, target: str, error: type[Exception]
    ) -> None:
        fault_server.hook = lambda seen: (302, {"Location": target}, b"")
        origin = origin_at(fault_server.host, tmp_path / "absent", "repo")
        with pytest.raises(error, match="sha256:000"):
            origin.read_blob("sha256:" + "0" * 64, 10)


class TestTls:
    def test_custom_authority(self, certificate: tuple[Path, Path], tmp_path: Path) -> None:
        with servers.run_registry(tmp_path / "registry", tls=certificate) as server:
            settings = transport.Settings(ca_file=certificate[0])
            origin = origin_at(server.host, tmp_path / "absent", settings=settings)
            data = bytes(3 << 20)
            assert origin.read_blob(put(origin, data), len(data)) == data
            system = transport.Settings(ca_file=Path("/etc/ssl/certs/ca-certificates.crt"))
            distrusting = origin_at(server.host, tmp_path / "absent", settings=system)
            with pytest.raises(errors.ConfigurationError, match="not trusted"):
                distrusting.has_blob(artifact.digest_of(b""))

    @pytest.mark.parametrize("content", [None, "not a certificate"])
    def test_a_file_that_holds_no_authority(self, tmp_path: Path, content: str | None) -> None:
        path = tmp_path / "ca.pem"
        if content is not None:
            path.write_text(content)
        with pytest.raises(errors.ConfigurationError, match=r"ca\.pem"):
            origin_at("127.0.0.1:1", tmp_path, settings=transport.Settings(ca_file=path)).read_manifest("v1")

    def test_a_server_without_tls(
        self, certificate: tuple[Path, Path], registry: RegistryServer, tmp_path: Path
    ) -> None:
        settings = transport.Settings(ca_file=certificate[0])
        with pytest.raises(errors.ConfigurationError, match="--plain-http"):
            origin_at(registry.host, tmp_path / "absent", settings=settings).has_blob(artifact.digest_of(b""))

    @pytest.mark.parametrize(
        ("host", "plain", "url"),
        [
            ("127.0.0.1:5000", False, "http"),
            ("127.1.2.3", False, "http"),
            ("[::1]:5000", False, "http"),
            ("localhost:5000", False, "http"),
            ("registry.example", False, "https"),
            ("registry.example", True, "http"),
            ("10.0.0.1:5000", False, "https"),
            ("localhost.example", False, "https"),
            ("127.0.0.1.example", False, "https"),
        ],
    )
    def test_plain_http_only_where_allowed(self, host: str, plain: bool, url: str) -> None:
        http = transport.Transport(transport.Settings(plain_http=plain))
        assert http.base_url(host) == f"{url}://{host}"
        with contextlib.closing(http):
            pass
