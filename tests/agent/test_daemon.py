"""The agent as a process: started, stopped, killed, started twice; what containerd sees of it over gRPC."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import grpc
import pytest

from imagefs import errors
from imagefs.fuse.control import DeviceClient
from tests.agent.agent_process import Agent, agent, source
from tests.agent.lazy_node import Source
from tests.fixtures import block_images

__all__ = ["agent", "source"]

pytestmark = pytest.mark.root


def test_lazily_over_grpc_and_through_a_restart(agent: Agent, source: Source) -> None:
    agent.prepare_image(source, "active")
    mounts = agent.layer_mounts()
    assert len(mounts) == 2
    assert agent.api.get("/readyz")["ready"] is True
    assert agent.end() == 0
    assert agent.layer_mounts() == mounts, "mounts outlive the agent"
    assert agent.message_of_the_day() == "base\n"
    agent.start()
    assert agent.layer_mounts() == mounts, "nothing is mounted anew"
    agent.prepare("second", source.chain_ids[-1], {})
    assert agent.layer_mounts() == mounts


def test_killed_and_started_again(agent: Agent, source: Source) -> None:
    agent.prepare_image(source, "active")
    mounts = agent.layer_mounts()
    agent.end(signal.SIGKILL)
    assert agent.message_of_the_day() == "base\n", "what runs goes on reading"
    agent.start()
    assert agent.layer_mounts() == mounts
    status = agent.api.get("/api/v1/status")
    assert status["snapshots"] == {"view": 0, "active": 1, "committed": 2}


def test_a_device_server_that_died_is_started_and_layers_are_mounted_anew(
    agent: Agent, source: Source
) -> None:
    agent.prepare_image(source, "active")
    devices = DeviceClient.connect(agent.state)
    assert devices is not None
    devices.stop()
    until = time.monotonic() + 60
    while "remounting" not in agent.events() or len(agent.layer_mounts()) < 2:
        assert time.monotonic() < until, agent.log.read_text()
        time.sleep(0.1)
    assert agent.message_of_the_day() == "base\n"


@pytest.mark.parametrize("shared", ["--root", "--state", "--socket"])
def test_a_second_agent_on_what_one_has_is_refused(agent: Agent, source: Source, shared: str) -> None:
    agent.prepare_image(source, "container")
    places = {"--root": "other-root", "--state": "other-state", "--socket": "other.sock"}
    del places[shared]
    options = [word for option, name in places.items() for word in (option, agent.folder / name)]
    result = subprocess.run(
        [block_images.GLOWPLUG, "agent", "run", "--config", agent.config, *options],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 9
    assert agent.process is not None
    assert f"pid {agent.process.pid}" in result.stderr
    assert shared in result.stderr
    agent.prepare("still-served", "", {})
    assert agent.message_of_the_day()


def test_settings_that_a_running_device_server_keeps_are_named(agent: Agent) -> None:
    agent.end()
    agent.config.write_text(agent.config.read_text().replace("deadline_seconds = 5", "deadline_seconds = 6"))
    agent.start()
    (said,) = [
        event for event in agent.api.get("/api/v1/events")["events"] if event["kind"] == "settings_kept"
    ]
    assert "reads.deadline_seconds (5.0)" in said["message"]
    assert "cache." not in said["message"]


def test_the_sockets_are_ours_alone(agent: Agent) -> None:
    for path in (agent.socket, agent.state / "agent.sock"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_pull_over_the_api(agent: Agent, source: Source) -> None:
    found = agent.api.post("/api/v1/pull", {"reference": source.name})
    assert found["source_digest"] == source.digest
    assert found["chain_ids"] == source.chain_ids
    assert [manifest["digest"] for manifest in found["manifests"]] == [source.digest]
    # Afterwards the layers are found without labels, as by containerd 1.6's ctr.
    with pytest.raises(grpc.RpcError) as refusal:
        agent.prepare("extract", "", {"containerd.io/snapshot.ref": source.chain_ids[0]})
    assert refusal.value.code() is grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(errors.NotFoundError):
        agent.api.post("/api/v1/pull", {"reference": f"{source.name.partition('/')[0]}/no/such:v1"})


def test_a_damaged_database_is_said_aloud_and_the_agent_serves(agent: Agent, source: Source) -> None:
    agent.prepare_image(source, "active")
    mounts = agent.layer_mounts()
    agent.end()
    database = agent.root / "agent.db"
    os.truncate(database, 3000)
    agent.start()
    assert "database_rebuilt" in agent.events()
    assert agent.layer_mounts() == mounts, "whoever runs keeps what it has"
    assert list(agent.root.glob("agent.db.corrupt-*"))
    agent.prepare("new", "", {})
