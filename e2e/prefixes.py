"""Routing on requests, on model units, and by sessions, where replicas remember prompts: a recorded hour.

    python -m e2e.prefixes TRACE [--replicas 8] [--busy 0.5,0.7,0.85] [--out FILE.json]

TRACE is Mooncake's (JSON lines with timestamp, input_length, output_length, hash_ids). It is replayed faster
or slower, so that without a cache the replicas would be busy for the given part of the time. A session is a
conversation: its first block after the one that all prompts begin with. The coefficients are of the size that
an 8B model on one large GPU has; `--request`, `--input`, `--output`, `--cached` are what was measured
elsewhere. Every way of routing gets the same requests. Prints a table: nothing is asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from serving.autoscaler import units
from serving.autoscaler.simulate.prefixes import Fleet, Outcome, Request, Rule, Way, run
from serving.autoscaler.units import Coefficients

_RULES = {
    "random": Rule(Way.RANDOM),
    "p2c, requests": Rule(Way.P2C),
    "p2c, units": Rule(Way.P2C, by_units=True),
    "full scan, requests": Rule(Way.FULL_SCAN),
    "full scan, units": Rule(Way.FULL_SCAN, by_units=True),
    "sticky 1.25, requests": Rule(Way.STICKY),
    "sticky 1.25, units": Rule(Way.STICKY, by_units=True),
    "sticky 2, requests": Rule(Way.STICKY, balance=2.0),
    "sticky 2, units": Rule(Way.STICKY, by_units=True, balance=2.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--busy", default="0.5,0.7,0.85")
    parser.add_argument("--cache-blocks", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--request", type=float, default=0.002, help="seconds a request")
    parser.add_argument("--input", type=float, default=4e-5, help="seconds a token")
    parser.add_argument("--cached", type=float, default=1e-6, help="seconds a token")
    parser.add_argument("--output", type=float, default=3e-4, help="seconds a token")
    parser.add_argument("--out", type=Path, help="a file for the figures")
    given = parser.parse_args()
    cost = Coefficients(given.request, given.input, given.output, given.cached)
    fleet = Fleet(given.replicas, cost, cache_blocks=given.cache_blocks)
    recorded = list(_read(given.trace))
    work = sum(units.cost(cost, each.input_tokens, each.output_tokens) for each in recorded)
    figures = []
    for busy in map(float, given.busy.split(",")):
        factor = work / (busy * given.replicas) / recorded[-1].at_seconds
        requests = [dataclasses.replace(each, at_seconds=each.at_seconds * factor) for each in recorded]
        print(f"\n{len(requests)} requests, {given.replicas} replicas, {busy:.0%} busy without a cache")
        print(f"{'':24}{'cached':>8}{'work':>8}{'p50':>8}{'p90':>8}{'p99':>8}  slowdown{'mean s':>10}")
        for name, rule in _RULES.items():
            found = _figures(run(requests, fleet, rule, given.seed), sum(_alone(requests, cost)))
            figures.append({"busy": busy, "way": name, **found})
            print(
                f"{name:24}{found['cached']:8.1%}{found['work']:8.1%}{found['p50']:8.2f}{found['p90']:8.2f}"
                f"{found['p99']:8.2f}{'':10}{found['mean_seconds']:10.2f}",
                flush=True,
            )
    if given.out is not None:
        given.out.write_text(json.dumps(figures, indent=1))


def _read(path: Path) -> Iterator[Request]:
    content = path.read_bytes()
    for line in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines():
        found = json.loads(line)
        blocks = tuple(found["hash_ids"])
        yield Request(
            found["timestamp"] / 1_000,
            blocks[1] if len(blocks) > 1 else blocks[0],
            found["input_length"],
            found["output_length"],
            blocks,
        )


def _alone(requests: list[Request], cost: Coefficients) -> Iterator[float]:
    return (units.cost(cost, each.input_tokens, each.output_tokens) for each in requests)


def _figures(found: Outcome, uncached_seconds: float) -> dict[str, float]:
    slow = found.slowdowns()
    return {
        "cached": found.cached_part,
        "work": found.work_seconds / uncached_seconds,
        "p50": slow[len(slow) // 2],
        "p90": slow[int(0.9 * len(slow))],
        "p99": slow[int(0.99 * len(slow))],
        "mean_seconds": statistics.fmean(found.latency_seconds),
    }


if __name__ == "__main__":
    main()
