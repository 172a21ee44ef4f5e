"""`glowplug endpoint stress` against an endpoint that is really served: Envoy, engine supervisor, engine."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.served import Served, document, ready, serving
from tests.serving.shortpaths import short_directory

STUB = Path(__file__).parents[2] / "fixtures" / "stub_engine.py"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One replica that admits 4 requests at a time, each of 20 tokens in 0.2 s: 20 requests a second and no
    more. Promised: an answer in 1.5 s."""
    wanted = document(
        replicas=1,
        engine={
            "kind": "command",
            "command": [sys.executable, str(STUB)],
            "environment": {"TOKEN_SECONDS": "0.01"},
        },
        objectives={"p99_seconds": 1.5},
    )
    wanted["replicas"] = {"min": 1, "target_concurrency": 2, "concurrency_limit": 4}
    with short_directory() as directory, serving(directory, wanted) as found:
        found.until("ready", lambda status: len(ready(status)) == 1)
        found.until("routed", lambda _: found.answer("/echo")[0] == 200)
        yield found


def test_the_rate_that_a_replica_bears_and_why_not_more(served: Served) -> None:
    arguments = [
        "chat",
        "--from",
        "2",
        "--to",
        "400",
        "--growth",
        "6",
        "--step",
        "2s",
        "--tokens",
        "5/20",
        "--json",
    ]
    done = served.command("stress", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    conclusion, steps = found["conclusion"], found["steps"]
    assert conclusion["safe_per_second"] in (2, 12)  # a noisy machine may miss 1.5 s at 12, never at 2
    assert conclusion["per_replica"] == conclusion["safe_per_second"]
    assert steps[-1]["broken"]
    assert steps[-1]["per_second"] <= 72
    assert not steps[0]["broken"]
    assert steps[0]["tokens_per_second"] > 0


def test_for_people_and_by_a_trace(served: Served, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:15:{second:02d},3,4\n" for second in range(30))
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    done = served.command("stress", "chat", "--from", "4", "--to", "4", "--step", "1s", "--trace", str(trace))
    assert done.returncode == 0, done.stderr
    assert "1 ready; promised: p99_seconds 1.5" in done.stdout
    assert "no objective broke up to the last rate" in done.stdout
    assert "safe: 4.0 requests a second, 4.0 per replica" in done.stdout


def test_a_request_that_the_engine_does_not_know_is_no_measurement(served: Served) -> None:
    done = served.command("stress", "chat", "--to", "1", "--step", "1s", "--path", "/nothing")
    assert done.returncode == 1
    assert "3xx or 4xx" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["other"], 7, "nobody serves an endpoint 'other'"),
        (["http://example.com"], 7, "nobody serves an endpoint"),
        (["chat", "--growth", "1"], 3, "must be above 1"),
        (["chat", "--tokens", "many"], 2, "PROMPT/OUTPUT"),
        (["chat", "--step", "soon"], 3, "duration"),
    ],
)
def test_other_targets_and_wrong_arguments(
    served: Served, arguments: list[str], code: int, said: str
) -> None:
    done = served.command("stress", *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
