"""Which blocks a layer will want next, guessed from the blocks that were demanded. Pure; used by `plan.py`.

A demand near an earlier one (within its window, forwards or backwards) belongs to the same run and doubles
the run's window; any other demand begins a run with the initial window. Loading a large library is such a
run: the loader maps it and touches most of it, not quite in order. A layer follows a few runs at a time,
because a process reads several files at once.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ReadAheadPolicy:
    """Windows in blocks. `initial_blocks` follow the first demand of a run; 0 for both turns it off.
    `runs` is how many runs per layer are remembered."""

    initial_blocks: int = 2
    max_blocks: int = 16
    runs: int = 8


@dataclasses.dataclass(slots=True, eq=False)
class _Run:
    last: int
    window: int
    proposed_to: int


class ReadAhead:
    """The runs of one layer of `blocks` blocks."""

    def __init__(self, policy: ReadAheadPolicy, blocks: int) -> None:
        self._policy = policy
        self._blocks = blocks
        self._runs: list[_Run] = []

    def demanded(self, index: int) -> range:
        """Note a demand; the blocks to fetch ahead because of it, none of which was proposed by its run
        before."""
        policy = self._policy
        if policy.max_blocks <= 0:
            return range(0)
        run = self._run_near(index)
        if run is None:
            run = _Run(index, min(policy.max_blocks, policy.initial_blocks), index + 1)
            self._runs.append(run)
        elif index != run.last:
            run.window = min(policy.max_blocks, max(1, 2 * run.window))
        run.last = index
        self._runs.remove(run)
        self._runs.insert(0, run)
        del self._runs[policy.runs :]
        begin = max(run.proposed_to, index + 1)
        end = min(index + 1 + run.window, self._blocks)
        run.proposed_to = max(run.proposed_to, end)
        return range(begin, end)

    def _run_near(self, index: int) -> _Run | None:
        for run in self._runs:
            if run.last - run.window <= index <= run.last + run.window + 1:
                return run
        return None
