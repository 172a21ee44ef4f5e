"""Sets of the frames of one block, as the bits of an int: bit n is frame n. Pure.

A block has 4096 frames at the most (16 MiB in frames of 4 KiB). Said by workers of what a READ needs, by the
server of what is valid in the file of a block that is still arriving, and by the plan of who waits for what.
The empty set stands for the whole block where somebody waits or is answered: nobody waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

WHOLE = 0


def touched(start: int, length: int, frame_bytes: int) -> int:
    """The frames that hold `length` bytes, one or more, of a block from its byte `start`."""
    first = start // frame_bytes
    end = (start + length - 1) // frame_bytes + 1
    return (1 << end) - (1 << first)


def covers(valid: int, needed: int) -> bool:
    """Whether an answer that says `valid` has all frames that are `needed`; both may be WHOLE."""
    return valid == WHOLE or (needed != WHOLE and not needed & ~valid)


def numbers(frames: int) -> Iterator[int]:
    """The frames, ascending."""
    while frames:
        lowest = frames & -frames
        yield lowest.bit_length() - 1
        frames ^= lowest
