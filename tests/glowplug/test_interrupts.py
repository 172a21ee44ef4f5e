"""Signals that wait, in a process of its own so that the test runner keeps its handlers."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, threading
from glowplug import interrupts

threading.Thread(target=signal.pause, daemon=True).start()  # the kernel may choose it
number = int(sys.argv[1])
signal.signal(number, {"raise": signal.default_int_handler, "ignore": signal.SIG_IGN}[sys.argv[2]])
try:
    with interrupts.deferred():
        os.kill(os.getpid(), number)
        print("whole")
    print("after")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize(("handler", "end"), [("raise", "interrupted"), ("ignore", "after")])
def test_a_signal_acts_when_the_block_is_left(number: int, handler: str, end: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(number), handler], capture_output=True, text=True, timeout=30
    )
    assert result.stdout.split() == ["whole", end], result.stderr
