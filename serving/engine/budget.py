"""Tenants' budgets: one small file in shared memory, in which all processes of one engine charge requests.

Owns the file's layout (`wordfile` maps and locks it) and the rule of the buckets. The supervisor creates it
and writes what each tenant may have (`ration`); server processes charge (`admit`, `settle`). The lock is held
for microseconds; needs nothing but Python's library. What was charged for a request whose process was killed
stays charged.

A bucket holds at most `BURST_SECONDS` of its rate and fills evenly. A request is let in when what it is
expected to cost is there, or the bucket is full: one that costs more than a bucket holds would never get in
otherwise. It takes its whole cost, so that a bucket may be in debt, which is paid before the next one. So
over any time a tenant gets at most rate * time + one bucket + what the requests in flight cost more than was
expected, and the last is clamped by the bound on an answer's length.

    header, 16 words: magic, generation of names, flags, most output tokens, four coefficients, bytes per
                      token, part of the input that is cached
    tenant, 16 words: digest of the name (2), measure, priority, rate, balance, filled at, mean output, then
                      what was admitted, charged, refused
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

from serving import errors
from serving.autoscaler import units
from serving.engine import tokens, wordfile
from serving.engine.state import Measure, Ration, Rations, Spent

TENANTS = 1_023
BURST_SECONDS = 1.0
_WORDS = 16
_MAGIC = 0x31676477_6F6C4732
_COUNT = _WORDS * (TENANTS + 2)

_GENERATION, _FLAGS, _MOST_OUTPUT, _COEFFICIENTS, _BYTES_PER_TOKEN, _CACHED = 1, 2, 3, 4, 8, 9
_NAME, _MEASURE, _PRIORITY, _RATE, _BALANCE, _FILLED, _MEAN = 0, 2, 3, 4, 5, 6, 7
_ADMITTED, _CHARGED, _REFUSED, _REFUSED_COST = 8, 9, 10, 11

_FIRST_BYTES_PER_TOKEN = 4.0
"""Of English text with the tokenizers of today; from then on what was measured here."""
_WEIGHT = 0.05
"""Of the latest request in the means."""
_IN_USE, _HAS_UNITS = 1, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, and when to ask again."""

    measure: Measure
    per_second: float
    retry_after_seconds: float


