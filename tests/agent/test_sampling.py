"""Sampled traces: real mounts, a real registry; what a start read is found there afterwards."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from agent import config, sampling
from agent.images import Images
from agent.rows import BootPackRow
from agent.snapshotter import Found
from imagefs import image, kernelreadahead, reference, trace, tracestore
from imagefs.fuse.mapfiles import MapFiles
from imagefs.image import LazyImage
from tests.agent.lazy_node import BASE, LazyNode, Source
from tests.agent.lazy_node import node as node
from tests.fixtures import images

pytestmark = pytest.mark.root

_READ, _LEFT = (bytes([number]) * 300_000 for number in (1, 2))
_TARS = [BASE, images.tar_of([("read", _READ), ("left", _LEFT)], root=False)]
_PATIENCE_SECONDS = 20.0


class Sampled:
    """A node whose images are sampled; `draws` are what chance says, from 0 to 1."""

    def __init__(self, node: LazyNode, share: float, *draws: float) -> None:
        self.node = node
        chances = iter(draws)
        self.sampler = sampling.Sampler(
            config.Traces(share, 60.0),
            MapFiles(node.settings.root / "maps"),
            node.mounts,
            node.devices,
            node.observer,
            sampling.publisher(node.origins),
            lambda: next(chances),
            node.clock,
        )
        self.images = Images(
            node.settings, node.store, node.devices, node.mounts, node.observer, node.origins,
            clock=node.clock, sampler=self.sampler,
        )  # fmt: skip

    def start(self, source: Source) -> tuple[Found, list[Path]]:
        """What a container's mount does: all layers of the image."""
        found = self.images.find_layer(source.chain_ids[-1], source.labels)
        assert found is not None
        return found, [self.images.directory(found.block_digest, n) for n in range(len(source.chain_ids))]

    def wait_for(self, kind: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while kind not in self.node.kinds():
            assert time.monotonic() < deadline, self.node.observer.events()
            time.sleep(0.01)


def _published(node: LazyNode, source: Source) -> tuple[LazyImage, list[trace.Trace]]:
    name = source.name.replace(node.proxy.host, node.registry.host)
    opened = image.open_image(reference.parse(f"docker://{name}"))
    return opened, tracestore.read_all(opened)


def test_a_start_is_traced_and_published(node: LazyNode) -> None:
    source = node.push(_TARS)
    sampled = Sampled(node, 0.5, 0.4)
    found, paths = sampled.start(source)
    assert (paths[1] / "read").read_bytes() == _READ
    sampled.sampler.tick()  # not due
    node.clock.now += 61
    sampled.sampler.tick()
    (paths[1] / "left").read_bytes()
    sampled.wait_for("trace_published")
    opened, traces = _published(node, source)
    assert [each.command for each in traces] == [()]
    assert traces[0].read_ahead_kib == kernelreadahead.TRACE_READ_AHEAD_KIB
    assert traces[0].block_image_digest == found.block_digest == opened.manifest.digest
    records = trace.merge(traces)
    pages = {(r.layer, page) for r in records for page in range(r.first_page, r.first_page + r.pages)}
    for number, layer in enumerate(opened.layers):
        assert (number, layer.block_map.metadata_offset // 4096) in pages
    upper = sum(1 for layer, _ in pages if layer == 1)
    assert len(_READ) // 4096 <= upper < (len(_READ) + len(_LEFT)) // 4096
    # Once is enough: nothing is drawn for this image any more.
    sampled.start(source)
    node.clock.now += 61
    sampled.sampler.tick()
    assert node.kinds().count("trace_published") == 1


def test_chance_mounted_layers_and_boot_packs_keep_a_start_from_it(node: LazyNode) -> None:
    unlucky, shared = node.push(_TARS), node.push([*_TARS, BASE])
    sampled = Sampled(node, 0.5, 0.5, 0.1)
    found, _ = sampled.start(unlucky)
    sampled.start(shared)  # lucky, but its lower layers are mounted
    row = next(row for row in sampled.images.rows() if row.block_digest == found.block_digest)
    packed = BootPackRow("sha256:" + "1" * 64, 1, "sha256:" + "2" * 64, 1)
    row = dataclasses.replace(row, block_digest="sha256:" + "3" * 64, boot_pack=packed)
    assert not sampled.sampler.recorded(row, lambda: True)
    node.clock.now += 61
    sampled.sampler.tick()
    assert [_published(node, source)[1] for source in (unlucky, shared)] == [[], []]


def test_a_registry_that_refuses(node: LazyNode) -> None:
    source = node.push(_TARS)
    sampled = Sampled(node, 1.0, 0.0, 0.0)
    sampled.start(source)
    node.proxy.close()
    node.clock.now += 61
    sampled.sampler.tick()
    sampled.wait_for("trace_not_published")
    assert _published(node, source)[1] == []
