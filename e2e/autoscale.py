"""An endpoint that scales itself, live: `glowplug serve` on this machine under load that ramps, jumps and
drops, with a replica killed on the way.

    python -m e2e.autoscale [--vllm PYTHON --model DIR] [--out results/autoscale]

Everything is real: Envoy, the activator, the control plane, `glowplug engine` before engines with a set
service time (`setengine`), or vLLM; the load is open-loop Poisson (`serving.stress`). Draws the figures of
`glowplug autoscale simulate` from what was seen (replicas, latencies, cost), and writes the numbers of each
phase to live.json: what was late (over twice the service time, and 0.25 s), refused, lost; how long the
replicas took to be enough after a ramp, a jump, a kill. Nothing is asserted. Three minutes and a start.

vLLM is measured before it is loaded, because what two processors can do, and how long a start takes there,
depends on who else is at them: rates are parts of what its first replica answers when it is full, and phases
are as long as that one's start makes them. Seven minutes, with starts of one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from serving import client, errors
from serving.autoscaler.simulate import fleet, judgement, plots, run, sweep
from serving.stress import arrivals, load
from serving.stress.judgement import Sample

_GLOWPLUG = (sys.executable, "-c", "from glowplug.cli import main; main()")
_NAME = "live"
_READY_SECONDS = 900.0
_SLOTS = 4
_SERVICE_SECONDS = 0.25
_START_SECONDS = 3.0
_TOKENS = arrivals.Tokens(20, 20)
_PROBE_SECONDS = 8.0
_QUIET_SECONDS = 10.0
"""From what was sent to measure to what is counted: load reports are a second old."""
_TOP_PART = 0.8
"""Of what a full replica answers: more than its target, and no more than the processors can do, since a
second replica adds none."""
_LONGEST_PLATEAU_SECONDS = 240.0


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of load; the rate goes from one to the other exponentially. `kill`: a replica, from half of
    it on, as soon as there are two: where starts are slow, in a later one, but not in the last."""

    name: str
    seconds: float
    first_per_second: float
    last_per_second: float
    kill: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """With how much an endpoint is loaded: `scale` multiplies every rate of the phases. `service_seconds`: of
    a request on a full replica."""

    service_seconds: float
    scale: float
    phases: tuple[Phase, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What is served. Without a plan, one is made by what the first replica can do."""

    document: dict[str, Any]
    path: str
    body: bytes | None
    start_seconds: float
    plan: Plan | None


PHASES = (
    Phase("quiet", 20, 2, 2),
    Phase("ramp", 30, 2, 40),
    Phase("plateau with a replica killed", 30, 40, 40, kill=True),
    Phase("drop", 50, 3, 3),
    Phase("spike", 20, 40, 40),
    Phase("after", 30, 3, 3),
)


def slow_phases(start_seconds: float) -> tuple[Phase, ...]:
    """For replicas that start so slowly: on the plateau there is time for one that was asked for on the ramp,
    and for one more after the kill."""
    plateau = min(3 * start_seconds, _LONGEST_PLATEAU_SECONDS)
    seconds = (15.0, max(30.0, start_seconds / 2), plateau, 60.0, 20.0, 40.0)
    return tuple(
        dataclasses.replace(each, seconds=float(round(length)))
        for each, length in zip(PHASES, seconds, strict=True)
    )


def schedule(phases: Sequence[Phase], scale: float, draw: random.Random) -> list[arrivals.Arrival]:
    """Poisson arrivals, second by second."""
    found, begin = [], 0.0
    for phase in phases:
        growth = math.log(phase.last_per_second / phase.first_per_second) / phase.seconds
        for second in range(int(phase.seconds)):
            rate = scale * phase.first_per_second * math.exp(growth * (second + 0.5))
            for each in arrivals.poisson(rate, 1.0, _TOKENS, draw.random):
                found.append(arrivals.Arrival(begin + second + each.at_seconds, each.tokens))
        begin += phase.seconds
    return found


def small_engines(folder: Path) -> Target:
    """Command engines of which the machine can hold many."""
    environment = {
        "SLOTS": str(_SLOTS),
        "SERVICE_SECONDS": str(_SERVICE_SECONDS),
        "START_SECONDS": str(_START_SECONDS),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    document = {
        "name": _NAME,
        "engine": {
            "kind": "command",
            "command": [sys.executable, "-m", "e2e.setengine"],
            "environment": environment,
        },
        "replicas": {"min": 1, "max": 10, "target_concurrency": 3, "concurrency_limit": _SLOTS},
    }
    return Target(document, "/work", b"{}", _START_SECONDS, Plan(_SERVICE_SECONDS, 1.0, PHASES))


def vllm_engines(folder: Path, python: str, model: str) -> Target:
    """vLLM on this machine's processors: two replicas at the most."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    document = {
        "name": _NAME,
        "engine": {
            "kind": "vllm",
            "python": python,
            "arguments": ["--enforce-eager", "--max-model-len", "512", "--dtype", "bfloat16"],
            "environment": environment,
        },
        "model": model,
        "replicas": {"min": 1, "max": 2, "target_concurrency": 2, "concurrency_limit": _SLOTS},
    }
    return Target(document, "/v1/completions", None, 60.0, None)


