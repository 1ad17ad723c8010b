"""Runs in: every process (types only). Owner: storage. Caller: cri.

Layers, images, container root file systems, and the few things that `cri` must not touch itself on
the host's file system (files of a pod, mount sources, users of an image).
"""

from __future__ import annotations

from . import Body, Empty, IdMapping, Request, request
from .checking import Finding, Findings, Known


class LayerBegun(Body):
    """`present`: the layer is there already, no descriptor comes. Else one descriptor comes with the
    reply: the write end of the pipe into the unpack child; the blob's bytes go there, then EOF."""

    present: bool
    size: int = 0


@request("storage.layer.begin", reply=LayerBegun, idempotent=True)
class LayerBegin(Request[LayerBegun]):
    """Start to unpack one layer into staging, in a sandboxed `unpack` child of its own.

    Layers are keyed by `chain_id` (OCI image-spec, "Layer ChainID"). Begun again for the same chain id, a
    staging of before is killed and thrown away. What was begun on a connection that closes without commit
    is thrown away too.
    """

    chain_id: str
    parent: str  # chain id of the layer below, "" for the lowest
    diff_id: str  # digest of the uncompressed tar, checked on commit
    blob_digest: str  # digest of the compressed bytes, checked on commit too
    blob_size: int
    media_type: str


class LayerCommitted(Body):
    size: int  # bytes on disk, unpacked
    entries: int


@request("storage.layer.commit", reply=LayerCommitted, idempotent=True)
class LayerCommit(Request[LayerCommitted]):
    """Wait for the unpack child, check diff id, digest and size, rename into place.

    The parent must be committed. DATA_LOSS on a wrong digest or size, INVALID_ARGUMENT on a hostile archive,
    RESOURCE_EXHAUSTED on a bomb or a full disk; nothing is left then. Committed again: the same answer.
    """

    chain_id: str


@request("storage.layer.abort", idempotent=True)
class LayerAbort(Request[Empty]):
    chain_id: str


class ImageRecord(Body):
    """One image. `id` is "sha256:..." of its config; `names` are full references with tag; `digests` are
    `repository@sha256:...` of its manifest (or index) as it was pulled."""

    id: str
    config: bytes  # the image's config JSON, verbatim
    manifest: bytes = b""
    manifest_media_type: str = ""
    names: list[str] = []
    digests: list[str] = []
    layers: list[str] = []  # chain ids, lowest first
    size: int = 0  # sum of unpacked layers, bytes
    pinned: bool = False
    created_at_ns: int = 0
    in_use: int = 0  # containers on it (answer only)


class ImageStored(Body):
    image: ImageRecord


@request("storage.image.put", reply=ImageStored, idempotent=True)
class ImagePut(Request[ImageStored]):
    """Record an image whose layers are all committed; its names and digests are taken away from others and
    merged with those it has."""

    image: ImageRecord


class ImageFound(Body):
    image: ImageRecord | None


@request("storage.image.get", reply=ImageFound, idempotent=True)
class ImageGet(Request[ImageFound]):
    """Find an image by id ("sha256:HEX", HEX, a unique prefix of 3 digits or more), full name or digest.

    `reference` is normalised by the caller; None if absent; INVALID_ARGUMENT if ambiguous."""

    reference: str


class ImagesListed(Body):
    images: list[ImageRecord]


@request("storage.image.list", reply=ImagesListed, idempotent=True)
class ImageList(Request[ImagesListed]):
    pass


@request("storage.image.remove", idempotent=True)
class ImageRemove(Request[Empty]):
    """CRI RemoveImage: by id all names go and the image with them; by name or digest that name goes, and the
    image when it was the last. FAILED_PRECONDITION while a container uses the image. Absent is success.
    Layers that nothing refers to are deleted in a child, after the answer is safe."""

    reference: str


class FsInfo(Body):
    mountpoint: str
    used_bytes: int  # by images
    used_inodes: int
    available_bytes: int = 0
    timestamp_ns: int = 0
    layers_bytes: int = 0  # by containers' writable layers, as they were last measured
    layers_inodes: int = 0
    capacity_bytes: int = 0  # of the whole file system
    inodes: int = 0
    inodes_free: int = 0
    device: str = ""  # what is mounted there, as /proc/mounts has it


