"""Traffic: the rates that are asked for, whole traces, the same for a seed; and files that are not traces."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.autoscaler.simulate import tracefiles, traffic
from serving.autoscaler.simulate.traffic import Burstiness, Exponential, Lognormal, Replay, TokenCost, Traffic

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE += "".join(f"2023-11-16 18:15:{second:02d}.5,100,{second}\n" for second in range(50))


def whole(found: Traffic, seed: int = 1) -> traffic.Arrivals:
    blocks = list(found.blocks(seed))
    return traffic.Arrivals(*(np.concatenate(column) for column in zip(*blocks, strict=True)))


def test_arrivals_follow_the_rate_in_every_part_of_it_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "_BLOCK_REQUESTS", 7_000)
    found = traffic.shape("up", [(0, 100), (100, 100), (200, 1_000)], Lognormal(1.0))
    arrivals = whole(found)
    assert (np.diff(arrivals.at) >= 0).all()
    assert arrivals.at[0] >= 0
    assert arrivals.at[-1] <= 200
    for begin, end, rate in ((0, 100, 100.0), (100, 110, 145.0), (190, 200, 955.0)):
        counted = np.count_nonzero((arrivals.at >= begin) & (arrivals.at < end))
        expected = rate * (end - begin)
        assert abs(counted - expected) < 4 * expected**0.5


def test_arrivals_are_poisson_in_a_second_and_more_than_that_where_bursts_are_asked_for() -> None:
    def dispersion(burstiness: Burstiness) -> float:
        arrivals = whole(traffic.shape("flat", [(0, 200), (3_000, 200)], Lognormal(1.0), burstiness))
        counts = np.bincount(arrivals.at.astype(int))
        return float(counts.var() / counts.mean())

    assert dispersion(traffic.STEADY) == pytest.approx(1.0, abs=0.15)
    # Variance 200 of chance, and 200 ** 2 * 0.2 ** 2 of the rate's.
    assert dispersion(Burstiness(0.2, 10.0)) == pytest.approx(1 + 200 * 0.2**2, rel=0.35)


@pytest.mark.parametrize("work", [Lognormal(0.7, 2.0), Exponential(0.7), Lognormal(0.7, 0.0)])
def test_work_has_its_mean(work: Lognormal | Exponential) -> None:
    assert work.draw(np.random.default_rng(1), 200_000).mean() == pytest.approx(0.7, rel=0.03)


def test_a_seed_is_one_traffic_and_another_seed_another() -> None:
    found = traffic.diurnal("day", 5.0, 0.5, 3_600, Lognormal(1.0), Burstiness(0.3))
    one, same, other = whole(found, 1), whole(found, 1), whole(found, 2)
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert one.at.size != other.at.size


def test_an_exponential_ramp_multiplies_by_the_same_in_each_second() -> None:
    ramp = traffic.shape("ramp", [(0, 10), (60, 10_000)], Lognormal(1.0), exponential=True)
    rates = np.interp([0, 20, 40, 60], ramp.at_seconds, ramp.per_second)
    assert rates == pytest.approx([10, 100, 1_000, 10_000], rel=1e-9)


def test_every_request_of_a_trace_is_replayed_as_often_as_asked_near_its_moment() -> None:
    moments = np.array([0.0, 0.5, 40.0, 100.0])
    replay = Replay("four", moments, np.array([1.0, 2.0, 3.0, 4.0]), copies=50, jitter_seconds=2.0)
    arrivals = whole(replay)
    assert arrivals.at.size == 200
    assert (np.diff(arrivals.at) >= 0).all()
    assert arrivals.at[0] >= 0
    assert arrivals.at[-1] <= 100
    for key, moment in enumerate(moments):
        mine = arrivals.key == key
        assert np.count_nonzero(mine) == 50
        assert (np.abs(arrivals.at[mine] - moment) <= 2.0).all()
        assert (arrivals.work[mine] == key + 1.0).all()
    alone = whole(Replay("once", moments, np.ones(4)))
    assert (alone.at == moments).all()


def test_in_flight_is_what_began_and_has_not_ended() -> None:
    replay = Replay("two", np.array([0.5, 2.5, 9.0]), np.array([3.0, 1.0, 0.0]))
    assert traffic.in_flight(replay, 1)[:6].tolist() == [0, 1, 1, 2, 0, 0]


def test_traces_in_their_formats(tmp_path: Path) -> None:
    packed = tmp_path / "azure.csv.gz"
    packed.write_bytes(gzip.compress(AZURE.encode()))
    replay = tracefiles.azure(packed, "azure", TokenCost(0.0, 0.001, 0.1))
    assert replay.seconds == 49
    assert replay.work[9] == pytest.approx(0.1 + 0.1 * 10)

    lines = [{"timestamp": 500 * n, "input_length": 10, "output_length": n} for n in range(5)]
    plain = tmp_path / "moon.jsonl"
    plain.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tracefiles.mooncake(plain, "moon", TokenCost()).at_seconds.tolist() == [0, 0.5, 1, 1.5, 2]

    rates = tmp_path / "rates.csv"
    rates.write_text("start_s,total_rate_rps,active_clients\n0,10,1\n600,20,1\n1200,30,1\n")
    found = tracefiles.rates(rates, "rates", Lognormal(1.0))
    assert found.at_seconds.tolist() == [300, 900, 1_500]
    part = tracefiles.window(found, 600.0, 900.0)
    assert part.per_second.tolist() == [15.0, 20.0]
    assert part.seconds == 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "DocumentError"),
        ('{"timestamp": 1}', "line 1"),
        ('{"timestamp": 1e400, "input_length": 1, "output_length": 1}', "line 1"),
        ('{"timestamp": 2, "input_length": 1, "output_length": 1}\n[]', "line 2"),
        (
            '{"timestamp": 2, "input_length": 1, "output_length": 1}\n'
            '{"timestamp": 1, "input_length": 1, "output_length": 1}',
            "order of time",
        ),
    ],
)
def test_what_is_no_mooncake_trace_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(errors.DocumentError) as found:
        tracefiles.mooncake(path, "moon", TokenCost())
    assert said in repr(found.value)
    assert str(path) in str(found.value)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_no_file_breaks_the_parsers(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "anything"
    head = b"start_s,total_rate_rps\n"
    for written in (data, head + data):
        path.write_bytes(written)
        for parse in (
            lambda: tracefiles.mooncake(path, "any", TokenCost()),
            lambda: tracefiles.rates(path, "any", Lognormal(1.0)),
            lambda: tracefiles.azure(path, "any", TokenCost()),
        ):
            with contextlib.suppress(errors.DocumentError):
                parse()


def test_a_file_that_is_not_there_or_not_gzip_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gz"
    broken.write_bytes(b"not gzip at all")
    for path in (tmp_path / "none.csv", broken):
        with pytest.raises(errors.ConfigurationError, match=path.name):
            tracefiles.read(path)