def planned(sender: load.Sender, start_seconds: float) -> Plan:
    """By what the only replica answers with all its places taken."""
    asyncio.run(_closed_loop(sender, _PROBE_SECONDS / 4))  # the first requests of a process are its slowest
    began = time.monotonic()
    answered = asyncio.run(_closed_loop(sender, _PROBE_SECONDS))
    if not answered:
        raise RuntimeError(f"no request was answered with 200 in {_PROBE_SECONDS:g} s")
    rate = answered / (time.monotonic() - began)
    top = max(each.last_per_second for each in PHASES)
    return Plan(_SLOTS / rate, _TOP_PART * rate / top, slow_phases(start_seconds))


async def _closed_loop(sender: load.Sender, seconds: float) -> int:
    """How many requests were answered, one after the other in each of a replica's places."""
    until = time.monotonic() + seconds

    async def client() -> int:
        good = 0
        while time.monotonic() < until:
            (answer,) = await sender.send([arrivals.Arrival(0.0, _TOKENS)])
            good += answer.status == 200
        return good

    return sum(await asyncio.gather(*(client() for _ in range(_SLOTS))))


@contextlib.contextmanager
def served(folder: Path, target: Target) -> Iterator[tuple[str, client.Client]]:
    """Its address, and who to ask about it. It scales itself from the beginning where there is a plan: one
    replica is to be measured else."""
    file = folder / "endpoint.yaml"
    file.write_text(_document(target, "off" if target.plan is None else "on"))
    state = folder / "s"
    command = [*_GLOWPLUG, "serve", str(file), "--state", str(state), "--status", "none", "--plain"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise RuntimeError((folder / "log").read_text())
        asked = client.Client(state, _NAME)
        until = time.monotonic() + _READY_SECONDS
        while not _ready(asked.get("/api/v1/status")):
            if time.monotonic() > until:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.2)
        time.sleep(2.0)  # Envoy finds it healthy
        yield url, asked
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate()


def _document(target: Target, mode: str) -> str:
    settings = {"mode": mode, "start_seconds": target.start_seconds, "down_window_seconds": 30}
    return yaml.safe_dump({**target.document, "autoscaling": settings, "routing": {"port": 0}})


def _ready(status: dict[str, Any]) -> list[str]:
    return [each["name"] for each in status["replicas"] if each["state"] == "ready"]


def _start_seconds(status: dict[str, Any]) -> list[float]:
    """Of the replicas that are ready."""
    there = [each for each in status["replicas"] if each["state"] == "ready"]
    return [each["ready_at"] - each["created_at"] for each in there]


