"""Fixtures for all tests."""

import os
import signal
from pathlib import Path

import coverage
import hypothesis
import pytest

pytest_plugins = ["tests.fixtures.servers", "tests.fixtures.kubernetes_api"]

# Whatever a shell starts with & ignores SIGINT, and hands that on: commands under test must not inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Who measures the tests' coverage measures what they start, too, xdist's processes among it.
if coverage.Coverage.current() is not None:
    os.environ["COVERAGE_ROOT"] = str(Path(__file__).parents[1])
    os.environ["COVERAGE_PROCESS_START"] = str(Path(__file__).with_name("processes.coveragerc"))

# A loaded machine is no failure: examples have no time limit, and making them may be slow.
hypothesis.settings.register_profile(
    "glowplug", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("glowplug")

# They start nodes, endpoints and mounts, and the foremost install what these need. What decides, and the
# codecs, come last: short files, with which the processes that have done their long ones fill up.
_FIRST = [f"tests/{each}/" for each in ("serving", "e2e", "agent", "glowplug", "deploy", "imagefs/fuse")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, as xdist hands files out in this order."""
    items.sort(key=lambda item: [not item.nodeid.startswith(each) for each in _FIRST])
