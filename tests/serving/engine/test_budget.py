"""Tenants' budgets: one bucket for several processes, and a bound that always holds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.autoscaler.units import Coefficients
from serving.engine import budget as budgets
from serving.engine import tokens
from serving.engine.budget import Budget
from serving.engine.state import Measure, Ration, Rations

_SPAWN = multiprocessing.get_context("spawn")
SECOND = 1_000_000_000


@pytest.fixture
def budget(tmp_path: Path) -> Iterator[Budget]:
    made = Budget.create(tmp_path / "budget")
    yield made
    made.close()


def limited(rate: float, **more: int) -> Rations:
    return Rations({"acme": Ration(rate, **more)})  # type: ignore[arg-type]


def test_a_file_that_is_no_budget_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(8 * budgets._COUNT))
    with pytest.raises(ValueError):
        Budget(tmp_path / "other")


def test_a_bucket_empties_fills_and_says_when(budget: Budget) -> None:
    budget.ration(limited(100), 0)
    acme = budget.place("acme")
    assert budget.admit(acme, 80, 0) is None
    refused = budget.admit(acme, 80, 0)
    assert refused is not None
    assert refused.retry_after_seconds == pytest.approx(0.6)
    assert budget.admit(acme, 80, int(0.61 * SECOND)) is None
    spent = budget.spent("acme")
    assert (spent.admitted, spent.charged, spent.refused, spent.refused_cost) == (2, 160, 1, 80)


def test_one_that_costs_more_than_a_bucket_holds_gets_in_and_is_paid_for(budget: Budget) -> None:
    budget.ration(limited(100), 0)
    acme = budget.place("acme")
    assert budget.admit(acme, 1_000, 0) is None
    refused = budget.admit(acme, 1, SECOND)
    assert refused is not None
    assert refused.retry_after_seconds == pytest.approx(8.01)
    assert budget.admit(acme, 1, 10 * SECOND) is None


def test_who_is_not_named_is_not_limited_and_shares_nobodys_bucket(budget: Budget) -> None:
    budget.ration(limited(1), 0)
    for tenant in (None, "other"):
        assert budget.place(tenant) == 0
        assert not budget.limited(0)
        assert budget.admit(0, 1e9, 0) is None
    with pytest.raises(errors.NotFoundError):
        budget.spent("other")


def test_another_mapping_sees_names_come_and_go(budget: Budget, tmp_path: Path) -> None:
    other = Budget(tmp_path / "budget")
    assert other.place("acme") == 0
    budget.ration(limited(5, priority=-2), 0)
    place = other.place("acme")
    assert place
    assert other.terms(place) == tokens.Terms(-2, None)
    budget.ration(Rations({"zeta": Ration()}, 9, Coefficients(1, 2, 3, 4)), 0)
    assert other.place("acme") == 0
    assert other.terms(other.place("zeta")).output_tokens == 9
    assert other.coefficients == Coefficients(1, 2, 3, 4)
    budget.ration(Rations(), 0)
    assert not other.in_use
    other.close()


def test_a_smaller_share_takes_what_was_saved_and_debts_stay(budget: Budget) -> None:
    budget.ration(limited(100), 0)
    acme = budget.place("acme")
    budget.ration(limited(10), 0)
    assert budget.admit(acme, 10, 0) is None
    budget.settle(acme, 90, 0)
    budget.ration(limited(100), 0)
    assert budget.admit(acme, 1, int(0.85 * SECOND)) is not None
    assert budget.admit(acme, 1, int(0.95 * SECOND)) is None


def test_too_many_tenants_are_refused_and_change_nothing(budget: Budget) -> None:
    budget.ration(limited(5), 0)
    with pytest.raises(errors.DocumentError):
        budget.ration(Rations({f"t{n}": Ration(1) for n in range(budgets.TENANTS + 1)}), 0)
    assert budget.limited(budget.place("acme"))
    budget.ration(Rations({f"t{n}": Ration(1) for n in range(budgets.TENANTS)}), 0)
    assert len({budget.place(f"t{n}") for n in range(budgets.TENANTS)}) == budgets.TENANTS


def test_what_is_expected_follows_what_was(budget: Budget) -> None:
    budget.ration(Rations(output_tokens=100), 0)
    reading = tokens.Reading(b"", 0, 1_000, 100)
    assert budget.expected(0, reading) == tokens.Usage(250, 100, 0)
    for _ in range(200):
        budget.learn(0, reading, tokens.Usage(500, 10, 250))
    assert budget.expected(0, reading) == tokens.Usage(500, 10, 250)
    assert budget.expected(0, tokens.Reading(b"", 8, 0, 4)).output == 4


_STEPS = st.lists(
    st.tuples(
        st.floats(0, 3), st.floats(0, 400), st.floats(-1, 1), st.sampled_from(["ask", "settle", "share"])
    ),
    max_size=60,
)


@given(steps=_STEPS, rate=st.floats(1, 100))
def test_no_more_than_the_rate_and_one_bucket_and_one_request(
    steps: list[tuple[float, float, float, str]], rate: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However it is asked, settled and re-divided: what is in the bucket was earned."""
    budget = Budget.create(tmp_path_factory.mktemp("budget") / "budget")
    budget.ration(limited(rate), 0)
    acme, now, charged, highest, last = budget.place("acme"), 0.0, 0.0, rate, 0.0
    earned = rate
    for wait, cost, part, what in steps:
        now += wait
        earned += highest * wait
        now_ns = int(now * SECOND)
        if what == "ask" and budget.admit(acme, cost, now_ns) is None:
            assert charged + min(cost, highest) <= earned * 1.000001 + 1e-6
            charged += cost
            last = cost
        elif what == "settle" and last:
            budget.settle(acme, part * last, now_ns)
            charged += part * last
            last = 0.0
        elif what == "share":
            budget.ration(limited(rate * (1 + part / 2)), now_ns)
            highest = max(highest, rate * (1 + part / 2))
            earned = max(earned, charged + 2 * highest)
    budget.close()


def _ask_often(path: Path, admitted: multiprocessing.Queue[int]) -> None:
    mine = Budget(path)
    acme = mine.place("acme")
    admitted.put(sum(mine.admit(acme, 1, 0) is None for _ in range(2_000)))


def test_one_bucket_for_several_processes(budget: Budget, tmp_path: Path) -> None:
    budget.ration(limited(1_000), 0)
    admitted: multiprocessing.Queue[int] = _SPAWN.Queue()
    processes = [_SPAWN.Process(target=_ask_often, args=(tmp_path / "budget", admitted)) for _ in range(3)]
    for each in processes:
        each.start()
    assert sum(admitted.get(timeout=60) for _ in processes) == 1_000
    for each in processes:
        each.join()
    assert budget.spent("acme").refused == 5_000


def test_measures_are_apart(budget: Budget) -> None:
    budget.ration(Rations({"acme": Ration(5, Measure.UNITS)}), 0)
    acme = budget.place("acme")
    assert budget.measure(acme) is Measure.UNITS
    assert budget.admit(acme, 50, 0) is None
    budget.ration(limited(5), 0)  # a debt in units is none in tokens
    assert budget.admit(acme, 5, 0) is None