class Watcher:
    """Asks once a second what there is, on a thread of its own, and kills a replica when it is time and two
    are ready. `kills`: from when to when."""

    def __init__(
        self, folder: Path, asked: client.Client, began: float, kills: Sequence[tuple[float, float]]
    ) -> None:
        self._folder, self._asked, self._began = folder, asked, began
        self._kills = list(kills)
        self.killed: list[int] = []
        """The seconds in which one was."""
        self.starts: dict[str, float] = {}
        """The seconds that each replica's start took."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.seen: list[dict[str, Any]] = []

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        second = 0
        while not self._ended.wait(max(0.0, self._began + second + 1 - time.monotonic())):
            # By the clock: on a busy machine an answer takes longer than a second.
            second = max(second + 1, int(time.monotonic() - self._began))
            with contextlib.suppress(errors.ServingError):
                status = self._asked.get("/api/v1/status")
                self.seen.append({"second": second, **_counts(status)})
                ready = _ready(status)
                self.starts |= dict(zip(ready, _start_seconds(status), strict=True))
                due = [each for each in self._kills if each[0] <= second < each[1]]
                if due and len(ready) > 1:
                    self._kills.remove(due[0])
                    self._kill(ready[0])
                    self.killed.append(second)

    def _kill(self, name: str) -> None:
        record = self._folder / "s" / _NAME / "replicas" / name / "record.json"
        os.killpg(int(json.loads(record.read_text())["handle"].partition(":")[0]), signal.SIGKILL)


def _counts(status: dict[str, Any]) -> dict[str, Any]:
    states = [each["state"] for each in status["replicas"]]
    said = status["autoscaling"]
    demand = said.get("demand") or {}
    return {
        **{state: states.count(state) for state in ("starting", "ready", "draining")},
        "wanted": status["wanted_replicas"],
        "limit": status["concurrency_limit"],
        "in_flight": int(demand.get("in_flight") or 0),
        "queued": int(demand.get("queued") or 0),
        "held": int(demand.get("held") or 0),
    }


def series(
    sent: Sequence[arrivals.Arrival], answers: Sequence[Sample], seen: Sequence[dict[str, Any]], late: float
) -> run.Series:
    """What was sent and what was seen, second by second, as the simulator has it."""
    seconds = 1 + max(
        int(each.at_seconds + answer.seconds) for each, answer in zip(sent, answers, strict=True)
    )
    seconds = max(seconds, len(seen) + 1)
    made = {name: np.zeros(seconds, np.int64) for name in ("arrived", "finished", "late", "rejected", "lost")}
    histograms = np.zeros((-(-seconds // run.LATENCY_WINDOW_SECONDS), fleet.BUCKETS), np.int64)
    edges = fleet.bucket_seconds()
    for each, answer in zip(sent, answers, strict=True):
        made["arrived"][int(each.at_seconds)] += 1
        at = int(each.at_seconds + answer.seconds)
        if answer.status == 200:
            made["finished"][at] += 1
            made["late"][at] += answer.seconds > late
            bucket = min(int(np.searchsorted(edges, answer.seconds)), fleet.BUCKETS - 1)
            histograms[at // run.LATENCY_WINDOW_SECONDS, bucket] += 1
        else:
            made["rejected" if answer.status == 429 else "lost"][at] += 1
    there = {name: np.zeros(seconds, np.int64) for name in seen[0] if name != "second"}
    for before, after in zip(seen, [*seen[1:], {**seen[-1], "second": seconds}], strict=True):
        for name, values in there.items():
            values[before["second"] : after["second"]] = before[name]
    return run.Series(**made, **there, histograms=histograms)


def by_phase(
    phases: Sequence[Phase], sent: Sequence[arrivals.Arrival], answers: Sequence[Sample], late: float
) -> list[dict[str, Any]]:
    """What became of each phase's requests, by when they were due."""
    found, begin = [], 0.0
    for phase in phases:
        end = begin + phase.seconds
        mine = [answer for each, answer in zip(sent, answers, strict=True) if begin <= each.at_seconds < end]
        good = sorted(each.seconds for each in mine if each.status == 200)
        cuts = statistics.quantiles(good, n=100, method="inclusive") if len(good) > 1 else [math.nan] * 99
        found.append(
            {
                "phase": phase.name,
                "seconds": phase.seconds,
                "requests": len(mine),
                "late": sum(each > late for each in good),
                "refused": sum(each.status == 429 for each in mine),
                "lost": sum(each.status not in (200, 429) for each in mine),
                "p50_seconds": round(cuts[49], 4),
                "p99_seconds": round(cuts[98], 4),
                "sender_late_p99_seconds": round(
                    statistics.quantiles([each.late_seconds for each in mine], n=100)[98], 4
                ),
            }
        )
        begin = end
    return found


def enough_after(seen: Sequence[dict[str, Any]], begin: float, needed: int) -> int | None:
    """Seconds from `begin` until so many are ready."""
    return next(
        (each["second"] - int(begin) for each in seen if each["second"] >= begin and each["ready"] >= needed),
        None,
    )


