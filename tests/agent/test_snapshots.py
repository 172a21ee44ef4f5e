"""containerd's filter language, labels and field masks, id maps, and the mounts that chains give."""

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from agent import snapshots
from agent.snapshots import Info, Kind
from imagefs import errors

INFOS = [
    Info("a-np", "", Kind.ACTIVE, {"root": "check"}, 1, 1),
    Info("p", "", Kind.COMMITTED, {"root": "check"}, 1, 1),
    Info("a", "p", Kind.ACTIVE, {"root": "check"}, 1, 1),
    Info("v", "p", Kind.VIEW, {"root": "check"}, 1, 1),
    Info("p-wl", "", Kind.COMMITTED, {"root": "check", "l": "1"}, 1, 1),
    Info("a-wl", "p-wl", Kind.ACTIVE, {"root": "check", "l": "2", "x.y/z": "sha256:ab"}, 1, 1),
    Info("v-wl", "p-wl", Kind.VIEW, {"l": "3"}, 1, 1),
]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ([], ["a-np", "p", "a", "v", "p-wl", "a-wl", "v-wl"]),
        ([""], ["a-np", "p", "a", "v", "p-wl", "a-wl", "v-wl"]),
        (["kind==active,labels.root==check"], ["a-np", "a", "a-wl"]),
        (["kind == view"], ["v", "v-wl"]),
        (["kind==committed"], ["p", "p-wl"]),
        (["name==p", "name==a"], ["p", "a"]),
        (["name==a-wl,labels.l"], ["a-wl"]),
        (["parent==p"], ["a", "v"]),
        (['parent!="",labels.l'], ["a-wl", "v-wl"]),
        (["labels.l"], ["p-wl", "a-wl", "v-wl"]),
        (["labels.l!=2,labels.l"], ["p-wl", "v-wl"]),
        (["labels.l!=2,kind==active"], ["a-np", "a"]),
        (['labels."x.y/z"==sha256:ab,parent=="p-wl"'], ["a-wl"]),
        (['labels."x.y/z"=="sha256:\\x61b"'], ["a-wl"]),
        (["name~=^a"], ["a-np", "a", "a-wl"]),
        (["name~=/^[av]-.l$/"], ["a-wl", "v-wl"]),
        (["labels.l~=|[12]|"], ["p-wl", "a-wl"]),
        (["other==1"], []),
        (["labels==1"], []),
        (["name.more==p"], []),
    ],
)
def test_filters(filters: list[str], names: list[str]) -> None:
    matches = snapshots.parse_filters(filters)
    assert [info.name for info in INFOS if matches(info)] == names


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "name==",
        "name=p",
        "name===p",
        "name==p name==q",
        "==p",
        'name=="p',
        'name=="\\',
        'name=="\\q"',
        'name=="\\777"',
        'name=="\\UFFFFFFFF"',
        'name=="a\nb"',
        "name~=(",
        "labels.",
        "name==p,",
    ],
)
def test_filters_that_are_none(text: str) -> None:
    with pytest.raises(errors.InvalidInputError, match="filter"):
        snapshots.parse_filters([text])


@hypothesis.given(strategies.text())
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        matches = snapshots.parse_filters([text])
    except errors.InvalidInputError:
        return
    for info in INFOS:
        assert matches(info) in (True, False)


def go_quoted(text: str) -> str:
    """As Go's %q writes it."""
    special = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r", "\x7f": "\\x7f"}
    return (
        '"'
        + "".join(
            special.get(c)
            or (c if c.isprintable() else (f"\\x{ord(c):02x}" if ord(c) < 128 else f"\\U{ord(c):08x}"))
            for c in text
        )
        + '"'
    )


@hypothesis.given(
    strategies.text(strategies.characters(exclude_categories=["Cs"]), min_size=1),
    strategies.text(strategies.characters(exclude_categories=["Cs"])),
)
def test_what_containerd_asks_after_a_lazy_prepare(key: str, parent: str) -> None:
    """Its filter: the label, quoted, equal to the chain id, and the parent, quoted."""
    info = Info("x", parent, Kind.COMMITTED, {key: "sha256:ab"}, 1, 1)
    matches = snapshots.parse_filters([f"labels.{go_quoted(key)}==sha256:ab,parent=={go_quoted(parent)}"])
    assert matches(info)
    assert not matches(Info("x", parent + "!", Kind.COMMITTED, {key: "sha256:ab"}, 1, 1))


