"""The loop step around `decide`: what survives a restart, what is said, and what no fault brings down."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from serving import errors
from serving.autoscaler import decisions, explanation, shell
from serving.autoscaler.observation import Clamp, Explanation
from serving.autoscaler.policy import Policy
from serving.autoscaler.shell import Mode
from serving.replica import Replica, State, Vitals
from serving.router.reports import Pressure, Total
from serving.service import Load

POLICY = Policy(minimum=1, maximum=20, target=2.0, limit=4, predict=False)


class World:
    """An endpoint whose provider does as it is told, at once, unless it is `stuck`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1_000_000.0
        self.said: list[str] = []
        self.replicas: list[Replica] = []
        self.in_flight = 0
        self.unknown: str | None = None
        self.broken: Exception | None = None
        self.stuck = False
        self.policy = POLICY
        self.start()

    def start(self) -> None:
        """As a server does that comes after one that was killed."""
        self.autoscaler = shell.Autoscaler(self.folder, self.said.append, lambda: self.now)

    def _pressure(self) -> Pressure:
        if self.broken is not None:
            raise self.broken
        seconds = self.now - 999_000.0
        totals = {"envoy": Total(int(10 * self.in_flight * seconds), 0, seconds)}
        share = self.in_flight // max(1, len(self.replicas))
        rest = self.in_flight - share * len(self.replicas)
        loads = tuple(
            Load("s", "127.0.0.1", number, share + (rest if number == 0 else 0), 0, 0, 1.0)
            for number in range(max(1, len(self.replicas)))
        )
        return Pressure(loads, totals, self.unknown)

    def turn(self, mode: Mode = Mode.ON) -> shell.Size | None:
        look = shell.Look(self._pressure, self.replicas, "v")
        size = self.autoscaler.turn(mode, self.policy, look)
        if size is not None and not self.stuck:
            self.replicas = [
                Replica(f"r{n}", "v", ("127.0.0.1", n), State.READY, self.now - 9, self.now - 8)
                for n in range(size.replicas)
            ]
        return size

    def run(self, seconds: int, mode: Mode = Mode.ON) -> list[int]:
        sizes = []
        for _ in range(seconds):
            self.now += 1.0
            size = self.turn(mode)
            sizes.append(-1 if size is None else size.replicas)
        return sizes

    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.autoscaler.explained()["runs"]
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_load_raises_the_size_and_says_why(world: World) -> None:
    assert world.run(3)[-1] == 1
    world.in_flight = 12
    sizes = world.run(20)
    assert sizes[-1] >= 6
    assert any("1 -> " in each and "in flight" in each for each in world.said)


def test_what_is_in_use_is_said_of_the_busiest_replica_that_is_ready(world: World) -> None:
    def replica(number: int, state: State, gpu: float | None) -> Replica:
        vitals = Vitals(world.now, 1, 0, 9, 0, 1.0, memory=0.5, gpu=gpu)
        return Replica(f"r{number}", "v", ("127.0.0.1", number), state, 1.0, 2.0, vitals=vitals)

    world.replicas = [
        replica(0, State.READY, 0.25),
        replica(1, State.READY, None),
        replica(2, State.DRAINING, 1.0),
    ]
    world.turn(Mode.DRY_RUN)
    explained = world.autoscaler.explained()
    assert explained["utilization"] == {"gpu": 0.25, "memory": 0.5}
    assert "chat: in use now, at the ready replica that uses most of it: gpu 25%, memory 50%" in (
        explanation.lines("chat", explained, 60.0)
    )


def test_a_restart_makes_no_blip_and_remembers_why(world: World) -> None:
    world.in_flight = 12
    before = world.run(60)[-1]
    runs = len(world.runs())
    world.start()
    world.unknown = "no Envoy reports"
    assert world.run(5) == [before] * 5
    world.unknown = None
    assert world.run(20) == [before] * 20
    assert len(world.runs()) >= runs


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mode": "on"}', '{"mode": "on", "limit": 4, "state": []}'])
def test_a_state_that_cannot_be_read_leaves_what_is_there(world: World, text: str) -> None:
    world.in_flight = 12
    before = world.run(60)[-1]
    for name in ("autoscaler.json", "decisions.json"):
        (world.folder / name).write_text(text)
    world.start()
    world.unknown = "no Envoy reports"
    assert world.run(5) == [before] * 5


def test_an_end_is_forgotten(world: World) -> None:
    world.in_flight = 12
    world.run(60)
    world.autoscaler.forget()
    world.replicas, world.in_flight = [], 0
    world.start()
    assert world.run(3) == [1, 1, 1]


def test_a_dry_run_decides_and_asks_for_nothing(world: World) -> None:
    world.replicas = [Replica("r0", "v", ("127.0.0.1", 0), State.READY, 0.0, 1.0)]
    world.run(3, Mode.DRY_RUN)
    world.in_flight = 12
    assert world.run(20, Mode.DRY_RUN) == [-1] * 20
    assert world.runs()[-1]["replicas"] > 1
    assert not any(each["applied"] for each in world.runs())
    assert any(each.startswith("autoscaler (dry run): 1 -> ") for each in world.said)
    assert world.run(1) == [max(1, len(world.replicas))], "what a dry run wanted is no size to begin with"


