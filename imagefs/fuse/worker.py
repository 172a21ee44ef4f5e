"""A worker: reads the kernel's requests from one clone of /dev/fuse and answers them from block files.

A process of its own, single-threaded, started by the server as `python -m imagefs.fuse.worker FUSE_FD
SERVER_FD` with nothing else open. It holds no cache logic and no network: a block that it lacks it asks of
the server, once however many requests wait for it, and goes on reading; each request is answered when all
its blocks are there. Of blocks in frames it asks for those frames that the request reads, and asks again when
another one reads others. Frames of boot packs are blocks to it, too, of devices that nobody sees: what a pack
has of a READ comes from there, the rest, and what the server refuses, from the device's own blocks.

Invariants:
* The loop never waits for the server. Whatever needs an answer from it is a continuation in `_answers`.
* Of every descriptor that the server sends it says what was verified: the whole, or some frames; nothing else
  is read. What is here is bounded, because a held block
  occupies disk, or memory where the disk is full, after the cache has evicted its name. The bound is wide
  for blocks on disk: with 256 MiB, `import torch` asked the server for most of its blocks again and again.
* A reader that was killed is let go (EINTR), however long its block takes: the kernel waits for our answer
  to what EROFS reads of its own metadata, and a pod could not be deleted before an origin's deadline. No
  other signal cuts a read short: programs do not expect that of a file.
* Told to finish, it answers what the server answers at once (names and attributes), hands the reads that wait
  for a block to the server, for its successor, and ends: no request is lost, whatever the kernel.
* It may be killed at any instruction: the server and the keeper hold the same descriptors, and the kernel
  gives what was not answered to the successor. When the server is gone, it exits at once, for the same
  reason.

Data goes by pread into one reused buffer (`blockfile.py`) and writev from it. splice would save a copy, but a
reply of 1 MiB needs 257 pipe slots, one more than a process without CAP_SYS_RESOURCE may have
(fs.pipe-max-size); mmap of the block instead of pread took as much processor time (175 us a MiB for both
copies).
"""

from __future__ import annotations

import array
import collections
import contextlib
import errno
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

from imagefs import framemask
from imagefs.fuse import blockfile, packlayout, protocol, readlog, wire

HELD_BLOCKS = 1024
HELD_BYTES = 1 << 30
HELD_MEMORY_BYTES = 256 << 20
_NO_FD = -1
_KILLED_SECONDS = 0.25
"""Between two looks for readers that were killed, while any wait."""
_GONE = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN})
_ROOT = protocol.Attributes(protocol.ROOT_NODE, 0, directory=True)

_Key = packlayout.Key
_Wanted = tuple[_Key, int]
"""A block, and the frames of it (framemask.py) that were asked for; or WHOLE."""
_Continuation = Callable[[wire.Answer, int], None]
"""Called with the server's answer and the descriptor beside it (or -1), which it owns."""


