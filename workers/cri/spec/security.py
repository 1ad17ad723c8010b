"""Runs in: cri. AppArmor and SELinux of a container.

Owns the choice of profile and labels. Refuses a profile that was asked for by name where the node cannot
confine by it; what is merely the default of a node without AppArmor or SELinux is left out.
"""

from __future__ import annotations

from ipc.cri import api_pb2
from ipc.errors import invalid, precondition

from .inputs import SpecInputs
from .notes import Notes

_TYPE = api_pb2.SecurityProfile
_LOCALHOST_PREFIX = "localhost/"
_DEPRECATED = {"runtime/default": _TYPE.RuntimeDefault, "unconfined": _TYPE.Unconfined}


def apparmor(inputs: SpecInputs, notes: Notes) -> str:
    """Name of the profile, "" for none."""
    profile = _apparmor_request(inputs.config.linux.security_context)
    if profile is not None and profile.profile_type == _TYPE.Unconfined:
        return "unconfined" if inputs.host.apparmor else ""
    if profile is not None and profile.profile_type == _TYPE.Localhost:
        return _apparmor_named(profile.localhost_ref, inputs)
    if inputs.config.linux.security_context.privileged:
        return ""
    return _apparmor_default(inputs, notes, explicit=profile is not None)


def apparmor_wanted(context: api_pb2.LinuxContainerSecurityContext, default: str) -> str:
    """The profile that must be loaded for this container, "" for none: what storage is to look for."""
    profile = _apparmor_request(context) or _TYPE(profile_type=_TYPE.RuntimeDefault)
    if profile.profile_type == _TYPE.Localhost:
        return profile.localhost_ref.removeprefix(_LOCALHOST_PREFIX)
    unconfined = profile.profile_type == _TYPE.Unconfined
    return "" if unconfined or context.privileged else default


def _apparmor_request(context: api_pb2.LinuxContainerSecurityContext) -> api_pb2.SecurityProfile | None:
    """The profile asked for, in the new field or the deprecated one; None if neither is set."""
    if context.HasField("apparmor"):
        return context.apparmor
    text = context.apparmor_profile
    if not text:
        return None
    if text in _DEPRECATED:
        return _TYPE(profile_type=_DEPRECATED[text])
    if text.startswith(_LOCALHOST_PREFIX):
        return _TYPE(profile_type=_TYPE.Localhost, localhost_ref=text)
    raise invalid(f"apparmor_profile: {text!r} is not runtime/default, unconfined or localhost/NAME")


def _apparmor_named(reference: str, inputs: SpecInputs) -> str:
    name = reference.removeprefix(_LOCALHOST_PREFIX)
    if not name or not name.isprintable():
        raise invalid(f"apparmor: {reference!r} is not the name of a profile")
    if not inputs.host.apparmor:
        raise precondition(f"apparmor: profile {name!r} cannot be used, this node has no AppArmor")
    if not inputs.rootfs.apparmor_loaded:
        raise precondition(f"apparmor: profile {name!r} is not loaded on this node")
    return name


def _apparmor_default(inputs: SpecInputs, notes: Notes, *, explicit: bool) -> str:
    if not inputs.host.apparmor:
        return ""
    if inputs.rootfs.apparmor_loaded:
        return inputs.apparmor_default
    if explicit:
        raise precondition("apparmor: RuntimeDefault cannot be used, its profile is not loaded on this node")
    notes.add("no AppArmor profile: the default one is not loaded on this node")
    return ""


def process_label(inputs: SpecInputs, notes: Notes) -> str:
    """The SELinux label of the process, "" for none."""
    options = _options(inputs, notes)
    if options is None:
        return ""
    default_type = "spc_t" if inputs.config.linux.security_context.privileged else "container_t"
    parts = (options.user or "system_u", options.role or "system_r", options.type or default_type)
    return ":".join((*parts, options.level or "s0"))


def mount_label(inputs: SpecInputs, notes: Notes) -> str:
    """The SELinux label of what the runtime mounts, "" for none."""
    return volume_label(inputs.config, inputs.sandbox) if _options(inputs, notes) else ""


def volume_label(config: api_pb2.ContainerConfig, sandbox: api_pb2.PodSandboxConfig) -> str:
    """The label that files need for the container to touch them, "" where nothing is asked for."""
    options = _requested(config, sandbox)
    return f"system_u:object_r:container_file_t:{options.level or 's0'}" if options else ""


def _options(inputs: SpecInputs, notes: Notes) -> api_pb2.SELinuxOption | None:
    """What is asked for; None also where there is no SELinux."""
    options = _requested(inputs.config, inputs.sandbox)
    if options is not None and not inputs.host.selinux:
        notes.add("selinux_options have no effect: this node has no SELinux")
        return None
    return options


def _requested(
    config: api_pb2.ContainerConfig, sandbox: api_pb2.PodSandboxConfig
) -> api_pb2.SELinuxOption | None:
    """The container's options, else the sandbox's, None where there are none."""
    own, pod = config.linux.security_context, sandbox.linux.security_context
    options = own.selinux_options if own.HasField("selinux_options") else pod.selinux_options
    parts = (options.user, options.role, options.type, options.level)
    if not any(parts):
        return None
    if any(":" in part for part in parts[:3]) or not all(part.isprintable() for part in parts):
        raise invalid(f"selinux_options: {':'.join(parts)!r} is not a label")
    return options