def test_field_masks() -> None:
    old = {"l1": "v1", "l2": "v2", "l3": "v3"}
    new = {"l1": "updated", "l4": "v4"}
    assert snapshots.updated_labels(old, new, ["labels.l1", "labels.l2"]) == {"l1": "updated", "l3": "v3"}
    assert snapshots.updated_labels(old, new, ["labels"]) == new
    assert snapshots.updated_labels(old, {"a": "", "b": "1"}, []) == {"b": "1"}
    for path in ("parent", "name", "kind", "created_at", "labelsx"):
        with pytest.raises(errors.InvalidInputError, match=path):
            snapshots.updated_labels(old, new, [path])


def test_label_too_long() -> None:
    assert snapshots.checked_labels({"k": "v" * 4095})
    with pytest.raises(errors.InvalidInputError, match="4096"):
        snapshots.checked_labels({"k": "v" * 4096})


def test_id_mappings() -> None:
    assert snapshots.id_mapping({"other": "1"}) is None
    labels = {snapshots.UID_MAPPING_LABEL: "0:1000:10", snapshots.GID_MAPPING_LABEL: "0:2000:1,1:5000:9"}
    mapping = snapshots.id_mapping(labels)
    assert mapping is not None
    assert mapping.host_ids(0, 0) == (1000, 2000)
    assert mapping.host_ids(9, 9) == (1009, 5008)
    assert mapping.host_ids(10, 10) == (1000, 2000), "what the namespace lacks is its root's"


@pytest.mark.parametrize(
    "value", ["", "0:1", "a:b:c", "0:1:0", "1:1:1", "0:-1:5", "0:1:2:3", "0:1:99999999999"]
)
def test_id_mappings_that_are_none(value: str) -> None:
    labels = {snapshots.UID_MAPPING_LABEL: "0:1:1", snapshots.GID_MAPPING_LABEL: value}
    with pytest.raises(errors.InvalidInputError, match="gidmapping"):
        snapshots.id_mapping(labels)


OWN, A, B = Path("/r/snapshots/9"), Path("/r/snapshots/1/fs"), Path("/r/layers/2")


@pytest.mark.parametrize(
    ("kind", "lower", "lazy", "expected"),
    [
        (Kind.ACTIVE, [], False, ("bind", "/r/snapshots/9/fs", "rw,rbind")),
        (Kind.VIEW, [], False, ("bind", "/r/snapshots/9/fs", "ro,rbind")),
        (Kind.VIEW, [A], False, ("bind", "/r/snapshots/1/fs", "ro,rbind")),
        (
            Kind.ACTIVE,
            [A],
            False,
            (
                "overlay",
                "overlay",
                "workdir=/r/snapshots/9/work,upperdir=/r/snapshots/9/fs,lowerdir=/r/snapshots/1/fs,index=off",
            ),
        ),
        (Kind.VIEW, [A, A], False, ("overlay", "overlay", f"lowerdir={A}:{A},index=off")),
        (Kind.VIEW, [B], True, ("overlay", "overlay", f"lowerdir={OWN}/fs:{B},index=off")),
        (Kind.VIEW, [A, B], True, ("overlay", "overlay", f"lowerdir={OWN}/fs:{A}:{B},index=off")),
    ],
)
def test_mounts(kind: Kind, lower: list[Path], lazy: bool, expected: tuple[str, str, str]) -> None:
    made = snapshots.chain_mount(kind, OWN, lower, lazy, {})
    assert (made.type, made.source, ",".join(made.options)) == expected


def test_mounts_in_a_user_namespace() -> None:
    labels = {snapshots.UID_MAPPING_LABEL: "0:1000:10", snapshots.GID_MAPPING_LABEL: "0:2000:10"}
    for lower in ([], [A], [B, A]):
        made = snapshots.chain_mount(Kind.ACTIVE, OWN, lower, bool(lower), labels)
        assert made.options[:2] == ("uidmap=0:1000:10", "gidmap=0:2000:10")
