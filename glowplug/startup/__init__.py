"""Measuring how fast containers start: links of a chosen speed and delay, the starts on them, the report.

Called by `glowplug bench startup` and by `e2e/`. Nothing that serves a container imports it.
"""