def measure(folder: Path, target: Target, out: Path) -> dict[str, Any]:
    """One run, drawn and as a document."""
    with served(folder, target) as (url, asked):
        first = asked.get("/api/v1/status")
        sender = load.Sender(url, target.path, target.body, _NAME, None, 60.0)
        plan = target.plan
        if plan is None:
            plan = planned(sender, max(_start_seconds(first)))
            time.sleep(_QUIET_SECONDS)
            asked.post("/api/v1/apply", {"document": _document(target, "on"), "where": __file__})
        phases, late = plan.phases, 2 * plan.service_seconds + 0.25
        sent = schedule(phases, plan.scale, random.Random(1))
        begins = [sum(each.seconds for each in phases[:number]) for number in range(len(phases))]
        kills = [
            (begin + each.seconds / 2, begins[-1])
            for begin, each in zip(begins, phases, strict=True)
            if each.kill
        ]
        with Watcher(folder, asked, time.monotonic(), kills) as watcher:
            answers = asyncio.run(sender.send(sent))
        explained = asked.get("/api/v1/decisions")
        status = asked.get("/api/v1/status")
    seen = watcher.seen
    found = series(sent, answers, seen, late)
    slots = target.document["replicas"]["target_concurrency"]
    result = run.Result("live", "ours", 1, found, 0, 0.0)
    latencies = found.histograms.sum(axis=0)
    outcome = judgement.Outcome(
        scenario="live",
        policy="ours",
        parameters=f"{target.document['engine']['kind']} engines",
        default=True,
        requests=result.arrived,
        late=int(found.late.sum()),
        rejected=int(found.rejected.sum()),
        lost=int(found.lost.sum()),
        replica_hours=result.replica_hours,
        p50_seconds=sweep.quantile(latencies, 0.50),
        p99_seconds=sweep.quantile(latencies, 0.99),
        peak_replicas=int(found.ready.max()),
        reversals=judgement.most_reversals(found.wanted.tolist()),
    )
    demand = np.convolve(found.arrived, np.ones(5) / 5, "same") * plan.service_seconds / slots
    comparison = sweep.Comparison("live", demand, (outcome,), (sweep.Kept(outcome, found),))
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("replicas", plots.over_time), ("latency", plots.latencies), ("cost", plots.cost)):
        (out / f"live-{name}.svg").write_bytes(draw(comparison))
    most = plan.scale * max(each.last_per_second for each in phases) * plan.service_seconds
    needed = min(math.ceil(most / slots), target.document["replicas"]["max"])
    return {
        "engine": target.document["engine"]["kind"],
        "service_seconds": round(plan.service_seconds, 4),
        "late_seconds": round(late, 4),
        "start_seconds": {name: round(took, 1) for name, took in watcher.starts.items()},
        "most_per_second": plan.scale * max(each.last_per_second for each in phases),
        "replicas_needed_at_the_top": needed,
        "enough_seconds_after": {
            "the ramp's end": enough_after(seen, begins[2], needed),
            "the spike's beginning": enough_after(seen, begins[4], needed),
            **{f"the kill in second {each}": enough_after(seen, each + 2, needed) for each in watcher.killed},
        },
        "replicas_at_the_end": {name: seen[-1][name] for name in ("ready", "wanted")},
        "replica_hours": round(outcome.replica_hours, 4),
        "replica_hours_of_a_static_peak": round(needed * len(found.ready) / 3_600, 4),
        "reversals": outcome.reversals,
        "phases": by_phase(phases, sent, answers, late),
        "events": status["events"],
        "decisions": explained["runs"],
        "series": {
            name: getattr(found, name).tolist()
            for name in (
                "arrived",
                "finished",
                "late",
                "rejected",
                "lost",
                "ready",
                "starting",
                "wanted",
                "limit",
            )
        },
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", metavar="PYTHON", help="serve --model with the vLLM of this interpreter")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint for --vllm")
    parser.add_argument("--out", type=Path, default=Path("results/autoscale"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gp-") as name:
        folder = Path(name)
        target = (
            vllm_engines(folder, arguments.vllm, arguments.model) if arguments.vllm else small_engines(folder)
        )
        found = measure(folder, target, arguments.out)
    for phase in found["phases"]:
        print(
            f"{phase['phase']:32} {phase['requests']:6d} requests  late {phase['late']:4d}  "
            f"refused {phase['refused']:3d}  lost {phase['lost']:3d}  "
            f"p50 {phase['p50_seconds']:.3f} s  p99 {phase['p99_seconds']:.3f} s"
        )
    for what, seconds in found["enough_seconds_after"].items():
        when = "not ready any more" if seconds is None else f"ready {seconds} s"
        print(f"{found['replicas_needed_at_the_top']} {when} after {what}")
    hours, static = found["replica_hours"], found["replica_hours_of_a_static_peak"]
    print(f"replica-hours {hours:.3f}, static peak {static:.3f}; reversals {found['reversals']}")
    (arguments.out / "live.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
