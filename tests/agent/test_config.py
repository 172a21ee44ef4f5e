"""agent.config: every table is read, and what is misspelt or of the wrong type is named."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config
from imagefs import errors


def test_an_empty_file_is_the_defaults() -> None:
    assert config.parse("", "f") == config.Settings()


def test_every_kind_of_value() -> None:
    settings = config.parse(
        """
        root = "/data/agent"
        [cache]
        quota_bytes = "3G"
        free_floor_percent = 20
        [reads]
        deadline_seconds = 5
        [images]
        trust = "pinned"
        pins = [{ source = "sha256:aa", block_image = "sha256:bb" }]
        signature_keys = ["/etc/key.pem"]
        [images.block_repositories]
        "docker.io/library/" = "docker://mirror.test/blocks"
        [registries]
        ca_file = "/ca.pem"
        [peers]
        members = ["a:1", "b:2"]
        """,
        "f",
    )
    assert settings.root == Path("/data/agent")
    assert settings.cache.quota_bytes == 3 << 30
    assert settings.reads.deadline_seconds == 5.0
    assert settings.images.pins == (config.Pin("sha256:aa", "sha256:bb"),)
    assert settings.images.signature_keys == (Path("/etc/key.pem"),)
    assert settings.images.block_repositories == {"docker.io/library/": "docker://mirror.test/blocks"}
    assert settings.registries.ca_file == Path("/ca.pem")
    assert settings.peers.members == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cach = 1", "cach"),
        ("[cache]\nquota = 1", "cache.quota"),
        ("[cache]\nquota_bytes = -1", "cache.quota_bytes"),
        ("[cache]\nquota_bytes = '3X'", "cache.quota_bytes"),
        ("[cache]\nquota_bytes = true", "cache.quota_bytes"),
        ("[cache]\ndirectory = 'relative'", "cache.directory"),
        ("cache = 3", "cache"),
        ("[images]\ntrust = 'all'", "images.trust"),
        ("[images]\ntrust = 'signed'", "images.signature_keys"),
        ("[http]\nlisten = '7310'", "http.listen"),
        ("[images]\npins = [{ source = 'x' }]", "images.pins[0].block_image"),
        ("[peers]\nmembers = [1]", "peers.members[0]"),
        ("[images.block_repositories]\na = 1", "images.block_repositories.a"),
        ("=", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        config.parse(text, "agent.toml")
    assert "agent.toml" in str(caught.value)
    assert named in str(caught.value)


@given(st.text())
def test_any_text_is_settings_or_a_configuration_error(text: str) -> None:
    with contextlib.suppress(errors.ConfigurationError):
        config.parse(text, "f")
