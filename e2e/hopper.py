"""BF16 against FP8 on one Hopper GPU: `python -m e2e.hopper MODEL_DIR --python VLLM_PYTHON`.

The same prompts (50 tokens in, 50 out, by a seed) go to vLLM as `glowplug engine` runs it: in BF16, in FP8
with a scale per output channel, and with one per tensor, both quantized while loading; with `--checkpoint`
also to what `glowplug quantize` made. Each in turn, in rounds, since one GPU holds one at a time: what drifts
does so for all. At each concurrency so many clients ask one after the other, in streams; a level is long
enough to fill and drain many times.

Prints a table (requests and output tokens a second, time to first token, ratio to BF16), writes
results/hopper.json with every round and the phases of each start. Nothing is asserted. Needs a GPU of compute
capability 9.0 and a vLLM for it; refuses anything else: FP8's figures of another GPU say nothing here.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from serving import detached, unixhttp

TOKENS = 50
LEVELS = (1, 8, 32, 64, 128, 256, 512)
_REQUESTS_PER_CLIENT = 8
_FEWEST_REQUESTS = 64
_START_SECONDS = 1_800.0
_HOPPER = (9, 0)
_ONLINE = {"bf16": (), "fp8_per_channel": ("--quantization", "fp8_per_channel")}
_ONLINE["fp8_per_tensor"] = ("--quantization", "fp8_per_tensor")


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """What vLLM is started with."""

    name: str
    model: str
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One answered request."""

    first_token_seconds: float
    seconds: float
    tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """One concurrency of one variant in one round."""

    concurrency: int
    requests_per_second: float
    tokens_per_second: float
    p50_first_token_seconds: float
    p99_first_token_seconds: float
    p99_seconds: float
    failed: int


# -- values in, values out -------------------------------------------------------------------------------


def variants(model: str, checkpoint: str | None) -> list[Variant]:
    """What is compared; BF16 first, the others are measured by it."""
    found = [Variant(name, model, ("--dtype", "bfloat16", *more)) for name, more in _ONLINE.items()]
    if checkpoint is not None:
        found.append(Variant("fp8_checkpoint", checkpoint, ("--dtype", "bfloat16")))
    return found


def prompts(count: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids, the same for everybody who says the same seed: no two alike, so that no prefix is cached."""
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(TOKENS)] for _ in range(count)]


def summary(concurrency: int, samples: Sequence[Sample], failed: int, seconds: float) -> Level:
    """Figures of one level. ValueError without a sample."""
    if not samples:
        raise ValueError(f"no request was answered at concurrency {concurrency}")
    first = [each.first_token_seconds for each in samples]
    return Level(
        concurrency,
        len(samples) / seconds,
        sum(each.tokens for each in samples) / seconds,
        quantile(first, 0.5),
        quantile(first, 0.99),
        quantile([each.seconds for each in samples], 0.99),
        failed,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """By the nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, round(share * len(ordered) + 0.5) - 1))]


def medians(rounds: Sequence[Level]) -> Level:
    """Of each figure by itself; one concurrency."""
    fields = [
        field.name for field in dataclasses.fields(Level) if field.name not in ("concurrency", "failed")
    ]
    middle = {name: statistics.median(getattr(each, name) for each in rounds) for name in fields}
    return Level(rounds[0].concurrency, **middle, failed=sum(each.failed for each in rounds))


def table(found: Mapping[str, Sequence[Level]]) -> str:
    """A line for each variant and concurrency; ratios are to the first variant's."""
    base = {each.concurrency: each.requests_per_second for each in next(iter(found.values()))}
    lines = [f"{'variant':<18}{'clients':>8}{'req/s':>10}{'ratio':>8}{'tok/s':>10}{'TTFT p50':>10}{'p99':>9}"]
    for name, levels in found.items():
        for each in levels:
            ratio = each.requests_per_second / base[each.concurrency]
            lines.append(
                f"{name:<18}{each.concurrency:>8}{each.requests_per_second:>10.1f}{ratio:>8.2f}"
                f"{each.tokens_per_second:>10.0f}{1e3 * each.p50_first_token_seconds:>8.0f}ms"
                f"{1e3 * each.p99_first_token_seconds:>7.0f}ms"
            )
    return "\n".join(lines)


def capability(said: str) -> tuple[int, int] | None:
    """Of the first GPU that `nvidia-smi --query-gpu=compute_cap --format=csv,noheader` names."""
    major, _, minor = said.strip().partition("\n")[0].strip().partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


# -- the machine -------------------------------------------------------------------------------------------


