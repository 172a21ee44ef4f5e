"""What a kubeconfig says, by the kubernetes library: contexts, exec plugins, client certificates, proxies.

Called by `access`, which imports it only where a kubeconfig is the way in. What else the library would do
(models, whole answers in memory) is not used.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import kubernetes.client
import kubernetes.config
import urllib3.exceptions
import yaml

from cluster import errors
from cluster.access import KEEPALIVE, POOLED, Access


def find(file: Path | None, context: str | None) -> Access:
    """The way in that a file, or kubectl's own, names. ConfigurationError."""
    configuration = kubernetes.client.Configuration()
    configuration.socket_options = KEEPALIVE
    configuration.connection_pool_maxsize = POOLED
    name = None if file is None else str(file)
    try:
        kubernetes.config.load_kube_config(
            config_file=name, context=context, client_configuration=configuration, persist_config=False
        )
        namespace = _namespace(name, context)
    except (kubernetes.config.ConfigException, OSError, ValueError, TypeError, yaml.YAMLError) as exc:
        raise errors.ConfigurationError(
            f"kubernetes: no way to an API server: {exc} This is no pod, and no kubeconfig says it: set "
            "KUBECONFIG to one that kubectl can use, or run as a pod with a service account"
        ) from exc
    try:
        pool = kubernetes.client.ApiClient(configuration).rest_client.pool_manager
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as exc:
        raise errors.ConfigurationError(f"kubernetes: {exc}") from exc
    lock = threading.Lock()  # the library's hooks that renew a token are not made for threads

    def headers() -> Mapping[str, str]:
        with lock:
            try:
                found = configuration.auth_settings()
            except (OSError, ValueError, kubernetes.config.ConfigException) as exc:
                raise errors.ConfigurationError(f"kubernetes: no credentials: {exc}") from exc
        return {
            each["key"]: each["value"] for each in found.values() if each["in"] == "header" and each["value"]
        }

    return Access(configuration.host.rstrip("/"), namespace, pool, headers)


def _namespace(file: str | None, context: str | None) -> str:
    contexts, active = kubernetes.config.list_kube_config_contexts(file)
    chosen = next((each for each in contexts if each["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")
