"""Runs in: cri. Checks of what a client sent, with a sentence for whoever wrote the pod.

Owns the table of what is refused because it is not honoured. Every check raises RemoteError and changes
nothing; callers run `pod` or `container` once, before anything is made.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError, invalid

from . import userns

MAX_LABEL_BYTES = 4096
MAX_NAME_BYTES = 1024
MAX_ID = 2**32 - 2  # the last uid and gid: 2**32-1 means "no change" to the kernel

#: A cpuset list, "0-3,8"; the kernel says the rest
_CPUSET = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*\Z")
_PAGE_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB)\Z")


@dataclass(frozen=True)
class Refusal:
    """A part of a request that Bulkhead does not honour: how to see it, and what to say."""

    field: str
    is_set: Callable[[api_pb2.ContainerConfig], bool]
    text: str
    reason: str = ""
    code: Code = Code.UNIMPLEMENTED


def _bad_sub_path(mount: api_pb2.Mount) -> bool:
    path = mount.image_sub_path
    return bool(path) and (not mount.HasField("image") or "\0" in path or ".." in path.split("/"))


#: What is refused of a container; the field names are the proto's.
REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "mounts.image",
        lambda c: any(m.HasField("image") and not m.readonly for m in c.mounts),
        "an image volume can only be mounted readonly",
        reason="ImageVolumeMountFailed",
        code=Code.INVALID_ARGUMENT,
    ),
    Refusal(
        "mounts.image",
        lambda c: any(m.HasField("image") and m.host_path for m in c.mounts),
        "a mount has either an image or a host_path",
        reason="ImageVolumeMountFailed",
        code=Code.INVALID_ARGUMENT,
    ),
    Refusal(
        "mounts.image",
        lambda c: any(m.HasField("image") and m.propagation for m in c.mounts),
        "an image volume has private propagation: nothing can be mounted in it",
        reason="ImageVolumeMountFailed",
        code=Code.INVALID_ARGUMENT,
    ),
    Refusal(
        "mounts.image_sub_path",
        lambda c: any(_bad_sub_path(m) for m in c.mounts),
        "it needs an image, and is a path inside it without '..'",
        reason="ImageVolumeMountFailed",
        code=Code.INVALID_ARGUMENT,
    ),
    Refusal(
        "windows",
        lambda c: c.HasField("windows"),
        "this is a Linux node: the windows part must not be set",
        code=Code.INVALID_ARGUMENT,
    ),
)


def container(config: api_pb2.ContainerConfig, sandbox: api_pb2.PodSandboxConfig) -> None:
    """Everything that can be said of a container's request without looking at the node."""
    name("container", config.metadata.name)
    labels(config.labels)
    for refusal in REFUSED:
        if refusal.is_set(config):
            raise RemoteError(refusal.code, f"{refusal.field}: {refusal.text}", reason=refusal.reason)
    _identity(config.linux.security_context)
    _profiles(config.linux.security_context)
    _privilege(config.linux.security_context, sandbox.linux.security_context)
    _modes(config.linux.security_context.namespace_options)
    userns.check_container(config, sandbox)
    texts("command and args", [*config.command, *config.args])
    texts("image", [config.image.image, config.image.user_specified_image])
    texts("annotations", [*config.annotations, *config.annotations.values()])


def pod(config: api_pb2.PodSandboxConfig) -> None:
    """Everything that can be said of a sandbox's request without looking at the node."""
    name("pod sandbox", config.metadata.name)
    name("pod sandbox's namespace", config.metadata.namespace)
    name("pod sandbox's uid", config.metadata.uid)
    labels(config.labels)
    if config.HasField("windows"):
        raise invalid("windows: this is a Linux node: the windows part must not be set")
    if config.log_directory:
        clean_path("log_directory", config.log_directory)
    _cgroup_parent(config.linux.cgroup_parent)
    texts("annotations", [*config.annotations, *config.annotations.values()])
    options = config.linux.security_context.namespace_options
    _modes(options)
    userns.of_pod(config)
    if options.pid == api_pb2.TARGET:
        raise invalid("namespace_options.pid TARGET is for containers, a pod sandbox has none to join")


def name(what: str, text: str) -> None:
    """A name that stands in paths, log lines and other names: one component, printable, not too long."""
    if not text:
        raise invalid(f"the {what} has no name")
    if text in {".", ".."} or "/" in text or not text.isprintable() or " " in text:
        raise invalid(f"{text!r} cannot be the name of a {what}: no slashes, blanks or control characters")
    if len(text.encode()) > MAX_NAME_BYTES:
        raise invalid(f"the name of the {what} is longer than {MAX_NAME_BYTES} bytes")


