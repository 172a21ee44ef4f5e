"""The settings of the pool's size: what nodes and misses cost, what bounds a pool. Pure.

Part of the document that `glowplug warmpool run` reads; the back-test makes its own. Unknown keys are errors;
what contradicts itself is an error at the key that is to be changed.
"""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

Seconds = Annotated[float, Field(gt=0, le=30 * 86_400, strict=False, allow_inf_nan=False)]
Cost = Annotated[float, Field(gt=0, le=1e9, strict=False, allow_inf_nan=False)]


class Part(pydantic.BaseModel):
    """What all parts of the document have in common."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class LeadTime(Part):
    """How long a node takes from its request until it is warm, as it is thought to be until enough were
    seen."""

    p50_seconds: Seconds = 150.0
    p99_seconds: Seconds = 240.0
    believed_until: int = Field(default=20, ge=1, le=10_000)
    """Believed less with every node that comes, and no more once this many have."""

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> LeadTime:
        if self.p99_seconds < self.p50_seconds:
            raise ValueError(f"p99_seconds: {self.p99_seconds:g} is below p50_seconds ({self.p50_seconds:g})")
        return self


class Breaker(Part):
    """When the forecast is no longer believed, and for how long. It is judged by requests alone: by how many
    came against how many it had thought would."""

    excess: float = Field(default=5.0, gt=1, le=1e6, strict=False)
    """Open when more than this many times as many came as were expected, or the other way round."""
    slack_requests: float = Field(default=20.0, ge=0, le=1e6, strict=False)
    """And this many besides, because small numbers say little."""
    window_seconds: Seconds = 3_600.0
    """Requests and expectations older than this fade away."""
    open_seconds: Seconds = 3_600.0
    """Try the forecast again after this long."""


class NodeClass(Part):
    """One kind of node, and the pool of them."""

    idle_cost_per_minute: Cost = 1.0
    """What a node costs that is held and not used, in any unit; the same unit for all classes."""
    miss_cost: Cost = 2_500.0
    """What it costs that a request finds no warm node, in the same unit. On the traces of docs/warmpool.md
    500 idle minutes give 95% of hits, 2,500 give 98%, 8,000 give 99%."""
    floor: int = Field(default=0, ge=0, le=10_000)
    cap: int = Field(default=64, ge=0, le=10_000)
    substitutes: tuple[str, ...] = Field(default=(), strict=False)
    """Classes whose nodes do as well, the best first: asked for while this class has no capacity."""
    lead_time: LeadTime = LeadTime()

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> NodeClass:
        if self.cap < self.floor:
            raise ValueError(f"cap: {self.cap} is below floor ({self.floor}); raise cap or lower floor")
        return self


class Policy(Part):
    """All pools of one controller."""

    classes: dict[str, NodeClass] = Field(min_length=1)
    budget_per_hour: Cost | None = None
    """What all held nodes together may cost in an hour; the least useful nodes go first. Floors are kept."""
    step_seconds: Annotated[float, Field(ge=60, le=7_200, strict=False)] = 1_800.0
    """The grain of the history that forecasts are made from. What is finer is seen by other means: see
    `warmpool.arrivals`."""
    history_days: float = Field(default=28.0, ge=1, le=365, strict=False)
    refit_seconds: Seconds = 6 * 3_600.0
    """How often models are chosen and fitted again."""
    keep: float = Field(default=0.5, gt=0, le=1, strict=False)
    """A node that is held is kept until it is worth less than this part of what a new one must be worth."""
    release_after_seconds: Annotated[float, Field(ge=0, le=86_400, strict=False)] = 30.0
    """A node is let go only after the pool has been too large for this long."""
    hold_seconds: Annotated[float, Field(ge=0, le=86_400, strict=False)] = 300.0
    """How long demand may be unknown before the pool goes by what is expected. Until then nothing is let
    go."""
    breaker: Breaker = Breaker()

    @pydantic.model_validator(mode="after")
    def _known(self) -> Policy:
        for name, each in self.classes.items():
            for other in each.substitutes:
                if other not in self.classes or other == name:
                    raise ValueError(
                        f"classes.{name}.substitutes: {other!r} is no other class; add it to classes, or "
                        "take it out of substitutes"
                    )
        return self
