"""The router against others, in one run on one machine: `python -m e2e.router [PART ...]`.

- `balancing`: eight replicas, four slots each, one at a third of the speed; one request of twenty takes
twenty
  times longer. The same requests, at 60 % of the rate up to which round robin is stable, through Envoy (power
  of two choices, full scan, round robin, random), nginx (`random two least_conn`) and HAProxy (`random(2)`),
  in turns. Judged by slowdown: latency over the request's own service time.
- `throughput`: requests per second of the proxy's own CPU time, wrk in front, nginx behind.
- `added`: what Envoy adds to a request at 60 % of its saturation.
- `propagation`: from `Router.update` to the last Envoy having, and to the first request being routed.
- `churn`: 100 services, 1,000 backends, 50 changes a second: CPU of the control plane, and no change missed.

Prints a table, writes results/router.json. Nothing is asserted. Needs Debian's wrk, nginx and haproxy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e import replicas
from serving import service as services
from serving.router import bootstrap, control, envoy

_SLOTS = 4
_SPEEDS = (1.0,) * 7 + (1 / 3,)
_USUAL_MILLISECONDS = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")
_WAIT_SECONDS = 20.0

Figures = dict[str, float]
Answer = list[tuple[float, float]]


class Front:
    """A control plane and Envoys that it feeds, in a folder of their own."""

    def __init__(self, root: Path, envoys: int = 1) -> None:
        self._root = root
        self.router = control.Router(f"unix:{root}/xds.sock")
        self.envoys = [self._envoy(number) for number in range(envoys)]
        self.port = _free_port()

    def _envoy(self, number: int) -> envoy.Envoy:
        directory = self._root / str(number)
        directory.mkdir(mode=0o700)
        settings = bootstrap.Settings(f"envoy-{number}", f"{self._root}/xds.sock", f"{directory}/admin.sock")
        return envoy.Envoy(directory, settings, workers=1)

    def service(self, ports: Sequence[int], balancing: services.Balancing) -> services.Service:
        backends = tuple(services.Backend("127.0.0.1", port) for port in ports)
        settings = services.RouteSettings(health_path=None, balancing=balancing, max_requests=100_000)
        return services.Service("s", services.Listen(self.port), backends, settings=settings)

    def serve(self, *found: services.Service) -> None:
        self.router.update(found)
        for each in self.envoys:
            if each.pid is None:
                each.start()
            each.wait_ready()
        self.settle()

    def settle(self) -> None:
        _until(
            lambda: len(nodes := self.router.nodes()) == len(self.envoys) and all(n.current for n in nodes)
        )


@contextlib.contextmanager
def _front(envoys: int = 1) -> Iterator[Front]:
    root = Path(tempfile.mkdtemp(prefix="glowplug-router-"))
    made = Front(root, envoys)
    made.router.start()
    try:
        yield made
    finally:
        for each in made.envoys:
            each.stop()
        made.router.stop()
        shutil.rmtree(root)


# -- the parts -------------------------------------------------------------------------------------


def balancing(seconds: float, rounds: int) -> dict[str, Figures]:
    """p50, p99 and p999 of the slowdown and of the latency, by balancer."""
    mean = _USUAL_MILLISECONDS * (0.95 + 0.05 * 20) / 1000
    stable = len(_SPEEDS) * min(_SPEEDS) * _SLOTS / mean
    rate = 0.6 * stable
    answers: dict[str, Answer] = {}
    with contextlib.ExitStack() as stack:
        ports = stack.enter_context(_replicas(_SLOTS, _SPEEDS))
        front = stack.enter_context(_front())
        fronts: dict[str, int] = {
            "nginx random two least_conn": stack.enter_context(_nginx(ports, "random two least_conn;")),
            "haproxy random(2)": stack.enter_context(_haproxy(ports, "random(2)")),
        }
        for number in range(rounds):
            sent = replicas.requests(int(rate * seconds), rate, _USUAL_MILLISECONDS, seed=number)
            for kind in services.Balancing:
                if kind is services.Balancing.STICKY:
                    continue
                front.serve(front.service(ports, kind))
                _gather(answers, f"envoy {kind.value}", front.port, sent)
            for name, port in fronts.items():
                _gather(answers, name, port, sent)
    return {name: _summary(found) for name, found in answers.items()}


def _gather(answers: dict[str, Answer], name: str, port: int, sent: Answer) -> None:
    load = replicas.Load(port)
    answers.setdefault(name, []).extend(asyncio.run(load.run(sent)))
    if load.failed:
        print(f"{name}: {load.failed} failed", file=sys.stderr)


def _summary(found: Answer) -> Figures:
    figures = {"requests": float(len(found))}
    for name, values in (("slowdown", [s for _, s in found]), ("milliseconds", [1000 * t for t, _ in found])):
        for share, label in ((0.5, "p50"), (0.99, "p99"), (0.999, "p999")):
            figures[f"{name} {label}"] = round(replicas.quantile(values, share), 2)
    return figures


def throughput(seconds: float, rounds: int) -> dict[str, Figures]:
    """Requests per second of CPU time of the proxy's processes, medians."""
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        (backend,) = stack.enter_context(_static())
        front = stack.enter_context(_front())
        front.serve(front.service([backend], services.Balancing.P2C))
        haproxy = stack.enter_context(_haproxy([backend], "random(2)"))
        nginx = stack.enter_context(_nginx([backend], "random two least_conn;"))
        pid = front.envoys[0].pid
        assert pid is not None
        bare, bare_pid = stack.enter_context(_bare_envoy(backend))
        sides = {
            "envoy": (front.port, [pid]),
            "envoy, nothing configured": (bare, [bare_pid]),
            "haproxy": (haproxy, _listeners(haproxy)),
            "nginx": (nginx, _listeners(nginx)),
        }
        for _ in range(rounds):
            for name, (port, pids) in sides.items():
                before = _cpu_seconds(pids)
                count = _wrk(port, 64, seconds)
                found.setdefault(name, []).append(count / (_cpu_seconds(pids) - before))
    return {name: {"requests per CPU second": round(statistics.median(each))} for name, each in found.items()}