class Budget:
    """The mapped file. Place 0 is everybody who is not named."""

    def __init__(self, path: Path) -> None:
        """Map an existing one. OSError where there is none; ValueError where it is something else."""
        self._file = wordfile.WordFile(path, _MAGIC, _COUNT, "budget")
        self._words, self._whole, self._real = self._file.words, self._file.whole, self._file.real
        self._places: dict[str, int] = {}
        self._generation = -1

    @classmethod
    def create(cls, path: Path) -> Budget:
        """A new one, in which nobody is limited."""
        wordfile.create(path, _MAGIC, _COUNT)
        budget = cls(path)
        budget._real[_BYTES_PER_TOKEN] = _FIRST_BYTES_PER_TOKEN
        budget._real[_WORDS + _MEAN] = -1.0
        return budget

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    # -- the supervisor's side --------------------------------------------------------------------

    def ration(self, given: Rations, now_ns: int) -> None:
        """In force for the next request. Who keeps a rate keeps the balance; who is new begins with a full
        bucket; who is not named any more is forgotten. DocumentError."""
        if len(given.tenants) > TENANTS:
            raise errors.DocumentError(f"tenants: {len(given.tenants)} are more than {TENANTS}")
        with self._file.locked():
            places = {name: self.place(name) for name in given.tenants}
            kept = set(places.values()) - {0}
            free = [place for place in range(1, TENANTS + 1) if place not in kept]
            cleared = sum(self._clear(place) for place in free)
            for name, ration in given.tenants.items():
                place = places[name]
                if not place:
                    place = free.pop(0)
                    start = self._start(place)
                    self._words[start], self._words[start + 1] = _digest(name)
                    self._real[start + _MEAN] = -1.0
                self._give(self._start(place), ration, now_ns)
            self._whole[_MOST_OUTPUT] = -1 if given.output_tokens is None else given.output_tokens
            by = given.coefficients
            if by is not None:
                numbers = (by.request, by.input, by.output, by.cached)
                for at, number in enumerate(numbers, _COEFFICIENTS):
                    self._real[at] = number
            in_use = given.tenants or given.output_tokens is not None or by is not None
            self._words[_FLAGS] = (_IN_USE if in_use else 0) | (0 if by is None else _HAS_UNITS)
            self._words[_GENERATION] += cleared > 0 or len(kept) < len(places)

    def spent(self, tenant: str) -> Spent:
        """NotFoundError for whom nothing was said of."""
        place = self.place(tenant)
        if not place:
            raise errors.NotFoundError(f"tenants: {tenant} has no ration")
        start = self._start(place)
        return Spent(
            self._words[start + _ADMITTED],
            self._real[start + _CHARGED],
            self._words[start + _REFUSED],
            self._real[start + _REFUSED_COST],
        )

    # -- a server process's side ---------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether requests must be looked at at all."""
        return bool(self._words[_FLAGS] & _IN_USE)

    @property
    def coefficients(self) -> units.Coefficients | None:
        """Of units, where they are counted."""
        if not self._words[_FLAGS] & _HAS_UNITS:
            return None
        request, input_, output, cached = self._real[_COEFFICIENTS : _COEFFICIENTS + 4]
        return units.Coefficients(request, input_, output, cached)

    @property
    def bytes_per_token(self) -> float:
        """Of text, as it was lately."""
        return self._real[_BYTES_PER_TOKEN]

    def place(self, tenant: str | None) -> int:
        """Where a tenant's bucket is; 0 for who is not named."""
        if tenant is None:
            return 0
        if self._generation != self._words[_GENERATION]:
            self._generation = self._words[_GENERATION]
            self._places.clear()
        found = self._places.get(tenant)
        if found is None:
            found = self._find(tenant)
            if len(self._places) < TENANTS:  # names that nobody gave a ration to are not kept without end
                self._places[tenant] = found
        return found

    def terms(self, place: int) -> tokens.Terms:
        """What a tenant's requests may say."""
        most = self._whole[_MOST_OUTPUT] if self.in_use else -1
        return tokens.Terms(self._whole[self._start(place) + _PRIORITY], None if most < 0 else most)

    def measure(self, place: int) -> Measure:
        """What a tenant's rate counts."""
        return Measure(self._words[self._start(place) + _MEASURE])

    def limited(self, place: int) -> bool:
        """Whether the tenant has a rate."""
        return self._real[self._start(place) + _RATE] > 0

    def expected(self, place: int, reading: tokens.Reading) -> tokens.Usage:
        """What a request will have used, as far as one can know: its text by the bytes that a token has had
        here, its answer by the tenant's mean, below its bound."""
        given = reading.input_tokens + reading.input_bytes / self.bytes_per_token
        mean = self._real[self._start(place) + _MEAN]
        most = reading.output_tokens
        made = (most or 0) if mean < 0 else mean if most is None else min(mean, most)
        return tokens.Usage(round(given), round(made), round(given * self._real[_CACHED]))

    def admit(self, place: int, cost: float, now_ns: int) -> Refusal | None:
        """Take a request's cost from the bucket, or say why not."""
        start = self._start(place)
        with self._file.locked():
            rate = self._real[start + _RATE]
            if rate > 0:
                self._fill(start, now_ns)
                missing = min(cost, rate * BURST_SECONDS) - self._real[start + _BALANCE]
                if missing > 1e-9 * rate:
                    self._words[start + _REFUSED] += 1
                    self._real[start + _REFUSED_COST] += cost
                    return Refusal(Measure(self._words[start + _MEASURE]), rate, missing / rate)
                self._real[start + _BALANCE] -= cost
            self._words[start + _ADMITTED] += 1
            self._real[start + _CHARGED] += cost
        return None

    def settle(self, place: int, more: float, now_ns: int) -> None:
        """A request cost that much more than it was charged, or less."""
        start = self._start(place)
        with self._file.locked():
            self._real[start + _CHARGED] += more
            if self._real[start + _RATE] > 0:
                self._fill(start, now_ns)
                self._real[start + _BALANCE] -= more

    def learn(self, place: int, reading: tokens.Reading, used: tokens.Usage) -> None:
        """What an answer's usage says of the next one's."""
        with self._file.locked():
            if reading.input_bytes and used.input > reading.input_tokens:
                ratio = reading.input_bytes / (used.input - reading.input_tokens)
                self._real[_BYTES_PER_TOKEN] += _WEIGHT * (ratio - self._real[_BYTES_PER_TOKEN])
            if used.input:
                self._real[_CACHED] += _WEIGHT * (used.cached / used.input - self._real[_CACHED])
            at = self._start(place) + _MEAN
            mean = self._real[at]
            self._real[at] = used.output if mean < 0 else mean + _WEIGHT * (used.output - mean)

    # -- the layout ------------------------------------------------------------------------------------

    def _give(self, start: int, ration: Ration, now_ns: int) -> None:
        before = self._real[start + _RATE]
        rate = ration.per_second or 0.0
        if ration.measure != self._words[start + _MEASURE]:
            before = 0.0
        if before > 0 and rate > 0:
            self._fill(start, now_ns)
            self._real[start + _BALANCE] = min(self._real[start + _BALANCE], rate * BURST_SECONDS)
        else:
            self._real[start + _BALANCE] = rate * BURST_SECONDS
            self._words[start + _FILLED] = now_ns
        self._real[start + _RATE] = rate
        self._words[start + _MEASURE] = ration.measure
        self._whole[start + _PRIORITY] = ration.priority

    def _fill(self, start: int, now_ns: int) -> None:
        rate = self._real[start + _RATE]
        seconds = max(0, now_ns - self._words[start + _FILLED]) / 1e9
        self._words[start + _FILLED] = max(now_ns, self._words[start + _FILLED])
        self._real[start + _BALANCE] = min(
            rate * BURST_SECONDS, self._real[start + _BALANCE] + rate * seconds
        )

    def _find(self, tenant: str) -> int:
        wanted = _digest(tenant)
        names = self._words[2 * _WORDS + _NAME :: _WORDS]
        for place, high in enumerate(names, 1):
            if high == wanted[0] and self._words[self._start(place) + 1] == wanted[1]:
                return place
        return 0

    def _clear(self, place: int) -> bool:
        """Whether there was somebody."""
        start = self._start(place)
        if not (self._words[start] or self._words[start + 1]):
            return False
        for word in range(_WORDS):
            self._words[start + word] = 0
        return True

    @staticmethod
    def _start(place: int) -> int:
        return _WORDS * (place + 1)


def _digest(name: str) -> tuple[int, int]:
    found = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(found[:8], sys.byteorder), int.from_bytes(found[8:16], sys.byteorder)
