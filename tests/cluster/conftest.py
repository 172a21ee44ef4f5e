"""An `Api` of the fake API server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.api import Api
from cluster.connection import Connection, Where
from tests.fixtures.kubernetes_api import KubernetesApi


@pytest.fixture
def api(kubernetes_api: KubernetesApi) -> Iterator[Api]:
    connection = Connection(Where(url=kubernetes_api.url))
    yield Api(connection, "default")
    connection.close()
