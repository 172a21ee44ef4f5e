"""The tar reader against independent writers (Python's tarfile, GNU tar) and against damaged input."""

from __future__ import annotations

import io
import os
import pathlib
import subprocess
import tarfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from converter import errors, limits, tarheader, tarstream
from converter.tarentry import Entry, Kind
from tests.fixtures import tars
from tests.fixtures.tars import Attributes, Builder, header, padded

LIMITS = limits.Limits()


class Pieces:
    """A source that gives at most `most` bytes at a time."""

    def __init__(self, data: bytes, most: int = 1 << 30) -> None:
        self._file = io.BytesIO(data)
        self._most = most

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer[: self._most])

    @property
    def ended(self) -> bool:
        return not self._file.read(1)


def content(reader: tarstream.TarReader, chunk: int = 1 << 16) -> bytes:
    out = bytearray()
    view = memoryview(bytearray(chunk))
    while count := reader.readinto(view):
        out += view[:count]
    return bytes(out)


def read(data: bytes, most: int = 1 << 30, bounds: limits.Limits = LIMITS) -> list[tuple[Entry, bytes]]:
    reader = tarstream.TarReader(Pieces(data, most), bounds)
    return [(entry, content(reader)) for entry in reader]


def only(data: bytes | Builder, bounds: limits.Limits = LIMITS) -> Entry:
    [(entry, _)] = read(bytes(data), bounds=bounds)
    return entry


# -- against tarfile -------------------------------------------------------------------------------

