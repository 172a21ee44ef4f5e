"""Setting keys in somebody's TOML: the result says what it should, and undoing it gives back each byte."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import tomledit
from imagefs import errors

_TEXT = """\
# the administrator's
version = 2
imports = [
  "/etc/one.toml", # why
]

[plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "pause:3" # do not touch
    note = '''
[not.a.table]
'''
    [plugins."io.containerd.grpc.v1.cri".containerd]
        snapshotter = "overlayfs" # as ever
        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
            runtime_type = "io.containerd.runc.v2"
[[plugins.transfer.entries]]
name = "a"
"""
_CRI = "io.containerd.grpc.v1.cri"
_WANTED = {
    "imports": ["/etc/one.toml", "/etc/two.toml"],
    "proxy_plugins": {"glowplug": {"type": "snapshot", "exports": {"root": 'a "b" \\ \x7f'}}},
    "plugins": {_CRI: {"containerd": {"snapshotter": "glowplug", "discard": False}}},
}


def test_what_is_set_is_there_and_nothing_else_changed() -> None:
    result = tomledit.apply(_TEXT, _WANTED, "config.toml")
    assert tomllib.loads(result) == tomledit.merge(tomllib.loads(_TEXT), _WANTED)
    assert '# glowplug replaced:         snapshotter = "overlayfs" # as ever\n' in result
    ours = [line for line in result.splitlines() if line.endswith(tomledit.MARK)]
    assert len(ours) == 7
    assert tomledit.revert(result) == _TEXT


def test_setting_again_changes_nothing_and_setting_less_takes_away() -> None:
    once = tomledit.apply(_TEXT, _WANTED, "config.toml")
    assert tomledit.apply(once, _WANTED, "config.toml") == once
    less = {"imports": ["/etc/three.toml"]}
    assert tomledit.apply(once, less, "config.toml") == tomledit.apply(_TEXT, less, "config.toml")


def test_what_is_so_already_is_left_alone() -> None:
    wanted = {"plugins": {_CRI: {"containerd": {"snapshotter": "overlayfs"}}}}
    assert tomledit.apply(_TEXT, wanted, "config.toml") == _TEXT


def test_a_file_without_a_last_newline() -> None:
    result = tomledit.apply("version = 2", {"a": {"b": 1}}, "config.toml")
    assert tomllib.loads(result) == {"version": 2, "a": {"b": 1}}
    assert tomledit.revert(result) == "version = 2\n"


@pytest.mark.parametrize(
    "text",
    ["plugins.a.b = 1\n", "plugins = {a = {b = 1}}\n", "[plugins]\na = {b = 1}\n", "[plugins]\na.b = 1\n"],
)
def test_what_cannot_be_extended_is_refused_and_says_what_to_write(text: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"(?s)cannot be extended.*\[plugins.a\]"):
        tomledit.apply(text, {"plugins": {"a": {"c": 2}}}, "config.toml")


def test_what_is_not_toml_is_named() -> None:
    with pytest.raises(errors.ConfigurationError, match="/etc/x: not TOML"):
        tomledit.apply("a = [", {"b": 1}, "/etc/x")


def test_arrays_of_tables() -> None:
    result = tomledit.apply("", {"t": {"list": [{"a": "x", "b": True}, {"a": "y"}]}}, "new")
    assert tomllib.loads(result) == {"t": {"list": [{"a": "x", "b": True}, {"a": "y"}]}}
    assert tomledit.revert(result) == ""


_KEYS = st.sampled_from(["a", "b", "io.containerd", "c d", "ü"])
_SCALARS = st.one_of(
    st.booleans(),
    st.integers(-5, 1 << 40),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=3),
)
_DOCUMENTS = st.recursive(
    st.dictionaries(_KEYS, _SCALARS, max_size=3),
    lambda inner: st.dictionaries(_KEYS, st.one_of(_SCALARS, inner), max_size=3),
    max_leaves=8,
)


@given(_DOCUMENTS, _DOCUMENTS, _DOCUMENTS)
def test_any_document(theirs: dict[str, Any], wanted: dict[str, Any], other: dict[str, Any]) -> None:
    text = tomledit.revert(tomledit.apply("", theirs, "theirs"))
    assert text == ""
    text = tomledit.apply("", theirs, "theirs").replace(f" {tomledit.MARK}", "  # a comment")
    try:
        result = tomledit.apply(text, wanted, "file")
        assert tomledit.apply(tomledit.apply(text, other, "file"), wanted, "file") == result
    except errors.ConfigurationError:
        return  # a key of theirs where we want a table, or the reverse
    assert tomllib.loads(result) == tomledit.merge(tomllib.loads(text), wanted)
    assert tomledit.revert(result) == text
