"""Whether a quantized checkpoint is good enough, from what was measured. Pure.

KL divergence, in nats a token, of the quantized model's next-token distribution from the original's; and
how often both would say the same token. Measured with all quantized layers, and with those of one group only:
that is what the attention switch is decided by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

ALL = "all"


@dataclasses.dataclass(frozen=True, slots=True)
class Drift:
    """Over `tokens` positions. `kl_mean` and `kl_p99` in nats; `agreement` from 0 to 1."""

    kl_mean: float
    kl_p99: float
    agreement: float
    tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What is still good."""

    max_kl: float = 0.02
    min_agreement: float = 0.97

    def broken_by(self, drift: Drift) -> list[str]:
        """What is past its limit, for people."""
        broken = []
        if not drift.kl_mean <= self.max_kl:  # what is no number is past every limit
            broken.append(f"KL divergence {drift.kl_mean:.4f} nats a token, limit {self.max_kl:g}")
        if not drift.agreement >= self.min_agreement:
            broken.append(f"next-token agreement {drift.agreement:.2%}, limit {self.min_agreement:.2%}")
        return broken


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """`accepted`, else why not (`broken`) and, where the data says so, what to try (`advice`)."""

    accepted: bool
    broken: tuple[str, ...]
    advice: str | None


def judge(drifts: Mapping[str, Drift], limits: Limits) -> Verdict:
    """`drifts`: by group, and all of them together under ALL."""
    broken = limits.broken_by(drifts[ALL])
    if not broken:
        return Verdict(True, (), None)
    groups = {name: drift for name, drift in drifts.items() if name != ALL}
    worst = max(groups, key=lambda name: groups[name].kl_mean, default=None)
    advice = None
    if worst is not None and len(groups) > 1:
        rest = sum(drift.kl_mean for name, drift in groups.items() if name != worst)
        how = "quantize again with --no-attention" if worst == "attention" else f"keep some {worst} layers"
        advice = (
            f"{worst} alone makes {groups[worst].kl_mean:.4f} nats of it, all else together about "
            f"{rest:.4f}: {how}"
        )
    return Verdict(False, tuple(broken), advice)
