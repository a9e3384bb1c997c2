"""Cases on lists, watches and JSON patches."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from moe_kube.api import WatchEvent
from moe_kube.errors import Gone, Invalid
from moe_kube.objects import (
    CONFIG_MAP,
    MOE_DEPLOYMENT,
)
from tests.kube.bodies import MOE_SPEC
from tests.kube.server import OPERATOR, WATCH_S, Server, case, config, seen, version

# Lists


@case
async def a_list_comes_in_pages_of_one_version(server: Server) -> None:
    for name in "abcde":
        await config(server, name, a=name)
    first = await server.api.list(CONFIG_MAP, namespace=server.namespace, labels="", limit=2)
    await server.api.delete(server.ref(CONFIG_MAP, "e"))
    await config(server, "f", a="f")
    names = [one["metadata"]["name"] for one in first.items]
    page = first
    while page.continue_token:
        page = await server.api.list(
            CONFIG_MAP, namespace=server.namespace, limit=2, continue_token=page.continue_token
        )
        assert page.resource_version == first.resource_version
        names += [one["metadata"]["name"] for one in page.items]
    assert [name for name in names if len(name) == 1] == list("abcde")


@case
async def a_page_of_a_version_that_is_forgotten_is_gone(server: Server) -> None:
    for name in "abc":
        await server.api.apply(server.ref(MOE_DEPLOYMENT, name), {"spec": MOE_SPEC}, manager=OPERATOR)
    first = await server.api.list(MOE_DEPLOYMENT, namespace=server.namespace, limit=1)
    token = await server.forget(first.continue_token)
    with pytest.raises(Gone):
        await server.api.list(MOE_DEPLOYMENT, namespace=server.namespace, limit=1, continue_token=token)


@case
async def a_list_selects_by_labels(server: Server) -> None:
    labels = {"a": {"tier": "gold", "app": "x"}, "b": {"tier": "free"}, "c": {}}
    for name, own in labels.items():
        await server.api.create(server.ref(CONFIG_MAP, name), {"metadata": {"labels": {**own, "case": "labels"}}})
    expected = {
        "tier=gold": "a",
        "tier==gold,app=x": "a",
        "tier!=gold": "bc",
        "tier in (gold, free)": "ab",
        "tier notin (gold)": "bc",
        "tier": "ab",
        "!tier": "c",
        "tier,!app": "b",
        "": "abc",
    }
    for text, names in expected.items():
        selector = f"case=labels,{text}" if text else "case=labels"
        page = await server.api.list(CONFIG_MAP, namespace=server.namespace, labels=selector)
        assert "".join(one["metadata"]["name"] for one in page.items) == names, text
    with pytest.raises(Invalid):
        await server.api.list(CONFIG_MAP, namespace=server.namespace, labels="a in b")


@case
async def a_list_from_a_cache_is_no_newer_than_a_fresh_one(server: Server) -> None:
    await config(server, "cached", a="1")
    fresh = await server.api.list(CONFIG_MAP, namespace=server.namespace)
    cached = await server.api.list(CONFIG_MAP, namespace=server.namespace, resource_version="0")
    assert int(cached.resource_version) <= int(fresh.resource_version)
    assert "cached" in {one["metadata"]["name"] for one in fresh.items}


# Watches


@case
async def a_watch_tells_every_change_after_a_version(server: Server) -> None:
    await config(server, "before", a="1")
    start = (await server.api.list(CONFIG_MAP, namespace=server.namespace)).resource_version
    made = await config(server, "w", a="1")
    changed = await config(server, "w", a="2")
    await server.api.delete(server.ref(CONFIG_MAP, "w"))
    events = await seen(server, CONFIG_MAP, start)
    assert [event.type for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert [version(event.object) for event in events[:2]] == [version(made), version(changed)]
    assert int(version(events[2].object)) > int(version(changed))
    assert events[2].object["data"] == {"a": "2"}
    later = await seen(server, CONFIG_MAP, version(changed))
    assert [event.type for event in later] == ["DELETED"]


@case
async def a_watch_that_selects_nothing_brings_bookmarks_of_what_passes_and_ends(server: Server) -> None:
    start = version(await config(server, "before", a="1"))
    events = server.api.watch(
        CONFIG_MAP, resource_version=start, namespace=server.namespace, labels="none=such", timeout_s=5.0
    )

    async def collect() -> list[WatchEvent]:
        async with aclosing(events):
            return [event async for event in events]

    watching = asyncio.create_task(collect())
    await server.let_pass(0.5)
    passing = await config(server, "passing", a="1")
    found = await watching
    assert {event.type for event in found} == {"BOOKMARK"}
    assert int(version(found[-1].object)) >= int(version(passing))


@case
async def leaving_a_selector_is_a_deletion_and_entering_an_addition(server: Server) -> None:
    ref = server.ref(CONFIG_MAP, "moving")
    start = version(await server.api.apply(ref, {"metadata": {"labels": {"in": "no"}}}, manager=OPERATOR))
    await server.api.apply(ref, {"metadata": {"labels": {"in": "yes"}}, "data": {"a": "1"}}, manager=OPERATOR)
    await server.api.apply(ref, {"metadata": {"labels": {"in": "yes"}}, "data": {"a": "2"}}, manager=OPERATOR)
    left = await server.api.apply(ref, {"metadata": {"labels": {"in": "no"}}, "data": {"a": "3"}}, manager=OPERATOR)
    await server.api.delete(ref)
    events = await seen(server, CONFIG_MAP, start, labels="in=yes")
    assert [event.type for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    last = events[-1].object
    assert version(last) == version(left)
    assert last["data"] == {"a": "2"}, "the last state that was selected"


@case
async def a_watch_from_a_version_too_old_is_gone(server: Server) -> None:
    with pytest.raises(Gone):
        await anext(
            server.api.watch(MOE_DEPLOYMENT, resource_version="1", namespace=server.namespace, timeout_s=WATCH_S)
        )


# JSON patch


@case
async def a_json_patch_is_done_whole_or_not_at_all(server: Server) -> None:
    ref = server.ref(CONFIG_MAP)
    made = await config(server, a="1", b="1")
    for failing in (
        {"op": "test", "path": "/data/b", "value": "other"},
        {"op": "remove", "path": "/data/none"},
        {"op": "replace", "path": "/data/none/deeper", "value": "1"},
    ):
        with pytest.raises(Invalid):
            await server.api.json_patch(ref, [{"op": "replace", "path": "/data/a", "value": "2"}, failing])
    assert version(await server.api.get(ref)) == version(made)
    done = await server.api.json_patch(
        ref,
        [
            {"op": "test", "path": "/metadata/resourceVersion", "value": version(made)},
            {"op": "test", "path": "/data/b", "value": "1"},
            {"op": "remove", "path": "/data/b"},
            {"op": "add", "path": "/metadata/annotations", "value": {}},
            {"op": "add", "path": "/metadata/annotations/moestack.dev~1x", "value": "1"},
        ],
    )
    assert done["data"] == {"a": "1"}
    assert done["metadata"]["annotations"] == {"moestack.dev/x": "1"}
    stale = {"op": "test", "path": "/metadata/resourceVersion", "value": version(made)}
    with pytest.raises(Invalid):
        await server.api.json_patch(ref, [stale, {"op": "remove", "path": "/data/a"}])
