"""The activator's composition: listeners, the two streams to the control plane, the metrics; and its end.

One process, one event loop, one service per listening address. On SIGTERM it takes no more requests, gives
those that wait and those in flight `drain_seconds` to end, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
from collections.abc import Mapping
from pathlib import Path

import grpc
import prometheus_client
from aiohttp import web
from prometheus_client import core, registry

from serving import errors
from serving.activator import choice, control, hold, proxy
from serving.router import reports

_log = logging.getLogger(__name__)

_HELP = {
    "released": "Requests that were held and got a replica.",
    "expired": "Requests for which no replica was up in time.",
    "refused": "Requests that were turned away because too many waited.",
    "left": "Requests that were given up by their clients.",
    "broken": "Requests whose replica broke off.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for the control plane over TCP: our certificate and key, and the CA of its own."""

    certificate: Path
    key: Path
    server_ca: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """`control`: the control plane, HOST:PORT (needs `tls`) or unix:PATH. `services`: where to listen, by
    service. `concurrency`: requests in flight from here to each replica. `metrics`: where to serve them, if
    anywhere. `name` tells activators of one control plane apart."""

    name: str
    control: str
    services: Mapping[str, choice.Place]
    limits: hold.Limits = dataclasses.field(default_factory=hold.Limits)
    concurrency: int = 16
    health_path: str = "/readyz"
    drain_seconds: float = 30.0
    metrics: choice.Place | None = None
    tls: Tls | None = None


def run(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. ConfigurationError where an address or a file cannot be used."""
    asyncio.run(_Activator(settings).run())


class _Activator:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._woken = asyncio.Event()
        self._proxies = {
            name: proxy.Proxy(
                name,
                settings.limits,
                choice.Replicas(settings.concurrency),
                settings.health_path,
                self._woken.set,
            )
            for name in settings.services
        }

    async def run(self) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with contextlib.AsyncExitStack() as ending:
            for each in self._proxies.values():
                each.start()
                ending.push_async_callback(each.close)
            over = control.channel(self._settings.control, _credentials(self._settings.tls))
            ending.push_async_callback(over.close, None)
            node = reports.ACTIVATOR_PREFIX + self._settings.name
            works = [
                asyncio.create_task(
                    control.follow_endpoints(over, node, self._proxies.keys(), self._changed)
                ),
                asyncio.create_task(
                    control.report_load(over, node, self._settings.services, self._load, self._woken)
                ),
                asyncio.create_task(stop.wait()),
            ]
            for task in works:
                ending.callback(task.cancel)
            if self._settings.metrics is not None:
                self._serve_metrics(self._settings.metrics)
            for name, place in self._settings.services.items():
                ending.push_async_callback((await self._listen(name, place)).cleanup)
            _log.info("ready")
            # One that ends by itself is a bug: without it, what is held here would be heard of by nobody.
            ended, _ = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()

    async def _listen(self, name: str, place: choice.Place) -> web.ServerRunner:
        server = web.Server(
            self._proxies[name].handle,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
        )
        runner = web.ServerRunner(server, shutdown_timeout=self._settings.drain_seconds)
        await runner.setup()
        host, port = place
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as exc:
            raise errors.ConfigurationError(
                f"cannot listen on {host}:{port} for {name}: {exc.strerror}; choose another --service address"
            ) from exc
        return runner

    def _changed(self, service: str, places: set[choice.Place]) -> None:
        self._proxies[service].replicas_changed(places - {self._settings.services[service]})

    def _load(self, service: str) -> control.Held:
        return self._proxies[service].load()

    def _serve_metrics(self, place: choice.Place) -> None:
        host, port = place
        collected = registry.CollectorRegistry()
        collected.register(_Metrics(self._proxies))
        try:
            prometheus_client.start_http_server(port, host, collected)
        except OSError as exc:
            raise errors.ConfigurationError(
                f"cannot serve metrics on {host}:{port}: {exc.strerror}; choose another --metrics address"
            ) from exc


class _Metrics(registry.Collector):
    """Read when they are asked for, in another thread: plain numbers, each consistent with itself."""

    def __init__(self, proxies: Mapping[str, proxy.Proxy]) -> None:
        self._proxies = proxies

    def collect(self) -> list[core.Metric]:
        in_flight = core.GaugeMetricFamily(
            "glowplug_activator_requests", "Requests held, or released and not ended.", labels=["service"]
        )
        counters = {
            name: core.CounterMetricFamily(f"glowplug_activator_{name}", text, labels=["service"])
            for name, text in _HELP.items()
        }
        for service, each in self._proxies.items():
            in_flight.add_metric([service], each.load().in_flight)
            for name, family in counters.items():
                family.add_metric([service], getattr(each.counters, name))
        return [in_flight, *counters.values()]


def _credentials(tls: Tls | None) -> grpc.ChannelCredentials | None:
    if tls is None:
        return None
    try:
        server_ca, key, certificate = (
            path.read_bytes() for path in (tls.server_ca, tls.key, tls.certificate)
        )
    except OSError as exc:
        raise errors.ConfigurationError(f"cannot read {exc.filename}: {exc.strerror}") from exc
    return grpc.ssl_channel_credentials(server_ca, key, certificate)
