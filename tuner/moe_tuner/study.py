"""The Optuna study of one deployment: stored trials that survive restarts, constraints, and no trial proposed twice.

All calls block; the daemon makes them in one worker thread, in order.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from moe_api.base import Model
from moe_core.config import KnobBounds
from moe_core.setting import ACTIVE_SEQS, CAPACITY, Setting
from moe_tuner.explore import End, Nothing, Step, Suggestion
from moe_tuner.postgres import PostgresJournal
from moe_tuner.report import TrialReport
from moe_tuner.space import Space, candidate, gentle_start

T = TypeVar("T")
STARTUP_TRIALS = 8
DRAWS = 100
"""Random points tried before the space counts as known."""
NEAR_GAMMA, NEAR_SEQS = 0.025, 0.02
_INCUMBENT = "incumbent"
_OUTCOME, _REASON, _SKIPPED = "outcome", "reason", "skipped"


class StorageUnreachable(Exception):
    """The study's storage does not answer."""


class Summary(Model):
    """What the status shows of a study."""

    size: int = 0
    best: TrialReport | None = None


class Study:
    """One deployment's study."""

    def __init__(
        self, storage_url: str, deployment: str, *, seed: int | None = None, password_file: str | None = None
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        optuna.logging.disable_default_handler()
        self._where = public_storage(storage_url)
        self._storage_url = storage_url
        self._password_file = password_file
        self._name = f"moestack/{deployment}"
        self._seed = seed
        self._random = random.Random(seed)
        self._study: optuna.Study | None = None
        self._journal: PostgresJournal | None = None
        self._running: dict[int, Trial] = {}

    def open(self) -> None:
        """Load the study, or make it. A trial that a killed process left running is closed as failed."""
        if self._study is not None:
            return

        def load() -> optuna.Study:
            sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=self._seed)
            study = optuna.create_study(
                study_name=self._name,
                storage=self._storage(),
                sampler=sampler,
                direction="minimize",
                load_if_exists=True,
            )
            for orphan in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                study.tell(orphan.number, state=TrialState.FAIL)
            return study

        self._study = self._guarded(load)

    def ask(
        self,
        incumbent: Setting,
        space: Space,
        bounds: KnobBounds,
        limit_in_force: int | None,
        never: Sequence[Setting] = (),
    ) -> Suggestion | Nothing:
        """The next candidate: not the incumbent, not one that broke a promise before, none of `never`."""
        return self._guarded(lambda: self._ask(incumbent, space, bounds, limit_in_force, never))

    def tell(self, step: Step) -> None:
        """Record how a trial ended. A censored one teaches the sampler nothing."""
        self._guarded(lambda: self._tell(step))

    def remember_incumbent(self, setting: Setting, cost: float) -> None:
        """Keep the incumbent's relative cost, so that trials after a restart are told on the same scale."""
        record = {"setting": setting.to_json(), "cost": cost}
        self._guarded(lambda: self._opened().set_user_attr(_INCUMBENT, record))

    def incumbent_cost(self, setting: Setting) -> float:
        """Relative cost of this incumbent; 1 for one that the study does not know."""
        record = self._guarded(lambda: self._opened().user_attrs.get(_INCUMBENT))
        if isinstance(record, dict) and record.get("setting") == setting.to_json():
            return float(record["cost"])
        return 1.0

    def summary(self) -> Summary:
        return self._guarded(self._summary)

    def close(self) -> None:
        """Let go of the storage's connections."""
        if self._study is not None:
            storage: Any = self._study._storage
            with contextlib.suppress(AttributeError, SQLAlchemyError):
                storage.remove_session()
            self._study = None
        self._close_journal()

    def _storage(self) -> str | optuna.storages.BaseStorage:
        """PostgreSQL by Optuna's journal over asyncpg; SQLite, and what else has a driver here, by its own storage."""
        address = self._address()
        if make_url(address).get_backend_name() != "postgresql":
            return address
        self._journal = PostgresJournal(address, self._name)
        return optuna.storages.JournalStorage(self._journal)

    def _close_journal(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    def _address(self) -> str:
        """The storage's address with its password, read anew: it may have been changed."""
        if self._password_file is None:
            return self._storage_url
        password = Path(self._password_file).read_text(encoding="utf-8").strip()
        return make_url(self._storage_url).set(password=password).render_as_string(hide_password=False)

    def _opened(self) -> optuna.Study:
        self.open()
        assert self._study is not None  # noqa: S101
        return self._study

    def _ask(
        self,
        incumbent: Setting,
        space: Space,
        bounds: KnobBounds,
        limit_in_force: int | None,
        never: Sequence[Setting],
    ) -> Suggestion | Nothing:
        study = self._opened()
        known = [trial for trial in study.get_trials(deepcopy=False) if trial.state is not TrialState.WAITING]
        # What only the simulator refused may be asked again: the simulator learns too.
        live = [t for t in known if t.user_attrs.get(_OUTCOME) != End.SIMULATED.value and space.holds(t.params)]
        unfit = [t.params for t in live if any(by > 0 for by in t.constraints.values())]
        if not any(trial.state is TrialState.COMPLETE for trial in known) and not study.get_trials(
            deepcopy=False, states=(TrialState.WAITING,)
        ):
            study.enqueue_trial(gentle_start(incumbent, space, limit_in_force), skip_if_exists=True)

        def acceptable(params: Mapping[str, float]) -> bool:
            setting = candidate(incumbent, params, bounds)
            same = setting == incumbent or _same_in_effect(setting, incumbent, limit_in_force)
            crashed = any(_near(_params_of(setting), _params_of(bad)) for bad in never)
            return not same and not crashed and not any(_near(params, bad) for bad in unfit)

        trial = study.ask(self._distributions(space))
        if not acceptable(trial.params):
            # One refused proposal is recorded, never a dozen: then a random point that will do.
            trial.set_user_attr(_OUTCOME, _SKIPPED)
            study.tell(trial, state=TrialState.FAIL)
            point = next((p for p in (space.draw(self._random) for _ in range(DRAWS)) if acceptable(p)), None)
            if point is None:
                return Nothing(reason="every point left is the incumbent or known to break a promise")
            study.enqueue_trial(point)
            trial = study.ask(self._distributions(space))
        params = {name: float(value) for name, value in trial.params.items()}
        self._running[trial.number] = trial
        return Suggestion(number=trial.number, params=params, setting=candidate(incumbent, params, bounds))

    def _tell(self, step: Step) -> None:
        study = self._opened()
        assert step.suggestion is not None  # noqa: S101
        assert step.end is not None  # noqa: S101
        trial = self._running.pop(step.suggestion.number, None)
        if trial is None:
            return
        trial.set_user_attr(_OUTCOME, step.end.value)
        trial.set_user_attr(_REASON, step.reason)
        if step.end is End.CENSORED or step.cost is None:
            study.tell(trial, state=TrialState.FAIL)
            return
        for name, by in step.constraints.items():
            trial.set_constraint(name, by)
        study.tell(trial, step.cost)

    def _summary(self) -> Summary:
        done = [t for t in self._opened().get_trials(deepcopy=False) if t.user_attrs.get(_OUTCOME) != _SKIPPED]
        fit = [
            (t.value, t)
            for t in done
            if t.state is TrialState.COMPLETE
            and t.value is not None
            and t.user_attrs.get(_OUTCOME) != End.SIMULATED.value
            and all(by <= 0 for by in t.constraints.values())
        ]
        best = min(fit, key=lambda pair: pair[0], default=None)
        return Summary(size=len(done), best=None if best is None else _report(best[1]))

    @staticmethod
    def _distributions(space: Space) -> dict[str, BaseDistribution]:
        distributions = dict[str, BaseDistribution]()
        if space.gamma is not None:
            distributions[CAPACITY] = optuna.distributions.FloatDistribution(*space.gamma)
        if space.active_seqs is not None:
            low, high = space.active_seqs
            distributions[ACTIVE_SEQS] = optuna.distributions.IntDistribution(low, high, log=high >= 8 * low)
        return distributions

    def _guarded(self, call: Callable[[], T]) -> T:
        """Run a call on the storage; whatever its driver raises becomes one sentence without addresses or passwords."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return call()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError, ImportError, ArgumentError) as error:
            self._study = None
            self._running.clear()
            self._close_journal()
            raise StorageUnreachable(
                f"the study's storage {self._where} does not answer ({type(error).__name__})"
            ) from None


def public_storage(url: str) -> str:
    """The storage's address without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "storageUrl (which is no database address)"


def _near(params: Mapping[str, float], bad: Mapping[str, float]) -> bool:
    """Whether two points are the same for all that a measurement could tell."""
    if set(params) != set(bad):
        return False
    gamma = abs(params[CAPACITY] - bad[CAPACITY]) <= NEAR_GAMMA if CAPACITY in params else True
    seqs = (
        abs(params[ACTIVE_SEQS] - bad[ACTIVE_SEQS]) <= NEAR_SEQS * bad[ACTIVE_SEQS] if ACTIVE_SEQS in params else True
    )
    return gamma and seqs


def _params_of(setting: Setting) -> dict[str, float]:
    """A setting as a point of the study's space."""
    cap, seqs = setting.prefill_cap, setting.engine.max_active_seqs
    known = {CAPACITY: None if cap is None else float(cap), ACTIVE_SEQS: None if seqs is None else float(seqs)}
    return {name: value for name, value in known.items() if value is not None}


def _same_in_effect(setting: Setting, incumbent: Setting, limit_in_force: int | None) -> bool:
    """Whether the only difference is that the ceiling in force is now named."""
    named = incumbent.with_active_seqs(incumbent.engine.max_active_seqs or limit_in_force)
    return setting == named


def _report(trial: FrozenTrial) -> TrialReport:
    return TrialReport(
        number=trial.number,
        params={name: float(value) for name, value in trial.params.items()},
        cost=trial.value,
        constraints=trial.constraints,
        outcome=str(trial.user_attrs.get(_OUTCOME, "")),
        reason=str(trial.user_attrs.get(_REASON, "")),
    )
