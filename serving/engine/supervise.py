"""The life of an engine: started, watched, killed when it hangs, started again, drained.

Owned by `glowplug engine`, one per process, all on one event loop. State is in the ledger, where the engine's
own processes read it:

    STARTING -> READY -> DRAINING -> end
    READY -> HUNG -> FAILED      killed: no progress (`health`)
    READY -> FAILED              ended by itself
    FAILED -> STARTING           after a pause that doubles, up to a minute

A first start that fails ends the supervisor: whoever started it is told why, and nothing warm is lost. After
that it never gives up: the port, the caches and the place in the fleet are worth more than a fresh start.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving import errors
from serving.endpoint import VllmEngine
from serving.engine import (
    front,
    gate,
    gpus,
    health,
    kinds,
    limiter,
    metrics,
    nvml,
    phases,
    processors,
    usage,
    watch,
)
from serving.engine.budget import Budget
from serving.engine.child import Child
from serving.engine.ledger import Ledger
from serving.engine.model import Model, can_stream
from serving.engine.proxy import Proxy
from serving.engine.requestlog import keeper
from serving.engine.settings import Settings
from serving.engine.state import Limits, Rations, Spent, State
from serving.engine.tracing import Tracer
from serving.observability import RequestLog

_FIRST_PAUSE_SECONDS = 1.0
_MOST_PAUSE_SECONDS = 60.0
_SETTLED_SECONDS = 60.0
"""An engine that was ready for so long did not fail for how it was started: the next start is at once."""
_END_SECONDS = 5.0
"""For the engine's own shutdown, once nothing is in flight."""


