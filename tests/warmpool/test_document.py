"""The document: what it says when it is wrong."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from warmpool import document, errors
from warmpool.settings import Ec2Provider, KubernetesProvider, SimulatedProvider

KUBERNETES = """
name: gpu
provider:
  kind: kubernetes
  classes:
    h100:
      node_selector: {karpenter.sh/nodepool: h100}
      resources: {nvidia.com/gpu: "8"}
demand: {kind: kubernetes}
election: {kind: lease}
policy:
  classes: {h100: {floor: 1, cap: 4}}
warmth:
  agents: {token_file: /etc/glowplug/peers.token}
  images: [{image: registry.example/base:v1}]
"""
EC2 = """
provider:
  kind: ec2
  region: eu-central-1
  classes: {h100: {auto_scaling_group: gpu, pool_state: Hibernated, lifecycle_hook: warm}}
demand:
  kind: serve
  endpoints: [{url: "http://10.0.0.1:8080", node_class: h100, replicas_per_node: 8}]
hand_over: served
policy:
  classes: {h100: {}}
"""


def test_whole_documents() -> None:
    assert isinstance(document.parse(KUBERNETES, "a").provider, KubernetesProvider)
    assert isinstance(document.parse(EC2, "b").provider, Ec2Provider)
    small = (
        "provider: {kind: simulated, classes: {a: {}}}\n"
        "demand: {kind: file, path: d}\n"
        "policy: {classes: {a: {}}}\n"
    )
    assert isinstance(document.parse(small, "c").provider, SimulatedProvider)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            KUBERNETES + "intervall_seconds: 3\n",
            "a.yaml:16: intervall_seconds: unknown key; did you mean interval_seconds?",
        ),
        (
            KUBERNETES.replace("node_selector:", "nodeselector:"),
            "did you mean provider.classes.h100.node_selector?",
        ),
        (
            KUBERNETES.replace("cap: 4", "kap: 4"),
            "a.yaml:12: policy.classes.h100.kap: unknown key; did you mean",
        ),
        (
            KUBERNETES.replace("kind: kubernetes\n  classes", "kind: k8s\n  classes"),
            "a.yaml:4: provider.kind: must be one of",
        ),
        (
            KUBERNETES.replace("{h100: {floor: 1, cap: 4}}", "{b200: {}}"),
            "provider.classes: 'b200' is missing",
        ),
        (KUBERNETES.replace("{floor: 1, cap: 4}", "{floor: 5, cap: 4}"), "cap: 4 is below floor (5)"),
        (
            KUBERNETES.replace("{token_file: /etc/glowplug/peers.token}", "{}"),
            "agents answer nobody without a secret",
        ),
        (
            KUBERNETES.replace("  agents: {token_file: /etc/glowplug/peers.token}\n", ""),
            "agents: needed with images",
        ),
        (KUBERNETES + "name: other\n", "a.yaml:16: name is given twice; keep one"),
        (EC2 + "election: {kind: lease}\n", "election.kind: a lease needs provider.kind: kubernetes"),
        (
            EC2.replace("node_class: h100", "node_class: b200"),
            "demand.endpoints.0.node_class: 'b200' is no class",
        ),
        (EC2.replace('url: "http://10.0.0.1:8080"', "url: ftp://x"), "'ftp://x' is no http: or https: URL"),
        (EC2.replace('url: "http://10.0.0.1:8080", ', ""), "give either url or socket"),
        (EC2.replace("Hibernated", "hibernated"), "should be 'Stopped', 'Hibernated' or 'Running'"),
        ("[1]", "is a mapping of keys"),
        ("a: [", "not YAML"),
        ("", "is a mapping of keys"),
        ("x" * (2 << 20), "no document of ours"),
    ],
)
def test_an_error_names_line_key_and_remedy(text: str, said: str) -> None:
    with pytest.raises(errors.InvalidInputError) as caught:
        document.parse(text, "a.yaml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("a.yaml")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=200) | st.binary(max_size=100).map(lambda data: data.decode("latin-1")))
def test_any_text_is_settings_or_our_error(text: str) -> None:
    with pytest.raises(errors.InvalidInputError):
        document.parse(text, "any")


@given(st.data())
def test_any_value_anywhere_is_settings_or_our_error(data: st.DataObject) -> None:
    whole = yaml.safe_load(data.draw(st.sampled_from([KUBERNETES, EC2])))
    place = whole
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        deeper = place[key]
        if not isinstance(deeper, (dict, list)) or not deeper or data.draw(st.booleans()):
            break
        place = deeper
    place[key] = data.draw(_JSON)
    with contextlib.suppress(errors.InvalidInputError):
        document.parse(yaml.safe_dump(whole), "any")
