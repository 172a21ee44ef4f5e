"""From replicas to routes: who is named, and how API keys are read."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving import endpoint, errors, routes, service
from serving.replica import Replica, State
from tests.serving.served import document


def _endpoint(**sections: object) -> endpoint.Endpoint:
    return endpoint.load(yaml.safe_dump(document(**sections)), "e.yaml")


def test_who_is_ready_is_routed_to_and_who_drains_is_named_as_draining() -> None:
    replicas = [
        Replica(state.value, "v", ("127.0.0.1", 8_000 + number), state, 0.0)
        for number, state in enumerate(State)
    ]
    service = routes.service(_endpoint(), replicas, {"v": 100}, 9_000)
    assert [(each.port, each.draining) for each in service.backends] == [(8_001, False), (8_002, True)]
    assert (service.listen.address, service.listen.port) == ("127.0.0.1", 9_000)
    assert service.version_weights == {"v": 100}


def test_what_the_document_limits_reaches_the_routes() -> None:
    wanted = _endpoint(limits={"request_bytes": 4_096}, routing={"request_timeout_seconds": 7, "port": 0})
    settings = routes.service(wanted, [], {}, 9_000).settings
    assert settings.max_request_bytes == 4_096
    assert settings.request_timeout_seconds == 7
    assert settings.balancing is service.Balancing.P2C
    sticky = routes.service(_endpoint(routing={"balancing": "sticky", "port": 0}), [], {}, 9_000).settings
    assert (sticky.balancing, sticky.sticky_header) == (service.Balancing.STICKY, "x-session-id")
    assert settings.max_requests == 2 * 8 * wanted.replicas.limit


def test_keys_with_their_tenants_and_rates() -> None:
    text = (
        "# ours\nalice k1\n\nbob k2 requests=30 # slower\ncarol k3 tokens=1e4 priority=-5\ndan k4 units=.5\n"
    )
    assert [(each.tenant, each.secret, each.limits) for each in routes.keys(text, "keys")] == [
        ("alice", "k1", (None, None, None, 0)),
        ("bob", "k2", (30, None, None, 0)),
        ("carol", "k3", (None, 10_000.0, None, -5)),
        ("dan", "k4", (None, None, 0.5, 0)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "# nobody",
            "alice",
            "alice k1 many",
            "alice k1 30",
            "alice k1 requests=0",
            "alice k1 requests=x",
        ),
        *(
            "alice k1 tokens=nan",
            "alice k1 tokens=-1",
            "alice k1 tokens=1 units=1",
            "alice k1 priority=-1000000",
        ),
        *("alice k1 requests=1 requests=2", "alice k1 request=1", "alice k1 units=inf"),
    ],
)
def test_a_keys_file_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(errors.DocumentError, match="keys"):
        routes.keys(text, "keys")


@given(st.text(max_size=100))
def test_whatever_the_keys_file_only_our_error_leaves(text: str) -> None:
    with contextlib.suppress(errors.DocumentError):
        assert routes.keys(text, "keys")
