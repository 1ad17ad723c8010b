"""Runs in: the virtual machine.

The machine as a node of Kubernetes: Bulkhead as a service of systemd with its usual directories, the bridge
plugin, a registry, and what a kubelet does about cgroups. The machine is thrown away afterwards, so nothing
here restores what it found; what Bulkhead leaves is looked for, for that is its business.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import grpc

from ipc.blocking import Client
from ipc.cri import api_pb2 as pb
from ipc.cri import api_pb2_grpc, rpc
from ipc.messages.supervisor import WorkerList, WorkerState
from tests.support.images import Served

CGROUPS = Path("/sys/fs/cgroup")
RUN_ROOT = Path("/run/bulkhead")
SERVICE = "bulkhead.service"
SHELL = ["/bin/sh", "-c"]
MIB = 1024 * 1024
T = TypeVar("T")

CONFLIST = {
    "cniVersion": "1.0.0",
    "name": "vm",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "bhbr0",
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.215.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}

UNIT = """[Unit]
Description=Bulkhead
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={bulkhead} serve
ExecReload=/bin/kill -HUP $MAINPID
Delegate={delegate}
KillMode=process
Restart=always
RestartSec=0
WatchdogSec=60
OOMScoreAdjust=-999
Environment=PYTHONDONTWRITEBYTECODE=1
"""


def run(*command: str, check: bool = True) -> str:
    """Run a program; return what it printed. Raises AssertionError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def wait_for(condition: Callable[[], T | None], what: str, seconds: float = 30.0) -> T:
    """Return the first true value of `condition`. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s\n{journal()}"
        time.sleep(0.1)  # every look costs the one CPU dearly
    return value


def journal(lines: int = 40) -> str:
    """The end of the service's log."""
    return run("journalctl", "-u", SERVICE, "-n", str(lines), "-o", "cat", "--no-pager", check=False)


def cgroup_of(pid: int) -> str:
    """The cgroup of a process."""
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")


def read(group: str, name: str) -> str:
    """Content of a file of a cgroup."""
    return (CGROUPS / group.lstrip("/") / name).read_text().strip()


