"""kubelet's credential provider plugins: the configuration, the matching, the programs themselves."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent import kubelet
from imagefs import errors
from imagefs.origin.credentials import Credential

V1 = "credentialprovider.kubelet.k8s.io/v1"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


def provider(**changes: object) -> dict[str, Any]:
    return {
        "name": "plugin",
        "matchImages": ["*.reg.example"],
        "defaultCacheDuration": "12h",
        "apiVersion": V1,
        **changes,
    }


def document(*providers: object, **changes: object) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1",
        "kind": "CredentialProviderConfig",
        "providers": list(providers),
        **changes,
    }


def response(**changes: object) -> dict[str, Any]:
    return {
        "apiVersion": V1,
        "kind": "CredentialProviderResponse",
        "cacheKeyType": "Registry",
        "auth": {"*.reg.example": {"username": "u", "password": "p"}},
        **changes,
    }


class TestConfig:
    def test_yaml(self) -> None:
        text = b"""
apiVersion: kubelet.config.k8s.io/v1beta1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages: ["*.dkr.ecr.*.amazonaws.com", "*.dkr.ecr.*.amazonaws.com.cn"]
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1beta1
    args: [get-credentials]
    env:
      - {name: AWS_PROFILE, value: s3cret}
"""
        [found] = kubelet.parse_config(text, "cfg")
        assert found == kubelet.Provider(
            "ecr-credential-provider",
            ("*.dkr.ecr.*.amazonaws.com", "*.dkr.ecr.*.amazonaws.com.cn"),
            12 * 3600,
            "credentialprovider.kubelet.k8s.io/v1beta1",
            ("get-credentials",),
            {"AWS_PROFILE": "s3cret"},
        )
        assert "s3cret" not in repr(found)

    def test_json_is_yaml(self) -> None:
        [found] = kubelet.parse_config(json.dumps(document(provider())).encode(), "cfg")
        assert found.name == "plugin"

    def test_what_needs_a_pods_token_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        config = document(provider(), provider(name="other", tokenAttributes={"requireServiceAccount": True}))
        assert [p.name for p in kubelet.parse_config(json.dumps(config).encode(), "cfg")] == ["plugin"]
        assert "service account" in caplog.text

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"p4ss: [",
            b"p4ss: !!python/object/apply:os.system [id]",
            yaml.safe_dump(document(kind="Other")).encode(),
            yaml.safe_dump(document(apiVersion="kubelet.config.k8s.io/v9")).encode(),
            yaml.safe_dump(document(providers={"p4ss": 1})).encode(),
            *(
                yaml.safe_dump(document(provider(**change))).encode()
                for change in (
                    {"name": "../p4ss"},
                    {"name": "a b"},
                    {"name": ".."},
                    {"name": 5},
                    {"matchImages": []},
                    {"matchImages": "p4ss"},
                    {"defaultCacheDuration": None},
                    {"defaultCacheDuration": "soon"},
                    {"apiVersion": "v1"},
                    {"args": [1]},
                    {"env": [{"name": "A=B", "value": "p4ss"}]},
                    {"env": ["p4ss"]},
                )
            ),
            yaml.safe_dump(document(provider(), provider())).encode(),
        ],
    )
    def test_malformed(self, data: bytes) -> None:
        with pytest.raises(errors.InvalidInputError, match="cfg") as caught:
            kubelet.parse_config(data, "cfg")
        assert "p4ss" not in str(caught.value)

    @given(st.dictionaries(st.sampled_from(sorted(provider())), JSON) | JSON)
    def test_any_provider(self, change: Any) -> None:
        entry = provider(**change) if isinstance(change, dict) and set(change) <= set(provider()) else change
        try:
            found = kubelet.parse_config(json.dumps(document(entry)).encode(), "cfg")
        except errors.InvalidInputError:
            return
        assert all("/" not in p.name and p.match_images for p in found)

    @given(st.binary(max_size=60))
    def test_any_bytes(self, data: bytes) -> None:
        with pytest.raises(errors.InvalidInputError):
            kubelet.parse_config(data, "cfg")


class TestMatching:
    @pytest.mark.parametrize(
        ("pattern", "image", "wanted"),
        [
            ("reg.example", "reg.example/a/b", True),
            ("reg.example/a", "reg.example/a/b", True),
            ("reg.example/a", "reg.example/b", False),
            ("*.reg.example", "eu.reg.example/a", True),
            ("*.reg.example", "reg.example/a", False),
            ("*.reg.example", "x.eu.reg.example/a", False),
            ("*.*.reg.example", "x.eu.reg.example/a", True),
            ("reg.*", "reg.example/a", True),
            ("app*.reg.example", "app1.reg.example/a", True),
            ("reg.example", "reg.example:5000/a", False),
            ("reg.example:5000", "reg.example:5000/a", True),
            ("https://reg.example", "reg.example/a", True),
            ("reg.example", "evilreg.example/a", False),
            ("*", "localhost/a", True),
            ("", "reg.example/a", False),
            ("[", "reg.example/a", False),
        ],
    )
    def test_as_kubelet(self, pattern: str, image: str, wanted: bool) -> None:
        assert kubelet.matches(pattern, image) is wanted

    @given(st.text(max_size=20), st.text(max_size=20))
    def test_any_text(self, pattern: str, image: str) -> None:
        assert kubelet.matches(pattern, image) in (True, False)

    def test_the_more_specific_first(self) -> None:
        entries = {
            "r.example": Credential("host", "1"),
            "r.example/a": Credential("team", "1"),
            "x": Credential(),
        }
        assert [c.username for c in kubelet.entries_for(entries, "r.example/a/b")] == ["team", "host"]
        assert [c.username for c in kubelet.entries_for(entries, "r.example/b")] == ["host"]


class TestResponse:
    def test_known(self) -> None:
        found = kubelet.parse_response(json.dumps(response(cacheDuration="5m0s")).encode(), V1, "w")
        assert found == kubelet.Response("Registry", 300, {"*.reg.example": Credential("u", "p")})
        assert kubelet.parse_response(json.dumps(response(auth=None)).encode(), V1, "w").entries == {}

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "p4ss"},
            {"apiVersion": "v2"},
            {"cacheKeyType": "p4ss"},
            {"cacheDuration": "p4ss"},
            {"auth": "p4ss"},
            {"auth": {"x": "p4ss"}},
            {"auth": {"x": {"username": "p4ss", "password": 5}}},
            {"auth": {str(n): {} for n in range(2000)}},
        ],
    )
    def test_malformed(self, change: dict[str, object]) -> None:
        with pytest.raises(errors.InvalidInputError, match="where") as caught:
            kubelet.parse_response(json.dumps(response(**change)).encode(), V1, "where")
        assert "p4ss" not in str(caught.value)

    @given(st.dictionaries(st.sampled_from([*response(), "cacheDuration"]), JSON))
    def test_any_answer(self, change: dict[str, Any]) -> None:
        try:
            kubelet.parse_response(json.dumps({**response(), **change}).encode(), V1, "w")
        except errors.InvalidInputError:
            return

    @given(st.binary(max_size=40))
    def test_any_bytes(self, data: bytes) -> None:
        with pytest.raises(errors.InvalidInputError, match="w: "):
            kubelet.parse_response(data, V1, "w")


class Node:
    """A configuration and a plugin that counts how often it ran, by a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.yaml"
        self.clock = 1000.0
        self.configure(provider())
        self.install(self.answering())

    def configure(self, *providers: object) -> None:
        self.config.write_text(yaml.safe_dump(document(*providers)))

    def answering(self, **changes: object) -> str:
        (self.directory / "answer").write_text(json.dumps(response(**changes)))
        return f"cat {self.directory}/answer"

    def install(self, script: str, name: str = "plugin") -> None:
        plugin = self.directory / name
        plugin.write_text(
            f"#!/bin/sh\necho run >> {self.directory}/runs\ncat > {self.directory}/request\n{script}\n"
        )
        plugin.chmod(0o755)

    def runs(self) -> int:
        file = self.directory / "runs"
        return len(file.read_text().split()) if file.exists() else 0

    def plugins(self, timeout_seconds: float = 30) -> kubelet.Plugins:
        return kubelet.Plugins(self.config, self.directory, timeout_seconds, lambda: self.clock)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def running(group: int) -> list[str]:
    """The processes of a group; dead ones that nobody has waited for don't count."""
    out = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = entry.read_text().rpartition(")")[2].split()[:3]
            if its_group == str(group) and state not in "ZX":
                out.append(entry.parent.name)
    return out


