"""The containerd provider on a real node: containers of block images, their engines supervised from outside.

vLLM itself is a stub in the image (`tests/fixtures/stub_vllm`): what is proved is the way into a container,
which the real one has no other part in.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from serving import detached, endpoint
from serving.engine import container
from serving.providers import create, engineclient, enginecommand
from serving.providers.fleet import Fleet
from serving.replica import Replica, State
from tests.fixtures import node as nodes
from tests.fixtures import vllm_environment
from tests.serving.engine import running
from tests.serving.providers.conformance import until
from tests.serving.shortpaths import short_directory

pytestmark = pytest.mark.root

_PYTHON = "/opt/python"
_LEFT_OUT = {
    *("site-packages", "test", "tests", "unittest", "idlelib", "tkinter", "turtledemo", "ensurepip"),
    *("lib2to3", "distutils", "pydoc_data", "sqlite3", "__pycache__"),
}


def python_layer() -> bytes:
    """This interpreter with its libraries, the stub of vLLM, and nothing else."""
    made = io.BytesIO()
    stub = Path(__file__).parents[2] / "fixtures" / "stub_vllm"
    binary = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = Path(entry.name).name
        return None if name in _LEFT_OUT or name.startswith("config-") or name.endswith(".a") else entry

    with tarfile.open(fileobj=made, mode="w") as tar:
        folders = (
            "opt",
            "opt/python",
            "opt/python/bin",
            "opt/python/lib",
            "tmp",
            "proc",
            "sys",
            "dev",
            "run",
        )
        for name in folders:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        tar.add(binary, f"{_PYTHON}/bin/python3")
        site = f"{_PYTHON}/lib/{library.name}"
        tar.add(library, site, filter=kept)
        for package in (stub / "vllm", stub / "uvicorn.py", Path(prometheus_client.__file__).parent):
            tar.add(package, f"{site}/site-packages/{package.name}", filter=kept)
        found = {str(binary), *map(str, (library / "lib-dynload").glob("*.so"))}
        needed = subprocess.run(["ldd", *sorted(found)], capture_output=True, text=True, check=True).stdout
        for path in sorted(set(re.findall(r"(/\S+) \(0x", needed))):
            tar.add(os.path.realpath(path), path)
    return made.getvalue()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Node]:
    with nodes.run_registry(tmp_path_factory.mktemp("registry")) as registry:
        with nodes.run("1.6", registry) as made:
            yield made


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


def ready(fleet: Fleet) -> Replica | None:
    [found] = fleet.observe()
    assert found.state is not State.FAILED, (found.reason, list(fleet.logs(found.name, 40)))
    return found if found.state is State.READY else None


def test_vllm_runs_in_a_container_behind_its_supervisors_socket_and_limit(
    node: nodes.Node, directory: Path
) -> None:
    model = directory / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    document = {
        "name": "chat",
        "engine": {
            "kind": "vllm",
            "python": f"{_PYTHON}/bin/python3",
            "environment": {"MARK": "in the container"},
            "api_servers": 1,
        },
        "model": str(model),
        "image": f"docker://{node.registry.push([python_layer()], convert=True)}",
        "provider": "containerd",
        "containerd": {
            "address": str(node.containerd.socket),
            "snapshotter": "glowplug",
            "agent_state": str(node.agent.state),
        },
        "drain": {"notice_seconds": 0.0, "seconds": 5},
    }
    wanted = endpoint.load(json.dumps(document), "test")
    fleet = create(wanted, directory / "endpoint")
    assert isinstance(fleet, Fleet)
    try:
        fleet.apply(wanted)
        fleet.scale(1)
        until(lambda: ready(fleet) is not None)
        replica = ready(fleet)
        assert replica is not None
        assert replica.address is not None
        said = _ask(replica.address, {"prompt": "hello"})
        assert said["asked"]["prompt"] == "hello"
        assert said["environment"]["MARK"] == "in the container"
        assert said["environment"]["PYTHONPATH"] == "/glowplug"
        assert "glowplug" in said["root"]
        assert "home" not in said["root"]
        assert said["arguments"][0] == str(model)
        # Counted inside, in memory that both share.
        control = directory / "endpoint" / "replicas" / replica.name / enginecommand.CONTROL
        until(lambda: engineclient.status(control)["counters"]["finished"] == 1)
        containers = node.containerd.ctr("containers", "ls", "-q")
        assert f"chat-{replica.name}" in containers
        fleet.drain([replica.name])
        until(lambda: not fleet.observe())
        assert f"chat-{replica.name}" not in node.containerd.ctr("containers", "ls", "-q")
    finally:
        fleet.close()


@pytest.mark.soak
def test_real_vllm_runs_in_a_container(node: nodes.Node, directory: Path) -> None:
    """Its environment of 3 GB is bound, not baked in; all else is as above."""
    image = f"docker://{node.registry.push([python_layer()], convert=True)}"
    place = endpoint.Containerd(address=str(node.containerd.socket), agent_state=str(node.agent.state))
    pull = [*detached.GLOWPLUG, "pull", "--state", place.agent_state, "--containerd-address", place.address]
    name = subprocess.run([*pull, image], capture_output=True, text=True, check=True).stdout.strip()
    python = vllm_environment.python()
    bound = [python.parents[1], Path(sys.base_prefix), Path("/usr"), Path("/bin")]
    options = [
        word for path in bound for word in ("--mount", f"type=bind,src={path},dst={path},options=rbind:ro")
    ]
    document = {
        "engine": {
            "kind": "vllm",
            "python": str(python),
            "arguments": ["--max-model-len", "512", "--enforce-eager"],
            "environment": {"VLLM_CPU_KVCACHE_SPACE": "1", "HOME": "/tmp"},
            "api_servers": 2,
        },
        "model": str(vllm_environment.model()),
        "model_name": "tiny",
        "limit": 2,
        "cache_directory": str(directory / "cache"),
        "container": {
            "ctr": enginecommand.ctr(place),
            "name": directory.name,
            "image": name,
            "snapshotter": place.snapshotter,
            "options": options,
        },
    }
    try:
        with running.engine(directory, **document) as engine:
            status = engine.wait_for("ready", 600)
            assert len(status["servers"]) == 2
            body = {"model": "tiny", "prompt": "import os", "max_tokens": 4}
            assert engine.ask("/v1/completions", body)[0] == 200
            running.until(lambda: engine.status()["counters"]["finished"] == 1)
            assert directory.name in node.containerd.ctr("tasks", "ls", "-q")
            assert engine.end() == 0
    finally:
        # As the provider does when a replica has ended.
        for command in container.removal(enginecommand.ctr(place), directory.name):
            subprocess.run(command, capture_output=True)


def _ask(address: tuple[str, int], body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://{address[0]}:{address[1]}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())  # type: ignore[no-any-return]
