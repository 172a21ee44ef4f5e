"""Layers stacked by the kernel's overlayfs show what extracting their tars would leave."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import compare, errors, flatten
from tests.converter.things import LIMITS
from tests.fixtures import tars, trees
from tests.fixtures.tars import Attributes, Builder

# -- what the kernel makes of it -------------------------------------------------------------------

_letters = st.sampled_from((b"a", b"b", b"c"))
_paths = st.lists(_letters, min_size=1, max_size=3).map(b"/".join)
_modes = st.sampled_from((0o700, 0o711, 0o1777)).map(lambda mode: Attributes(mode=mode))
_plain = st.one_of(
    st.tuples(st.just("file"), _paths, st.binary(max_size=3)),
    st.tuples(st.just("directory"), _paths, _modes),
    st.tuples(st.just("hard_link"), _paths, _paths),
    st.tuples(st.just("whiteout"), _paths),
    st.tuples(st.just("opaque"), st.one_of(_paths, st.just(b""))),
)
# Paths of the upper layers lead through links of the bottom one (x, y, a/x), never replacing them: extractors
# disagree about what went through a link before it was replaced.
_links = st.tuples(
    st.just("symlink"),
    st.sampled_from((b"x", b"a/x", b"y")),
    st.sampled_from((b"a", b"/b/c", b"../c", b"a/x", b"y/b")),
)
_through = st.builds(
    lambda head, tail: head + b"/" + tail, st.sampled_from((b"x", b"a/x", b"y", b"x/b")), _letters
)
_over_links = st.one_of(
    st.tuples(st.just("file"), _through, st.binary(max_size=3)),
    st.tuples(st.just("directory"), _through, _modes),
    st.tuples(st.just("hard_link"), _through, st.one_of(_paths, _through)),
    st.tuples(st.just("whiteout"), _through),
)
Operation = tuple[Any, ...]


def make(operations: Sequence[Operation]) -> bytes:
    builder = Builder()
    for method, *arguments in operations:
        getattr(builder, str(method))(*arguments)
    return bytes(builder)


def assert_overlay_equals_extraction(layers: list[bytes], workplace: pathlib.Path) -> None:
    try:
        expected = flatten.flatten([io.BytesIO(layer) for layer in layers], LIMITS)
        folder = workplace / "image"
        with trees.tmpfs(folder), trees.overlaid(layers, folder) as merged:
            assert compare.first_difference(expected, merged) is None
    except errors.InvalidLayerError:
        return  # most random hard links lead nowhere
    finally:
        if (workplace / "image").exists():
            (workplace / "image").rmdir()


@pytest.mark.root
@given(layers=st.lists(st.lists(_plain, min_size=1, max_size=7).map(make), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_overlay_equals_extraction(tmp_path: pathlib.Path, layers: list[bytes]) -> None:
    assert_overlay_equals_extraction(layers, tmp_path)


@pytest.mark.root
@given(
    bottom=st.tuples(st.lists(_links, min_size=1, max_size=3), st.lists(_plain, max_size=4)),
    upper=st.lists(
        st.one_of(_over_links, _plain.filter(lambda o: o[0] in ("file", "directory") and o[1] != b"a")),
        max_size=5,
    ),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_overlay_equals_extraction_through_links(
    tmp_path: pathlib.Path, bottom: tuple[list[Operation], list[Operation]], upper: list[Operation]
) -> None:
    assert_overlay_equals_extraction([make(bottom[1] + bottom[0]), make(upper)], tmp_path)


@pytest.mark.root
@pytest.mark.parametrize("count", [1, 2, 3])
def test_torture_layers(tmp_path: pathlib.Path, count: int) -> None:
    layers = tars.torture_layers()[:count]
    expected = flatten.flatten([io.BytesIO(layer) for layer in layers], LIMITS)
    with trees.tmpfs(tmp_path / "image") as folder, trees.overlaid(layers, folder) as merged:
        assert compare.first_difference(expected, merged) is None


@pytest.mark.root
def test_whiteouts_that_hide_nothing_are_not_listed(tmp_path: pathlib.Path) -> None:
    bottom = Builder().file(b"both/gone").file(b"both/kept").directory(b"deep").directory(b"deep/er")
    top = Builder()
    for name in (b"both/.wh.gone", b"alone/.wh.nothing", b"alone/in/.wh.nothing", b".wh.nothing"):
        top.file(name)
    top.file(b"alone/file").file(b"deep/er/.wh.nothing")
    with (
        trees.tmpfs(tmp_path / "image") as folder,
        trees.overlaid([bytes(bottom), bytes(top)], folder) as merged,
    ):
        listed = {
            path: sorted(os.listdir(merged / path)) for path in (".", "both", "alone", "alone/in", "deep/er")
        }
    assert listed == {
        ".": ["alone", "both", "deep"],
        "both": ["kept"],
        "alone": ["file", "in"],
        "alone/in": [],
        "deep/er": [],
    }
