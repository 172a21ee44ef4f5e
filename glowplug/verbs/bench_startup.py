"""`glowplug bench startup REF -- CMD`: how soon a container is ready, pulled and lazily, on a stated link."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glowplug import settings
from glowplug.startup import result, speed
from glowplug.verbs.trace import up_options
from imagefs import duration, errors

if TYPE_CHECKING:
    from glowplug.startup import measure
    from glowplug.until import Until
    from imagefs.origin.connect import Options


@click.command("startup")
@click.argument("ref")
@click.argument("cmd", metavar="[-- CMD...]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(result.MODES),
    multiple=True,
    help="What to measure; repeatable (default: all but whole).",
)
@click.option(
    "--containerd",
    "others",
    metavar="DIR[,LABEL]",
    multiple=True,
    help="A directory with another containerd, for mode tuned; repeatable.",
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Starts of each kind.")
@click.option("--rate", default="1gbit", show_default=True, help="The link's rate, as tc writes it.")
@click.option("--rtt", default="0", show_default=True, help="Round-trip time to add, as in 50ms.")
@up_options
@click.option("-e", "--env", "environment", metavar="K=V", multiple=True, help="As in run.")
@click.option(
    "--json",
    "document",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write every start, as JSON.",
)
@click.option(
    "--report",
    "page",
    metavar="FILE.html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write a page with plots.",
)
@settings.origin_options
def command(
    *,
    ref: str,
    cmd: tuple[str, ...],
    modes: tuple[str, ...],
    others: tuple[str, ...],
    runs: int,
    rate: str,
    rtt: str,
    until: Until,
    environment: tuple[str, ...],
    document: Path | None,
    page: Path | None,
    origins: Options,
) -> None:
    """Measure how soon CMD (default: the image's own command) in REF is ready, started in turns:

    \b
    containerd  pulled, unpacked and run by the containerd in PATH
    tuned       by those of --containerd, fetching and unpacking in parallel where they can
    blocks      lazily, block by block
    pack        lazily, with a boot pack
    warm        lazily, block cache full, page cache dropped
    whole       the same, mounted from files, as layers are that are all here; only when named
    local       by containerd, unpacked before, page cache dropped

    The image is copied into a registry of its own, behind a link of the given speed; what it lacks, block
    image or boot pack, is made there. It is ready when --until-log or --until-http say so, or when CMD ends.
    """
    if (result.TUNED in modes) != bool(others) and modes:
        raise click.UsageError("mode tuned and --containerd go together")
    for path in filter(None, (document, page)):
        if not path.absolute().parent.is_dir():  # said before the measurement, not after it
            raise errors.InvalidInputError(f"{path}: its folder does not exist")
    link_speed = speed.Speed(speed.parse_rate(rate), duration.parse(rtt, "--rtt"))
    modes = tuple(mode for mode in result.MODES if mode in (modes or result.USUAL))
    from glowplug.startup import measure, report, scratch, table

    measure.check(modes)
    rivals = [_rival(text) for text in others]

    def say(text: str) -> None:
        click.echo(f"bench: {text}", err=True)

    with tempfile.TemporaryDirectory(prefix="glowplug-bench-") as name:
        folder = Path(name)
        source = _source(ref, origins, folder)
        workload = scratch.Workload(ref, source, cmd, environment, until)
        prepared = scratch.prepare(workload, modes, folder, say)
        measured = measure.measure(workload, prepared, modes, rivals, link_speed, runs, folder, say)
    click.echo(table.text(measured))
    if document is not None:
        document.write_text(json.dumps(measured.document(), indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.write_text(report.page([measured]), encoding="utf-8")


def _rival(text: str) -> measure.Rival:
    from glowplug.startup import containerd, measure

    directory, _, label = text.partition(",")
    binaries = containerd.inspect(Path(directory).absolute())
    return measure.Rival(binaries, label or measure.rival_label(binaries))


def _source(text: str, origins: Options, folder: Path) -> str:
    """REF as an oci: REF: itself, or a copy with its block image, where it has one."""
    from imagefs import platforms, reference
    from imagefs.origin import connect

    ref = reference.parse(text)
    if ref.transport == "oci":
        connect.connect(ref, origins).read_manifest(connect.selector(ref))  # it is there
        return text
    copy = f"oci:{folder}/source:latest"
    if ref.transport in ("docker-archive", "docker-daemon"):
        from converter.source import daemon
        from glowplug.startup import machine

        if ref.transport == "docker-daemon":  # skopeo would not look at DOCKER_HOST
            text = f"docker-archive:{daemon.save(ref, folder)}"
        machine.check_call(["skopeo", "copy", "-q", text, copy])
    else:
        from converter import copying

        copying.copy(ref, reference.parse(copy), origins, platforms.host())
    return copy
