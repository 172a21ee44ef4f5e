"""What replicas are started with is what `glowplug engine` reads, for each kind of engine."""

from __future__ import annotations

from pathlib import PurePath

import pytest
import yaml

from serving import endpoint
from serving.engine import settings
from serving.providers import enginecommand
from tests.serving.served import document

_VLLM = {"kind": "vllm", "python": "/opt/vllm/bin/python", "api_servers": 2, "arguments": ["--seed", "1"]}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"environment": {"A": "b"}},
        {"engine": _VLLM, "model": "/models/chat", "fp8": {"enabled": True}, "resources": {"cpus": 1.5}},
        {"engine": _VLLM, "model": "s3://bucket/chat", "model_name": "small"},
    ],
)
def test_the_engine_reads_what_it_is_given(sections: dict[str, object]) -> None:
    wanted = endpoint.load(yaml.safe_dump(document(**sections)), "e")
    text = enginecommand.settings(
        wanted, address="127.0.0.1", port=9, limit=7, folder=PurePath("/r"), cache=PurePath("/c")
    )
    read = settings.load(text, "settings.json")
    assert read.engine == wanted.engine
    assert (read.model, read.model_name) == (wanted.model, wanted.model_name or "chat")
    assert (read.port, read.limit, read.fp8) == (9, 7, wanted.fp8.enabled)
    assert (read.control, read.cache_directory) == ("/r/engine.sock", "/c")
    assert read.gpus is None  # its environment says
    assert read.cpus == (None if wanted.resources.cpus is None else 2)


def test_an_engine_outside_its_container_is_told_which_gpus_that_has() -> None:
    wanted = endpoint.load(yaml.safe_dump(document(resources={"gpus": 2})), "e")
    text = enginecommand.settings(
        wanted,
        address="127.0.0.1",
        port=9,
        limit=7,
        folder=PurePath("/r/chat-1"),
        cache=PurePath("/c"),
        image="image",
    )
    read = settings.load(text, "settings.json")
    assert read.gpus == ("0", "1")
    assert read.container is not None
    assert read.container.options == ("--gpus", "0", "--gpus", "1")
