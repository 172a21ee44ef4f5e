"""What a worker and the server say to each other, over one SOCK_SEQPACKET pair per worker.

Pure. A worker asks Questions, each with a tag of its own; the server gives one Answer with the same tag, in
any order, and sends Drop and Forget by itself. The descriptor of a block travels beside its Answer
(SCM_RIGHTS). Watch says which devices' reads to note; each is answered by Reads with its tag, and more Reads
come in between.

Hand-over: the server sends Finish; the worker takes no more requests, sends each protocol.Read that waits for
a block, and ends. A successor's server sends such a Read to the worker that is to answer it.

Both ends are ours and of the same build (a worker is started by its server): a message that does not parse
is a bug, hence InvalidInputError.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterable
from typing import NamedTuple

from imagefs import errors, framemask
from imagefs.fuse.protocol import Read

MAX_MESSAGE_BYTES = 64 * 1024
LISTING_DEVICES = 256
"""Devices per answer to LIST; with names of 136 bytes well under MAX_MESSAGE_BYTES."""
FIRST_PACK_NODE = 1 << 48
"""Boot packs have node ids from here on, which the kernel never sees: they last as long as the server."""

_QUESTION = struct.Struct("=BIQQH")
_ANSWER = struct.Struct("=BIiH")
_DROP = struct.Struct("=BQ")
_DEVICE = struct.Struct("=QQIIB")
_WATCH = struct.Struct("=BI")
_NODE = struct.Struct("=Q")
_READS = struct.Struct("=BI")
_ACCESS = struct.Struct("=QQIQ")
_READ = struct.Struct("=BQQQII")
_ANSWER_KIND, _DROP_KIND, _FORGET_KIND, _WATCH_KIND, _FINISH_KIND = 1, 2, 3, 4, 5
_READ_KIND, _READS_KIND = 254, 255
"""No Ask has these numbers."""
ACCESSES = (MAX_MESSAGE_BYTES - _READS.size) // _ACCESS.size
MAX_ACCESS_BYTES = 1 << 30
MAX_WATCHED = (MAX_MESSAGE_BYTES - _WATCH.size) // _NODE.size


class Ask(enum.IntEnum):
    """What a worker wants to know."""

    NAME = 1
    """The device called `name`."""
    NODE = 2
    """The device with id `node`."""
    LIST = 3
    """The attached devices with ids above `node`, ascending, LISTING_DEVICES at most."""
    BLOCK = 4
    """Block `index` of device `node`, or frame `index` of pack `node`, verified: the whole of it, or, sooner,
    of a block its `frames`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """Worker -> server."""

    ask: Ask
    tag: int
    node: int = 0
    index: int = 0
    name: bytes = b""
    frames: int = framemask.WHOLE


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A layer image, with one boot pack or none, as the kernel sees it: a file `name` with inode number
    `node`. `frame_bytes` is `block_bytes` where nothing less than a block can be had."""

    node: int
    size: int
    block_bytes: int
    frame_bytes: int
    name: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Server -> worker. `error` is an errno or 0. To BLOCK no device but a descriptor beside the message, or
    none, which means all zeros; an error for a frame means that its pages come by their blocks. `frames` are
    those of the block that are valid, at least the ones that were asked for; WHOLE for all of it. To NAME and
    NODE the device, then its boot pack, as a device whose blocks are the frames; if there is one, beside the
    message a descriptor of its extents (packlayout.py)."""

    tag: int
    error: int = 0
    devices: tuple[Device, ...] = ()
    frames: int = framemask.WHOLE


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """Server -> worker: device `node` was detached; let go of its blocks."""

    node: int


@dataclasses.dataclass(frozen=True, slots=True)
class Forget:
    """Server -> worker: device `node` got or lost a boot pack; ask for it again at the next read."""

    node: int


@dataclasses.dataclass(frozen=True, slots=True)
class Watch:
    """Server -> worker: note the reads of these devices, and of no others, from now on. Answered by Reads."""

    tag: int
    nodes: tuple[int, ...]


class Access(NamedTuple):
    """A READ that the kernel sent, or several that follow one another; by CLOCK_MONOTONIC."""

    node: int
    offset: int
    length: int
    microseconds: int


