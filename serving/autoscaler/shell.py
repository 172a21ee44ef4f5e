"""The autoscaler's loop step: look, decide, remember, say. Who serves an endpoint acts on what it returns.

Owned by a server (`serving.server`, a cluster's controller), which calls `turn` as often as it likes from one
thread; a decision is made about once a second, and sooner while there are no replicas, so that the first
request waits for a start and not for us. It runs only where its caller holds the endpoint's lock or lease, so
that there is one who decides.

Decisions outlive the process: the state of `decide` and the last hour's decisions lie in the endpoint's
folder, and a server that comes after a kill goes on with the size that was. Files that cannot be read are
said, and done without: what is there is the first size then. In a dry run everything is the same, and nobody
acts on it.

What a decision asked for and the provider has not brought about is said once it lasts: the provider goes on
trying, and the size stays asked for.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serving import errors, wholefile
from serving.autoscaler import decide, decisions, explanation, signals
from serving.autoscaler.observation import Observation
from serving.autoscaler.policy import Policy
from serving.endpoint import Endpoint
from serving.replica import Replica, State
from serving.router.reports import Pressure

_TURN_SECONDS = 1.0
_EMPTY_TURN_SECONDS = 0.2
"""While there are no replicas: somebody may be waiting for the first."""
_SAVED_SECONDS = 5.0
_KEPT_SAMPLES = 3_600
_CHART_POINTS = 240
_SAID_SECONDS = 5.0
"""A load that is unknown for longer is said: reports come late now and then."""
_LAG_SECONDS = 30.0
"""A provider that lacks replicas for longer is said."""

_log = logging.getLogger(__name__)


class Mode(enum.Enum):
    """Whether decisions are made, and acted on."""

    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"

    @classmethod
    def of(cls, endpoint: Endpoint) -> Mode:
        """As the document says."""
        return cls(endpoint.autoscaling.mode)


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """What is to be done: so many replicas, each with so many requests in flight at most."""

    replicas: int
    limit: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One decision in numbers, for charts; demand is None while it was unknown."""

    at: float
    demand: float | None
    held: float
    rejected_per_second: float
    ready: int
    starting: int
    replicas: int
    limit: int


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """What the server has at hand. `pressure` asks the router, and may raise ServingError; `version` is the
    one that is scaled; `quota`: how many replicas may be had at all; `reference_units`: where load is in
    model units, what the request costs that targets are said in."""

    pressure: Callable[[], Pressure]
    replicas: Sequence[Replica]
    version: str
    activator: tuple[str, int] | None = None
    quota: int | None = None
    reference_units: float | None = None


