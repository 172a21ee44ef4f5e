"""When requests are sent, and what a step says."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.stress import arrivals, judgement, ramp

TOKENS = arrivals.Tokens(50, 50)
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_poisson_has_its_rate_and_is_the_same_for_the_same_seed() -> None:
    one, two = (arrivals.poisson(100.0, 50.0, TOKENS, random.Random(3).random) for _ in range(2))
    assert one == two
    assert 4_700 < len(one) < 5_300  # 5,000 +- 4 standard deviations
    assert all(0 <= each.at_seconds < 50 for each in one)


def trace(*gaps: float) -> arrivals.Trace:
    return arrivals.Trace(gaps, tuple(arrivals.Tokens(number, 1) for number in range(len(gaps))))


def test_a_replay_keeps_the_pattern_at_another_rate() -> None:
    replay = arrivals.Replay(trace(0.0, 0.0, 3.0))  # bursts of three, one a second at the mean
    arrived = replay.step(10.0, 1.0)
    assert [round(each.at_seconds, 6) for each in arrived] == [
        0.0,
        0.0,
        0.3,
        0.3,
        0.3,
        0.6,
        0.6,
        0.6,
        0.9,
        0.9,
        0.9,
    ]
    assert [each.tokens.prompt for each in arrived[:4]] == [0, 1, 2, 0]


def test_a_trace_file() -> None:
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,396,109\n"
    found = arrivals.parse_trace((HEAD + rows).encode(), "t.csv")
    assert (found.gaps_seconds, found.tokens) == ((1.0,), (arrivals.Tokens(396, 109),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must name the columns"),
        ("TIMESTAMP,ContextTokens\n", "must name the columns"),
        (HEAD, "a rate needs some time"),
        (HEAD + "2023-11-16,1,1\n2023-11-16,1,1\n", "a rate needs some time"),
        (HEAD + "2023-11-17,1,1\n2023-11-16,1,1\n", "line 3: earlier"),
        (HEAD + "2023-11-16,1\n", "line 2"),
        (HEAD + "soon,1,1\n", "line 2"),
        (HEAD + "2023-11-16,-1,1\n", "line 2: -1 tokens"),
        (HEAD + "2023-11-16,1,99999999999\n", "line 2: 99999999999 tokens"),
    ],
)
def test_traces_that_are_none(text: str, said: str) -> None:
    with pytest.raises(errors.DocumentError, match=said):
        arrivals.parse_trace(text.encode(), "t.csv")


@given(st.one_of(st.binary(), st.text().map(lambda text: (HEAD + text).encode("utf-8", "surrogatepass"))))
def test_a_trace_of_strangers_is_one_or_a_document_error(data: bytes) -> None:
    try:
        found = arrivals.parse_trace(data, "t.csv")
    except errors.DocumentError:
        return
    assert found.per_second > 0


def good(seconds: float, **more: float) -> judgement.Sample:
    return judgement.Sample(200, seconds, **more)  # type: ignore[arg-type]


NOTHING = judgement.Objectives()


def test_a_step_that_holds() -> None:
    objectives = judgement.Objectives(
        p99_seconds=0.1, p95_first_token_seconds=0.05, output_tokens_per_second=9
    )
    samples = [good(0.08, first_seconds=0.04, tokens=11, stream_seconds=1.0)] * 100
    step = judgement.summarize(10.0, 10.0, samples, objectives)
    assert step.broken == ()
    assert (step.median_tokens_per_second, step.tokens_per_second) == (10.0, 110.0)


@pytest.mark.parametrize(
    ("samples", "objectives", "said"),
    [
        (
            [good(0.2)] * 2 + [good(0.1)] * 98,
            judgement.Objectives(p99_seconds=0.1),
            "p99 0.200 s, promised 0.1 s",
        ),
        (
            [good(1, first_seconds=0.3)] * 6 + [good(1, first_seconds=0.1)] * 94,
            judgement.Objectives(p95_first_token_seconds=0.2),
            "p95 to the first token 0.300 s",
        ),
        (
            [good(1, tokens=6, stream_seconds=1.0)] * 9,
            judgement.Objectives(output_tokens_per_second=10),
            "the median stream got 5.0 tokens",
        ),
        ([judgement.Sample(429, 0.0)] * 2 + [good(0.1)] * 98, NOTHING, "2 of 100 requests were refused"),
        ([judgement.Sample(503, 0.0)] + [good(0.1)] * 99, NOTHING, "1 of 100 requests failed"),
        ([judgement.Sample(0, 9.0)] + [good(0.1)] * 99, NOTHING, "1 of 100 requests failed"),
        ([judgement.Sample(404, 0.0)] * 5, NOTHING, "5 requests were answered with 3xx or 4xx"),
        ([], NOTHING, "no request was due"),
    ],
)
def test_what_breaks_a_step(
    samples: list[judgement.Sample], objectives: judgement.Objectives, said: str
) -> None:
    (broken,) = judgement.summarize(10.0, 10.0, samples, objectives).broken
    assert said in broken


def test_one_in_a_hundred_may_be_refused() -> None:
    samples = [judgement.Sample(429, 0.0)] + [good(0.1)] * 99
    assert judgement.summarize(10.0, 10.0, samples, NOTHING).broken == ()


def steps(*broken: bool, late: bool = False) -> list[judgement.Step]:
    samples = [good(0.1, late_seconds=1.0 if late else 0.0)] * 10
    return [
        judgement.summarize(2.0**number, 1.0, [] if bad else samples, NOTHING)
        for number, bad in enumerate(broken)
    ]


def test_the_largest_rate_below_the_first_that_broke() -> None:
    conclusion = judgement.conclude(steps(False, False, True, False), replicas=2)
    assert (conclusion.safe_per_second, conclusion.per_replica, conclusion.trustworthy) == (2.0, 1.0, True)
    assert "at 4 requests a second" in conclusion.why


def test_none_broke_or_the_first_did() -> None:
    assert "the limit is further up" in judgement.conclude(steps(False, False), 1).why
    assert judgement.conclude(steps(True), 1).safe_per_second is None


def test_a_sender_that_is_late_says_so() -> None:
    conclusion = judgement.conclude(steps(False, late=True), 1)
    assert not conclusion.trustworthy
    assert "sender" in conclusion.why


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1))
def test_quantiles_are_values_that_were_seen(values: list[float], part: float) -> None:
    found = judgement.quantile(values, part)
    assert found in values
    assert sum(each <= found for each in values) >= part * len(values) - 1e-6


def test_rates_grow_to_the_last() -> None:
    assert ramp.Shape(1, 4, 2).rates() == [1, 2, 4]
    assert ramp.Shape(1, 5, 2).rates() == [1, 2, 4, 5]


@pytest.mark.parametrize(
    "wrong", [{"first": 0}, {"last": 0.5}, {"growth": 1.0}, {"step_seconds": 0}, {"first": float("nan")}]
)
def test_ramps_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(errors.DocumentError):
        ramp.Shape(**{"first": 1.0, "last": 2.0, **wrong})
