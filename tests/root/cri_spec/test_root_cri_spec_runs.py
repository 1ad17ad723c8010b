"""Specs that the builder makes run under crun and runc, and hold inside what the request said."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import os
import re
import select
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipc import capabilities as host_capabilities
from ipc.cri import api_pb2
from ipc.messages.storage import PodFiles
from tests.support import spec_inputs as make
from tests.support.leaks import Leaks, Scope
from tests.support.oci_runtime import RUNTIMES, Bundle, Outcome, bundle, busybox_rootfs, pod_namespaces
from workers.cri.spec import SpecInputs, build, exec_process
from workers.cri.spec.capabilities import DEFAULT

Security = api_pb2.LinuxContainerSecurityContext
RUNTIME_DEFAULT = api_pb2.SecurityProfile(profile_type=api_pb2.SecurityProfile.RuntimeDefault)


@dataclasses.dataclass
class Stage:
    """One pod and one bundle on this machine."""

    runtime: str
    directory: Path
    rootfs: Path
    namespaces: dict[str, str]
    cgroup_parent: str
    bundle: Bundle

    def inputs(self, config: api_pb2.ContainerConfig, **changes: Any) -> SpecInputs:
        fields: dict[str, Any] = {
            "container_id": self.bundle.container_id,
            "rootfs": make.rootfs(rootfs=str(self.rootfs)),
            "namespaces": self.namespaces,
            "pod_files": self.pod_files(),
            "sandbox": make.sandbox(cgroup_parent=self.cgroup_parent),
            "host": this_host(),
            "runtime": make.runtime(name=self.runtime),
            "machine": os.uname().machine,
        }
        return make.inputs(config, **(fields | changes))

    def pod_files(self) -> PodFiles:
        files = {name: self.directory / "pod" / name for name in ("resolv.conf", "hostname", "hosts")}
        shm = self.directory / "pod/shm"
        shm.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            path.write_text(f"this is {name}\n")
        return PodFiles(
            directory=str(self.directory / "pod"),
            shm=str(shm),
            resolv_conf=str(files["resolv.conf"]),
            hostname=str(files["hostname"]),
            hosts=str(files["hosts"]),
        )

    def run(self, *command: str, security: Security | None = None, **changes: Any) -> Outcome:
        """Run a command to its end; keywords are those of `make.container` or fields of SpecInputs."""
        fields = {
            key: changes.pop(key) for key in ("resources", "mounts", "devices", "tty") if key in changes
        }
        config = make.container(security, command=list(command), **fields)
        return self.bundle.run(build(self.inputs(config, **changes)).spec)

    def shell(self, script: str, **changes: Any) -> str:
        """Output of a script that must succeed."""
        done = self.run("/bin/sh", "-c", script, **changes)
        assert done.code == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


def this_host() -> Any:
    return make.host(
        cgroup_version=1,
        cgroup_controllers=["cpu", "cpuset", "memory", "pids"],
        capabilities=[f"CAP_{name}" for name in host_capabilities.effective()],
        oom_score_floor=int(Path("/proc/self/oom_score_adj").read_text()),
        swap=False,
        kernel=os.uname().release,
    )


@pytest.fixture(params=RUNTIMES)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    parent = f"/bh-spec-{uuid.uuid4().hex[:12]}"
    scope = Scope(mounts_under=(tmp_path,), cgroup_parents=(parent,), children_of=(os.getpid(),))
    with Leaks(scope), contextlib.ExitStack() as stack:
        stack.callback(remove_cgroups, parent)
        namespaces = stack.enter_context(pod_namespaces())
        made = stack.enter_context(bundle(request.param, tmp_path / "bundle"))
        rootfs = busybox_rootfs(tmp_path / "rootfs")
        yield Stage(request.param, tmp_path, rootfs, namespaces, parent, made)


def remove_cgroups(parent: str) -> None:
    """The pod's cgroup is the kubelet's: a runtime removes the container's and leaves this one."""
    for path in Path("/sys/fs/cgroup").glob(f"*{parent}"):
        if path.parent.name == "unified":
            shutil.rmtree(path)  # no cgroup: see tests/support/machine.py
        else:
            path.rmdir()


