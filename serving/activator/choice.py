"""Which replica a released request goes to: the less busy of two, by what the activator itself has in flight.
Pure.

Owned by one `proxy.Proxy`, in its event loop. A replica takes part from its first good probe on, until it is
taken out of the endpoints or could not be reached.
"""

from __future__ import annotations

from collections.abc import Collection

Place = tuple[str, int]
"""IP address and port."""


class Replicas:
    """The replicas of one service. `limit`: requests in flight from here to each, so that the first replica
    that is up is not handed everything that was held."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._up: dict[Place, bool] = {}
        self._in_flight: dict[Place, int] = {}

    def replace(self, places: Collection[Place]) -> None:
        """The replicas that there are; what is in flight to others goes on."""
        self._up = {place: self._up.get(place, False) for place in places}

    def to_probe(self) -> list[Place]:
        """Those of which it is not known that they are up."""
        return [place for place, up in self._up.items() if not up]

    def mark(self, place: Place, *, up: bool) -> None:
        """What a probe or a request found. Nothing, where the replica was taken out meanwhile."""
        if place in self._up:
            self._up[place] = up

    def take(self, first: float, second: float) -> Place | None:
        """Count one more request to the replica chosen by two numbers from 0 to below 1, and name it; None
        while none that is up has room. `give_back` ends it."""
        free = [place for place, up in self._up.items() if up and self._in_flight.get(place, 0) < self._limit]
        if not free:
            return None
        one, other = free[int(first * len(free))], free[int(second * len(free))]
        place = min(one, other, key=lambda each: self._in_flight.get(each, 0))
        self._in_flight[place] = self._in_flight.get(place, 0) + 1
        return place

    def give_back(self, place: Place) -> None:
        """A request that was taken there has ended."""
        left = self._in_flight[place] - 1
        if left:
            self._in_flight[place] = left
        else:
            del self._in_flight[place]

    @property
    def in_flight(self) -> int:
        """Requests that were released and have not ended."""
        return sum(self._in_flight.values())
