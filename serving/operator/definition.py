"""The CustomResourceDefinition of endpoints, made of the endpoint document's schema. Pure.

Called by `glowplug operator crd`, whose output is committed as deploy/kustomize/serving/crd.yaml. A
structural schema has no references, no unions and no null: engines' keys become one object, of which
`serving.endpoint` still says what belongs together. Defaults are left out, or each stored object would keep
those of the version that it was made with.

`kubectl get endpoints` is another resource of Kubernetes, so ours is called modelendpoints.

Spec: apiextensions.k8s.io/v1, "Specifying a structural schema".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.objects import Kind
from serving import endpoint

GROUP = "glowplug.dev"
VERSION = "v1alpha1"
KIND = Kind(f"{GROUP}/{VERSION}", "ModelEndpoint", "modelendpoints")
_KEPT = ("description", "type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength")
_COUNTED = ("minItems", "maxItems")
_COUNT = {"type": "integer"}
_TEXT = {"type": "string"}


def document() -> dict[str, Any]:
    """The whole definition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{KIND.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND.name,
                "plural": KIND.plural,
                "singular": KIND.name.lower(),
                "shortNames": ["mep"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _whole()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.scaled",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        {"name": "Ready", "type": "integer", "jsonPath": ".status.readyReplicas"},
                        {"name": "Wanted", "type": "integer", "jsonPath": ".status.wantedReplicas"},
                        {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
                        {"name": "Version", "type": "string", "jsonPath": ".status.stable"},
                        {
                            "name": "Valid",
                            "type": "string",
                            "jsonPath": '.status.conditions[?(@.type=="Valid")].status',
                        },
                        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                    ],
                }
            ],
        },
    }


def _whole() -> dict[str, Any]:
    schema = endpoint.json_schema()
    spec = structural(schema, schema.get("$defs", {}))
    # The resource's own name and the operator say these.
    spec["required"] = [each for each in spec["required"] if each not in ("name", "provider")]
    spec["properties"]["scaled"] = {
        "type": "integer",
        "minimum": 0,
        "description": "Replicas, as kubectl scale or a HorizontalPodAutoscaler says, between replicas.min "
        "and replicas.max. Left out, autoscaling says.",
    }
    return {
        "type": "object",
        "description": "One served model: the endpoint document, with the resource's name as its own.",
        "required": ["spec"],
        "properties": {"spec": spec, "status": _status()},
    }


def structural(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema (2020-12) as a structural one."""
    if "$ref" in schema:
        found = structural(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {**found, **{key: schema[key] for key in ("description",) if key in schema}}
    variants = schema.get("anyOf") or schema.get("oneOf")
    if variants is not None:
        made = _union([structural(each, definitions) for each in variants if each.get("type") != "null"])
        if any(each.get("type") == "null" for each in variants):
            made["nullable"] = True
        return {**made, **{key: schema[key] for key in ("description",) if key in schema}}
    made = {key: schema[key] for key in (*_KEPT, *_COUNTED) if key in schema}
    if "const" in schema:
        made["enum"] = [schema["const"]]
    for bound, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if strict in schema:
            made |= {bound: schema[strict], strict: True}
    if "items" in schema:
        made["items"] = structural(schema["items"], definitions)
    if "properties" in schema:
        made["properties"] = {
            key: structural(each, definitions) for key, each in schema["properties"].items()
        }
        if schema.get("required"):
            made["required"] = list(schema["required"])
    elif isinstance(schema.get("additionalProperties"), Mapping):
        made["additionalProperties"] = structural(schema["additionalProperties"], definitions)
    return made


def _union(variants: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema that takes what any of them takes, and perhaps more."""
    first, *others = variants
    if not others:
        return first
    if not all(each.get("type") == "object" for each in variants):
        if {each.get("type") for each in variants} == {"integer", "string"}:
            return {"x-kubernetes-int-or-string": True}
        raise ValueError(f"no structural schema takes {[each.get('type') for each in variants]}")
    properties: dict[str, Any] = {}
    for each in variants:
        for key, schema in each.get("properties", {}).items():
            before = properties.get(key, schema)
            kinds = [*before.get("enum", []), *schema.get("enum", [])]
            properties[key] = {**before, "enum": list(dict.fromkeys(kinds))} if kinds else before
    required = set.intersection(*(set(each.get("required", ())) for each in variants))
    return {
        "type": "object",
        "properties": properties,
        **({"required": sorted(required)} if required else {}),
    }


def _status() -> dict[str, Any]:
    condition = {
        "type": "object",
        "required": ["type", "status", "reason", "message", "lastTransitionTime"],
        "properties": {
            **dict.fromkeys(("type", "status", "reason", "message"), _TEXT),
            "lastTransitionTime": {"type": "string", "format": "date-time"},
            "observedGeneration": _COUNT,
        },
    }
    return {
        "type": "object",
        "properties": {
            "observedGeneration": _COUNT,
            "replicas": _COUNT,
            "readyReplicas": _COUNT,
            "wantedReplicas": _COUNT,
            "limit": _COUNT,
            "selector": _TEXT,
            "phase": _TEXT,
            "version": _TEXT,
            "stable": _TEXT,
            "candidate": _TEXT,
            "weights": {"type": "object", "additionalProperties": _COUNT},
            "rollout": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "refused": _TEXT,
            "conditions": {
                "type": "array",
                "items": condition,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            },
        },
    }
