"""Whatever a client or an image says: a spec that is JSON, or a RemoteError with a sentence."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from tests.support import spec_inputs as make
from workers.cri.spec import build, exec_process, pod, request, validate
from workers.cri.spec.inputs import SpecInputs
from workers.cri.spec.words import words

#: Texts that mean something somewhere, beside arbitrary ones.
_WORDS = st.sampled_from(
    words("""
        / /a /a/../b .. /dev /etc/hosts ALL NET_ADMIN CAP_KILL 0-3 2MB rwm a.slice localhost//p.json
        unconfined runtime/default noexec net.core.somaxconn 10.0.0.1 a=b
    """)
)
_TEXT = st.one_of(_WORDS, st.text(max_size=12))
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return message(field.message_type)
    if field.enum_type is not None:
        return st.one_of(st.sampled_from([each.number for each in field.enum_type.values]), st.just(999))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.one_of(st.binary(max_size=6), _TEXT.map(str.encode))
    if field.cpp_type in _RANGES:
        low, high = _RANGES[field.cpp_type]
        return st.one_of(st.integers(0, 3), st.integers(low, high), st.just(2**20))
    return st.booleans() if field.type == FieldDescriptor.TYPE_BOOL else _TEXT


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def content(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if is_map(field):
        return st.dictionaries(_TEXT, _TEXT, max_size=2)
    return st.lists(value(field), max_size=2) if field.is_repeated else value(field)


def message(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Messages with any of their fields set to anything."""
    fields = {field.name: content(field) for field in descriptor.fields}
    chosen = st.fixed_dictionaries({}, optional=fields)
    return chosen.map(lambda given_fields: GetMessageClass(descriptor)(**given_fields))


_MESSAGES = api_pb2.DESCRIPTOR.message_types_by_name
CONTAINERS = message(_MESSAGES["ContainerConfig"])
SANDBOXES = message(_MESSAGES["PodSandboxConfig"])
IMAGES = st.one_of(
    st.binary(max_size=20),
    st.fixed_dictionaries(
        {},
        optional={
            "User": _TEXT,
            "Env": st.none() | st.lists(_TEXT, max_size=3),
            "Entrypoint": st.none() | st.lists(_TEXT, max_size=2),
            "Cmd": st.lists(_TEXT, max_size=2) | _TEXT,
            "WorkingDir": _TEXT,
            "StopSignal": _TEXT,
        },
    ).map(lambda fields: msgspec.json.encode({"config": fields})),
)
HOSTS = st.builds(
    make.host,
    cgroup_version=st.sampled_from([1, 2]),
    cgroup_driver=st.sampled_from(["systemd", "cgroupfs"]),
    seccomp=st.booleans(),
    apparmor=st.booleans(),
    selinux=st.booleans(),
    swap=st.booleans(),
    capabilities=st.sampled_from([[], ["CAP_CHOWN"]]),
)


def named(config: api_pb2.ContainerConfig) -> api_pb2.ContainerConfig:
    """With a name, so that more than the first check is reached, and without what is always refused."""
    config.metadata.name = "main"
    for field in ("CDI_devices", "windows"):
        config.ClearField(field)
    for mount in config.mounts:
        for field in ("image", "image_sub_path", "uidMappings", "gidMappings"):
            mount.ClearField(field)
    return config


def answered(config: api_pb2.ContainerConfig, **changes: Any) -> SpecInputs:
    """With an answer of storage that fits the request."""
    sources = [make.source(mount.host_path, shared=True) for mount in config.mounts]
    devices = [make.device(each.host_path, 1, 3) for each in config.devices]
    profile = b'{"defaultAction":"SCMP_ACT_ALLOW"}'
    found = make.rootfs(mounts=sources, devices=devices, seccomp_profile=profile)
    return make.inputs(config, rootfs=found, target_pid_namespace="/proc/1/ns/pid", **changes)


def check(inputs: SpecInputs) -> None:
    try:
        made = build(inputs)
    except RemoteError as error:
        assert error.code is not Code.INTERNAL, error
        assert error.text
        return
    spec = msgspec.json.decode(made.spec)
    assert spec["process"]["args"]
    assert "\\u0000" not in made.spec.decode()
    assert all(mount["destination"].startswith("/") for mount in spec["mounts"])
    assert msgspec.json.decode(exec_process(made.spec, ["true"]))["args"] == ["true"]


@settings(max_examples=150)
@given(config=CONTAINERS, sandbox=SANDBOXES, image=IMAGES, host=HOSTS)
def test_any_request_gives_a_spec_or_a_sentence(config: Any, sandbox: Any, image: bytes, host: Any) -> None:
    check(answered(config, sandbox=sandbox, image_config=image, host=host))


@settings(max_examples=300)
@given(config=CONTAINERS, host=HOSTS)
def test_any_named_request_gives_a_spec_or_a_sentence(config: Any, host: Any) -> None:
    check(answered(named(config), sandbox=make.privileged_sandbox(), host=host))


@settings(max_examples=150)
@given(config=SANDBOXES)
def test_any_sandbox_gives_requests_or_a_sentence(config: Any) -> None:
    for step in (
        lambda: validate.pod(config),
        lambda: pod.network_setup(make.POD_ID, config, default_sysctls={"net.core.somaxconn": "1"}),
        lambda: pod.storage_setup(make.POD_ID, config, node_name="node"),
        lambda: pod.container_log_path(make.container(log_path="a/b.log"), config),
    ):
        with contextlib.suppress(RemoteError):
            step()


@settings(max_examples=150)
@given(config=CONTAINERS, image=IMAGES)
def test_any_request_to_storage_is_made_or_refused(config: Any, image: bytes) -> None:
    with contextlib.suppress(RemoteError):
        request.container_create(
            container_id="c",
            pod_id="p",
            image_id="i",
            config=named(config),
            sandbox=make.privileged_sandbox(),
            image_config=image,
        )


@settings(max_examples=150)
@given(
    content=st.one_of(
        st.binary(max_size=40),
        st.recursive(
            st.none() | st.text(max_size=5) | st.integers(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["defaultAction", "syscalls", "names", "action", "args", "index", "includes"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=8,
        ).map(msgspec.json.encode),
    )
)
def test_any_profile_file_is_read_or_refused(content: bytes) -> None:
    security = api_pb2.LinuxContainerSecurityContext(
        seccomp=api_pb2.SecurityProfile(profile_type="Localhost", localhost_ref="/p.json")
    )
    with contextlib.suppress(RemoteError):
        build(make.inputs(make.container(security), rootfs=make.rootfs(seccomp_profile=content)))
