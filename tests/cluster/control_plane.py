"""A real Kubernetes control plane for tests: etcd, kube-apiserver and kube-controller-manager, and more on demand.

    with running(folder) as plane:                     # the fixture `control_plane` does this once per session
        plane.kubectl("apply", "-f", "-", stdin=yaml)  # CompletedProcess; AssertionError on failure unless check=False
        plane.kubectl("get", "moed", user="person", check=False)
        plane.apply(object, object, namespace=name)
        plane.ask("GET", "/api/v1/nodes").json()       # one HTTP request as a user, without kubectl's start-up
        plane.url, plane.ca, plane.tokens["operator"], plane.kubeconfigs["operator"], plane.logs
        plane.install_crds(path, path)                 # and waits until objects of theirs may come and go
        plane.service_account("moestack-system", "moestack-operator")  # kubeconfig of a service account that exists
    eventually("what is waited for", lambda: …)        # polls; AssertionError with the last answer

Fixtures (conftest.py): `control_plane` (session), `namespace` (a fresh one, emptied afterwards), `kwok` (nodes with
GPUs, a scheduler, and pods that become Ready), `kuberay` (kwok and the real KubeRay), `fake_ray` (what KubeRay takes
for Ray: fake_ray.py), `moestack_crd`. Each returns the same plane with more in it.

Users: `admin` may do everything; `operator`, `tuner` and `person` may do what a test's RBAC grants them: nothing, at
first. RBAC, service accounts and built-in admission are on. Of the controllers those run that deletion,
Deployments, Services and disruption budgets need (CONTROLLERS). Nothing is a container and nothing has a network;
without `kwok`, pods stay Pending. Everything listens on 127.0.0.1, on free ports: several planes run side by side.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.cluster.component import Component, ComponentFailed, start, start_on_free_ports
from tests.cluster.credentials import Certificates, make_certificates, make_tokens, write_kubeconfig

ROOT = Path(__file__).parents[2]
ADMINS = ("system:masters",)
GROUPS_BY_USER: dict[str, tuple[str, ...]] = {
    "admin": ADMINS,
    "operator": (),
    "tuner": (),
    "person": (),
    "kube-controller-manager": ADMINS,
    "kube-scheduler": ADMINS,
    "kwok": ADMINS,
    "kuberay": ADMINS,
    "node": ADMINS,  # kubelet, kube-proxy and DNS, where a test has a real node
}
CONTROLLERS = (
    "garbage-collector-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "deployment-controller",
    "replicaset-controller",
    "job-controller",
    "endpoints-controller",
    "endpointslice-controller",
    "disruption-controller",
    "clusterrole-aggregation-controller",
    "persistentvolumeclaim-protection-controller",  # its finalizer is on every claim
)
WAIT_S = 30.0
APPLY = "application/apply-patch+yaml"


def binaries() -> Path:
    """The folder that tools/controlplane/build.py made (bin/, crds/, stages/). ComponentFailed names the remedy."""
    asked = subprocess.run(
        [sys.executable, ROOT / "tools" / "controlplane" / "build.py", "--where"],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode:
        raise ComponentFailed(asked.stderr.strip())
    return Path(asked.stdout.strip())


def eventually(what: str, found: Callable[[], Any], timeout_s: float = WAIT_S, poll_s: float = 0.1) -> Any:
    """The first true answer of `found`. Raises AssertionError with `what` and the last answer after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {what}; last answer: {answer!r}"
        time.sleep(poll_s)
    return answer


