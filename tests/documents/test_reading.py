"""Documents of a small model: lines, keys and remedies in errors; any text is a document or our error."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from documents import lines, reading, wording


class Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class Wheel(Part):
    diameter: int = pydantic.Field(default=20, ge=1)
    spokes: int = 32


class Chain(Part):
    kind: Literal["chain"]
    links: int


class Shaft(Part):
    kind: Literal["shaft", "belt"]
    length: int = 1


class Bicycle(Part):
    name: str
    wheels: tuple[Wheel, ...] = pydantic.Field(default=(), strict=False)
    spares: Mapping[str, Wheel] = {}
    drive: Annotated[Chain | Shaft, pydantic.Field(discriminator="kind")]
    saddle: Wheel | None = None

    @pydantic.model_validator(mode="after")
    def _some(self) -> Bicycle:
        if not self.wheels and self.spares:
            raise ValueError("spares.first: there is nothing to spare; say wheels")
        return self


def load(text: str, words: wording.Words | None = None) -> Bicycle:
    more = {} if words is None else {"words": words}
    return reading.load(text, "b.yaml", Bicycle, called="a bicycle", example="name: red", **more)


GOOD = """\
name: red
wheels:
  - diameter: 28
  - spokes: 36
spares:
  back: {diameter: 26}
drive:
  kind: chain
  links: 110
"""


def test_a_good_one() -> None:
    found = load(GOOD)
    assert found.wheels[0].diameter == 28
    assert found.spares["back"].diameter == 26


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("name: red", "nam: red", "b.yaml:1: nam: unknown key; did you mean name?"),
        ("name: red\n", "", "b.yaml: name: is required"),
        ("name: red", "name: 3", "b.yaml:1: name: should be a valid string, not 3"),
        (
            "diameter: 28",
            "diametre: 28",
            "b.yaml:3: wheels.0.diametre: unknown key; did you mean wheels.0.diameter?",
        ),
        (
            "{diameter: 26}",
            "{spoke: 26}",
            "b.yaml:6: spares.back.spoke: unknown key; did you mean spares.back.spokes?",
        ),
        ("diameter: 28", "links: 28", "b.yaml:3: wheels.0.links: unknown key; did you mean drive.links?"),
        ("diameter: 28", "zzz: 28", "b.yaml:3: wheels.0.zzz: unknown key; known here: diameter, spokes"),
        ("links: 110", "links: many", "b.yaml:9: drive.links: should be a valid integer"),
        ("links: 110", "", "b.yaml:7: drive.links: is required"),
        ("kind: chain", "kind: rope", "b.yaml:8: drive.kind: must be one of 'chain', 'shaft', 'belt'"),
        ("kind: chain", "kid: chain", "b.yaml:7: drive.kind: must be one of chain, shaft, belt"),
        ("  - diameter: 28\n  - spokes: 36\n", " []\n", "b.yaml:4: spares.first: there is nothing to spare"),
        ("name: red", "name: red\nname: blue", "b.yaml:2: name is given twice; keep one of them"),
        ("  links: 110", "  kind: shaft", "b.yaml:9: drive.kind is given twice"),
        (GOOD, "- 1", "b.yaml: a bicycle is a mapping of keys, as in `name: red`"),
        (GOOD, "", "b.yaml: a bicycle is a mapping of keys"),
        (GOOD, "name: [", "b.yaml:1: not YAML: "),
        (GOOD, "name: 2020-13-13", "b.yaml: not YAML: "),
        (GOOD, "a: &a [*a]", "b.yaml: not YAML: "),
        (GOOD, "a: \0", "b.yaml: not YAML: "),
    ],
)
def test_an_error_names_line_key_and_remedy(was: str, becomes: str, said: str) -> None:
    assert was in GOOD
    with pytest.raises(reading.InvalidError) as caught:
        load(GOOD.replace(was, becomes, 1))
    assert said in str(caught.value)


def test_all_that_is_wrong_is_named_once() -> None:
    with pytest.raises(reading.InvalidError) as caught:
        load(GOOD.replace("diameter: 28", "diameter: 0").replace("links: 110", "link: 110"))
    assert len(str(caught.value).splitlines()) == 3  # the size; the key that is none; the one that is missing


def test_the_callers_words_go_first() -> None:
    def words(path: lines.Path, found: wording.Found) -> str | None:
        return "is red or blue" if path == ("name",) and found["type"] == "string_type" else None

    with pytest.raises(reading.InvalidError, match="name: is red or blue"):
        load(GOOD.replace("red", "3"), words)
    with pytest.raises(reading.InvalidError, match="should be a valid integer"):
        load(GOOD.replace("110", "many"), words)


def test_aliases_that_multiply_are_refused() -> None:
    text = "a0: &a0 [1]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12)
    )
    with pytest.raises(reading.InvalidError, match="aliases followed"):
        load(text)


def test_every_key_has_its_line() -> None:
    values, found = lines.parse(GOOD, "g")
    assert values == yaml.safe_load(GOOD)
    written = GOOD.splitlines()
    for path, line in found.items():
        if path and not path[-1].isdigit():
            assert f"{path[-1]}:" in written[line - 1]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(sorted(Bicycle.model_fields)), inner, max_size=3
        )
    ),
    max_leaves=10,
)


@given(_JSON.map(yaml.safe_dump) | st.text(max_size=100))
def test_any_text_is_a_document_or_our_error(text: str) -> None:
    with contextlib.suppress(reading.InvalidError):
        load(text)
