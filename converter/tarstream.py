"""A streaming tar reader: one layer's uncompressed tar in, entries and their data out.

Pure over a `Source` (anything with `readinto`), called by the converter's pipeline and by converter.flatten;
one reader belongs to one thread. Reads ustar, V7, PAX (extended and global headers), GNU long names, GNU
sparse files (old, PAX 0.0, 0.1 and 1.0) and base-256 numbers. Names are bytes throughout.

Invariants:

* Nothing is trusted: header checksums are verified, numbers and sizes checked, limits kept. What is refused
  raises InvalidLayerError or LimitError, with the entry's name and the byte offset in the uncompressed tar.
* Once iteration has ended the source has been read to its end, garbage after the tar's end included, so that
  a digest fed by the source covers every byte.
* Big data goes from the source straight into the caller's buffer; small data is copied once.

Iteration is the converter's inner loop (a layer may have a million entries): hence the tuples, the
pre-compiled header and the private buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn, Protocol

from converter import errors, tarentry, tarheader
from converter.limits import Limits
from converter.tarentry import Entry, Kind

_BUFFER_BYTES = 256 * 1024
_DIRECT_BYTES = 64 * 1024
"""Data of at least this much is read past the private buffer."""
_ZEROS = memoryview(bytes(256 * 1024))
_BLOCK = tarheader.BLOCK_BYTES
_MAX_INT64 = (1 << 63) - 1
_MAX_ID = (1 << 32) - 1
_MAX_MAJOR = (1 << 12) - 1
_MAX_MINOR = (1 << 20) - 1
"""Linux's kernel-internal device numbers are 12 + 20 bits."""


class Source(Protocol):
    """The uncompressed tar."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start with 1 or more bytes; 0 at the end."""


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"D": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}
_WITH_DATA = frozenset((b"0", b"\0", b"7", b"S", b"D"))
"""Other types have no data, whatever their size field says (as in Go's archive/tar)."""
_EXTENSIONS = frozenset((b"x", b"X", b"g", b"L", b"K"))
_SPARSE_KEYS = frozenset((b"GNU.sparse.size", b"GNU.sparse.realsize", b"GNU.sparse.map"))
"""Every PAX sparse file has one of them."""
_NO_RECORDS: dict[bytes, bytes] = {}
_MAX_OWNERS = 1024
_MAX_GLOBALS = 256
"""Global PAX records in force: each is looked at for every entry that follows."""


