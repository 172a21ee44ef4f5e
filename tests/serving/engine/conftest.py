"""Fixtures for tests of engines."""

from tests.fixtures.block_images import glowplug as glowplug
