"""A controller's report as one JSON document, as Prometheus metrics, as a page, and as text. Pure.

The document is what `glowplug warmpool status --json` prints, what the page shows and what /metrics is made
of; it holds no secret. Class names are the settings', so labels are bounded.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from warmpool import backoff
from warmpool.observation import Node, NodeState, Pool, PoolDecision
from warmpool.orders import Admit, Hold, Order, Replace, Serve
from warmpool.report import Event, Report

_REASON_CHARACTERS = 300


def document(
    name: str, report: Report | None, events: Sequence[Event], errors_total: Mapping[tuple[str, str], int]
) -> dict[str, Any]:
    """What is known now; `report` is None before the first round."""
    out: dict[str, Any] = {
        "name": name,
        "at": None if report is None else report.at,
        "leading": report is not None and report.leading,
        "holder": "" if report is None else report.holder,
        "trouble": {} if report is None else dict(report.trouble),
        "pools": [],
        "orders": [],
        "events": [{"at": each.at, "node_class": each.node_class, "text": each.text} for each in events],
        "errors_total": [
            {"node_class": node_class, "kind": kind, "count": count}
            for (node_class, kind), count in sorted(errors_total.items())
        ],
    }
    if report is None or report.observation is None or report.decision is None:
        return out
    decisions = {each.node_class: each for each in report.decision.pools}
    out["pools"] = [_pool(report, pool, decisions[pool.node_class]) for pool in report.observation.pools]
    out["orders"] = [
        {"node_class": each.node_class, "text": text(each), "error": report.failed.get(each, "")}
        for each in report.given
    ]
    return out


def _pool(report: Report, pool: Pool, decision: PoolDecision) -> dict[str, Any]:
    why = decision.explanation
    ageing = report.roster.ageing.get(pool.node_class)
    wait = backoff.blocking(report.waits, pool.node_class, report.at)
    counts = Counter(node.state for node in pool.nodes)
    return {
        "node_class": pool.node_class,
        "wanted": pool.wanted,
        "size": decision.size,
        "request": decision.request,
        "release": list(decision.release),
        "replace": list(decision.replace),
        "states": {state.value: counts.get(state, 0) for state in NodeState},
        "nodes": [_node(report, node) for node in pool.nodes],
        "past_its_time": None if ageing is None else ageing.name,
        "blocked_until": None if wait is None else wait.until,
        "blocked": "" if wait is None else wait.reason[:_REASON_CHARACTERS],
        "hits": report.roster.tally.hits.get(pool.node_class, 0),
        "misses": report.roster.tally.misses.get(pool.node_class, 0),
        "images": [
            {"image": each.image, "chance": round(each.chance, 4), "required": each.required}
            for each in report.images.get(pool.node_class, ())
        ],
        "mode": why.mode.value,
        "model": why.model,
        "lead_seconds": _finite(why.lead_seconds),
        "expected": _finite(why.expected),
        "quantile": _finite(why.quantile),
        "clamps": [{"rule": each.rule, "before": each.before, "after": each.after} for each in why.clamps],
        "breaker": why.breaker,
        "note": why.note,
    }


def _node(report: Report, node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "state": node.state.value,
        "since": node.since,
        "reason": node.reason[:_REASON_CHARACTERS],
        "lacking": list(report.lacking.get(node.name, ())),
    }


def text(order: Order) -> str:
    """An order in words."""
    match order:
        case Admit(_, name, because):
            return f"admit {name}: {because}"
        case Replace(_, name, because):
            return f"take {name} away: {because}"
        case Hold(_, count, before, release):
            named = f", {', '.join(release)} first" if release else ""
            return f"hold {count} (now {before}){named}"
        case Serve(_, count):
            return f"have {count} in use"


def explained(pool: Mapping[str, Any]) -> list[str]:
    """One pool of the document, and why it has its size, in lines."""
    wanted = "unknown" if pool["wanted"] is None else str(pool["wanted"])
    states = ", ".join(f"{count} {state}" for state, count in pool["states"].items() if count) or "none"
    lines = [
        f"{pool['node_class']}: {pool['size']} to be held; wanted by work: {wanted}; nodes: {states}",
        f"  by {pool['mode']} ({pool['model']}): {_shown(pool['expected'])} requests expected within "
        f"{_shown(pool['lead_seconds'])} s of lead time"
        + ("" if pool["quantile"] is None else f", covered with {100 * pool['quantile']:.1f} %"),
    ]
    lines += [f"  {each['rule']}: {each['before']} -> {each['after']}" for each in pool["clamps"]]
    lines += [
        f"  {label}: {pool[key]}"
        for key, label in (("breaker", "circuit breaker"), ("note", "note"))
        if pool[key]
    ]
    if pool["blocked"]:
        lines.append(f"  requests are held back: {pool['blocked']}")
    asked = pool["hits"] + pool["misses"]
    if asked:
        lines.append(
            f"  handed over: {asked}, of them warm {pool['hits']} ({100 * pool['hits'] / asked:.1f} %)"
        )
    for node in pool["nodes"]:
        why = "; ".join(node["lacking"]) or node["reason"]
        if why:
            lines.append(f"  {node['name']} is {node['state']}: {why}")
    return lines


def metrics(status: Mapping[str, Any]) -> bytes:
    """The Prometheus text format."""
    return ("\n".join(_lines(status)) + "\n").encode()


_GAUGES = (
    ("size", "Nodes that should be warm or coming."),
    ("wanted", "Nodes that work has or waits for; absent while that is not known."),
    ("expected", "Requests expected within the lead time."),
    ("lead_seconds", "Lead time that the size covers."),
    ("blocked_until", "Unix time until which requests are held back; absent while they are not."),
)


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    yield from _head("leading", "gauge", "1 on the controller that acts.")
    yield f"glowplug_warmpool_leading {int(status['leading'])}"
    if status["at"] is not None:
        yield from _head("last_round_timestamp_seconds", "gauge", "When the last round began, Unix time.")
        yield f"glowplug_warmpool_last_round_timestamp_seconds {status['at']:.3f}"
    yield from _head("trouble", "gauge", "Things that cannot be looked at or done now.")
    yield f"glowplug_warmpool_trouble {len(status['trouble'])}"
    pools = status["pools"]
    yield from _head("nodes", "gauge", "Nodes of the pool by state.")
    for pool in pools:
        for state, count in pool["states"].items():
            yield f'glowplug_warmpool_nodes{{node_class="{pool["node_class"]}",state="{state}"}} {count}'
    for key, help_text in _GAUGES:
        yield from _head(key, "gauge", help_text)
        for pool in pools:
            if pool[key] is not None:
                yield f'glowplug_warmpool_{key}{{node_class="{pool["node_class"]}"}} {pool[key]:g}'
    yield from _head("reactive", "gauge", "1 while the size is not the forecast's.")
    for pool in pools:
        reactive = int(pool["mode"] != "forecast")
        yield f'glowplug_warmpool_reactive{{node_class="{pool["node_class"]}"}} {reactive}'
    yield from _head("breaker_open", "gauge", "1 while the circuit breaker does not believe the forecast.")
    for pool in pools:
        is_open = int(bool(pool["breaker"]))
        yield f'glowplug_warmpool_breaker_open{{node_class="{pool["node_class"]}"}} {is_open}'
    yield from _head("handed_total", "counter", "Nodes handed over: warm (hit) or not (miss).")
    for pool in pools:
        for result, key in (("hit", "hits"), ("miss", "misses")):
            labels = f'node_class="{pool["node_class"]}",result="{result}"'
            yield f"glowplug_warmpool_handed_total{{{labels}}} {pool[key]}"
    yield from _head("errors_total", "counter", "Failures by class (none: the provider) and kind.")
    for each in status["errors_total"]:
        labels = f'node_class="{each["node_class"]}",kind="{each["kind"]}"'
        yield f"glowplug_warmpool_errors_total{{{labels}}} {each['count']}"


def page(status: Mapping[str, Any]) -> str:
    """The document as HTML without scripts."""
    said = [line for pool in status["pools"] for line in explained(pool)]
    said += [f"order for {each['node_class']}: {each['text']} {each['error']}" for each in status["orders"]]
    trouble = [f"{place}: {what}" for place, what in status["trouble"].items()]
    events = [each["text"] for each in reversed(status["events"])]
    parts = [("Pools", said), ("Trouble", trouble), ("Events, the latest first", events)]
    body = "".join(
        f"<h2>{title}</h2><pre>{html.escape(chr(10).join(lines) or 'none')}</pre>" for title, lines in parts
    )
    title = html.escape(f"warm pool {status['name']}")
    role = "acts" if status["leading"] else "does not act"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="15">'
        f"<title>{title}</title><style>body{{font:15px sans-serif;margin:2em}}</style>"
        f"<h1>{title}</h1><p>This controller {role}; "
        f"leader: {html.escape(status['holder'] or 'unknown')}</p>{body}"
    )


def _head(name: str, kind: str, help_text: str) -> Iterator[str]:
    yield f"# HELP glowplug_warmpool_{name} {help_text}"
    yield f"# TYPE glowplug_warmpool_{name} {kind}"


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"