class TarReader:
    """Iterates over the entries; between two steps the current entry's data can be read.

    Data left unread is skipped by the next step.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._position = 0
        """Byte offset in the tar of buffer[_start]."""
        self._source_bytes = 0
        self._globals: dict[bytes, bytes] = {}
        self._entries = 0
        self._image_bytes = 0
        self._name = b""
        self._header_at = 0
        # The current entry: a hole, then data, then the runs (hole, data) that follow, the next one last.
        self._hole_left = 0
        self._data_left = 0
        self._runs: list[tuple[int, int]] = []
        self._stored_left = 0
        self._padding = 0
        self._ended = False
        # Owners and times repeat from entry to entry.
        self._owners: dict[bytes, tuple[int, int, int]] = {}
        self._mtime_field = b""
        self._mtime_ns = 0

    @property
    def position(self) -> int:
        """Byte offset in the tar of the next byte to be used."""
        return self._position

    # -- entries -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Entry]:
        return self

    def __next__(self) -> Entry:
        if self._ended:
            raise StopIteration
        if self._stored_left or self._padding > self._end - self._start:
            self._skip_data()
        else:
            self._consume(self._padding)
            self._padding = 0
        self._hole_left = self._data_left = 0
        if self._runs:
            self._runs = []
        try:
            entry = self._next_entry()
        except tarheader.BadFieldError as exc:
            self._refuse(str(exc), exc)
        if entry is None:
            self._ended = True
            self._drain()
            raise StopIteration
        self._entries += 1
        if self._entries > self._limits.max_entries:
            self._exceed("entries", self._entries, "max_entries", self._limits.max_entries)
        return entry

    def _next_entry(self) -> Entry | None:
        """Read headers up to and including one that makes an entry; None at the end of the tar."""
        first_at = self._position
        records = _NO_RECORDS
        long_name = long_link = None
        extended = False
        while True:
            self._header_at = self._position
            self._name = long_name or b""
            if self._end - self._start < _BLOCK and not self._fill_block():
                if extended:
                    self._refuse("the tar ends after an extension header, without its entry")
                return None
            start = self._start
            header = self._view[start : start + _BLOCK]
            fields = tarheader.HEADER.unpack_from(header)
            if header[0] == 0 and header == tarheader.ZERO_BLOCK:
                self._consume(_BLOCK)
                if extended:
                    self._refuse("the tar ends after an extension header, without its entry")
                self._end_of_tar()
                return None
            self._name = long_name or fields[0]
            if not tarheader.checksum_ok(header, fields[4]):
                self._refuse("wrong header checksum: the tar is damaged, or this is not a tar")
            self._start = start + _BLOCK
            self._position += _BLOCK
            typeflag = fields[5]
            if typeflag not in _EXTENSIONS:
                if typeflag == b"V":
                    # GNU volume label: names the archive, makes nothing.
                    self._expect_data(tarheader.number(fields[2], "size"))
                    self._skip_data()
                    continue
                return self._entry(fields, header, records, long_name, long_link, first_at)
            extended = True
            body = self._extension_body(typeflag, fields[2])
            if typeflag == b"L":
                long_name = body.partition(b"\0")[0]
            elif typeflag == b"K":
                long_link = body.partition(b"\0")[0]
            elif typeflag == b"g":
                self._add_globals(tarheader.pax_records(body))
            else:
                records = tarheader.pax_records(body)

    def _add_globals(self, records: dict[bytes, bytes]) -> None:
        self._globals.update(records)
        if len(self._globals) > _MAX_GLOBALS:
            self._refuse(f"more than {_MAX_GLOBALS} global PAX records")
        kept = sum(len(key) + len(value) for key, value in self._globals.items())
        if kept > self._limits.max_header_bytes:
            self._exceed(
                "bytes of global PAX records", kept, "max_header_bytes", self._limits.max_header_bytes
            )

    def _entry(
        self,
        fields: tuple[bytes, ...],
        header: memoryview,
        records: dict[bytes, bytes],
        long_name: bytes | None,
        long_link: bytes | None,
        first_at: int,
    ) -> Entry:
        """The entry of a header and the extensions before it, its data ready to be read."""
        name, owner, size_field, mtime, _, typeflag, linkname, magic, major, minor, prefix = fields
        kind = _KINDS.get(typeflag)
        if kind is None:
            self._refuse(f"unknown entry type {typeflag!r}")
        name = name.partition(b"\0")[0]
        if prefix[0] and magic.startswith(tarheader.USTAR_MAGIC):
            name = tarheader.prefix(header, prefix) + b"/" + name
        device = kind is Kind.CHARACTER or kind is Kind.BLOCK
        size = tarheader.number(size_field, "size")
        mode, uid, gid = self._owners.get(owner) or self._read_owner(owner)
        if mtime != self._mtime_field:
            self._mtime_ns = tarheader.number(mtime, "mtime") * 1_000_000_000
            self._mtime_field = mtime
        entry = Entry(
            name,
            kind,
            mode,
            uid,
            gid,
            self._mtime_ns,
            size,
            linkname.partition(b"\0")[0] if linkname[0] else b"",
            tarheader.number(major, "devmajor") if device else 0,
            tarheader.number(minor, "devminor") if device else 0,
            None,
            None,
            first_at,
        )
        # A copy of the header, because reading on may move what lies in the buffer.
        sparse_header = bytes(header) if typeflag == b"S" else None
        if self._globals:
            records = {**self._globals, **records}
        if records:
            entry = entry._replace(**tarentry.overrides(records, device))
        if long_name is not None:
            entry = entry._replace(name=long_name)
        if long_link is not None:
            entry = entry._replace(linkname=long_link)
        if typeflag == b"\0" and entry.name.endswith(b"/"):
            entry = entry._replace(kind=Kind.DIRECTORY)
        self._name = entry.name
        size = entry.size
        if typeflag in _WITH_DATA:
            self._expect_data(size)
        if entry.kind is not Kind.FILE:
            entry = entry._replace(size=0) if size else entry
        elif sparse_header is not None:
            entry = self._old_sparse(entry, sparse_header)
        elif records and not _SPARSE_KEYS.isdisjoint(records):
            entry = self._pax_sparse(entry, records)
        else:
            self._data_left = size
        self._check(entry)
        return entry

    def _read_owner(self, field: bytes) -> tuple[int, int, int]:
        if len(self._owners) == _MAX_OWNERS:
            self._owners.clear()
        found = self._owners[field] = tarheader.owner(field)
        return found

    def _check(self, entry: Entry) -> None:
        name, _, _, uid, gid, mtime_ns, size, linkname, major, minor, _, _, _ = entry
        if not 0 <= uid <= _MAX_ID or not 0 <= gid <= _MAX_ID:
            self._refuse(f"owner {uid}:{gid} is out of range")
        if not -_MAX_INT64 <= mtime_ns // 1_000_000_000 <= _MAX_INT64:
            self._refuse(f"mtime of {mtime_ns} ns is out of range")
        if not 0 <= major <= _MAX_MAJOR or not 0 <= minor <= _MAX_MINOR:
            self._refuse(f"device number {major}:{minor} is out of range")
        longest = max(len(name), len(linkname))
        if longest >= self._limits.max_path_bytes:
            self._exceed("bytes of path", longest, "max_path_bytes", self._limits.max_path_bytes)
        if b"\0" in name or b"\0" in linkname:
            self._refuse("a NUL byte in a path")
        self._image_bytes += size
        if self._image_bytes > self._limits.max_image_bytes:
            self._exceed("bytes of files", self._image_bytes, "max_image_bytes", self._limits.max_image_bytes)

    # -- extension headers and sparse maps ---------------------------------------------------------

    def _extension_body(self, typeflag: bytes, size_field: bytes) -> bytes:
        size = tarheader.number(size_field, "size of an extension header")
        if size < 0:
            self._refuse(f"extension header {typeflag!r} has the negative size {size}")
        if size > self._limits.max_header_bytes:
            self._exceed("bytes of extension header", size, "max_header_bytes", self._limits.max_header_bytes)
        padded = (size + _BLOCK - 1) // _BLOCK * _BLOCK
        return self._take(padded)[:size]

    def _old_sparse(self, entry: Entry, header: bytes) -> Entry:
        numbers, apparent_bytes, extended = tarheader.gnu_sparse_header(header)
        map_bytes = 0
        while extended:
            map_bytes = self._count_map_bytes(map_bytes)
            more, extended = tarheader.gnu_sparse_extension(self._take(_BLOCK))
            numbers += more
        return entry._replace(size=apparent_bytes, segments=self._expect_sparse(numbers, apparent_bytes))

    def _pax_sparse(self, entry: Entry, records: dict[bytes, bytes]) -> Entry:
        version = records.get(b"GNU.sparse.major", b"0"), records.get(b"GNU.sparse.minor", b"0")
        self._name = records.get(b"GNU.sparse.name") or entry.name
        size_text = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size") or b""
        apparent_bytes = tarheader.decimal(size_text, "sparse size")
        if version == (b"1", b"0"):
            numbers = self._sparse_map_in_data()
        elif version[0] == b"0":
            numbers = tarheader.pax_sparse_map(records.get(b"GNU.sparse.map", b""))
        else:
            self._refuse(f"unknown sparse format {version[0]!r}.{version[1]!r}")
        segments = self._expect_sparse(numbers, apparent_bytes)
        return entry._replace(name=self._name, size=apparent_bytes, segments=segments)

    def _sparse_map_in_data(self) -> list[int]:
        """GNU sparse format 1.0: the data begins with lines: a count, then offsets and lengths."""
        text = b""
        map_bytes = 0
        lines: list[bytes] = []
        while not lines or len(lines) <= 2 * tarheader.decimal(lines[0], "sparse map count"):
            if self._stored_left < _BLOCK:
                self._refuse("the sparse map is longer than the entry's data")
            map_bytes = self._count_map_bytes(map_bytes)
            *more, text = (text + self._take(_BLOCK)).split(b"\n")
            self._stored_left -= _BLOCK
            lines += more
        count = int(lines[0])
        return [tarheader.decimal(line, "sparse map number") for line in lines[1 : 1 + 2 * count]]

    def _count_map_bytes(self, map_bytes: int) -> int:
        map_bytes += _BLOCK
        if map_bytes > self._limits.max_header_bytes:
            self._exceed("bytes of sparse map", map_bytes, "max_header_bytes", self._limits.max_header_bytes)
        return map_bytes

    def _expect_sparse(self, numbers: list[int], apparent_bytes: int) -> tarheader.Segments:
        segments = tarheader.segments(numbers, apparent_bytes, self._stored_left)
        runs = []
        at = 0
        for offset, length in segments:
            runs.append((offset - at, length))
            at = offset + length
        runs.append((apparent_bytes - at, 0))
        runs.reverse()
        self._runs = runs
        self._data_left = 0
        return segments

    # -- the current entry's data ------------------------------------------------------------------

    def _expect_data(self, stored_bytes: int) -> None:
        if not 0 <= stored_bytes <= self._limits.max_layer_bytes:
            if stored_bytes < 0:
                self._refuse(f"negative size {stored_bytes}")
            self._exceed("bytes", stored_bytes, "max_layer_bytes", self._limits.max_layer_bytes)
        self._stored_left = stored_bytes
        self._padding = -stored_bytes % _BLOCK

    def readinto(self, view: memoryview) -> int:
        """Fill `view` from its start with the current entry's data, holes as zeros; 0 at its end.

        Short only where data meets a hole, and at the end.
        """
        if not self._hole_left and not self._data_left and not self._next_run():
            return 0
        if self._hole_left:
            count = min(len(view), self._hole_left, len(_ZEROS))
            view[:count] = _ZEROS[:count]
            self._hole_left -= count
            return count
        if self._data_left < len(view):
            view = view[: self._data_left]
        self._read_exactly(view)
        count = len(view)
        self._data_left -= count
        self._stored_left -= count
        return count

    def hole_ahead(self) -> int:
        """Bytes of hole that follow directly; 0 where data follows, or nothing."""
        if not self._hole_left and not self._data_left:
            self._next_run()
        return self._hole_left

    def skip_hole(self) -> None:
        """Go past the hole that follows directly."""
        self._hole_left = 0

    def _next_run(self) -> bool:
        while self._runs:
            self._hole_left, self._data_left = self._runs.pop()
            if self._hole_left or self._data_left:
                return True
        return False

    def _skip_data(self) -> None:
        left = self._stored_left
        self._stored_left = 0
        while left:
            if self._start == self._end and not self._fill():
                self._refuse_truncated()
            count = min(left, self._end - self._start)
            self._consume(count)
            left -= count
        left, self._padding = self._padding, 0
        # The last entry's padding may be missing, as in Go's archive/tar.
        while left and (self._start < self._end or self._fill()):
            count = min(left, self._end - self._start)
            self._consume(count)
            left -= count

    # -- the private buffer ------------------------------------------------------------------------

    def _consume(self, count: int) -> None:
        self._start += count
        self._position += count

    def _count_source(self, count: int) -> int:
        self._source_bytes += count
        if self._source_bytes > self._limits.max_layer_bytes:
            self._exceed("bytes", self._source_bytes, "max_layer_bytes", self._limits.max_layer_bytes)
        return count

    def _fill(self) -> bool:
        """Get more bytes behind those in the buffer; False at the end of the source."""
        if self._start:
            left = self._end - self._start
            if left:
                self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        count = self._count_source(self._source.readinto(self._view[self._end :]))
        self._end += count
        return count > 0

    def _fill_block(self) -> bool:
        """Have a whole header block in the buffer; False if the source ends before it."""
        while self._end - self._start < _BLOCK:
            if not self._fill():
                if self._end > self._start:
                    self._refuse(f"the tar ends inside a header, after {self._end - self._start} bytes")
                return False
        return True

    def _read_exactly(self, view: memoryview) -> None:
        wanted = len(view)
        done = 0
        while done < wanted:
            count = min(wanted - done, self._end - self._start)
            if count:
                view[done : done + count] = self._view[self._start : self._start + count]
                self._start += count
            elif wanted - done >= _DIRECT_BYTES:
                count = self._count_source(self._source.readinto(view[done:]))
                if not count:
                    self._refuse_truncated()
            elif not self._fill():
                self._refuse_truncated()
            done += count
            self._position += count

    def _take(self, count: int) -> bytes:
        if count <= self._end - self._start:
            data = bytes(self._view[self._start : self._start + count])
            self._consume(count)
            return data
        whole = bytearray(count)
        self._read_exactly(memoryview(whole))
        return bytes(whole)

    def _end_of_tar(self) -> None:
        """After one zero block: a second one, or the end of the source."""
        self._header_at = self._position
        if not self._fill_block():
            return
        if self._view[self._start : self._start + _BLOCK] != tarheader.ZERO_BLOCK:
            self._refuse("more data after a single zero block; a tar ends in two")

    def _drain(self) -> None:
        self._consume(self._end - self._start)
        while self._fill():
            self._consume(self._end - self._start)

    # -- errors ------------------------------------------------------------------------------------

    def _where(self) -> str:
        return tarentry.describe(self._name.partition(b"\0")[0], self._header_at)

    def _refuse_truncated(self) -> NoReturn:
        self._refuse(f"the tar ends inside the entry, after {self._position} bytes")

    def _refuse(self, problem: str, cause: Exception | None = None) -> NoReturn:
        raise errors.InvalidLayerError(f"{self._where()}: {problem}") from cause

    def _exceed(self, what: str, value: int, limit: str, allowed: int) -> NoReturn:
        flag = "--" + limit.replace("_", "-")
        raise errors.LimitError(f"{self._where()}: {value} {what}, the limit is {allowed} ({flag})")
