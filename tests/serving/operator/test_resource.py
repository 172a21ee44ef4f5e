"""What a resource says, what its status remembers, what is routed of all; and the schema that is made of the
document's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors, service
from serving.controller import Count, Phase, Rollout
from serving.operator import definition, resource
from serving.operator.board import Board
from serving.replica import Replica, State
from tests.serving.operator.running import spec


def _nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for key, each in schema.get("properties", {}).items():
        yield from _nodes(each, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key], f"{path}.{key}")


def _schema() -> dict[str, Any]:
    found: dict[str, Any] = definition.document()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def test_the_schema_is_structural() -> None:
    """The rules of apiextensions.k8s.io/v1, which an API server would refuse it by."""
    nodes = list(_nodes(_schema()))
    assert len(nodes) > 80
    for path, node in nodes:
        assert not {"$ref", "anyOf", "oneOf", "const", "default", "title", "discriminator"} & set(node), path
        if node.get("x-kubernetes-int-or-string"):
            continue
        assert node["type"] in ("object", "array", "string", "integer", "number", "boolean"), path
        assert node["type"] != "array" or "items" in node, path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert node.get("additionalProperties", {}) is not False, path
        assert set(node.get("required", ())) <= set(node.get("properties", ())), path
        assert isinstance(node.get("exclusiveMinimum", True), bool), path


def test_every_key_of_the_document_is_in_it() -> None:
    spec_schema = _schema()["properties"]["spec"]
    assert spec_schema["required"] == ["engine"]
    whole = resource.wanted("chat", "models", spec()).document.model_dump(mode="json")

    def check(value: object, schema: dict[str, Any], path: str) -> None:
        if isinstance(value, dict) and "properties" in schema:
            for key, each in value.items():
                assert key in schema["properties"], f"{path}.{key}"
                check(each, schema["properties"][key], f"{path}.{key}")

    check(whole, spec_schema, "spec")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "other"}, "name: 'other' is not 'chat'; leave it out"),
        ({"provider": "process"}, "provider: 'process' is not 'kubernetes'"),
        ({"kubernetes": {"supervisor": "s", "namespace": "x"}}, "kubernetes.namespace: 'x' is not 'models'"),
        ({"kubernetes": {"supervisor": "s", "context": "x"}}, "kubernetes.context: the operator is in its"),
        ({"kubernetes": 7}, "kubernetes: should be"),
        ({"kubernetes": {}}, "kubernetes.supervisor: the provider kubernetes needs one"),
        ({"replicas": {"min": 0, "max": 3}}, "replicas.min: from 0 on"),
        ({"routing": {"port": 0}}, "routing.port: 0 is a free port of one machine"),
        ({"scaled": "many"}, "scaled: 'many' is no number"),
        ({"replica": {}}, "replica: unknown key; did you mean replicas?"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(change: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.DocumentError) as found:
        resource.wanted("chat", "models", {**spec(), **change})
    assert str(found.value).startswith(says)


@given(scaled=st.none() | st.integers(0, 20))
def test_the_scale_is_kept_within_the_documents_bounds(scaled: int | None) -> None:
    found = resource.wanted("chat", "models", {**spec(), "scaled": scaled})
    assert found.scaled == (None if scaled is None else min(max(scaled, 2), 8))
    assert found.document.kubernetes.namespace == "models"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_ROLLOUTS = st.builds(
    Rollout,
    stable=st.text(min_size=1, max_size=5),
    candidate=st.text(min_size=1, max_size=5),
    phase=st.sampled_from([Phase.STARTING, Phase.SHIFTING]),
    step=st.integers(0, 5),
    since=st.floats(0, 1e10),
    base=st.builds(Count, st.integers(0, 9), st.integers(0, 9)),
)


@given(_ROLLOUTS | st.builds(Rollout, stable=st.none() | st.text(min_size=1)), st.none() | st.text())
def test_the_status_is_the_memory(rollout: Rollout, refused: str | None) -> None:
    memory = resource.Memory(rollout, refused)
    shown = resource.Shown(1, memory, "v", {}, [], 1, 2, "a=b", [])
    status = json.loads(json.dumps(resource.status(shown, {}, 0.0)))
    assert resource.memory(status) == memory
    assert None not in status.values(), "an API server drops null"


@given(st.fixed_dictionaries({}, optional={"rollout": _JSON, "refused": _JSON, "conditions": _JSON}))
def test_a_status_that_somebody_else_wrote_is_no_memory(status: dict[str, Any]) -> None:
    found = resource.memory(status)
    assert isinstance(found.rollout, Rollout)
    made = resource.conditions([resource.Condition("Ready", True, "r", "m")], status, 1, 0.0)
    assert len(made) == 1


def test_a_condition_keeps_its_time_while_it_holds() -> None:
    def at(now: float, holds: bool, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        said = resource.Condition("Ready", holds, "r", f"at {now}")
        return resource.conditions([said], {"conditions": before}, 1, now)

    first = at(10.0, True, [])
    second = at(20.0, True, first)
    assert second[0]["lastTransitionTime"] == first[0]["lastTransitionTime"]
    assert second[0]["message"] == "at 20.0"
    assert at(30.0, False, second)[0]["lastTransitionTime"] != first[0]["lastTransitionTime"]


def test_why_replicas_are_missing_is_in_the_condition() -> None:
    replicas = [Replica("a", "v", None, State.FAILED, 0.0, reason="ErrImagePull: no")]
    ready, progressing = resource.progress(Rollout(stable="v"), replicas, 2)
    assert (ready.holds, ready.message) == (False, "0 of 2 replicas of v are ready: ErrImagePull: no")
    assert progressing.holds is False


class _Router:
    def __init__(self) -> None:
        self.told: list[list[str]] = []
        self.refuses = False

    def update(self, found: Any) -> None:
        if self.refuses:
            raise errors.DocumentError("no")
        self.told.append([each.name for each in found])


def _service(name: str, port: int) -> service.Service:
    return service.Service(name, service.Listen(port, "0.0.0.0"))


def test_nothing_is_told_before_everybody_has_spoken() -> None:
    router, now = _Router(), [0.0]
    board = Board(router.update, ["a", "b", "c"], lambda: now[0])
    assert not board.publish(_service("a", 1))
    board.withdraw("b")
    assert router.told == []
    assert board.publish(_service("c", 3))
    assert router.told == [["a", "c"]]
    board.withdraw("a")
    assert router.told[-1] == ["c"]


def test_who_is_late_is_not_waited_for_for_ever() -> None:
    router, now = _Router(), [0.0]
    board = Board(router.update, ["a", "b"], lambda: now[0])
    assert not board.publish(_service("a", 1))
    now[0] = 1_000.0
    assert board.publish(_service("a", 1))
    assert router.told == [["a"]]


def test_a_port_that_is_taken_is_refused_to_who_comes_second() -> None:
    router = _Router()
    board = Board(router.update, ["a", "b"])
    board.publish(_service("a", 1))
    assert router.told == []  # b has not spoken
    with pytest.raises(errors.DocumentError, match=r"routing\.port: 1 is the endpoint a's; choose another"):
        board.publish(_service("b", 1))
    board.publish(_service("a", 1))
    assert router.told[-1] == ["a"]
    router.refuses = True
    with pytest.raises(errors.DocumentError):
        board.publish(_service("a", 2))
    router.refuses = False
    board.publish(_service("b", 2))
    assert router.told[-1] == ["a", "b"], "what was refused has left no trace"
