"""The API server that a node's settings name."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import config, kubernetes
from cluster import errors as cluster_errors
from cluster import objects
from imagefs import errors
from tests.fixtures.kubernetes_api import KubernetesApi


def test_none() -> None:
    assert kubernetes.connect(config.Kubernetes()) is None


def test_in_cluster_but_in_no_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(errors.ConfigurationError, match="api_url"):
        kubernetes.connect(config.Kubernetes(in_cluster=True))


def test_a_certificate_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"ca_file.*nowhere"):
        kubernetes.connect(config.Kubernetes(api_url="https://127.0.0.1:1", ca_file=tmp_path / "nowhere"))


def test_the_token_may_come_later(tmp_path: Path) -> None:
    with KubernetesApi(token="t") as server:
        api = kubernetes.connect(config.Kubernetes(api_url=server.url, token_file=tmp_path / "token"))
        assert api is not None
        with pytest.raises(cluster_errors.ConfigurationError, match="token_file"):
            api.list(objects.SECRET)
        (tmp_path / "token").write_text("t")
        assert api.list(objects.SECRET).objects == ()


def test_what_a_parser_refuses_is_the_watchers_to_name() -> None:
    def refuse(item: objects.Object) -> None:
        raise errors.InvalidInputError(f"{item.key}: not to be understood")

    with pytest.raises(cluster_errors.InvalidError, match="space/name: not to be understood"):
        kubernetes.parser(refuse)(objects.parse({"metadata": {"name": "name", "namespace": "space"}}, "x"))
