"""Measures what kinds of request cost a replica: closed loops on a real engine. An adapter on aiohttp.

Called by `glowplug engine calibrate`; `serving.autoscaler.unitfit` fits what comes out. Each kind (length of
prompt, part of it that is shared and so can be cached, length of answer) is sent by a number of clients that
each wait for their answer, for each of the given numbers; the one at which most was answered counts, because
units are parts of a *full* replica. What was under way when the time began or ended is left out.

Prompts are random words, so that nothing is cached by chance; the shared part is the same in all of a kind's.
How many tokens they were is what the engine's usage says, and nothing else.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence

import aiohttp

from serving import errors
from serving.autoscaler.unitfit import Point
from serving.engine import tokens

_TIMEOUT = aiohttp.ClientTimeout(total=300.0)
_MOST_FAILED = 0.01
_FIRST_FAILED = 5
"""Failures, more than successes, after which nobody goes on."""
_ROUNDS = 3
"""Answers for each client, without which a rate is not known."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """Of requests: words of the prompt, the part of them that all share, tokens of the answer."""

    words: int
    shared_percent: int
    output_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where `replicas` of one engine answer completions; `key` of the API, where one is asked for."""

    url: str
    model: str
    replicas: int = 1
    key: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One kind at the number of clients at which most was answered. `slower_percent`: by how much the next
    best round of the same was slower; None where there was one round."""

    kind: Kind
    clients: int
    requests: int
    point: Point
    slower_percent: float | None = None


def measure(
    target: Target,
    kinds: Sequence[Kind],
    clients: Sequence[int],
    seconds: float,
    rounds: int,
    seed: int,
    said: Callable[[Measured], None],
) -> list[Measured]:
    """Every kind, `seconds` for each number of clients, so many rounds over all of them: what else the
    machine does comes and goes, and the best of a kind is what the engine can do. How far that can be trusted
    is how near the next best came to it. UnavailableError."""
    levels = [(kind, count) for kind in kinds for count in clients] * rounds
    return asyncio.run(_all(target, levels, seconds, random.Random(seed), said))  # noqa: S311


async def _all(
    target: Target,
    levels: Sequence[tuple[Kind, int]],
    seconds: float,
    chance: random.Random,
    said: Callable[[Measured], None],
) -> list[Measured]:
    measured: dict[tuple[Kind, int], list[Measured]] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=_TIMEOUT) as session:
        for kind, count in levels:
            found = await _level(session, target, kind, count, seconds, chance)
            said(found)
            measured.setdefault((kind, count), []).append(found)
    best: dict[Kind, Measured] = {}
    for (kind, _), rounds in measured.items():
        found = _best(rounds)
        if kind not in best or found.point.seconds < best[kind].point.seconds:
            best[kind] = found
    return list(best.values())


def _best(rounds: Sequence[Measured]) -> Measured:
    first, *others = sorted(rounds, key=lambda each: each.point.seconds)
    if not others:
        return first
    slower = others[0].point.seconds / first.point.seconds - 1.0
    return dataclasses.replace(first, slower_percent=100.0 * slower)


async def _level(
    session: aiohttp.ClientSession,
    target: Target,
    kind: Kind,
    clients: int,
    seconds: float,
    chance: random.Random,
) -> Measured:
    shared = _words(chance, kind.words * kind.shared_percent // 100)
    await _client(session, target, kind, shared, chance, _Times(0.0, 0))  # what is shared is cached then
    times = _Times(time.monotonic() + seconds, _ROUNDS * clients)
    await asyncio.gather(*(_client(session, target, kind, shared, chance, times) for _ in range(clients)))
    times.cut()
    if times.failed > _MOST_FAILED * (times.failed + len(times.ended)):
        raise errors.UnavailableError(f"{target.url}: {times.failed} requests failed: {times.why}")
    return Measured(kind, clients, len(times.ended), times.point(clients, target.replicas))


class _Times:
    """What became of a level's requests: when each was answered, and its usage. It is over at `until`, but
    not before `least` were answered."""

    def __init__(self, until: float, least: int) -> None:
        self._until, self._least = until, least
        self.ended: list[float] = []
        self.usage: list[tokens.Usage] = []
        self.failed = 0
        self.why = ""

    @property
    def over(self) -> bool:
        """Whether no request is to begin any more."""
        return time.monotonic() >= self._until and len(self.ended) >= self._least

    def cut(self) -> None:
        """Forget what was answered after it was over: clients were ending by then."""
        count = max(self._least, bisect.bisect_right(self.ended, self._until))
        del self.ended[count:], self.usage[count:]

    def point(self, clients: int, replicas: int) -> Point:
        """From the first round of answers to the last one: in between all clients were at it."""
        first, last = self.ended[clients - 1], self.ended[-1]
        count = len(self.ended) - clients
        some = len(self.usage)
        return Point(
            sum(each.input for each in self.usage) / some,
            sum(each.cached for each in self.usage) / some,
            sum(each.output for each in self.usage) / some,
            max(last - first, 1e-9) / count * replicas,
        )


async def _client(
    session: aiohttp.ClientSession,
    target: Target,
    kind: Kind,
    shared: str,
    chance: random.Random,
    times: _Times,
) -> None:
    """One request after the other, at least one."""
    headers = {"Content-Type": "application/json"}
    if target.key is not None:
        headers["Authorization"] = f"Bearer {target.key}"
    own = kind.words - kind.words * kind.shared_percent // 100
    while True:
        request = {
            "model": target.model,
            "prompt": shared + _words(chance, own),
            "max_tokens": kind.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        try:
            async with session.post(
                f"{target.url.rstrip('/')}/v1/completions", data=json.dumps(request), headers=headers
            ) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise errors.UnavailableError(f"{target.url}: {exc or type(exc).__name__}") from exc
        used = _usage(text) if answer.status == 200 else None
        if used is None:
            times.failed += 1
            times.why = f"{answer.status} {text[:300].decode('utf-8', 'replace')}"
            if len(times.ended) < times.failed and times.failed > _FIRST_FAILED:
                raise errors.UnavailableError(f"{target.url}: {times.why}")
        else:
            times.ended.append(time.monotonic())
            times.usage.append(used)
        if times.over:
            return


def _usage(text: bytes) -> tokens.Usage | None:
    try:
        return tokens.usage(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _words(chance: random.Random, count: int) -> str:
    return "".join(f"{chance.randrange(10_000)} " for _ in range(count))
