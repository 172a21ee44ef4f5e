"""What containerd's labels and users' words mean."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import lookup
from imagefs import errors, reference

DIGEST = "sha256:" + "ab" * 32


@given(st.dictionaries(st.sampled_from([lookup.REFERENCE_LABEL, lookup.MANIFEST_LABEL]), st.text()))
def test_whatever_the_labels_say_is_an_image_or_none(labels: dict[str, str]) -> None:
    wanted = lookup.from_labels(labels)
    assert wanted is None or wanted.reference.transport == "docker"


def test_the_manifest_label_decides_not_the_tag() -> None:
    wanted = lookup.from_labels({lookup.REFERENCE_LABEL: "h:5000/app:v1", lookup.MANIFEST_LABEL: DIGEST})
    assert wanted is not None
    assert (wanted.source_digest, wanted.name) == (DIGEST, "h:5000/app:v1")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h:5000/app", "h:5000/app:latest"),
        ("docker://h/a/b:v1", "h/a/b:v1"),
        (f"h/a:v1@{DIGEST}", f"h/a@{DIGEST}"),
    ],
)
def test_the_names_that_containerd_uses(text: str, name: str) -> None:
    assert lookup.image_name(text) == name


def test_only_registries_hold_what_containerd_can_name() -> None:
    with pytest.raises(errors.InvalidInputError, match="block_repositories"):
        lookup.from_text("s3://bucket/prefix")


def test_the_longest_entry_says_where_block_images_are() -> None:
    places = {"h/": "s3://bucket/all", "h/team/": "s3://bucket/team", "h/team/app": "docker://other/app"}
    found = {
        name: str(lookup.block_repository(reference.parse(f"docker://{name}"), places))
        for name in ("h/x", "h/team/y", "h/team/app", "h/team/app2", "i/x")
    }
    assert found == {
        "h/x": "s3://bucket/all",
        "h/team/y": "s3://bucket/team",
        "h/team/app": "docker://other/app",
        "h/team/app2": "s3://bucket/team",
        "i/x": "None",
    }


def test_chain_ids_are_those_of_the_specification() -> None:
    """ChainID(A) = DiffID(A); ChainID(A|B) = Digest(ChainID(A) + " " + DiffID(B))."""
    first, second = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    expected = "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()
    assert lookup.chain_ids([first, second]) == [first, expected]
    assert lookup.chain_ids([]) == []