@request("storage.fs.info", reply=FsInfo, idempotent=True)
class FsInfoGet(Request[FsInfo]):
    """What images and containers occupy, kept as sums, never walked per call."""


class LayerUsage(Body):
    """What a container's writable layer occupied on the disk at that time (wall clock)."""

    container_id: str
    used_bytes: int
    used_inodes: int
    timestamp_ns: int


class UsagesListed(Body):
    usages: list[LayerUsage]


@request("storage.usage.list", reply=UsagesListed, idempotent=True)
class UsageList(Request[UsagesListed]):
    """Every container's writable layer, as last measured; answered from memory.

    Asking has the layers measured, in the background and at a low rate, for as long as somebody asks.
    """


class PodFiles(Body):
    """Paths on the host, for bind mounts; "" where the pod has none."""

    directory: str
    shm: str
    resolv_conf: str
    hostname: str
    hosts: str


@request("storage.pod.setup", reply=PodFiles, idempotent=True)
class PodSetup(Request[PodFiles]):
    """Make `<run_root>/pods/<pod_id>/` with resolv.conf, hostname, hosts and a tmpfs for /dev/shm.

    `resolv_conf` None: a copy of the host's. `shm_bytes` 0: no tmpfs (host IPC: the host's /dev/shm is used).
    `owner_uid` and `owner_gid` own it all: the host's ids of the pod's root, if it has a user namespace.
    """

    pod_id: str
    hostname: str
    resolv_conf: bytes | None = None
    shm_bytes: int = 64 * 1024 * 1024
    owner_uid: int = 0
    owner_gid: int = 0


@request("storage.pod.teardown", idempotent=True)
class PodTeardown(Request[Empty]):
    pod_id: str


class MountSource(Body):
    """One host path that a container mounts: made (mkdir -p, 0755) if missing, resolved, looked at.

    With `image_id` it is an image volume instead: the image's layers are mounted read-only, and `sub_path`
    (relative, links resolved inside the image) is what is used of them.
    """

    path: str
    create: bool = True
    propagation: str = "private"  # CRI: private, host-to-container, bidirectional
    image_id: str = ""
    sub_path: str = ""
    relabel: str = ""  # SELinux label for everything below the path, "" leaves it alone
    idmap: bool = False  # ids of its files are seen as the pod's user namespace maps them


class MountSourceInfo(Body):
    path: str  # real path, links resolved; of an id-mapped one, where its id-mapped mount stands
    is_directory: bool = True
    shared: bool = False  # the mount it lies on is a shared peer
    slave: bool = False
    locked_flags: list[str] = []  # nosuid, nodev, noexec, ro of the source's mount


class ContainerUser(Body):
    """What to resolve inside the image. At most one of uid/name is used, uid first; `image_user` is the
    image config's USER ("name", "uid", "uid:gid", "name:group"), taken when both are empty."""

    uid: int | None = None
    gid: int | None = None
    name: str = ""
    image_user: str = ""
    supplemental: list[int] = []
    strict: bool = False  # CRI SupplementalGroupsPolicy Strict: ignore the image's /etc/group


class DeviceInfo(Body):
    """One device node of the host. `requested` is the path as the request named it (or its own path, with
    `all_devices`); `suffix` is what follows when that was a directory ("/by-id/x"), else ""."""

    requested: str
    type: str  # "c" or "b"
    major: int
    minor: int
    suffix: str = ""
    mode: int = 0o660  # permission bits
    uid: int = 0
    gid: int = 0


class Hook(Body):
    """A hook of the OCI runtime-spec ("POSIX-platform Hooks")."""

    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: int | None = None  # seconds


class CdiNode(Body):
    """A device node that CDI adds; `permissions` are of the device cgroup, "" for none (a FIFO has none)."""

    path: str
    type: str
    major: int
    minor: int
    permissions: str
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None


class CdiMount(Body):
    """A mount that CDI adds, in the words of the runtime-spec."""

    destination: str
    source: str
    type: str
    options: list[str]


