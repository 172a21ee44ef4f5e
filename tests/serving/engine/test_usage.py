"""What an engine uses, against a process tree that works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from serving.engine import usage

_WORK = "x = bytearray(64 << 20)\nfor n in range(3_000_000): pass\nprint('done', flush=True)\ninput()"


def test_a_tree_counts_what_its_children_use() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_WORK!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "done\n"
        found = usage.of_tree(process.pid)
        assert found.memory_bytes > 64 << 20
        assert found.cpu_seconds > 0
    finally:
        process.communicate("\n")
    assert usage.of_tree(process.pid) == usage.Usage(0.0, 0)


def test_a_control_group_of_either_version(tmp_path: Path) -> None:
    two = tmp_path / "two/default/chat-1"
    two.mkdir(parents=True)
    (two / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (two / "memory.current").write_text("4096\n")
    assert usage.of_cgroup("/default/chat-1", tmp_path / "two") == usage.Usage(2.5, 4096)
    one = tmp_path / "one"
    for name, file, text in (
        ("cpuacct", "cpuacct.usage", "1500000000\n"),
        ("memory", "memory.usage_in_bytes", "8192\n"),
    ):
        (one / name / "default/chat-1").mkdir(parents=True)
        (one / name / "default/chat-1" / file).write_text(text)
    assert usage.of_cgroup("/default/chat-1", one) == usage.Usage(1.5, 8192)
    assert usage.of_cgroup("/default/absent", one) is None
