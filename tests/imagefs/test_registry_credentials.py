"""Where registry credentials come from: config files, helpers, and that they show up nowhere."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors
from imagefs.origin import credentials
from imagefs.origin.credentials import Config, Credential

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
NAMES = st.sampled_from(
    ["auths", "credHelpers", "credsStore", "auth", "identitytoken", "username", "password"]
)


def encoded(pair: str) -> str:
    return base64.b64encode(pair.encode()).decode()


def config(**fields: object) -> bytes:
    return json.dumps(fields).encode()


class TestParse:
    def test_kinds(self) -> None:
        parsed = credentials.parse(
            config(
                auths={
                    "reg.example": {"auth": encoded("me:pass:word")},
                    "https://old.example/v1/": {"username": "u", "password": "p"},
                    "id.example:5000": {"auth": encoded("u:"), "identitytoken": "tok"},
                    "ready.example": {"registrytoken": "bearer"},
                    "empty.example": {},
                },
                credHelpers={"aws.example": "ecr-login"},
                credsStore="desktop",
            ),
            "c",
        )
        assert parsed.auths == {
            "reg.example": Credential("me", "pass:word"),
            "old.example": Credential("u", "p"),
            "id.example:5000": Credential("u", "", "tok"),
            "ready.example": Credential(registry_token="bearer"),
        }
        assert parsed.helpers == {"aws.example": "ecr-login"}
        assert parsed.default_helper == "desktop"

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"[]",
            b"{",
            config(auths=[1]),
            config(auths={"h": 1}),
            config(auths={"h": {"auth": "not base64!"}}),
            config(auths={"h": {"auth": encoded("nocolon")}}),
            config(auths={"h": {"password": 5}}),
            config(credsStore="../../bin/sh"),
            config(credsStore="a b"),
            config(credHelpers={"h": "x/y"}),
        ],
    )
    def test_malformed(self, data: bytes) -> None:
        with pytest.raises(errors.InvalidInputError, match="cfg"):
            credentials.parse(data, "cfg")

    def test_messages_hold_no_secret(self) -> None:
        with pytest.raises(errors.InvalidInputError) as caught:
            credentials.parse(config(auths={"h": {"auth": "c2VjcmV0!!"}}), "cfg")
        assert "c2VjcmV0" not in str(caught.value)
        assert "hunter2" not in repr(Credential("u", "hunter2", "hunter2", "hunter2"))

    @given(st.dictionaries(NAMES, st.dictionaries(NAMES | st.text(max_size=8), JSON, max_size=4) | JSON))
    def test_any_json_is_parsed_or_refused(self, document: dict[str, object]) -> None:
        try:
            parsed = credentials.parse(json.dumps(document).encode(), "cfg")
        except errors.InvalidInputError:
            return
        assert all("/" not in name for name in parsed.helpers.values())

    @given(st.binary(max_size=100))
    def test_any_bytes(self, data: bytes) -> None:
        try:
            credentials.parse(data, "cfg")
        except errors.InvalidInputError:
            return


class TestChoose:
    def test_longest_key_wins(self) -> None:
        have = Config(
            {"h": Credential("host"), "h/a": Credential("team"), "h/a/b/c": Credential("deep")},
            {"h/x": "helper"},
            "default",
        )
        choose = credentials.choose
        assert choose(have, "h", "z") == Credential("host")
        assert choose(have, "h", "a/b") == Credential("team")
        assert choose(have, "h", "a/b/c") == Credential("deep")
        assert choose(have, "h", "ab") == Credential("host")
        assert choose(have, "h", "x/y") == "helper"
        assert choose(have, "other", "a") == "default"
        assert choose(Config({}, {}, None), "other", "a") is None


class TestFiles:
    def test_order(self, tmp_path: Path) -> None:
        both = {"HOME": "/h", "XDG_RUNTIME_DIR": "/run/u"}
        assert credentials.config_files(None, both) == [
            Path("/h/.docker/config.json"),
            Path("/run/u/containers/auth.json"),
        ]
        assert credentials.config_files(None, {**both, "DOCKER_CONFIG": "/d"})[0] == Path("/d/config.json")
        assert credentials.config_files(tmp_path, both) == [tmp_path / "config.json"]
        assert credentials.config_files(tmp_path / "c.json", both) == [tmp_path / "c.json"]

    def test_the_first_that_knows_the_host_and_always_anew(self, tmp_path: Path) -> None:
        first, second = tmp_path / "a.json", tmp_path / "b.json"
        store = credentials.Store([first, second], "h", "repo")
        assert store.look_up() is None
        second.write_bytes(config(auths={"h": {"auth": encoded("b:2")}}))
        assert store.look_up() == Credential("b", "2")
        first.write_bytes(config(auths={"other": {"auth": encoded("a:1")}}))
        assert store.look_up() == Credential("b", "2")
        first.write_bytes(config(auths={"h": {"auth": encoded("a:1")}}))
        assert store.look_up() == Credential("a", "1")
        first.write_bytes(b"broken")
        with pytest.raises(errors.ConfigurationError, match=r"a\.json"):
            store.look_up()


class TestHelpers:
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> credentials.Store:
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        (tmp_path / "config.json").write_bytes(config(credHelpers={"h": "test"}))
        return credentials.Store([tmp_path / "config.json"], "h", "repo")

    def install(self, tmp_path: Path, script: str) -> None:
        helper = tmp_path / "docker-credential-test"
        helper.write_text(f"#!/bin/sh\n{script}\n")
        helper.chmod(0o755)

    def test_name_and_secret(self, store: credentials.Store, tmp_path: Path) -> None:
        self.install(
            tmp_path, """read host; echo "{\\"Username\\": \\"$1-$host\\", \\"Secret\\": \\"s\\"}" """
        )
        assert store.look_up() == Credential("get-h", "s")

    def test_identity_token(self, store: credentials.Store, tmp_path: Path) -> None:
        self.install(tmp_path, """echo '{"Username": "<token>", "Secret": "t"}'""")
        assert store.look_up() == Credential(identity_token="t")

    def test_knows_nothing(self, store: credentials.Store, tmp_path: Path) -> None:
        self.install(tmp_path, "echo credentials not found in native keychain; exit 1")
        assert store.look_up() is None

    @pytest.mark.parametrize(
        "script", ["echo s3cret; exit 3", "echo s3cret", 'echo \'{"Username": 1, "Secret": "s3cret"}\'']
    )
    def test_broken(self, store: credentials.Store, tmp_path: Path, script: str) -> None:
        self.install(tmp_path, script)
        with pytest.raises(errors.ConfigurationError, match="docker-credential-test") as caught:
            store.look_up()
        assert "s3cret" not in str(caught.value)

    def test_missing(self, store: credentials.Store) -> None:
        with pytest.raises(errors.ConfigurationError, match="docker-credential-test"):
            store.look_up()
