"""Which blocks a layer will want next, guessed from the blocks that were demanded. Pure; used by `plan.py`.

Demands near one another belong to one run; a layer follows a few runs at a time, because a process reads
several files at once. A wrong guess takes about 1.1 MB of the link and 10 ms of processor time (a block of
4 MiB) from the process that starts. So a run is `initial_blocks` ahead of its demands, and no more, until it
went through `proof_blocks` blocks one after another; then its window doubles with each further block, up to
`max_blocks`, which keeps a link full under one sequential reader. A leap takes the window back.

Loading a library is no sequential read: the loader touches most of it, to and fro. In an `import torch`, 72 %
of the 103 blocks fetched ahead this way were wanted later; with windows that grew on any demand near the
last one it was 40 % of 230, and the start took longer than with no read-ahead at all.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ReadAheadPolicy:
    """Windows in blocks. `initial_blocks` follow each demand, 0 for both turns read-ahead off. `runs` is how
    many runs per layer are remembered."""

    initial_blocks: int = 1
    max_blocks: int = 16
    proof_blocks: int = 4
    runs: int = 8


@dataclasses.dataclass(slots=True, eq=False)
class _Run:
    last: int
    window: int
    in_order: int
    proposed_to: int


_OUT_OF_ORDER_BLOCKS = 2
"""Several readers of one file overtake one another by so much: that is no leap."""


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
            run = _Run(index, policy.initial_blocks, 1, index + 1)
            self._runs.append(run)
        else:
            self._go_on(run, index)
        self._runs.remove(run)
        self._runs.insert(0, run)
        del self._runs[policy.runs :]
        begin = max(run.proposed_to, index + 1)
        end = min(index + 1 + run.window, self._blocks)
        run.proposed_to = max(run.proposed_to, end)
        return range(begin, end)

    def _go_on(self, run: _Run, index: int) -> None:
        policy = self._policy
        if index == run.last + 1:
            run.last = index
            run.in_order += 1
            if run.in_order > policy.proof_blocks:
                run.window = min(policy.max_blocks, max(1, 2 * run.window))
        elif not run.last - _OUT_OF_ORDER_BLOCKS <= index <= run.last:
            run.last = index
            run.in_order = 1
            run.window = policy.initial_blocks
            run.proposed_to = index + 1

    def _run_near(self, index: int) -> _Run | None:
        for run in self._runs:
            reach = run.window + _OUT_OF_ORDER_BLOCKS
            if run.last - reach <= index <= run.last + reach:
                return run
        return None