@dataclasses.dataclass(frozen=True, slots=True)
class Reads:
    """Worker -> server: what was noted. `tag` is that of the Watch that this answers, or 0."""

    tag: int
    reads: tuple[Access, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Finish:
    """Server -> worker: make way for a successor."""


FromWorker = Question | Reads | Read
FromServer = Answer | Drop | Forget | Watch | Finish | Read


def pack_accesses(reads: Iterable[Access]) -> bytes:
    """Fixed-size entries, one after another."""
    return b"".join(_ACCESS.pack(*read) for read in reads)


def unpack_accesses(data: bytes) -> Iterable[Access]:
    """The inverse of pack_accesses; struct.error for a piece of one."""
    return map(Access._make, _ACCESS.iter_unpack(data))


def encode_question(value: FromWorker) -> bytes:
    """One message."""
    if isinstance(value, Reads):
        return _READS.pack(_READS_KIND, value.tag) + pack_accesses(value.reads)
    if isinstance(value, Read):
        return _encode_read(value)
    frames = _encode_frames(value.frames)
    return _QUESTION.pack(value.ask, value.tag, value.node, value.index, len(frames)) + frames + value.name


def decode_question(data: bytes) -> FromWorker:
    """The inverse of encode_question."""
    try:
        if data[:1] == bytes([_READS_KIND]):
            _, tag = _READS.unpack_from(data)
            return Reads(tag, tuple(unpack_accesses(data[_READS.size :])))
        if data[:1] == bytes([_READ_KIND]):
            return _decode_read(data)
        ask, tag, node, index, length = _QUESTION.unpack_from(data)
        frames, end = _decode_frames(data, _QUESTION.size, length)
        return Question(Ask(ask), tag, node, index, data[end:], frames)
    except (struct.error, ValueError) as exc:
        raise errors.InvalidInputError(f"worker's question of {len(data)} bytes: {exc}") from exc


def encode_answer(value: FromServer) -> bytes:
    """One message."""
    if isinstance(value, Watch):
        return _WATCH.pack(_WATCH_KIND, value.tag) + b"".join(map(_NODE.pack, value.nodes))
    if isinstance(value, Finish):
        return bytes([_FINISH_KIND])
    if isinstance(value, Read):
        return _encode_read(value)
    if isinstance(value, Drop | Forget):
        return _DROP.pack(_DROP_KIND if isinstance(value, Drop) else _FORGET_KIND, value.node)
    frames = _encode_frames(value.frames)
    head = _ANSWER.pack(_ANSWER_KIND, value.tag, value.error, len(frames)) + frames
    return head + b"".join(
        _DEVICE.pack(device.node, device.size, device.block_bytes, device.frame_bytes, len(device.name))
        + device.name
        for device in value.devices
    )


def decode_answer(data: bytes) -> FromServer:
    """The inverse of encode_answer."""
    try:
        if data[:1] == bytes([_WATCH_KIND]):
            _, tag = _WATCH.unpack_from(data)
            return Watch(tag, tuple(node for (node,) in _NODE.iter_unpack(data[_WATCH.size :])))
        if data == bytes([_FINISH_KIND]):
            return Finish()
        if data[:1] == bytes([_READ_KIND]):
            return _decode_read(data)
        if data[:1] in (bytes([_DROP_KIND]), bytes([_FORGET_KIND])):
            kind, node = _DROP.unpack(data)
            return Drop(node) if kind == _DROP_KIND else Forget(node)
        _, tag, error, length = _ANSWER.unpack_from(data)
        frames, position = _decode_frames(data, _ANSWER.size, length)
        devices = []
        while position < len(data):
            node, size, block_bytes, frame_bytes, length = _DEVICE.unpack_from(data, position)
            position += _DEVICE.size + length
            name = data[position - length : position]
            devices.append(Device(node, size, block_bytes, frame_bytes, name))
    except (struct.error, ValueError) as exc:
        raise errors.InvalidInputError(f"server's answer of {len(data)} bytes: {exc}") from exc
    return Answer(tag, error, tuple(devices), frames)


def _encode_frames(frames: int) -> bytes:
    return frames.to_bytes((frames.bit_length() + 7) // 8, "little")


def _decode_frames(data: bytes, start: int, length: int) -> tuple[int, int]:
    """The frames, and where they end. ValueError where they are cut short."""
    end = start + length
    if end > len(data):
        raise ValueError(f"{length} bytes of frames, and {len(data) - start} are there")
    return int.from_bytes(data[start:end], "little"), end


def _encode_read(value: Read) -> bytes:
    return _READ.pack(_READ_KIND, value.unique, value.node, value.offset, value.size, value.pid)


def _decode_read(data: bytes) -> Read:
    return Read(*_READ.unpack(data)[1:])
