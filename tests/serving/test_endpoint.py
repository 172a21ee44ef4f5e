"""The endpoint document: what is read, what is refused, and that a refusal names key, line and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving import changes, endpoint, errors

DOCUMENT = """\
name: chat
engine:
  kind: command
  command: [python3, server.py]
replicas:
  min: 2
  max: 4
"""


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("name: X\nengine: {kind: command, command: [a]}", 1, "name: 'X' is no name; use"),
        ("name: a\nengin: {}", 2, "engin: unknown key; did you mean engine?"),
        ("name: a\nengine:\n  kind: command\n  comand: [a]", 4, "did you mean engine.command?"),
        (
            "name: a\nengine: {kind: vllm}\nmodel: /m\nmin: 4",
            4,
            "min: unknown key; did you mean replicas.min?",
        ),
        (
            "name: a\nengine: {kind: triton}",
            2,
            "engine.kind: 'triton' is reserved and not there yet; use vllm",
        ),
        ("name: a\nengine: {kind: foo}", 2, "engine.kind: 'foo' is no engine; use vllm or command"),
        ("name: a\nengine: {}", 2, "engine.kind: is required"),
        ("name: a\nengine: {kind: vllm}", 1, "model: the engine vllm needs one"),
        ("name: a\nname: b", 2, "name is given twice"),
        (DOCUMENT.replace("max: 4", "max: 1"), 7, "replicas.max: 1 is below min (2); raise max or lower min"),
        (DOCUMENT.replace("min: 2", "min: two"), 6, "replicas.min: should be a valid integer, not 'two'"),
        (DOCUMENT + "  target_concurrency: .nan", 8, "replicas.target_concurrency: should be"),
        (
            DOCUMENT + "  target_concurrency: 8\n  concurrency_limit: 4",
            9,
            "replicas.concurrency_limit: 4 is below target_concurrency (8)",
        ),
        (
            DOCUMENT + "autoscaling: {schedules: [{begins: 8am, ends: '18:00', min: 2}]}",
            8,
            "autoscaling.schedules.0.begins: string should match",
        ),
        (
            DOCUMENT + "autoscaling:\n  schedules: [{begins: '08:00', ends: '18:00', min: 5}]",
            9,
            "autoscaling.schedules.0.min: 5 is above replicas.max (4)",
        ),
        (
            DOCUMENT + "autoscaling:\n  limit: {max: 8}",
            9,
            "autoscaling.limit: 4 to 8 leaves out the limit that replicas begin with (16)",
        ),
        (DOCUMENT + "update: {steps_percent: [50, 20]}", 8, "update.steps_percent: [50, 20] must rise"),
        (DOCUMENT + "provider: containerd", 8, "image: the provider containerd runs replicas in an image"),
        (DOCUMENT + "image: docker://r/a", 8, "image: the provider process runs replicas on this machine"),
        (DOCUMENT + "model: gs://b/x", 8, "model: 'gs://b/x' is of a kind that is not known"),
        (
            DOCUMENT + "provider: kubernetes\nimage: r/a",
            1,
            "kubernetes.supervisor: the provider kubernetes needs one",
        ),
        ("name: [", 1, "not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_its_remedy(text: str, line: int, says: str) -> None:
    with pytest.raises(errors.DocumentError) as caught:
        endpoint.load(text, "e.yaml")
    assert says in str(caught.value)
    # What is missing altogether has no line of its own.
    assert "e.yaml" in str(caught.value)
    if "needs one" not in says and "runs replicas in" not in says:
        assert f"e.yaml:{line}: " in str(caught.value)


def test_every_error_is_said_at_once() -> None:
    with pytest.raises(errors.DocumentError) as caught:
        endpoint.load("name: X\nengine: {kind: command}\nreplicas: {min: -1}", "e.yaml")
    assert len(str(caught.value).splitlines()) == 3


def test_defaults_follow_from_what_is_given() -> None:
    read = endpoint.load(DOCUMENT, "e.yaml")
    assert (read.replicas.most, read.replicas.limit) == (4, 16)
    alone = endpoint.load(DOCUMENT.replace("  max: 4\n", ""), "e.yaml")
    assert alone.replicas.most == 2


def test_json_and_back() -> None:
    read = endpoint.load(DOCUMENT, "e.yaml")
    assert endpoint.from_json(endpoint.to_json(read)) == read


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_TREES = st.recursive(
    _SCALARS,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=10), below),
    max_leaves=20,
)
_KEYS = st.sampled_from(sorted(endpoint.Endpoint.model_fields))


@given(st.dictionaries(_KEYS, _TREES))
def test_whatever_the_values_only_our_error_leaves(document: dict[str, object]) -> None:
    with pytest.raises(errors.DocumentError):
        endpoint.load(
            yaml.safe_dump({"name": "UPPER", **document, "engine": document.get("engine", 1)}), "e.yaml"
        )


@given(st.text(max_size=200))
def test_whatever_the_text_only_our_error_leaves(text: str) -> None:
    with pytest.raises(errors.DocumentError):
        endpoint.load(text, "e.yaml")


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(errors.DocumentError):
        endpoint.load("[" * 100_000, "e.yaml")


def test_scaling_on_units_needs_to_know_them() -> None:
    cost = {"request_seconds": 0.5, "input_token_seconds": 0.25, "output_token_seconds": 1}
    wanted = {"autoscaling": {"unit": "units"}, "replicas": {"target_concurrency": 4, "target_units": 2}}
    assert _changed(**wanted, units=cost).reference_units == 0.5
    assert _changed().reference_units is None
    for lacking in (wanted, {**wanted, "replicas": {}, "units": cost}):
        with pytest.raises(errors.DocumentError, match="calibrate"):
            _changed(**lacking)
    with pytest.raises(errors.DocumentError, match="learned"):
        _changed(**wanted | {"autoscaling": {"unit": "units", "limit": {"enabled": True}}}, units=cost)


def test_the_published_schema_is_current() -> None:
    published = Path(__file__).parents[2] / "docs" / "endpoint-schema.json"
    assert json.loads(published.read_text()) == endpoint.json_schema(), (
        "write it again: glowplug endpoint schema > docs/endpoint-schema.json; "
        "glowplug operator crd > deploy/kustomize/serving/crd.yaml is made of it, too"
    )


def _changed(**sections: object) -> endpoint.Endpoint:
    return endpoint.load(yaml.safe_dump({**yaml.safe_load(DOCUMENT), **sections}), "e.yaml")


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"replicas": {"min": 3, "max": 4}}, ["replicas.min"]),
        ({"metadata": {"team": "x"}}, ["metadata.team"]),
        ({"routing": {"port": 9000}}, ["routing.port"]),
        ({"limits": {"request_bytes": 4096}}, ["limits.request_bytes"]),
        ({"autoscaling": {"idle_seconds": 60}}, ["autoscaling.idle_seconds"]),
        ({"update": {"step_seconds": 1}}, ["update.step_seconds"]),
    ],
)
def test_routing_limits_and_metadata_restart_nothing(sections: dict[str, object], keys: list[str]) -> None:
    old, new = endpoint.load(DOCUMENT, "e.yaml"), _changed(**sections)
    found = changes.plan(old, new)
    assert [each.key for each in found] == keys
    assert {each.effect for each in found} == {changes.Effect.LIVE}
    assert changes.version(old) == changes.version(new)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": "/m"}, "model"),
        ({"engine": {"kind": "command", "command": ["python3", "other.py"]}}, "engine.command"),
        ({"resources": {"cpus": 1}}, "resources.cpus"),
        ({"fp8": {"enabled": True}}, "fp8.enabled"),
    ],
)
def test_what_a_replica_is_started_with_restarts_it(sections: dict[str, object], key: str) -> None:
    old, new = endpoint.load(DOCUMENT, "e.yaml"), _changed(**sections)
    assert [(each.key, each.effect) for each in changes.plan(old, new)] == [(key, changes.Effect.RESTART)]
    assert changes.version(old) != changes.version(new)


def test_every_section_is_live_or_restarts_and_the_version_agrees() -> None:
    """A section that is added later must not be forgotten in one of the two."""
    old = endpoint.load(DOCUMENT, "e.yaml")
    new = endpoint.load(
        """\
name: chat
engine: {kind: vllm, api_servers: 2}
model: /m
model_name: other
provider: process
objectives: {p99_seconds: 1}
fp8: {enabled: true}
resources: {gpus: 1}
""",
        "e.yaml",
    )
    found = changes.plan(old, new)
    assert any(each.effect is changes.Effect.RESTART for each in found)
    assert changes.plan(None, new)
    assert changes.plan(new, new) == []


def test_a_name_cannot_change_in_place() -> None:
    with pytest.raises(errors.ConflictError, match="name: 'chat' cannot become 'talk'"):
        changes.plan(endpoint.load(DOCUMENT, "e.yaml"), _changed(name="talk"))
