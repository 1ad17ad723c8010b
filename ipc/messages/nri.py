"""Runs in: every process (types only). Owner: nri. Caller: cri.

Pods and containers as plugins are told of them, and what plugins want changed. The language is that of the
OCI runtime-spec: `spec` is a config.json, `resources` what stands in its linux.resources. Plugins ask too,
but nri calls nobody: what they ask comes as progress reports of one standing call, `nri.session.open`.
"""

from __future__ import annotations

import msgspec

from . import Body, Empty, Request, request


class PodFacts(Body):
    """A pod sandbox."""

    id: str
    name: str
    uid: str
    namespace: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    runtime_handler: str = ""
    cgroup_parent: str = ""
    overhead: bytes = b""  # resources
    resources: bytes = b""
    namespaces: dict[str, str] = {}  # type, in the runtime-spec's words -> path
    ips: list[str] = []
    pid: int = 0


class ContainerFacts(Body):
    """A container."""

    id: str
    pod_id: str
    name: str
    state: str  # "created", "running", "exited", or "creating"
    spec: bytes
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    seccomp_profile: str = ""  # "runtime/default", "unconfined" or "localhost/NAME"
    cdi_devices: list[str] = []
    pid: int = 0
    created_at_ns: int = 0
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    image_name: str = ""
    image_digest: str = ""
    image_id: str = ""


class Update(Body):
    """What a plugin wants of a container that exists; parts of `resources` that are absent stay."""

    container_id: str
    resources: bytes
    ignore_failure: bool = False


class Eviction(Body):
    """A container that a plugin wants stopped."""

    container_id: str
    reason: str = ""


class Wishes(Body):
    """What plugins want besides, in their order."""

    updates: list[Update] = []
    evictions: list[Eviction] = []


class Ask(Body):
    """Something that cri is to do, told over the standing call.

    "synchronize": hold every operation back that plugins hear of, send the state (`nri.state.put`) and go on
    when that is answered. "update": grant `wishes` and say what failed (`nri.wishes.done`). "ready": the
    pre-installed plugins have joined, or failed to.
    """

    kind: str
    number: int = 0
    plugin: str = ""
    wishes: Wishes = msgspec.field(default_factory=Wishes)


@request("nri.session.open", idempotent=False, update=Ask)
class SessionOpen(Request[Empty]):
    """Stay open: the updates are what plugins ask. The answer comes when nobody is left to ask anything.

    A new session ends an older one, and has every plugin synchronized again.
    """


@request("nri.state.put", reply=Wishes, idempotent=False)
class StatePut(Request[Wishes]):
    """Answer of "synchronize", in pieces; `more` says that another one follows.

    The last piece is answered when the plugin has been synchronized or is disconnected, with what it wants.
    NOT_FOUND if nobody asked.
    """

    number: int
    pods: list[PodFacts] = []
    containers: list[ContainerFacts] = []
    more: bool = False


@request("nri.wishes.done", idempotent=True)
class WishesDone(Request[Empty]):
    """Answer of "update"."""

    number: int
    failed: list[str] = []  # ids of containers that could not be updated
    error: str = ""


@request("nri.pod.event", idempotent=False)
class PodEvent(Request[Empty]):
    """Tell plugins of a pod; `event` is the name of the interface's call.

    FAILED_PRECONDITION with a plugin's words if one refuses.
    """

    event: str
    pod: PodFacts
    overhead: bytes = b""  # of UpdatePodSandbox
    resources: bytes = b""


@request("nri.container.event", reply=Wishes, idempotent=False)
class ContainerEvent(Request[Wishes]):
    """Tell plugins of a container. The answer has what plugins want of others when this one stops."""

    event: str
    pod: PodFacts
    container: ContainerFacts


class Adjusted(Body):
    """A container's spec with what plugins changed."""

    spec: bytes
    cgroups_path: str = ""  # if it is another one, as the spec has it
    cdi_devices: list[str] = []  # to be injected besides
    wishes: Wishes = msgspec.field(default_factory=Wishes)
    degraded: list[str] = []  # what could not be granted here, a sentence each


@request("nri.container.create", reply=Adjusted, idempotent=False)
class ContainerCreate(Request[Adjusted]):
    """Have plugins adjust a container that is about to be made.

    FAILED_PRECONDITION if a plugin refuses, if two of them want different things, or if a validator objects.
    """

    pod: PodFacts
    container: ContainerFacts
    oci_version: str = "1.0.2"  # the newest that the runtime reads


class Updated(Body):
    """What is to be done of an update: `resources` is the whole of it, as asked or as plugins changed it."""

    resources: bytes
    wishes: Wishes = msgspec.field(default_factory=Wishes)


@request("nri.container.update", reply=Updated, idempotent=False)
class ContainerUpdate(Request[Updated]):
    """Have plugins change an update of a container's resources."""

    pod: PodFacts
    container: ContainerFacts
    resources: bytes