class Worker:
    """The loop's state. `fuse_fd` is non-blocking; `server` is the worker's end of the pair."""

    def __init__(self, fuse_fd: int, server: socket.socket) -> None:
        self._fuse_fd = fuse_fd
        self._server = server
        self._request = bytearray(protocol.REQUEST_BUFFER_BYTES)
        self._buffer = memoryview(mmap.mmap(-1, protocol.MAX_READ_BYTES))
        self._zeros = bytes(protocol.MAX_READ_BYTES)
        self._devices: dict[int, wire.Device] = {}
        """Those of packs as well, whose node ids are above all others."""
        self._layouts: dict[int, packlayout.Layout | None] = {}
        """Of the devices of which it is known whether they have a pack; mostly None."""
        self._refused: set[_Key] = set()
        """Frames whose pages come by blocks."""
        self._held: collections.OrderedDict[_Key, blockfile.BlockFile | None] = collections.OrderedDict()
        """Least recently used first; None for a block of zeros."""
        self._valid: dict[_Key, int] = {}
        """The frames of blocks that are held, or WHOLE: what was verified."""
        self._held_bytes = 0
        self._held_memory_bytes = 0
        self._waiting: dict[_Wanted, list[protocol.Read]] = {}
        self._answers: dict[int, _Continuation] = {}
        self._tag = 0
        self._readlog = readlog.ReadLog(lambda reads: self._server.sendall(wire.encode_question(reads)))
        self._finishing = False

    def run(self) -> None:
        """Serve until the server or the mount is gone, or a successor is to take over."""
        poll = select.epoll()
        poll.register(self._server, select.EPOLLIN)
        # A request wakes one worker; with poll(2) it woke all of them, for one to find it.
        poll.register(self._fuse_fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        looked_at = 0.0
        while True:
            for fd, _ in poll.poll(_KILLED_SECONDS if self._waiting else None):
                alive = self._read_kernel() if fd == self._fuse_fd else self._read_server()
                if not alive:
                    return
            if self._finishing:
                with contextlib.suppress(FileNotFoundError):
                    poll.unregister(self._fuse_fd)
                if len(self._answers) == len(self._waiting):  # only blocks are still to come
                    self._leave()
                    return
            if self._waiting and (now := time.monotonic()) - looked_at >= _KILLED_SECONDS:
                looked_at = now
                self._let_killed_go()

    # -- the kernel's side -------------------------------------------------------------------------

    def _read_kernel(self) -> bool:
        try:
            length = os.readv(self._fuse_fd, [self._request])
        except BlockingIOError:
            return True  # a sibling took it
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                return True  # the request was interrupted before we read it
            if exc.errno in _GONE:
                return False
            raise
        request = protocol.decode(memoryview(self._request)[:length])
        if isinstance(request, protocol.Read):
            if request.node in self._readlog.nodes:
                self._readlog.note(request.node, request.offset, request.size)
            self._read(request)
        elif isinstance(request, protocol.Lookup):
            self._lookup(request)
        elif isinstance(request, protocol.ReadDirectory):
            self._list(request)
        elif isinstance(request, protocol.Simple):
            self._simple(request)
        elif isinstance(request, protocol.Malformed):
            log(f"the kernel sent a message that we cannot read: {request.reason}")
            if request.unique:
                self._reply(protocol.error_reply(request.unique, errno.EIO))
        elif isinstance(request, protocol.Init):
            self._reply(
                protocol.error_reply(request.unique, errno.EPROTO)
            )  # the keeper answered the real one
        return True

    def _reply(self, *pieces: bytes | memoryview) -> None:
        try:
            os.writev(self._fuse_fd, pieces)
        except OSError as exc:
            # ENOENT: the reader is gone, or the request was queued again and a sibling answered it.
            if exc.errno != errno.ENOENT and exc.errno not in _GONE:
                log(f"the kernel refused a reply of {sum(map(len, pieces))} bytes: {exc}")

    def _lookup(self, request: protocol.Lookup) -> None:
        def answered(answer: wire.Answer, fd: int) -> None:
            if answer.error:
                self._reply(protocol.error_reply(request.unique, answer.error))
                return
            device = self._take_up(answer, fd)
            self._reply(protocol.entry_reply(request.unique, protocol.Attributes(device.node, device.size)))

        if request.node != protocol.ROOT_NODE:
            self._reply(protocol.error_reply(request.unique, errno.ENOTDIR))
        else:
            self._ask(wire.Ask.NAME, answered, name=request.name)

    def _list(self, request: protocol.ReadDirectory) -> None:
        def answered(answer: wire.Answer, _: int) -> None:
            if answer.error:
                self._reply(protocol.error_reply(request.unique, answer.error))
                return
            entries = [protocol.DirectoryEntry(d.node, d.name, d.node) for d in answer.devices]
            self._reply(protocol.directory_reply(request.unique, entries, request.size))

        # Cookies are node ids, so that a listing goes on rightly whatever was attached in between; "." and
        # ".." have no place in that order, and nothing needs them.
        self._ask(wire.Ask.LIST, answered, node=request.offset)

    def _simple(self, request: protocol.Simple) -> None:
        root = request.node == protocol.ROOT_NODE
        if request.opcode == protocol.GETATTR:
            if root:
                self._reply(protocol.attributes_reply(request.unique, _ROOT))
            else:
                self._attributes(request)
        elif request.opcode in (protocol.OPEN, protocol.OPENDIR):
            directory = request.opcode == protocol.OPENDIR
            self._reply(protocol.open_reply(request.unique, directory=directory))
        elif request.opcode == protocol.STATFS:
            self._reply(protocol.statfs_reply(request.unique, len(self._devices)))
        elif request.opcode in (
            protocol.RELEASE,
            protocol.RELEASEDIR,
            protocol.ACCESS,
            protocol.DESTROY,
        ):
            self._reply(protocol.error_reply(request.unique, 0))
        else:
            self._reply(protocol.unsupported_reply(request))

    def _attributes(self, request: protocol.Simple) -> None:
        def known(device: wire.Device) -> None:
            attributes = protocol.Attributes(device.node, device.size)
            self._reply(protocol.attributes_reply(request.unique, attributes))

        self._with_device(request.unique, request.node, known, errno.ESTALE)

    def _with_device(self, unique: int, node: int, then: Callable[[wire.Device], None], missing: int) -> None:
        """Go on with the device, asking for it where a predecessor or sibling had the LOOKUP. `missing` is
        the errno for one that was detached."""

        def answered(answer: wire.Answer, fd: int) -> None:
            if answer.error:
                self._reply(protocol.error_reply(unique, missing))
            else:
                then(self._take_up(answer, fd))

        if node in self._layouts:
            then(self._devices[node])
        else:
            self._ask(wire.Ask.NODE, answered, node=node)

    def _take_up(self, answer: wire.Answer, extents_fd: int) -> wire.Device:
        """Note a device, and where its pack has its pages."""
        device, *packs = answer.devices
        layout = None
        if extents_fd != _NO_FD:
            try:
                data = os.pread(extents_fd, os.fstat(extents_fd).st_size, 0)
            finally:
                os.close(extents_fd)
            (pack,) = packs
            self._devices[pack.node] = pack
            layout = packlayout.Layout(pack.node, pack.block_bytes, packlayout.decode(data))
        self._devices[device.node] = device
        self._layouts[device.node] = layout
        return device

    # -- reading -----------------------------------------------------------------------------------

    def _read(self, request: protocol.Read) -> None:
        self._with_device(
            request.unique, request.node, lambda device: self._read_device(request, device), errno.EIO
        )

    def _read_device(self, request: protocol.Read, device: wire.Device) -> None:
        length = max(0, min(request.size, device.size - request.offset))
        if length > protocol.MAX_READ_BYTES:
            self._reply(protocol.error_reply(request.unique, errno.EINVAL))
            return
        if length == 0:
            self._reply(protocol.read_header(request.unique, 0))
            return
        layout = self._layouts[device.node]
        parts = list(
            packlayout.segments(
                device.node, device.block_bytes, request.offset, length, layout, self._refused
            )
        )
        missing = [wanted for part in parts if (wanted := self._missing(part)) is not None]
        for wanted in missing:
            if wanted not in self._waiting:
                self._waiting[wanted] = []
                self._ask_block(wanted)
        if missing:
            # Parked at one block only; when that has come, the others are looked at again.
            self._waiting[missing[0]].append(request)
        else:
            self._send(request, parts)

    def _missing(self, part: packlayout.Segment) -> _Wanted | None:
        """What the server must be asked for, to have the segment's bytes."""
        device = self._devices[part.key[0]]
        needed = framemask.WHOLE
        if device.frame_bytes < device.block_bytes:
            needed = framemask.touched(part.within, part.length, device.frame_bytes)
        if part.key in self._held and framemask.covers(self._valid[part.key], needed):
            return None
        return part.key, needed

    def _send(self, request: protocol.Read, parts: Sequence[packlayout.Segment]) -> None:
        """Reply with the bytes of blocks that are all held."""
        filled = 0
        for part in parts:
            view = self._buffer[filled : filled + part.length]
            block = self._held[part.key]
            self._held.move_to_end(part.key)
            if block is None:
                view[:] = self._zeros[: part.length]
            elif not block.read(view, part.within):
                self._unreadable(request, part.key)
                return
            filled += part.length
        self._reply(protocol.read_header(request.unique, filled), self._buffer[:filled])

    def _unreadable(self, request: protocol.Read, key: _Key) -> None:
        node, index = key
        device = self._devices[node]
        log(f"block {index} of {device.name.decode()} could not be read back from the cache")
        self._let_go(key, device.block_bytes)
        if node >= wire.FIRST_PACK_NODE:
            self._refused.add(key)
            self._read(request)
        else:
            self._reply(protocol.error_reply(request.unique, errno.EIO))

    def _ask_block(self, wanted: _Wanted) -> None:
        key, frames = wanted
        node, index = key
        device = self._devices[node]

        def answered(answer: wire.Answer, fd: int) -> None:
            refused = bool(answer.error) and node >= wire.FIRST_PACK_NODE
            if refused:
                self._refused.add(key)
            elif not answer.error:
                self._hold(key, fd, device.block_bytes, answer.frames)
            for request in self._waiting.pop(wanted):
                if answer.error and not refused:
                    self._reply(protocol.error_reply(request.unique, answer.error))
                else:
                    self._read(request)

        self._ask(wire.Ask.BLOCK, answered, node=node, index=index, frames=frames)

    def _leave(self) -> None:
        for waiting in self._waiting.values():
            for request in waiting:
                self._server.sendall(wire.encode_question(request))

    def _let_killed_go(self) -> None:
        """Answer the reads of threads that were killed."""
        for waiting in self._waiting.values():
            for request in [each for each in waiting if each.pid and _was_killed(each.pid)]:
                waiting.remove(request)
                self._reply(protocol.error_reply(request.unique, errno.EINTR))

    def _hold(self, key: _Key, fd: int, block_bytes: int, frames: int) -> None:
        if key in self._held:
            held = self._held[key]
            if held is not None and fd != _NO_FD and held.is_same(fd):
                # More of it has come. Answers may overtake one another: none takes anything back.
                valid = self._valid[key]
                known = framemask.WHOLE in (valid, frames)
                self._valid[key] = framemask.WHOLE if known else valid | frames
                os.close(fd)
                return
            self._let_go(key, block_bytes)
        block = None if fd == _NO_FD else blockfile.BlockFile(fd)
        self._held[key] = block
        self._valid[key] = frames
        self._count(block, block_bytes)
        while (
            len(self._held) > HELD_BLOCKS
            or self._held_bytes > HELD_BYTES
            or self._held_memory_bytes > HELD_MEMORY_BYTES
        ):
            oldest = next(iter(self._held))
            self._let_go(oldest, self._devices[oldest[0]].block_bytes)

    def _let_go(self, key: _Key, block_bytes: int) -> None:
        block = self._held.pop(key)
        del self._valid[key]
        self._count(block, -block_bytes)
        if block is not None:
            block.close()

    def _count(self, block: blockfile.BlockFile | None, size_bytes: int) -> None:
        if block is not None:
            self._held_bytes += size_bytes
            self._held_memory_bytes += size_bytes if block.in_memory else 0

    # -- the server's side -------------------------------------------------------------------------

    def _ask(
        self,
        ask: wire.Ask,
        then: _Continuation,
        *,
        node: int = 0,
        index: int = 0,
        name: bytes = b"",
        frames: int = framemask.WHOLE,
    ) -> None:
        self._tag = (self._tag + 1) & 0xFFFFFFFF
        self._answers[self._tag] = then
        question = wire.Question(ask, self._tag, node, index, name, frames)
        self._server.sendall(wire.encode_question(question))

    def _read_server(self) -> bool:
        data, fds = receive(self._server)
        if not data:
            return False
        message = wire.decode_answer(data)
        if isinstance(message, wire.Drop):
            self._drop(message.node)
        elif isinstance(message, wire.Finish):
            self._finishing = True
        elif isinstance(message, protocol.Read):
            self._read(message)
        elif isinstance(message, wire.Forget):
            self._layouts.pop(message.node, None)
        elif isinstance(message, wire.Watch):
            self._readlog.watch(message)
        else:
            self._answers.pop(message.tag)(message, fds[0] if fds else _NO_FD)
        return True

    def _drop(self, node: int) -> None:
        device = self._devices.get(node)
        if device is None:
            return
        for key in [key for key in self._held if key[0] == node]:
            self._let_go(key, device.block_bytes)
        self._refused = {key for key in self._refused if key[0] != node}


def _was_killed(thread: int) -> bool:
    """Whether SIGKILL waits for a thread: the kernel makes that of most signals that end a process."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            pending = next((line for line in file if line.startswith(b"SigPnd:")), b"SigPnd: 0")
    except OSError:
        return False  # it is gone: nobody waits
    return bool(int(pending.split()[1], 16) >> (signal.SIGKILL - 1) & 1)


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors beside it; (b"", []) when the other side is gone."""
    size = array.array("i").itemsize
    try:
        data, ancillary, _, _ = channel.recvmsg(wire.MAX_MESSAGE_BYTES, socket.CMSG_SPACE(size))
    except ConnectionError:
        return b"", []
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % size])
    return data, list(fds)


def log(message: str) -> None:
    """One line to the log that the keeper opened as our standard error."""
    with contextlib.suppress(OSError):  # a full disk must not end whoever speaks
        print(f"glowplug worker {os.getpid()}: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point: FUSE_FD SERVER_FD."""
    server = socket.socket(fileno=int(sys.argv[2]))
    try:
        Worker(int(sys.argv[1]), server).run()
    except ConnectionError:
        pass  # the server died between our question and its answer
    except KeyboardInterrupt:
        pass
    # Open blocks need no tidy-up, and a kernel request must not wait for the interpreter's.
    os._exit(0)


if __name__ == "__main__":
    main()
