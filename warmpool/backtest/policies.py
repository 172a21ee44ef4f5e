"""The policies that are compared, each as sizes over time for every setting of its one dial. Pure.

A policy gets `Seen`: the world up to each look, and nothing behind it. Two are allowed to know more, and are
there as measures: the best constant is found on the judged part itself, and the oracle knows demand, though
not how long nodes will take. While a gap is young every policy holds what it has, but for those two; later it
goes by the last level that it knew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from warmpool import arrivals, demand, leadtime, outlook, size
from warmpool.backtest.world import Ints, World
from warmpool.demand import Floats
from warmpool.forecast import choice, models
from warmpool.observation import Mode
from warmpool.policy import NodeClass, Policy

_SHARES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.5)
_LEVELS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 1.0)
_SPREADS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
_TRAILING_SECONDS = 7 * 86_400.0
_HOUR_SECONDS = 3_600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A policy with its dial at one place: fewest and most nodes to hold at each look."""

    label: str
    least: Ints
    most: Ints


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What a policy is given: the judged looks, the world as it unfolds, what nodes took in training, and the
    largest pool."""

    world: World
    looks: Floats
    leads: Floats
    cap: int
    hold_seconds: float

    @property
    def held(self) -> tuple[Ints, Ints]:
        """Bounds that change nothing while a gap is young, and anything elsewhere: (fewest, most)."""
        known = ~np.isnan(self.world.seen(self.looks))
        last = np.maximum.accumulate(np.where(known, self.looks, self.looks[0]))
        gap = ~known & (self.looks - last < self.hold_seconds)
        return np.where(gap, 0, 1), np.where(gap, 10**6, 0)

    def setting(self, label: str, sizes: Floats | Ints, keep: Ints | None = None) -> Setting:
        """Sizes as a setting, whole and within the cap."""
        least = np.clip(np.ceil(np.asarray(sizes, float) - 1e-9), 0, self.cap).astype(np.int64)
        most = least if keep is None else np.maximum(least, np.minimum(keep, self.cap))
        may_ask, holds = self.held
        return Setting(label, least * may_ask, np.maximum(most, holds))


def none(seen: Seen) -> Iterator[Setting]:
    """No pool."""
    yield Setting("", np.zeros(len(seen.looks), np.int64), np.zeros(len(seen.looks), np.int64))


def constant(seen: Seen) -> Iterator[Setting]:
    """The same size always. Which one is known in hindsight: the whole frontier is drawn."""
    for count in range(1, seen.cap + 1):
        sizes = np.full(len(seen.looks), count, np.int64)
        yield Setting(f"{count} nodes", sizes, sizes)


def last_value(seen: Seen) -> Iterator[Setting]:
    """Demand stays what it is: a share of it is held on top."""
    level = demand.filled(seen.world.seen(seen.looks))
    for share in _SHARES:
        yield seen.setting(f"{share:.0%} of demand", level * share)


def trailing_quantile(seen: Seen) -> Iterator[Setting]:
    """A quantile of how many were asked for within a lead time, over the last 7 days, anew each hour."""
    lead = float(np.quantile(seen.leads, 0.99))
    hours = np.arange(seen.looks[0], seen.looks[-1] + 1.0, _HOUR_SECONDS)
    rows = []
    for hour in hours:
        ends = np.arange(max(seen.world.begin, hour - _TRAILING_SECONDS) + lead, hour + 1.0, 60.0)
        rows.append(np.quantile(seen.world.count(1, ends - lead, ends), _LEVELS))
    quantiles = np.array(rows)[((seen.looks - seen.looks[0]) // _HOUR_SECONDS).astype(int)]
    for column, level in enumerate(_LEVELS):
        yield seen.setting(f"quantile {level:g}", quantiles[:, column])


def forecast_alone(seen: Seen, policy: Policy) -> Iterator[Setting]:
    """The chosen model's level within the lead time, plus a multiple of the distance to its conformal 95%
    quantile, less what is there: the forecast as an order."""
    lead = float(np.quantile(seen.leads, 0.99))
    middle, spread = np.zeros(len(seen.looks)), np.zeros(len(seen.looks))
    day = round(86_400 / policy.step_seconds)
    for begin in np.arange(seen.looks[0], seen.looks[-1] + 1.0, policy.refit_seconds):
        levels = _levels(seen.world, float(begin), policy.step_seconds)
        chosen = choice.choose(models.candidates(policy.step_seconds), levels, day, 3)
        its = (seen.looks >= begin) & (seen.looks < begin + policy.refit_seconds)
        steps = (np.arange(day) + 0.5) * policy.step_seconds
        # No lower than the middle: a model that errs downwards has its quantile there.
        upper = np.maximum(chosen.quantile(0.95), chosen.path)
        at = seen.looks[its] - begin
        middle[its] = np.maximum(np.interp(at, steps, chosen.path), np.interp(at + lead, steps, chosen.path))
        spread[its] = np.interp(at + lead, steps, upper - chosen.path)
    level = demand.filled(seen.world.seen(seen.looks))
    for factor in _SPREADS:
        yield seen.setting(f"{factor:g} spreads", np.maximum(middle + factor * spread - level, 0.0))


def _levels(world: World, until: float, step_seconds: float) -> Floats:
    record = world.record(world.looks(world.begin, until, 60.0))
    return demand.filled(demand.grid(record, world.begin, until, step_seconds).level)


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """What is expected at every look: requests a second, and dispersions; the lead times that go with them,
    and the model at the end."""

    model: str
    rates: Floats
    dispersions: Floats
    leads: Floats


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """By what `decide` would follow, and by its reactive rule alone; for which part of the looks `decide`
    fell back to that."""

    forecast: Rates
    reactive: Rates
    reactive_share: float


def expected(
    seen: Seen, policy: Policy, settings: NodeClass, tell: Callable[[int, int], None] = lambda done, of: None
) -> Expected:
    """Run `outlook.learn` through the judged looks, as `decide` does."""
    count = len(seen.looks)
    memory = remembered(seen, policy)
    rates, dispersions, lately = np.zeros(count), np.ones(count), np.zeros(count)
    reactive_looks = 0
    levels = seen.world.seen(seen.looks)
    said: outlook.Outlook | None = None
    for number, now in enumerate(seen.looks):
        wanted = None if np.isnan(levels[number]) else int(levels[number])
        memory, said = outlook.learn(policy, settings, memory, wanted, (), float(now))
        rates[number], dispersions[number] = said.rate, said.dispersion
        assert memory.rhythm is not None
        lately[number] = arrivals.reactive(memory.rhythm)
        reactive_looks += said.mode is Mode.REACTIVE
        if number % 500 == 0:
            tell(number, count)
    assert said is not None
    return Expected(
        Rates(said.model, rates, dispersions, said.leads),
        Rates("requests of late", lately, np.full(count, arrivals.REACTIVE_DISPERSION), said.leads),
        reactive_looks / count,
    )


def remembered(seen: Seen, policy: Policy) -> outlook.Memory:
    """The memory of a controller that looked all through the training part. Its first judged look fits."""
    world, begin = seen.world, float(seen.looks[0])
    record = world.record(world.looks(world.begin, begin, float(seen.looks[1] - seen.looks[0])))
    rhythm = arrivals.Rhythm(world.begin)
    before: int | None = None
    for at, wanted in zip(record.at, record.wanted, strict=True):
        change = 0 if before is None or wanted is None else wanted - before
        rhythm = rhythm.after(at, max(0, change), max(0, -change))
        before = wanted
    learned = leadtime.Learned(tuple(seen.leads[-leadtime.KEPT :].tolist()), begin)
    return outlook.Memory(record=record, rhythm=rhythm, learned=learned)


def sized(seen: Seen, policy: Policy, known: Rates, idle_per_miss: Floats) -> Iterator[Setting]:
    """`decide`'s sizes for what is expected, at each ratio of an idle second's cost to a miss's."""
    saved, idle = size.sides(known.rates, known.dispersions, known.leads, seen.cap)
    for ratio in idle_per_miss:
        least = size.worth_holding(saved, idle, float(ratio))
        most = size.worth_holding(saved, idle, float(ratio) * policy.keep)
        yield seen.setting(f"a miss costs {1 / ratio / 60:.3g} idle minutes", least, most)


def oracle(seen: Seen, *, returns: bool) -> Iterator[Setting]:
    """What will be asked for within a given time, known exactly; with nodes that return, less what will be
    released before."""
    world, looks = seen.world, seen.looks
    between = float(looks[1] - looks[0])
    for cover in np.arange(40.0, 300.0, 10.0):
        if returns:
            ahead = np.zeros(len(looks))
            now = world.levels(looks)
            for part in np.arange(5.0, cover + between + 5.0, 5.0):
                ahead = np.maximum(ahead, world.levels(looks + min(part, cover + between)) - now)
            sizes = np.minimum(ahead, seen.cap).astype(np.int64)
        else:
            sizes = np.minimum(world.count(1, looks, looks + cover + between), seen.cap)
        yield Setting(f"{cover:g} s ahead", sizes, sizes)
