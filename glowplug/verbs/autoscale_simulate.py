"""`glowplug autoscale simulate`: autoscaling policies compared, on the same requests."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from serving.autoscaler.simulate.scenarios import Point, Scenario
    from serving.autoscaler.simulate.sweep import Comparison

_DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.command("simulate", context_settings={"show_default": True})
@click.argument("scenarios", nargs=-1, metavar="[SCENARIO]...")
@click.option("--traces", type=_DIRECTORY, help="Where traces of real traffic are: more scenarios.")
@click.option("--defaults", is_flag=True, help="Only each policy's default setting: no frontiers.")
@click.option(
    "--policy",
    "wanted",
    multiple=True,
    type=click.Choice(
        ["ours", "reactive", "published", "hpa", "kpa", "static peak", "clairvoyant"],
    ),
    help="Only this one; may be given again.",
)
@click.option(
    "--starts", nargs=2, type=click.FloatRange(0.1, 86_400), help="Median and p99 of a start, in seconds."
)
@click.option("--seed", default=1, type=click.IntRange(0), help="Of arrivals, work, starts and failures.")
@click.option("--failure-hours", type=click.FloatRange(0.01), help="Replicas fail, once in so long each.")
@click.option(
    "--report-delay", default=0, type=click.IntRange(0, 60), help="Load is told so many seconds late."
)
@click.option(
    "--reports-missing", default=0.0, type=click.FloatRange(0, 1), help="Part of reports that is lost."
)
@click.option("--out", type=_DIRECTORY, help="Write JSON, figures and a page there.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
def command(
    scenarios: tuple[str, ...],
    traces: Path | None,
    defaults: bool,
    wanted: tuple[str, ...],
    starts: tuple[float, float] | None,
    seed: int,
    failure_hours: float | None,
    report_delay: int,
    reports_missing: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run autoscaling policies against the same requests, and say which is late how often, at what cost.

    Ours, the formula that Databricks published, Kubernetes' HPA and Knative's KPA with their defaults and
    with other settings, a static peak, and a clairvoyant; on days also ours without its forecast. Without
    SCENARIO: all that there are, but for those of a day at 1,000 requests a second, and of several days.
    """
    from serving.autoscaler.simulate import page, run, table
    from serving.autoscaler.simulate import scenarios as known

    names = known.names(traces)
    for name in scenarios:
        if name not in names:
            hint = "" if traces is not None else " (more with --traces)"
            raise click.BadParameter(f"{name!r} is none of {', '.join(names)}{hint}", param_hint="SCENARIO")
    faults = run.Faults(
        failure_seconds=run.NO_FAULTS.failure_seconds if failure_hours is None else failure_hours * 3_600,
        late_seconds=report_delay,
        missing=reports_missing,
    )
    if starts is not None and starts[1] < starts[0]:
        raise click.BadParameter("the p99 of a start is below its median", param_hint="--starts")
    started = None if starts is None else run.Starts(*starts)
    documents: list[dict[str, Any]] = []
    for name in scenarios or known.usual(traces):
        scenario = known.build(name, traces, seed, faults, started)
        points = [
            each for each in known.points(scenario, dense=not defaults) if not wanted or each.policy in wanted
        ]
        if not points:
            raise click.BadParameter(f"{name} has no such policy", param_hint="--policy")
        comparison = _compared(scenario, points)
        documents.append(page.document(comparison))
        if not as_json:
            click.echo("\n".join(table.lines(comparison.outcomes, comparison.verdicts())))
        if out is not None:
            page.write(out, comparison)
    if out is not None:
        click.echo(f"{page.write_index(out)}", err=True)
    if as_json:
        click.echo(json.dumps(documents, indent=1))


def _compared(scenario: Scenario, points: list[Point]) -> Comparison:
    from rich import console, progress

    from serving.autoscaler.simulate import sweep

    shown = console.Console(stderr=True)
    with progress.Progress(console=shown, disable=not shown.is_terminal, transient=True) as bar:
        task = bar.add_task(scenario.name, total=len(points))
        began = time.process_time()
        found = sweep.compare(scenario, points, lambda _: bar.advance(task))
    seconds = time.process_time() - began
    requests = sum(each.requests for each in found.outcomes)
    click.echo(f"{scenario.name}: {requests:,} requests in {seconds:.1f} s of processor time", err=True)
    return found
