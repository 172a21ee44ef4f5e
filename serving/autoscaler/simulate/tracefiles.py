"""Traces of real traffic: files in, `traffic` out.

Called by `scenarios`. Formats: the CSV of Azure's LLM inference traces (TIMESTAMP, ContextTokens,
GeneratedTokens), Mooncake's JSON lines (timestamp in ms, input_length, output_length), and rates in bins as
CSV (start_s, total_rate_rps). Plain, or compressed by gzip if the name ends in `.gz`. What does not parse is
a DocumentError with file and line; a file that cannot be read is a ConfigurationError.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np

from serving import errors
from serving.autoscaler.simulate.fleet import Floats
from serving.autoscaler.simulate.traffic import STEADY, Burstiness, Lognormal, Rates, Replay, TokenCost
from serving.stress import arrivals

_MAX_BYTES = 256 << 20
_MAX_TOKENS = 10_000_000
_MAX_RATE = 1e6


def azure(path: Path, name: str, cost: TokenCost, copies: int = 1, jitter_seconds: float = 2.0) -> Replay:
    """A replay of an Azure trace."""
    trace = arrivals.parse_trace(read(path), str(path))
    # `parse_trace` gives gaps, the first before the second request: the first request itself is dropped.
    at = np.cumsum(trace.gaps_seconds)
    prompts = np.array([each.prompt for each in trace.tokens])
    outputs = np.array([each.output for each in trace.tokens])
    return Replay(name, at, cost.work(prompts, outputs), copies, jitter_seconds)


def mooncake(path: Path, name: str, cost: TokenCost, copies: int = 1, jitter_seconds: float = 2.0) -> Replay:
    """A replay of a Mooncake trace."""
    at, prompts, outputs = [], [], []
    for number, line in enumerate(read(path).splitlines(), 1):
        try:
            request = json.loads(line)
            moment = float(request["timestamp"])
            prompt, output = int(request["input_length"]), int(request["output_length"])
            if not (0 <= moment < math.inf and 0 <= prompt <= _MAX_TOKENS and 0 <= output <= _MAX_TOKENS):
                raise ValueError("a number is out of range")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
            raise errors.DocumentError(f"{path}: line {number}: {exc}") from exc
        at.append(moment / 1_000)
        prompts.append(prompt)
        outputs.append(output)
    moments = np.array(at, np.float64)
    if not moments.size or np.any(np.diff(moments) < 0):
        raise errors.DocumentError(f"{path}: requests must be there, and in order of time")
    work = cost.work(np.array(prompts), np.array(outputs))
    return Replay(name, moments - moments[0], work, copies, jitter_seconds)


def rates(path: Path, name: str, work: Lognormal, burstiness: Burstiness = STEADY) -> Rates:
    """Traffic of the rates in a file: each is its bin's, and stands in the middle of it."""
    try:
        rows = list(csv.DictReader(io.StringIO(read(path).decode()), strict=True))
    except (UnicodeDecodeError, csv.Error) as exc:
        raise errors.DocumentError(f"{path}: not a CSV file: {exc}") from exc
    starts, values = [], []
    for number, row in enumerate(rows, 2):
        try:
            start, rate = float(row["start_s"]), float(row["total_rate_rps"])
        except (KeyError, TypeError, ValueError) as exc:
            raise errors.DocumentError(
                f"{path}: line {number}: start_s and total_rate_rps must be numbers: {exc!r}"
            ) from exc
        if not (0 <= start < math.inf and 0 <= rate <= _MAX_RATE):
            raise errors.DocumentError(f"{path}: line {number}: {start} s, {rate} a second: out of range")
        starts.append(start)
        values.append(rate)
    if len(starts) < 2 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise errors.DocumentError(f"{path}: needs two bins or more, in order of time")
    at = np.array(starts)
    at[:-1] += np.diff(at) / 2
    at[-1] += at[-1] - at[-2] if len(at) > 2 else 0
    return Rates(name, at, np.array(values), work, burstiness)


def window(whole: Rates, begin_seconds: float, end_seconds: float) -> Rates:
    """The part of the traffic between two moments."""
    inside = (whole.at_seconds > begin_seconds) & (whole.at_seconds < end_seconds)
    at: Floats = np.concatenate(([begin_seconds], whole.at_seconds[inside], [end_seconds]))
    found = np.interp(at, whole.at_seconds, whole.per_second)
    return Rates(whole.name, at, found, whole.work, whole.burstiness)


def read(path: Path) -> bytes:
    """A file's bytes, decompressed; at most 256 MiB."""
    try:
        with path.open("rb") as plain:
            if path.suffix != ".gz":
                found = plain.read(_MAX_BYTES + 1)
            else:
                with gzip.open(plain) as packed:
                    found = packed.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as exc:
        raise errors.ConfigurationError(f"{path}: cannot be read: {exc}") from exc
    if len(found) > _MAX_BYTES:
        raise errors.DocumentError(f"{path}: larger than {_MAX_BYTES} bytes")
    return found
