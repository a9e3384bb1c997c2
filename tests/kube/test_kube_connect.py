"""From configuration to credentials: kubeconfig in all its forms, a pod's rotating token, and no secret in an error."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core import http, log
from moe_core.clock import FakeClock
from moe_kube import errors
from moe_kube.access import Access, AccessError, Credentials
from moe_kube.client import KubeApi
from moe_kube.connect import Kubeconfig, connect, service_account, source
from moe_kube.objects import POD, Ref
from tests.kube.api_server import answer, authority, server_context, stand_in, status

REF = Ref(POD, "ns", "x")


def kubeconfig(folder: Path, server: str, user: dict[str, Any], **cluster: Any) -> Path:
    path = folder / "config"
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "one",
                "contexts": [
                    {"name": "one", "context": {"cluster": "c", "user": "u"}},
                    {"name": "other", "context": {"cluster": "d", "user": "u"}},
                ],
                "clusters": [
                    {"name": "c", "cluster": {"server": server, **cluster}},
                    {"name": "d", "cluster": {"server": "http://other:1"}},
                ],
                "users": [{"name": "u", "user": user}],
            }
        )
    )
    return path


def plugin(folder: Path, body: str) -> dict[str, Any]:
    """An exec credential plugin that counts its runs in a file."""
    script = folder / "plugin.py"
    script.write_text(f"import pathlib\nruns = pathlib.Path({str(folder / 'runs')!r})\n{body}")
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script)],
        }
    }


PRINT_TOKEN = """
n = int(runs.read_text()) + 1 if runs.exists() else 1
runs.write_text(str(n))
import json
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
                  "status": {"token": f"plugin-token-{n}"}}))