class CdiEdits(Body):
    """What CDI devices change of a container, all of them together, in the order of the request."""

    env: list[str] = []
    nodes: list[CdiNode] = []
    mounts: list[CdiMount] = []
    additional_gids: list[int] = []
    intel_rdt: dict[str, str | bool] = {}  # `linux.intelRdt` of the runtime-spec


class HookFacts(Body):
    """What the conditions of hook files (oci-hooks(5)) are held against."""

    command: str
    annotations: dict[str, str] = {}
    bind_mounts: bool = False


class ContainerRootfs(Body):
    rootfs: str  # mount point, <run_root>/containers/<id>/rootfs
    uid: int
    gid: int
    additional_gids: list[int]
    home: str = "/"
    user_name: str = ""
    mounts: list[MountSourceInfo] = []  # in the order of the request
    devices: list[DeviceInfo] = []
    seccomp_profile: bytes = b""  # content of the file that the request named
    cdi: CdiEdits | None = None
    hooks: dict[str, list[Hook]] = {}  # by stage; those of hook files that matched, then those of CDI
    apparmor_loaded: bool = False  # the profile that the request named is in the kernel


@request("storage.container.create", reply=ContainerRootfs, idempotent=True)
class ContainerCreate(Request[ContainerRootfs]):
    """Make the writable layer, mount the overlay, resolve user, mount sources and devices. All or nothing.

    `devices` are host paths (links followed, directories descended, INVALID_ARGUMENT for what is neither a
    device nor a directory); `all_devices` adds every node under /dev but terminals, shm and mqueue, for
    privileged containers. `seccomp_profile` is an absolute host path of a JSON file, at most 1 MiB.
    With mappings the container is in the user namespace that network pinned for the pod: its layers are
    mounted through them, and who is resolved is resolved in the container's ids.
    """

    container_id: str
    pod_id: str
    image_id: str
    user: ContainerUser
    mounts: list[MountSource] = []
    read_only: bool = False
    devices: list[str] = []
    all_devices: bool = False
    seccomp_profile: str = ""
    uid_mappings: list[IdMapping] = []
    gid_mappings: list[IdMapping] = []
    cdi_devices: list[str] = []
    hook_facts: HookFacts | None = None
    apparmor_profile: str = ""
    directories: list[str] = []


class IdmapSupport(Body):
    """Whether containers can have user namespaces; `why` says what is in the way."""

    supported: bool
    why: str = ""


class CdiResolved(Body):
    edits: CdiEdits
    hooks: dict[str, list[Hook]] = {}  # by stage


@request("storage.cdi.resolve", reply=CdiResolved, idempotent=True)
class CdiResolve(Request[CdiResolved]):
    """What CDI devices change of a container that a plugin adds them to; as in `storage.container.create`."""

    names: list[str]


@request("storage.idmap.probe", reply=IdmapSupport, idempotent=True)
class IdmapProbe(Request[IdmapSupport]):
    """Try, on the file system of the layers: a user namespace, an id-mapped mount, an overlay on it."""


@request("storage.container.remove", idempotent=True)
class ContainerRemove(Request[Empty]):
    """Unmount, delete the writable layer, drop the image reference. Absent is success."""

    container_id: str


@request("storage.container.unmount", idempotent=True)
class ContainerUnmount(Request[Empty]):
    """Unmount only: an exited container needs no overlay mount until it is removed."""

    container_id: str


class Inventory(Body):
    containers: list[str]
    pods: list[str]


@request("storage.inventory.list", reply=Inventory, idempotent=True)
class InventoryList(Request[Inventory]):
    """Every container and pod that storage still has something of; `cri` removes what it does not know."""


@request("storage.store.check", reply=Findings, idempotent=True)
class StoreCheck(Request[Findings]):
    """What is wrong with layers, images, root file systems, pods' files. Changes nothing.

    `deep`: the content of every file is read and compared, too.
    """

    known: Known
    deep: bool = False


@request("storage.store.mend", reply=Findings, idempotent=True)
class StoreMend(Request[Findings]):
    """Mend what a check has found, one after the other; what a container of `known.running` needs stays."""

    known: Known
    findings: list[Finding]