def added(seconds: float) -> dict[str, Figures]:
    """Latency through Envoy and without it, at 60 % of what wrk got through Envoy when it pushed."""
    with contextlib.ExitStack() as stack:
        (backend,) = stack.enter_context(_static())
        front = stack.enter_context(_front())
        front.serve(front.service([backend], services.Balancing.P2C))
        rate = 0.6 * _wrk(front.port, 64, seconds) / seconds
        # Python's clients would be what is measured; wrk has no rate, but few connections keep it below.
        figures: dict[str, Figures] = {}
        connections = _connections_for(front.port, rate)
        for name, port in (("direct", backend), ("envoy", front.port)):
            figures[name] = {"requests/s": rate, "connections": connections} | _wrk_latency(
                port, connections, seconds
            )
        return figures


def propagation(changes: int, envoys: int) -> dict[str, Figures]:
    """Milliseconds from an update to every Envoy's ACK, and to the first answer of the added backend."""
    acknowledged, routed = [], []
    with contextlib.ExitStack() as stack:
        ports = stack.enter_context(_replicas(_SLOTS, (1.0,) * 2))
        front = stack.enter_context(_front(envoys))
        for number in range(changes):
            front.serve(front.service([ports[number % 2]], services.Balancing.P2C))
            added_port = ports[(number + 1) % 2]
            began = time.monotonic()
            front.router.update([front.service([added_port], services.Balancing.P2C)])
            front.settle()
            acknowledged.append(1000 * (time.monotonic() - began))
            admin = front.envoys[-1]
            _until(lambda: f":{added_port}::".encode() in admin.administer("GET", "/clusters"))  # noqa: B023
            routed.append(1000 * (time.monotonic() - began))
    return {
        f"{envoys} Envoys": {
            "acknowledged median ms": round(statistics.median(acknowledged), 1),
            "acknowledged worst ms": round(max(acknowledged), 1),
            "in the last one's set median ms": round(statistics.median(routed), 1),
        }
    }


