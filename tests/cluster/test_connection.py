"""Ways in to an API server, tokens, and answers that make no sense."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import access, connection, errors, objects
from cluster.api import Api
from cluster.connection import Connection, Where
from tests.fixtures.kubernetes_api import KubernetesApi


def test_an_api_server_that_is_away() -> None:
    with KubernetesApi() as gone:
        url = gone.url
    with pytest.raises(errors.UnavailableError, match="/pods/p"):
        Api(Connection(Where(url=url))).get(objects.POD, "p")


def test_a_token_is_read_again_and_never_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "token"
    file.write_text("first-secret\n")
    with KubernetesApi(token="second-secret") as server:
        api = Api(Connection(Where(url=server.url, token_file=file)))
        with pytest.raises(errors.ForbiddenError) as found:
            api.get(objects.POD, "p")
        file.write_text("second-secret\n")
        with pytest.raises(errors.NotFoundError):
            api.get(objects.POD, "p")
        file.write_text("")
        with pytest.raises(errors.ConfigurationError, match="holds no token"):
            api.get(objects.POD, "p")
    assert "secret" not in caplog.text + str(found.value)


def test_a_kubeconfig_and_its_context(tmp_path: Path, kubernetes_api: KubernetesApi) -> None:
    text = f"""
apiVersion: v1
kind: Config
current-context: none
clusters: [{{name: here, cluster: {{server: "{kubernetes_api.url}"}}}}]
users: [{{name: me, user: {{token: t}}}}]
contexts:
- {{name: none, context: {{cluster: here, user: me}}}}
- {{name: team, context: {{cluster: here, user: me, namespace: models}}}}
"""
    file = tmp_path / "config"
    file.write_text(text)
    api = Api(Connection(Where(kubeconfig=file, context="team")))
    assert api.namespace == "models"
    assert api.list(objects.POD).objects == ()
    assert kubernetes_api.requests[-1].authorization == "Bearer t"
    with pytest.raises(errors.ConfigurationError, match="kubeconfig"):
        Connection(Where(kubeconfig=file, context="nobody"))


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:6443", "http://api.example.com", "ftp://127.0.0.1", "https://", "x"]
)
def test_urls_that_no_token_goes_to(url: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="not https"):
        Connection(Where(url=url))


@pytest.mark.parametrize("url", ["https://u:p4ss@h", "https://[h"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="the API server's URL") as found:
        Connection(Where(url=url))
    assert "p4ss" not in str(found.value)


@pytest.mark.parametrize("content", ["", "two words", "a\r\nX-Evil: 1"])
def test_files_that_hold_no_token(tmp_path: Path, content: str) -> None:
    token = tmp_path / "token"
    token.write_text(content)
    with pytest.raises(errors.ConfigurationError, match="token_file"):
        Connection(Where(url="http://127.0.0.1:1", token_file=token))


def test_what_a_pod_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    where = access.in_pod(token_file=tmp_path / "token")
    assert (where.url, where.token_file) == ("https://[fd00::1]:6443", tmp_path / "token")
    assert where.ca_file == Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
    with pytest.raises(errors.ConfigurationError, match="ca_file"):
        Connection(Where())
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(errors.ConfigurationError, match="this is no pod"):
        access.in_pod()


def test_tls(tmp_path: Path) -> None:
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
    with KubernetesApi(tls=(certificate, key)) as server:
        api = Api(Connection(Where(url=server.url, ca_file=certificate)))
        assert api.list(objects.SECRET).objects == ()
        with pytest.raises(errors.UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            Api(Connection(Where(url=server.url))).list(objects.SECRET)


def test_a_url_needs_no_kubernetes_library() -> None:
    """A node's agent does not carry it."""
    code = (
        "import sys; sys.modules['kubernetes'] = None\n"
        "from agent import announce, credentials, kubernetes, membership\n"
        "from serving.router import sources\n"
        "from cluster.connection import Connection, Where\n"
        "Connection(Where(url='http://127.0.0.1:1'))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- answers that make no sense ------------------------------------------------------------------------

_SECRETS = "/api/v1/namespaces/default/secrets"


def _api(server: Any) -> Api:
    return Api(Connection(Where(url=server.url)))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"nonsense p4ss", b'{"items": 5}', b'{"items": ["p4ss"]}', b"\xff\xfe"]
)
def test_lists(fault_server: Any, body: bytes) -> None:
    fault_server.serve(_SECRETS, body)
    with pytest.raises(errors.InvalidError) as found:
        _api(fault_server).list(objects.SECRET)
    assert "p4ss" not in str(found.value)


def _changes(server: Any) -> list[objects.Change]:
    return [objects.change(line, "secrets") for line in _api(server).watch(objects.SECRET, "1")]


@pytest.mark.parametrize("line", [b"nonsense p4ss", b'{"type": 5}', b'{"type": "ADDED", "object": "p4ss"}'])
def test_watches(fault_server: Any, line: bytes) -> None:
    fault_server.serve(_SECRETS, line + b"\n")
    with pytest.raises(errors.InvalidError) as found:
        _changes(fault_server)
    assert "p4ss" not in str(found.value)


def test_an_endless_line(fault_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_MAX_LINE_BYTES", 1000)
    fault_server.serve(_SECRETS, b"x" * 100_000)
    with pytest.raises(errors.InvalidError, match="more than"):
        _changes(fault_server)


def test_an_error_in_a_watch(fault_server: Any) -> None:
    event = {"type": "ERROR", "object": {"code": 500, "message": "etcd\nis away"}}
    fault_server.serve(_SECRETS, json.dumps(event).encode() + b"\n")
    with pytest.raises(errors.UnavailableError, match="etcd is away"):
        _changes(fault_server)