"""


async def sent(api: KubeApi, server: Any) -> str:
    await api.get(REF)
    return server.asked[-1].headers.get("Authorization", "")


@pytest.mark.parametrize(
    ("user", "header"),
    [
        ({"token": "abc"}, "Bearer abc"),
        ({"username": "me", "password": "pw"}, "Basic " + base64.b64encode(b"me:pw").decode()),
        ({}, ""),
    ],
    ids=["token", "basic", "none (kubectl proxy)"],
)
async def test_kubeconfig_users(tmp_path, user, header):
    async with stand_in() as server, await connect(kubeconfig(tmp_path, server.url, user)) as api:
        assert await sent(api, server) == header


async def test_another_context(tmp_path):
    load = Kubeconfig(str(kubeconfig(tmp_path, "http://one:1", {"token": "abc"})), "other").load
    assert (await load(False)).host == "http://other:1"


async def test_a_token_file_is_read_again(tmp_path):
    clock = FakeClock()
    token = tmp_path / "token"
    token.write_text("first\n")
    async with stand_in() as server:
        path = kubeconfig(tmp_path, server.url, {"tokenFile": str(token)})
        async with await connect(path, clock=clock) as api:
            assert await sent(api, server) == "Bearer first"
            token.write_text("second\n")
            assert await sent(api, server) == "Bearer first"
            await clock.advance(61)
            assert await sent(api, server) == "Bearer second"


async def test_a_plugin_runs_once_and_again_when_its_token_is_refused(tmp_path):
    clock = FakeClock()
    async with stand_in() as server:
        path = kubeconfig(tmp_path, server.url, plugin(tmp_path, PRINT_TOKEN))
        async with await connect(path, clock=clock) as api:
            assert await sent(api, server) == "Bearer plugin-token-1"
            await clock.advance(600)
            assert await sent(api, server) == "Bearer plugin-token-1"
            server.answers = [status(401, "Unauthorized")] * 3
            with pytest.raises(errors.Forbidden):
                await api.get(REF)
            for _ in range(2):  # Refused again: not a plugin run for each call.
                with pytest.raises(errors.Forbidden):
                    await api.get(REF)
            assert await sent(api, server) == "Bearer plugin-token-2"


async def test_the_service_account_of_a_pod_rotates(tmp_path, monkeypatch):
    clock = FakeClock()
    ca, issue = authority(tmp_path)
    async with stand_in(server_context(ca, issue("server"))) as server:
        host, port = server.url.removeprefix("https://").split(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        monkeypatch.delenv("KUBECONFIG", raising=False)
        token = tmp_path / "token"
        token.write_text("first\n")
        monkeypatch.setattr("moe_kube.connect.service_account", lambda: service_account(str(token), str(ca.cert)))
        async with await connect(clock=clock) as api:
            assert await sent(api, server) == "Bearer first"
            token.write_text("second\n")
            server.answers = [status(401, "expired")]
            with pytest.raises(errors.Forbidden):
                await api.get(REF)
            assert await sent(api, server) == "Bearer second"
            token.unlink()  # For a moment, as kubelet swaps it: the last one stays in use.
            await clock.advance(61)
            assert await sent(api, server) == "Bearer second"
            token.write_text("third")
            await clock.advance(11)
            assert await sent(api, server) == "Bearer third"


async def test_client_certificates_inline_and_a_private_authority(tmp_path):
    ca, issue = authority(tmp_path)
    person = issue("alice")

    def inline(path: Path) -> str:
        return base64.b64encode(path.read_bytes()).decode()

    user = {"client-certificate-data": inline(person.cert), "client-key-data": inline(person.key)}
    async with stand_in(server_context(ca, issue("server"), client_required=True)) as server:
        trusted = kubeconfig(tmp_path, server.url, user, **{"certificate-authority-data": inline(ca.cert)})
        async with await connect(trusted) as api:
            await api.get(REF)
        assert server.peers == ["alice"]
        async with await connect(kubeconfig(tmp_path, server.url, user)) as api:
            with pytest.raises(errors.Unreachable, match="certificate verify failed"):
                await api.get(REF)
        async with await connect(kubeconfig(tmp_path, server.url, user, **{"insecure-skip-tls-verify": True})) as api:
            await api.get(REF)


async def test_a_client_certificate_that_is_renewed_in_place(tmp_path):
    clock = FakeClock()
    ca, issue = authority(tmp_path)
    mine = issue("before")
    user = {"client-certificate": str(mine.cert), "client-key": str(mine.key)}
    async with stand_in(server_context(ca, issue("server"), client_required=True)) as server:
        path = kubeconfig(tmp_path, server.url, user, **{"certificate-authority": str(ca.cert)})
        async with await connect(path, clock=clock) as api:
            await api.get(REF)
            renewed = issue("after")
            mine.key.write_bytes(renewed.key.read_bytes())
            mine.cert.write_bytes(renewed.cert.read_bytes())
            server.answers = [status(401, "expired")]
            with pytest.raises(errors.Forbidden):
                await api.get(REF)
            await api.get(REF)
        assert server.peers == ["before", "before", "after"]


SECRET = "hunter2hunter2"
BROKEN = {
    "no file": (None, "no kubeconfig at .*: give its path, or set KUBECONFIG"),
    "not YAML": (f"users: [{{token: {SECRET}, : : :", "is not YAML"),
    "empty": ("", "cannot be used"),
    "a list": (f"[{SECRET}]", "cannot be used"),
    "no context": ("{clusters: [], contexts: [], users: []}", "current-context"),
    "unknown context": (
        "{current-context: gone, clusters: [], contexts: [], users: []}",
        "name gone in .*contexts",
    ),
    "no server": (
        "{current-context: a, contexts: [{name: a, context: {cluster: c, user: u}}], "
        f"clusters: [{{name: c}}], users: [{{name: u, user: {{token: {SECRET}}}}}]}}",
        "cluster",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_kubeconfig_is_named_without_what_it_holds(tmp_path, name):
    text, message = BROKEN[name]
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AccessError, match=message) as raised:
        await connect(path)
    assert str(path) in str(raised.value)
    assert SECRET not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit('log in first; Bearer abcdefgh12345678')", r"log in first; \[redacted\]"),
        ("print('no JSON')", "failed to decode"),
        ('print(\'{"apiVersion": "client.authentication.k8s.io/v1", "kind": "x", "status": {}}\')', "missing token"),
    ],
    ids=["fails", "prints rubbish", "prints no token"],
)
async def test_a_plugin_that_fails(tmp_path, capfd, body, message):
    with pytest.raises(AccessError, match=message):
        await connect(kubeconfig(tmp_path, "http://127.0.0.1:1", plugin(tmp_path, body)))
    assert capfd.readouterr().err == ""


async def test_a_pod_without_a_token(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(AccessError, match="automountServiceAccountToken"):
        await connect(in_cluster=True)


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({"KUBECONFIG": "/from/env"}, {}, "/from/env"),
        ({"KUBECONFIG": "/from/env"}, {"kubeconfig": Path("/given")}, "/given"),
        ({}, {}, "/home/me/.kube/config"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, {"in_cluster": False}, "/home/me/.kube/config"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, {"context": "dev"}, "/home/me/.kube/config"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, {}, "service account"),
        ({"KUBERNETES_SERVICE_HOST": "h", "KUBECONFIG": "/from/env"}, {}, "/from/env"),
    ],
)
async def test_which_access_is_used(monkeypatch, environment, arguments, expected):
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)
    load = source(arguments.get("kubeconfig"), arguments.get("context"), in_cluster=arguments.get("in_cluster"))
    with pytest.raises(AccessError, match=expected):
        await load(False)


async def test_secrets_show_in_no_text(tmp_path):
    stream = io.StringIO()
    log.configure("DEBUG", stream)
    access = Access("http://127.0.0.1:1", "Bearer " + SECRET, proxy=f"http://me:{SECRET}@127.0.0.1:1")
    assert SECRET not in repr(access)

    async def load(anew: bool) -> Access:
        raise AccessError("the file is gone")

    clock = FakeClock()
    credentials = Credentials(access, load, clock)
    await clock.advance(100)
    async with KubeApi(credentials, http.session()) as api:
        with pytest.raises(errors.Unreachable) as raised:
            await api.get(REF)
    assert SECRET not in str(raised.value)
    assert "the file is gone" in stream.getvalue()
    assert SECRET not in stream.getvalue()


async def test_a_proxy_that_refuses_shows_no_password(tmp_path):
    ca, _ = authority(tmp_path)
    async with stand_in() as proxy:
        proxy.answers = [answer("", 407)]
        where = proxy.url.replace("http://", f"http://me:{SECRET}@")
        access = Access("https://api.invalid:6443", ca_file=str(ca.cert), proxy=where)

        async def load(anew: bool) -> Access:
            return access

        credentials = Credentials(access, load, FakeClock())
        async with KubeApi(credentials, http.session()) as api:
            with pytest.raises(errors.Unreachable) as raised:
                await api.get(REF)
    assert SECRET not in str(raised.value)
