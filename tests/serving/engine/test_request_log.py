"""The request log, of a real engine: what is in the files, what is not, and what a bad destination costs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pyarrow.dataset
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from serving import errors
from serving.engine.requestlog import columns, files, keeper, record, sampling
from serving.observability import RequestLog
from tests.serving.engine import running
from tests.serving.engine.running import Engine

KEY = "sk-this-must-not-be-written"


def wanted(destination: object, **more: Any) -> dict[str, Any]:
    return {"destination": str(destination), "sample_rate": 1.0, **more}


def rows(directory: Path) -> list[dict[str, Any]]:
    """What has been logged, oldest first."""
    read = pyarrow.dataset.dataset(directory, partitioning="hive").to_table()
    return sorted(read.to_pylist(), key=lambda row: row["time"])


def totals(engine: Engine) -> dict[str, float]:
    """The log's counters, from the engine's metrics."""
    text = engine.ask("/metrics")[2].decode()
    prefix = "glowplug_engine_request_log_"
    lines = (line.split(" ") for line in text.splitlines() if line.startswith(prefix))
    return {name.removeprefix(prefix).removesuffix("_total"): float(value) for name, value in lines}


def parts(directory: Path) -> list[Path]:
    return list(directory.rglob("*.part"))


def settle(engine: Engine, request_log: dict[str, Any] | None) -> int:
    """Change it; the status."""
    return engine.tell("POST", "/request-log", {"request_log": request_log})[0]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    log = wanted(tmp_path / "sample", body_bytes=200)
    document = {"service": "chat", "instance": "r1", "request_log": log}
    with running.engine(tmp_path, engine=running.stub(), **document) as started:
        started.wait_for("ready")
        # From now on it is told of, so that every request is seen.
        running.until(lambda: _logged(started))
        yield started


def _logged(engine: Engine) -> bool:
    """Whether recorders know of the writer: requests are held for it."""
    engine.complete(1)
    return bool(parts(engine.run.parent / "sample"))


def test_bodies_streams_and_times_but_no_keys_are_in_the_file(engine: Engine, tmp_path: Path) -> None:
    secret = {"authorization": f"Bearer {KEY}", "x-api-key": KEY, "cookie": KEY}
    trace = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    engine.ask(
        f"/v1/completions?key={KEY}",
        {"max_tokens": 2, "prompt": "hello"},
        {**secret, "x-request-id": "one", "traceparent": trace, "user-agent": "test"},
    )
    engine.ask("/v1/completions", {"max_tokens": 3, "stream": True}, {"x-request-id": "two"})
    engine.ask("/echo", {"long": "x" * 1_000}, {"x-request-id": "three"})
    assert engine.end() == 0
    found = {row["request_id"]: row for row in rows(tmp_path / "sample")}
    one, two, three = found["one"], found["two"], found["three"]
    assert (one["endpoint"], one["instance"], one["method"], one["path"], one["status"]) == (
        "chat",
        "r1",
        "POST",
        "/v1/completions",
        200,
    )
    assert one["trace_id"] == "ab" * 16
    assert json.loads(one["request_body"]) == {"max_tokens": 2, "prompt": "hello"}
    assert json.loads(one["response_body"])["choices"] == [{"text": "xx"}]
    assert dict(one["headers"])["user-agent"] == "test"
    assert one["outcome"] == "whole"
    assert 0 <= one["queued_seconds"] <= one["first_byte_seconds"] <= one["seconds"]
    assert two["response_type"] == "text/event-stream"
    assert two["response_body"].count(b"data: ") == 4
    assert (three["request_bytes"], len(three["request_body"])) == (1_012, 200)
    for path in (tmp_path / "sample").rglob("*.parquet"):
        assert KEY.encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o600
    assert not any(KEY in str(value) for row in found.values() for value in row.values())
    assert not parts(tmp_path / "sample")


def test_it_is_changed_while_the_engine_runs(engine: Engine, tmp_path: Path) -> None:
    child = engine.status()["pid"]
    assert settle(engine, {"destination": "relative"}) == 400
    elsewhere = tmp_path / "elsewhere"
    assert settle(engine, wanted(elsewhere, file_seconds=0.1)) == 200

    def written() -> bool:
        engine.complete(1)
        return elsewhere.exists() and bool(rows(elsewhere))

    running.until(written)
    assert rows(tmp_path / "sample")  # what was under way there is finished
    assert settle(engine, None) == 200
    before = totals(engine)["written_records"]
    for _ in range(5):
        engine.complete(1)
    assert engine.status()["pid"] == child
    engine.end()
    assert len(rows(tmp_path / "sample")) + len(rows(elsewhere)) == before


def test_a_writer_that_dies_is_replaced_and_costs_no_request(engine: Engine, tmp_path: Path) -> None:
    [part] = parts(tmp_path / "sample")
    for writer in running.children(engine.process.pid, "requestlog.writer"):
        os.kill(writer, signal.SIGKILL)

    def again() -> bool:
        assert engine.complete(1)[0] == 200
        return bool(parts(tmp_path / "sample")) and not part.exists()

    running.until(again)  # its half-written file is gone, another is under way
    assert engine.end() == 0
    assert rows(tmp_path / "sample")


@pytest.mark.root
def test_a_full_disk_drops_counts_and_says_so_once(engine: Engine, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small], check=True)
    try:
        settle(engine, wanted(small, body_bytes=1 << 20, file_seconds=0.1))
        noise = os.urandom(300_000).hex()

        def dropped() -> bool:
            assert engine.ask("/echo", {"noise": noise})[0] == 200
            return totals(engine)["dropped_records"] > 3

        running.until(dropped)
        assert not parts(small)
        told = [each for each in engine.events("request_log") if "trouble" in each]
        assert len(told) == 1
        assert "No space left" in told[0]["trouble"]
        engine.end()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


# -- S3 ------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Over real HTTP."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="logs")
    yield client
    with contextlib.suppress(Exception):
        server.stop()


def _removed(bucket: Any) -> bool:
    """Whether it could be: a file may come between its emptying and that."""
    for each in bucket.list_objects_v2(Bucket="logs").get("Contents", ()):
        bucket.delete_object(Bucket="logs", Key=each["Key"])
    try:
        bucket.delete_bucket(Bucket="logs")
    except botocore.exceptions.ClientError:
        return False
    return True


def test_files_go_to_a_bucket_and_wait_while_it_is_away(bucket: Any, tmp_path: Path) -> None:
    log = wanted("s3://logs/requests", file_seconds=0.2)
    document = {"service": "chat", "request_log": log}
    with running.engine(tmp_path, engine=running.stub(), **document) as engine:
        engine.wait_for("ready")

        def uploaded() -> bool:
            engine.complete(1)
            return totals(engine)["files"] > 0

        running.until(uploaded)
        found = bucket.list_objects_v2(Bucket="logs")["Contents"]
        assert all(each["Key"].startswith("requests/endpoint=chat/date=") for each in found)
        running.until(lambda: _removed(bucket))

        def told() -> bool:
            assert engine.complete(1)[0] == 200
            return any("NoSuchBucket" in each.get("trouble", "") for each in engine.events("request_log"))

        running.until(told)
        before = totals(engine)["written_records"]
        waiting = set((engine.run / "spool").rglob("*.parquet"))
        for writer in running.children(engine.process.pid, "requestlog.writer"):
            os.kill(writer, signal.SIGKILL)
        bucket.create_bucket(Bucket="logs")
        # What waited is the next writer's to upload.
        running.until(lambda: totals(engine)["written_records"] > before)
        running.until(lambda: not waiting & set((engine.run / "spool").rglob("*.parquet")))
        assert totals(engine)["dropped_records"] == 0
        engine.end()
    for each in bucket.list_objects_v2(Bucket="logs")["Contents"]:
        local = tmp_path / "back" / each["Key"]
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(bucket.get_object(Bucket="logs", Key=each["Key"])["Body"].read())
    assert rows(tmp_path / "back")


# -- what is decided without doing anything ------------------------------------------------------------


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_sample_lies_in_a_larger_one(request_id: str, one: float, other: float) -> None:
    assert not sampling.chosen(request_id, 0.0)
    assert sampling.chosen(request_id, 1.0)
    if sampling.chosen(request_id, min(one, other)):
        assert sampling.chosen(request_id, max(one, other))


def test_a_sample_is_of_the_size_that_was_asked_for() -> None:
    chosen = sum(sampling.chosen(str(number), 0.1) for number in range(10_000))
    assert 850 < chosen < 1_150


RECORDS = st.builds(
    record.Record,
    request_id=st.text(),
    trace_id=st.text("0123456789abcdef", max_size=32),
    began_at=st.floats(0, 4e9),
    method=st.text(),
    path=st.text(),
    status=st.none() | st.integers(100, 599),
    outcome=st.sampled_from(["whole", "client_gone", "failed"]),
    queued_seconds=st.floats(0, 1e6),
    first_byte_seconds=st.none() | st.floats(0, 1e6),
    seconds=st.floats(0, 1e6),
    headers=st.dictionaries(st.text(), st.text()),
    response_type=st.sampled_from(["application/json", "text/event-stream", ""]),
    request_bytes=st.integers(0, 2**40),
    response_bytes=st.integers(0, 2**40),
    request_body=st.binary(),
    response_body=st.binary() | st.just(b'data: {"usage": {"prompt_tokens": 7, "completion_tokens": 1.5}}\n'),
)


@given(st.lists(RECORDS, max_size=4), st.integers(1, 50), st.data())
def test_frames_come_back_however_they_are_cut(
    records: list[record.Record], dropped: int, data: st.DataObject
) -> None:
    stream = b"".join(map(record.encode, records)) + record.dropped(dropped)
    cutter, found = record.Frames(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += cutter.feed(stream[:size])
        stream = stream[size:]
    assert [record.decode(payload) for kind, payload in found if kind == record.RECORD] == records
    assert record.read_dropped(found[-1][1]) == dropped
    assert columns.batch(records, "r").num_rows == len(records)


@given(st.binary())
def test_other_bytes_are_refused(data: bytes) -> None:
    cutter = record.Frames()
    with contextlib.suppress(record.FrameError):
        for kind, payload in cutter.feed(data):
            {
                record.RECORD: record.decode,
                record.DROPPED: record.read_dropped,
                record.SAMPLING: record.read_sampling,
            }[kind](payload)
    for read in (record.decode, record.read_sampling):
        with contextlib.suppress(record.FrameError):
            read(data)


def test_tokens_are_read_from_answers_and_from_the_end_of_streams() -> None:
    usage = {"usage": {"prompt_tokens": 50, "completion_tokens": 51}}
    events = [{"choices": []}, usage]
    stream = "".join(f"data: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n"
    for kind, body in (("application/json", json.dumps(usage)), ("text/event-stream", stream)):
        assert columns.tokens(_record(kind, body.encode())) == (50, 51)
    cut = _record("application/json", b'{"usage": ')
    assert columns.tokens(cut) == (None, None)


def _record(response_type: str, body: bytes) -> record.Record:
    return record.Record(
        "id", "", 0.0, "POST", "/", 200, "whole", 0.0, None, 1.0, {}, response_type, 0, len(body), b"", body
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"headers": ["authorization"]}, "never logged"),
        ({"headers": ["X-Up"]}, "lower case"),
        ({"destination": "s3://B/p"}, "bucket"),
        ({"destination": "logs"}, "absolute"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"rate": 0.5}, "rate"),
    ],
)
def test_a_log_that_cannot_be_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.DocumentError, match="request_log") as caught:
        keeper.parse(json.dumps({"request_log": {"destination": "/logs", **more}}).encode())
    assert message in str(caught.value)


def test_files_are_closed_by_size_and_parts_of_the_living_are_left_alone(tmp_path: Path) -> None:
    settings = files.Settings(tmp_path, "chat", "r1", 100_000, 3_600.0)
    counted = files.Totals()
    writing = files.Files(settings, counted)
    for _ in range(10):
        writing.add(_record("x", os.urandom(30_000)))
    assert counted.files == 2
    files.Files(settings, files.Totals())  # another replica begins in the same place
    writing.close()
    assert counted.written == 10
    assert len(rows(tmp_path)) == 10
    (next(tmp_path.glob("endpoint=*/date=*")) / "torn.parquet").write_bytes(b"PAR1")
    assert sum(records for _, records in files.whole(tmp_path)) == 10
    assert not list(tmp_path.rglob("torn.parquet"))
    assert RequestLog(destination=str(tmp_path)).sample_rate == 0.01