@dataclass
class ControlPlane:
    """A running control plane and the ways to speak to it."""

    folder: Path
    assets: Path
    certificates: Certificates
    tokens: dict[str, str]
    advertised: str | None = None  # the address of a real node, whose pods reach the API server there; else none can
    more_controllers: Sequence[str] = ()
    url: str = ""
    kubeconfigs: dict[str, Path] = field(default_factory=dict)
    components: dict[str, Component] = field(default_factory=dict)  # in the order of their start
    _http: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        self._http.trust_env = False  # a machine's own CA bundle or proxy is not for these servers
        self._http.verify = str(self.certificates.ca)

    @property
    def ca(self) -> Path:
        return self.certificates.ca

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def _kubectl_cache(self) -> Path:
        return self.folder / "kubectl-cache"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        user: str = "admin",
        content_type: str = "application/json",
        **parameters: str,
    ) -> requests.Response:
        """One request to the API server; `parameters` are its query (dryRun, fieldManager). Never raises for a status.

        An object goes as JSON, which is YAML too: `content_type=APPLY` applies it server-side. Text goes as it is.
        429 is asked again for a while, as kubectl does: the API server says it while it makes room for a CRD.
        """
        headers = {"Authorization": f"Bearer {self.tokens[user]}", "Content-Type": content_type}
        data = body if isinstance(body, str) or body is None else json.dumps(body)
        end = time.monotonic() + WAIT_S
        while True:
            answer = self._http.request(
                method, self.url + path, params=parameters, headers=headers, data=data, timeout=WAIT_S
            )
            if answer.status_code != 429 or time.monotonic() > end:
                return answer
            time.sleep(float(answer.headers.get("Retry-After", 1)))

    def kubectl(
        self, *arguments: str | Path, stdin: str | None = None, user: str = "admin", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """kubectl as `user`. With `check`, AssertionError with what it said when it failed."""
        done = subprocess.run(
            [
                self.assets / "bin" / "kubectl",
                "--kubeconfig",
                self.kubeconfigs[user],
                "--cache-dir",
                self._kubectl_cache,
                *arguments,
            ],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=2 * WAIT_S,
            check=False,
        )
        said = (
            f"kubectl {' '.join(map(str, arguments))}, as {user}: status {done.returncode}\n{done.stdout}{done.stderr}"
        )
        assert not check or done.returncode == 0, said
        return done

    def apply(self, *objects: dict[str, Any], namespace: str = "default", user: str = "admin") -> None:
        """`kubectl apply` of objects."""
        self.kubectl("apply", "-n", namespace, "-f", "-", stdin=yaml.safe_dump_all(objects), user=user)

    def install_crds(self, *files: Path) -> None:
        """Applies CRDs, from files named GROUP_PLURAL.yaml, and waits until objects of theirs may come and go."""
        definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        served: list[tuple[str, str]] = []  # where discovery lists it, its plural
        for path in files:
            group, plural = path.stem.split("_")
            name, text = f"{definitions}/{plural}.{group}", path.read_text()
            applied = self.ask("PATCH", name, text, content_type=APPLY, fieldManager="test", force="true")
            assert applied.ok, applied.text
            served += [(f"/apis/{group}/{one['name']}", plural) for one in applied.json()["spec"]["versions"]]

        def listed(where: str, plural: str) -> bool:
            found = self.ask("GET", where)
            return found.ok and plural in {one["name"] for one in found.json()["resources"]}

        for where, plural in served:
            eventually(f"{where} has {plural}", partial(listed, where, plural))
        # What looks for new kinds now and then would miss these for a while: kubectl asks every ten minutes, the
        # garbage collector every 30 s (until then nothing that they own goes away with them).
        shutil.rmtree(self._kubectl_cache, ignore_errors=True)
        self.stop_component("kube-controller-manager")
        self.start_controller_manager()

    def service_account(self, namespace: str, name: str) -> Path:
        """Kubeconfig of an existing service account, with a real token of its own."""
        user = f"system:serviceaccount:{namespace}:{name}"
        self.tokens[user] = self.kubectl("create", "token", name, "-n", namespace).stdout.strip()
        return self._kubeconfig(user, file_name=f"{namespace}.{name}")

    def _kubeconfig(self, user: str, file_name: str = "") -> Path:
        path = self.folder / f"{file_name or user}.kubeconfig"
        self.kubeconfigs[user] = write_kubeconfig(path, self.url, self.ca, self.tokens[user], user)
        return path

    # -- components

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _answers(self, url: str) -> bool:
        headers = {"Authorization": f"Bearer {self.tokens['admin']}"}
        try:
            return self._http.get(url, headers=headers, timeout=5).status_code == requests.codes.ok
        except requests.RequestException:
            return False

    def add(self, name: str, ports: int, command: Callable[[list[int]], list[str | Path]], ready: str) -> list[int]:
        """Starts a component on free ports unless it runs; `ready` is the URL that then answers, {} its first port."""

        def start_with(given: list[int]) -> Component:
            program, *arguments = command(given)
            answers = ready.format(given[0])
            path = self.assets / "bin" / program
            return start(name, [path, *arguments], self._log(name), lambda: self._answers(answers))

        component, given = start_on_free_ports(ports, start_with)
        self.components[name] = component
        return given

    def start_core(self) -> None:
        """etcd and kube-apiserver, then the controllers."""
        files = self.certificates

        def etcd(ports: list[int]) -> list[str | Path]:
            client, peer = (f"http://127.0.0.1:{port}" for port in ports)
            shutil.rmtree(self.folder / "etcd", ignore_errors=True)
            return [
                "etcd",
                f"--data-dir={self.folder / 'etcd'}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                "--logger=zap",
                "--log-level=warn",
                "--snapshot-count=10000",
                "--unsafe-no-fsync=true",  # nothing here must outlive a power cut
            ]

        etcd_port, _ = self.add("etcd", 2, etcd, "http://127.0.0.1:{}/health")

        def apiserver(ports: list[int]) -> list[str | Path]:
            return [
                "kube-apiserver",
                f"--etcd-servers=http://127.0.0.1:{etcd_port}",
                *self._addresses(),
                f"--secure-port={ports[0]}",
                f"--tls-cert-file={files.server}",
                f"--tls-private-key-file={files.server_key}",
                f"--token-auth-file={self.folder / 'tokens.csv'}",
                "--authorization-mode=RBAC",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-signing-key-file={files.service_accounts_key}",
                f"--service-account-key-file={files.service_accounts_key}",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--allow-privileged=true",
                # It marks new nodes as not ready, and the controller that takes the mark away wants real kubelets.
                "--disable-admission-plugins=TaintNodesByCondition",
                "--profiling=false",
            ]

        port, *_ = self.add("kube-apiserver", 1, apiserver, "https://127.0.0.1:{}/readyz")
        self.url = f"https://127.0.0.1:{port}"
        for user in GROUPS_BY_USER:
            self._kubeconfig(user)
        self.start_controller_manager()

    def _addresses(self) -> list[str]:
        """Flags that say where the API server listens, and where pods are told that it does."""
        if self.advertised is None:  # it refuses to tell of a loopback address
            return ["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none"]
        kubelets = "--kubelet-preferred-address-types=InternalIP"  # no DNS knows nodes by name
        return ["--bind-address=0.0.0.0", f"--advertise-address={self.advertised}", kubelets]

    def start_controller_manager(self) -> None:
        """kube-controller-manager with CONTROLLERS and `more_controllers`."""
        self.add(
            "kube-controller-manager",
            1,
            lambda ports: [
                "kube-controller-manager",
                *self._serving(ports[0], "kube-controller-manager"),
                f"--controllers={','.join([*CONTROLLERS, *self.more_controllers])}",
                f"--root-ca-file={self.certificates.ca}",
                "--use-service-account-credentials=false",
                "--kube-api-qps=200",
                "--kube-api-burst=400",
                "--profiling=false",
            ],
            "https://127.0.0.1:{}/healthz",
        )

    def start_scheduler(self) -> None:
        """kube-scheduler, for tests that let pods run."""
        if "kube-scheduler" not in self.components:
            self.add(
                "kube-scheduler",
                1,
                lambda ports: ["kube-scheduler", *self._serving(ports[0], "kube-scheduler"), "--profiling=false"],
                "https://127.0.0.1:{}/healthz",
            )

    def start_kwok(self) -> None:
        """kwok, which plays the kubelets: pods that are bound to a node become Ready, deleted ones go."""
        if "kwok" not in self.components:
            stages = [word for path in sorted((self.assets / "stages").glob("*.yaml")) for word in ("--config", path)]
            self.add(
                "kwok",
                1,
                lambda ports: [
                    "kwok",
                    f"--kubeconfig={self.kubeconfigs['kwok']}",
                    "--manage-all-nodes=true",
                    f"--server-address=127.0.0.1:{ports[0]}",
                    "--cidr=10.80.0.1/16",
                    *stages,
                ],
                "http://127.0.0.1:{}/healthz",
            )

    def _serving(self, port: int, user: str) -> list[str | Path]:
        """Flags that a Kubernetes component needs to run alone, and to say by HTTPS that it does."""
        return [
            f"--kubeconfig={self.kubeconfigs[user]}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--tls-cert-file={self.certificates.server}",
            f"--tls-private-key-file={self.certificates.server_key}",
            "--authorization-always-allow-paths=/healthz,/readyz,/livez,/metrics",
        ]

    def rss_bytes(self) -> dict[str, int]:
        """Resident memory of each component now."""
        return {name: component.rss_bytes() for name, component in self.components.items()}

    def stop_component(self, name: str) -> None:
        """Stops one component for good."""
        self.components.pop(name).stop()

    def stop(self) -> None:
        """Stops everything, the last started first; logs stay."""
        for name in reversed(list(self.components)):
            self.stop_component(name)
        self._http.close()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)


@contextlib.contextmanager
def running(
    folder: Path, *, advertised: str | None = None, more_controllers: Sequence[str] = ()
) -> Iterator[ControlPlane]:
    """A control plane of one's own in a new folder, stopped afterwards. It takes about 4 s."""
    (folder / "logs").mkdir(parents=True)
    plane = ControlPlane(
        folder=folder,
        assets=binaries(),
        certificates=make_certificates(folder),
        tokens=make_tokens(folder / "tokens.csv", GROUPS_BY_USER),
        advertised=advertised,
        more_controllers=more_controllers,
    )
    try:
        plane.start_core()
        yield plane
    finally:
        plane.stop()
