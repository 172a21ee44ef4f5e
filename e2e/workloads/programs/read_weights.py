"""Inside the `weights` image: reads a file from the first byte to the last.

    python3 read_weights.py FILE PROCESSES

Each process reads a part of its own, in order. Ends with its standard input.
"""

import itertools
import os
import sys

PIECE_BYTES = 8 << 20


def read(path: str, begin: int, end: int) -> None:
    """Read bytes `begin` to `end`."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while begin < end:
            count = file.readinto(buffer[: end - begin])
            if not count:
                sys.exit(f"{path} ends at {begin}, before {end}")
            begin += count


def main() -> None:
    """Read FILE."""
    path, processes = sys.argv[1], int(sys.argv[2])
    print("python runs", flush=True)
    size = os.path.getsize(path)
    places = [size * number // processes for number in range(processes + 1)]
    children = []
    for begin, end in itertools.pairwise(places[1:]):
        child = os.fork()
        if not child:
            read(path, begin, end)
            os._exit(0)
        children.append(child)
    read(path, 0, places[1])
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a reader failed")
    print("ready", size, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
