"""The budget's books in a ConfigMap: what every cluster has. Compare-and-swap by the object's resourceVersion."""

from __future__ import annotations

from moe_gateway.money_store import StoreGone, Versioned
from moe_kube import objects
from moe_kube.access import AccessError
from moe_kube.api import Api
from moe_kube.connect import connect
from moe_kube.errors import ApiError, Conflict, NotFound
from moe_kube.objects import Obj, Ref

KEY = "books.json"
CALL_S = 2.0


class ObjectStore:
    """One ConfigMap. It is made by whoever may: a gateway in a cluster has the right to read and update it alone."""

    report_every_s = 5.0  # every write of it is kept by the cluster's own store, and passed on to who watches

    def __init__(self, namespace: str, name: str, api: Api | None = None) -> None:
        self._ref = Ref(objects.CONFIG_MAP, namespace, name)
        self._given = api
        self._api = api
        self._seen: Obj | None = None

    async def read(self) -> Versioned | None:
        try:
            self._seen = found = await (await self._connected()).get(self._ref, timeout_s=CALL_S)
        except NotFound as error:
            if error.kind_missing:
                raise StoreGone(f"{self._ref}: {error}") from None
            self._seen = None
            return None
        except (ApiError, AccessError) as error:
            raise StoreGone(f"{self._ref}: {error}") from None
        text = (found.get("data") or {}).get(KEY, "")
        return Versioned(found["metadata"]["resourceVersion"], text.encode())

    async def swap(self, version: str | None, document: bytes) -> bool:
        try:
            api = await self._connected()
            if version is None:
                await api.create(self._ref, self._body({}, document), timeout_s=CALL_S)
                return True
            seen = self._seen
            if seen is None or seen["metadata"]["resourceVersion"] != version:
                seen = await api.get(self._ref, timeout_s=CALL_S)
                if seen["metadata"]["resourceVersion"] != version:
                    return False
            await api.replace(self._ref, self._body(seen, document), timeout_s=CALL_S)
        except (Conflict, NotFound):
            return False
        except (ApiError, AccessError) as error:
            raise StoreGone(f"{self._ref}: {error}") from None
        return True

    async def close(self) -> None:
        close = getattr(self._api, "close", None)
        if self._given is None and close is not None:
            await close()

    async def _connected(self) -> Api:
        if self._api is None:
            self._api = await connect()
        return self._api

    def _body(self, seen: Obj, document: bytes) -> Obj:
        """The object as it was, owner and labels included, with other books."""
        meta = {**seen.get("metadata", {}), "namespace": self._ref.namespace, "name": self._ref.name}
        data = {**(seen.get("data") or {}), KEY: document.decode()}
        return {**seen, "apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
