"""An engine's GPUs: which they are, and how busy they are, by NVML's ABI.

There is no GPU here: `fake_nvml.c`, compiled as the driver's library, stands for one; all else is real.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine import gpus
from serving.providers import engineclient
from tests.serving.engine import running

A, B, C = "GPU-8932f937-d72c", "GPU-8932aaaa-0000", "GPU-1f-2"
MACHINE = [A, B, C]
GIB = 1 << 30
FAKE = Path(__file__).parents[2] / "fixtures" / "fake_nvml.c"


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        (None, MACHINE),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", [C, A]),
        (" 1 ", [B]),
        ("1,1", [B]),
        ("0,7,1", [A]),  # what follows an entry that names nothing counts for nothing
        ("0,,1", [A]),
        ("GPU-1f", [C]),
        ("GPU-8932", []),  # two begin so
        ("MIG-5", ["MIG-5"]),
        ("9" * 5_000, []),
        ("\N{SUPERSCRIPT TWO}", []),
    ],
)
def test_the_programs_choice_is_read_as_cuda_reads_it(cuda: str | None, expected: list[str]) -> None:
    environment = {} if cuda is None else {"CUDA_VISIBLE_DEVICES": cuda}
    assert gpus.visible(MACHINE, None, environment) == expected


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("all", MACHINE),
        ("void", MACHINE),  # devices came by another way
        ("2", MACHINE),  # a number of the machine outside
        ("none", []),
        (f"{C},{A}", [C, A]),
        ("MIG-5", ["MIG-5"]),
        (C + ",1", MACHINE),
        ("", MACHINE),
    ],
)
def test_a_container_has_what_it_was_given(container: str, expected: list[str]) -> None:
    assert gpus.visible(MACHINE, None, {"NVIDIA_VISIBLE_DEVICES": container}) == expected


def test_the_program_chooses_among_what_its_container_has() -> None:
    environment = {"NVIDIA_VISIBLE_DEVICES": f"{C},{A}", "CUDA_VISIBLE_DEVICES": "1"}
    assert gpus.visible(MACHINE, None, environment) == [A]
    # What was said from outside wins over the environment of the process that said it.
    assert gpus.visible(MACHINE, ["1", "2"], {**environment}) == [C]
    assert gpus.visible(MACHINE, [], {}) == []
    assert gpus.visible(MACHINE, ["1", "9", C], {}) == [B, C]


@given(
    st.lists(st.uuids().map(lambda each: f"GPU-{each}"), max_size=4, unique=True),
    st.none() | st.lists(st.text(max_size=6), max_size=4),
    st.dictionaries(st.sampled_from([gpus.CUDA, gpus.CONTAINER]), st.text(max_size=20)),
)
def test_whatever_is_written_names_whole_gpus_that_are_there(
    machine: list[str], told: list[str] | None, environment: dict[str, str]
) -> None:
    found = gpus.visible(machine, told, environment)
    assert len(set(found)) == len(found)
    assert all(each in machine or each.startswith("MIG-") for each in found)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the loader finds the fake."""
    folder = tmp_path_factory.mktemp("nvml")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", target, FAKE], check=True)
    return folder


@pytest.fixture
def machine(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that says what there is."""
    file = tmp_path / "machine"
    file.write_text(f"{A} 100 1 2\n{B} 40 {8 * GIB} {80 * GIB}\n{C} 97 {40 * GIB} {80 * GIB}\n")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("FAKE_NVML", str(file))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"1,{C}")
    return file


def test_the_busiest_of_an_engines_gpus_is_in_its_status_and_metrics(machine: Path, tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=running.stub()) as engine:
        engine.wait_for("ready")
        running.until(lambda: engine.status()["usage"]["gpus"])
        assert engine.status()["usage"]["gpus"] == {
            "count": 2,
            "busy": 0.97,
            "memory_bytes": 48 * GIB,
            "memory_limit_bytes": 160 * GIB,
        }
        found = engineclient.vitals(engine.status(), 7.0)
        assert found is not None
        assert found.gpu == 0.97
        metrics = engine.ask("/metrics")[2].decode()
        assert "glowplug_engine_gpu_busy_ratio 0.97\n" in metrics
        assert "glowplug_engine_gpus 2.0\n" in metrics

        # What does not say how busy it is (3, not supported) has memory all the same.
        said = machine.read_text()
        machine.write_text(said + "busy 3\n")
        running.until(lambda: engine.status()["usage"]["gpus"]["busy"] is None)
        assert "glowplug_engine_gpu_busy_ratio" not in engine.ask("/metrics")[2].decode()

        # A driver that does not answer: what was read last gets old, and the engine is asked as ever.
        machine.write_text(said + "hang\n")
        running.until(lambda: engine.status()["usage"]["gpus"] is None)
        unknown = engineclient.vitals(engine.status(), 8.0)
        assert unknown is not None
        assert unknown.gpu is None
        assert engine.ask("/readyz")[0] == 200
        assert engine.end() == 0  # nobody waits for the driver


@pytest.mark.parametrize(("trouble", "words"), [("init 9", "Driver Not Loaded"), ("busy 15", "GPU is lost")])
def test_an_error_of_nvmls_is_said_once_and_fails_nothing(
    machine: Path, tmp_path: Path, trouble: str, words: str
) -> None:
    machine.write_text(machine.read_text() + trouble + "\n")
    with running.engine(tmp_path, engine=running.stub()) as engine:
        engine.wait_for("ready")
        running.until(lambda: engine.events("gpus"))
        assert words in engine.events("gpus")[0]["text"]
        assert engine.status()["usage"]["gpus"] is None
        assert engine.ask("/readyz")[0] == 200
        assert len(engine.events("gpus")) == 1


def test_of_an_engine_without_gpus_there_is_nothing_to_say(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=running.stub(), gpus=[]) as engine:
        engine.wait_for("ready")
        assert engine.status()["usage"]["gpus"] is None
        assert not engine.events("gpus")