class Node:
    """Bulkhead with one cgroup driver, and the pods that the cases run on it."""

    def __init__(self, driver: str, images: Served) -> None:
        self.driver = driver
        self.images = images
        self.socket = RUN_ROOT / "bulkhead.sock"
        self._numbers = count(1)
        self._channel = self.connect()

    def connect(self) -> grpc.Channel:
        """A connection of its own."""
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        return grpc.insecure_channel(f"unix:{self.socket}", options=options)

    @property
    def runtime(self) -> api_pb2_grpc.RuntimeServiceStub:
        """RuntimeService."""
        return rpc.runtime_client(self._channel)

    # -- the service ----------------------------------------------------------------------------------

    def install(self, *, delegate: bool = True, config: str = "") -> None:
        """Write configuration and unit."""
        files = {
            "/etc/bulkhead/bulkhead.toml": f'cgroup_manager = "{self.driver}"\n{config}',
            "/etc/containers/registries.conf": self.images.registries_conf,
            "/etc/cni/net.d/10-vm.conflist": json.dumps(CONFLIST),
            f"/etc/systemd/system/{SERVICE}": UNIT.format(
                bulkhead=Path(sys.executable).with_name("bulkhead"), delegate="yes" if delegate else "no"
            ),
        }
        for path, text in files.items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_text(text)
        run("systemctl", "daemon-reload")

    def start(self) -> None:
        """Start the service. With Type=notify this returns when READY has come."""
        run("systemctl", "start", SERVICE)
        self.pull()

    def pull(self) -> None:
        """Pull the image that containers run."""
        image = pb.ImageSpec(image=self.images.busybox)
        rpc.image_client(self._channel).PullImage(pb.PullImageRequest(image=image), timeout=120)

    def stop(self) -> None:
        """Remove every pod, stop the service."""
        self.remove_everything()
        run("systemctl", "stop", SERVICE)
        self._channel.close()

    def property(self, name: str) -> str:
        """A property of the service, as systemd sees it."""
        return run("systemctl", "show", "--value", "-p", name, SERVICE)

    def workers(self) -> list[WorkerState]:
        """Every process, as the supervisor tells it."""
        with Client(str(RUN_ROOT / "ipc/supervisor.sock"), timeout=20) as client:
            return client.call(WorkerList()).workers

    def wait_answering(self) -> None:
        """Wait until the CRI socket answers."""
        self.runtime.Version(pb.VersionRequest(), timeout=60, wait_for_ready=True)

    # -- what a kubelet does --------------------------------------------------------------------------

    def parent(self, qos: str = "burstable", spelling: str = "", **limits: str) -> tuple[str, str]:
        """Make a pod's cgroup as a kubelet with this driver does; return how it is named and where it is.

        `spelling` names it as the other driver would; `limits` are pids_max or memory_max.
        """
        name = f"pod{os.getpid()}_{next(self._numbers)}"
        slice_name = f"kubepods-{qos}-{name}.slice"
        path = f"/kubepods/{qos}/{name}"
        place = f"/kubepods.slice/kubepods-{qos}.slice/{slice_name}" if self.driver == "systemd" else path
        if self.driver == "systemd":
            settings = [f"{key.title().replace('_m', 'M').replace('_', '')}={v}" for key, v in limits.items()]
            for setting in settings:
                run("systemctl", "set-property", "--runtime", slice_name, setting.replace("Pids", "Tasks"))
            run("systemctl", "start", slice_name)
        else:
            make_group(place)
            for key, value in limits.items():
                (CGROUPS / place.lstrip("/") / key.replace("_", ".")).write_text(value)
        return (slice_name if (spelling or self.driver) == "systemd" else path), place

    def remove_parent(self, place: str) -> None:
        """Remove a pod's cgroup as the kubelet does; it must be empty by then, and ours to remove."""
        if self.driver == "systemd":
            run("systemctl", "stop", place.rsplit("/", 1)[1])
        else:
            wait_for(lambda: not children(place), f"{place} is empty")
            (CGROUPS / place.lstrip("/")).rmdir()

    def group(self, place: str, container_id: str) -> str:
        """Where a container's group must be."""
        suffix = ".scope" if self.driver == "systemd" else ""
        return f"{place}/bulkhead-{container_id}{suffix}"

    # -- pods and containers --------------------------------------------------------------------------

    def pod_config(self, parent: str = "", *, shared_pid: bool = False, **fields: Any) -> pb.PodSandboxConfig:
        """A pod's configuration."""
        name = f"pod-{next(self._numbers)}"
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, namespace="vm", uid=f"uid-{self.driver}-{name}"),
            log_directory=f"/var/log/pods/{self.driver}-{name}",
            **fields,
        )
        config.linux.cgroup_parent = parent
        options = config.linux.security_context.namespace_options
        options.pid = pb.NamespaceMode.POD if shared_pid else pb.NamespaceMode.CONTAINER
        return config

    def run_pod(self, config: pb.PodSandboxConfig, handler: str = "") -> str:
        """RunPodSandbox."""
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return self.runtime.RunPodSandbox(request, timeout=120).pod_sandbox_id

    def start_container(
        self,
        pod_id: str,
        sandbox: pb.PodSandboxConfig,
        command: list[str],
        resources: pb.LinuxContainerResources | None = None,
        **security: Any,
    ) -> str:
        """Create and start a container; `security` are fields of its security context."""
        name = f"c-{next(self._numbers)}"
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=self.images.busybox),
            command=command,
            log_path=f"{name}.log",
        )
        config.linux.security_context.MergeFrom(pb.LinuxContainerSecurityContext(**security))
        config.linux.security_context.namespace_options.CopyFrom(
            sandbox.linux.security_context.namespace_options
        )
        if resources is not None:
            config.linux.resources.CopyFrom(resources)
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=sandbox)
        container_id = self.runtime.CreateContainer(request, timeout=120).container_id
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container_id), timeout=120)
        return container_id

    def running(
        self,
        parent: str,
        command: list[str],
        resources: pb.LinuxContainerResources | None = None,
        *,
        handler: str = "",
        **fields: Any,
    ) -> tuple[str, str]:
        """A pod with one container that has been started."""
        sandbox = self.pod_config(parent, **fields)
        pod_id = self.run_pod(sandbox, handler)
        return pod_id, self.start_container(pod_id, sandbox, command, resources)

    def status(self, container_id: str) -> pb.ContainerStatus:
        """ContainerStatus."""
        request = pb.ContainerStatusRequest(container_id=container_id)
        return self.runtime.ContainerStatus(request, timeout=20).status

    def pid(self, container_id: str) -> int:
        """The pid of a container's first process."""
        request = pb.ContainerStatusRequest(container_id=container_id, verbose=True)
        info = json.loads(self.runtime.ContainerStatus(request, timeout=20).info["info"])
        return int(info["pid"])

    def ended(self, container_id: str, seconds: float = 60.0) -> pb.ContainerStatus:
        """Wait for a container's end; return its status."""
        exited = pb.ContainerState.CONTAINER_EXITED
        wait_for(lambda: self.status(container_id).state == exited, "the container ends", seconds)
        return self.status(container_id)

    def execute(self, container_id: str, *command: str) -> str:
        """ExecSync; return its output. Raises AssertionError if the command fails."""
        request = pb.ExecSyncRequest(container_id=container_id, cmd=command, timeout=60)
        answer = self.runtime.ExecSync(request, timeout=90)
        assert answer.exit_code == 0, answer.stderr
        return answer.stdout.decode()

    def stop_container(self, container_id: str, grace: int = 0) -> None:
        """StopContainer."""
        request = pb.StopContainerRequest(container_id=container_id, timeout=grace)
        self.runtime.StopContainer(request, timeout=120)

    def log(self, container_id: str) -> list[str]:
        """The messages of a container's log."""
        text = Path(self.status(container_id).log_path).read_text()
        return [line.split(" ", 3)[3] for line in text.splitlines()]

    def address(self, pod_id: str) -> str:
        """A pod's IP address."""
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
        return self.runtime.PodSandboxStatus(request, timeout=20).status.network.ip

    def remove_pod(self, pod_id: str) -> None:
        """Stop and remove a pod."""
        self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), timeout=120)
        self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id), timeout=120)

    def remove_everything(self) -> None:
        """Stop and remove every pod."""
        for pod in self.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=30).items:
            self.remove_pod(pod.id)

    # -- what is left ---------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """What pods and containers have left behind: groups, units, mounts, namespaces, links."""
        return [*left_groups(), *left_units(), *self._left_files(), *left_links()]

    def _left_files(self) -> Iterator[str]:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            target = line.split()[4]
            if target.startswith((f"{RUN_ROOT}/", "/var/lib/bulkhead/")):
                yield f"mount {target}"
        for name in ("ns", "monitors", "pods", "containers", "inits"):
            directory = RUN_ROOT / name
            for entry in os.listdir(directory) if directory.is_dir() else []:
                if not entry.startswith("."):
                    yield f"{name} {entry}"

    def settled_leftovers(self) -> list[str]:
        """What is left when nothing changes any more."""
        end = time.monotonic() + 10
        while (left := self.leftovers()) and time.monotonic() < end:
            time.sleep(0.2)
        return left


