"""A real Kubernetes node for tests: containerd, kubelet, kube-proxy and CoreDNS, and pods that run with addresses.

    with running(plane, folder) as node:          # the fixture `node` does this once per session
        node.load(image)                          # of tools/image_contents.py: there is no registry
        node.ctr("images", "ls")

It runs alone (tools/node/alone.py, which `make e2e` uses): in network, mount and process namespaces of its own, whose
end is the end of every interface, packet filter, mount and process that these make.

    addresses   NODE: the node, its DNS and the API server for pods; PODS and SERVICES: their networks
    network     the `ptp` plugin: each pod has a link of its own, so that all of its traffic passes kube-proxy's rules
    cgroups     all below one group of the folder's name, in version 1 or 2
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import requests
import yaml

from tests.cluster.component import Component, ComponentFailed, start
from tests.cluster.control_plane import ROOT, ControlPlane, eventually
from tools import image_contents
from tools.local_images import Image

NAME = "node"
NODE, PODS, SERVICES = "10.87.0.1", "10.88.0.0/16", "10.96.0.0/16"
CONTROLLERS = (
    "root-ca-certificate-publisher-controller",  # pods mount it beside their tokens
    "persistentvolume-binder-controller",
    "ttl-after-finished-controller",
    "horizontal-pod-autoscaler-controller",
)
"""What pods that run need beyond those of a control plane without nodes."""
PAUSE = "moestack.test/pause:1"
PLUGINS = Path("/usr/lib/cni")
SOCKET = Path("/run/containerd/containerd.sock")  # /run is the namespace's own
READY_S = 60.0


def alone() -> Path:
    """The folder of this namespace. AssertionError where there is none: the node would be the machine's own."""
    folder = os.environ.get("MOESTACK_ALONE")
    assert folder, "a node of a test runs in namespaces of its own: `make e2e`, or tools/node/alone.py before pytest"
    return Path(folder)