def test_off_decides_nothing(world: World) -> None:
    assert world.run(3, Mode.OFF) == [-1] * 3
    assert world.autoscaler.shown() == {"mode": "off"}
    assert world.runs() == []


def test_an_unknown_load_keeps_the_size_and_is_said_once_it_lasts(world: World) -> None:
    world.in_flight = 12
    before = world.run(60)[-1]
    world.said.clear()
    world.in_flight, world.unknown = 0, "envoy has not reported for 3.6 s"
    assert world.run(400) == [before] * 400  # longer than any window
    assert [
        each for each in world.said if "unknown" in each and "envoy has not reported" in each
    ] == world.said
    assert len(world.said) == 1
    world.unknown = None
    world.run(1)
    assert world.said[-1] == "autoscaler: the load is known again"


def test_a_router_that_cannot_be_asked_is_an_unknown_load(world: World) -> None:
    world.in_flight = 12
    before = world.run(60)[-1]
    world.broken = errors.UnavailableError("router: it is not running")
    assert world.run(10) == [before] * 10
    assert "it is not running" in world.runs()[-1]["because"]["note"]


def test_a_provider_that_does_not_deliver_is_said_and_the_size_stays_asked_for(world: World) -> None:
    world.run(3)
    world.stuck, world.in_flight = True, 12
    sizes = world.run(60)
    assert sizes[-1] >= 3  # four are in service and eight wait, no more and no fewer than a second ago
    assert any("are wanted and the provider has 1" in each for each in world.said)
    world.stuck = False
    world.run(2)
    assert world.said[-1] == "autoscaler: the provider has the replicas that are wanted"


def test_a_disk_that_fails_costs_no_decision(world: World) -> None:
    shutil.rmtree(world.folder)
    world.in_flight = 12
    assert world.run(30)[-1] >= 6
    assert len([each for each in world.said if "are not kept" in each]) == 1


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_lowers_nothing(world: World, jump: float) -> None:
    world.in_flight = 12
    before = world.run(60)[-1]
    world.now += jump
    assert min(world.run(10)) >= before


def test_another_document_is_in_force_at_the_next_decision(world: World) -> None:
    world.in_flight = 12
    world.run(60)
    world.policy = dataclasses.replace(POLICY, maximum=3, limit=8)
    world.now += 1.0
    assert world.turn() == shell.Size(3, 8)


def test_it_decides_once_a_second_however_often_it_is_called(world: World) -> None:
    world.run(1)
    made = world.autoscaler.shown()["decisions"]
    for _ in range(9):
        world.now += 0.1
        world.turn()
    assert world.autoscaler.shown()["decisions"] == made
    world.now += 0.11
    world.turn()
    assert world.autoscaler.shown()["decisions"] == made + 1


# -- the hour's log ------------------------------------------------------------------------------------


def _decided(at: float, replicas: int = 2, value: float | None = 3.0, note: str = "") -> decisions.Run:
    why = Explanation("demand", value, 6.0, f"{value} in flight", (Clamp("maximum", 9, 2),), note)
    return decisions.single(replicas, 4, 2.0, why, at, True)


def test_equal_decisions_are_one_run() -> None:
    log = decisions.Log()
    assert log.add(_decided(0.0, value=3.0, note="2.5 s ago"))
    assert not log.add(_decided(1.0, value=5.0, note="3.5 s ago"))
    assert log.add(_decided(2.0, replicas=3))
    assert log.add(_decided(3.0, replicas=3, value=None))
    first, *_ = log
    assert (first.began_at, first.ended_at, first.count, first.low, first.high) == (0.0, 1.0, 2, 3.0, 5.0)
    assert first.because.note == "3.5 s ago"


def test_a_log_holds_an_hour_and_is_bounded() -> None:
    log = decisions.Log()
    for second in range(3 * 3_600):
        log.add(_decided(float(second), replicas=second // 600))
    runs = list(log)
    assert runs[0].ended_at >= 2 * 3_600 - 1
    assert len(runs) == 7
    for second in range(5_000):
        log.add(_decided(20_000.0 + second / 10, replicas=second % 2))
    assert len(list(log)) == decisions.MOST_RUNS


def test_runs_go_to_json_and_back() -> None:
    run = _decided(1.0, value=None, note="x")
    assert decisions.from_json(json.loads(json.dumps(decisions.to_json(run)))) == run


def test_a_run_in_words() -> None:
    log = decisions.Log()
    for value in (3.0, 5.0):
        log.add(_decided(3_600.0 + value, value=value, note="because"))
    explained = {"mode": "dry-run", "now": 3_700.0, "runs": [decisions.to_json(each) for each in log]}
    assert list(explanation.lines("chat", explained, 3_600.0)) == [
        "chat: autoscaling.mode is dry-run; nothing of this is done",
        "01:00:03 to 01:00:05, 2 times: 2 replicas, limit 4, target 2",
        "    signal   demand: 5, between 3 and 5, over 6 s",
        "    formula  5.0 in flight",
        "    clamp    maximum: 9 -> 2",
        "    note     because",
    ]
    assert (
        list(explanation.lines("chat", explained, 10.0))[-1] == "chat: nothing was decided in the last 10 s"
    )
