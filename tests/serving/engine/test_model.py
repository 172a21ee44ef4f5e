"""Models that are brought before an engine starts, from a real S3 server and from a block image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from serving.engine import phases
from tests.fixtures import block_images, images, servers, vllm_environment
from tests.fixtures.servers import Fault, FaultProxy, S3Server
from tests.serving.engine import running
from tests.serving.engine.running import Engine

CONFIG = b'{"model_type": "llama"}'


class Bucket:
    """A checkpoint in S3, behind a proxy."""

    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        self.proxy, self._bucket = proxy, server.bucket
        self._prefix = servers.unique_name("models")
        self.url = f"s3://{server.bucket}/{self._prefix}"
        self._s3: Any = boto3.client("s3", endpoint_url=server.endpoint_url)

    def put(self, name: str, data: bytes) -> None:
        self._s3.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}", Body=data)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    proxy = FaultProxy(s3_server.endpoint_url.removeprefix("http://"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield Bucket(s3_server, proxy)
    proxy.close()


def cached(directory: Path) -> dict[str, Any]:
    return {"model_cache": {"directory": str(directory / "models")}}


def model_of(engine: Engine) -> Path:
    """What the engine's program was told."""
    environment = Path(f"/proc/{engine.status()['pid']}/environ").read_bytes()
    [found] = [each for each in environment.split(b"\0") if each.startswith(b"MODEL=")]
    return Path(os.fsdecode(found.removeprefix(b"MODEL=")))


def test_a_model_in_a_bucket_is_on_the_node_when_the_engine_starts(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("config.json", CONFIG)
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        with running.engine(folder, engine=running.stub(), model=bucket.url, **cached(tmp_path)) as engine:
            engine.wait_for("ready")
            assert (model_of(engine) / "config.json").read_bytes() == CONFIG
            assert engine.end() == 0
    assert len([each for each in bucket.proxy.seen("GET", "config.json") if "range" in each.fields]) == 1


def test_a_bucket_that_has_nothing_is_why_the_engine_does_not_start(bucket: Bucket, tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=running.stub(), model=bucket.url, **cached(tmp_path)) as engine:
        assert engine.process.wait(60) != 0
        assert f"model: {bucket.url}: there is nothing" in engine.log.read_text()


def test_an_engine_that_is_told_to_leave_stops_its_download(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("weights", b"w" * 100)
    bucket.proxy.add(Fault(path="weights", times=None, delay_seconds=1.0, status=503))
    with running.engine(tmp_path, engine=running.stub(), model=bucket.url, **cached(tmp_path)) as engine:
        engine.wait_for("starting")
        running.until(lambda: bucket.proxy.seen("GET", "weights"))
        engine.end()


@pytest.mark.root
def test_a_model_in_a_block_image_is_mounted_for_as_long_as_the_engine_lives(
    glowplug: block_images.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in glowplug.environment.items():
        monkeypatch.setenv(name, value)
    tar = images.tar_of([("chat", None), ("chat/config.json", CONFIG)])
    ref = block_images.make(tmp_path / "image", [tar])
    with running.engine(tmp_path, engine=running.stub(), model=f"{ref}#chat", **cached(tmp_path)) as engine:
        engine.wait_for("ready")
        where = model_of(engine)
        assert (where / "config.json").read_bytes() == CONFIG
        assert os.path.ismount(where.parent)
        assert engine.end() == 0
    assert not os.path.ismount(where.parent)
    assert glowplug.left() == []


@pytest.mark.soak
@pytest.mark.root
@pytest.mark.parametrize("kind", ["bucket", "image"])
def test_vllm_serves_a_model_that_was_brought(
    bucket: Bucket,
    glowplug: block_images.Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    for name, value in glowplug.environment.items():
        monkeypatch.setenv(name, value)
    files = {path.name: path.read_bytes() for path in vllm_environment.model().iterdir() if path.is_file()}
    if kind == "bucket":
        model = bucket.url
        for name, data in files.items():
            bucket.put(name, data)
    else:
        tar = images.tar_of([("chat", None), *((f"chat/{name}", data) for name, data in files.items())])
        model = f"{block_images.make(tmp_path / 'image', [tar])}#chat"
    document = {
        "engine": {
            "kind": "vllm",
            "python": str(vllm_environment.python()),
            "arguments": ["--max-model-len", "512", "--enforce-eager"],
            "environment": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            "api_servers": 1,
        },
        "model": model,
        "model_name": "tiny",
        **cached(tmp_path),
    }
    with running.engine(tmp_path, **document) as engine:
        status = engine.wait_for("ready", 600)
        assert status["phases"][phases.MODEL] > 0
        body = {"model": "tiny", "prompt": "import os", "max_tokens": 4}
        assert engine.ask("/v1/completions", body)[0] == 200
        assert engine.end() == 0
