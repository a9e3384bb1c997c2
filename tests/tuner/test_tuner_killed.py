"""Killed before or after any write to its disk, in a trial: it resumes without a wrong or doubled change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_core.setting import Setting
from moe_tuner.journal import Journal
from tests.tuner.tuner_bench import Bench, bench, no_exploring

pytestmark = pytest.mark.faults


class Killed(BaseException):
    """The process ends here."""


class Killer:
    """Ends the process at one write to the journal; from then on the old process writes and sends nothing."""

    def __init__(self, at: int, *, after: bool, patch: pytest.MonkeyPatch) -> None:
        self.left, self.after, self.dead = at, after, False
        for name in ("append", "save"):
            patch.setattr(Journal, name, self._wrapped(getattr(Journal, name)))

    def _wrapped(self, plain: Any) -> Any:
        def write(journal: Journal, *args: Any, **options: Any) -> Any:
            if self.dead:
                raise Killed
            self.left -= 1
            if self.left < 0 and not self.after:
                self.dead = True
                raise Killed
            answer = plain(journal, *args, **options)
            if self.left < 0:
                self.dead = True
                raise Killed
            return answer

        return write


async def until_killed(b: Bench, killer: Killer) -> None:
    for _ in range(120):
        try:
            await b.seconds(1)
        except Killed:
            return
        if killer.dead:
            return
    raise AssertionError("nothing was written any more")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(1, 9))
async def test_killed_at_a_write_it_returns_to_the_incumbent_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool
) -> None:
    async with bench(tmp_path) as b:
        with monkeypatch.context() as patch:
            killer = Killer(at, after=after, patch=patch)
            await until_killed(b, killer)
        sent = len(b.board.applied)
        b.restart()
        no_exploring(b)
        await b.seconds(5)
        home = b.report.home
        assert home is not None
        assert home.prefill_cap is None
        assert b.board.knobs is None or Setting.of(b.board.knobs) == home
        versions = [knobs.version for knobs in b.board.applied]
        assert versions == sorted(set(versions))
        assert len(versions) <= sent + 1
        await b.seconds(10)
        assert [knobs.version for knobs in b.board.applied] == versions
        assert not b.report.displaced
