"""What a new document changes, and what that costs: nothing, or new replicas.

Pure. `glowplug endpoint plan` prints it; the server acts by the same `version`: replicas are replaced exactly
when it differs. Everything that a replica is started with restarts; routing, limits, counts, objectives,
drain and update settings and metadata never do.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving import errors
from serving.endpoint import Endpoint

_RESTARTING = frozenset({"engine", "model", "model_name", "image", "fp8", "resources"})
_RESTARTING_KEYS = frozenset({"tracing.collector"})
"""Of sections that are otherwise changed in place."""
_FIXED = ("name", "provider", "containerd")
_FIXED_PLACE = ("namespace", "context", "kubeconfig")
"""Of the section `kubernetes`; the rest of it is what pods are made of."""


class Effect(enum.Enum):
    """What a change does to running replicas."""

    LIVE = "live"
    RESTART = "restart"


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One key, as JSON values; None is a key that is not there."""

    key: str
    old: Any
    new: Any
    effect: Effect


def plan(old: Endpoint | None, new: Endpoint) -> list[Change]:
    """The keys that differ, in the document's order. ConflictError for what cannot change in place."""
    before: dict[str, Any] = old.model_dump(mode="json") if old is not None else {}
    after = new.model_dump(mode="json")
    if old is not None:
        for key in _FIXED:
            if before[key] != after[key]:
                raise _elsewhere(key, before[key], after[key])
        for key in _FIXED_PLACE if new.provider == "kubernetes" else ():
            if before["kubernetes"][key] != after["kubernetes"][key]:
                raise _elsewhere(f"kubernetes.{key}", before["kubernetes"][key], after["kubernetes"][key])
    found = []
    for section in after:
        restarts = section in _restarting(new)
        left, right = dict(_leaves(section, before.get(section))), dict(_leaves(section, after[section]))
        for key in dict.fromkeys([*left, *right]):
            if left.get(key) != right.get(key):
                effect = Effect.RESTART if restarts or key in _RESTARTING_KEYS else Effect.LIVE
                found.append(Change(key, left.get(key), right.get(key), effect))
    return found


def shown(found: Sequence[Change]) -> dict[str, Any]:
    """Changes as JSON values, and whether any of them restarts replicas."""
    return {
        "changes": [
            {"key": each.key, "old": each.old, "new": each.new, "effect": each.effect.value} for each in found
        ],
        "restarts": any(each.effect is Effect.RESTART for each in found),
    }


def version(endpoint: Endpoint) -> str:
    """A short name that changes exactly when replicas must: a hash of what they are started with."""
    document = endpoint.model_dump(mode="json", include=set(_restarting(endpoint)))
    if endpoint.tracing is not None:
        document["tracing"] = endpoint.tracing.collector
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _restarting(endpoint: Endpoint) -> frozenset[str]:
    """The sections that replicas are started with."""
    return _RESTARTING | ({"kubernetes"} if endpoint.provider == "kubernetes" else set())


def _elsewhere(key: str, old: Any, new: Any) -> errors.ConflictError:
    return errors.ConflictError(
        f"{key}: {old!r} cannot become {new!r} in place; serve it as another endpoint, move the traffic, and "
        "delete this one"
    )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    elif value is not None and value != {}:
        yield key, value
