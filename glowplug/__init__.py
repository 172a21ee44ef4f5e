"""The front door: the `glowplug` command, settings, version."""
