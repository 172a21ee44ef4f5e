"""Rendezvous hashing: which member is home to a key, agreed on by everybody who knows the same members.

Pure. Called by `peers.py` with a block's digest. Each member draws a number for the key, and the highest
wins: so every member gets its share, and a member that leaves gives up its own keys only, each to the one
that was second for it. A key costs one short hash per member: 0.4 ms with 500.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def home(key: bytes, members: Iterable[str]) -> str | None:
    """The member that `key` belongs to, whatever order they come in; None without members."""
    return max(members, key=lambda member: _draw(key, member), default=None)


def _draw(key: bytes, member: str) -> tuple[bytes, str]:
    # The name decides between equal numbers, so that no two nodes ever disagree.
    return hashlib.blake2b(key, digest_size=8, key=_salt(member)).digest(), member


def _salt(member: str) -> bytes:
    name = member.encode()
    return name if len(name) <= hashlib.blake2b.MAX_KEY_SIZE else hashlib.blake2b(name).digest()
