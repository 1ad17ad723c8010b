"""User namespaces as CRI asks for them: what is refused, and what becomes of the spec and of the messages."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from ipc.messages import IdMapping
from tests.support import spec_inputs as make
from workers.cri.spec import pod, request, userns, validate

Options = api_pb2.NamespaceOption
Security = api_pb2.LinuxContainerSecurityContext
PINNED = make.PINNED | {"user": f"/run/bulkhead/ns/{make.POD_ID}/user"}
WANTED = IdMapping(container_id=0, host_id=100_000, length=65_536)


def mapping(host: int = 100_000, container: int = 0, length: int = 65_536) -> api_pb2.IDMapping:
    return api_pb2.IDMapping(host_id=host, container_id=container, length=length)


def options(
    uids: list[api_pb2.IDMapping] | None = None, mode: Any = api_pb2.POD, **fields: Any
) -> api_pb2.NamespaceOption:
    uids = [mapping()] if uids is None else uids
    asked = api_pb2.UserNamespace(mode=mode, uids=uids, gids=[mapping()] if uids else [])
    return Options(pid=api_pb2.CONTAINER, userns_options=asked, **fields)


def sandbox(asked: api_pb2.NamespaceOption | None = None, **fields: Any) -> api_pb2.PodSandboxConfig:
    security = api_pb2.LinuxSandboxSecurityContext(namespace_options=asked or options())
    return make.sandbox(security, **fields)


def refused(config: api_pb2.PodSandboxConfig) -> str:
    with pytest.raises(RemoteError) as caught:
        validate.pod(config)
    assert caught.value.code is Code.INVALID_ARGUMENT
    return caught.value.text


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (options([]), "exactly one"),
        (options([mapping(), mapping(500_000)]), "exactly one"),
        (options([mapping(container=1)]), "container_id must be 0"),
        (options([mapping(host=0)]), "no range"),
        (options([mapping(length=0)]), "no range"),
        (options([mapping(host=2**32 - 2, length=2)]), "no range"),
        (options(mode=api_pb2.CONTAINER), "POD or NODE"),
        (options(mode=api_pb2.TARGET), "POD or NODE"),
        (options(mode=api_pb2.NODE), "no mappings"),
        (options(ipc=api_pb2.NODE), "ipc NODE"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(asked: api_pb2.NamespaceOption, word: str) -> None:
    assert word in refused(sandbox(asked))


def test_the_hosts_pid_namespace_is_refused() -> None:
    asked = options()
    asked.pid = api_pb2.NODE
    assert "pid NODE" in refused(sandbox(asked))


def test_mode_node_and_nothing_asked_are_no_namespace() -> None:
    assert userns.mappings(options([], mode=api_pb2.NODE)) is None
    assert userns.mappings(Options()) is None
    assert "user" not in pod.namespaces(make.sandbox())


def test_network_and_storage_are_told() -> None:
    told = pod.network_setup("p", sandbox(), default_sysctls={})
    assert told.namespaces == ["net", "uts", "ipc", "user"]
    assert (told.uid_mappings, told.gid_mappings) == ([WANTED], [WANTED])
    files = pod.storage_setup("p", sandbox(), node_name="n")
    assert (files.owner_uid, files.owner_gid) == (100_000, 100_000)
    plain = pod.network_setup("p", make.sandbox(), default_sysctls={})
    assert (plain.uid_mappings, plain.gid_mappings) == ([], [])


@pytest.mark.parametrize(
    ("asked", "set_"),
    [("0 2147483647", "0\t65535"), ("0\t100", "0\t100"), ("1 0", "1\t0"), ("junk", "junk")],
)
def test_the_range_of_ping_groups_ends_with_the_namespaces_last(asked: str, set_: str) -> None:
    key = "net.ipv4.ping_group_range"
    assert pod.sysctls(sandbox(sysctls={key: asked}), {})[key] == set_
    assert pod.sysctls(sandbox(), {key: asked})[key] == set_
    assert pod.sysctls(make.sandbox(sysctls={key: asked}), {})[key] == asked


def spec(config: api_pb2.ContainerConfig | None = None, **changes: Any) -> dict[str, Any]:
    return make.spec(config, **({"sandbox": sandbox(), "namespaces": PINNED} | changes))


def test_the_spec_joins_the_pods_namespace_and_tells_its_mappings() -> None:
    linux = spec()["linux"]
    assert {"type": "user", "path": PINNED["user"]} in linux["namespaces"]
    wanted = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    assert (linux["uidMappings"], linux["gidMappings"]) == (wanted, wanted)
    assert "uidMappings" not in make.spec()["linux"]


def test_a_pod_without_the_pinned_namespace_is_refused() -> None:
    with pytest.raises(RemoteError) as caught:
        spec(namespaces=make.PINNED)
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_on_the_hosts_network_sysfs_is_the_hosts() -> None:
    found = spec(sandbox=sandbox(options(network=api_pb2.NODE)))["mounts"]
    (sys,) = [mount for mount in found if mount["destination"] == "/sys"]
    assert (sys["type"], sys["source"], "ro" in sys["options"]) == ("bind", "/sys", True)
    (sys,) = [mount for mount in spec()["mounts"] if mount["destination"] == "/sys"]
    assert sys["type"] == "sysfs"


def container_request(config: api_pb2.ContainerConfig, asked: api_pb2.PodSandboxConfig) -> Any:
    return request.container_create(
        container_id="c", pod_id="p", image_id="i", config=config, sandbox=asked,
        image_config=make.image_config(),
    )  # fmt: skip


def volume(uids: list[api_pb2.IDMapping], gids: list[api_pb2.IDMapping]) -> api_pb2.ContainerConfig:
    mount = api_pb2.Mount(container_path="/v", host_path="/v", uidMappings=uids, gidMappings=gids)
    return make.container(mounts=[mount])


def test_storage_maps_the_ids_of_those_mounts_that_ask_for_it() -> None:
    told = container_request(volume([mapping()], [mapping()]), sandbox())
    assert (told.mounts[0].idmap, told.uid_mappings) == (True, [WANTED])
    assert not container_request(volume([], []), sandbox()).mounts[0].idmap


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (volume([mapping()], [mapping()]), make.sandbox()),
        (volume([mapping()], []), sandbox()),
        (volume([mapping(500_000)], [mapping()]), sandbox()),
        (volume([mapping(), mapping()], [mapping()]), sandbox()),
        (make.container(Security(namespace_options=options([mapping(500_000)]))), sandbox()),
        (make.container(Security(namespace_options=options())), make.sandbox()),
        (make.container(Security(namespace_options=options([], mode=api_pb2.NODE))), sandbox()),
        (make.container(Security(namespace_options=Options(ipc=api_pb2.NODE))), sandbox()),
        (make.container(Security(namespace_options=Options(pid=api_pb2.NODE))), sandbox()),
    ],
)
def test_a_container_that_differs_from_its_pod_is_refused(
    config: api_pb2.ContainerConfig, asked: api_pb2.PodSandboxConfig
) -> None:
    with pytest.raises(RemoteError) as caught:
        container_request(config, asked)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_the_owner_of_the_streams_is_told_in_the_hosts_ids() -> None:
    assert userns.stdio_owner(make.sandbox(), 5, 6) == (5, 6)
    assert userns.stdio_owner(sandbox(), 5, 6) == (100_005, 100_006)
    with pytest.raises(RemoteError):
        userns.stdio_owner(sandbox(), 65_536, 0)
