"""The request log of an endpoint: switched on and off by its document, while its replicas serve."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset

from tests.serving import shortpaths
from tests.serving.served import Served, document


def rows(directory: Path) -> list[dict[str, Any]]:
    if not directory.exists():
        return []
    return pyarrow.dataset.dataset(directory, partitioning="hive").to_table().to_pylist()


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_a_document_switches_it_on_and_off_in_place(tmp_path: Path) -> None:
    with shortpaths.short_directory() as directory:
        served = Served(directory)
        try:
            served.start(document(replicas=2))
            before = {each["name"] for each in served.until_ready(2)["replicas"]}
            log = {"destination": str(tmp_path / "log"), "sample_rate": 1.0, "file_seconds": 0.2}
            assert served.apply(document(replicas=2, request_log=log))["restarts"] is False

            def logged() -> bool:
                served.answer("/work")
                return {row["instance"] for row in rows(tmp_path / "log")} == before

            until(logged)
            assert {row["endpoint"] for row in rows(tmp_path / "log")} == {"chat"}
            served.apply(document(replicas=2))
            off = '"event": "engine_request_log", "settings": null'
            until(lambda: served.command("logs", "chat").stdout.count(off) == len(before))
            assert {each["name"] for each in served.status()["replicas"]} == before
        finally:
            served.stop()
