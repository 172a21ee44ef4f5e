"""The policy of progress: a hang is found within a minute, and nobody else is accused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.engine import health
from serving.engine.settings import Health

_DEFAULTS = Health()
POLICY = health.Policy(
    _DEFAULTS.stall_seconds, _DEFAULTS.probe_interval_seconds, _DEFAULTS.probe_timeout_seconds
)


class Run:
    """The supervisor's loop on a clock of its own, one watch."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.watch = health.begin(0, self.now)
        self.probe_since: float | None = None
        self.probes = 0

    def tick(self, progress: int, answers: bool, seconds: float = 0.5) -> str | None:
        """`answers`: a probe that is under way is answered now; else it fails when its time is up."""
        self.now += seconds
        self.watch = health.observed(self.watch, progress, self.now)
        if self.probe_since is not None:
            if answers:
                self.watch, self.probe_since = health.answered(self.watch, self.now), None
            elif self.now - self.probe_since >= POLICY.probe_timeout_seconds:
                self.watch, self.probe_since = health.unanswered(self.watch, "no answer"), None
        if self.probe_since is None and health.probe_due(self.watch, POLICY, self.now):
            self.watch, self.probe_since = health.probing(self.watch, self.now), self.now
            self.probes += 1
        return health.hung(self.watch, POLICY, self.now)


def test_an_engine_that_stops_is_found_in_less_than_a_minute() -> None:
    run = Run()
    began = run.now
    while (why := run.tick(progress=0, answers=False)) is None:
        assert run.now - began < 60
    assert run.now - began >= POLICY.stall_seconds
    assert "no progress" in why
    assert "no answer" in why


def test_a_busy_engine_is_not_asked() -> None:
    run = Run()
    for progress in range(1, 1_000):
        assert run.tick(progress, answers=False) is None
    assert run.probes == 0


def test_an_idle_engine_that_answers_lives() -> None:
    run = Run()
    for _ in range(1_000):
        assert run.tick(progress=0, answers=True) is None
    assert run.probes > 10


def test_an_engine_that_sheds_its_probes_lives_as_one_that_answers_them() -> None:
    run = Run()
    for number in range(1_000):  # answered late, but always before its time is up
        assert run.tick(progress=0, answers=number % 15 == 0) is None


@given(st.lists(st.tuples(st.integers(1, 55), st.booleans()), max_size=40))
def test_whoever_gets_on_every_while_is_never_called_hung(steps: list[tuple[int, bool]]) -> None:
    """Loaded past all probes' patience: the counter moves once in up to 27 s, no probe is answered."""
    run = Run()
    progress = 0
    for ticks, by_probe in steps:
        for _ in range(ticks):
            assert run.tick(progress, answers=False) is None
        if by_probe and run.probe_since is not None:
            assert run.tick(progress, answers=True) is None
        else:
            progress += 1
            assert run.tick(progress, answers=False) is None


@given(st.lists(st.booleans(), max_size=200), st.integers(0, 5))
def test_a_hang_is_found_whatever_was_before(before: list[bool], progress: int) -> None:
    run = Run()
    for answers in before:
        if run.tick(progress, answers) is not None:
            return
    run.tick(progress + 1, answers=True)
    since = run.now
    while run.tick(progress + 1, answers=False) is None:
        assert run.now - since < 60


def test_a_supervisor_that_slept_blames_nobody() -> None:
    run = Run()
    run.tick(progress=0, answers=False)
    run.now += 3_600
    run.watch = health.slept(run.watch, 3_600)
    assert health.hung(run.watch, POLICY, run.now) is None
    assert run.tick(progress=0, answers=False) is None


def test_a_counter_that_went_back_is_a_new_process() -> None:
    run = Run()
    for _ in range(50):
        run.tick(progress=9, answers=False)
    moved = health.observed(run.watch, 0, run.now)
    assert moved.moved_at == run.now
    assert moved.failures == 0
