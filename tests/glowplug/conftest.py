"""Fixtures for tests of the command."""

from tests.fixtures.block_images import glowplug as glowplug
