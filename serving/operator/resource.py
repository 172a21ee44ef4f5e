"""What a ModelEndpoint says, and what its status shows. Pure.

Called by `tending`. The spec is the endpoint document; its name is the resource's, its provider and namespace
go without saying. The status is also the operator's memory: `rollout` and `refused` are what the next
operator goes on with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import objects
from cluster.objects import Body
from serving import endpoint, errors
from serving.controller import Phase, Rollout
from serving.endpoint import Endpoint
from serving.replica import Replica, State

_MOST_MESSAGE = 4_000


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """The document, and how many replicas somebody asked for through the scale subresource, if anybody."""

    document: Endpoint
    scaled: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """What is carried over from one operator to the next. `refused`: the version that was rolled back, which
    is not tried again until the spec is another one."""

    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    refused: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """`holds`: None is not known."""

    type: str
    holds: bool | None
    reason: str
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """What a status is made of."""

    generation: int
    memory: Memory
    version: str
    weights: Mapping[str, int]
    replicas: Sequence[Replica]
    wanted_replicas: int
    limit: int
    selector: str
    conditions: Sequence[Condition]


def wanted(name: str, namespace: str, spec: Body) -> Wanted:
    """DocumentError, which names the key and the remedy."""
    document = {key: value for key, value in spec.items() if key != "scaled"}
    _same(document, "name", name, "leave it out, it is the resource's")
    _same(document, "provider", "kubernetes", "leave it out")
    place = document.get("kubernetes")
    place = dict(place) if isinstance(place, Mapping) else place
    if isinstance(place, dict):
        _same(place, "namespace", namespace, "leave it out, it is the resource's", "kubernetes.")
        for key in ("context", "kubeconfig"):
            if place.get(key) is not None:
                raise errors.DocumentError(f"kubernetes.{key}: the operator is in its cluster; leave it out")
    whole = {
        **document,
        "name": name,
        "provider": "kubernetes",
        **({} if place is None else {"kubernetes": place}),
    }
    try:
        found = endpoint.load(json.dumps(whole), name)
    except errors.DocumentError as exc:  # all of it is one line, which says nothing
        raise errors.DocumentError(str(exc).replace(f"{name}:1: ", "")) from exc
    if found.replicas.min == 0:
        raise errors.DocumentError(
            "replicas.min: from 0 on, requests wait in an activator, which the operator does not "
            "run; use 1 or more"
        )
    if found.routing.port == 0:
        raise errors.DocumentError("routing.port: 0 is a free port of one machine; name one")
    scaled = spec.get("scaled")
    if scaled is not None and (not isinstance(scaled, int) or isinstance(scaled, bool) or scaled < 0):
        raise errors.DocumentError(f"scaled: {scaled!r} is no number of replicas")
    if scaled is not None:
        scaled = min(max(scaled, found.replicas.min), found.replicas.most)
    return Wanted(found, scaled)


def memory(status: Body) -> Memory:
    """What a status remembers; nothing, where somebody else wrote it."""
    refused = status.get("refused")
    rollout = status.get("rollout")
    try:
        found = Rollout.from_json(rollout) if isinstance(rollout, Mapping) else Rollout()
    except (KeyError, TypeError, ValueError):
        found = Rollout()
    numbers = (found.step, found.since, found.base.issued, found.base.errors)
    names = (found.stable, found.candidate)
    sound = all(isinstance(each, (int, float)) for each in numbers) and all(
        each is None or isinstance(each, str) for each in names
    )
    if not sound or (found.phase is not Phase.STEADY) != (found.candidate is not None) or found.step < 0:
        found = Rollout()
    return Memory(found, refused if isinstance(refused, str) else None)


def status(shown: Shown, before: Body, now: float) -> Body:
    """The status document; conditions that did not change keep their time."""
    alive = [each for each in shown.replicas if each.state in (State.STARTING, State.READY)]
    rollout = shown.memory.rollout
    return {
        "observedGeneration": shown.generation,
        "replicas": len(alive),
        "readyReplicas": sum(each.state is State.READY for each in alive),
        "wantedReplicas": shown.wanted_replicas,
        "limit": shown.limit,
        "selector": shown.selector,
        "phase": rollout.phase.value,
        "version": shown.version,
        "stable": rollout.stable or "",
        "weights": dict(shown.weights),
        "rollout": _said(rollout.to_json()),
        **_said({"candidate": rollout.candidate, "refused": shown.memory.refused}),
        "conditions": conditions(shown.conditions, before, shown.generation, now),
    }


def conditions(found: Sequence[Condition], before: Body, generation: int, now: float) -> list[dict[str, Any]]:
    """As the API has them."""
    listed = before.get("conditions")
    old = {
        each.get("type"): each
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, Mapping)
    }
    made = []
    for each in found:
        said = {True: "True", False: "False", None: "Unknown"}[each.holds]
        known = old.get(each.type, {})
        since = known.get("lastTransitionTime") if known.get("status") == said else None
        made.append(
            {
                "type": each.type,
                "status": said,
                "reason": each.reason,
                "message": each.message[:_MOST_MESSAGE],
                "lastTransitionTime": since or objects.whole_time(now),
                "observedGeneration": generation,
            }
        )
    return made


def progress(rollout: Rollout, replicas: Sequence[Replica], wanted_replicas: int) -> list[Condition]:
    """`Ready`: as many replicas as there should be. `Progressing`: an update is under way."""
    ready = sum(each.version == rollout.stable and each.state is State.READY for each in replicas)
    why = [each.reason for each in replicas if each.state is State.FAILED and each.reason]
    text = f"{ready} of {wanted_replicas} replicas of {rollout.stable} are ready"
    whole = ready >= wanted_replicas
    said = "AllReplicasReady" if whole else "ReplicasMissing"
    under_way = rollout.phase is not Phase.STEADY
    return [
        Condition("Ready", whole, said, text if whole or not why else f"{text}: {why[-1]}"),
        Condition(
            "Progressing",
            under_way,
            "Updating" if under_way else "Steady",
            f"version {rollout.candidate}: {rollout.phase.value}" if under_way else "no update is under way",
        ),
    ]


def _said(found: Body) -> Body:
    """Without what is not there: null is no value of the API's."""
    return {key: value for key, value in found.items() if value is not None}


def _same(part: dict[str, Any], key: str, value: str, remedy: str, above: str = "") -> None:
    """What may be left out, and is this if it is not."""
    given = part.setdefault(key, value)
    if given is None:
        part[key] = value
    elif given != value:
        raise errors.DocumentError(f"{above}{key}: {given!r} is not {value!r}; {remedy}")
