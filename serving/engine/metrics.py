"""The supervisor's own metrics, as Prometheus text; appended to the engine's wherever those are served.

`render` is given what happened and reads nothing itself. Names carry base units; no label is unbounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.engine.gpus import Reading
from serving.engine.requestlog.keeper import Totals
from serving.engine.state import Counters, Limits, State


@dataclass(frozen=True, slots=True)
class Facts:
    """What is to be said."""

    state: State
    limits: Limits
    in_flight: int
    waiting: int
    units_in_flight: float
    counters: Counters
    starts: int
    hangs: int
    phases: Mapping[str, float]
    logged: Totals
    dropped_spans: int
    gpus: Reading | None


def render(facts: Facts) -> bytes:
    """Text format 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Facts(facts))
    return generate_latest(registry)


class _Facts(Collector):
    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        facts = self._facts
        gauges: tuple[tuple[str, str, float], ...] = (
            ("in_flight_requests", "Requests that the engine works on.", facts.in_flight),
            ("waiting_requests", "Requests that wait for a place in flight.", facts.waiting),
            (
                "in_flight_units",
                "Model units that requests here are expected to cost.",
                facts.units_in_flight,
            ),
            ("limit_requests", "Requests that may be in flight.", facts.limits.in_flight),
            ("queue_limit_requests", "Requests that may wait.", facts.limits.queue_requests),
        )
        for name, words, value in (*gauges, *_of_gpus(facts.gpus)):
            yield GaugeMetricFamily(f"glowplug_engine_{name}", words, value)
        counters: tuple[tuple[str, str, float], ...] = (
            ("admitted_requests", "Requests let in.", facts.counters.admitted),
            ("rejected_requests", "Requests answered 429.", facts.counters.rejected),
            ("finished_requests", "Requests answered.", facts.counters.finished),
            ("failed_requests", "Requests answered with a status from 500 on.", facts.counters.failed),
            ("busy_seconds", "Time in flight, of all requests.", facts.counters.busy_nanoseconds / 1e9),
            ("finished_units", "Model units that ended requests did cost.", facts.counters.unit_micros / 1e6),
            ("starts", "Starts of the engine.", facts.starts),
            ("hangs", "Times that the engine was killed because it made no progress.", facts.hangs),
            ("request_log_written_records", "Requests in files of the log.", facts.logged.written),
            ("request_log_dropped_records", "Requests sampled and not kept.", facts.logged.dropped),
            ("dropped_spans", "Spans that the collector did not take.", facts.dropped_spans),
            ("request_log_files", "Files written or uploaded.", facts.logged.files),
            ("request_log_written_bytes", "Bytes of those files.", facts.logged.written_bytes),
        )
        for name, words, value in counters:
            yield CounterMetricFamily(f"glowplug_engine_{name}", words, value)
        states = GaugeMetricFamily("glowplug_engine_state", "1 for the state it is in.", labels=["state"])
        for state in State:
            states.add_metric([state.name.lower()], float(state is facts.state))
        yield states
        phases = GaugeMetricFamily(
            "glowplug_engine_start_phase_seconds",
            "How long each phase of the last start took.",
            labels=["phase"],
        )
        for phase, seconds in facts.phases.items():
            phases.add_metric([phase], seconds)
        yield phases


def _of_gpus(read: Reading | None) -> Iterator[tuple[str, str, float]]:
    """What is not known is left out."""
    if read is None:
        return
    if read.busy is not None:
        yield "gpu_busy_ratio", "Part of the last moments in which the busiest GPU did anything.", read.busy
    yield "gpus", "GPUs of the engine.", read.count
    yield "gpu_memory_bytes", "Memory in use on the engine's GPUs.", read.memory_bytes
    yield "gpu_memory_limit_bytes", "Memory of the engine's GPUs.", read.memory_limit_bytes
