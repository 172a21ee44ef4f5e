"""What a benchmark starts, brought into a registry of its own: source image, block image, boot pack.

    bench/given     the source image, with its block image, as they are; converted here if it has none
    bench/blocks    the same, converted here, only made where the block image above has a boot pack
    bench/pack      a copy of bench/given with a boot pack traced here, only made where that has none

The registry's storage is a folder: `prepare` fills it, each link's own registry serves it (`registry`).
Called by `measure`, on the main thread; needs root.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glowplug.startup import lazy, link, machine, registry, result
from glowplug.startup.speed import Speed
from glowplug.until import Until
from imagefs import artifact, errors

_GIVEN = "bench/given:latest"
_BLOCKS = "bench/blocks:latest"
_PACK = "bench/pack:latest"
_NEAR_ONLY = Speed(10**10)
"""Preparing needs both ends, and not the link between them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """What is started: an image by any name, `source` that is its oci: REF on this machine, the command, its
    environment (KEY=VALUE), and when it is ready. An empty command is the image's own. The source is read
    from another network namespace, hence a folder."""

    name: str
    source: str
    command: tuple[str, ...]
    environment: tuple[str, ...]
    until: Until


@dataclasses.dataclass(frozen=True, slots=True)
class Scratch:
    """A filled registry's storage. Names are REPOSITORY:TAG; `blocks` and `pack` are there if they were asked
    for."""

    storage: Path
    given: str
    blocks: str
    pack: str
    source_bytes: int
    unpacked_bytes: int
    layers: tuple[result.Layer, ...]


def prepare(workload: Workload, modes: Sequence[str], folder: Path, say: Callable[[str], None]) -> Scratch:
    """Fill a registry's storage below `folder` with what these modes start."""
    storage = folder / "registry"
    with machine.closing_whole() as stack:
        over = stack.enter_context(link.open_link(_NEAR_ONLY))
        server = stack.enter_context(registry.serve(over, folder, storage))
        glowplug = stack.enter_context(lazy.use(over, folder / "preparing"))
        say(f"copying {workload.name} to a registry of its own")
        glowplug.copy(workload.source, f"{server.host}/{_GIVEN}")
        source_bytes = _source_bytes(server)
        if not set(result.LAZY) & set(modes):
            return Scratch(storage, _GIVEN, _GIVEN, _GIVEN, source_bytes, 0, ())
        facts, blocks, pack = _prepare_lazy(glowplug, server, workload, modes, say)
    unpacked_bytes = sum(layer["image_bytes"] for layer in facts["layers"])
    return Scratch(storage, _GIVEN, blocks, pack, source_bytes, unpacked_bytes, _layers(facts))


def _prepare_lazy(
    glowplug: lazy.Glowplug,
    server: registry.Registry,
    workload: Workload,
    modes: Sequence[str],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], str, str]:
    """Block images and boot pack; the facts of the fullest, and the names without and with a pack."""

    def at(name: str) -> str:
        return f"{server.host}/{name}"

    facts = glowplug.inspect(at(_GIVEN))
    if facts is None:
        say("converting: it has no block image")
        glowplug.convert(at(_GIVEN))
        facts = glowplug.inspect(at(_GIVEN))
    assert facts is not None
    if facts["boot_pack"] is not None:
        if (set(result.LAZY) - {result.PACK}) & set(modes):
            say("converting once more: its block image has a boot pack, and one without is measured, too")
            server.push(f"docker://{at(_GIVEN)}", _BLOCKS)
            glowplug.convert(at(_BLOCKS))
        return facts, _BLOCKS, _GIVEN
    if result.PACK in modes:
        say("tracing a start, for the boot pack")
        glowplug.copy(f"docker://{at(_GIVEN)}", at(_PACK))
        glowplug.pack(at(_PACK), workload.command, workload.environment, workload.until)
        facts = glowplug.inspect(at(_PACK)) or facts
    return facts, _GIVEN, _PACK


def _source_bytes(server: registry.Registry) -> int:
    """The compressed size of the source image's layers."""
    inspect = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{server.host}/{_GIVEN}"]
    manifest = json.loads(machine.check_call(server.link.server.command(inspect)))
    if artifact.is_block_image(manifest):
        raise errors.InvalidInputError(
            "that is a block image, which nothing can pull: name the source image that it lies beside"
        )
    return sum(layer["size"] for layer in manifest["layers"])


def _layers(facts: dict[str, Any]) -> tuple[result.Layer, ...]:
    layers = []
    pack = facts["boot_pack"]
    if pack is not None and pack["usable"]:
        layers.append(result.Layer("boot pack", pack["table_digest"], pack["frames"], pack["data_bytes"]))
    for layer in facts["layers"]:
        name = f"layer {layer['number'] + 1}"
        layers.append(result.Layer(name, layer["map_digest"], layer["blocks"], layer["compressed_bytes"]))
    return tuple(layers)
