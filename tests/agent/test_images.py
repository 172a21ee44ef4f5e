"""Block images found once, attached once, mounted at first use, let go: with a real device server."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import config, flights, lookup
from agent.images import owner_of
from agent.reconcile import attached
from agent.rows import ImageRow
from agent.snapshots import Kind, Usage
from agent.snapshotter import Found
from converter import pack
from imagefs import artifact, assembly, errors, image, reference, trace
from imagefs.origin import Origin
from tests.agent.lazy_node import BASE, LazyNode
from tests.agent.lazy_node import node as node
from tests.fixtures import block_images, boot_packs, images, servers
from tests.imagefs import scripted
from tests.imagefs.fuse.stack import eventually

pytestmark = pytest.mark.root


def layer_of(number: int) -> bytes:
    return images.tar_of([(f"file-{number}", os.urandom(1000))])


@pytest.fixture
def hasty(tmp_path: Path, registry: servers.RegistryServer) -> Iterator[LazyNode]:
    made = LazyNode(tmp_path, registry, lookup_deadline_seconds=0.7)
    yield made
    made.close()


def test_many_prepares_are_one_lookup_and_one_attach(node: LazyNode) -> None:
    source = node.push([BASE, *(layer_of(number) for number in range(5))])
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(
            pool.map(lambda chain: node.images.find_layer(chain, source.labels), source.chain_ids * 2)
        )
    assert all(found)
    assert [each.layer for each in found if each] == [*range(6), *range(6)]
    (digest,) = {each.block_digest for each in found if each}
    assert node.owners() == {owner_of(digest)}
    # Neither tag, index nor source manifest is asked for: containerd has said what they say.
    manifests = node.proxy.seen("GET", "/manifests/")
    assert sum(digest in request.path for request in manifests) == 1
    assert not any(source.digest in request.path for request in manifests if "referrers" not in request.path)
    assert node.kinds().count("lazy_pull") == 1
    assert not node.mounted(), "layers are mounted at first use"
    path = node.images.directory(digest, 0)
    assert (path / "etc/motd").read_text() == "base\n"
    assert node.mounted() == [path]
    before = len(node.proxy.requests)
    assert node.images.find_layer(source.chain_ids[3], source.labels) == Found(digest, 3)
    assert len(node.proxy.requests) == before, "what is known is not asked again"


def test_no_block_image_is_remembered_for_a_while(node: LazyNode) -> None:
    source = node.push([BASE], converted=False)
    assert node.images.find_layer(source.chain_ids[0], source.labels) is None
    (event,) = [event for event in node.observer.events() if event.kind == "ordinary_pull"]
    assert event.fields["reason"] == "no block image"
    asked = len(node.proxy.requests)
    assert node.images.find_layer(source.chain_ids[0], source.labels) is None
    assert len(node.proxy.requests) == asked
    block_images.convert(f"docker://{source.name.replace(node.proxy.host, node.registry.host)}")
    node.clock.now += node.settings.images.negative_seconds + 1
    assert node.images.find_layer(source.chain_ids[0], source.labels) is not None


def test_a_layer_that_the_block_image_lacks_is_said(node: LazyNode) -> None:
    source = node.push([BASE])
    assert node.images.find_layer("sha256:" + "0" * 64, source.labels) is None
    assert "layer_missing" in node.kinds()


def test_labels_that_say_nothing_are_an_ordinary_pull(node: LazyNode) -> None:
    assert node.images.find_layer("sha256:" + "0" * 64, {}) is None
    assert node.images.find_layer("sha256:" + "0" * 64, {lookup.REFERENCE_LABEL: "???"}) is None
    assert not node.proxy.requests


def test_an_origin_that_hangs_costs_the_deadline_once(hasty: LazyNode) -> None:
    source = hasty.push([BASE])
    hasty.proxy.add(servers.Fault(path="/blobs/", hang=True, times=None))
    assert hasty.images.find_layer(source.chain_ids[0], source.labels) is None
    asked = len(hasty.proxy.requests)
    assert hasty.images.find_layer(source.chain_ids[0], source.labels) is None
    assert len(hasty.proxy.requests) == asked
    reasons = [event.fields["reason"] for event in hasty.observer.events() if event.kind == "ordinary_pull"]
    assert reasons == ["unavailable"]
    assert not hasty.owners()
    hasty.proxy.clear()
    hasty.clock.now += 31
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hasty.images._flights, "_deadline_seconds", 20.0)
        assert hasty.images.find_layer(source.chain_ids[0], source.labels) is not None


def test_layers_that_hang_are_undone_at_the_deadline(hasty: LazyNode) -> None:
    source = hasty.push([BASE])
    # The blob's ranges hang; everything that the lookup reads in full does not.
    hasty.proxy.hook = lambda seen: hasty.proxy.closing.wait(4) and None if "range" in seen.fields else None
    assert hasty.images.find_layer(source.chain_ids[0], source.labels) is None
    assert not hasty.owners()
    assert hasty.images.rows() == []
    assert hasty.store.images() == []


def test_wrong_bytes_are_an_ordinary_pull_and_leave_nothing(node: LazyNode) -> None:
    source = node.push([BASE])
    node.proxy.hook = lambda seen: (206, {}, b"x" * 100) if "range" in seen.fields else None
    assert node.images.find_layer(source.chain_ids[0], source.labels) is None
    assert not node.owners()
    assert node.store.images() == []
    assert os.listdir(node.settings.root / "maps") == []
    assert "lookup_failed" in node.kinds()


def test_of_several_block_images_the_first_that_may_be_used(node: LazyNode) -> None:
    source = node.push([BASE])
    second = block_images.convert(
        f"docker://{source.name.replace(node.proxy.host, node.registry.host)}", block_bytes=2 * 65536
    )
    assert node.images.find_layer(source.chain_ids[0], source.labels) is not None
    (free_choice,) = [row.block_digest for row in node.images.rows()]
    refused: list[str] = []

    def trust(
        settings: config.Images, origin: Origin, source_digest: str, manifest: artifact.Manifest
    ) -> None:
        assert source_digest == source.digest
        if manifest.digest == free_choice:
            refused.append(manifest.digest)
            raise errors.DeniedError("not this one")

    node.trust = trust
    node.reboot()
    node.clock.now += 100
    node.images.sweep()
    found = node.images.find_layer(source.chain_ids[0], source.labels)
    assert found is not None
    assert refused == [free_choice]
    assert found.block_digest != free_choice
    assert second in (free_choice, found.block_digest)


def test_a_refused_image_is_an_ordinary_pull(node: LazyNode) -> None:
    def trust(*_: object) -> None:
        raise errors.DeniedError("no signature")

    node.trust = trust
    node.reboot()
    source = node.push([BASE])
    assert node.images.find_layer(source.chain_ids[0], source.labels) is None
    (event,) = [event for event in node.observer.events() if event.kind == "ordinary_pull"]
    assert event.fields["reason"] == "refused"


def test_a_pin_needs_no_referrers(node: LazyNode) -> None:
    source = node.push([BASE])
    found = node.images.find_layer(source.chain_ids[0], source.labels)
    assert found is not None
    pin = config.Pin(source=source.digest, block_image=found.block_digest)
    wanted = lookup.from_labels(source.labels)
    assert wanted is not None
    node.proxy.add(servers.Fault(path="referrers|manifests/sha256-", status=500, times=None))
    opened = lookup.open_image(wanted, config.Images(pins=(pin,)), node.origins, None)
    assert opened.manifest.digest == found.block_digest
    other = dataclasses.replace(pin, block_image="sha256:" + "1" * 64)
    with pytest.raises(errors.NotFoundError):
        lookup.open_image(wanted, config.Images(pins=(other,)), node.origins, None)


def test_a_shared_layer_has_one_mount_and_goes_with_the_last_image(node: LazyNode) -> None:
    one, other = node.push([BASE, layer_of(1)]), node.push([BASE, layer_of(2)])
    rows = [node.images.pull(source.name) for source in (one, other)]
    paths = [node.images.directory(row.block_digest, 0) for row in rows]
    assert paths[0] == paths[1]
    assert len(node.mounted()) == 1
    node.clock.now += 1000
    node.images.released(rows[0].block_digest)
    assert node.owners() == {owner_of(rows[1].block_digest)}
    assert (paths[1] / "etc/motd").read_text() == "base\n"
    node.images.released(rows[1].block_digest)
    assert not node.owners()
    assert not node.mounted()
    assert node.store.images() == []
    assert os.listdir(node.settings.root / "maps") == []
    assert not paths[0].exists()


def test_an_image_with_a_snapshot_a_pin_or_a_hold_stays(node: LazyNode) -> None:
    source = node.push([BASE])
    row = node.images.pull(source.name)
    node.images.released(row.block_digest)
    assert node.images.rows(), "its snapshots are still to be made"
    node.store.insert("layer", Kind.COMMITTED, "", {}, image=row.block_digest, layer=0)
    node.clock.now += 1000
    node.images.sweep()
    assert node.images.rows()
    node.store.remove("layer")
    node.store.set_pinned(row.block_digest, True)
    node.images.refresh(row.block_digest)
    node.images.released(row.block_digest)
    assert node.images.rows()
    node.store.set_pinned(row.block_digest, False)
    node.images.refresh(row.block_digest)
    node.images.released(row.block_digest)
    assert not node.images.rows()


def test_a_hold_ends_with_the_first_snapshot(node: LazyNode) -> None:
    source = node.push([BASE, layer_of(1)])
    row = node.images.pull(source.name)
    for number, chain_id in enumerate(source.chain_ids):
        parent = source.chain_ids[number - 1] if number else ""
        node.store.insert(chain_id, Kind.COMMITTED, parent, {}, image=row.block_digest, layer=number)
    for chain_id in reversed(source.chain_ids):
        node.store.remove(chain_id)
        node.images.released(row.block_digest)
    assert not node.images.rows()


def test_layers_of_an_image_that_is_not_converted_are_taken_from_one_that_is(node: LazyNode) -> None:
    repository = servers.unique_name("shared")
    converted = node.push([BASE, layer_of(1)], repository=repository)
    row = node.images.pull(converted.name)
    other = node.push([BASE, layer_of(2)], converted=False, repository=repository)
    assert node.images.find_layer(other.chain_ids[0], other.labels) == Found(row.block_digest, 0)
    assert node.images.find_layer(other.chain_ids[1], other.labels) is None


def test_no_repository_gives_the_layers_of_anothers_images(node: LazyNode) -> None:
    """Whoever can push to any repository could else replace the files of every image, by its chain ids."""
    planted = node.push([BASE, layer_of(1)])
    assert node.images.find_layer(planted.chain_ids[0], planted.labels) is not None
    victim = node.push([BASE, layer_of(2)], converted=False)
    assert node.images.find_layer(victim.chain_ids[0], victim.labels) is None
    (digest,) = {row.block_digest for row in node.images.rows()}
    assert node.images.may_serve(digest, planted.labels)
    assert not node.images.may_serve(digest, victim.labels)


def test_no_repository_says_what_the_block_image_of_anothers_image_is(node: LazyNode) -> None:
    """The same source manifest in two repositories, with two block images."""
    tars = [BASE, layer_of(1)]
    planted, victim = node.push(tars, block_bytes=2 * 65536), node.push(tars)
    assert planted.digest == victim.digest
    first = node.images.find_layer(planted.chain_ids[1], planted.labels)
    second = node.images.find_layer(victim.chain_ids[1], victim.labels)
    assert first is not None
    assert second is not None
    assert first.block_digest != second.block_digest
    asked = len(node.proxy.requests)
    assert node.images.find_layer(planted.chain_ids[0], planted.labels) == Found(first.block_digest, 0)
    assert node.images.find_layer(victim.chain_ids[0], victim.labels) == Found(second.block_digest, 0)
    assert len(node.proxy.requests) == asked, "both are known now"


def test_a_block_image_that_two_repositories_list_serves_both(node: LazyNode) -> None:
    tars = [BASE, layer_of(1)]
    one, other = node.push(tars), node.push(tars)
    first = node.images.find_layer(one.chain_ids[0], one.labels)
    assert first is not None
    assert not node.images.may_serve(first.block_digest, other.labels), "nobody has looked yet"
    assert node.images.find_layer(other.chain_ids[0], other.labels) == first
    assert node.images.may_serve(first.block_digest, other.labels)
    asked = len(node.proxy.requests)
    assert node.images.find_layer(other.chain_ids[1], other.labels) == Found(first.block_digest, 1)
    assert len(node.proxy.requests) == asked


def test_where_the_policy_vouches_for_the_block_image_its_repository_does_not_matter(
    tmp_path: Path, registry: servers.RegistryServer
) -> None:
    with contextlib.closing(LazyNode(tmp_path, registry, trust="signed")) as node:
        converted = node.push([BASE, layer_of(1)])
        row = node.images.pull(converted.name)
        other = node.push([BASE, layer_of(2)], converted=False)
        assert node.images.find_layer(other.chain_ids[0], other.labels) == Found(row.block_digest, 0)


def test_an_image_of_yesterday_gives_layers_if_todays_policy_takes_it(node: LazyNode) -> None:
    source = node.push([BASE])
    row = node.images.pull(source.name)
    node.store.set_pinned(row.block_digest, True)
    other = "sha256:" + "0" * 64
    policies: list[tuple[bool, dict[str, object]]] = [
        (True, {}),
        (True, {"repositories": (row.origin_ref,)}),
        (False, {"repositories": ("docker://elsewhere.example/",)}),
        (True, {"trust": "pinned", "pins": (config.Pin(source.digest, row.block_digest),)}),
        (False, {"trust": "pinned", "pins": (config.Pin(source.digest, other),)}),
        (False, {"trust": "pinned"}),
        (False, {"trust": "signed"}),
    ]
    before = node.settings
    for expected, policy in policies:
        changed = dataclasses.replace(before.images, **policy)  # type: ignore[arg-type]
        node.settings = dataclasses.replace(before, images=changed)
        node.store.close()
        node.start()
        assert node.images.may_serve(row.block_digest, source.labels) is expected, policy
        assert node.images.may_serve(row.block_digest, {}) is expected, policy
        node.images.refresh(row.block_digest)
        assert node.images.may_serve(row.block_digest, source.labels) is expected, "a mark is no acceptance"
    # Found anew, and accepted: by whatever `trust` says.
    assert node.images.find_layer(source.chain_ids[0], source.labels) == Found(row.block_digest, 0)
    assert node.images.may_serve(row.block_digest, source.labels)


def test_who_does_not_name_the_image_gets_layers_of_what_was_asked_for_by_name(node: LazyNode) -> None:
    source = node.push([BASE])
    found = node.images.find_layer(source.chain_ids[0], source.labels)
    assert found is not None
    assert node.images.find_layer(source.chain_ids[0], {}) is None
    node.images.pull(source.name)
    assert node.images.find_layer(source.chain_ids[0], {}) == found


def test_after_a_reboot_nothing_is_asked_of_a_registry_that_is_down(node: LazyNode) -> None:
    source = node.push([BASE, layer_of(1)])
    row = node.images.pull(source.name)
    before = (node.images.directory(row.block_digest, 0) / "data").read_bytes()
    node.reboot()
    assert not node.owners()
    node.proxy.close()
    assert node.images.usage(row.block_digest, 0) == Usage(0, 0), "nobody waits to be told a number"
    assert node.images.find_layer(source.chain_ids[1], source.labels) == Found(row.block_digest, 1)
    assert (node.images.directory(row.block_digest, 0) / "data").read_bytes() == before
    assert node.owners() == {owner_of(row.block_digest)}
    attributes = node.images.root_attributes(row.block_digest, 0)
    assert attributes is not None
    assert attributes.mode & 0o7777 == 0o755


def test_a_boot_pack_comes_at_once_and_is_there_after_a_reboot(node: LazyNode) -> None:
    """Without any mount or reader, and then without the registry: blocks never came."""
    source = node.push([BASE, layer_of(1)])
    name = f"docker://{source.name.replace(node.proxy.host, node.registry.host)}"
    opened = image.open_image(reference.parse(name))
    reads = [
        trace.Read(number, 0, layer.block_map.image_bytes, 1) for number, layer in enumerate(opened.layers)
    ]
    digests = tuple(layer.map_digest for layer in opened.layers)
    made = trace.Trace(opened.source_digest, opened.manifest.digest, digests, ("true",), tuple(reads), 32)
    pack.pack(opened, [made], pack.Parameters(65536, 1, 2))

    found = node.images.find_layer(source.chain_ids[0], source.labels)
    assert found is not None

    def streamed() -> bool:
        (status,) = node.devices.status()["boot_packs"]
        return bool(status["present_frames"] == status["frames"])

    eventually(streamed, "the pack is here")
    blobs = {layer.blob_digest for layer in opened.layers}
    asked = {request.path.rpartition("/")[2] for request in node.proxy.seen("GET", "/blobs/")}
    assert not blobs & asked
    node.reboot()
    node.proxy.close()
    assert (node.images.directory(found.block_digest, 0) / "etc/motd").read_text() == "base\n"
    assert (node.images.directory(found.block_digest, 0) / "data").read_bytes() == b"d" * 200_000
    row = next(row for row in node.images.rows() if row.block_digest == found.block_digest)
    assert node.mounts.read_ahead_kib(row.layers[0].mount_number) == 32
    assert node.devices.status()["starting"] == []
    node.images.start_read_ahead.tell()
    assert node.devices.status()["starting"] == [owner_of(found.block_digest)]


@pytest.mark.parametrize("first", ["forged", "honest"])
def test_a_forged_pack_changes_no_other_image(node: LazyNode, first: str) -> None:
    """Whatever the repository of the one image may do, the other has the layer that its own lists."""
    sources = {"forged": node.push([BASE, layer_of(1)]), "honest": node.push([BASE, layer_of(2)])}
    ref = f"docker://{sources['forged'].name.replace(node.proxy.host, node.registry.host)}"
    opened = boot_packs.open_image(ref)
    whole = [(number, 0, layer.block_map.image_bytes) for number, layer in enumerate(opened.layers)]
    pack.pack(opened, [boot_packs.trace_of(opened, *whole)], boot_packs.PARAMETERS)
    table_digest = boot_packs.forge(ref, boot_packs.replace_text(b"d" * 4096, b"e" * 4096))
    rows, paths = {}, {}
    for name in ["forged", "honest"] if first == "forged" else ["honest", "forged"]:
        rows[name] = node.images.pull(sources[name].name)
        paths[name] = node.images.directory(rows[name].block_digest, 0)
    bottom = {name: row.layers[0] for name, row in rows.items()}
    assert bottom["forged"].map_digest == bottom["honest"].map_digest
    assert rows["forged"].boot_pack is not None
    assert rows["forged"].boot_pack.table_digest == table_digest
    assert b"e" * 4096 in (paths["forged"] / "data").read_bytes(), "else this would test nothing"
    assert (paths["honest"] / "data").read_bytes() == b"d" * 200_000
    node.clock.now += 1000
    node.images.released(rows["forged"].block_digest)
    assert node.mounted() == [paths["honest"]]
    assert (paths["honest"] / "data").read_bytes() == b"d" * 200_000
    node.reboot()
    path = node.images.directory(rows["honest"].block_digest, 0)
    assert (path / "data").read_bytes() == b"d" * 200_000


def test_images_with_one_pack_share_a_layer(node: LazyNode) -> None:
    """As two tags of an image do."""
    first = node.push([BASE])
    ref = f"docker://{first.name.replace(node.proxy.host, node.registry.host)}"
    opened = boot_packs.open_image(ref)
    pack.pack(opened, [boot_packs.trace_of(opened, (0, 0, 8192))], boot_packs.PARAMETERS)
    row = node.images.pull(first.name)
    twin = node.store.put_image(dataclasses.replace(row, block_digest="sha256:" + "9" * 64))
    assert twin.layers == row.layers
    assert [twin.device(layer) for layer in twin.layers] == [row.device(layer) for layer in row.layers]


def test_what_an_earlier_server_attached_without_its_pack_is_attached_anew(node: LazyNode) -> None:
    """A server of before the devices had packs, whose successor took over its devices."""
    source = node.push([BASE])
    ref = f"docker://{source.name.replace(node.proxy.host, node.registry.host)}"
    opened = boot_packs.open_image(ref)
    pack.pack(opened, [boot_packs.trace_of(opened, (0, 0, 8192))], boot_packs.PARAMETERS)
    row = node.images.pull(source.name)
    owner = owner_of(row.block_digest)
    node.devices.detach(owner)
    node.devices.attach(owner, assembly.layer_specs(opened), node.origins)
    assert node.images.reconcile(attached(node.devices)) == []
    path = node.images.directory(row.block_digest, 0)
    assert (path / "etc/motd").read_text() == "base\n"


def test_usage_is_what_the_cache_holds(node: LazyNode) -> None:
    source = node.push([images.tar_of([("zeros", bytes(500_000)), ("noise", os.urandom(500_000))])])
    row = node.images.pull(source.name)
    first = node.images.usage(row.block_digest, 0)
    assert first.inodes == 3
    (node.images.directory(row.block_digest, 0) / "noise").read_bytes()
    node.clock.now += 10
    later = node.images.usage(row.block_digest, 0)
    assert first.size_bytes < later.size_bytes < 1_000_000
    assert later.size_bytes >= 500_000


def test_a_layer_without_an_entry_for_its_root_says_nothing_of_it(node: LazyNode) -> None:
    source = node.push([BASE, images.tar_of([("more", b"m")], root=False)])
    row = node.images.pull(source.name)
    assert node.images.root_attributes(row.block_digest, 1) is None
    node.reboot()
    assert node.images.root_attributes(row.block_digest, 1) is None
    assert node.images.root_attributes(row.block_digest, 0) is not None


def test_pull_says_what_led_to_the_image(node: LazyNode) -> None:
    source = node.push([BASE])
    row, opened = node.images.pull_opened(f"docker://{source.name}")
    assert [manifest.digest for manifest in opened.sources] == [source.digest]
    assert row.source_digest == source.digest
    for pulls in (1, 2):
        # What `glowplug pull` has containerd ask is part of the pull that was told; the next pull is another.
        assert node.images.find_layer(source.chain_ids[0], source.labels) is not None
        assert node.kinds().count("lazy_pull") == pulls
    with pytest.raises(errors.NotFoundError):
        node.images.pull(node.push([BASE], converted=False).name)


def test_a_mount_that_somebody_took_away_is_made_again(node: LazyNode) -> None:
    """Or a container would get an empty directory for a layer, and nobody would say so."""
    row = node.images.pull(node.push([BASE]).name)
    path = node.images.directory(row.block_digest, 0)
    subprocess.run(["umount", path], check=True)
    assert os.listdir(path) == []
    assert node.images.directory(row.block_digest, 0) == path
    assert (path / "etc/motd").read_text() == "base\n"
    assert len(node.mounted()) == 1


def test_a_layer_that_the_image_does_not_have_is_an_error_of_that_snapshot(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    for layer in (1, -1):
        for ask in (node.images.directory, node.images.usage, node.images.root_attributes):
            with pytest.raises(errors.IntegrityError, match="the database names layer"):
                ask(row.block_digest, layer)


def test_a_device_that_cannot_be_read_is_unavailable(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    node.images._device_directory = node.settings.root / "nowhere"
    node.images._roots.clear()
    with pytest.raises(errors.UnavailableError):
        node.images.usage(row.block_digest, 0)
    with pytest.raises(errors.UnavailableError):
        node.images.root_attributes(row.block_digest, 0)


def test_who_deletes_a_pod_does_not_wait_for_who_attaches_its_image(node: LazyNode) -> None:
    row = node.images.pull(node.push([BASE]).name)
    node.clock.now += 1000
    with node.images._attaching_lock(row.block_digest):
        node.images.released(row.block_digest)
        node.images.sweep()
        assert not node.images.detach_orphan(owner_of(row.block_digest))
        assert node.images.rows() == [row]
    node.images.sweep()
    assert node.images.rows() == []
    assert not node.owners()


def test_a_layer_of_an_image_that_goes_stays_for_one_that_comes(node: LazyNode) -> None:
    """The second is not in the table yet while the first leaves it."""
    one, other = node.push([BASE, layer_of(1)]), node.push([BASE, layer_of(2)])
    first = node.images.pull(one.name)
    path = node.images.directory(first.block_digest, 0)
    put = node.store.put_image

    def release_the_other(row: ImageRow) -> ImageRow:
        stored = put(row)
        node.clock.now += 1000
        node.images.released(first.block_digest)
        assert not node.store.image(first.block_digest)
        return stored

    node.store.put_image = release_the_other  # type: ignore[method-assign]
    second = node.images.pull(other.name)
    assert second.layers[0].mount_number == first.layers[0].mount_number
    assert node.mounted() == [path], "it was not taken away under the second image"
    maps = {layer.map_digest.partition(":")[2] for layer in second.layers}
    assert set(os.listdir(node.settings.root / "maps")) == maps
    node.images.released(second.block_digest)
    node.clock.now += 1000
    node.images.sweep()
    assert not node.mounted()
    assert os.listdir(node.settings.root / "maps") == []


def test_lookups_that_hang_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An origin may drip bytes for longer than anybody waits: each retry would leave another thread."""
    monkeypatch.setattr(flights, "_MAX_LOOKUPS", 3)
    gate = threading.Event()
    asked = flights.Flights(
        0.01, 0.0, lambda flight: gate.wait() and None, lambda flight: None, time.monotonic
    )
    wanted = [lookup.from_text(f"r.example/image-{number}") for number in range(4)]
    for each in wanted[:3]:
        with pytest.raises(errors.UnavailableError, match="no answer within"):
            asked.join(each)
    with pytest.raises(errors.UnavailableError, match="wait for origins already"):
        asked.join(wanted[3])
    gate.set()
    scripted.eventually(lambda: asked._running == 0)
    assert asked.join(wanted[3]).error is None