_name_part = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40).filter(
    lambda part: part not in (".", "..")
)
_names = st.lists(_name_part, min_size=1, max_size=6).map("/".join)
_types = st.sampled_from(
    (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
)


@st.composite
def _members(draw: st.DrawFn, fmt: int) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(draw(_names))
    info.type = draw(_types)
    info.mode = draw(st.integers(0, 0o7777))
    big = 2**32 - 1 if fmt != tarfile.USTAR_FORMAT else 0o7777777
    info.uid, info.gid = draw(st.integers(0, big)), draw(st.integers(0, big))
    info.mtime = draw(st.integers(-(2**40) if fmt != tarfile.USTAR_FORMAT else 0, 0o77777777777))
    data = b""
    if info.type == tarfile.REGTYPE:
        data = draw(st.binary(max_size=2000))
        info.size = len(data)
    elif info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = draw(_names)
    return info, data


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(data=st.data(), most=st.sampled_from((1, 100, 511, 4096, 1 << 30)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reads_what_tarfile_writes(fmt: int, data: st.DataObject, most: int) -> None:
    wanted = []
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt, encoding="utf-8") as tar:
        for info, body in data.draw(st.lists(_members(fmt), max_size=4)):
            try:
                tar.addfile(info, io.BytesIO(body))
            except ValueError:  # ustar cannot hold every long name
                continue
            wanted.append((info, body))
    found = read(file.getvalue(), most)
    assert len(found) == len(wanted)
    kinds = {
        tarfile.REGTYPE: Kind.FILE,
        tarfile.DIRTYPE: Kind.DIRECTORY,
        tarfile.SYMTYPE: Kind.SYMLINK,
        tarfile.LNKTYPE: Kind.HARD_LINK,
        tarfile.FIFOTYPE: Kind.FIFO,
    }
    for (info, body), (entry, found_body) in zip(wanted, found, strict=True):
        assert entry.name.rstrip(b"/") == info.name.encode().rstrip(b"/")
        assert entry.kind is kinds[info.type]
        assert (entry.mode, entry.uid, entry.gid) == (info.mode, info.uid, info.gid)
        assert entry.mtime_ns == info.mtime * 10**9
        assert (entry.size, found_body) == (len(body), body)
        assert entry.linkname == info.linkname.encode()


# -- single encodings ------------------------------------------------------------------------------


def test_more_owners_than_are_remembered() -> None:
    builder = Builder()
    wanted = [(number % 8, number, number // 3) for number in range(2500)]
    for mode, uid, gid in wanted + wanted:
        builder.raw(header(b"f", mode=mode, uid=uid, gid=gid))
    assert [(entry.mode, entry.uid, entry.gid) for entry, _ in read(bytes(builder))] == wanted + wanted


def test_base_256_numbers() -> None:
    entry = only(Builder().file(b"f", b"", Attributes(uid=2**32 - 1, gid=2**31, mtime=-5)))
    assert (entry.uid, entry.gid, entry.mtime_ns) == (2**32 - 1, 2**31, -5_000_000_000)


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0", 0),
        ("1.5", 1_500_000_000),
        ("-1.25", -1_250_000_000),
        ("-0.000000001", -1),
        ("1.0000000019", 1_000_000_001),
        ("1.", 1_000_000_000),
        ("17000000000.123456789", 17_000_000_000_123_456_789),
    ],
)
def test_pax_times(text: str, ns: int) -> None:
    assert only(Builder().file(b"f", b"", Attributes(mtime=text))).mtime_ns == ns


@pytest.mark.parametrize("text", [b"x", b"--1", b"1.x", b"1e5", b"1_0", b"+1", b"9" * 30])
def test_bad_pax_times(text: bytes) -> None:
    with pytest.raises(errors.InvalidLayerError, match="mtime"):
        only(Builder().pax([(b"mtime", text)]).file(b"f"))


def test_names_are_bytes() -> None:
    entry = only(Builder().pax([(b"hdrcharset", b"BINARY"), (b"path", b"caf\xe9")]).file(b"x"))
    assert entry.name == b"caf\xe9"


def test_ustar_prefix_and_star_prefix() -> None:
    assert only(bytes(Builder().raw(header(b"name", prefix=b"a/b")))).name == b"a/b/name"
    star = header(b"name", prefix=b"a/b".ljust(131, b"\0") + b"00000000000\0" * 2, patch={508: b"tar\0"})
    assert only(bytes(Builder().raw(star))).name == b"a/b/name"
    # GNU's format keeps times where ustar has the prefix.
    gnu = header(b"name", magic=b"ustar  \0", prefix=b"00000000000\0" * 2)
    assert only(bytes(Builder().raw(gnu))).name == b"name"


def test_gnu_long_names_win() -> None:
    builder = (
        Builder().gnu_long(b"n" * 300).gnu_long(b"l" * 300, b"K").raw(header(b"short", b"2", linkname=b"s"))
    )
    entry = only(builder)
    assert (entry.name, entry.linkname) == (b"n" * 300, b"l" * 300)


def test_global_pax_header_applies_until_it_is_overridden() -> None:
    builder = (
        Builder().pax([(b"uid", b"7"), (b"comment", b"c")], b"g").file(b"a").pax([(b"uid", b"8")]).file(b"b")
    )
    builder.file(b"c").pax([(b"uid", b"")]).file(b"d", b"", Attributes(uid=3))
    assert [entry.uid for entry, _ in read(bytes(builder))] == [7, 8, 7, 3]


def test_xattrs() -> None:
    builder = Builder().pax(
        [
            (b"SCHILY.xattr.user.a", b"\0=\n\xff"),
            (b"SCHILY.xattr.user.empty", b""),
            (b"LIBARCHIVE.xattr.user.a", b"b3RoZXI"),
            (b"LIBARCHIVE.xattr.user.p%25%C3%A9", b"AAE"),
        ]
    )
    entry = only(builder.file(b"f"))
    assert entry.xattrs == {b"user.a": b"\0=\n\xff", b"user.empty": b"", "user.p%é".encode(): b"\0\1"}
    with pytest.raises(errors.InvalidLayerError, match="base64"):
        only(Builder().pax([(b"LIBARCHIVE.xattr.user.a", b"!!")]).file(b"f"))
    with pytest.raises(errors.InvalidLayerError, match="65536 bytes"):
        only(Builder().pax([(b"SCHILY.xattr.user.a", bytes(65536))]).file(b"f"))


def test_devices() -> None:
    assert only(Builder().device(b"d", b"4", 259, 70_000))[8:10] == (259, 70_000)
    builder = (
        Builder().pax([(b"SCHILY.devmajor", b"8"), (b"SCHILY.devminor", b"17")]).device(b"d", b"4", 1, 1)
    )
    assert only(builder)[8:10] == (8, 17)
    with pytest.raises(errors.InvalidLayerError, match="device number"):
        only(Builder().device(b"d", b"3", 4096, 0))


def test_pax_size_and_data_of_types_without_any() -> None:
    body = b"x" * 600
    builder = Builder().pax([(b"size", b"600")]).raw(header(b"f", size=3) + padded(body))
    # Only regular files have data, whatever the size field of others says.
    builder.raw(header(b"link", b"1", linkname=b"f", size=600)).raw(header(b"dir", b"5", size=600)).file(
        b"end"
    )
    found = read(bytes(builder))
    assert [(entry.name, len(data)) for entry, data in found] == [
        (b"f", 600),
        (b"link", 0),
        (b"dir", 0),
        (b"end", 0),
    ]


def test_old_tars() -> None:
    builder = (
        Builder().raw(header(b"dir/", b"\0", magic=bytes(8))).raw(header(b"file", b"\0", magic=bytes(8)))
    )
    signed = bytearray(header(b"caf\xe9", magic=bytes(8)))
    signed[148:156] = b"%06o\0 " % (sum(signed[:148]) + 8 * 32 + sum(signed[156:]) - 256)
    found = read(bytes(builder.raw(bytes(signed)).raw(header(b"label", b"V"))))
    assert [entry.kind for entry, _ in found] == [Kind.DIRECTORY, Kind.FILE, Kind.FILE]


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end", [b"", bytes(512), bytes(1024), bytes(1024) + b"garbage" * 100_000, bytes(10_240)]
)
def test_every_end_is_read_to_the_last_byte(end: bytes) -> None:
    source = Pieces(Builder().file(b"f", b"data").unfinished() + end)
    assert [entry.name for entry in tarstream.TarReader(source, LIMITS)] == [b"f"]
    assert source.ended


def test_missing_padding_of_the_last_file() -> None:
    assert read(header(b"f", size=3) + b"abc")[0][1] == b"abc"


def test_empty() -> None:
    assert read(b"") == []


def test_data_after_a_single_zero_block() -> None:
    with pytest.raises(
        errors.InvalidLayerError, match="byte 1024 of the tar: more data after a single zero block"
    ):
        read(Builder().file(b"a").unfinished() + bytes(512) + bytes(Builder().file(b"b")))


# -- sparse files ----------------------------------------------------------------------------------

SEGMENTS = tars.many_segments(60)
SPARSE_SIZE = 600_000


@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("segments", [SEGMENTS, SEGMENTS[:1], [], [(0, b"start"), (SPARSE_SIZE - 3, b"end")]])
def test_sparse_formats(version: str, segments: list[tuple[int, bytes]]) -> None:
    builder = Builder()
    if version == "old":
        builder.old_sparse(b"dir/s", SPARSE_SIZE, segments)
    else:
        builder.pax_sparse(b"dir/s", SPARSE_SIZE, segments, version)
    builder.file(b"after", b"behind it")
    for most in (1 << 30, 700):
        (entry, data), (_, after) = read(bytes(builder), most)
        assert (entry.name, entry.size) == (b"dir/s", SPARSE_SIZE)
        assert entry.segments == [(offset, len(piece)) for offset, piece in segments]
        assert data == tars.sparse_content(SPARSE_SIZE, segments)
        assert after == b"behind it"


def test_holes_can_be_skipped() -> None:
    reader = tarstream.TarReader(
        Pieces(bytes(Builder().pax_sparse(b"s", 1 << 40, [(1 << 39, b"middle")], "1.0").file(b"next"))),
        LIMITS,
    )
    next(reader)
    view = memoryview(bytearray(100))
    assert reader.hole_ahead() == 1 << 39
    assert reader.readinto(view) == 100
    assert reader.hole_ahead() == (1 << 39) - 100
    reader.skip_hole()
    assert reader.hole_ahead() == 0
    assert reader.readinto(view) == 6
    assert bytes(view[:6]) == b"middle"
    assert reader.hole_ahead() == (1 << 39) - 6
    reader.skip_hole()
    assert reader.readinto(view) == 0
    assert next(reader).name == b"next"


@pytest.mark.parametrize(
    "arguments",
    [["--format=gnu"]] + [["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0")],
)
def test_sparse_files_by_gnu_tar(tmp_path: pathlib.Path, arguments: list[str]) -> None:
    wanted = {}
    for name, pieces in {
        "one": [(1 << 20, b"x" * 5000)],
        "many": [(i << 17, b"y" * 4096) for i in range(40)],
        "hole": [],
    }.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(8 << 20)
            for offset, piece in pieces:
                os.pwrite(file.fileno(), piece, offset)
        wanted[name.encode()] = (tmp_path / name).read_bytes()
    command = ["tar", "-C", str(tmp_path), "-cf", "-", "--sparse", *arguments, *map(os.fsdecode, wanted)]
    data = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    assert len(data) < 1 << 20
    assert {entry.name: body for entry, body in read(data)} == wanted


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        (b"0,10,5,10", "overlaps"),
        (b"0,10,100,10", "leaves the file"),
        (b"0,10,20", "without a length"),
        (b"0,10", "stores 20"),
        (b"0,-1", "not a decimal number"),
    ],
)
def test_bad_sparse_maps(numbers: bytes, problem: str) -> None:
    builder = Builder().pax([(b"GNU.sparse.map", numbers), (b"GNU.sparse.size", b"100")])
    with pytest.raises(errors.InvalidLayerError, match=problem):
        only(builder.file(b"f", bytes(20)))


