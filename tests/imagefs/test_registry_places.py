"""Where a registry may send us: redirects, upload locations, token servers, next pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagefs import artifact, errors
from imagefs.origin import credentials, registry, retry, transport
from tests.fixtures.servers import Fault, FaultProxy

QUICK = retry.Policy(attempts=2, first_delay_seconds=0.001, max_delay_seconds=0.002)
DIGEST = artifact.digest_of(b"x")


@pytest.mark.parametrize(
    ("url", "plain_http", "loopback", "allowed"),
    [
        ("https://storage.example/a", False, False, True),
        ("http://storage.example/a", False, False, False),
        ("http://storage.example/a", True, False, True),
        ("http://127.0.0.1:2375/containers", False, False, False),
        ("http://localhost:2375/containers", False, False, False),
        ("http://127.0.0.1:5001/a", False, True, True),
        ("https://user:secret@storage.example/a", False, False, False),
        ("file:///etc/passwd", True, True, False),
        ("https://", True, True, False),
    ],
)
def test_what_a_server_may_point_to(url: str, plain_http: bool, loopback: bool, allowed: bool) -> None:
    http = transport.Transport(transport.Settings(plain_http=plain_http, loopback=loopback))
    if allowed:
        http.check_url(url, "what")
    else:
        with pytest.raises(errors.ConfigurationError) as caught:
            http.check_url(url, "what")
        assert "secret" not in str(caught.value)


def test_only_a_registry_on_loopback_may_point_to_loopback() -> None:
    elsewhere = registry.RegistryOrigin("registry.example", "a/repo", transport.Settings())
    with pytest.raises(errors.ConfigurationError, match="points to http://127"):
        elsewhere._server.http.check_url("http://127.0.0.1:2375/images", "what")
    here = registry.RegistryOrigin("127.0.0.1:5000", "a/repo", transport.Settings())
    here._server.http.check_url("http://127.0.0.1:5001/storage", "what")


@pytest.mark.parametrize("place", ["http://[", "https://[::1/x", "//\u2100.example/"])
def test_places_that_are_no_urls(fault_server: FaultProxy, place: str) -> None:
    origin = registry.RegistryOrigin(
        fault_server.host, "a/repo", transport.Settings(read_timeout_seconds=1), policy=QUICK
    )
    raw = place.encode().decode("latin-1")
    for _ in range(QUICK.attempts):
        fault_server.add(Fault(status=307, fields={"Location": raw}))
    with pytest.raises(errors.ImagefsError):
        origin.has_blob(DIGEST)


def test_a_registry_token_that_no_header_can_hold(tmp_path: Path) -> None:
    data = json.dumps({"auths": {"r.example": {"registrytoken": "geheim\r\nX-Evil: 1"}}}).encode()
    with pytest.raises(errors.InvalidInputError, match="registrytoken") as caught:
        credentials.parse(data, "config.json")
    assert "geheim" not in str(caught.value)