def status(text: str, field: str) -> str:
    found = re.search(rf"^{field}:\s*(.*)$", text, re.MULTILINE)
    assert found, text
    return found.group(1).strip()


def capability_names(text: str, field: str) -> set[str]:
    return {f"CAP_{name}" for name in host_capabilities.from_mask(int(status(text, field), 16))}


def test_default_container_has_default_capabilities_and_the_default_filter(stage: Stage) -> None:
    text = stage.shell("cat /proc/self/status", security=Security(seccomp=RUNTIME_DEFAULT))
    for field in ("CapEff", "CapPrm", "CapBnd"):
        assert capability_names(text, field) == set(DEFAULT)
    assert capability_names(text, "CapInh") == capability_names(text, "CapAmb") == set()
    assert status(text, "Seccomp") == "2"
    assert status(text, "NoNewPrivs") == "0"


def test_default_container_is_in_the_namespaces_of_its_pod(stage: Stage) -> None:
    links = stage.shell("cd /proc/self/ns && for n in net ipc uts pid mnt; do ls -l $n; done")
    for path in stage.namespaces.values():
        assert os.readlink(path) in links
    assert os.readlink("/proc/self/ns/mnt") not in links


def test_files_of_the_pod_are_there(stage: Stage) -> None:
    text = stage.shell("cat /etc/resolv.conf /etc/hostname /etc/hosts; echo x > /dev/shm/shared")
    assert text == "this is resolv.conf\nthis is hostname\nthis is hosts\n"
    assert (stage.directory / "pod/shm/shared").read_text() == "x\n"


def test_environment_and_directory_reach_the_process(stage: Stage) -> None:
    config = make.container(
        command=["/bin/sh", "-c", 'echo "$A|$B|$PATH|$HOSTNAME|$HOME|$PWD"'],
        envs=[api_pb2.KeyValue(key="A", value="ünï\n$x".encode())],
        working_dir="/data",
    )
    done = stage.bundle.run(
        build(stage.inputs(config, image_config=make.image_config(Env=["A=1", "B=2"]))).spec
    )
    assert done.stdout.startswith("ünï\n$x|2|/usr/local/sbin:")
    assert done.stdout.endswith("|pod-host|/root|/data\n")


def test_working_directory_that_the_image_lacks_is_made(stage: Stage) -> None:
    config = make.container(command=["/bin/sh", "-c", "echo $PWD"], working_dir="/not/there/yet")
    assert stage.bundle.run(build(stage.inputs(config)).spec).stdout == "/not/there/yet\n"


def test_privileged_container_has_what_the_node_has(stage: Stage) -> None:
    text = stage.shell(
        "cat /proc/self/status; grep -E ' /sys | /sys/fs/cgroup ' /proc/self/mounts; mount -t tmpfs x /tmp",
        security=Security(privileged=True),
        sandbox=make.privileged_sandbox(cgroup_parent=stage.cgroup_parent),
        rootfs=make.rootfs(rootfs=str(stage.rootfs), devices=[make.device("/dev/kmsg", 1, 11)]),
    )
    assert capability_names(text, "CapEff") == {f"CAP_{name}" for name in host_capabilities.effective()}
    assert status(text, "Seccomp") == "0"
    assert re.search(r"^sysfs /sys sysfs rw,", text, re.MULTILINE)


def test_privileged_container_uses_devices_of_the_node(stage: Stage) -> None:
    stage.shell(
        "test -c /dev/kmsg && cat /dev/null > /dev/kmsg",
        security=Security(privileged=True),
        sandbox=make.privileged_sandbox(cgroup_parent=stage.cgroup_parent),
        rootfs=make.rootfs(rootfs=str(stage.rootfs), devices=[make.device("/dev/kmsg", 1, 11)]),
    )


