"""What a sandbox's config means: host name, resolv.conf, sysctls, ports, log paths, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from tests.support import spec_inputs as make
from workers.cri.spec import pod, request, validate

SandboxSecurity = api_pb2.LinuxSandboxSecurityContext
Options = api_pb2.NamespaceOption
HOST_NETWORK = SandboxSecurity(namespace_options=Options(network=api_pb2.NODE))


@pytest.mark.parametrize(
    ("options", "expected", "shares"),
    [
        (Options(), ["net", "uts", "ipc"], True),
        (Options(network=api_pb2.NODE), ["ipc"], True),
        (Options(ipc=api_pb2.NODE, pid=api_pb2.CONTAINER), ["net", "uts"], False),
        (Options(network=api_pb2.NODE, ipc=api_pb2.NODE, pid=api_pb2.NODE), [], False),
    ],
)
def test_namespaces_of_a_pod(options: Options, expected: list[str], shares: bool) -> None:
    config = make.sandbox(SandboxSecurity(namespace_options=options))
    assert pod.namespaces(config) == expected
    assert pod.shares_pid(config) is shares


def test_hostname_is_the_requests_or_short_id_or_the_nodes() -> None:
    assert pod.hostname(make.sandbox(hostname="web-1"), make.POD_ID, "node") == "web-1"
    assert pod.hostname(make.sandbox(), make.POD_ID, "node") == make.POD_ID[:12]
    assert pod.hostname(make.sandbox(HOST_NETWORK), make.POD_ID, "node") == "node"


@pytest.mark.parametrize("name", ["a b", "-a", "a\n", "x" * 65, "ü"])
def test_hostname_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RemoteError, match="hostname"):
        pod.hostname(make.sandbox(hostname=name), make.POD_ID, "node")


def test_resolv_conf_has_a_line_for_each_part() -> None:
    dns = api_pb2.DNSConfig(
        servers=["10.0.0.10", "fd00::1"], searches=["a.local", "b.local"], options=["ndots:5", "edns0"]
    )
    assert pod.resolv_conf(dns) == (
        b"search a.local b.local\nnameserver 10.0.0.10\nnameserver fd00::1\noptions ndots:5 edns0\n"
    )
    assert pod.resolv_conf(api_pb2.DNSConfig()) is None


@pytest.mark.parametrize("word", ["1.1.1.1\nnameserver 6.6.6.6", "", "a b", "a\0"])
@pytest.mark.parametrize("field", ["servers", "searches", "options"])
def test_resolv_conf_cannot_be_injected_into(field: str, word: str) -> None:
    lists: dict[str, Any] = {field: [word]}
    with pytest.raises(RemoteError, match="dns_config"):
        pod.resolv_conf(api_pb2.DNSConfig(**lists))


def test_sysctls_of_the_request_beat_the_nodes_and_only_those_of_the_pod_apply() -> None:
    defaults = {"net.ipv4.ping_group_range": "0 0", "kernel.shmmax": "1", "kernel.panic": "1"}
    config = make.sandbox(sysctls={"kernel/shmmax": "2", "net/ipv4/conf/eth0.1/rp_filter": "0"})
    assert pod.sysctls(config, defaults) == {
        "net.ipv4.ping_group_range": "0 0",
        "kernel.shmmax": "2",
        "net.ipv4.conf.eth0/1.rp_filter": "0",
    }
    on_node = make.sandbox(HOST_NETWORK)
    assert pod.sysctls(on_node, defaults) == {"kernel.shmmax": "1"}


@pytest.mark.parametrize(
    ("key", "value", "security"),
    [
        ("kernel.panic", "1", None),
        ("vm.swappiness", "1", None),
        ("kernel.hostname", "x", None),
        ("net.core.somaxconn", "1", HOST_NETWORK),
        ("kernel.shm_rmid_forced", "1", SandboxSecurity(namespace_options=Options(ipc=api_pb2.NODE))),
        ("net.core.somaxconn", "1+kernel.core_pattern=|/x\n", None),
        ("net.core.somaxconn", "", None),
        ("net.core..somaxconn", "1", None),
        ("../../etc/passwd", "1", None),
        ("net", "1", None),
    ],
)
def test_sysctl_of_the_node_or_of_odd_form_is_refused(key: str, value: str, security: Any) -> None:
    with pytest.raises(RemoteError, match="sysctls") as refused:
        pod.sysctls(make.sandbox(security, sysctls={key: value}), {})
    assert refused.value.code is Code.INVALID_ARGUMENT


def test_ports_without_a_host_port_are_not_mapped() -> None:
    ports = [
        api_pb2.PortMapping(container_port=80, host_port=8080, host_ip="127.0.0.1"),
        api_pb2.PortMapping(container_port=53, host_port=53, protocol=api_pb2.UDP),
        api_pb2.PortMapping(container_port=81),
    ]
    setup = pod.network_setup(make.POD_ID, make.sandbox(port_mappings=ports), default_sysctls={})
    found = [(p.protocol, p.container_port, p.host_port, p.host_ip) for p in setup.port_mappings]
    assert found == [("tcp", 80, 8080, "127.0.0.1"), ("udp", 53, 53, "")]


@pytest.mark.parametrize(
    "port",
    [
        api_pb2.PortMapping(container_port=0, host_port=80),
        api_pb2.PortMapping(container_port=80, host_port=65536),
        api_pb2.PortMapping(container_port=80, host_port=80, host_ip="localhost"),
    ],
)
def test_port_mapping_that_is_none_is_refused(port: api_pb2.PortMapping) -> None:
    with pytest.raises(RemoteError, match="port_mappings"):
        pod.network_setup(make.POD_ID, make.sandbox(port_mappings=[port]), default_sysctls={})


def test_requests_for_network_and_storage_carry_the_pod() -> None:
    config = make.sandbox(
        hostname="h",
        labels={"l": "1"},
        annotations={"a": "1"},
        dns_config=api_pb2.DNSConfig(servers=["10.0.0.1"]),
    )
    network = pod.network_setup(make.POD_ID, config, default_sysctls={})
    assert (network.name, network.namespace, network.uid) == ("pod", "ns", "u1")
    assert (network.hostname, network.labels, network.annotations) == ("h", {"l": "1"}, {"a": "1"})
    assert (network.dns_servers, network.cgroup_parent) == (["10.0.0.1"], "/pods/pod1")
    storage = pod.storage_setup(make.POD_ID, config, node_name="node")
    assert (storage.hostname, storage.resolv_conf) == ("h", b"nameserver 10.0.0.1\n")
    assert storage.shm_bytes == pod.SHM_BYTES


def test_pod_on_the_node_has_the_nodes_name_ports_and_memory() -> None:
    options = Options(network=api_pb2.NODE, ipc=api_pb2.NODE)
    ports = [api_pb2.PortMapping(container_port=80, host_port=80)]
    config = make.sandbox(SandboxSecurity(namespace_options=options), port_mappings=ports, hostname="x")
    network = pod.network_setup(make.POD_ID, config, default_sysctls={})
    assert (network.hostname, network.port_mappings, network.namespaces) == ("", [], [])
    storage = pod.storage_setup(make.POD_ID, config, node_name="node")
    assert (storage.hostname, storage.shm_bytes) == ("node", 0)


@pytest.mark.parametrize(
    ("directory", "path", "expected"),
    [
        ("/var/log/pods/x", "main/0.log", "/var/log/pods/x/main/0.log"),
        ("/var/log//pods/", "0.log", "/var/log/pods/0.log"),
        ("", "0.log", ""),
        ("/var/log", "", ""),
    ],
)
def test_log_path_is_below_the_log_directory(directory: str, path: str, expected: str) -> None:
    found = pod.container_log_path(make.container(log_path=path), make.sandbox(log_directory=directory))
    assert found == expected


@pytest.mark.parametrize("path", ["../x.log", "a/../../x", "/etc/passwd", "a/..", "a/", "a/.", "a\0"])
def test_log_path_that_leaves_its_directory_is_refused(path: str) -> None:
    with pytest.raises(RemoteError, match="log_path"):
        pod.container_log_path(make.container(log_path=path), make.sandbox(log_directory="/var/log"))


@pytest.mark.parametrize(
    "config",
    [
        make.sandbox(metadata=api_pb2.PodSandboxMetadata(namespace="n", uid="u")),
        make.sandbox(metadata=api_pb2.PodSandboxMetadata(name="a/b", namespace="n", uid="u")),
        make.sandbox(metadata=api_pb2.PodSandboxMetadata(name="..", namespace="n", uid="u")),
        make.sandbox(metadata=api_pb2.PodSandboxMetadata(name="a\n", namespace="n", uid="u")),
        make.sandbox(metadata=api_pb2.PodSandboxMetadata(name="x" * 2000, namespace="n", uid="u")),
        make.sandbox(log_directory="relative"),
        make.sandbox(log_directory="/a/../b"),
        make.sandbox(labels={"k": "v" * 4096}),
        make.sandbox(windows=api_pb2.WindowsPodSandboxConfig()),
        make.sandbox(SandboxSecurity(namespace_options=Options(network=api_pb2.CONTAINER))),
        make.sandbox(SandboxSecurity(namespace_options=Options(pid=api_pb2.TARGET, target_id="x"))),
        make.sandbox(SandboxSecurity(namespace_options=Options(ipc=api_pb2.TARGET))),
        make.sandbox(cgroup_parent="/kubepods/../.."),
        make.sandbox(cgroup_parent="/a\0"),
        make.sandbox(annotations={"k": "a\0b"}),
    ],
)
def test_odd_sandbox_is_refused(config: api_pb2.PodSandboxConfig) -> None:
    with pytest.raises(RemoteError) as refused:
        validate.pod(config)
    assert refused.value.code is Code.INVALID_ARGUMENT


def test_ordinary_sandbox_passes() -> None:
    validate.pod(make.sandbox(log_directory="/var/log/pods/a", labels={"k": "v" * 4095}))


Security = api_pb2.LinuxContainerSecurityContext


def newer(**fields: int) -> api_pb2.LinuxContainerSecurityContext:
    """Numbers that an open enum lets through although this release knows no name for them."""
    security = Security()
    for name, number in fields.items():
        part, _, leaf = name.rpartition("__")
        setattr(getattr(security, part) if part else security, leaf, number)
    return security


def image_mount(**fields: Any) -> api_pb2.Mount:
    return api_pb2.Mount(container_path="/v", readonly=True, image=api_pb2.ImageSpec(image="x"), **fields)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (make.container(metadata=api_pb2.ContainerMetadata()), Code.INVALID_ARGUMENT),
        (make.container(mounts=[api_pb2.Mount(image=api_pb2.ImageSpec(image="x"))]), Code.INVALID_ARGUMENT),
        (make.container(mounts=[image_mount(host_path="/a")]), Code.INVALID_ARGUMENT),
        (make.container(mounts=[image_mount(propagation=1)]), Code.INVALID_ARGUMENT),
        (make.container(mounts=[image_mount(image_sub_path="a/../../b")]), Code.INVALID_ARGUMENT),
        (make.container(mounts=[image_mount(image_sub_path="a\0b")]), Code.INVALID_ARGUMENT),
        (make.container(mounts=[api_pb2.Mount(image_sub_path="x")]), Code.INVALID_ARGUMENT),
        (make.container(windows=api_pb2.WindowsContainerConfig()), Code.INVALID_ARGUMENT),
        (make.container(Security(run_as_group=api_pb2.Int64Value(value=1))), Code.INVALID_ARGUMENT),
        (
            make.container(Security(run_as_user=api_pb2.Int64Value(), run_as_username="x")),
            Code.INVALID_ARGUMENT,
        ),
        (make.container(Security(run_as_user=api_pb2.Int64Value(value=-1))), Code.INVALID_ARGUMENT),
        (make.container(Security(run_as_user=api_pb2.Int64Value(value=2**32 - 1))), Code.INVALID_ARGUMENT),
        (make.container(Security(supplemental_groups=[-1])), Code.INVALID_ARGUMENT),
        (make.container(Security(privileged=True)), Code.INVALID_ARGUMENT),
        (make.container(Security(namespace_options=Options(pid=api_pb2.TARGET))), Code.INVALID_ARGUMENT),
        (make.container(Security(namespace_options=Options(target_id="x"))), Code.INVALID_ARGUMENT),
        (make.container(newer(seccomp__profile_type=9)), Code.INVALID_ARGUMENT),
        (make.container(newer(apparmor__profile_type=9)), Code.INVALID_ARGUMENT),
        (make.container(newer(supplemental_groups_policy=9)), Code.INVALID_ARGUMENT),
        (make.container(newer(namespace_options__pid=9)), Code.INVALID_ARGUMENT),
        (make.container(command=["a\0b"]), Code.INVALID_ARGUMENT),
        (make.container(labels={"k" * 4097: ""}), Code.INVALID_ARGUMENT),
    ],
)
def test_what_is_not_honoured_is_refused(config: api_pb2.ContainerConfig, code: Code) -> None:
    with pytest.raises(RemoteError) as refused:
        validate.container(config, make.sandbox())
    assert refused.value.code is code
    with pytest.raises(RemoteError):
        make.built(config)


def test_request_to_storage_carries_what_must_be_resolved() -> None:
    profile = api_pb2.SecurityProfile(profile_type="Localhost", localhost_ref="/profiles/a.json")
    security = Security(
        run_as_user=api_pb2.Int64Value(value=5),
        run_as_group=api_pb2.Int64Value(value=6),
        supplemental_groups=[7],
        supplemental_groups_policy=api_pb2.Strict,
        readonly_rootfs=True,
        seccomp=profile,
    )
    mounts = [
        api_pb2.Mount(container_path="/a", host_path="/x//y/"),
        api_pb2.Mount(container_path="/b", host_path="/z", propagation=api_pb2.PROPAGATION_BIDIRECTIONAL),
    ]
    config = make.container(security, mounts=mounts, devices=[api_pb2.Device(host_path="/dev/fuse")])
    made = request.container_create(
        container_id="c",
        pod_id="p",
        image_id="i",
        config=config,
        sandbox=make.sandbox(),
        image_config=make.image_config(User="web:web"),
    )
    assert (made.container_id, made.pod_id, made.image_id, made.read_only) == ("c", "p", "i", True)
    assert (made.user.uid, made.user.gid, made.user.image_user) == (5, 6, "web:web")
    assert (made.user.supplemental, made.user.strict) == ([7], True)
    assert [(m.path, m.propagation) for m in made.mounts] == [("/x/y", "private"), ("/z", "bidirectional")]
    assert (made.devices, made.all_devices, made.seccomp_profile) == (
        ["/dev/fuse"],
        False,
        "/profiles/a.json",
    )


def test_privileged_container_asks_for_every_device() -> None:
    made = request.container_create(
        container_id="c",
        pod_id="p",
        image_id="i",
        config=make.container(Security(privileged=True)),
        sandbox=make.privileged_sandbox(),
        image_config=make.image_config(),
    )
    assert made.all_devices


def test_user_of_the_request_may_be_root_by_number() -> None:
    user = request.container_user(Security(run_as_user=api_pb2.Int64Value(value=0)), image_of_nobody())
    assert (user.uid, user.image_user) == (0, "nobody")
    assert request.container_user(Security(), image_of_nobody()).uid is None


def image_of_nobody() -> Any:
    from workers.cri.spec import image

    return image.Execution(user="nobody")


def test_mount_without_a_source_is_refused() -> None:
    config = make.container(mounts=[api_pb2.Mount(container_path="/a")])
    with pytest.raises(RemoteError, match="host_path"):
        request.container_create(
            container_id="c",
            pod_id="p",
            image_id="i",
            config=config,
            sandbox=make.sandbox(),
            image_config=make.image_config(),
        )
