"""The Hopper benchmark without a Hopper: its arithmetic, its load on a small engine, its refusal."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e import hopper
from tests.serving.engine import running


def level(concurrency: int, rate: float) -> hopper.Level:
    return hopper.Level(concurrency, rate, 50 * rate, 0.01, 0.02, 0.1, 0)


def test_prompts_are_the_same_for_the_same_seed_and_no_two_alike() -> None:
    made = hopper.prompts(100, 32_000, 7)
    assert made == hopper.prompts(100, 32_000, 7)
    assert made != hopper.prompts(100, 32_000, 8)
    assert len({tuple(each) for each in made}) == 100
    assert {len(each) for each in made} == {hopper.TOKENS}


@given(st.lists(st.floats(0, 1e3), min_size=1), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values_and_grows(values: list[float], share: float) -> None:
    found = hopper.quantile(values, share)
    assert min(values) <= found <= max(values)
    assert found in values
    assert found <= hopper.quantile(values, 1.0)


def test_figures_and_ratios() -> None:
    samples = [hopper.Sample(0.1, 1.0, 50)] * 10
    found = hopper.summary(4, samples, 1, 2.0)
    assert (found.requests_per_second, found.tokens_per_second, found.failed) == (5.0, 250.0, 1)
    with pytest.raises(ValueError, match="no request"):
        hopper.summary(4, [], 3, 1.0)
    middle = hopper.medians([level(8, 10), level(8, 30), level(8, 20)])
    assert middle.requests_per_second == 20
    lines = hopper.table({"bf16": [level(8, 100)], "fp8": [level(8, 130)]}).splitlines()
    assert lines[1].split()[3] == "1.00"
    assert lines[2].split()[3] == "1.30"


@pytest.mark.parametrize(
    ("said", "found"), [("9.0\n", (9, 0)), ("8.6\n9.0\n", (8, 6)), ("", None), ("[N/A]\n", None)]
)
def test_the_first_gpu_counts(said: str, found: tuple[int, int] | None) -> None:
    assert hopper.capability(said) == found


def test_variants_differ_in_quantization_only() -> None:
    names = [each.name for each in hopper.variants("/m", "/q")]
    assert names == ["bf16", "fp8_per_channel", "fp8_per_tensor", "fp8_checkpoint"]
    assert "--quantization" not in hopper.variants("/m", None)[0].arguments


def test_a_sweep_asks_an_engine_for_every_prompt(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=running.stub(TOKEN_SECONDS="0.001"), limit=16) as engine:
        engine.wait_for("ready")
        found = asyncio.run(hopper.sweep(f"http://127.0.0.1:{engine.port}", [1, 4], 1_000, 0))
    assert [each.concurrency for each in found] == [1, 4]
    assert all(each.failed == 0 and each.tokens_per_second > 0 for each in found)
    assert found[0].tokens_per_second == pytest.approx(hopper.TOKENS * found[0].requests_per_second)


def test_it_refuses_a_machine_without_a_hopper(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "e2e.hopper", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 1
    assert "H100" in done.stderr
