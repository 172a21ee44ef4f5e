"""Capacity of one machine that its endpoints share: `capacity.yaml` in their state directory.

Each server of an endpoint calls `Share.turn` from its loop. About once a second it says, under a lock, what
its endpoint wants and has, and learns what it is granted (`autoscaler.capacity` decides): so there is nobody
who must be running for the others, and all see the same claims. Without the file there is no bound; to an
endpoint that the file does not name nothing is guaranteed, and its weight is 1.

The claim of a server that was killed stays as it was, because its replicas go on; it is dropped when the
endpoint ends (`leave`), or its folder is gone. A file that turned bad keeps what it said before, and is said
once.

    places: 8                 # GPUs, say: as many as there are
    notice_seconds: 30        # before capacity is taken back
    step_percent: 25          # of what is too much, at each decision
    endpoints:
      chat: {guaranteed: 6, floor: 1, weight: 2, places: 1}    # replicas; places: of each of them
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import pydantic
import yaml
from pydantic import Field

from serving import errors, wholefile
from serving.autoscaler import capacity

FILE = "capacity.yaml"
_CLAIMS, _LOCK = "capacity.json", "capacity.lock"
_TURN_SECONDS = 1.0

_log = logging.getLogger(__name__)
_Count = Annotated[int, Field(ge=0, le=1_000_000)]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class _Endpoint(_Part):
    guaranteed: _Count = 0
    floor: _Count = 0
    weight: float = Field(default=1.0, gt=0, le=1e6, strict=False)
    places: int = Field(default=1, ge=1, le=1_000_000)


class _Document(_Part):
    places: _Count
    notice_seconds: float = Field(default=30.0, ge=0, le=86_400, strict=False)
    step_percent: float = Field(default=25.0, gt=0, le=100, strict=False)
    endpoints: Mapping[str, _Endpoint] = {}


class _Claim(_Part):
    """What a server said last, as it stands in the claims' file."""

    wants: _Count
    holds: _Count
    notice_at: float | None = None


_CLAIMS_OF = pydantic.TypeAdapter(dict[str, _Claim])


class Share:
    """One endpoint's. Used by one thread. `clock` is the machine's monotonic one."""

    def __init__(self, directory: Path, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._name, self._clock = directory, name, clock
        self._document: _Document | None = None
        self._stamp: tuple[int, int] | None = None
        self._asked_at: float | None = None
        self._granted: int | None = None

    def turn(self, wants: int, holds: int) -> int | None:
        """How many replicas the endpoint may have now; None where nothing bounds them. DocumentError for a
        file that was never good."""
        now = self._clock()
        if self._asked_at is None or not 0 <= now - self._asked_at < _TURN_SECONDS:
            document = self._read()
            self._granted = None if document is None else self._ask(document, wants, holds, now)
            self._asked_at = now
        return self._granted

    def leave(self) -> None:
        """The endpoint has ended: what it had is free."""
        if (self._directory / _CLAIMS).exists():
            with self._alone():
                claims = self._claims()
                if claims.pop(self._name, None) is not None:
                    self._write(claims)

    def _ask(self, document: _Document, wants: int, holds: int, now: float) -> int:
        with self._alone():
            claims = {
                name: each for name, each in self._claims().items() if (self._directory / name).is_dir()
            }
            before = claims.get(self._name)
            claims[self._name] = _Claim(
                wants=wants, holds=holds, notice_at=None if before is None else before.notice_at
            )
            policy = capacity.Policy(document.notice_seconds, document.step_percent)
            notices = {name: each.notice_at for name, each in claims.items() if each.notice_at is not None}
            made = [
                capacity.Claim(
                    name, each.wants, each.holds, **document.endpoints.get(name, _Endpoint()).model_dump()
                )
                for name, each in claims.items()
            ]
            grants = capacity.decide(document.places, made, notices, now, policy)
            mine = grants[self._name]
            # A place that was granted is taken from now on: who asks next must not be given it, too.
            claims[self._name] = _Claim(
                wants=wants, holds=max(holds, mine.replicas), notice_at=mine.notice_at
            )
            self._write(claims)
        return mine.replicas

    def _claims(self) -> dict[str, _Claim]:
        """A file that cannot be read is nobody's claim: everybody says theirs again within a second."""
        try:
            return _CLAIMS_OF.validate_json((self._directory / _CLAIMS).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as exc:
            _log.warning("%s: %s; it is made anew", self._directory / _CLAIMS, exc)
            return {}

    def _write(self, claims: Mapping[str, _Claim]) -> None:
        wholefile.write(
            self._directory / _CLAIMS,
            json.dumps({name: each.model_dump() for name, each in claims.items()}),
        )

    def _read(self) -> _Document | None:
        file = self._directory / FILE
        try:
            found = os.stat(file)
            stamp = (found.st_mtime_ns, found.st_size)
            if stamp != self._stamp:
                self._stamp = stamp
                self._document = _Document.model_validate(yaml.safe_load(file.read_text()))
        except FileNotFoundError:
            self._stamp = self._document = None
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
            what = f"{file}: {exc}; write `places: N`, and below `endpoints` what each is to have"
            if self._document is None:
                self._stamp = None
                raise errors.DocumentError(what) from exc
            _log.error("%s; what it said before holds", what)
        return self._document

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
