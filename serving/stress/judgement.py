"""What a step of the ramp was like, whether it broke an objective, and what the whole says. Pure.

Latency counts from the moment at which a request was due, not at which it was sent: a server that stalls
cannot hide the requests that would have come meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

_LATE_SECONDS = 0.05
_LATE_PART = 0.01
"""If more requests than this part were sent later than that, the sender is the limit, not the endpoint."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One request. `status` 0: no answer. Times count from when it was due, `first_seconds` to the body's
    first byte (None: there was none). `tokens` came in the answer, `stream_seconds` from the first to the
    last. `late_seconds`: how much after its moment it was sent."""

    status: int
    seconds: float
    first_seconds: float | None = None
    tokens: int = 0
    stream_seconds: float = 0.0
    late_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Objectives:
    """What the endpoint promises; None is not promised. `output_tokens_per_second`: what the median stream
    gets. Refused (429) and failed requests (5xx, no answer) may be these parts of all."""

    p95_first_token_seconds: float | None = None
    p99_seconds: float | None = None
    output_tokens_per_second: float | None = None
    max_refused: float = 0.01
    max_failed: float = 0.001


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One rate, measured. Latencies are of answers with status 2xx, None without any."""

    per_second: float
    requests: int
    refused: int
    failed: int
    p50_seconds: float | None
    p99_seconds: float | None
    p95_first_token_seconds: float | None
    median_tokens_per_second: float | None
    tokens_per_second: float
    sender_late: bool
    broken: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Conclusion:
    """`safe_per_second` is the largest rate at which every objective held with every one below it; None where
    not even the first did. `trustworthy`: the sender kept up."""

    safe_per_second: float | None
    per_replica: float | None
    why: str
    trustworthy: bool


def summarize(per_second: float, seconds: float, samples: Sequence[Sample], objectives: Objectives) -> Step:
    """A step of `seconds` from its requests."""
    good = [each for each in samples if 200 <= each.status < 300]
    streams = [each for each in good if each.tokens > 1 and each.stream_seconds > 0]
    step = Step(
        per_second=per_second,
        requests=len(samples),
        refused=sum(each.status == 429 for each in samples),
        failed=sum(each.status == 0 or each.status >= 500 for each in samples),
        p50_seconds=quantile([each.seconds for each in good], 0.50),
        p99_seconds=quantile([each.seconds for each in good], 0.99),
        p95_first_token_seconds=quantile(
            [each.first_seconds for each in good if each.first_seconds is not None], 0.95
        ),
        median_tokens_per_second=quantile([(each.tokens - 1) / each.stream_seconds for each in streams], 0.5),
        tokens_per_second=sum(each.tokens for each in good) / seconds,
        sender_late=sum(each.late_seconds > _LATE_SECONDS for each in samples) > _LATE_PART * len(samples),
        broken=(),
    )
    others = len(samples) - len(good) - step.refused - step.failed
    return dataclasses.replace(step, broken=tuple(_broken(step, others, objectives)))


def conclude(steps: Sequence[Step], replicas: int) -> Conclusion:
    """What the ramp says; `replicas` were ready all the while."""
    safe = None
    for step in steps:
        if step.broken:
            break
        safe = step.per_second
    last = next((step for step in steps if step.broken), None)
    if last is not None:
        why = f"at {last.per_second:g} requests a second: {'; '.join(last.broken)}"
    else:
        why = "no objective broke up to the last rate: the limit is further up"
    trustworthy = not any(step.sender_late for step in steps)
    if not trustworthy:
        why += "; the sender was late itself, so that the endpoint may be better than this"
    return Conclusion(safe, None if safe is None or not replicas else safe / replicas, why, trustworthy)


def quantile(values: Sequence[float], part: float) -> float | None:
    """The smallest value that at least `part` of them do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def _broken(step: Step, others: int, objectives: Objectives) -> list[str]:
    broken = []
    if not step.requests:
        return ["no request was due in this time; make the steps longer"]
    if others:
        broken.append(f"{others} requests were answered with 3xx or 4xx: is the request what it should be?")
    if step.failed > objectives.max_failed * step.requests:
        broken.append(f"{step.failed} of {step.requests} requests failed")
    if step.refused > objectives.max_refused * step.requests:
        broken.append(f"{step.refused} of {step.requests} requests were refused (429)")
    for name, value, limit in (
        ("p95 to the first token", step.p95_first_token_seconds, objectives.p95_first_token_seconds),
        ("p99", step.p99_seconds, objectives.p99_seconds),
    ):
        if limit is not None and value is not None and value > limit:
            broken.append(f"{name} {value:.3f} s, promised {limit:g} s")
    speed, promised = step.median_tokens_per_second, objectives.output_tokens_per_second
    if promised is not None and speed is not None and speed < promised:
        broken.append(f"the median stream got {speed:.1f} tokens a second, promised {promised:g}")
    return broken
