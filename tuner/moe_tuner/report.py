"""What the tuner tells people: decisions as they lie in its log, and the report behind `GET /v1/status`.

Imports neither Optuna nor Prometheus, so that the command line can read a report without them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_api.base import Model
from moe_core.setting import Setting, Signals

Loop = Literal["fast", "slow"]


class DecisionRecord(Model):
    """One decision: a line of the decision log."""

    time: float = Field(description="unix seconds at which it was taken")
    loop: Loop
    action: str
    reason: str
    mode: str
    sent: bool = Field(description="False: recommended, refused or without a change")
    signals: Signals
    before: Setting
    after: Setting | None = None
    version: int | None = Field(default=None, description="of the knobs that carry it")
    ack_seconds: float | None = Field(default=None, description="until the last rank had it; None: not all did")
    ack_missing: tuple[str, ...] = ()
    ack_errors: tuple[str, ...] = ()
    note: str | None = None


class TrialReport(Model):
    """One trial of the study."""

    number: int
    params: dict[str, float]
    cost: float | None = Field(default=None, description="engine seconds per token, the first incumbent's being 1")
    constraints: dict[str, float] = Field(default_factory=dict, description="positive: broken by that share")
    outcome: str = ""
    reason: str = ""


class AckSummary(Model):
    """Whether the version last sent is in force everywhere."""

    complete: bool
    seconds: float | None = None
    missing: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class Budget(Model):
    """Changes within the last hour."""

    used: int
    per_hour: int


class TuningReport(Model):
    """`GET /v1/status`."""

    deployment: str
    mode: Literal["Off", "Recommend", "Auto"]
    paused: bool
    pins: tuple[str, ...] = ()
    started_at_s: float
    version: int = Field(description="of the knobs in force; 0: none were sent yet")
    knobs: Setting | None = Field(default=None, description="in force; null until the board has answered")
    home: Setting | None = Field(default=None, description="the setting that stands while nothing presses")
    displaced: bool = Field(default=False, description="the knobs are away from home because of a spike or a trial")
    acks: AckSummary | None = None
    exploring: bool
    exploring_reason: str = Field(description="what the slow loop does now, or why it explores nothing")
    trial: TrialReport | None = None
    best_trial: TrialReport | None = None
    study_size: int = 0
    fast_reason: str = Field(description="the fast loop's word of this tick, with the numbers it used")
    spike: bool = False
    signals: Signals
    budget: Budget
    recommendation: DecisionRecord | None = None
    decisions: tuple[DecisionRecord, ...] = Field(default=(), description="the last ones, newest first")