def ask(plugins: kubelet.Plugins, host: str = "eu.reg.example", *refused: Credential) -> list[Credential]:
    return list(plugins.candidates(host, "a/b", {credential.fingerprint for credential in refused}))


class TestPlugins:
    def test_question_arguments_and_environment(self, node: Node) -> None:
        node.configure(provider(args=["get", "x y"], env=[{"name": "FOO", "value": "bar"}]))
        node.install(f'echo "$# $2 $FOO" > {node.directory}/seen; ' + node.answering())
        assert ask(node.plugins()) == [Credential("u", "p")]
        assert (node.directory / "seen").read_text() == "2 x y bar\n"
        assert json.loads((node.directory / "request").read_text()) == {
            "apiVersion": V1,
            "kind": "CredentialProviderRequest",
            "image": "eu.reg.example/a/b",
        }

    def test_not_for_other_images(self, node: Node) -> None:
        assert ask(node.plugins(), "other.example") == []
        assert node.runs() == 0

    @pytest.mark.parametrize(
        ("kind", "runs"), [("Image", {"a/b": 1, "c": 2}), ("Registry", {"a/b": 1, "c": 1})]
    )
    def test_kept_by_the_key_that_the_answer_names(self, node: Node, kind: str, runs: dict[str, int]) -> None:
        node.answering(cacheKeyType=kind)
        plugins = node.plugins()
        for repository, wanted in runs.items():
            list(plugins.candidates("eu.reg.example", repository, set()))
            assert node.runs() == wanted
        list(plugins.candidates("us.reg.example", "a/b", set()))
        assert node.runs() == max(runs.values()) + 1

    def test_kept_for_all(self, node: Node) -> None:
        node.answering(cacheKeyType="Global")
        plugins = node.plugins()
        for host in ("eu.reg.example", "us.reg.example"):
            assert ask(plugins, host)
        assert node.runs() == 1

    def test_kept_for_as_long_as_the_answer_says(self, node: Node) -> None:
        node.answering(cacheDuration="60s")
        plugins = node.plugins()
        ask(plugins)
        node.clock += 59
        ask(plugins)
        assert node.runs() == 1
        node.clock += 2
        ask(plugins)
        assert node.runs() == 2

    def test_not_kept_at_all(self, node: Node) -> None:
        node.answering(cacheDuration="0s")
        plugins = node.plugins()
        ask(plugins)
        ask(plugins)
        assert node.runs() == 2

    def test_a_refused_answer_is_asked_for_anew_but_not_in_a_loop(self, node: Node) -> None:
        plugins = node.plugins()
        [old] = ask(plugins)
        assert ask(plugins, "eu.reg.example", old) == [old]
        assert node.runs() == 1, "it is younger than what could have been rotated"
        node.clock += 11
        node.answering(auth={"*.reg.example": {"username": "u", "password": "rotated"}})
        assert ask(plugins, "eu.reg.example", old) == [Credential("u", "rotated")]
        assert node.runs() == 2

    def test_the_configuration_counts_when_it_changes(self, node: Node) -> None:
        plugins = node.plugins()
        ask(plugins)
        node.configure(provider(matchImages=["nothing.example"]))
        assert ask(plugins) == []

    def test_a_folder_of_configurations(self, node: Node) -> None:
        folder = node.directory / "conf.d"
        folder.mkdir()
        (folder / "b.yaml").write_text(yaml.safe_dump(document(provider(name="second"))))
        (folder / "a.json").write_text(json.dumps(document(provider())))
        (folder / "README").write_text("not this")
        node.install(node.answering(), "second")
        plugins = kubelet.Plugins(folder, node.directory)
        assert len(ask(plugins)) == 2

    def test_many_askers_one_run(self, node: Node) -> None:
        plugins = node.plugins()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(plugins), range(32)))
        assert answers == [[Credential("u", "p")]] * 32
        assert node.runs() == 1

    def test_a_program_that_hangs_for_one_image_holds_up_no_other(self, node: Node) -> None:
        gate, waits = node.directory / "gate", node.directory / "waits"
        wait = f"touch {waits}; while [ ! -e {gate} ]; do sleep 0.05; done"
        node.install(f"if grep -q slow {node.directory}/request; then {wait}; fi; {node.answering()}")
        plugins = node.plugins()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(ask, plugins, "slow.reg.example")
            try:
                while not waits.exists():
                    assert not slow.done()
                assert ask(plugins) == [Credential("u", "p")]
                assert not slow.done()
            finally:
                gate.touch()
            assert slow.result(30) == [Credential("u", "p")]

    def test_who_waited_for_a_program_that_failed_does_not_wait_for_it_again(self, node: Node) -> None:
        gate = node.directory / "gate"
        node.install(f"while [ ! -e {gate} ]; do sleep 0.05; done; exit 3")
        plugins = node.plugins()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, plugins) for _ in range(8)]
            while sum(question.askers for question in plugins._questions.values()) < 8:
                assert not any(each.done() for each in asked)
            gate.touch()
            for each in asked:
                with pytest.raises(errors.UnavailableError, match="status 3"):
                    each.result(30)
        assert node.runs() == 1
        assert not plugins._questions

    @pytest.mark.parametrize(
        ("script", "error", "said"),
        [
            ("echo s3cret; echo s3cret >&2; exit 3", errors.UnavailableError, "status 3"),
            ("echo s3cret", errors.InvalidInputError, "not a JSON object"),
            ("yes s3cret", errors.InvalidInputError, "more than"),
            ("exec sleep 1000", errors.UnavailableError, "no answer in 1 s"),
            ("sleep 1000 & sleep 1000", errors.UnavailableError, "no answer in 1 s"),
        ],
        ids=["fails", "nonsense", "floods", "hangs", "leaves children"],
    )
    def test_broken(self, node: Node, script: str, error: type[errors.ImagefsError], said: str) -> None:
        node.install(f"echo $$ > {node.directory}/pid\n{script}")
        with pytest.raises(error, match=said) as caught:
            ask(node.plugins(timeout_seconds=1 if "sleep" in script else 30))
        assert "plugin for eu.reg.example/a/b" in str(caught.value)
        assert "s3cret" not in str(caught.value)
        pid = int((node.directory / "pid").read_text())
        ticker = threading.Event()
        while running(pid):
            ticker.wait(0.02)

    def test_missing(self, node: Node) -> None:
        (node.directory / "plugin").unlink()
        with pytest.raises(errors.ConfigurationError, match="cannot run"):
            ask(node.plugins())

    def test_a_broken_one_does_not_hide_the_next(self, node: Node) -> None:
        node.configure(provider(name="broken"), provider())
        node.install("exit 1", "broken")
        found = node.plugins().candidates("eu.reg.example", "a/b", set())
        assert next(iter(found)) == Credential("u", "p")

    def test_a_broken_configuration(self, node: Node) -> None:
        node.config.write_text("broken")
        with pytest.raises(errors.ConfigurationError, match=r"config\.yaml"):
            ask(node.plugins())
        node.config.unlink()
        with pytest.raises(errors.ConfigurationError, match=r"config\.yaml"):
            ask(node.plugins())