def test_devices_are_given_with_their_permissions_only(stage: Stage) -> None:
    text = stage.shell(
        "cat /dev/null > /dev/mykmsg; echo w $?; busybox head -c 1 /dev/mykmsg; echo r $?",
        devices=[api_pb2.Device(host_path="/dev/kmsg", container_path="/dev/mykmsg", permissions="w")],
        rootfs=make.rootfs(rootfs=str(stage.rootfs), devices=[make.device("/dev/kmsg", 1, 11)]),
    )
    assert "w 0" in text
    assert "r 0" not in text


def test_read_only_root_refuses_writing(stage: Stage) -> None:
    done = stage.run("touch", "/tmp/x", security=Security(readonly_rootfs=True))
    assert done.code != 0
    assert "Read-only" in done.stderr
    assert not (stage.rootfs / "tmp/x").exists()


def test_added_and_dropped_capabilities_hold(stage: Stage) -> None:
    wanted = api_pb2.Capability(add_capabilities=["net_admin"], drop_capabilities=["ALL"])
    text = stage.shell("cat /proc/self/status", security=Security(capabilities=wanted))
    assert capability_names(text, "CapEff") == capability_names(text, "CapBnd") == {"CAP_NET_ADMIN"}


def test_ambient_capability_is_kept_by_an_ordinary_user(stage: Stage) -> None:
    wanted = api_pb2.Capability(drop_capabilities=["ALL"], add_ambient_capabilities=["NET_BIND_SERVICE"])
    user = make.rootfs(rootfs=str(stage.rootfs), uid=1000, gid=1000, additional_gids=[2000])
    text = stage.shell("cat /proc/self/status", security=Security(capabilities=wanted), rootfs=user)
    for field in ("CapAmb", "CapEff", "CapInh"):
        assert capability_names(text, field) == {"CAP_NET_BIND_SERVICE"}
    assert status(text, "Uid").split() == ["1000"] * 4
    assert status(text, "Groups").split() == ["1000", "2000"]


def test_no_new_privs_holds(stage: Stage) -> None:
    text = stage.shell("cat /proc/self/status", security=Security(no_new_privs=True))
    assert status(text, "NoNewPrivs") == "1"


