"""`glowplug serve` and `glowplug endpoint`: what they are asked, and what bad input and faults get."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import errors
from serving.providers import engineclient
from tests.serving.served import GLOWPLUG, Load, Served, answer, document, ready, serving, settled
from tests.serving.shortpaths import short_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


# -- bad input: the key, the remedy, and nothing left -----------------------------------------------


def test_a_document_that_cannot_be_served_leaves_nothing(directory: Path) -> None:
    served = Served(directory)
    wrong: list[tuple[dict[str, Any], int, str]] = [
        (document(model="/no/such/model"), 3, "model: /no/such/model does not exist"),
        (
            document(engine={"kind": "command", "command": ["no-such-program"]}),
            3,
            "engine.command: 'no-such-",
        ),
        ({**document(), "replicas": {"min": 2, "max": 1}}, 3, "replicas.max: 1 is below min (2)"),
        (document(limits={"keys_file": "/no/such/keys"}), 3, "limits.keys_file: "),
    ]
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        wrong.append(
            (document(routing={"port": port}), 8, f"routing.port: cannot listen on 127.0.0.1:{port}")
        )
        for wanted, code, says in wrong:
            assert served.refused(wanted)[0] == code, served.said()
            assert says in served.said()
            assert served.processes() == []
            assert not (served.state / "chat").exists()


def test_validate_and_schema_need_no_server(directory: Path) -> None:
    served = Served(directory)
    good = served.command("validate", served.write(document()))
    assert (good.returncode, good.stdout.split(":")[0]) == (0, "chat")
    bad = served.command("validate", served.write(document(replica={"min": 1})))
    assert bad.returncode == 3
    assert "replica: unknown key; did you mean replicas?" in bad.stderr
    absent = served.command("status", "chat")
    assert absent.returncode == 7
    assert "start it with `glowplug serve`" in absent.stderr


# -- an engine that does not start, and versions that are no good -----------------------------------


def test_bad_versions_are_rolled_back_and_the_old_one_never_notices(directory: Path) -> None:
    first = document("one", 2)
    with serving(directory, first) as served:
        served.until_ready(2)
        good = served.status()["version"]

        async def attempts() -> Load:
            in_thread = asyncio.get_running_loop().run_in_executor
            async with Load(served.url, clients=8, pause_seconds=0.02) as load:
                file = served.write(document("bad", 2, environment={"CRASH": "1"}))
                said = await in_thread(None, served.command, "apply", "--wait", file)
                assert said.returncode == 1
                assert "rolled back from revision 2" in said.stderr
                assert "no such checkpoint: weights-of-nobody" in said.stderr
                await in_thread(None, served.apply, document("bad", 2, environment={"FAIL_PERCENT": "60"}))
                await in_thread(
                    None,
                    served.until,
                    "it is rolled back",
                    lambda now: "update.max_error_percent" in now["note"] and settled(good)(now),
                )
            return load

        load = asyncio.run(attempts())
        # What the bad version answered itself was wrong; nothing else was.
        assert {each.name for each in load.asked if each.wrong is None} <= {"one", "bad", "stream"}
        assert [each for each in load.failed if "unlucky" not in str(each.wrong)] == []
        assert load.failed, "the failing version never had traffic: the error rate was not what took it back"


def test_a_crash_loop_backs_off_and_says_why(directory: Path) -> None:
    with serving(directory, document("one", 1, environment={"CRASH": "1"})) as served:
        status = served.until("three failures", lambda now: len(now["replicas"]) >= 3)
        failed = [each for each in status["replicas"] if each["state"] == "failed"]
        assert all("no such checkpoint: weights-of-nobody" in each["reason"] for each in failed)
        starts = sorted(each["created_at"] for each in status["replicas"])
        gaps = [after - before for before, after in itertools.pairwise(starts)]
        assert gaps == sorted(gaps), f"the pauses do not grow: {gaps}"
        logs = served.command("logs", "chat", failed[0]["name"])
        assert "weights-of-nobody" in logs.stdout
        # A document that is right ends it, without a start of its own.
        good = document("one", 1)
        served.apply(good)
        served.until_ready(1)
        assert json.loads(served.answer("/work")[1])["name"] == "one"


# -- what an endpoint is asked while it serves -------------------------------------------------------


def test_life_of_an_endpoint(directory: Path) -> None:
    keys = directory / "keys"
    keys.write_text("alice first-key\n")
    first = document("one", 2, limits={"keys_file": str(keys)})
    with serving(directory, first) as served:
        names = {each["name"] for each in ready(served.until_ready(2))}
        _keys_are_asked_for_and_rotated(served, keys)
        _live_changes_restart_nothing(served, first, names)
        _scaled(served)
        _held_while_nobody_is_there(served)
        _another_server_is_refused(served, first)
        _page_in_a_browser(served, directory)
        _rollback(served, keys)
        assert served.command("delete", "chat").returncode == 0
        assert served.process is not None
        assert served.process.wait(60) == 0
        assert served.processes() == []
        assert not (served.state / "chat").exists()


def _keys_are_asked_for_and_rotated(served: Served, keys: Path) -> None:
    assert served.answer("/work")[0] == 401
    assert served.answer("/work", Authorization="Bearer first-key")[0] == 200
    keys.write_text("alice second-key\n")
    _until_answer(served, "second-key", 200)
    _until_answer(served, "first-key", 401)
    keys.write_text("not a keys file at all, is it\n")  # what is wrong keeps what was right
    time.sleep(0.5)
    _until_answer(served, "second-key", 200)


def _until_answer(served: Served, key: str, status: int) -> None:
    deadline = time.monotonic() + 30
    while served.answer("/work", Authorization=f"Bearer {key}")[0] != status:
        assert time.monotonic() < deadline, f"{key} is not answered with {status}\n{served.said()}"
        time.sleep(0.05)


def _live_changes_restart_nothing(served: Served, first: dict[str, Any], names: set[str]) -> None:
    changed = {
        **first,
        "replicas": {"min": 2, "max": 8, "target_concurrency": 3},
        "limits": {"request_bytes": 2_048},
        "metadata": {"team": "search"},
    }
    plan = served.command("plan", served.write(changed))
    assert "live    replicas.target_concurrency: 64.0 -> 3.0" in plan.stdout
    assert "no replica restarts" in plan.stderr
    applied = served.command("apply", served.write(changed))
    assert applied.returncode == 0, applied.stderr
    deadline = time.monotonic() + 30
    sockets = [served.state / "chat" / "replicas" / name / "engine.sock" for name in names]
    while {engineclient.status(each)["limit"] for each in sockets} != {6}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Nobody is asked for a key any more, and a body over the limit is refused.
    _until_answer(served, "whatever", 200)
    assert {each["name"] for each in ready(served.status())} == names


def _scaled(served: Served) -> None:
    assert served.command("scale", "chat", "3").returncode == 0
    served.until_ready(3)
    too_many = served.command("scale", "chat", "9")
    assert too_many.returncode == 9
    assert "replicas.max is 8" in too_many.stderr
    assert served.command("scale", "chat", "1").returncode == 0
    served.until("one is left", lambda status: len(status["replicas"]) == 1)
    assert served.answer("/work")[0] == 200


def _held_while_nobody_is_there(served: Served) -> None:
    assert served.command("scale", "chat", "0").returncode == 0
    served.until("nobody is left", lambda status: status["replicas"] == [])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.answer, "/work")
        served.until("it is held", lambda status: status["held"] == 1)
        assert served.command("scale", "chat", "1").returncode == 0
        assert asked.result(60)[0] == 200


def _another_server_is_refused(served: Served, first: dict[str, Any]) -> None:
    second = subprocess.run(
        [*GLOWPLUG, "serve", served.write(first), "--state", str(served.state), "--status", "none"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 9
    assert "is being served already" in second.stderr
    assert served.answer("/work")[0] == 200


def _page_in_a_browser(served: Served, directory: Path) -> None:
    status, text = answer(f"{served.page}/api/v1/status")
    assert status == 200
    assert "document" not in json.loads(text)
    assert answer(f"{served.page}/api/v1/document")[0] == 404
    assert answer(f"{served.page}/", Host="attacker.example")[0] == 421
    assert 'glowplug_endpoint_weight_percent{endpoint="chat"' in answer(f"{served.page}/metrics")[1]
    browser = shutil.which("chromium")
    if browser is None:
        pytest.fail("chromium is not installed: deploy/setup-debian installs it")
    seen = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}/browser"),
            *("--virtual-time-budget=1000", "--dump-dom", served.page),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    replica = ready(served.status())[0]["name"]
    assert '<span class="badge good" id="phase">steady</span>' in seen
    assert f"<td>{replica}</td>" in seen
    assert '<svg id="starts"' in seen
    assert "<title>start: " in seen, "the waterfall shows the phases that the engine reports"


def _rollback(served: Served, keys: Path) -> None:
    refused = served.command("rollback", "chat")
    assert (refused.returncode, "limits.keys_file" in refused.stderr) == (3, True), (
        "its keys are broken still"
    )
    keys.write_text("alice third-key\n")
    before = served.status()["revision"]
    assert served.command("rollback", "chat").returncode == 0
    status = served.status()
    assert status["revision"] == before + 1
    assert "third-key" not in json.dumps(status), "no key of the keys file is shown"
    shown = served.command("status", "chat", "--json")
    assert json.loads(shown.stdout)["name"] == "chat"
    _until_answer(served, "nobody", 401)


def test_ctrl_c_finishes_what_is_in_flight(directory: Path) -> None:
    with serving(directory, document("one", 1, environment={"DELAY_SECONDS": "0.1"})) as served:
        served.until_ready(1)
        stream = urllib.request.urlopen(f"{served.url}/stream?lines=20", timeout=30)
        assert stream.readline() == b"data: 0\n"
        assert served.process is not None
        served.process.send_signal(signal.SIGINT)
        assert stream.read().endswith(b"data: [DONE]\n\n")
        assert served.process.wait(60) == 0
        assert served.processes() == []


def test_an_envoy_that_was_killed_is_back_with_its_routes(directory: Path) -> None:
    with serving(directory, document("one", 1)) as served:
        served.until_ready(1)
        record = json.loads((served.state / "chat" / "envoy" / "envoy.pid").read_text())
        os.kill(record["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if served.answer("/work")[0] == 200:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        again = json.loads((served.state / "chat" / "envoy" / "envoy.pid").read_text())
        assert again["pid"] != record["pid"]


def test_the_client_says_that_nobody_serves(directory: Path) -> None:
    from serving import client

    with pytest.raises(errors.UnavailableError, match="nobody serves an endpoint 'chat'"):
        client.Client(directory, "chat").get("/api/v1/status")
    assert client.served(directory / "none") == []
