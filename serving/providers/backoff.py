"""How long to wait before the next start of a version whose replicas fail.

Pure. The first failure of a replica that had served for a while is replaced at once; failures soon after the
start double the wait, up to a minute; a replica that becomes ready ends it.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.providers.record import Record

SETTLED_SECONDS = 60.0
"""Who served that long before it failed did not fail for how it was started."""
FIRST_SECONDS = 1.0
MOST_SECONDS = 60.0


def next_start(records: Sequence[Record]) -> float:
    """When the next replica may start, in Unix seconds; 0 is at any time. `records` are those of one
    version."""
    alive = [each.ready_at for each in records if each.ready_at is not None and each.failed_at is None]
    healthy_since = max(alive, default=0.0)
    early = [
        each.failed_at
        for each in records
        if each.failed_at is not None
        and each.failed_at > healthy_since
        and (each.ready_at is None or each.failed_at - each.ready_at < SETTLED_SECONDS)
    ]
    if not early:
        return 0.0
    return max(early) + min(MOST_SECONDS, FIRST_SECONDS * 2.0 ** (len(early) - 1))
