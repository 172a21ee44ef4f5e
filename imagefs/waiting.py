"""Who waits for one block, with or without patience, for all of it or for some of its frames. Pure; used by
`plan.py`, which gives the patient their numbers and looks after their deadlines.
"""

from __future__ import annotations

import dataclasses
from typing import Generic, TypeVar

from imagefs import framemask

W = TypeVar("W")


@dataclasses.dataclass(frozen=True, slots=True)
class _One(Generic[W]):
    waiter: W
    frames: int  # framemask.WHOLE for the whole block
    demands: bool


class Waiting(Generic[W]):
    """See the module. Whoever is taken waits no longer."""

    def __init__(self) -> None:
        self._patient: dict[int, _One[W]] = {}
        self._impatient: list[_One[W]] = []

    def add_patient(self, number: int, waiter: W, frames: int) -> None:
        """One who demands, and waits out failures."""
        self._patient[number] = _One(waiter, frames, True)

    def add_impatient(self, waiter: W, frames: int, *, demands: bool) -> None:
        """One who gets the first failure."""
        self._impatient.append(_One(waiter, frames, demands))

    @property
    def patient(self) -> int:
        """How many of them there are."""
        return len(self._patient)

    def is_patient(self, number: int) -> bool:
        """Whether that one still waits."""
        return number in self._patient

    def demanded(self) -> bool:
        """Whether a reader waits, and not only who looks ahead."""
        return bool(self._patient) or any(one.demands for one in self._impatient)

    def first_frame(self) -> int:
        """Where the one who has been waiting longest, of the patient, wants the block to begin."""
        for one in self._patient.values():
            return next(framemask.numbers(one.frames), 0)
        return 0

    def within(self, frames: int) -> int:
        """What those want who can do with some of `frames`."""
        wanted = 0
        for one in (*self._patient.values(), *self._impatient):
            if one.frames != framemask.WHOLE and framemask.covers(frames, one.frames):
                wanted |= one.frames
        return wanted

    def take_served(self, frames: int) -> list[W]:
        """Those who can do with `frames`, some or other frames of the block."""
        served = [n for n, one in self._patient.items() if framemask.covers(frames, one.frames)]
        out = [self._patient.pop(number).waiter for number in served]
        if any(framemask.covers(frames, one.frames) for one in self._impatient):
            out += [one.waiter for one in self._impatient if framemask.covers(frames, one.frames)]
            self._impatient = [one for one in self._impatient if not framemask.covers(frames, one.frames)]
        return out

    def take_patient(self, number: int) -> W:
        """That one."""
        return self._patient.pop(number).waiter

    def take_impatient(self) -> tuple[W, ...]:
        """All of them."""
        out = tuple(one.waiter for one in self._impatient)
        self._impatient = []
        return out

    def take_all(self) -> tuple[W, ...]:
        """Everyone, the patient first."""
        out = tuple(one.waiter for one in self._patient.values()) + self.take_impatient()
        self._patient = {}
        return out
