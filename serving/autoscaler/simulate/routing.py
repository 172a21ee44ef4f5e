"""Which replica a request goes to, compiled: the ways that the router has, and some to compare them with.

`P2C` is Envoy's LEAST_REQUEST with two choices at equal weights, `LEAST` its full scan, `MAGLEV` its
consistent hash with bounded load (`hash_balance_factor`): a replica that holds more than so many times the
mean is passed over. A replica's load is the requests that it holds, or their work.
"""

from __future__ import annotations

from serving.autoscaler.simulate.compiled import compiled, inlined
from serving.autoscaler.simulate.fleet import TABLE_SIZE, Integers, Records

P2C, LEAST, ROUND_ROBIN, RANDOM, MAGLEV = 0, 1, 2, 3, 4
NAMES = {"p2c": P2C, "least": LEAST, "round-robin": ROUND_ROBIN, "random": RANDOM, "maglev": MAGLEV}


@inlined
def scattered(number: int) -> int:
    """63 bits that look random (SplitMix64's finish)."""
    bits = number & 0x7FFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 30)) * 0x3F58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 27)) * 0x14D049BB133111EB) & 0x7FFFFFFFFFFFFFFF
    return bits ^ (bits >> 31)


@inlined
def below(whole: Records, bound: int) -> int:
    """A number from 0 to below `bound`: xorshift64, and a multiplication instead of a division."""
    bits = whole[0].random
    bits ^= bits << 13
    bits ^= bits >> 7
    bits ^= bits << 17
    whole[0].random = bits
    return int((int(bits >> 33) * bound) >> 31)


@inlined
def choose(whole: Records, rows: Records, ready: Integers, table: Integers, key: int, work: float) -> int:
    """The row for a request, -1 where none is ready."""
    size = whole[0].ready
    if size == 0:
        return -1
    way = whole[0].routing
    if way == P2C:
        row = ready[below(whole, size)]
        other = ready[below(whole, size)]
        if rows[other].load < rows[row].load:
            row = other
    elif way == RANDOM:
        row = ready[below(whole, size)]
    elif way == ROUND_ROBIN:
        whole[0].cursor += 1
        row = ready[whole[0].cursor % size]
    elif way == LEAST:
        row = _least(whole, rows, ready, size)
    else:
        row = _bounded(whole, rows, ready, table, size, key, work)
    return int(row)


@compiled
def _least(whole: Records, rows: Records, ready: Integers, size: int) -> int:
    # From a random place on, or the first would get every request of an idle endpoint.
    place = below(whole, size)
    best = ready[place]
    for _ in range(size - 1):
        place = place + 1 if place + 1 < size else 0
        row = ready[place]
        if rows[row].load < rows[best].load:
            best = row
    return int(best)


@compiled
def _bounded(
    whole: Records, rows: Records, ready: Integers, table: Integers, size: int, key: int, work: float
) -> int:
    if whole[0].table_stale:
        _build_table(rows, ready, table, size)
        whole[0].table_stale = 0
    weight = work if whole[0].by_work else 1.0
    bound = whole[0].balance * (whole[0].load + weight) / size
    hashed = scattered(key + 1)
    row = table[hashed % TABLE_SIZE]
    for _ in range(4 * size):
        if rows[row].load == 0.0 or rows[row].load + weight <= bound:
            break
        hashed = scattered(hashed + 1)
        row = table[hashed % TABLE_SIZE]
    return int(row)


@compiled
def _build_table(rows: Records, ready: Integers, table: Integers, size: int) -> None:
    """Each row in turn takes the next free place in an order of places of its own."""
    table[:] = -1
    turn = [0 for _ in range(size)]
    filled = 0
    while filled < TABLE_SIZE:
        for place in range(size):
            row = ready[place]
            name = scattered(row * 7_919 + int(rows[row].created_at * 1_000.0) + 1)
            skip = scattered(name) % (TABLE_SIZE - 1) + 1
            at = (name + turn[place] * skip) % TABLE_SIZE
            while table[at] >= 0:
                turn[place] += 1
                at = (name + turn[place] * skip) % TABLE_SIZE
            table[at] = row
            filled += 1
            if filled == TABLE_SIZE:
                break
