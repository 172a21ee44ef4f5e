"""The device server: which devices there are, their blocks, and the workers that serve them.

A process of its own, `python -m imagefs.fuse.server --state DIR`, started by the keeper (or by systemd),
killed and started again at any time. It owns the device table, the block cache and the fetcher, the control
socket, and the worker processes; it never reads /dev/fuse itself, and never touches the mount, which would
be waiting for itself.

Start: register with the keeper (its answer carries the clones), start a worker on each, ask the kernel to
queue again what a predecessor left unanswered, open the control socket, say "ready"; only then import what
takes long, and take up the devices of the table. Questions wait for that.

Hand-over to another version ("hand_over"): a keeper of that version takes the keeper's place, and is given
the clones; the workers finish; what they were still to answer is written down (`handover.py`); this process
ends, and the new keeper starts the new server. If the new keeper does not come up, nothing else has happened.

Threads: one per worker (its life and its questions), one per control connection, the fetcher's own (which
call `_Channel.answer`), and the main one, which watches the keeper.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagefs import errors, framemask
from imagefs.fuse import control, controlmessage, handover, protocol, recordings, statedirectory, wire
from imagefs.fuse.devices import DeviceTable
from imagefs.fuse.keeperlink import KeeperLink

if TYPE_CHECKING:
    from imagefs.arrival import Part
    from imagefs.fuse.layers import Layers
    from imagefs.fuse.localblocks import LocalBlocks

_ANSWER_BUFFER_BYTES = 4 << 20
_STUCK_SECONDS = 10
"""A worker that takes no answer for so long is killed and replaced, before it holds up the fetcher."""
_SHORT_LIFE_SECONDS = 1.0
_LONGEST_BACKOFF_SECONDS = 2.0
_FIRST_WORKERS = 2
_LATER_SECONDS = 0.5
"""From when attaches are answered to the start of the other workers."""
_MAX_CONNECTIONS = 64
_IDLE_SECONDS = 60.0
_ACCEPT_PAUSE_SECONDS = 0.1


class _Channel:
    """The server's end of one worker's socket pair. Any thread may answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()  # a descriptor number must not be reused between close and send
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ANSWER_BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _STUCK_SECONDS, 0))

    def answer(self, message: wire.FromServer, fd: int = -1) -> None:
        """Send; `fd` stays the caller's. A worker that is gone will not miss it."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        with self._lock:
            try:
                self._socket.sendmsg([wire.encode_answer(message)], rights)
            except BlockingIOError:
                log(f"a worker takes no answers for {_STUCK_SECONDS} s: replacing it")
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def next_question(self) -> wire.FromWorker | None:
        """None when the worker is gone."""
        try:
            data = self._socket.recv(wire.MAX_MESSAGE_BYTES)
        except ConnectionError:
            # It ended with answers of ours unread. That is said first, and once; what it sent is still there.
            data = self._socket.recv(wire.MAX_MESSAGE_BYTES)
        return wire.decode_question(data) if data else None

    def close(self) -> None:
        """Give the descriptor back. Answers that are still to come go nowhere."""
        with self._lock:
            self._socket.close()


class Server:
    """See the module."""

    def __init__(self, settings: control.ServerSettings) -> None:
        self._settings = settings
        self._link = KeeperLink(settings.state_dir, log)
        self._channels: dict[int, _Channel] = {}
        self._pids: dict[int, int] = {}
        self._loaded = threading.Event()
        self._load_error: errors.ImagefsError | None = None
        self._layers: Layers | None = None
        self._table: DeviceTable | None = None
        self._recordings = recordings.Recordings(self._tell_workers)
        self._restarts = 0
        self._stopping = False
        self._tending: list[threading.Thread] = []
        self._left: dict[int, list[protocol.Read]] = {}
        self._handing_over = threading.Lock()
        self._finishing = False
        self._handed_over = False

    def run(self) -> None:
        """Until a clean stop."""
        left = self._taken_over()
        for slot, clone in enumerate(self._link.clones):
            arguments = (slot, clone, left.get(slot, []))
            tending = threading.Thread(target=self._tend_worker, args=arguments, daemon=True)
            self._tending.append(tending)
            tending.start()
        self._resend()
        listener = statedirectory.listen(self._settings.state_dir / "control.sock", socket.SOCK_STREAM)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        self._link.say_ready()
        threading.Thread(target=self._load, daemon=True).start()
        self._link.watch()
        self._stopping = True
        if self._layers is not None:
            self._layers.close()

    def _load(self) -> None:
        try:
            # The cache, the fetcher and libzstd take longer to import than all the rest takes to start.
            from imagefs.fuse import layers, peering

            self._table = DeviceTable(self._settings.state_dir / "devices.json", self._link.token)
            self._layers = layers.Layers(self._settings, self._table, self._is_recorded)
            peering.PeerSocket(self._settings.state_dir, self._layers.peer_block)
        except errors.ImagefsError as exc:
            self._load_error = exc
        except Exception as exc:
            self._load_error = errors.ConfigurationError(f"the device server cannot work: {exc!r}")
        if self._load_error is not None:
            log(str(self._load_error))
        self._loaded.set()

    def _is_recorded(self, owner: str) -> bool:
        assert self._table is not None
        return self._recordings.cover(row.node for row in self._table.records() if owner in row.owners)

    def _ready_layers(self) -> Layers:
        self._loaded.wait()
        if self._layers is None:
            assert self._load_error is not None
            raise self._load_error
        return self._layers

    def _is_useless(self) -> bool:
        """It could not load, and there is no device whose reads it would fail."""
        self._loaded.wait()
        return self._layers is None and self._table is not None and not self._table.records()

    # -- workers -----------------------------------------------------------------------------------

    def _taken_over(self) -> dict[int, list[protocol.Read]]:
        """What a predecessor left unanswered. Nothing where the kernel queues all of it again."""
        try:
            left = handover.take(self._settings.state_dir, self._link.token)
        except errors.ImagefsError as exc:
            log(str(exc))
            return {}
        return {} if self._link.resend else left

    def _tend_worker(self, slot: int, clone: int, left: list[protocol.Read]) -> None:
        """One worker after another on one clone. The first answers what was `left` there."""
        if slot >= _FIRST_WORKERS and not left:
            # A mount waits for that, then reads metadata and little else: the processors' time is its.
            self._loaded.wait()
            time.sleep(_LATER_SECONDS)
        failures = 0
        while not (self._stopping or self._finishing):
            started = time.monotonic()
            try:
                process, channel = self._start_worker(clone)
            except OSError as exc:
                log(f"cannot start a worker: {exc}")
                time.sleep(_LONGEST_BACKOFF_SECONDS)  # no memory or process left; readers wait meanwhile
                continue
            self._pids[slot] = process.pid
            self._channels[slot] = channel
            if self._restarts:
                self._resend()
            if (watch := self._recordings.current()) is not None:
                channel.answer(watch)
            while left:
                channel.answer(left.pop())
            while (question := channel.next_question()) is not None:
                if isinstance(question, wire.Reads):
                    self._recordings.arrived(question)
                elif isinstance(question, protocol.Read):
                    self._left.setdefault(slot, []).append(question)
                else:
                    self._answer(channel, question)
            del self._channels[slot]
            process.kill()
            status = process.wait()
            channel.close()
            if self._stopping or self._finishing:
                return
            log(f"worker {process.pid} ended with status {status}: replacing it")
            self._restarts += 1
            failures = failures + 1 if time.monotonic() - started < _SHORT_LIFE_SECONDS else 0
            if failures > 1:
                time.sleep(min(0.05 * 2**failures, _LONGEST_BACKOFF_SECONDS))

    def _start_worker(self, clone: int) -> tuple[subprocess.Popen[bytes], _Channel]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "imagefs.fuse.worker", str(clone), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[clone, theirs.fileno(), self._link.lifeline],
            )
        return process, _Channel(ours)

    def _resend(self) -> None:
        """Have the kernel queue again what was taken and not answered: by a process that is gone now."""
        if self._link.resend:
            with contextlib.suppress(OSError):
                os.write(self._link.clones[0], protocol.resend_notice())

    def _answer(self, channel: _Channel, question: wire.Question) -> None:
        try:
            layers = self._ready_layers()
            if question.ask is wire.Ask.BLOCK:
                done = _block_answer(channel, question.tag)
                layers.block(question.node, question.index, question.frames, done)
            elif question.ask is wire.Ask.LIST:
                listing = layers.listing(question.node, wire.LISTING_DEVICES)
                channel.answer(wire.Answer(question.tag, 0, tuple(listing)))
            else:
                by_name = question.ask is wire.Ask.NAME
                device = layers.by_name(question.name) if by_name else layers.by_node(question.node)
                _answer_device(channel, question.tag, device, layers.pack_of(device))
        except errors.ImagefsError as exc:
            channel.answer(wire.Answer(question.tag, _errno(exc)))
        except Exception as exc:
            # A bug here must not leave a reader waiting for ever.
            log(f"cannot answer {question}: {exc!r}")
            channel.answer(wire.Answer(question.tag, errno.EIO))

    # -- control -----------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        while True:
            slots.acquire()
            try:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection, slots), daemon=True).start()
            except (OSError, RuntimeError) as exc:
                log(f"control: cannot take a connection: {exc}")
                slots.release()
                time.sleep(_ACCEPT_PAUSE_SECONDS)  # no descriptor or thread left: somebody may give one back

    def _serve(self, connection: socket.socket, slots: threading.BoundedSemaphore) -> None:
        try:
            with connection:
                if not statedirectory.same_user(connection):
                    return
                connection.settimeout(_IDLE_SECONDS)
                while (request := controlmessage.receive(connection)) is not None:
                    try:
                        reply = {"ok": self._operate(request)}
                    except errors.ImagefsError as exc:
                        reply = controlmessage.encode_error(exc)
                    controlmessage.send(connection, reply)
                    if self._handed_over:
                        os._exit(0)  # the new keeper waits for our end to start the next server
                    if self._stopping:
                        self._link.stop()
        except (OSError, errors.ImagefsError) as exc:
            log(f"control connection: {exc}")
        finally:
            slots.release()

    def _operate(self, request: dict[str, Any]) -> Any:
        operation = request.get("op")
        if operation == "ping":
            return None
        if operation == "stop":
            self._stopping = True
            return None
        if operation == "hand_over":
            settings = request.get("settings")
            if not isinstance(settings, dict):
                raise errors.InvalidInputError("control: hand_over without settings")
            return self._hand_over(controlmessage.string(request, "python"), settings)
        if operation in ("detach", "stop_if_idle") and self._is_useless():
            # Not in the way of the next one, whose settings may be better.
            self._stopping = operation == "stop_if_idle"
            return self._stopping
        layers = self._ready_layers()
        if operation == "attach":
            for node in layers.attach(request):
                self._tell_workers(wire.Forget(node))
            return None
        if operation == "detach":
            changed, gone = layers.detach(_owner(request))
            for node in changed:
                self._tell_workers(wire.Forget(node))
            for node in gone:
                self._tell_workers(wire.Drop(node))
            self._recordings.forget(_owner(request))
            return None
        if operation == "started":
            owner, names = _owner(request), request.get("backing_devices")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise errors.InvalidInputError("control: started without backing devices")
            return layers.started(owner, names)
        if operation == "start_recording":
            owner = _owner(request)
            return self._recordings.start(owner, layers.nodes(owner))
        if operation == "stop_recording":
            return self._recordings.stop(_owner(request))
        if operation == "status":
            return {**layers.status(), "processes": self._processes()}
        if operation == "events":
            return layers.events(controlmessage.number(request, "after"))
        if operation in _LOCAL:
            return _LOCAL[operation](layers.local, request)
        if operation == "peers":
            return layers.set_peers(request.get("settings"))
        if operation == "hold":
            return layers.hold(_owner(request))
        if operation == "stop_if_idle":
            self._stopping = layers.close_if_idle()
            return self._stopping
        raise errors.InvalidInputError(f"{controlmessage.UNKNOWN_OPERATION} {operation!r}")

    def _tell_workers(self, message: wire.Drop | wire.Forget | wire.Watch) -> int:
        channels = list(self._channels.values())
        for channel in channels:
            channel.answer(message)
        return len(channels)

    # -- hand-over ---------------------------------------------------------------------------------

    def _hand_over(self, python: str, settings: Mapping[str, Any]) -> None:
        """Make way for the server that `python` runs, with these settings. Returns when all is ready for it
        but our own end."""
        if not self._handing_over.acquire(blocking=False):
            raise errors.BusyError("a hand-over is under way already")
        try:
            self._loaded.wait()  # or nobody answers what the workers ask while they finish
            self._link.replace_keeper(python)
        except BaseException:
            self._handing_over.release()
            raise
        self._finish_workers()
        if self._layers is not None:
            self._layers.close()
        try:
            control.write_settings(self._settings.state_dir, settings)
        except errors.ConfigurationError as exc:
            log(f"{exc}: the next server has the settings of this one")
        self._handed_over = True

    def _finish_workers(self) -> None:
        """Until no worker is left; from now on requests wait in the kernel."""
        self._finishing = True
        for channel in list(self._channels.values()):
            channel.answer(wire.Finish())
        deadline = time.monotonic() + _STUCK_SECONDS
        for tending in self._tending:
            tending.join(max(0.0, deadline - time.monotonic()))
        for slot in list(self._channels):
            log(f"worker {self._pids[slot]} does not finish: it is killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[slot], signal.SIGKILL)
        for tending in self._tending:
            tending.join(_STUCK_SECONDS)
        try:
            handover.leave(self._settings.state_dir, self._link.token, self._left)
        except errors.ImagefsError as exc:
            log(f"{exc}: reads under way are lost unless the kernel queues them again")

    def _processes(self) -> dict[str, Any]:
        return {
            "server": os.getpid(),
            "workers": [self._pids[slot] for slot in sorted(self._pids)],
            "workers_replaced": self._restarts,
            "keepers_replaced": self._link.keepers_replaced,
            "survives_kill": self._link.resend,
        }


def _owner(request: Mapping[str, Any]) -> str:
    return controlmessage.string(request, "owner")


def _owner_or_all(request: Mapping[str, Any]) -> str | None:
    return _owner(request) if "owner" in request else None


_LOCAL: dict[str, Callable[[LocalBlocks, Mapping[str, Any]], Any]] = {
    "fill": lambda local, request: local.fill(
        _owner(request), controlmessage.number(request, "bandwidth_bytes_per_second")
    ),
    "fills": lambda local, _: local.fills(),
    "stop_fill": lambda local, request: local.stop_fill(_owner(request)),
    "coverage": lambda local, request: local.coverage(_owner_or_all(request)),
    "layer_files": lambda local, request: local.layer_files(_owner_or_all(request)),
    "pin": lambda local, request: local.pin(_owner(request)),
    "unpin": lambda local, request: local.unpin(_owner(request)),
    "collect": lambda local, _: local.collect(),
}


def _block_answer(channel: _Channel, tag: int) -> Callable[[int | Part | Exception | None], None]:
    def done(result: int | Part | Exception | None) -> None:
        if result is None or isinstance(result, Exception):
            channel.answer(wire.Answer(tag, 0 if result is None else errno.EIO))
            return
        fd, frames = (result, framemask.WHOLE) if isinstance(result, int) else (result.fd, result.frames)
        try:
            channel.answer(wire.Answer(tag, frames=frames), fd)
        finally:
            os.close(fd)

    return done


def _answer_device(
    channel: _Channel, tag: int, device: wire.Device, pack: tuple[wire.Device, bytes] | None
) -> None:
    """A device, with the extents of its boot pack in a memfd: they may be more than a message takes."""
    if pack is None:
        channel.answer(wire.Answer(tag, 0, (device,)))
        return
    frames, extents = pack
    fd = os.memfd_create("glowplug-extents", os.MFD_CLOEXEC)
    with open(fd, "wb", buffering=0) as file:
        file.write(extents)
        channel.answer(wire.Answer(tag, 0, (device, frames)), fd)


def _errno(error: errors.ImagefsError) -> int:
    return errno.ENOENT if isinstance(error, errors.NotFoundError) else errno.EIO


def log(message: str) -> None:
    """One line to the log that the keeper opened as our standard error."""
    with contextlib.suppress(OSError):  # a full disk must not end whoever speaks
        print(f"glowplug server {os.getpid()}: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="glowplug-server", description="Serves the block devices of STATE.")
    parser.add_argument("--state", type=Path, required=True)
    arguments = parser.parse_args()
    # Blocks on their way to workers count as open here; workers inherit the limit.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        settings = control.decode_settings((arguments.state / "settings.json").read_bytes())
        Server(settings).run()
    except (errors.ImagefsError, OSError) as exc:
        log(str(exc))
        sys.exit(1)
    finally:
        sys.stderr.flush()
    os._exit(0)  # daemon threads wait in system calls; workers end with their sockets


if __name__ == "__main__":
    main()
