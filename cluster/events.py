"""Events of the Kubernetes API: what `kubectl describe` shows of an object. Pure.

Called by the operator, which creates what `body` returns. An event is a courtesy: whoever cannot write one
goes on.

Spec: v1 Event.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from cluster import objects
from cluster.objects import Body, Kind, Meta

_MOST_MESSAGE = 1_000
"""The API takes 1,024 bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """The object that an event is about."""

    kind: Kind
    meta: Meta


def body(about: About, type_: Literal["Normal", "Warning"], reason: str, message: str, at: float) -> Body:
    """An event of one occurrence. `reason` is a word in CamelCase."""
    text = message.encode()[:_MOST_MESSAGE].decode("utf-8", "ignore")
    return {
        "metadata": {"generateName": f"{about.meta.name}.", "namespace": about.meta.namespace or "default"},
        "involvedObject": {
            "apiVersion": about.kind.group_version,
            "kind": about.kind.name,
            "name": about.meta.name,
            "namespace": about.meta.namespace,
            "uid": about.meta.uid,
        },
        "type": type_,
        "reason": reason,
        "message": text,
        "source": {"component": "glowplug-operator"},
        "firstTimestamp": objects.whole_time(at),
        "lastTimestamp": objects.whole_time(at),
        "count": 1,
    }