def labels(pairs: Mapping[str, str]) -> None:
    """Key and value together may have 4096 bytes."""
    for key, value in pairs.items():
        if len(key.encode()) + len(value.encode()) > MAX_LABEL_BYTES:
            raise invalid(f"label {key[:64]!r}: key and value are longer than {MAX_LABEL_BYTES} bytes")


def texts(what: str, values: Iterable[str]) -> None:
    """No NUL bytes: execve(2) and mount(2) would cut the text there."""
    for value in values:
        if "\0" in value:
            raise invalid(f"{what}: {value!r} contains a NUL byte")


def clean_path(what: str, path: str) -> str:
    """The absolute path without `.`, `//` and a trailing slash. `..` is refused: nobody means it well."""
    texts(what, [path])
    if not path.startswith("/"):
        raise invalid(f"{what}: {path!r} is not an absolute path")
    if ".." in path.split("/"):
        raise invalid(f"{what}: {path!r} contains '..'")
    return "/" + posixpath.normpath(path).lstrip("/")


def account_id(what: str, number: int) -> int:
    """A uid or gid the kernel can take."""
    if not 0 <= number <= MAX_ID:
        raise invalid(f"{what}: {number} is not between 0 and {MAX_ID}")
    return number


def not_negative(what: str, number: int) -> int:
    if number < 0:
        raise invalid(f"{what}: {number} is negative")
    return number


def cpuset(what: str, text: str) -> str:
    """A list in the format of cpuset(7)."""
    if text and not _CPUSET.match(text):
        raise invalid(f'{what}: {text!r} is not a list like "0-3,8"')
    return text


def page_size(text: str) -> str:
    """The OCI spelling of a huge page's size."""
    if not _PAGE_SIZE.match(text):
        raise invalid(f'hugepage_limits: {text!r} is not a page size like "2MB"')
    return text


def _identity(security: api_pb2.LinuxContainerSecurityContext) -> None:
    named = security.HasField("run_as_user") or bool(security.run_as_username)
    if security.HasField("run_as_group") and not named:
        raise invalid("run_as_group needs run_as_user or run_as_username")
    if security.HasField("run_as_user") and security.run_as_username:
        raise invalid("run_as_user and run_as_username exclude each other")
    if security.HasField("run_as_user"):
        account_id("run_as_user", security.run_as_user.value)
    if security.HasField("run_as_group"):
        account_id("run_as_group", security.run_as_group.value)
    for group in security.supplemental_groups:
        account_id("supplemental_groups", group)


def _privilege(
    container: api_pb2.LinuxContainerSecurityContext, sandbox: api_pb2.LinuxSandboxSecurityContext
) -> None:
    if container.privileged and not sandbox.privileged:
        raise invalid("a privileged container needs a pod sandbox that was made with privileged set")


def _cgroup_parent(text: str) -> None:
    """Slice or path; what spec.cgroups makes of it depends on the cgroup manager."""
    texts("cgroup_parent", [text])
    if ".." in text.split("/"):
        raise invalid(f"cgroup_parent: {text!r} contains '..'")


def _profiles(security: api_pb2.LinuxContainerSecurityContext) -> None:
    """A kind of profile or policy that is newer than this release must not be taken for another."""
    for what, profile in (("seccomp", security.seccomp), ("apparmor", security.apparmor)):
        if profile.profile_type not in api_pb2.SecurityProfile.ProfileType.values():
            raise invalid(f"{what}.profile_type: {profile.profile_type} is not known")
    policy = security.supplemental_groups_policy
    if policy not in api_pb2.SupplementalGroupsPolicy.values():
        raise invalid(f"supplemental_groups_policy: {policy} is not known")


def _modes(options: api_pb2.NamespaceOption) -> None:
    if options.network not in {api_pb2.POD, api_pb2.NODE}:
        raise invalid("namespace_options.network must be POD or NODE")
    if options.ipc not in {api_pb2.POD, api_pb2.CONTAINER, api_pb2.NODE}:
        raise invalid("namespace_options.ipc must be POD, CONTAINER or NODE")
    if options.pid not in api_pb2.NamespaceMode.values():
        raise invalid("namespace_options.pid must be POD, CONTAINER, NODE or TARGET")
    if options.pid == api_pb2.TARGET and not options.target_id:
        raise invalid("namespace_options.pid TARGET needs a target_id")
    if options.target_id and options.pid != api_pb2.TARGET:
        raise invalid("namespace_options.target_id is only for pid TARGET")
