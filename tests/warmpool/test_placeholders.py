"""What nodes and pods say about a pool, whatever they say."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import errors, objects
from cluster.objects import Object
from tests.warmpool.providers.nodemaker import NAMESPACE, SETTINGS
from warmpool import placeholders
from warmpool.placeholders import Taker
from warmpool.provider import Machine, Stage

_NOW = 2_000_000_000.0
_GPU = {"example.com/pool": "gpu"}


def made(body: dict[str, Any]) -> Object:
    return objects.parse(body, "test")


def at(seconds_ago: float) -> str:
    return objects.whole_time(_NOW - seconds_ago)


def placeholder(name: str = "p-1", node: str = "", age: float = 10.0, phase: str = "Pending") -> Object:
    labels = {placeholders.POOL_LABEL: "default", placeholders.CLASS_LABEL: "gpu"}
    return made(
        {
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "labels": labels,
                "creationTimestamp": at(age),
            },
            "spec": {"nodeName": node} if node else {},
            "status": {"phase": phase, "reason": "OutOfMemory" if phase == "Failed" else ""},
        }
    )


def node(
    *taints: str, ready: str | None = "True", since: float = 50.0, age: float = 100.0, **spec: Any
) -> Object:
    conditions = [{"type": "Ready", "status": ready, "lastTransitionTime": at(since)}] if ready else []
    return made(
        {
            "metadata": {"name": "n-1", "labels": _GPU, "creationTimestamp": at(age)},
            "spec": {"taints": [{"key": each, "effect": "NoSchedule"} for each in taints], **spec},
            "status": {
                "conditions": conditions,
                "addresses": [
                    {"type": "Hostname", "address": "n-1"},
                    {"type": "InternalIP", "address": "10.0.0.1"},
                ],
            },
        }
    )


def look(pods: list[Object], nodes: list[Object], *takers: Taker) -> list[Machine]:
    return placeholders.machines(SETTINGS, "default", pods, {"gpu": nodes, "big": []}, takers, _NOW)


_WARMING = SETTINGS.startup_taint


@pytest.mark.parametrize(
    ("found", "stage", "admitted"),
    [
        (node(), Stage.UP, True),
        (node(_WARMING), Stage.UP, False),
        (node(_WARMING, ready=None), Stage.BOOTING, False),
        (node(_WARMING, ready="False", since=9_999.0), Stage.BOOTING, False),
        (node(ready="Unknown", since=30.0), Stage.BOOTING, False),
        (node(ready="Unknown", since=500.0), Stage.FAILED, False),
        (node(unschedulable=True), Stage.FAILED, True),
        (node("karpenter.sh/disrupted"), Stage.LEAVING, True),
        (node("ToBeDeletedByClusterAutoscaler"), Stage.LEAVING, True),
        (node(placeholders.RETIRED_TAINT), Stage.LEAVING, True),
    ],
)
def test_a_node_with_a_placeholder(found: Object, stage: Stage, admitted: bool) -> None:
    (machine,) = look([placeholder(node="n-1", age=300.0, phase="Running")], [found])
    assert (machine.name, machine.stage, machine.admitted) == ("n-1", stage, admitted)
    assert machine.address == "10.0.0.1"
    assert (machine.requested_at, machine.made_at) == (_NOW - 300.0, _NOW - 100.0)


def test_a_placeholder_that_found_its_node_there_was_not_waited_for() -> None:
    (machine,) = look([placeholder(node="n-1", age=5.0, phase="Running")], [node()])
    assert machine.requested_at is None


def test_work_on_a_node_is_a_hand_over() -> None:
    (machine,) = look([], [node()], Taker("n-1", {"gpu": 1.0}))
    assert machine.stage is Stage.HANDED
    (machine,) = look([], [node()])
    assert machine.stage is Stage.FREE


def test_a_placeholder_that_waits_too_long_was_refused() -> None:
    fresh, old = placeholder("a", age=10.0), placeholder("b", age=SETTINGS.refused_after_seconds + 1)
    stages = {each.name: each.stage for each in look([fresh, old], [])}
    assert stages == {"a": Stage.REQUESTED, "b": Stage.FAILED}
    (failed,) = look([placeholder(phase="Failed")], [])
    assert (failed.stage, failed.reason) == (Stage.FAILED, "placeholder: OutOfMemory")


def test_a_placeholder_whose_node_is_gone_is_broken() -> None:
    (machine,) = look([placeholder(node="gone", phase="Running")], [])
    assert machine.stage is Stage.FAILED
    assert "gone" in machine.reason


def test_placeholders_of_others_are_not_ours() -> None:
    other = placeholder()
    stranger = made(
        {**other.body, "metadata": {**other.body["metadata"], "labels": {placeholders.POOL_LABEL: "x"}}}
    )
    assert look([stranger], []) == []


def work(selector: dict[str, str] | None = None, gpus: str = "8", **spec: Any) -> Object:
    containers = [{"image": "a:1", "resources": {"requests": {"nvidia.com/gpu": gpus}}}, {"image": "b:1"}]
    return made(
        {"metadata": {"name": "w"}, "spec": {"nodeSelector": selector, "containers": containers, **spec}}
    )


def affinity(operator: str, *values: str, key: str = "example.com/pool") -> dict[str, Any]:
    term = {"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


@pytest.mark.parametrize(
    ("pod", "fits"),
    [
        (work(), {"gpu", "big"}),
        (work(_GPU), {"gpu"}),
        (work({"zone": "a"}), {"gpu", "big"}),
        (work(gpus="0"), set()),
        (work(gpus="many"), set()),
        (work(affinity=affinity("In", "gpu")), {"gpu"}),
        (work(affinity=affinity("NotIn", "gpu")), {"big"}),
        (work(affinity=affinity("DoesNotExist")), set()),
        (work(affinity=affinity("Exists")), {"gpu", "big"}),
        (work(affinity=affinity("In", "a", key="zone")), {"gpu", "big"}),
        (placeholder(), set()),
    ],
)
def test_what_work_fits(pod: Object, fits: set[str]) -> None:
    taker = placeholders.taker(SETTINGS, pod)
    assert (set() if taker is None else set(taker.shares)) == fits


def test_parts_of_nodes_are_added_before_they_are_rounded() -> None:
    takers = [Taker("", {"gpu": 0.25}) for _ in range(5)] + [Taker("n", {"gpu": 1.0})]
    assert placeholders.wanted(SETTINGS, {"gpu": 3}, takers) == {"gpu": 3 + 2, "big": 0}


def test_images_are_as_likely_as_pods_run_them() -> None:
    takers = [Taker("n", {"gpu": 1.0}, ("a", "b")), Taker("", {"gpu": 1.0}, ("a",))]
    assert placeholders.chances(SETTINGS, takers) == {"gpu": {"a": 1.0, "b": 0.5}, "big": {}}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def mutated(body: Any, draw: st.DataObject) -> Any:
    """The body with any value at any one place."""
    if isinstance(body, dict) and body and draw.draw(st.integers(0, 3)):
        key = draw.draw(st.sampled_from(sorted(body)))
        return {**body, key: mutated(body[key], draw)}
    if isinstance(body, list) and body and draw.draw(st.integers(0, 3)):
        return [mutated(body[0], draw), *body[1:]]
    return draw.draw(_JSON)


@given(st.data())
def test_whatever_the_api_server_says_is_a_machine_or_its_error(draw: st.DataObject) -> None:
    pods: list[Object] = []
    for whole in (placeholder(node="n-1"), node(_WARMING), work(_GPU, affinity=affinity("In", "gpu"))):
        body = mutated(whole.body, draw)
        with contextlib.suppress(errors.InvalidError):
            pods.append(made(body))
    takers = [found for pod in pods if (found := placeholders.taker(SETTINGS, pod)) is not None]
    machines = look(pods, [each for each in pods if each.meta.name == "n-1"], *takers)
    assert all(each.node_class in SETTINGS.classes for each in machines)
    counts = placeholders.wanted(SETTINGS, {}, takers)
    assert all(count >= 0 for count in counts.values())
