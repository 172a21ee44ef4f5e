"""Ports that can be listened on, asked of the kernel. What is free now may be taken in the next moment."""

from __future__ import annotations

import contextlib
import socket

from serving import errors


def probe(address: str, port: int) -> int:
    """This port, or a free one for 0. OSError if nobody can listen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1)
        return int(listener.getsockname()[1])


def require(address: str, port: int) -> int:
    """The port that can be listened on: this one, or any for 0. ConfigurationError."""
    try:
        return probe(address, port)
    except OSError as exc:
        raise errors.ConfigurationError(
            f"routing.port: cannot listen on {address}:{port}: {exc.strerror}; name another port, "
            "or 0 for any that is free"
        ) from exc