def test_default_filter_refuses_mount_and_unshare_with_eperm(stage: Stage) -> None:
    done = stage.run(
        "/bin/sh",
        "-c",
        "mount -t tmpfs x /tmp; unshare -n true; unshare -U true",
        security=Security(seccomp=RUNTIME_DEFAULT),
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    assert all("permission denied" in line or "not permitted" in line for line in lines), done.stderr


PROBE = """
import ctypes, errno, os, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*map(ctypes.c_long, arguments))
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]
numbers = {"x86_64": (56, 435, 135, 250, 999), "aarch64": (220, 435, 92, 219, 999)}[os.uname().machine]
clone, clone3, personality, keyctl, newest = numbers
print("clone-newuser", call(clone, 0x10000000 | 17, 0, 0, 0, 0))
print("clone3", call(clone3, 0, 0))
print("personality-ask", call(personality, 0xFFFFFFFF))
print("personality-odd", call(personality, 0x0400000))
print("keyctl", call(keyctl, 0, -3, 0))
print("newest", call(newest))
try:
    socket.socket(40, socket.SOCK_STREAM)
    print("vsock ok")
except OSError as error:
    print("vsock", errno.errorcode[error.errno])
socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
thread = threading.Thread(target=print, args=("thread ok",))
thread.start()
thread.join()
pid = os.fork()
if not pid:
    os._exit(0)
print("fork", os.waitpid(pid, 0)[1])
"""


def python_mounts(stage: Stage) -> dict[str, Any]:
    """This machine's Python, seen read-only in the container."""
    paths = [path for path in ("/usr", "/lib", "/lib64") if Path(path).exists()]
    mounts = [api_pb2.Mount(container_path=path, host_path=path, readonly=True) for path in paths]
    sources = [make.source(path) for path in paths]
    return {"mounts": mounts, "rootfs": make.rootfs(rootfs=str(stage.rootfs), mounts=sources)}


def test_default_filter_answers_each_kind_of_call_as_its_table_says(stage: Stage) -> None:
    security = Security(seccomp=RUNTIME_DEFAULT)
    done = stage.run("/usr/bin/python3", "-IS", "-c", PROBE, security=security, **python_mounts(stage))
    answers = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert answers == {
        "clone-newuser": "EPERM",
        "clone3": "ENOSYS",
        "personality-ask": "ok",
        "personality-odd": "ENOSYS",
        "keyctl": "EPERM",
        "newest": "ENOSYS",
        "vsock": "EPERM",
        "thread": "ok",
        "fork": "0",
    }, done.stderr


def test_unconfined_container_has_no_filter(stage: Stage) -> None:
    unconfined = api_pb2.SecurityProfile(profile_type=api_pb2.SecurityProfile.Unconfined)
    for security in (Security(seccomp=unconfined), Security()):
        text = stage.shell("cat /proc/self/status", security=security)
        assert status(text, "Seccomp") == "0"


def test_profile_of_the_node_is_applied(stage: Stage) -> None:
    rules = [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
    content = msgspec.json.encode({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
    profile = api_pb2.SecurityProfile(
        profile_type=api_pb2.SecurityProfile.Localhost, localhost_ref="/profiles/a.json"
    )
    done = stage.run(
        "/bin/busybox",
        "mkdir",
        "/tmp/x",
        security=Security(seccomp=profile),
        rootfs=make.rootfs(rootfs=str(stage.rootfs), seccomp_profile=content),
    )
    assert "No space left" in done.stderr


def test_masked_and_read_only_paths_hold(stage: Stage) -> None:
    (stage.rootfs / "data/secret").write_text("secret")
    security = Security(masked_paths=["/data/secret", "/proc/kcore", "/nowhere"], readonly_paths=["/tmp"])
    text = stage.shell("cat /data/secret; cat /proc/kcore; touch /tmp/x 2>&1 || true", security=security)
    assert "secret" not in text
    assert "Read-only" in text


def test_paths_of_the_whole_node_are_hidden_by_default(stage: Stage) -> None:
    text = stage.shell("cat /proc/interrupts; (echo 1 > /proc/sys/kernel/printk) 2>/dev/null || echo refused")
    assert text == "refused\n"


def test_rlimits_hold(stage: Stage) -> None:
    limits = make.settings(default_ulimits=["nofile=100:200", "core=0"])
    text = stage.shell("cat /proc/self/limits", settings=limits)
    assert re.search(r"^Max open files\s+100\s+200\s", text, re.MULTILINE)
    assert re.search(r"^Max core file size\s+0\s+0\s", text, re.MULTILINE)


def test_oom_score_holds_and_never_goes_below_what_the_node_lets_us(stage: Stage) -> None:
    floor = this_host().oom_score_floor
    for wanted, found in ((500, 500), (floor - 1, floor)):
        resources = api_pb2.LinuxContainerResources(oom_score_adj=wanted)
        assert stage.shell("cat /proc/self/oom_score_adj", resources=resources) == f"{found}\n"


RESOURCES = api_pb2.LinuxContainerResources(
    cpu_period=50_000,
    cpu_quota=25_000,
    cpu_shares=256,
    memory_limit_in_bytes=64 * 1024 * 1024,
    cpuset_cpus="0",
    hugepage_limits=[api_pb2.HugepageLimit(page_size="2MB", limit=0)],
)
LIMITS = {
    "cpu/cpu.cfs_period_us": "50000",
    "cpu/cpu.cfs_quota_us": "25000",
    "cpu/cpu.shares": "256",
    "memory/memory.limit_in_bytes": str(64 * 1024 * 1024),
    "cpuset/cpuset.cpus": "0",
}


def test_limits_stand_in_the_cgroup_and_are_seen_inside(stage: Stage) -> None:
    config = make.container(command=["/bin/sleep", "60"], resources=RESOURCES)
    made = build(stage.inputs(config))
    assert made.cgroup_path == f"{stage.cgroup_parent}/bulkhead-{stage.bundle.container_id}"
    stage.bundle.create(made.spec)
    stage.bundle.start()
    for name, value in LIMITS.items():
        controller, file = name.split("/")
        outside = Path(f"/sys/fs/cgroup/{controller}{made.cgroup_path}/{file}").read_text().strip()
        inside = stage.bundle.exec(exec_process(made.spec, ["cat", f"/sys/fs/cgroup/{name}"]))
        assert (name, outside) == (name, value)
        assert inside.stdout.strip() == value, inside.stderr


def test_exec_has_the_rights_of_the_container(stage: Stage) -> None:
    security = Security(no_new_privs=True, seccomp=RUNTIME_DEFAULT)
    config = make.container(security, command=["/bin/sleep", "60"])
    made = build(stage.inputs(config))
    stage.bundle.create(made.spec)
    stage.bundle.start()
    text = stage.bundle.exec(exec_process(made.spec, ["cat", "/proc/self/status"])).stdout
    assert capability_names(text, "CapEff") == set(DEFAULT)
    assert (status(text, "Seccomp"), status(text, "NoNewPrivs")) == ("2", "1")


@contextlib.contextmanager
def shared_mount(path: Path) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=True)
    try:
        subprocess.run(["mount", "--make-shared", str(path)], check=True)
        yield path
    finally:
        subprocess.run(["umount", "--recursive", str(path)], check=True)


def propagated(stage: Stage, path: Path, propagation: Any) -> SpecInputs:
    mount = api_pb2.Mount(container_path="/data", host_path=str(path), propagation=propagation)
    security = Security(privileged=True)
    config = make.container(security, command=["/bin/sleep", "60"], mounts=[mount])
    found = make.rootfs(rootfs=str(stage.rootfs), mounts=[make.source(str(path), shared=True)])
    pod = make.privileged_sandbox(cgroup_parent=stage.cgroup_parent)
    return stage.inputs(config, rootfs=found, sandbox=pod)


@pytest.mark.parametrize(
    ("propagation", "comes_in", "goes_out"),
    [
        (api_pb2.PROPAGATION_PRIVATE, False, False),
        (api_pb2.PROPAGATION_HOST_TO_CONTAINER, True, False),
        (api_pb2.PROPAGATION_BIDIRECTIONAL, True, True),
    ],
)
def test_mounts_propagate_as_asked(stage: Stage, propagation: Any, comes_in: bool, goes_out: bool) -> None:
    with shared_mount(stage.directory / "shared") as path:
        (path / "from-host").mkdir()
        (path / "from-container").mkdir()
        made = build(propagated(stage, path, propagation))
        stage.bundle.create(made.spec)
        stage.bundle.start()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path / "from-host")], check=True)
        mount = ["mount", "-t", "tmpfs", "tmpfs", "/data/from-container"]
        assert stage.bundle.exec(exec_process(made.spec, mount)).code == 0
        inside = stage.bundle.exec(exec_process(made.spec, ["cat", "/proc/self/mountinfo"])).stdout
        assert (" /data/from-host " in inside) is comes_in
        assert (f" {path}/from-container " in Path("/proc/self/mountinfo").read_text()) is goes_out
        stage.bundle.delete()


