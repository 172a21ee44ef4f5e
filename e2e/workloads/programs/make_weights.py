"""Run while an image is built: a safetensors file of bf16 matrices with normal values.

    python3 make_weights.py FILE MATRICES

What zstd gains on these it gains on trained weights: mantissas are noise, signs even, and a few
exponents make up nearly all.
"""

import json
import pathlib
import struct
import sys

import numpy

SIDE = 4096
MATRIX_BYTES = SIDE * SIDE * 2
SCALE = 0.02
"""The standard deviation that most transformers start from, and stay near."""


def main() -> None:
    """Write FILE."""
    path, matrices = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    path.parent.mkdir(parents=True)
    entries = {
        f"model.layers.{number}.mlp.up_proj.weight": {
            "dtype": "BF16",
            "shape": [SIDE, SIDE],
            "data_offsets": [number * MATRIX_BYTES, (number + 1) * MATRIX_BYTES],
        }
        for number in range(matrices)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    random = numpy.random.default_rng(0)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for _ in range(matrices):
            values = random.standard_normal(SIDE * SIDE, dtype=numpy.float32) * numpy.float32(SCALE)
            out.write((values.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes())


if __name__ == "__main__":
    main()
