"""What `run` starts, from image config and options; users by the image's own files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowplug import process
from imagefs import errors

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nbroken\nbad:x:NaN:0:::\napp:x:1000:1001::/home/app:/bin/sh\n"
GROUP = b"root:x:0:\nappg:x:1001:\nvideo:x:44:other,app\naudio:x:63:app\n"
CONFIG: dict[str, Any] = {
    "config": {
        "Entrypoint": ["/entry"],
        "Cmd": ["a", "b"],
        "Env": ["PATH=/bin", "A=1"],
        "User": "app",
        "WorkingDir": "/srv",
    }
}


def test_the_config_alone() -> None:
    found = process.from_config(CONFIG, ())
    assert found.argv == ("/entry", "a", "b")
    assert found.environment == {"PATH": "/bin", "A": "1"}
    assert (found.directory, found.user) == ("/srv", "app")


def test_options_come_first() -> None:
    found = process.from_config(
        CONFIG, ["sh", "-c", "x"], environment=["A=2", "B=x=y"], directory="/tmp", user="0", terminal="vt100"
    )
    assert found.argv == ("sh", "-c", "x")
    assert found.environment == {"PATH": "/bin", "A": "2", "B": "x=y", "TERM": "vt100"}
    assert (found.directory, found.user) == ("/tmp", "0")


def test_an_empty_config() -> None:
    found = process.from_config({}, ["sh"])
    assert found.environment == {"PATH": process.DEFAULT_PATH}
    assert (found.directory, found.user) == ("/", "")
    with pytest.raises(errors.InvalidInputError, match="names no command"):
        process.from_config({}, ())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Entrypoint", "sh"),
        ("Cmd", [1]),
        ("Env", ["NOEQUALS"]),
        ("User", 5),
        ("WorkingDir", "here"),
        ("Cmd", ["a\0b"]),
    ],
)
def test_strange_configs_are_refused(field: str, value: object) -> None:
    with pytest.raises(errors.InvalidInputError):
        process.from_config({"config": {"Cmd": ["x"], field: value}}, ())


@pytest.mark.parametrize(
    ("spec", "uid", "gid", "groups", "home"),
    [
        ("", 0, 0, (0,), "/root"),
        ("app", 1000, 1001, (44, 63, 1001), "/home/app"),
        ("1000", 1000, 1001, (44, 63, 1001), "/home/app"),
        ("app:video", 1000, 44, (44,), "/home/app"),
        ("app:7", 1000, 7, (7,), "/home/app"),
        ("4242", 4242, 0, (0,), ""),
        ("4242:4243", 4242, 4243, (4243,), ""),
    ],
)
def test_users(spec: str, uid: int, gid: int, groups: tuple[int, ...], home: str) -> None:
    assert process.resolve_user(spec, PASSWD, GROUP) == process.Identity(uid, gid, groups, home)


@pytest.mark.parametrize("spec", ["nobody", "app:nobody", "-1", "4294967295"])
def test_users_that_the_image_lacks(spec: str) -> None:
    with pytest.raises(errors.InvalidInputError, match="is not in the image"):
        process.resolve_user(spec, PASSWD, GROUP)


@given(st.text(max_size=20), st.binary(max_size=200), st.binary(max_size=200))
def test_whatever_the_files_hold(spec: str, passwd: bytes, group: bytes) -> None:
    try:
        found = process.resolve_user(spec, passwd, group)
    except errors.InvalidInputError:
        return
    assert 0 <= found.uid < 1 << 32
    assert all(0 <= number < 1 << 32 for number in (found.gid, *found.groups))


def test_numbers_of_thousands_of_digits_are_no_numbers() -> None:
    passwd = b"app:x:" + b"9" * 5000 + b":0::/:/bin/sh\n" + PASSWD
    assert process.resolve_user("app", passwd, b"").uid == 1000
    with pytest.raises(errors.InvalidInputError, match="not in the image"):
        process.resolve_user("1" * 5000, PASSWD, GROUP)
