"""The fetch plan's figures: how much may be in flight, how large a request is, when to try again. Pure; used
by `plan.py`, whose rules say what they mean.
"""

from __future__ import annotations

import dataclasses

from imagefs import readahead


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """Limits on fetches in flight, requests and retries.

    `connections` bounds the whole, `connections_per_origin` and `connections_per_layer` one origin and one
    layer; of each of the three, `demand_connections` are for demands only, but never the last one.
    Read-ahead gets `read_ahead_connections` of an origin: two keep a link of 1 Gbit/s full for a sequential
    reader (388 MB/s of image; one connection: 281), more do not start `import torch` any sooner, and neither
    did starting none while a demand was in flight. Fill, which nobody waits for, gets `fill_connections` of
    an origin, and none while that origin is fetching a demand; what is in flight when a demand comes is what
    the demand has to share the link with, so that it is one small request: at 1 Gbit/s a demand of 1.5 MB
    took 17 ms without a fill, 19 with, 35 with three connections of 4 MiB, and the fill 72 MB/s instead of
    85. An origin whose last fetch failed gets `failing_connections`, so that dead ones cannot use up the
    whole. `request_bytes` bounds one request that takes neighbours along (compressed) for boot,
    `fill_request_bytes` for fill, `read_ahead_request_bytes` for read-ahead: a file of weights has 3.3 MB a
    block, and each request costs Debian's registry 9 ms of processor time beside its bytes (2 GB read in
    order: 247 requests of 8 MiB at most took it 3.0 s, 119 of 16 MiB 2.0 s, 95 of 32 MiB 1.8 s); it takes
    neighbours only behind a reader that has proved to be sequential. Pauses between tries of a failing layer
    grow from `retry_seconds` to `retry_max_seconds`; `denied_retry_seconds` is the least pause after refused
    credentials; Retry-After is honoured up to `retry_after_max_seconds`, so that no origin puts off reads for
    good. `corrupt_attempts` is how often a block is fetched whose bytes are wrong.
    """

    connections: int = 32
    connections_per_origin: int = 8
    connections_per_layer: int = 6
    demand_connections: int = 2
    read_ahead_connections: int = 2
    fill_connections: int = 1
    failing_connections: int = 2
    request_bytes: int = 2 * 1024 * 1024
    read_ahead_request_bytes: int = 16 * 1024 * 1024
    fill_request_bytes: int = 2 * 1024 * 1024
    retry_seconds: float = 0.1
    retry_max_seconds: float = 3.0
    denied_retry_seconds: float = 5.0
    retry_after_max_seconds: float = 60.0
    corrupt_attempts: int = 3
    read_ahead: readahead.ReadAheadPolicy = dataclasses.field(default_factory=readahead.ReadAheadPolicy)