def churn(seconds: float, envoys: int) -> dict[str, Figures]:
    """CPU of this process, which is the control plane and nothing else, per second."""
    names = [f"s{number}" for number in range(100)]
    settings = services.RouteSettings(health_path=None)

    def made(name: str, generation: int) -> services.Service:
        first = 10_000 + generation
        backends = tuple(services.Backend("127.0.0.1", first + n) for n in range(10))
        return services.Service(name, listen, backends, hosts=(f"{name}.test",), settings=settings)

    with _front(envoys) as front:
        listen = services.Listen(front.port)
        routed = {name: made(name, 0) for name in names}
        front.serve(*routed.values())
        began, cpu = time.monotonic(), time.process_time()
        count = 0
        while (now := time.monotonic()) < began + seconds:
            name = names[count % len(names)]
            routed[name] = made(name, count + 1)
            front.router.update(list(routed.values()))
            count += 1
            time.sleep(max(0.0, began + count / 50 - time.monotonic()))
        used = (time.process_time() - cpu) / (now - began)
        front.settle()
        last = routed[names[(count - 1) % len(names)]].backends[-1].port
        missing = [each.pid for each in front.envoys if not _has(each, last)]
    return {
        f"{envoys} Envoys": {
            "changes/s": round(count / seconds, 1),
            "cores of the control plane": round(used, 3),
            "Envoys that missed the last": len(missing),
        }
    }


def _has(each: envoy.Envoy, port: int) -> bool:
    return f":{port}::".encode() in each.administer("GET", "/clusters")


# -- what stands around ----------------------------------------------------------------------------


@contextlib.contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until(lambda: _listens(port))
        yield port
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _replicas(slots: int, speeds: Sequence[float]) -> Iterator[list[int]]:
    command = [sys.executable, "-m", "e2e.replicas", str(slots), *map(str, speeds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield [int(port) for port in process.stdout.readline().split()]
        finally:
            process.terminate()


_NGINX = """
worker_processes 1; daemon off; pid PREFIX/nginx.pid; error_log PREFIX/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off; keepalive_requests 1000000;
    client_body_temp_path PREFIX/b; proxy_temp_path PREFIX/p; fastcgi_temp_path PREFIX/f;
    uwsgi_temp_path PREFIX/u; scgi_temp_path PREFIX/s;
    {http}
}}
"""


@contextlib.contextmanager
def _nginx_with(http: str, port: int) -> Iterator[int]:
    with tempfile.TemporaryDirectory() as prefix:
        file = Path(prefix) / "nginx.conf"
        file.write_text(_NGINX.format(http=http).replace("PREFIX", prefix))
        with _running(["nginx", "-c", str(file), "-p", prefix], port):
            yield port


@contextlib.contextmanager
def _nginx(ports: Sequence[int], method: str) -> Iterator[int]:
    port = _free_port()
    servers = " ".join(f"server 127.0.0.1:{each};" for each in ports)
    http = (
        f"upstream u {{ zone u 256k; {method} {servers} keepalive 256; keepalive_requests 1000000; }} "
        f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ proxy_pass http://u; "
        'proxy_http_version 1.1; proxy_set_header Connection ""; }} }}'.replace("}}", "}")
    )
    with _nginx_with(http, port):
        yield port


@contextlib.contextmanager
def _static() -> Iterator[list[int]]:
    port = _free_port()
    http = f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ return 200 ok; }} }}"
    with _nginx_with(http, port):
        yield [port]


@contextlib.contextmanager
def _haproxy(ports: Sequence[int], balance: str) -> Iterator[int]:
    port = _free_port()
    servers = "\n".join(f"    server s{n} 127.0.0.1:{each}" for n, each in enumerate(ports))
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(
            f"global\n    nbthread 1\n    maxconn 4000\ndefaults\n    mode http\n    timeout client 60s\n"
            f"    timeout server 60s\n    timeout connect 2s\n    http-reuse always\n"
            f"frontend f\n    bind 127.0.0.1:{port}\n    default_backend b\n"
            f"backend b\n    balance {balance}\n{servers}\n"
        )
        file.flush()
        with _running(["haproxy", "-db", "-f", file.name], port):
            yield port


