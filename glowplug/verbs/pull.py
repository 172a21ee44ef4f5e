"""`glowplug pull REF`: an image for containerd's users without Kubernetes, lazily."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import click

from glowplug import settings


@click.command("pull")
@click.argument("ref")
@settings.state_option
@click.option(
    "--containerd-address",
    type=click.Path(path_type=Path),
    envvar="CONTAINERD_ADDRESS",
    show_envvar=True,
    default=Path("/run/containerd/containerd.sock"),
    show_default=True,
    help="containerd's socket.",
)
@click.option(
    "--namespace",
    envvar="CONTAINERD_NAMESPACE",
    show_envvar=True,
    default="default",
    show_default=True,
    help="containerd's namespace.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(ref: str, state_dir: Path, containerd_address: Path, namespace: str, as_json: bool) -> None:
    """Make the image REF (docker://HOST/REPO[:TAG], or as ctr writes it) runnable in containerd, its layers
    fetched as they are read.

    Afterwards `ctr run --snapshotter glowplug IMAGE NAME` starts it. An image without a block image is not
    pulled (exit code 4): `ctr images pull --snapshotter glowplug IMAGE` is the ordinary way.
    """
    from agent import client, containerd, lookup
    from imagefs import errors

    name = lookup.image_name(ref)
    socket = state_dir / "agent.sock"
    found = client.AgentClient(socket, timeout_seconds=None).post("/api/v1/pull", {"reference": ref})
    if not found["manifests"]:
        raise errors.InvalidInputError(
            f"{ref} is the block image itself, which containerd cannot run; name the image that it is of"
        )
    with containerd.Containerd(containerd_address, namespace) as daemon:
        daemon.record(_image(name, found))
    report = {
        "image": name,
        "source_digest": found["source_digest"],
        "block_image_digest": found["block_digest"],
        "layers": len(found["chain_ids"]),
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(name)
        click.echo(f"{name}: {report['layers']} layers at hand lazily", err=True)


def _image(name: str, found: dict[str, Any]) -> Any:
    from agent import containerd
    from imagefs import artifact

    manifests = [
        artifact.Manifest(each["media_type"], each["digest"], base64.b64decode(each["data"]))
        for each in found["manifests"]
    ]
    config = base64.b64decode(found["config"])
    return containerd.Image(name, tuple(manifests), config, tuple(found["chain_ids"]))