# -- damage and bombs ------------------------------------------------------------------------------


def test_truncation_names_entry_and_place() -> None:
    data = Builder().file(b"first", b"1").file(b"second", b"2" * 5000).unfinished()
    with pytest.raises(
        errors.InvalidLayerError, match=r"entry 'second' at byte 1024 of the tar: .*after 3000 bytes"
    ):
        read(data[:3000])
    with pytest.raises(errors.InvalidLayerError, match=r"at byte 1024 .*inside a header, after 200 bytes"):
        read(data[:1224])


@pytest.mark.parametrize("cut", range(0, 4096, 256))
def test_unread_data_that_is_missing_is_an_error_too(cut: int) -> None:
    data = Builder().file(b"f", b"2" * 4096).unfinished()
    with pytest.raises(errors.InvalidLayerError, match="after"):
        list(tarstream.TarReader(Pieces(data[: 512 + cut]), LIMITS))


def test_wrong_checksum_names_the_byte() -> None:
    data = bytearray(bytes(Builder().file(b"a").file(b"b")))
    data[512 + 100] ^= 1
    with pytest.raises(
        errors.InvalidLayerError, match="entry 'b' at byte 512 of the tar: wrong header checksum"
    ):
        read(bytes(data))


@pytest.mark.parametrize(
    ("tar", "problem"),
    [
        (Builder().raw(header(b"f", patch={124: b"12x45678901\0"})), "size"),
        (Builder().raw(header(b"f", patch={124: b"\xff" * 12})), "negative size"),
        (Builder().raw(header(b"f", patch={108: b"\xff" * 8})), "owner"),
        (Builder().raw(header(b"f", b"Z")), "unknown entry type"),
        (Builder().raw(header(b"f", b"S", magic=b"ustar  \0", patch={483: b"\xff" * 12})), "negative size"),
        (Builder().raw(header(b"f", b"M")), "unknown entry type"),
        (Builder().raw(header(b"x", b"x", size=10) + padded(b"99 path=ab")), "malformed PAX record"),
        (Builder().raw(header(b"x", b"x", size=4) + padded(b"4 =\n")), "malformed PAX record"),
        (Builder().raw(header(b"x", b"x", size=5) + padded(b"a b=c")), "malformed PAX record"),
        (Builder().pax([(b"size", b"-1")]).file(b"f"), "PAX size"),
        (Builder().pax([(b"path", b"a\0b")]).file(b"f"), "NUL"),
        (Builder().pax([(b"path", b"a")]), "ends after an extension header"),
        (Builder().pax([(b"mtime", b"9" * 20)]).file(b"f"), "out of range"),
        (
            Builder().pax([(b"GNU.sparse.major", b"2"), (b"GNU.sparse.realsize", b"1")]).file(b"f"),
            "sparse format",
        ),
    ],
)
def test_malformed(tar: Builder, problem: str) -> None:
    with pytest.raises(errors.InvalidLayerError, match=problem):
        read(bytes(tar))