class Autoscaler:
    """See the module. `folder` is the endpoint's; `say` tells people; `clock` is Unix seconds."""

    def __init__(
        self, folder: Path, say: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._state_file = folder / "autoscaler.json"
        self._log_file = folder / "decisions.json"
        self._say = say
        self._clock = clock
        self._signals = signals.Signals()
        self._state: decide.State | None = None
        self._log = decisions.Log(self._read_log())
        self._samples: collections.deque[Sample] = collections.deque(maxlen=_KEPT_SAMPLES)
        self._last: decide.Decision | None = None
        self._observed: Observation | None = None
        self._mode = Mode.OFF
        self._took_seconds = 0.0
        self._count = 0
        self._changes = {"up": 0, "down": 0}
        self._saved_at = 0.0
        self._unknown_since: float | None = None
        self._lacking_since: float | None = None
        self._said: set[str] = set()

    def turn(self, mode: Mode, policy: Policy, look: Look) -> Size | None:
        """The size that the endpoint should have now; None where that is not the autoscaler's to say."""
        now = self._clock()
        if mode is not self._mode:
            self._changed(mode)
        if mode is Mode.OFF:
            return None
        if self._due(now):
            self._decide(policy, look, now)
        if mode is Mode.DRY_RUN or self._last is None:
            return None
        return Size(self._last.replicas, self._last.limit)

    @property
    def wanted(self) -> int | None:
        """How many replicas there would be without a quota; None where that is not the autoscaler's to
        say."""
        if self._last is None or self._mode is not Mode.ON:
            return None
        bounded = [each.before for each in self._last.because.clamps if each.rule == "quota"]
        return max([self._last.replicas, *bounded])

    def forget(self) -> None:
        """Nothing of the endpoint runs any more: the next start begins with its document alone."""
        self._state_file.unlink(missing_ok=True)

    # -- deciding ------------------------------------------------------------------------------------

    def _changed(self, mode: Mode) -> None:
        """What was decided while nobody acted on it is no basis for what is acted on."""
        self._state = self._last = self._observed = None
        self._said.clear()
        self._mode = mode

    def _due(self, now: float) -> bool:
        if self._state is None or self._state.at is None or self._last is None:
            return True
        wait = _TURN_SECONDS if self._last.replicas else _EMPTY_TURN_SECONDS
        return not 0 <= now - self._state.at < wait

    def _decide(self, policy: Policy, look: Look, now: float) -> None:
        state = self._restored(policy) if self._state is None else self._state
        if state.policy != policy:
            state = state.under(policy)
        pressure = _heard(look.pressure)
        observation = self._signals.observe(
            pressure,
            look.activator,
            look.replicas,
            look.version,
            now,
            look.quota,
            look.reference_units,
        )
        began = time.perf_counter()
        made = decide.decide(state, observation, now)
        self._took_seconds = time.perf_counter() - began
        if pressure.unknown is not None:
            note = "; ".join(filter(None, (made.because.note, pressure.unknown)))
            made = dataclasses.replace(made, because=dataclasses.replace(made.because, note=note))
        before, self._last = self._last, made
        self._count += 1
        if before is not None and before.replicas != made.replicas:
            self._changes["up" if made.replicas > before.replicas else "down"] += 1
        self._state, self._observed = made.state, observation
        applied = self._mode is Mode.ON
        run = decisions.single(made.replicas, made.limit, made.target, made.because, now, applied)
        new = self._log.add(run)
        self._samples.append(_sample(made, observation))
        self._tell(before, made, observation, now)
        if new or not 0 <= now - self._saved_at < _SAVED_SECONDS:
            self._save(now)

    # -- what is said --------------------------------------------------------------------------------

    def _tell(
        self, before: decide.Decision | None, made: decide.Decision, observation: Observation, now: float
    ) -> None:
        would = "autoscaler" if self._mode is Mode.ON else "autoscaler (dry run)"
        if before is not None and before.replicas != made.replicas:
            because = f"{before.replicas} -> {made.replicas} replicas: {explanation.in_words(made.because)}"
            self._say(f"{would}: {because}")
        if before is not None and before.limit != made.limit:
            self._say(f"{would}: {before.limit} -> {made.limit} requests in flight on a replica")
        self._unknown_since = self._lasting(
            "unknown",
            self._unknown_since,
            observation.demand is None,
            _SAID_SECONDS,
            now,
            f"{would}: the load is unknown, {made.replicas} replicas are kept: {made.because.note}",
            f"{would}: the load is known again",
        )
        there = sum(each.state in (State.READY, State.STARTING) for each in observation.instances)
        self._lacking_since = self._lasting(
            "lacking",
            self._lacking_since,
            self._mode is Mode.ON and there < made.replicas,
            _LAG_SECONDS,
            now,
            f"{would}: {made.replicas} replicas are wanted and the provider has {there}; it goes on trying",
            f"{would}: the provider has the replicas that are wanted",
        )

    def _lasting(
        self, name: str, since: float | None, holds: bool, seconds: float, now: float, begun: str, ended: str
    ) -> float | None:
        """Say a trouble when it has lasted, and its end if it was said. Since when it lasts."""
        if not holds:
            if name in self._said:
                self._said.discard(name)
                self._say(ended)
            return None
        since = now if since is None else min(since, now)
        if now - since >= seconds and name not in self._said:
            self._said.add(name)
            self._say(begun)
        return since

    def shown(self) -> dict[str, Any]:
        """The last decision, as JSON values; only the mode where nothing is decided."""
        if self._last is None or self._observed is None:
            return {"mode": self._mode.value}
        made, demand = self._last, self._observed.demand
        return {
            "mode": self._mode.value,
            "replicas": made.replicas,
            "limit": made.limit,
            "target": made.target,
            "demand": None if demand is None else dataclasses.asdict(demand),
            "because": dataclasses.asdict(made.because),
            "words": explanation.in_words(made.because),
            "decisions": self._count,
            "changes": dict(self._changes),
            "decision_seconds": self._took_seconds,
            "utilization": _utilization(self._observed),
            "series": self._series(),
        }

    def explained(self) -> dict[str, Any]:
        """The last hour, as JSON values: runs of equal decisions, and one sample a decision."""
        return {
            **{key: value for key, value in self.shown().items() if key != "series"},
            "now": self._clock(),
            "runs": [decisions.to_json(each) for each in self._log],
            "samples": [dataclasses.asdict(each) for each in self._samples],
        }

    def _series(self) -> list[dict[str, Any]]:
        """The last hour for a chart: of each share of the samples the busiest."""
        samples = list(self._samples)
        share = max(1, -(-len(samples) // _CHART_POINTS))
        return [
            dataclasses.asdict(max(samples[at : at + share], key=lambda each: each.demand or 0.0))
            for at in range(0, len(samples), share)
        ]

    # -- on disk -------------------------------------------------------------------------------------

    def _save(self, now: float) -> None:
        """A disk that is full costs a blip at the next start, and no decision now."""
        assert self._state is not None
        state = {
            "mode": self._mode.value,
            "limit": self._state.policy.limit,
            "state": self._state.to_json(),
        }
        self._saved_at = now
        try:
            wholefile.write(self._state_file, json.dumps(state))
            wholefile.write(self._log_file, json.dumps([decisions.to_json(each) for each in self._log]))
        except OSError as exc:
            if "disk" not in self._said:
                self._said.add("disk")
                self._say(f"autoscaler: its decisions are not kept: {self._state_file}: {exc.strerror}")

    def _restored(self, policy: Policy) -> decide.State:
        """What was decided before, if it was in the same mode; what is there is the first size otherwise."""
        try:
            found = json.loads(self._state_file.read_bytes())
            if found["mode"] == self._mode.value:
                state = decide.State.from_json(found["state"], policy)
                # A document that came meanwhile, with another limit: what was learned was below the old one.
                return (
                    state
                    if found["limit"] == policy.limit
                    else dataclasses.replace(state, limit=policy.limit)
                )
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            _log.warning("%s is not used: %s; what is there is the first size", self._state_file, exc)
        return decide.State.initial(policy)

    def _read_log(self) -> list[decisions.Run]:
        try:
            return [decisions.from_json(each) for each in json.loads(self._log_file.read_bytes())]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            _log.warning("%s is not used: %s", self._log_file, exc)
        return []


def _heard(pressure: Callable[[], Pressure]) -> Pressure:
    try:
        return pressure()
    except errors.ServingError as exc:
        return Pressure((), {}, str(exc))


def _utilization(observation: Observation) -> dict[str, float]:
    """By resource, at the ready replica that uses most of it; what nobody said is left out."""
    ready = [each for each in observation.instances if each.state is State.READY]
    said = {name: [getattr(each, name) for each in ready] for name in ("cpu", "gpu", "memory")}
    known = {name: [each for each in values if each is not None] for name, values in said.items()}
    return {name: max(values) for name, values in known.items() if values}


def _sample(made: decide.Decision, observation: Observation) -> Sample:
    demand = observation.demand
    states = [each.state for each in observation.instances]
    return Sample(
        at=observation.at,
        demand=None if demand is None else demand.in_flight + demand.held,
        held=0.0 if demand is None else demand.held,
        rejected_per_second=0.0 if demand is None else demand.rejected_per_second,
        ready=states.count(State.READY),
        starting=states.count(State.STARTING),
        replicas=made.replicas,
        limit=made.limit,
    )
