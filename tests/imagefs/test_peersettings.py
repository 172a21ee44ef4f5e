"""The settings of peers: what makes no sense is refused, and they travel as JSON."""

from __future__ import annotations

import pathlib

import pytest

from imagefs import errors, peersettings


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"address": "a:1"},
        {"address": "a:1", "members": ["a"]},
        {"address": "a:1", "members": ["a:0"]},
        {"address": "a:1", "members": ["[::1:1"]},
        {"address": "a:1", "members": [1]},
        {"address": "a:1", "members": [], "token_file": 1},
        {"address": "a:1", "members": [], "hedge_seconds": True},
        {"address": "a:1", "members": [], "unknown": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidInputError):
        peersettings.PeerSettings.from_json(document)


def test_settings_travel_as_json() -> None:
    value = peersettings.PeerSettings(
        "[::1]:2", ("[::1]:2", "node:3"), token_file=pathlib.Path("/a"), stamp="x", down_seconds=1.5
    )
    assert peersettings.PeerSettings.from_json(value.to_json()) == value
    assert peersettings.split_address("[::1]:2") == ("::1", 2)