def require_hopper() -> None:
    """Ends the program where there is none."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        sys.exit("hopper: no NVIDIA GPU answers (nvidia-smi); run this on a machine with an H100 or H200")
    if capability(said) != _HOPPER:
        sys.exit(
            f"hopper: the GPU has compute capability {said.strip()}, not 9.0; FP8 is measured on a Hopper"
        )


class Engine:
    """`glowplug engine` with one variant, in a directory of its own."""

    def __init__(self, variant: Variant, python: str, directory: Path) -> None:
        self._control = directory / "engine.sock"
        settings = {
            "engine": {
                "kind": "vllm",
                "python": python,
                "arguments": [*variant.arguments, "--max-model-len", "256"],
            },
            "model": variant.model,
            "model_name": "model",
            "port": 0,
            "control": str(self._control),
            "run_directory": str(directory / "run"),
            "cache_directory": str(directory.parent / f"cache-{variant.name}"),
            "limit": 2 * max(LEVELS),
        }
        config = directory / "engine.json"
        config.write_text(json.dumps(settings))
        self._process = subprocess.Popen([*detached.GLOWPLUG, "engine", "--config", str(config)])

    def wait(self) -> tuple[str, Mapping[str, float]]:
        """URL and phases of the start, once it is ready."""
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            time.sleep(0.5)
            try:
                _, body = unixhttp.ask(self._control, "GET", "/status", timeout_seconds=5)
            except OSError:
                continue
            status = json.loads(body)
            if status["state"] == "ready":
                return f"http://127.0.0.1:{status['address'][1]}", status["phases"]
        sys.exit("hopper: the engine did not start; its log stands above")

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


async def sweep(url: str, levels: Sequence[int], vocabulary: int, seed: int) -> list[Level]:
    """All concurrencies, one after the other, after a warm-up that is not counted."""
    found = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await _level(session, url, max(levels), prompts(max(levels), vocabulary, seed - 1))
        for number, clients in enumerate(levels):
            count = max(_FEWEST_REQUESTS, _REQUESTS_PER_CLIENT * clients)
            found.append(await _level(session, url, clients, prompts(count, vocabulary, seed + number)))
    return found


async def _level(session: aiohttp.ClientSession, url: str, clients: int, asked: Sequence[list[int]]) -> Level:
    left: Iterator[list[int]] = iter(asked)
    samples: list[Sample] = []
    failed = 0

    async def client() -> None:
        nonlocal failed
        for prompt in left:
            sample = await _ask(session, url, prompt)
            if sample is None:
                failed += 1
            else:
                samples.append(sample)

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    return summary(clients, samples, failed, time.monotonic() - began)


async def _ask(session: aiohttp.ClientSession, url: str, prompt: list[int]) -> Sample | None:
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, tokens = time.monotonic(), 0.0, 0
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return None
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    first = first or time.monotonic() - began
                    # An event may carry several tokens; the last one says how many there were.
                    usage = json.loads(line[6:]).get("usage") if b'"usage"' in line else None
                    tokens = usage["completion_tokens"] if usage else tokens + 1
    except (aiohttp.ClientError, OSError):
        return None
    return Sample(first, time.monotonic() - began, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", help="a BF16 checkpoint")
    parser.add_argument("--python", default="python3", help="the interpreter that has vLLM")
    parser.add_argument("--checkpoint", help="what `glowplug quantize` made of it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS))
    parser.add_argument("--output", type=Path, default=Path("results/hopper.json"))
    options = parser.parse_args()
    require_hopper()
    config = json.loads((Path(options.model) / "config.json").read_text())
    rounds: dict[str, list[list[Level]]] = {}
    starts: dict[str, list[Mapping[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="glowplug-hopper-") as folder:
        for number in range(options.rounds):
            for variant in variants(options.model, options.checkpoint):
                directory = Path(folder) / f"{number}-{variant.name}"
                directory.mkdir()
                engine = Engine(variant, options.python, directory)
                try:
                    url, phases = engine.wait()
                    levels = asyncio.run(sweep(url, options.levels, config["vocab_size"], 1_000 * number))
                finally:
                    engine.end()
                rounds.setdefault(variant.name, []).append(levels)
                starts.setdefault(variant.name, []).append(phases)
    middle = {name: [medians(level) for level in zip(*each, strict=True)] for name, each in rounds.items()}
    print(table(middle))
    result: dict[str, Any] = {
        "tokens_in": TOKENS,
        "tokens_out": TOKENS,
        "medians": {name: [dataclasses.asdict(each) for each in levels] for name, levels in middle.items()},
        "rounds": {
            name: [[dataclasses.asdict(each) for each in levels] for levels in every]
            for name, every in rounds.items()
        },
        "start_phases": starts,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
