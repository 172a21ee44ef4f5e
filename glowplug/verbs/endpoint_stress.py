"""`glowplug endpoint stress`: how much load an endpoint takes, before production finds out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import endpoints
from imagefs import duration

if TYPE_CHECKING:
    from serving.stress import arrivals, judgement

_READY = "ready"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.argument("name")
@endpoints.state_option
@click.option("--from", "first", default=1.0, help="Requests a second at the first step.")
@click.option("--to", "last", default=10_000.0, help="Requests a second at which the ramp ends.")
@click.option("--growth", default=1.25, help="Each step's rate, of the one before.")
@click.option("--step", default="10s", help="How long each step takes.")
@click.option("--path", default="/v1/completions", help="What is asked for, by POST.")
@click.option("--body", type=_FILE, help="What is sent (default: a completion of --tokens).")
@click.option("--tokens", default="50/50", help="Tokens in the prompt / to generate.")
@click.option("--trace", type=_FILE, help="Bursts and tokens of real traffic (CSV) instead of Poisson.")
@click.option("--key-file", type=_FILE, help="The API key to send.")
@click.option("--timeout", default="60s", help="When a request without an answer has failed.")
@click.option("--seed", default=1, help="Of the schedule.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
def stress(
    name: str,
    state_dir: Path,
    first: float,
    last: float,
    growth: float,
    step: str,
    path: str,
    body: Path | None,
    tokens: str,
    trace: Path | None,
    key_file: Path | None,
    timeout: str,
    seed: int,
    as_json: bool,
) -> None:
    """Send endpoint NAME more and more requests, until an objective of its document breaks.

    Open loop: requests do not wait for one another. Says the largest safe rate per replica, and why the next
    one broke. Its target is an endpoint that is served here, by its name, and can be nothing else. Code 1 if
    not even the first rate was safe.
    """
    from serving import client
    from serving.stress import judgement, load, ramp

    shape = ramp.Shape(first, last, growth, duration.parse(step, "--step"))
    traffic = _traffic(trace, tokens)
    status = client.Client(state_dir, name).get("/api/v1/status")
    replicas = _ready(status)
    if not replicas:
        raise click.UsageError(f"endpoint {name} has no ready replica: see `glowplug endpoint status {name}`")
    objectives = judgement.Objectives(**status["objectives"])
    sender = load.Sender(
        status["url"],
        path,
        None if body is None else body.read_bytes(),
        status["model_name"],
        None if key_file is None else key_file.read_text().strip(),
        duration.parse(timeout, "--timeout"),
    )

    def said(measured: judgement.Step) -> None:
        if not as_json:
            click.echo(_line(measured))

    if not as_json:
        promised = ", ".join(f"{key} {value:g}" for key, value in status["objectives"].items())
        click.echo(f"{name}: {replicas} ready; promised: {promised or 'nothing but answers'}")
        click.echo(_HEAD)
    steps = ramp.run(shape, sender, objectives, traffic, seed, said)
    after = _ready(client.Client(state_dir, name).get("/api/v1/status"))
    conclusion = judgement.conclude(steps, replicas)
    if as_json:
        document = {
            "endpoint": name,
            "replicas": replicas,
            "replicas_after": after,
            "steps": [dataclasses.asdict(each) for each in steps],
            "conclusion": dataclasses.asdict(conclusion),
        }
        click.echo(json.dumps(document, indent=1))
    else:
        _say(conclusion, replicas, after)
    sys.exit(1 if conclusion.safe_per_second is None else 0)


def _traffic(trace: Path | None, tokens: str) -> arrivals.Trace | arrivals.Tokens:
    from serving.stress import arrivals

    if trace is not None:
        if trace.stat().st_size > arrivals.MAX_TRACE_BYTES:
            raise click.BadParameter(f"{trace} has more than {arrivals.MAX_TRACE_BYTES} bytes")
        return arrivals.parse_trace(trace.read_bytes(), str(trace))
    prompt, slash, output = tokens.partition("/")
    if not slash or not prompt.isdecimal() or not output.isdecimal():
        raise click.BadParameter(f"{tokens!r} is not PROMPT/OUTPUT, as in 50/50", param_hint="--tokens")
    return arrivals.Tokens(int(prompt), int(output))


def _ready(status: dict[str, Any]) -> int:
    return sum(each["state"] == _READY for each in status["replicas"])


_HEAD = (
    f"{'req/s':>9} {'requests':>9} {'429':>6} {'failed':>7} {'p50 s':>8} {'p99 s':>8} {'p95 first':>10} "
    f"{'tokens/s':>9}"
)


def _line(step: judgement.Step) -> str:
    times = (step.p50_seconds, step.p99_seconds, step.p95_first_token_seconds)
    p50, p99, first = ("-" if each is None else f"{each:.3f}" for each in times)
    return (
        f"{step.per_second:9.1f} {step.requests:9d} {step.refused:6d} {step.failed:7d} {p50:>8} {p99:>8} "
        f"{first:>10} {step.tokens_per_second:9.0f}" + ("  sender late" if step.sender_late else "")
    )


def _say(conclusion: judgement.Conclusion, replicas: int, after: int) -> None:
    if conclusion.safe_per_second is None:
        click.echo("no rate was safe")
    else:
        per_replica = "" if conclusion.per_replica is None else f", {conclusion.per_replica:.1f} per replica"
        click.echo(f"safe: {conclusion.safe_per_second:.1f} requests a second{per_replica}")
    click.echo(conclusion.why)
    if after != replicas:
        click.echo(
            f"ready replicas went from {replicas} to {after} meanwhile: the rate per replica is a guess"
        )
