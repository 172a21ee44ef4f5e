"""What a request log needs on this machine, asked before it is begun: by the supervisor, and by providers
when a document is applied."""

from __future__ import annotations

import importlib.util

from serving import errors
from serving.observability import RequestLog


def check(wanted: RequestLog) -> None:
    """ConfigurationError where a library is missing."""
    needed = [("pyarrow", "request-log")]
    if wanted.destination.startswith("s3://"):
        needed.append(("boto3", "s3"))
    for module, extra in needed:
        if importlib.util.find_spec(module) is None:
            raise errors.ConfigurationError(
                f"request_log: needs {module}, which is not installed; pip install 'glowplug[{extra}]'"
            )
