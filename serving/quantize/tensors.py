"""What a checkpoint holds, by the headers of its safetensors files. Pure: bytes in, values out.

Spec: safetensors, format 0.4: 8 bytes little-endian header length, a JSON object, the data. A header comes
from outside: nothing of the size that it claims is allocated before the claim was compared with the file's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from serving import errors

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100 << 20
"""The format's own limit."""

_ELEMENT_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}
WEIGHTS = frozenset(("F32", "F16", "BF16"))
"""Types of weights that can be made FP8."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: `begin` and `end` are its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


def header_bytes(prefix: bytes, file_bytes: int, where: str) -> int:
    """The length of the header that a file's first 8 bytes announce. DocumentError."""
    if len(prefix) < PREFIX_BYTES:
        raise errors.DocumentError(f"{where}: {len(prefix)} bytes, too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix[:PREFIX_BYTES])
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES):
        raise errors.DocumentError(
            f"{where}: claims a header of {length} bytes in a file of {file_bytes}; it is damaged, or no "
            "safetensors file: fetch it again, or convert the checkpoint to safetensors"
        )
    return int(length)


def decode(header: bytes, file_bytes: int, where: str) -> dict[str, Tensor]:
    """The tensors of one file by name, from its header. DocumentError naming the tensor."""
    try:
        document = json.loads(header)
    except (ValueError, RecursionError) as exc:
        raise errors.DocumentError(f"{where}: its header is not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise errors.DocumentError(f"{where}: its header is not a JSON object")
    data = PREFIX_BYTES + len(header)
    found = {
        name: _decode_tensor(entry, data, file_bytes, f"{where}: tensor {name}")
        for name, entry in document.items()
        if name != "__metadata__"
    }
    end = data
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise errors.DocumentError(f"{where}: tensor {name}: begins at {tensor.begin}, not at {end}")
        end = tensor.end
    if end != file_bytes:
        raise errors.DocumentError(f"{where}: its tensors end at {end}, the file at {file_bytes}")
    return found


def _decode_tensor(entry: object, data: int, file_bytes: int, where: str) -> Tensor:
    if not isinstance(entry, Mapping):
        raise errors.DocumentError(f"{where}: not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    place: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BITS:
        raise errors.DocumentError(f"{where}: dtype {str(dtype)[:40]!r} is not known")
    if not _counts(shape) or not _counts(place) or len(place) != 2:
        raise errors.DocumentError(f"{where}: shape and data_offsets must be lists of numbers from 0 on")
    begin, end = place
    if not begin <= end <= file_bytes - data:
        raise errors.DocumentError(f"{where}: bytes {begin} to {end} lie outside the file")
    if math.prod(shape) * _ELEMENT_BITS[dtype] != (end - begin) * 8:
        raise errors.DocumentError(f"{where}: {end - begin} bytes do not make {dtype} of {shape}")
    return Tensor(dtype, tuple(shape), data + begin, data + end)


def _counts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(each) is int and 0 <= each < 1 << 48 for each in value)
    )
