"""The device table: ids that never change their meaning, owners that count once, and what a restart finds."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from imagefs import errors
from imagefs.fuse import devices
from imagefs.fuse.devices import DeviceTable, LayerSpec, PackSpec


def spec(number: int, ref: str = "oci:/a") -> LayerSpec:
    return LayerSpec(ref, f"sha256:{number:064x}", 100, f"sha256:{number + 1000:064x}", 200)


def pack(number: int) -> PackSpec:
    return PackSpec("oci:/a", f"sha256:{number:064x}", 100, f"sha256:{number + 1000:064x}", 200)


def nodes(table: DeviceTable) -> dict[str, int]:
    return {record.spec.map_digest: record.node for record in table.records()}


def test_a_successor_means_the_same(tmp_path: Path) -> None:
    table = DeviceTable(tmp_path / "t", "mount")
    table.attach([spec(1), spec(2)], {"plain_http": True}, "a")
    table.attach([spec(2, "oci:/b"), spec(3)], {}, "b")
    again = DeviceTable(tmp_path / "t", "mount")
    assert again.records() == table.records()
    (shared,) = [record for record in again.records() if record.spec.map_digest == spec(2).map_digest]
    assert {owner: source.origin_ref for owner, source in shared.owners.items()} == {
        "a": "oci:/a",
        "b": "oci:/b",
    }


def test_ids_are_not_reused_while_the_mount_lives(tmp_path: Path) -> None:
    table = DeviceTable(tmp_path / "t", "mount")
    table.attach([spec(1), spec(2)], {}, "a")
    before = nodes(table)
    assert len(set(before.values())) == 2
    assert 1 not in before.values()
    table.detach("a")
    assert table.records() == []
    again = DeviceTable(tmp_path / "t", "mount")
    again.attach([spec(3), spec(2)], {}, "a")
    assert nodes(again)[spec(2).map_digest] == before[spec(2).map_digest]
    assert nodes(again)[spec(3).map_digest] not in before.values()


def test_a_layer_is_a_device_for_each_pack_that_shows_it(tmp_path: Path) -> None:
    table = DeviceTable(tmp_path / "t", "mount")
    first, second = pack(7), pack(8)
    table.attach([spec(1)], {}, "blocks")
    table.attach([spec(1)], {}, "first", first)
    table.attach([spec(1)], {}, "again", first)
    table.attach([spec(1)], {}, "second", second)
    again = DeviceTable(tmp_path / "t", "mount")
    assert again.records() == table.records()
    assert again.packs() == table.packs()
    assert [sorted(record.owners) for record in again.records()] == [
        ["blocks"],
        ["again", "first"],
        ["second"],
    ]
    digest = spec(1).map_digest
    names = [devices.device_name(digest, each) for each in (None, first.table_digest, second.table_digest)]
    assert [record.name for record in again.records()] == names
    assert len({record.node for record in again.records()}) == 3
    before = {record.name: record.node for record in again.records()}
    for owner in ("first", "again"):
        again.detach(owner)
    assert [record.name for record in again.records()] == [names[0], names[2]]
    (record,) = again.attach([spec(1)], {}, "third", first)
    assert record.node == before[record.name]


def test_a_table_of_before_there_were_packs_means_the_same(tmp_path: Path) -> None:
    """As a server finds that takes over from an earlier version's."""
    table = DeviceTable(tmp_path / "t", "mount")
    table.attach([spec(1), spec(2)], {}, "a")
    document = json.loads((tmp_path / "t").read_bytes())
    document["nodes"] = {name.replace("-", ":"): node for name, node in document["nodes"].items()}
    for row in document["devices"]:
        del row["table_digest"]
    (tmp_path / "t").write_text(json.dumps(document))
    again = DeviceTable(tmp_path / "t", "mount")
    assert again.records() == table.records()
    assert [record.node for record in again.attach([spec(2)], {}, "b")] == [nodes(table)[spec(2).map_digest]]
    assert again.attach([spec(2)], {}, "c", pack(7))[0].node not in nodes(table).values()


def test_another_mount_begins_anew(tmp_path: Path) -> None:
    DeviceTable(tmp_path / "t", "mount").attach([spec(1)], {}, "a")
    assert DeviceTable(tmp_path / "t", "another").records() == []


def test_owners(tmp_path: Path) -> None:
    table = DeviceTable(tmp_path / "t", "mount")
    assert len(table.attach([spec(1), spec(1)], {}, "a")) == 1
    assert table.attach([spec(1)], {}, "a") == []
    assert len(table.attach([spec(1)], {}, "b")) == 1
    assert [bool(record.owners) for record in table.detach("a")] == [True]
    assert table.detach("a") == []
    assert [bool(record.owners) for record in table.detach("b")] == [False]
    for bad in ("", "x" * 300):
        with pytest.raises(errors.InvalidInputError):
            table.attach([spec(1)], {}, bad)


def test_holds(tmp_path: Path) -> None:
    table = DeviceTable(tmp_path / "t", "mount")
    table.hold("a")
    table.hold("a")
    table.attach([spec(1)], {}, "a")
    assert DeviceTable(tmp_path / "t", "mount").holds() == {"a"}
    assert [bool(record.owners) for record in table.detach("a")] == [False]
    assert DeviceTable(tmp_path / "t", "mount").holds() == set()
    with pytest.raises(errors.InvalidInputError):
        table.hold("")


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"version": 1, "token": "mount", "nodes": {}, "devices": [{}]}']
)
def test_a_damaged_table_is_said(tmp_path: Path, damage: str) -> None:
    (tmp_path / "t").write_text(damage)
    with pytest.raises(errors.InvalidInputError, match="not a device table"):
        DeviceTable(tmp_path / "t", "mount")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("map_digest", "sha256:12"),
        ("map_digest", None),
        ("blob_digest", "../../etc/passwd"),
        ("map_size", 0),
        ("map_size", True),
        ("blob_size", "1"),
        ("origin_ref", 1),
    ],
)
def test_a_spec_of_strangers_is_checked(field: str, value: object) -> None:
    good = devices.encode_spec(spec(1))
    assert devices.decode_spec(json.loads(json.dumps(good))) == spec(1)
    with pytest.raises(errors.InvalidInputError, match=field):
        devices.decode_spec({**good, field: value})


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such"):
        devices.write_atomically(tmp_path / "missing" / "file", b"")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match=r"."):
        devices.write_atomically(tmp_path / "directory", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_a_full_disk_attaches_nothing_and_detaches_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    table = DeviceTable(tmp_path / "t", "mount")
    table.attach([spec(1)], {}, "a")
    with monkeypatch.context() as patch:
        patch.setattr(devices, "write_atomically", full)
        with pytest.raises(errors.ConfigurationError, match="No space left"):
            table.attach([spec(2)], {}, "b")
        assert [record.spec for record in table.records()] == [spec(1)]
        assert [record.spec for record in table.detach("a")] == [spec(1)]
        assert table.records() == []
    # The id that was not given out is given out now, and the row that failed counts as new.
    assert [record.node for record in table.attach([spec(2)], {}, "b")] == [3]
    assert nodes(DeviceTable(tmp_path / "t", "mount")) == nodes(table)
