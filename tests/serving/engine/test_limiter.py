"""The limiter: queues of several processes in one order, and nothing lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.engine import limiter
from serving.engine.ledger import Ledger
from serving.engine.limiter import Limiter, RejectedError
from serving.engine.state import Limits

_SOON = 20.0


class Pair:
    """Two server processes as far as the limiter knows: two slots of one ledger."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.directory = directory
        self.ledger = Ledger.create(directory / "ledger", limits)
        self.one = Limiter(Ledger(directory / "ledger"), directory, lambda: 1)
        self.other = Limiter(Ledger(directory / "ledger"), directory, lambda: 2)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Pair]:
        await self.one.start()
        await self.other.start()
        try:
            yield self
        finally:
            await self.one.stop()
            await self.other.stop()


def pair(directory: Path, in_flight: int, queue: int = 8, seconds: float = _SOON) -> Pair:
    return Pair(directory, Limits(in_flight, queue, seconds))


async def _settled(ledger: Ledger, waiting: int) -> None:
    async with asyncio.timeout(_SOON):
        while ledger.waiting() != waiting:
            await asyncio.sleep(0.001)


def test_a_place_given_back_goes_to_who_waited_longest_in_whatever_process(tmp_path: Path) -> None:
    async def run() -> list[str]:
        async with pair(tmp_path, 1).running() as two:
            order: list[str] = []

            async def work(name: str, server: Limiter) -> None:
                entered = await server.enter()
                order.append(name)
                server.leave(entered, failed=False)

            held = await two.one.enter()
            tasks = []
            for number, (name, server) in enumerate(
                [("a", two.other), ("b", two.one), ("c", two.other), ("d", two.one)]
            ):
                tasks.append(asyncio.create_task(work(name, server)))
                await _settled(two.ledger, number + 1)
            two.one.leave(held, failed=False)
            await asyncio.gather(*tasks)
            assert two.ledger.in_flight() == two.ledger.waiting() == 0
            return order

    assert asyncio.run(run()) == ["a", "b", "c", "d"]


def test_above_the_queue_is_rejected_with_a_time(tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path, 1, queue=1).running() as two:
            held = await two.one.enter()
            waiting = asyncio.create_task(two.one.enter())
            await _settled(two.ledger, 1)
            with pytest.raises(RejectedError) as rejected:
                await two.other.enter()
            assert rejected.value.retry_after_seconds >= 1
            two.one.leave(held, failed=False)
            two.one.leave(await waiting, failed=False)
            assert two.ledger.counters().rejected == 1

    asyncio.run(run())


def test_who_waits_too_long_is_rejected_and_forgotten(tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path, 1, seconds=0.05).running() as two:
            held = await two.one.enter()
            with pytest.raises(RejectedError):
                await two.other.enter()
            assert two.ledger.waiting() == 0
            two.one.leave(held, failed=False)
            two.other.leave(await two.other.enter(), failed=False)
            assert two.ledger.in_flight() == 0

    asyncio.run(run())


def test_a_raised_limit_lets_in_those_who_wait(tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path, 1).running() as two:
            entered = [(two.one, await two.one.enter())]
            waiting = [asyncio.create_task(server.enter()) for server in (two.one, two.other, two.other)]
            await _settled(two.ledger, 3)
            two.ledger.set_limits(Limits(4, 8, _SOON))
            limiter.wake_all(tmp_path, two.ledger)
            async with asyncio.timeout(_SOON):
                times = await asyncio.gather(*waiting)
            entered += zip((two.one, two.other, two.other), times, strict=True)
            for server, at in entered:
                server.leave(at, failed=False)
            assert two.ledger.in_flight() == 0

    asyncio.run(run())


def test_a_lowered_limit_waits_for_those_inside(tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path, 2, queue=0).running() as two:
            first, second = await two.one.enter(), await two.other.enter()
            two.ledger.set_limits(Limits(1, 0, 1.0))
            two.one.leave(first, failed=False)
            with pytest.raises(RejectedError):
                await two.one.enter()
            two.other.leave(second, failed=False)
            two.one.leave(await two.one.enter(), failed=False)

    asyncio.run(run())


@pytest.mark.parametrize("first_wins", [True, False])
def test_a_client_that_goes_away_while_it_waits_keeps_no_place(tmp_path: Path, first_wins: bool) -> None:
    async def run() -> None:
        async with pair(tmp_path, 1).running() as two:
            held = await two.one.enter()
            waiting = asyncio.create_task(two.one.enter())
            await _settled(two.ledger, 1)
            if first_wins:  # let in and cancelled in the same step
                two.one.leave(held, failed=False)
                waiting.cancel()
            else:
                waiting.cancel()
                await asyncio.sleep(0)
                two.one.leave(held, failed=False)
            with contextlib.suppress(asyncio.CancelledError):
                two.one.leave(await waiting, failed=False)
            assert two.ledger.in_flight() == two.ledger.waiting() == 0

    asyncio.run(run())


def test_a_wake_up_that_is_lost_costs_a_beat_and_not_the_request(tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path, 1).running() as two:
            held = await two.one.enter()
            waiting = asyncio.create_task(two.other.enter())
            await _settled(two.ledger, 1)
            limiter.wake_path(tmp_path, two.other.slot).unlink()
            two.one.leave(held, failed=False)
            async with asyncio.timeout(_SOON):
                two.other.leave(await waiting, failed=False)

    asyncio.run(run())


def test_many_requests_of_two_processes_all_get_through(tmp_path: Path) -> None:
    async def run() -> int:
        async with pair(tmp_path, 3, queue=500).running() as two:
            most = 0

            async def work(number: int) -> None:
                nonlocal most
                server = (two.one, two.other)[number % 2]
                entered = await server.enter()
                most = max(most, two.ledger.in_flight())
                await asyncio.sleep(0.0005 * (number % 5))
                server.leave(entered, failed=False)

            await asyncio.gather(*(work(number) for number in range(400)))
            assert two.ledger.counters().finished == 400
            assert two.ledger.in_flight() == two.ledger.waiting() == 0
            return most

    assert asyncio.run(run()) == 3
