"""The OCI fallback tag: referrers on registries without the referrers API, written by many at once.

A registry offers no compare-and-swap on a tag, so two writers that read the same index can each replace it,
and the later PUT loses the earlier's entry. `FallbackTag.add` therefore reads, merges, writes, and reads
again after a pause that is longer than its own read and write took, with jitter, until its entry is there
after the pause; and it puts back every entry that it saw before and that was lost in the meantime.

What that guarantees: an entry can only be lost to a writer that spent longer between its read and the end
of its write than the first one's pause, and only if no third writer saw both. Writers of this program
keep that span to one GET and one PUT. A writer that stalls for seconds exactly there (a suspended machine,
a PUT that hangs in a proxy) is not covered; adding again heals it, since adding is idempotent. An entry
that somebody deletes while another is being added may come back.

Runs in the caller's thread. OCI distribution spec 1.1, "Referrers Tag Schema".
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any, Protocol

from imagefs import artifact, errors
from imagefs.origin import referrers, retry

MIN_PAUSE_SECONDS = 0.25
_PAUSE_PER_ROUND = 4.0
"""The pause as a multiple of what reading and writing took: for the other writers it is as slow as for us."""
_MAX_ROUNDS = 30


class Tags(Protocol):
    """The tag operations of one repository."""

    def get(self, tag: str) -> bytes | None:
        """The manifest behind a tag, None if there is none."""

    def put(self, tag: str, data: bytes) -> None:
        """Point a tag at the OCI index `data`, in one attempt: a second one could be a late one."""


def add(tags: Tags, subject: str, descriptor: artifact.Descriptor, policy: retry.Policy, what: str) -> None:
    """List `descriptor` under the fallback tag of `subject`; done once it is there and stayed there.
    UnavailableError if others keep overwriting it; InvalidInputError if the tag holds no index."""
    tag = referrers.fallback_tag(subject)
    seen: dict[str, Mapping[str, Any]] = {descriptor.digest: artifact.encode_descriptor(descriptor)}
    attempts = retry.Attempts(policy)
    pause_seconds = MIN_PAUSE_SECONDS
    for _ in range(_MAX_ROUNDS):
        started = time.monotonic()
        current = _read(tags, tag, what)
        seen = {str(entry["digest"]): entry for entry in current.entries()} | seen
        merged = current.with_entries(seen.values())
        if merged.digests() == current.digests():
            return
        try:
            tags.put(tag, merged.encode())
        except errors.UnavailableError as exc:
            attempts.failed(exc)
            continue
        attempts.progressed()
        pause_seconds = max(pause_seconds, _PAUSE_PER_ROUND * (time.monotonic() - started))
        time.sleep(pause_seconds * (1 + random.random()))  # noqa: S311
    raise errors.UnavailableError(
        f"{what}: other writers kept replacing tag {tag} in {_MAX_ROUNDS} rounds; try again later"
    )


def _read(tags: Tags, tag: str, what: str) -> referrers.FallbackIndex:
    data = tags.get(tag)
    if data is None:
        return referrers.EMPTY_FALLBACK
    return referrers.decode_fallback(data, f"{what}: tag {tag}")
