"""Writes `status.tuning` of what is tuned: when it says something new, and seldom enough for any API server."""

from __future__ import annotations

from collections.abc import Callable

from moe_api.annotations import TUNER_MANAGER
from moe_api.status import TuningStatus
from moe_core.clock import Clock
from moe_core.log import get_log
from moe_kube.api import Api
from moe_kube.errors import ApiError, Conflict, Fenced, NotFound
from moe_kube.objects import MOE_DEPLOYMENT, Obj, Ref
from moe_tuner.fleet import Fleet
from moe_tuner.follow import Follower, Key, name_of
from moe_tuner.record import document, status_of, worth_writing
from moe_tuner.resource import Wanted, tuning_of

LOOK_S = 1.0
WRITE_S = 5.0


class Register:
    """`run` it while this process leads."""

    def __init__(
        self,
        api: Api,
        follower: Follower,
        fleet: Fleet,
        *,
        writer: str,
        every_s: float,
        clock: Clock,
        observe: Callable[[str], None] = lambda result: None,
    ) -> None:
        """`api` refuses writes while this process does not lead."""
        self._api = api
        self._follower = follower
        self._fleet = fleet
        self._writer = writer
        self._every_s = every_s
        self._clock = clock
        self._observe = observe
        self._tried_at: dict[tuple[Key, str], float] = {}
        self._log = get_log("tuner.register")

    async def run(self) -> None:
        """Look each second, until cancelled."""
        while True:
            await self.look()
            await self._clock.sleep(LOOK_S)

    async def look(self) -> None:
        """Write what is due now. Raises nothing of the API server's."""
        now = self._clock.monotonic()
        self._tried_at = {key: at for key, at in self._tried_at.items() if now - at < self._every_s}
        for key, wanted in list(self._follower.wanted.items()):
            if (key, wanted.uid) not in self._tried_at:
                await self._one(key, wanted)

    async def _one(self, key: Key, wanted: Wanted) -> None:
        obj = self._follower.resource(key)
        if obj is None or obj["metadata"].get("uid") != wanted.uid:
            return
        member = self._fleet.find(name_of(key))
        report = None if member is None or member.tuner is None else member.tuner.report()
        problem = None if member is None else member.problem
        before = tuning_of(obj)
        after = status_of(wanted, report, before, writer=self._writer, problem=problem)
        if after is not None and worth_writing(before, after):
            self._tried_at[key, wanted.uid] = self._clock.monotonic()
            await self._write(key, wanted.uid, after)

    async def _write(self, key: Key, uid: str, status: TuningStatus) -> None:
        """Apply our part of the status. It names the uid: one of that name that came later is another."""
        ref = Ref(MOE_DEPLOYMENT, *key)
        body: Obj = {
            "apiVersion": ref.kind.api_version,
            "kind": ref.kind.kind,
            "metadata": {"name": ref.name, "namespace": ref.namespace, "uid": uid},
            "status": {"tuning": document(status)},
        }
        try:
            obj = await self._api.apply(ref, body, manager=TUNER_MANAGER, subresource="status", timeout_s=WRITE_S)
        except (Fenced, NotFound, Conflict):
            return  # Another one leads, or it is gone: who comes next knows.
        except ApiError as error:
            self._observe("failed")
            self._log.warning(
                "status.tuning could not be written", deployment=name_of(key), reason=str(error), status=error.status
            )
        else:
            self._observe("written")
            self._follower.learn(obj)
