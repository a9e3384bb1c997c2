"""Studies on SQLite and on a real PostgreSQL alike: they outlive a process, keep what failed, say when gone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from moe_tuner.explore import Do, End, Step, Suggestion
from moe_tuner.postgres import PostgresGone, PostgresJournal
from moe_tuner.space import space_of
from moe_tuner.study import StorageUnreachable, Study
from tests.gateway.test_gateway_stores import postgres as postgres  # noqa: PLC0414  # the private server's fixture
from tests.tuner.tuner_world import BOUNDS, setting

Open = Callable[[str], Study]


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens a study by deployment, again and again, on the same storage."""
    url = f"sqlite:///{tmp_path / 'tuner.db'}"
    if request.param == "PostgreSQL":
        url = request.getfixturevalue("postgres")
    made: list[Study] = []

    def study(deployment: str) -> Study:
        made.append(Study(url, f"{request.param}/{deployment}", seed=len(made)))
        return made[-1]

    yield study
    for one in made:
        one.close()


def asked(study: Study) -> Suggestion:
    answer = study.ask(setting(seqs=16), space_of(BOUNDS), BOUNDS, 16)
    assert isinstance(answer, Suggestion)
    return answer


def told(study: Study, suggestion: Suggestion, end: End, cost: float | None, **constraints: float) -> None:
    study.tell(Step(do=Do.FINISH, end=end, suggestion=suggestion, reason="r", cost=cost, constraints=constraints))


def test_a_study_is_taken_up_by_the_next_process(opened: Open) -> None:
    first = opened("next")
    told(first, asked(first), End.PROMOTED, 0.8)
    told(first, asked(first), End.CENSORED, None)
    left = asked(first)
    first.remember_incumbent(setting("1.5"), 0.8)
    first.close()
    second = opened("next")
    summary = second.summary()
    assert summary.size == 3
    assert summary.best is not None
    assert summary.best.cost == 0.8
    assert second.incumbent_cost(setting("1.5")) == 0.8
    assert asked(second).number > left.number


def test_what_broke_a_promise_and_what_crashed_is_not_asked_again(opened: Open) -> None:
    study = opened("unfit")
    bad = asked(study)
    told(study, bad, End.ROLLED_BACK, 10.0, crash=1.0)
    study.close()
    again = opened("unfit")
    for _ in range(6):
        suggestion = asked(again)
        assert suggestion.setting != bad.setting
        told(again, suggestion, End.NO_GAIN, 1.0)
    never = asked(again).setting
    for _ in range(6):
        answer = again.ask(setting(seqs=16), space_of(BOUNDS), BOUNDS, 16, [never])
        assert isinstance(answer, Suggestion)
        assert answer.setting != never
        told(again, answer, End.NO_GAIN, 1.0)


def test_what_was_only_simulated_teaches_and_is_never_the_best(opened: Open) -> None:
    study = opened("simulated")
    told(study, asked(study), End.SIMULATED, 0.1, ttft=0.5)
    assert study.summary().best is None
    assert study.summary().size == 1


def test_studies_of_two_deployments_are_apart(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    told(one, asked(one), End.NO_GAIN, 1.0)
    assert (one.summary().size, other.summary().size) == (1, 0)


def test_the_password_comes_from_a_file_and_is_in_no_error(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    study = Study("postgresql://me@127.0.0.1:9/db", "default/a", password_file=str(secret))
    assert make_url(study._address()).password == "hunter2"
    with pytest.raises(StorageUnreachable) as gone:
        study.open()
    assert "postgresql://me@127.0.0.1:9/db does not answer (PostgresGone)" in str(gone.value)
    assert "hunter2" not in str(gone.value)
    secret.unlink()
    with pytest.raises(StorageUnreachable, match="FileNotFoundError"):
        study.open()


def test_entries_keep_their_order_and_a_lost_connection_is_made_anew(postgres: str) -> None:
    one, other = PostgresJournal(postgres, "order"), PostgresJournal(postgres, "order")
    one.append_logs([{"n": 0}, {"n": 1}])
    other.append_logs([{"n": 2}])
    assert list(one.read_logs(0)) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert list(one.read_logs(2)) == [{"n": 2}]
    assert one._connection is not None
    one._connection.terminate()
    with contextlib.suppress(PostgresGone):  # the call that finds it lost may fail; the one after it may not
        one.append_logs([{"n": 3}])
    one.append_logs([{"n": 4}])
    assert list(other.read_logs(4 - 1))[-1] == {"n": 4}
    one.close()
    other.close()