class Supervisor:
    """`run` once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._policy = health.Policy(
            settings.health.stall_seconds,
            settings.health.probe_interval_seconds,
            settings.health.probe_timeout_seconds,
        )
        self._leaving = asyncio.Event()
        self._told = self._hurried = False
        self._phases = phases.begin(time.monotonic())
        self._took: Mapping[str, float] = {}
        self._ready_at: float | None = None
        self._starts = self._hangs = 0
        self._reason = ""
        self._child: Child | None = None
        self._tracer: Tracer | None = None
        self._cpus = settings.cpus or processors.available()
        self._gpus: nvml.Reader | None = None

    async def run(self) -> None:
        """Until it is drained. ConfigurationError, UnavailableError where the engine does not start."""
        settings = self._settings
        with contextlib.ExitStack() as stack:
            directory = _run_directory(settings, stack)
            limits = Limits(settings.limit, settings.queue.requests, settings.queue.seconds)
            self._ledger = Ledger.create(directory / gate.LEDGER_NAME, limits)
            stack.callback(self._ledger.close)
            self._budget = Budget.create(directory / gate.BUDGET_NAME)
            stack.callback(self._budget.close)
            self._directory = directory
            self._log = keeper.Keeper(
                directory,
                settings.service,
                settings.instance,
                lambda event, facts: self._say(event, **facts),
            )
            self._log.open()
            self._listener = stack.enter_context(front.listen(settings.address, settings.port))
            self._model = Model(
                settings.model,
                settings.model_cache,
                lambda text: self._say("model", text=text),
                self._streams,
            )
            proxy = None
            if isinstance(settings.engine, VllmEngine):
                self._kind: kinds.Kind = kinds.Vllm(
                    settings, settings.engine, self._model, directory, self._ledger
                )
            else:
                if settings.traces_endpoint is not None:
                    self._tracer = Tracer(settings.traces_endpoint, settings.service, settings.instance)
                proxy = Proxy(self._ledger, self._budget, directory, self._tracer)
                await proxy.start()
                self._kind = kinds.Command(settings, settings.engine, self._model, proxy)
            self._front = front.Front(self, self._ledger, proxy)
            self._gpus = nvml.Reader(self._own_gpus, lambda text: self._say("gpus", text=text))
            stack.callback(self._gpus.close)
            control = Path(settings.control) if settings.control else directory / "engine.sock"
            writing = asyncio.create_task(self._write_metrics()) if proxy is None else None
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signum, self._signalled)
            try:
                await self._log.settle(settings.request_log)
                await self._front.open(self._listener, control)
                if (remote := settings.remote) is not None:
                    await self._front.open_remote(settings.address, remote.port, Path(remote.token_file))
                await self._front.accept()
                self._say("listening", address=list(self._listener.getsockname()[:2]), control=str(control))
                await self._live()
            finally:
                if writing is not None:
                    writing.cancel()
                if self._child is not None:
                    await self._child.end(0)
                await self._front.close()
                await self._kind.close()
                await self._model.close()
                await self._log.close()

    # -- what the doors ask ----------------------------------------------------------------------------

    def status(self) -> Mapping[str, Any]:
        """As JSON values; `phases` are those of the start under way, or of the last."""
        under_way = phases.finish(self._phases, time.monotonic())
        return {
            "state": self._ledger.state.name.lower(),
            "reason": self._reason or None,
            "address": list(self._listener.getsockname()[:2]),
            "pid": self._child.pid if self._child is not None and self._child.running else None,
            "starts": self._starts,
            "hangs": self._hangs,
            "ready_at": self._ready_at,
            "phases": dict(self._took if self._ready_at is not None else under_way),
            "limit": self._ledger.limits.in_flight,
            "in_flight": self._ledger.in_flight(),
            "waiting": self._ledger.waiting(),
            "units_in_flight": self._ledger.units_in_flight(),
            "servers": [{"pid": each.pid, "in_flight": each.in_flight} for each in self._ledger.slots()],
            "kv_cache": max((each.cache_micros for each in self._ledger.slots()), default=0) / 1e6,
            "counters": dataclasses.asdict(self._ledger.counters()),
            "usage": self._usage(),
        }

    def _usage(self) -> Mapping[str, Any] | None:
        """None while there is no engine."""
        if self._child is None or not self._child.running:
            return None
        settings = self._settings
        used = usage.of_cgroup(settings.cgroup) if settings.cgroup else usage.of_tree(self._child.pid)
        if used is None:
            return None
        memory_bytes = settings.memory_bytes or usage.machine_memory_bytes()
        reading = self._gpus_read()
        return {
            **dataclasses.asdict(used),
            "cpus": self._cpus,
            "memory_limit_bytes": memory_bytes,
            "gpus": None if reading is None else dataclasses.asdict(reading),
        }

    def _own_gpus(self, machine: Sequence[str]) -> Sequence[str]:
        return gpus.visible(machine, self._settings.gpus, {**os.environ, **self._settings.engine.environment})

    def _gpus_read(self) -> gpus.Reading | None:
        return None if self._gpus is None else self._gpus.last()

    def set_limits(self, limits: Limits) -> None:
        self._ledger.set_limits(limits)
        limiter.wake_all(self._directory, self._ledger)
        self._say("limit", in_flight=limits.in_flight, queue_requests=limits.queue_requests)

    def ration(self, rations: Rations) -> Mapping[str, Spent]:
        """See front.Engine. Not said in the log: it comes once a second."""
        self._budget.ration(rations, time.monotonic_ns())
        return {name: self._budget.spent(name) for name in rations.tenants}

    async def set_request_log(self, wanted: RequestLog | None) -> None:
        await self._log.settle(wanted)
        self._say("request_log", settings=wanted and wanted.model_dump(mode="json"))

    def drain(self) -> None:
        """Finish what is in flight, then end."""
        self._leaving.set()

    def _signalled(self) -> None:
        """The first signal is a drain. A second one is somebody who does not want to wait. One after
        `POST /drain`, as a container's hook says it, is a first one."""
        self._hurried, self._told = self._told, True
        self.drain()

    def metrics(self) -> bytes:
        ledger = self._ledger
        facts = metrics.Facts(
            state=ledger.state,
            limits=ledger.limits,
            in_flight=ledger.in_flight(),
            waiting=ledger.waiting(),
            units_in_flight=ledger.units_in_flight(),
            counters=ledger.counters(),
            starts=self._starts,
            hangs=self._hangs,
            phases=self._took,
            logged=self._log.totals,
            dropped_spans=self._tracer.dropped if self._tracer is not None else 0,
            gpus=self._gpus_read(),
        )
        return metrics.render(facts)

    # -- life ------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        pause = 0.0
        while not self._leaving.is_set():
            if pause:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._leaving.wait(), pause)
                    return
            try:
                ready_for = await self._one_life()
            except errors.ServingError as exc:
                if self._ready_at is None:
                    raise
                ready_for, self._reason = None, str(exc)
                self._say("failed", reason=self._reason)
            if ready_for is None and self._ready_at is None:
                raise errors.UnavailableError(f"the engine did not start: {self._reason}")
            if ready_for is not None and ready_for >= _SETTLED_SECONDS:
                pause = 0.0
            else:
                pause = min(_MOST_PAUSE_SECONDS, max(_FIRST_PAUSE_SECONDS, 2 * pause))

    async def _one_life(self) -> float | None:
        """From a start to an end. How long the engine was ready, None if it never was."""
        self._starts += 1
        self._ledger.set_state(State.STARTING)
        first = phases.MODEL if self._model.elsewhere else phases.IMPORTS
        self._phases = phases.begin(time.monotonic(), first)
        if not await self._bring_model():
            return None
        self._phases = phases.enter(self._phases, phases.IMPORTS, time.monotonic())
        plan = self._kind.plan(self._listener)
        # Not its arguments: keys may be among them.
        self._say("starting", start=self._starts, program=plan.command[0])
        child = self._child = await Child.start(plan.command, plan.environment, self._on_line)
        began: float | None = None
        try:
            failure = await self._until_ready(child)
            if failure is None and not self._leaving.is_set():
                began = time.monotonic()
                await self._now_ready(began)
                failure = await self._watch(child)
            if failure is None:
                await self._leave(child)
            else:
                self._reason = failure
                self._say("failed", reason=failure)
        finally:
            # Accept before the kill: connections that wait are answered by us.
            await self._front.accept()
            await child.end(0)
            if self._ledger.state is not State.DRAINING:
                self._ledger.set_state(State.FAILED)
            if not self._kind.proxied:
                self._ledger.reset()
        return None if began is None else time.monotonic() - began

    async def _bring_model(self) -> bool:
        """Whether it is there; False where the supervisor is to leave first."""
        bringing = asyncio.create_task(self._model.ready())
        leaving = asyncio.create_task(self._leaving.wait())
        await asyncio.wait((bringing, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not bringing.done():
            bringing.cancel()
            with contextlib.suppress(asyncio.CancelledError, errors.ServingError):
                await bringing
            return False
        bringing.result()
        return True

    async def _streams(self) -> bool:
        """Whether the engine reads s3:// by itself. What an image has is not known before it runs."""
        engine = self._settings.engine
        if self._settings.container is not None or not isinstance(engine, VllmEngine):
            return False
        return await can_stream(engine.python)

    async def _until_ready(self, child: Child) -> str | None:
        """Why the start failed; None once every server process has answered its first probe."""
        deadline = time.monotonic() + self._kind.start_timeout_seconds
        waiting_for: set[int] | None = None
        why = "its servers are not up"
        while not self._leaving.is_set():
            if not child.running:
                return await child.why()
            if time.monotonic() > deadline:
                return f"not ready within {self._kind.start_timeout_seconds:g} s: {why}\n{await child.why()}"
            if waiting_for is None and self._kind.up():
                waiting_for = set(self._kind.servers())
                self._phases = phases.enter(self._phases, phases.FIRST_TOKEN, time.monotonic())
            for server in sorted(waiting_for or ()):
                outcome, why = await watch.probe(self._kind, server, self._policy)
                if outcome not in self._kind.ready_by:
                    break
                waiting_for = (waiting_for or set()) - {server}
            if waiting_for is not None and not waiting_for:
                return None
            await self._tick(child, 0.1)
        return None

    async def _now_ready(self, now: float) -> None:
        took = phases.finish(self._phases, now)
        # What a command does while it starts, its log says in words of its own.
        self._took = {phases.START: sum(took.values())} if self._kind.proxied else took
        self._ready_at = time.time()
        self._reason = ""
        self._ledger.set_state(State.READY)
        if not self._kind.proxied:
            await self._front.leave_to_engine()
        self._say("ready", start=self._starts, phases=dict(self._took))

    async def _watch(self, child: Child) -> str | None:
        """Why the engine ended or was found hung; None when it is to leave."""
        watching = watch.Watching(self._kind, self._policy, time.monotonic())
        try:
            while not self._leaving.is_set():
                await self._tick(child, watch.TICK_SECONDS)
                if not child.running:
                    return await child.why()
                if (why := watching.look(time.monotonic())) is not None:
                    self._hangs += 1
                    self._ledger.set_state(State.HUNG)
                    return why
        finally:
            await watching.close()
        return None

    async def _leave(self, child: Child) -> None:
        """Routers are given time to notice; what is in flight, and what waits, is finished; then the end."""
        self._ledger.set_state(State.DRAINING)
        self._say("draining", in_flight=self._ledger.in_flight(), waiting=self._ledger.waiting())
        notice = time.monotonic() + self._settings.drain.notice_seconds
        deadline = notice + self._settings.drain.seconds
        while child.running and time.monotonic() < deadline:
            busy = self._ledger.in_flight() + self._ledger.waiting()
            if self._hurried or (time.monotonic() >= notice and not busy):
                break
            await self._tick(child, 0.05)
        left = self._ledger.in_flight() + self._ledger.waiting()
        self._say("ending", cut_off=left)
        await child.end(_END_SECONDS if not left else 0)

    async def _tick(self, child: Child, seconds: float) -> None:
        """Wait so long, or until the child ends or the supervisor is to leave."""
        if not child.running:
            return
        waits = [asyncio.create_task(child.wait())]
        if not self._leaving.is_set():
            waits.append(asyncio.create_task(self._leaving.wait()))
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()

    def _on_line(self, line: str) -> None:
        self._phases = phases.read(self._phases, line, time.monotonic())

    async def _write_metrics(self) -> None:
        """For `gate`, which appends them to the engine's."""
        path = self._directory / gate.METRICS_NAME
        while True:
            part = path.with_suffix(".part")
            part.write_bytes(self.metrics())
            part.replace(path)
            await asyncio.sleep(limiter.BEAT_SECONDS)

    def _say(self, event: str, **facts: Any) -> None:
        line = {"time": round(time.time(), 3), "event": f"engine_{event}", **facts}
        print(json.dumps(line), file=sys.stderr, flush=True)


def _run_directory(settings: Settings, stack: contextlib.ExitStack) -> Path:
    """The directory of sockets and shared memory, ours alone. ConfigurationError."""
    if settings.run_directory is None:
        directory = Path(tempfile.mkdtemp(prefix="glowplug-engine-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        return directory
    directory = Path(settings.run_directory).absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise errors.ConfigurationError(f"run_directory: {directory}: {exc.strerror or exc}") from exc
    return directory