@pytest.mark.parametrize(
    ("tar", "bounds", "flag"),
    [
        (Builder().file(b"a").file(b"b"), limits.Limits(max_entries=1), "--max-entries"),
        (Builder().file(b"a" * 50), limits.Limits(max_path_bytes=50), "--max-path-bytes"),
        (Builder().symlink(b"a", b"b" * 200), limits.Limits(max_path_bytes=200), "--max-path-bytes"),
        (
            Builder().gnu_long(b"a" * 5000).file(b"a"),
            limits.Limits(max_header_bytes=4096),
            "--max-header-bytes",
        ),
        (Builder().file(b"a", bytes(5000)), limits.Limits(max_layer_bytes=4096), "--max-layer-bytes"),
        (
            Builder().pax([(b"a", bytes(600))], b"g").pax([(b"b", bytes(600))], b"g").file(b"x"),
            limits.Limits(max_header_bytes=1024),
            "--max-header-bytes",
        ),
        (Builder().raw(header(b"a", size=1 << 50)), LIMITS, "--max-layer-bytes"),
        (Builder().pax_sparse(b"a", 1 << 43, [], "1.0"), LIMITS, "--max-image-bytes"),
        (
            Builder().old_sparse(b"a", 1 << 30, SEGMENTS),
            limits.Limits(max_header_bytes=1024),
            "--max-header-bytes",
        ),
        (
            Builder().pax_sparse(b"a", 1 << 30, SEGMENTS, "1.0"),
            limits.Limits(max_header_bytes=512),
            "--max-header-b",
        ),
        (Builder().raw(bytes(512 * 20)), limits.Limits(max_layer_bytes=4096), "--max-layer-bytes"),
    ],
)
def test_limits_name_their_flag(tar: Builder, bounds: limits.Limits, flag: str) -> None:
    with pytest.raises(errors.LimitError, match=flag):
        read(bytes(tar), bounds=bounds)


