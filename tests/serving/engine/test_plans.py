"""Settings, vLLM's arguments, processors, words on the wire: what is decided without doing anything."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.endpoint import VllmEngine
from serving.engine import admission, processors, settings, vllm
from serving.engine.state import Limits, State


def _vllm(**given: object) -> tuple[settings.Settings, VllmEngine]:
    found = settings.check({"engine": {"kind": "vllm"}, "model": "/models/chat", **given}, "test")
    assert isinstance(found.engine, VllmEngine)
    return found, found.engine


def _option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


# -- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "mapping"),
        ("{", "not YAML"),
        ("engine: {kind: vllm}", "model"),
        ("engine: {kind: mlflow}", "engine"),
        ("engine: {kind: command, command: [x]}\nlimit: 0", "limit"),
        ("engine: {kind: command, command: [x]}\nlimits: 3", "limits"),
        ("engine: {kind: command, command: [x]}\nport: 70000", "port"),
        ("engine: {kind: command, command: [x]}\nhealth: {stall_seconds: 50}", "within a minute"),
    ],
)
def test_settings_that_are_wrong_name_file_and_key(text: str, message: str) -> None:
    with pytest.raises(errors.DocumentError, match=r"^engine\.yaml: .*") as caught:
        settings.load(text, "engine.yaml")
    assert message in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_any_other_document_is_a_document_error(document: object) -> None:
    with pytest.raises(errors.DocumentError, match=r"^f: "):
        settings.load(json.dumps(document), "f")


# -- vLLM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpus", "count"), [(1, 1), (2, 1), (4, 1), (6, 2), (8, 3), (64, 4)])
def test_api_servers_follow_the_processors_unless_said(cpus: int, count: int) -> None:
    assert vllm.api_servers(_vllm()[1], cpus) == count
    assert vllm.api_servers(_vllm(engine={"kind": "vllm", "api_servers": 3})[1], cpus) == 3


def test_fp8_is_online_only_where_the_checkpoint_is_not_quantized() -> None:
    found, engine = _vllm(fp8=True)
    plain = vllm.arguments(found, engine, "/models/chat", vllm.Checkpoint(), 8)
    assert _option(plain, "--quantization") == "fp8_per_channel"
    assert "--quantization" not in vllm.arguments(
        found, engine, "/models/chat", vllm.Checkpoint(quantized=True), 8
    )


def test_weights_in_a_bucket_are_streamed() -> None:
    found, engine = _vllm(model="s3://models/chat")
    arguments = vllm.arguments(found, engine, "s3://models/chat", vllm.Checkpoint(), 8)
    assert _option(arguments, "--load-format") == "runai_streamer"
    assert "HF_HUB_OFFLINE" not in vllm.environment(found, "s3://models/chat", 8)
    local, engine = _vllm()
    assert "--load-format" not in vllm.arguments(local, engine, "/models/chat", vllm.Checkpoint(), 8)


def test_the_documents_own_arguments_come_last() -> None:
    found, engine = _vllm(
        engine={"kind": "vllm", "arguments": ["--max-model-len", "99"]}, traces_endpoint="http://t"
    )
    arguments = vllm.arguments(found, engine, "/models/chat", vllm.Checkpoint(multimodal=True), 8)
    assert arguments[-2:] == ["--max-model-len", "99"]
    assert _option(arguments, "--otlp-traces-endpoint") == "http://t"
    assert json.loads(_option(arguments, "--mm-processor-kwargs") or "") == {"backend": "torchvision"}


def test_threads_follow_the_cgroup_and_caches_lie_in_one_directory() -> None:
    found, _ = _vllm(cache_directory="/cache")
    environment = vllm.environment(found, "/models/chat", 3)
    assert environment["OMP_NUM_THREADS"] == "3"
    caches = [value for name, value in environment.items() if "CACHE" in name]
    assert len(caches) >= 4
    assert all(value.startswith("/cache/") for value in caches)


@given(st.text())
def test_any_config_json_is_read(text: str) -> None:
    assert isinstance(vllm.read_checkpoint(text), vllm.Checkpoint)


def test_a_checkpoint_says_what_it_is() -> None:
    assert vllm.read_checkpoint('{"quantization_config": {}, "vision_config": {}}') == vllm.Checkpoint(
        True, True
    )


# -- processors ------------------------------------------------------------------------------------------


def _version_2(root: Path, text: str, folder: str = "") -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "cpu.max").write_text(text)


@pytest.mark.parametrize(
    ("above", "own", "count"),
    [
        ("max 100000", "max 100000", None),
        ("max 100000", "150000 100000", 1),
        ("50000 100000", "max 100000", 1),
    ],
)
def test_the_narrowest_quota_of_version_2_counts(
    tmp_path: Path, above: str, own: str, count: int | None
) -> None:
    _version_2(tmp_path, above, "pod")
    _version_2(tmp_path, own, "pod/container")
    (tmp_path / "self").write_text("0::/pod/container\n")
    everything = len(os.sched_getaffinity(0))
    assert processors.available(tmp_path / "self", tmp_path) == (count or everything)


def test_a_namespace_of_its_own_shows_the_quota_at_the_root(tmp_path: Path) -> None:
    _version_2(tmp_path, "100000 100000")
    (tmp_path / "self").write_text("0::/../../kubepods/x\n")
    assert processors.available(tmp_path / "self", tmp_path) == 1


def test_version_1_is_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "cpu" / "docker" / "x"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("100000")
    (folder / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "self").write_text("4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n")
    assert processors.available(tmp_path / "self", tmp_path) == 1
    (folder / "cpu.cfs_quota_us").write_text("-1")
    assert processors.available(tmp_path / "self", tmp_path) == len(os.sched_getaffinity(0))


@given(st.text(), st.text())
def test_any_cgroup_files_give_a_number(listed: str, quota: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "self").write_text("0::/\n" + listed, errors="replace")
        (folder / "cpu.max").write_text(quota, errors="replace")
        assert 1 <= processors.available(folder / "self", folder) <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("quota", ["100000 0", "-5 100000", "0 0", ""])
def test_a_quota_that_makes_no_sense_is_none_or_one(tmp_path: Path, quota: str) -> None:
    _version_2(tmp_path, quota)
    (tmp_path / "self").write_text("0::/\n")
    assert processors.available(tmp_path / "self", tmp_path) >= 1


# -- the wire --------------------------------------------------------------------------------------------


def test_probes_map_states() -> None:
    answers = {
        path: {state for state in State if admission.probe(path, state)[0] == 200}
        for path in admission.PROBES
    }
    assert answers[admission.READY] == {State.READY}
    assert answers[admission.STARTED] == {State.READY, State.DRAINING}
    assert answers[admission.LIVE] == set(State) - {State.HUNG}


_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(
    st.dictionaries(st.sampled_from(["in_flight", "queue_requests", "queue_seconds", "x"]), _VALUES) | _VALUES
)
def test_any_body_is_limits_that_can_be_kept_or_an_error(document: object) -> None:
    now = Limits(4, 2, 1.5)
    try:
        wanted = admission.limits(document, now)
    except errors.DocumentError:
        assert document != {}
        return
    assert wanted.in_flight >= 1
    assert wanted.queue_requests >= 0
    assert 0 < wanted.queue_seconds <= 86_400
    assert isinstance(document, dict)
    assert dataclasses.replace(now, **document) == wanted


@given(st.integers(0, 10_000), st.integers(1, 1_000), st.floats(0, 1e6))
def test_retry_after_is_a_time_that_clients_can_wait(ahead: int, limit: int, mean: float) -> None:
    assert 1 <= admission.retry_after_seconds(ahead, limit, mean) <= 60


def test_monitors_pass_by_the_limit_and_work_does_not() -> None:
    assert not admission.counts("/v1/models")
    assert admission.counts("/v1/completions")
    assert admission.counts("/anything")
