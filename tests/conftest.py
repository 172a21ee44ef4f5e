"""Fixtures for all tests."""

import signal

import hypothesis

pytest_plugins = ["tests.fixtures.servers", "tests.fixtures.kubernetes_api"]

# Whatever a shell starts with & ignores SIGINT, and hands that on: commands under test must not inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A loaded machine is no failure: examples have no time limit, and making them may be slow.
hypothesis.settings.register_profile(
    "glowplug", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("glowplug")
