"""Fixtures for tests of models."""

from tests.fixtures.block_images import glowplug as glowplug
