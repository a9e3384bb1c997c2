"""What the tuner tells people: decisions as they lie in its log, and the report behind `GET /v1/status`.

Imports neither Optuna nor Prometheus, so that the command line can read a report without them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moe_api.base import Model
from moe_core.setting import Setting, Signals
from moe_core.wire import TuningOrders

Loop = Literal["fast", "slow"]


class Effect(Model):
    """What a candidate costs over the incumbent: 0.9 is 10 % cheaper."""

    ratio: float
    low: float | None = Field(default=None, description="95 % interval by a block bootstrap over pairs")
    high: float | None = None
    pairs: int = 0
    evidence: float = Field(default=1.0, description="e-value against no gain; 1/alpha promotes")


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
    predicted: Effect | None = Field(default=None, description="by the simulator, before it was tried")
    measured: Effect | None = Field(default=None, description="by pairs of windows on the running system")
    trial: int | None = Field(default=None, description="number in the study")
    inputs: dict[str, Any] | None = Field(
        default=None, description="what the policy was given, for `moectl tune replay`; in the log alone"
    )


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
    on_trial: bool = Field(default=False, description="the knobs in force are a candidate that nobody has proven")
    acknowledged: int = Field(default=0, description="lowest version in force on any rank or gateway")
    crashed: tuple[Setting, ...] = Field(default=(), description="an engine died under them: never tried again")
    auto_since_s: float | None = Field(default=None, description="unix seconds at which mode Auto first began")
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
    trials_today: int = 0
    trials_per_day: int = 0
    orders: TuningOrders | None = Field(default=None, description="what a person ordered by command")
    journal_problem: str | None = None
    recommendation: DecisionRecord | None = None
    decisions: tuple[DecisionRecord, ...] = Field(default=(), description="the last ones, newest first")


class DeploymentSummary(Model):
    """A row of `GET /v1/deployments`."""

    deployment: str
    tuned: bool
    problem: str | None = Field(default=None, description="why it is not tuned, or what is wrong with it")
    mode: Literal["Off", "Recommend", "Auto"] | None = None
    paused: bool | None = None
    version: int | None = None
    displaced: bool | None = None
    exploring: bool | None = None
    exploring_reason: str | None = None
    fast_reason: str | None = None