def binaries() -> Path:
    """The folder that tools/node/build.py made. ComponentFailed names the remedy."""
    script = ROOT / "tools" / "node" / "build.py"
    asked = subprocess.run([sys.executable, script, "--where"], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ComponentFailed(asked.stderr.strip())
    return Path(asked.stdout.strip()) / "bin"


@dataclass
class Node:
    """A running node and the ways to its parts."""

    plane: ControlPlane
    folder: Path
    programs: Path
    components: list[Component] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "config"

    def ctr(self, *arguments: str | Path) -> str:
        """containerd's client, in the namespace of Kubernetes. AssertionError with what it said when it failed."""
        done = subprocess.run(self._ctr(*arguments), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ctr {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _ctr(self, *arguments: str | Path) -> list[str | Path]:
        return [self.programs / "ctr", "--address", SOCKET, "--namespace", "k8s.io", *arguments]

    def load(self, image: Image) -> None:
        """Makes an image known to the kubelet. AssertionError with what containerd's client said."""
        words, pipe = self._ctr("images", "import", "--local", "-"), subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                image.write(process.stdin)
            said = process.stdout.read().decode()
        assert process.returncode == 0, f"{image.tag} was not imported:\n{said}"

    def _start(self, name: str, *command: str | Path, healthy: str | None = None) -> None:
        """Starts a part and waits until the URL answers; without one, until it takes connections."""
        with requests.Session() as http:
            http.trust_env = False

            def ready() -> bool:
                if healthy is None:
                    return SOCKET.is_socket() and self._containerd_answers()
                try:
                    return http.get(healthy, timeout=5).ok
                except requests.RequestException:
                    return False

            environment = {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}:/usr/sbin:/sbin"}
            log = self.folder / "logs" / f"{name}.log"
            words = [self.programs / command[0], *command[1:]]
            self.components.append(start(name, words, log, ready, READY_S, environment))

    def _containerd_answers(self) -> bool:
        return subprocess.run(self._ctr("version"), capture_output=True, check=False).returncode == 0

    def _file(self, name: str, content: str) -> Path:
        path = self.config / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    def start(self) -> None:
        """Everything, in order; at the end the node is Ready."""
        _network()
        self._start_containerd()
        self.load(image_contents.busybox())
        self._start_dns()
        self._start_kubelet()
        eventually("the node is ready", self._is_ready, READY_S)
        self._start_proxy()  # it wants the node's addresses

    def _start_containerd(self) -> None:
        network = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "ptp",
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(self.folder / "addresses"),
                        "ranges": [[{"subnet": PODS}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ],
        }
        self._file("net.d/10-pods.conflist", json.dumps(network))
        # A container's score may not fall below our own where we lack the right to lower it.
        config = f"""
version = 3
root = "{self.folder / "containerd"}"
state = "/run/containerd"
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{PLUGINS}"]
conf_dir = "{self.config / "net.d"}"
"""
        self._start("containerd", "containerd", "--config", self._file("containerd.toml", config))

    def _start_proxy(self) -> None:
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(self.plane.kubeconfigs["node"])},
            "clusterCIDR": PODS,
            "hostnameOverride": NAME,
            "conntrack": {"maxPerCore": 0, "min": 0},  # the machine's, not a namespace's to set
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "oomScoreAdj": 0,
        }
        path = self._file("proxy.yaml", yaml.safe_dump(config))
        self._start("kube-proxy", "kube-proxy", "--config", path, healthy="http://127.0.0.1:10249/healthz")

    def _start_dns(self) -> None:
        # Beyond the cluster there is nothing, which is said by a zone of its own: `template` comes before `kubernetes`.
        corefile = f"""cluster.local:53 in-addr.arpa:53 {{
    bind {NODE}
    errors
    health 127.0.0.1:8053
    kubernetes {{
        kubeconfig {self.plane.kubeconfigs["node"]}
        pods insecure
        ttl 2
    }}
}}
.:53 {{
    bind {NODE}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""
        path = self._file("Corefile", corefile)
        self._start("coredns", "coredns", "-conf", path, healthy="http://127.0.0.1:8053/health")

    def _start_kubelet(self) -> None:
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "cgroupRoot": f"/{self.folder.name}",
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            # Nobody but this namespace reaches it.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "clusterDNS": [NODE],
            "clusterDomain": "cluster.local",
            "resolvConf": "",
            "podLogsDir": str(self.folder / "logs" / "pods"),
            "volumePluginDir": str(self.folder / "volume-plugins"),
            "healthzBindAddress": "127.0.0.1",
            "oomScoreAdj": 0,
            "failSwapOn": False,
            # A disk that others fill is no reason to throw out pods or images that no registry has.
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "shutdownGracePeriod": "0s",
        }
        self._start(
            "kubelet",
            "kubelet",
            f"--config={self._file('kubelet.yaml', yaml.safe_dump(config))}",
            f"--kubeconfig={self.plane.kubeconfigs['node']}",
            f"--root-dir={self.folder / 'kubelet'}",
            f"--hostname-override={NAME}",
            f"--node-ip={NODE}",
            healthy="http://127.0.0.1:10248/healthz",
        )

    def _is_ready(self) -> bool:
        answer = self.plane.ask("GET", f"/api/v1/nodes/{NAME}")
        conditions = answer.json()["status"].get("conditions", []) if answer.ok else []
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def stop(self) -> None:
        """Stops the parts, the last started first. Containers end with the namespaces."""
        for component in reversed(self.components):
            component.stop()


def _network() -> None:
    """An address for the node, and a way to Services for processes that are no pods."""
    for words in (
        "link add node0 type bridge",
        f"addr add {NODE}/32 dev node0",
        "link set node0 up",
        f"route add {SERVICES} dev node0 src {NODE}",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


@contextlib.contextmanager
def running(plane: ControlPlane, folder: Path) -> Iterator[Node]:
    """A node that is Ready, on a control plane that advertises NODE."""
    (folder / "logs").mkdir(exist_ok=True)
    node = Node(plane, folder, binaries())
    try:
        node.start()
        yield node
    finally:
        node.stop()
