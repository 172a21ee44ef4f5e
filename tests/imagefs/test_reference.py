"""REFs: every form that the README names, round trips, and what is refused."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors, reference

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("docker://localhost:5000/app", ("docker", "localhost:5000/app", None, None)),
        ("docker://r.example/team/app:v1", ("docker", "r.example/team/app", "v1", None)),
        (f"docker://r.example/app@sha256:{HEX}", ("docker", "r.example/app", None, f"sha256:{HEX}")),
        ("docker://[::1]:5000/app:v1", ("docker", "[::1]:5000/app", "v1", None)),
        ("docker-daemon:app:v1", ("docker-daemon", "app", "v1", None)),
        ("docker-daemon:localhost:5000/app", ("docker-daemon", "localhost:5000/app", None, None)),
        ("docker-archive:/tmp/a.tar", ("docker-archive", "/tmp/a.tar", None, None)),
        ("docker-archive:/tmp/a.tar:app:v1", ("docker-archive", "/tmp/a.tar", "app:v1", None)),
        ("oci:dir", ("oci", "dir", None, None)),
        ("oci:/a/b.c/dir:v1", ("oci", "/a/b.c/dir", "v1", None)),
        ("oci:/a@b/dir:v1", ("oci", "/a@b/dir", "v1", None)),
        (f"oci:dir@sha256:{HEX}", ("oci", "dir", None, f"sha256:{HEX}")),
        ("s3://bucket/a/prefix:v1", ("s3", "bucket/a/prefix", "v1", None)),
    ],
)
def test_forms(text: str, expected: tuple[str, str, str | None, str | None]) -> None:
    ref = reference.parse(text)
    assert (ref.transport, ref.location, ref.tag, ref.digest) == expected
    assert str(ref) == text


def test_digest_beats_tag() -> None:
    ref = reference.parse(f"docker://localhost:5000/app:v1@sha256:{HEX}")
    assert str(ref) == f"docker://localhost:5000/app@sha256:{HEX}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "app",
        "http://x/y",
        "docker://",
        "docker://host",
        "docker://host/UPPER",
        "docker://host/app:",
        "docker://host/app:bad tag",
        "docker://host/app@sha256:short",
        "docker://host/app@md5:aaaa",
        "docker://user@host/app",
        "docker://host/../app",
        "oci:",
        "oci::tag",
        "s3://bucket",
        "s3://bucket/",
        "s3://b/prefix",
        "s3://bucket/a/:v1",
        "oci:a\0b",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(errors.InvalidInputError) as caught:
        reference.parse(text)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=60) | st.text(alphabet=string.ascii_letters + ":/@.-_0", max_size=60))
def test_any_text_is_parsed_or_refused(rest: str) -> None:
    for prefix in ("", "docker://", "oci:", "s3://", "docker-archive:", "docker-daemon:"):
        try:
            ref = reference.parse(prefix + rest)
        except errors.InvalidInputError:
            continue
        assert reference.parse(str(ref)) == ref


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ubuntu", "docker://docker.io/library/ubuntu"),
        ("docker://ubuntu:22.04", "docker://docker.io/library/ubuntu:22.04"),
        ("team/app:v1", "docker://docker.io/team/app:v1"),
        ("localhost:5000/app", "docker://localhost:5000/app"),
        (f"r.example/app@sha256:{HEX}", f"docker://r.example/app@sha256:{HEX}"),
    ],
)
def test_who_writes_as_docker_does_is_told_what_that_is_here(text: str, meant: str) -> None:
    with pytest.raises(errors.InvalidInputError) as raised:
        reference.parse(text)
    assert str(raised.value).endswith(f"; did you mean {meant}?")
    reference.parse(meant)


@pytest.mark.parametrize("text", ["a b", "UPPER", "http://x/y", "docker://host/UPPER"])
def test_no_remedy_is_made_up(text: str) -> None:
    with pytest.raises(errors.InvalidInputError) as raised:
        reference.parse(text)
    assert "did you mean" not in str(raised.value)
