"""`glowplug trace REF -- CMD`: record what the start of an image reads."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import opening, settings
from glowplug.until import Until, check_address
from imagefs import bootpack, errors, kernelreadahead

if TYPE_CHECKING:
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options


def until_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """When the start is over, as keyword `until` (until.Until)."""
    seconds = click.option(
        "--seconds", type=click.FloatRange(min=0, min_open=True), help="Stop after that time."
    )
    return seconds(up_options(function))


def up_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `until_options`, without the one that says nothing of when a start is up."""

    @click.option(
        "--until-log",
        metavar="REGEX",
        help="Stop when a line of CMD's output matches, instead of when CMD ends.",
    )
    @click.option(
        "--until-http",
        metavar="URL",
        help="Stop when URL answers with 2xx; [HOST]:PORT: when it takes a connection.",
    )
    @click.option("--until-exit", is_flag=True, help="Stop when CMD ends (the default).")
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        until_log: str | None,
        until_http: str | None,
        until_exit: bool,
        seconds: float | None = None,
        **kwargs: Any,
    ) -> Any:
        given = [until_log is not None, until_http is not None, until_exit, seconds is not None]
        if sum(given) > 1:
            raise click.UsageError(
                "only one of --until-log, --until-http, --until-exit and --seconds can be used"
            )
        try:
            pattern = None if until_log is None else re.compile(until_log.encode())
        except re.error as exc:
            raise click.BadParameter(f"{until_log!r}: {exc}", param_hint="--until-log") from exc
        address = None if until_http is None else check_address(until_http)
        return function(*args, until=Until(pattern, address, seconds), **kwargs)

    return wrapper


def read_ahead_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """How much the kernel reads ahead while a start is traced, as keyword `read_ahead_kib`."""

    @click.option(
        "--read-ahead",
        type=settings.SIZE,
        default=kernelreadahead.TRACE_READ_AHEAD_KIB * 1024,
        help="What the kernel reads ahead, in the trace and in starts with a boot pack made of it "
        f"(default {kernelreadahead.TRACE_READ_AHEAD_KIB}KiB).",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, read_ahead: int, **kwargs: Any) -> Any:
        return function(*args, read_ahead_kib=read_ahead_kib(read_ahead), **kwargs)

    return wrapper


def read_ahead_kib(size_bytes: int) -> int:
    """An option's value as KiB. Raises BadParameter for one that no mount can have."""
    kib, rest = divmod(size_bytes, 1024)
    if rest or not bootpack.is_read_ahead(kib):
        raise click.BadParameter(
            f"{size_bytes} bytes are not whole pages, from {bootpack.MIN_READ_AHEAD_KIB}KiB to "
            f"{bootpack.MAX_READ_AHEAD_KIB // 1024}MiB",
            param_hint="--read-ahead",
        )
    return kib


@click.command("trace")
@click.argument("ref")
@click.argument("cmd", metavar="[-- CMD...]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("glowplug.trace"),
    show_default=True,
    help="The trace's file.",
)
@until_options
@read_ahead_option
@click.option("-e", "--env", "environment", metavar="K=V", multiple=True, help="As in run.")
@click.option("-w", "--workdir", metavar="DIR", help="As in run.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="As in run.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@settings.storage_options
@settings.origin_options
@opening.image_options
def command(
    ref: str,
    cmd: tuple[str, ...],
    output: Path,
    until: Until,
    read_ahead_kib: int,
    environment: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    as_json: bool,
    storage: settings.Storage,
    origins: Options,
    open_image: Callable[[str], LazyImage],
) -> None:
    """Run CMD (default: the image's own command) in REF as `run` does, until it is up, and write down what
    it read of which layer: what `glowplug pack` makes a boot pack of. What CMD prints goes to stderr."""
    if os.geteuid() != 0:
        raise errors.ConfigurationError("trace needs root, as run does")
    if not output.absolute().parent.is_dir():  # said before the start, not after it
        raise errors.InvalidInputError(f"--output {output}: its folder does not exist")
    from glowplug import process, tracing
    from imagefs import trace

    image = open_image(ref)
    spec = process.from_config(
        image.config_document(), cmd, environment=environment, directory=workdir, user=user
    )
    result = tracing.record(ref, image, spec, until, read_ahead_kib, storage, origins)
    if result.failure:
        click.echo(f"glowplug: {result.failure}: no trace is written", err=True)
        sys.exit(1)
    if result.left_out:
        click.echo(f"glowplug: {result.left_out} reads too many: the trace lacks the last ones", err=True)
    data = trace.encode(result.trace)
    output.write_bytes(data)
    summary = {
        "trace": str(output),
        "block_image_digest": result.trace.block_image_digest,
        "reads": len(result.trace.reads),
        "read_bytes": result.read_bytes,
        "layers": len({read.layer for read in result.trace.reads}),
        "left_out": result.left_out,
        "read_ahead_kib": result.trace.read_ahead_kib,
    }
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        click.echo(
            f"{output}: {summary['reads']} reads, {result.read_bytes / 1e6:.1f} MB, "
            f"of {summary['layers']} of {len(result.trace.map_digests)} layers"
        )
