"""`glowplug engine calibrate`: what a request costs, measured on the real engine."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from glowplug import endpoints
from imagefs import duration

if TYPE_CHECKING:
    from serving.autoscaler import unitfit
    from serving.stress import calibration

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("calibrate", context_settings={"show_default": True})
@click.argument("target", metavar="ENDPOINT|URL")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here, as YAML."
)
@endpoints.state_option
@click.option("--model", help="What the engine calls it; an endpoint says so itself.")
@click.option("--prompts", default="16,128,512", help="Words of the prompts.")
@click.option("--shared", default="0,75", help="Percent of the prompt that requests have in common.")
@click.option("--outputs", default="1,16,64", help="Tokens of the answers.")
@click.option("--clients", default="4,16", help="Requests in flight at a time; the best number counts.")
@click.option("--seconds", "each", default="5s", help="For each kind of request and number of clients.")
@click.option("--rounds", default=2, type=click.IntRange(1, 1_000), help="Over all of them; the best counts.")
@click.option("--key-file", type=_FILE, help="The API key to send.")
@click.option("--seed", default=1, help="Of the prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
def command(
    target: str,
    out: Path | None,
    state_dir: Path,
    model: str | None,
    prompts: str,
    shared: str,
    outputs: str,
    clients: str,
    each: str,
    rounds: int,
    key_file: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure what requests cost a full replica, by their tokens, and fit the coefficients of model units.

    Every kind of request (--prompts x --shared x --outputs) is sent in closed loops; nothing else should ask
    the engine meanwhile. Says the error of predictions for kinds that were held out. The result is an
    endpoint document's section `units`."""
    from serving.autoscaler import unitfit
    from serving.stress import calibration

    kinds = [
        calibration.Kind(words, part, made)
        for words in _numbers(prompts, "--prompts", 1, 1_000_000)
        for part in _numbers(shared, "--shared", 0, 100)
        for made in _numbers(outputs, "--outputs", 1, 1_000_000)
    ]
    if len(kinds) < unitfit.LEAST_POINTS:
        raise click.UsageError(
            f"{len(kinds)} kinds of request say too little; name more --prompts or --outputs"
        )
    where = _target(target, state_dir, model, None if key_file is None else key_file.read_text().strip())
    levels = _numbers(clients, "--clients", 1, 10_000)
    seconds = duration.parse(each, "--seconds")
    click.echo(f"{len(kinds)} kinds of request, {len(kinds) * len(levels) * rounds * seconds:g} s", err=True)
    found = calibration.measure(
        where, kinds, levels, seconds, rounds, seed, lambda one: click.echo(_line(one), err=True)
    )
    fitted = unitfit.fit([one.point for one in found])
    document = _document(fitted, found)
    if out is not None:
        out.write_text(_HEAD + yaml.safe_dump(document, sort_keys=False))
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        click.echo(yaml.safe_dump({"units": document["units"]}, sort_keys=False), nl=False)
        click.echo(
            f"# held out: {fitted.mape_percent:.1f} % mean error, {fitted.worst_percent:.1f} % at worst, "
            f"R2 {fitted.r_squared:.3f}"
        )
        if (slower := _slower(found)) is not None:
            click.echo(
                f"# the next best rounds were {slower:.1f} % slower (median): so much of the error may be "
                "the machine's, what is beyond is the model's"
            )


_HEAD = """# Written by `glowplug engine calibrate`. `units` is a section of the endpoint document; the rest
# says what it was made of.
"""


def _target(target: str, state_dir: Path, model: str | None, key: str | None) -> calibration.Target:
    from serving import client
    from serving.stress import calibration

    if target.startswith(("http://", "https://")):
        return calibration.Target(target, model or "", key=key)
    status = client.Client(state_dir, target).get("/api/v1/status")
    ready = sum(each["state"] == "ready" for each in status["replicas"])
    if not ready:
        raise click.UsageError(
            f"endpoint {target} has no ready replica: see `glowplug endpoint status {target}`"
        )
    return calibration.Target(status["url"], model or status["model_name"], ready, key)


def _numbers(text: str, option: str, least: int, most: int) -> list[int]:
    try:
        found = [int(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= each <= most for each in found):
        raise click.BadParameter(
            f"{text!r} is no list of numbers from {least} to {most}, as in 16,128", param_hint=option
        )
    return found


def _slower(found: list[calibration.Measured]) -> float | None:
    """The median over the kinds; None where there was one round."""
    known = [one.slower_percent for one in found if one.slower_percent is not None]
    return round(statistics.median(known), 2) if known else None


def _line(one: calibration.Measured) -> str:
    point = one.point
    return (
        f"{point.input_tokens:7.0f} in, {point.cached_tokens:6.0f} of them cached, "
        f"{point.output_tokens:5.0f} out: {1 / point.seconds:9.2f} requests a second, "
        f"{1_000 * point.seconds:9.3f} ms each "
        f"({one.clients} clients, {one.requests} requests)"
    )


def _document(fitted: unitfit.Fit, found: list[calibration.Measured]) -> dict[str, Any]:
    by = fitted.coefficients
    return {
        "units": {
            "request_seconds": by.request,
            "input_token_seconds": by.input,
            "output_token_seconds": by.output,
            "cached_token_seconds": by.cached,
        },
        "held_out_error": {
            "mean_percent": round(fitted.mape_percent, 2),
            "worst_percent": round(fitted.worst_percent, 2),
            "r_squared": round(fitted.r_squared, 4),
        },
        "next_best_round_slower_percent": _slower(found),
        "measured": [
            {"clients": one.clients, "requests": one.requests, **dataclasses.asdict(one.point)}
            for one in found
        ],
    }
