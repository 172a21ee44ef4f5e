"""The phases of an engine's start, read from its log.

Pure: lines and times in, seconds per phase out. The engine's own words are used as marks where one phase ends
and the next begins; the clock is the supervisor's, so that phases add up to the whole start.

    model        a model that is not on this machine is downloaded, or mounted
    imports      the interpreter, its packages, the configuration
    weights      the model is built and its weights are read
    compile      torch.compile, or its caches; with the first run that vLLM profiles
    graphs       CUDA graphs are captured
    server       the API server processes come up
    first_token  the first probe is answered
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

MODEL, IMPORTS, WEIGHTS, COMPILE, GRAPHS, SERVER, FIRST_TOKEN = ORDER = (
    "model",
    "imports",
    "weights",
    "compile",
    "graphs",
    "server",
    "first_token",
)
START = "start"
"""The only phase of engines whose log says nothing that we know."""

_MARKS = (
    (re.compile(r"Starting to load model "), WEIGHTS),
    (re.compile(r"Loading weights took |Model loading took "), COMPILE),
    (re.compile(r"torch\.compile took |torch\.compile and initial profiling|Warming up done"), GRAPHS),
    (re.compile(r"init engine .*took "), SERVER),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """A start under way: the current phase, since when, and the seconds of those that are over."""

    current: str
    since: float
    seconds: Mapping[str, float]


def begin(now: float, phase: str = IMPORTS) -> Phases:
    """The process was started, or what comes before it."""
    return Phases(phase, now, {})


def read(phases: Phases, line: str, now: float) -> Phases:
    """A line of the log. Marks of phases that are over, or that other workers say again, change nothing."""
    for pattern, phase in _MARKS:
        if ORDER.index(phase) > ORDER.index(phases.current) and pattern.search(line):
            return enter(phases, phase, now)
    return phases


def enter(phases: Phases, phase: str, now: float) -> Phases:
    """The next phase begins; those that are passed over took no time and are not listed."""
    if ORDER.index(phase) <= ORDER.index(phases.current):
        return phases
    return Phases(phase, now, {**phases.seconds, phases.current: now - phases.since})


def finish(phases: Phases, now: float) -> Mapping[str, float]:
    """The engine is ready: the seconds of each phase, in their order."""
    return {**phases.seconds, phases.current: now - phases.since}