def test_requested_mounts_are_made_in_order_of_depth_with_their_flags(stage: Stage) -> None:
    outer, inner = stage.directory / "outer", stage.directory / "inner"
    for path in (outer, inner):
        path.mkdir()
        (path / "name").write_text(path.name)
    (outer / "deep").mkdir()
    mounts = [
        api_pb2.Mount(container_path="/data/deep", host_path=str(inner), readonly=True),
        api_pb2.Mount(container_path="/data", host_path=str(outer), mount_options=["noexec", "nosuid"]),
        api_pb2.Mount(container_path="/etc/hosts", host_path=str(inner / "name")),
    ]
    sources = [make.source(str(inner)), make.source(str(outer)), make.source(str(inner / "name"))]
    text = stage.shell(
        "cat /data/name /data/deep/name /etc/hosts; touch /data/ok; touch /data/deep/x 2>/dev/null || echo; "
        "grep ' /data ' /proc/self/mounts",
        mounts=mounts,
        rootfs=make.rootfs(rootfs=str(stage.rootfs), mounts=sources),
    )
    first, flags = text.splitlines()
    assert first == "outerinnerinner"
    assert {"noexec", "nosuid", "rw"} <= set(flags.split()[3].split(","))
    assert (outer / "ok").exists()


def test_flags_of_the_source_survive_a_read_only_mount(stage: Stage) -> None:
    with shared_mount(stage.directory / "flags") as path:
        subprocess.run(["mount", "-o", "remount,bind,nosuid,nodev,noexec", str(path)], check=True)
        mount = api_pb2.Mount(container_path="/data", host_path=str(path), readonly=True)
        found = make.source(str(path), locked_flags=["nosuid", "nodev", "noexec"])
        text = stage.shell(
            "grep ' /data ' /proc/self/mounts",
            mounts=[mount],
            rootfs=make.rootfs(rootfs=str(stage.rootfs), mounts=[found]),
        )
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(text.split()[3].split(","))


