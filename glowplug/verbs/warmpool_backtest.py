"""`glowplug warmpool backtest TRACE`: what policies would have done on recorded demand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command("backtest")
@click.argument("trace", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--rate-per-node",
    required=True,
    type=click.FloatRange(0, min_open=True),
    help="What one node serves, in the trace's unit (1 where the trace has nodes).",
)
@click.option("--column", help="The column of rates, if it has no usual name.")
@click.option("--time-column", help="The column of times, in seconds or dates.")
@click.option("--zeros", type=click.Choice(["gaps", "zeros"]), default="gaps", show_default=True,
              help="What a zero means: nobody knows, or nothing came.")  # fmt: skip
@click.option("--train-days", type=click.FloatRange(1, 365), default=7.0, show_default=True,
              help="So much is learned from; the rest is judged.")  # fmt: skip
@click.option("--boot", nargs=2, type=click.FloatRange(0), default=(60.0, 180.0), show_default=True,
              metavar="MIN MAX", help="Bounds of a node's boot, in seconds.")  # fmt: skip
@click.option("--provisioning", nargs=3, type=click.FloatRange(0), default=(22.7, 42.0, 51.8),
              show_default=True, metavar="P50 P90 P99", help="Seconds on top of a boot.")  # fmt: skip
@click.option("--cap", type=click.IntRange(1, 1_000), default=64, show_default=True, help="The largest pool.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all draws.")
@click.option("--json", "document", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
              help="Write every point of every frontier.")  # fmt: skip
@click.option("--report", "page", metavar="FILE.html", type=click.Path(dir_okay=False, path_type=Path),
              help="Write a page with plots.")  # fmt: skip
def command(
    *,
    trace: Path,
    rate_per_node: float,
    column: str | None,
    time_column: str | None,
    zeros: str,
    train_days: float,
    boot: tuple[float, float],
    provisioning: tuple[float, float, float],
    cap: int,
    seed: int,
    document: Path | None,
    page: Path | None,
) -> None:
    """Replay TRACE (CSV, also .gz, or Parquet) against pools of every kind, and compare: how many idle
    node-hours each needs for 95, 98 and 99% of the nodes asked for to be there at once.

    Policies: none; the best constant pool, found in hindsight on what is judged; reactive; last value;
    trailing quantile; the forecast alone; ours, as `run` decides; an oracle that knows demand, but not how
    long nodes take. None of the others sees what is still to come.
    """
    if boot[0] > boot[1] or sorted(provisioning) != list(provisioning):
        raise click.UsageError("--boot and --provisioning: the numbers must not fall")
    from warmpool import demand_files, errors
    from warmpool.backtest import judge, plots, report
    from warmpool.backtest.world import LeadModel

    for path in filter(None, (document, page)):
        if not path.absolute().parent.is_dir():  # said before the work, not after it
            raise errors.InvalidInputError(f"{path}: its folder does not exist")
    series = demand_files.read(trace, time_column, column, zeros_are_gaps=zeros == "gaps")
    lead = LeadModel(provisioning, boot)
    setup = judge.Setup(rate_per_node, seed, train_days * 86_400.0, cap=cap, lead=lead)
    verdict = judge.judge(series, setup, _tell)
    if sys.stderr.isatty():
        click.echo("\r\033[K", err=True, nl=False)
    click.echo(report.text(verdict))
    if document is not None:
        document.write_text(json.dumps(report.document(verdict), indent=1) + "\n", encoding="utf-8")
    if page is not None:
        drawn = [plots.frontiers(case) for case in verdict.cases]
        page.write_text(report.page(verdict, drawn), encoding="utf-8")


def _tell(what: str, part: float) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\033[Kbacktest: {part:4.0%} {what}", err=True, nl=False)