def make_group(path: str) -> None:
    """Make a cgroup and hand it every controller, as a kubelet does."""
    directory = CGROUPS
    for part in path.strip("/").split("/"):
        (directory / "cgroup.subtree_control").write_text("+cpu +io +memory +pids")
        directory = directory / part
        directory.mkdir(exist_ok=True)


def processes(group: str) -> list[int]:
    """The processes in a group; none if there is no such group."""
    try:
        return [int(pid) for pid in read(group, "cgroup.procs").split()]
    except OSError:  # ENODEV, if it went while it was read
        return []


def children(group: str) -> list[str]:
    """The groups below a group."""
    directory = CGROUPS / group.lstrip("/")
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir()) if directory.exists() else []


def left_groups() -> Iterator[str]:
    """Groups of containers and pod inits, wherever they are."""
    for path in CGROUPS.rglob("bulkhead-*"):
        if path.is_dir() and path.suffix != ".slice":
            yield f"cgroup {path}"


def left_units() -> Iterator[str]:
    """Units of containers that systemd still knows, failed ones among them."""
    for line in run("systemctl", "list-units", "--all", "--plain", "--no-legend", "bulkhead-*").splitlines():
        yield f"unit {line}"


def left_links() -> Iterator[str]:
    """Network links of pods."""
    for line in run("ip", "-o", "link").splitlines():
        name = line.split(": ")[1].split("@")[0]
        if name.startswith("veth"):
            yield f"link {name}"
