"""Fixtures for all tests."""

import signal

pytest_plugins = ["tests.fixtures.servers"]

# Whatever a shell starts with & ignores SIGINT, and hands that on: commands under test must not inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