def test_an_oversize_header_is_refused_before_it_is_read() -> None:
    huge = Builder().raw(header(b"x", b"x", size=1 << 40)).unfinished()
    with pytest.raises(errors.LimitError, match="1099511627776 bytes of extension header"):
        read(huge)


TORTURE = tars.torture_layers()


def test_global_records_are_few() -> None:
    many = [(b"k%d" % number, b"v") for number in range(tarstream._MAX_GLOBALS)]
    assert len(read(bytes(Builder().pax(many, b"g").file(b"a")))) == 1
    with pytest.raises(errors.InvalidLayerError, match="global PAX records"):
        read(bytes(Builder().pax(many, b"g").pax([(b"another", b"v")], b"g").file(b"a")))


SMALL_BOUNDS = limits.Limits(max_header_bytes=1 << 16, max_layer_bytes=1 << 24, max_image_bytes=1 << 24)


def survives(data: bytes) -> None:
    try:
        for entry, body in read(data, bounds=SMALL_BOUNDS):
            assert entry.size == len(body)
    except (errors.InvalidLayerError, errors.LimitError) as exc:
        where = str(exc)
    else:
        return
    assert "at byte" in where


@given(st.binary(max_size=3000))
@example(b"\0" * 511)
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes(data: bytes) -> None:
    survives(data)


@given(
    layer=st.sampled_from(TORTURE[1:]),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=13)), max_size=6),
    cut=st.integers(0, 1 << 20),
    mend=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_mutated_tars(layer: bytes, changes: list[tuple[int, bytes]], cut: int, mend: bool) -> None:
    data = bytearray(layer)
    for offset, change in changes:
        offset %= len(data)
        data[offset : offset + len(change)] = change
    if mend:
        # With checksums that fit, damage gets past the first line of defence.
        for start in range(0, len(data) - 511, 512):
            if data[start + 257 : start + 262] == b"ustar":
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    survives(bytes(data[: cut % (2 * len(data))]))


@given(st.binary(min_size=512, max_size=512))
def test_fast_sum_is_exact(block: bytes) -> None:
    assert tarheader.byte_sum(memoryview(block)) == sum(block)


@pytest.mark.parametrize("layer", range(3))
def test_torture_reads_the_same_in_any_pieces(layer: int) -> None:
    whole = read(TORTURE[layer])
    assert read(TORTURE[layer], 4099) == whole
