"""Phases of a start, from lines that vLLM 0.32 wrote on a CPU and on an accelerator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine import phases

CPU = """\
(EngineCore pid=30989) INFO 11-22 21:50:36 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config
(Worker pid=31092) INFO 11-22 21:50:44 [cpu_model_runner.py:68] Starting to load model /tmp/eng/model...
(Worker pid=31092) INFO 11-22 21:50:44 [default_loader.py:501] Loading weights took 0.04 seconds
(Worker pid=31092) INFO 11-22 21:50:45 [cpu_model_runner.py:87] Warming up model for the compilation...
(Worker pid=31092) INFO 11-22 21:51:18 [cpu_model_runner.py:91] Warming up done.
(EngineCore pid=30989) INFO 11-22 21:51:18 [core.py:386] init engine (profile, create kv cache) took 33.1 s
""".splitlines()
ACCELERATOR = """\
(Worker pid=9) INFO [gpu_model_runner.py:5120] Starting to load model /models/chat...
(Worker pid=9) INFO [default_loader.py:502] Loading weights took 0.91 seconds
(Worker pid=9) INFO [gpu_model_runner.py:5150] Model loading took 2.9 GiB memory and 1.2 seconds
(Worker pid=9) INFO [monitor.py:80] torch.compile took 7.48 s in total
(Worker pid=9) INFO [gpu_model_runner.py:6582] Graph capturing finished in 17 secs, took 0.60 GiB
(EngineCore pid=8) INFO [core.py:386] init engine (profile, create kv cache, warmup model) took 26.1 s
""".splitlines()


@pytest.mark.parametrize("lines", [CPU, ACCELERATOR])
def test_each_phase_is_found_in_the_engines_words(lines: list[str]) -> None:
    found = phases.enter(phases.begin(0.0, phases.MODEL), phases.IMPORTS, 0.5)
    for number, line in enumerate(lines, start=1):
        found = phases.read(found, line, float(number))
    found = phases.enter(found, phases.FIRST_TOKEN, 10.0)
    took = phases.finish(found, 12.5)
    assert list(took) == list(phases.ORDER)
    assert sum(took.values()) == 12.5


@given(st.lists(st.sampled_from([*CPU, *ACCELERATOR, "", "noise"]), max_size=30))
def test_lines_in_any_order_never_go_back_and_add_up(lines: list[str]) -> None:
    found = phases.begin(0.0)
    for number, line in enumerate(lines, start=1):
        after = phases.read(found, line, float(number))
        assert phases.ORDER.index(after.current) >= phases.ORDER.index(found.current)
        found = after
    took = phases.finish(found, 100.0)
    assert abs(sum(took.values()) - 100.0) < 1e-9
    assert list(took) == [each for each in phases.ORDER if each in took]