@contextlib.contextmanager
def _bare_envoy(backend: int) -> Iterator[tuple[int, int]]:
    """What Envoy itself costs: one route, one cluster, every default that costs off. Port and pid."""

    def at(port: int) -> dict[str, Any]:
        return {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}

    kind = "type.googleapis.com/envoy.extensions.filters"
    port = _free_port()
    manager = {
        "@type": f"{kind}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bare",
        "generate_request_id": False,
        "server_header_transformation": "PASS_THROUGH",
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{kind}.http.router.v3.Router", "suppress_envoy_headers": True},
            }
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "s", "timeout": "0s"}}],
                }
            ]
        },
    }
    network = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    load = {"cluster_name": "s", "endpoints": [{"lb_endpoints": [{"endpoint": at(backend)}]}]}
    document = {
        "static_resources": {
            "listeners": [at(port) | {"name": "bare", "filter_chains": [{"filters": [network]}]}],
            "clusters": [{"name": "s", "type": "STATIC", "load_assignment": load}],
        },
        "stats_config": {"stats_matcher": {"reject_all": True}},
    }
    command = [str(envoy.binary()), "--disable-hot-restart", "--concurrency", "1", "-l", "error"]
    with subprocess.Popen([*command, "--config-yaml", json.dumps(document)]) as process:
        try:
            _until(lambda: _listens(port))
            yield port, process.pid
        finally:
            process.terminate()


def _wrk(port: int, connections: int, seconds: float) -> int:
    """Requests that were answered."""
    return int(_ran_wrk(port, connections, seconds)["requests"])


def _wrk_latency(port: int, connections: int, seconds: float) -> Figures:
    found = _ran_wrk(port, connections, seconds)
    return {
        "got requests/s": round(found["requests"] / seconds),
        "p50 ms": found["50%"],
        "p99 ms": found["99%"],
    }


def _ran_wrk(port: int, connections: int, seconds: float) -> Figures:
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{round(seconds)}s",
        "--latency",
        f"http://127.0.0.1:{port}/",
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counted = re.search(r"(\d+) requests in", text)
    assert counted is not None, text
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    latencies = re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", text)
    return {"requests": float(counted[1])} | {f"{p}%": float(v) * units[unit] for p, v, unit in latencies}


def _connections_for(port: int, rate: float) -> int:
    """The fewest connections that reach the rate: in a closed loop they set it."""
    for connections in (1, 2, 3, 4, 6, 8, 12, 16, 24):
        if _wrk(port, connections, 1) >= rate:
            return connections
    return 32


def _listeners(port: int) -> list[int]:
    """Processes that listen at a port."""
    command = ["ss", "-Hltnp", f"sport = :{port}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted({int(pid) for pid in re.findall(r"pid=(\d+)", text)})


def _cpu_seconds(pids: Sequence[int]) -> float:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / _TICKS


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not come to pass")
        time.sleep(0.001)


# -- the command -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    seconds: float
    rounds: int


_PARTS: Mapping[str, Callable[[_Options], dict[str, Figures]]] = {
    "balancing": lambda options: balancing(options.seconds, options.rounds),
    "throughput": lambda options: throughput(options.seconds, options.rounds),
    "added": lambda options: added(options.seconds),
    "propagation": lambda options: propagation(20, envoys=3),
    "churn": lambda options: churn(2 * options.seconds, envoys=3),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(_PARTS)} [default: all]")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="over which the sides take turns")
    parser.add_argument("--results", type=Path, default=Path("results/router.json"))
    options = parser.parse_args()
    unknown = set(options.parts) - _PARTS.keys()
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(_PARTS)}")
    missing = [name for name in ("wrk", "nginx", "haproxy", "ss") if shutil.which(name) is None]
    if missing:
        parser.error(f"needs {', '.join(missing)}: apt-get install wrk nginx haproxy iproute2")
    found = {}
    for part in options.parts or _PARTS:
        found[part] = _PARTS[part](_Options(options.seconds, options.rounds))
        for name, figures in found[part].items():
            print(f"{part:12} {name:28} " + "  ".join(f"{key} {value:g}" for key, value in figures.items()))
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
