"""From a kubeconfig or a pod's service account to a client. The only module that imports the `kubernetes` package.

That package knows kubeconfig files (merging, contexts, exec plugins, OIDC, certificates inline) and the service account
of a pod; the calls themselves are ours (ADR 0013).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException, load_kube_config
from kubernetes.aio.config.incluster_config import (
    SERVICE_CERT_FILENAME,
    SERVICE_HOST_ENV_NAME,
    SERVICE_TOKEN_FILENAME,
    InClusterConfigLoader,
)

from moe_core import http
from moe_core.clock import Clock, SystemClock
from moe_core.log import redact
from moe_kube.access import Access, AccessError, Credentials, Load
from moe_kube.client import KubeApi, Observer

PLUGIN_TIMEOUT_S = 60.0
DEAD_PEER_S = 30


async def connect(
    kubeconfig: Path | None = None,
    context: str | None = None,
    *,
    in_cluster: bool | None = None,
    observers: tuple[Observer, ...] = (),
    timeout_s: float = 15.0,
    clock: Clock | None = None,
) -> KubeApi:
    """A client of the API server. Close it in the end.

    `kubeconfig` wins; then $KUBECONFIG; then, in a pod, its service account; then ~/.kube/config. `in_cluster` True or
    False settles it. Nothing is sent yet. Raises AccessError.
    """
    load = source(kubeconfig, context, in_cluster=in_cluster)
    time = clock or SystemClock()
    try:
        credentials = Credentials(await load(False), load, time)
    except OSError as error:  # ssl.SSLError is one
        raise AccessError(f"a certificate of the API server's access cannot be used: {error}") from None
    session = http.session(connect_s=5.0, read_s=None, dead_peer_s=DEAD_PEER_S)
    return KubeApi(credentials, session, observers=observers, timeout_s=timeout_s, clock=time)


def source(kubeconfig: Path | None, context: str | None, *, in_cluster: bool | None) -> Load:
    """Where the access comes from, by the order that `connect` describes."""
    named = str(kubeconfig) if kubeconfig is not None else os.environ.get("KUBECONFIG", "")
    if in_cluster is None:
        in_cluster = not named and context is None and bool(os.environ.get(SERVICE_HOST_ENV_NAME))
    if in_cluster:
        return service_account()
    return Kubeconfig(named or str(Path.home() / ".kube" / "config"), context).load


def service_account(token_file: str = SERVICE_TOKEN_FILENAME, ca_file: str = SERVICE_CERT_FILENAME) -> Load:
    """The access of the pod that this process runs in. Its token rotates: each load reads the file."""

    async def load(anew: bool) -> Access:
        configuration = Configuration()
        try:
            InClusterConfigLoader(token_filename=token_file, cert_filename=ca_file).load_and_set(configuration)
        except ConfigException as error:
            raise AccessError(f"service account of the pod: {error} (is automountServiceAccountToken on?)") from None
        return _access(configuration)

    return load


class Kubeconfig:
    """The access that a kubeconfig (or several, as $KUBECONFIG joins them) gives in one context."""

    def __init__(self, files: str, context: str | None) -> None:
        self._files = files
        self._context = context
        self._loader: Any = None
        self._configuration = Configuration()

    async def load(self, anew: bool) -> Access:
        """Read tokens again. Everything, exec plugin included, when `anew`."""
        if not _any_file(self._files):
            raise AccessError(f"no kubeconfig at {self._files}: give its path, or set KUBECONFIG")
        with _Heard() as heard:
            try:
                async with asyncio.timeout(PLUGIN_TIMEOUT_S):
                    await self._load(anew)
            except ConfigException as error:
                raise AccessError(f"kubeconfig {self._files}: {redact(str(error))}") from None
            except TimeoutError:
                raise AccessError(f"kubeconfig {self._files}: its credential plugin took over a minute") from None
            except yaml.YAMLError:
                # The parser's own message would quote the file, tokens included.
                raise AccessError(f"kubeconfig {self._files} is not YAML") from None
            except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                raise AccessError(f"kubeconfig {self._files} cannot be used ({type(error).__name__})") from None
        user = getattr(self._loader, "_user", None)
        configuration = self._configuration
        if user is not None and "exec" in user and not (configuration.api_key or configuration.cert_file):
            said = redact(heard.messages[-1])[:300] if heard.messages else "it printed no credentials"
            raise AccessError(f"kubeconfig {self._files}: the credential plugin of this context failed: {said}")
        return _access(configuration)

    async def _load(self, anew: bool) -> None:
        if self._loader is None or anew:
            self._configuration = Configuration()
            self._loader = await load_kube_config(
                config_file=self._files,
                context=self._context,
                client_configuration=self._configuration,
                persist_config=False,
            )
            return
        user = getattr(self._loader, "_user", None)
        if user is not None and "exec" in user and not hasattr(self._loader, "exec_plugin_expiry"):
            return  # A plugin that names no end of its credentials is asked again when they are refused.
        await self._loader.load_and_set(self._configuration)


def _any_file(paths: str) -> bool:
    return any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep) if path)


class _Heard:
    """Catches what the package logs, in place of its printing it: an exec plugin's stderr is part of it."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._logger = logging.getLogger("kubernetes.aio.config")
        self._handler = _Into(self.messages.append)

    def __enter__(self) -> _Heard:
        self._logger.propagate = False
        self._logger.addHandler(self._handler)
        return self

    def __exit__(self, *exc: object) -> None:
        self._logger.removeHandler(self._handler)


class _Into(logging.Handler):
    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record.getMessage())


def _access(configuration: Any) -> Access:
    scheme, _, secret = (configuration.api_key.get("BearerToken") or "").strip().partition(" ")
    return Access(
        host=configuration.host,
        authorization=f"{scheme.capitalize()} {secret.strip()}" if secret else "",
        ca_file=configuration.ssl_ca_cert,
        cert_file=configuration.cert_file,
        key_file=configuration.key_file,
        verify=configuration.verify_ssl,
        server_name=configuration.tls_server_name,
        proxy=configuration.proxy,
    )