def test_host_namespaces_are_the_hosts(stage: Stage) -> None:
    options = api_pb2.NamespaceOption(network=api_pb2.NODE, ipc=api_pb2.NODE, pid=api_pb2.NODE)
    pod = make.sandbox(
        api_pb2.LinuxSandboxSecurityContext(namespace_options=options), cgroup_parent=stage.cgroup_parent
    )
    security = Security(namespace_options=options)
    links = stage.shell(
        "cd /proc/self/ns && for n in net ipc uts pid; do ls -l $n; done",
        security=security,
        sandbox=pod,
        namespaces={},
    )
    for name in ("net", "ipc", "uts", "pid"):
        assert os.readlink(f"/proc/self/ns/{name}") in links


def test_own_pid_namespace_makes_the_process_the_first(stage: Stage) -> None:
    security = Security(namespace_options=api_pb2.NamespaceOption(pid=api_pb2.CONTAINER))
    assert stage.shell("echo $$", security=security) == "1\n"


def test_own_ipc_namespace_has_memory_of_its_own(stage: Stage) -> None:
    security = Security(namespace_options=api_pb2.NamespaceOption(ipc=api_pb2.CONTAINER))
    text = stage.shell("ls -l /proc/self/ns/ipc; echo x > /dev/shm/own; ls /dev/shm", security=security)
    assert os.readlink(stage.namespaces["ipc"]) not in text
    assert not (stage.directory / "pod/shm/own").exists()


def receive_terminal(listener: socket.socket) -> int:
    listener.settimeout(10)
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(10)
        room = socket.CMSG_LEN(4)
        _, ancillary, _, _ = connection.recvmsg(4096, room)
    return array.array("i", ancillary[0][2])[0]


def read_terminal(terminal: int) -> str:
    """Until the other side is closed, which reads as EIO."""
    collected = b""
    while select.select([terminal], [], [], 10)[0]:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        collected += piece
    return collected.decode()


def test_terminal_is_one_and_is_called_xterm(stage: Stage) -> None:
    config = make.container(command=["/bin/sh", "-c", "tty; echo $TERM"], tty=True)
    made = build(stage.inputs(config))
    with socket.socket(socket.AF_UNIX) as listener:
        path = stage.directory / "c.sock"
        listener.bind(str(path))
        listener.listen()
        stage.bundle.create(made.spec, "--console-socket", str(path))
        terminal = receive_terminal(listener)
        try:
            stage.bundle.start()
            text = read_terminal(terminal)
        finally:
            os.close(terminal)
    assert re.fullmatch(r"/dev/(pts/\d+|console)\r\nxterm\r\n", text), text
