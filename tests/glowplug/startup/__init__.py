"""Tests of glowplug.startup."""
