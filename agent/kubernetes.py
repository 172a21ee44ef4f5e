"""The API server that a node's settings name, on `cluster`; errors in this package's words.

Used for pull secrets (pullsecrets.py), EndpointSlices (membership.py) and events (announce.py). A parser
that is given to a `cluster.watching.Watcher` keeps no more of an object than its value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from agent import config
from cluster import access
from cluster import errors as cluster_errors
from cluster.api import Api
from cluster.connection import Connection
from cluster.objects import Object
from imagefs import errors

T = TypeVar("T")


def connect(settings: config.Kubernetes) -> Api | None:
    """The API server of the settings, None where they name none. ConfigurationError. The node may be up
    before its token is: that is an error of each request only."""
    if settings.api_url is None and not settings.in_cluster:
        return None
    try:
        where = (
            access.in_pod(settings.ca_file, settings.token_file)
            if settings.api_url is None
            else access.Where(settings.api_url, settings.ca_file, settings.token_file)
        )
        return Api(Connection(dataclasses.replace(where, token_may_come_later=True)))
    except cluster_errors.ConfigurationError as exc:
        raise errors.ConfigurationError(f"kubernetes.api_url or in_cluster, ca_file: {exc}") from exc


def parser(parse: Callable[[Object], T | None]) -> Callable[[Object], T | None]:
    """`parse`, for a watcher: an object that it refuses is left out and named."""

    def parsed(item: Object) -> T | None:
        try:
            return parse(item)
        except errors.ImagefsError as exc:
            raise cluster_errors.InvalidError(str(exc)) from exc

    return parsed
