"""Runs in: image. Sans-IO.

What registries' documents say: OCI image manifests, indexes and configs (image-spec 1.1), Docker's schema 2
of the same. Everything is checked before it is believed. Refused with a sentence: schema 1, artifacts that
are no images, encrypted layers, a document that could be read as two things (CVE-2021-41190), a config
whose diff ids are not as many as the layers.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ipc.errors import Code, RemoteError, invalid
from ipc.messages.image import Layer
from ipc.reference import check_digest
from workers.image.platforms import Platform

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
SCHEMA1 = "application/vnd.docker.distribution.manifest.v1"

ACCEPT = ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST, "*/*;q=0.1"))
INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
#: Old clients pushed configs as octet streams.
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream"})
_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
LAYERS = frozenset(
    {
        *(kind + suffix for kind in (_OCI_LAYER, _OCI_FOREIGN) for suffix in ("", "+gzip", "+zstd")),
        *(_DOCKER_LAYER + suffix for suffix in ("", ".gzip", ".zstd")),
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    }
)

#: overlayfs stacks no more (OVL_MAX_STACK).
MAX_LAYERS = 500
MAX_BLOB = 1 << 50
MAX_URLS = 16
MAX_ENTRIES = 2000


class _Read(msgspec.Struct, rename="camel"):
    """Base of what is read from JSON; unknown members are others' extensions."""


class DescriptorPlatform(_Read):
    architecture: str = ""
    os: str = ""
    variant: str | None = None


class Descriptor(_Read):
    """image-spec, "Content Descriptors"."""

    digest: str
    size: int
    media_type: str = ""
    urls: list[str] | None = None
    artifact_type: str | None = None
    platform: DescriptorPlatform | None = None


class Index(_Read):
    manifests: list[Descriptor]


class Manifest(_Read):
    config: Descriptor
    layers: list[Descriptor]
    artifact_type: str | None = None


class RootFs(msgspec.Struct):
    type: str = ""
    diff_ids: list[str] = []


class Config(msgspec.Struct):
    """The part of an image's config that says how its layers stack."""

    rootfs: RootFs
    architecture: str = ""
    os: str = ""
    variant: str | None = None


_ABSENT = msgspec.Raw(b"")


class _Shape(_Read):
    """What tells one kind of document from another."""

    schema_version: int | None = None
    media_type: str | None = None
    manifests: msgspec.Raw = _ABSENT
    layers: msgspec.Raw = _ABSENT
    config: msgspec.Raw = _ABSENT
    fs_layers: msgspec.Raw = _ABSENT


class Kind(enum.Enum):
    MANIFEST = "manifest"
    INDEX = "index"


@dataclass(frozen=True)
class Document:
    """Bytes whose digest is known to be right, and what they are."""

    data: bytes
    digest: str
    kind: Kind
    media_type: str


T = TypeVar("T")


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """`algorithm:hex` of the bytes."""
    return f"{algorithm}:{hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()}"


def verify(data: bytes, digest: str, what: str) -> None:
    """Raises RemoteError(DATA_LOSS) if the bytes do not have the digest."""
    found = digest_of(data, digest.partition(":")[0])
    if found != digest:
        raise RemoteError(Code.DATA_LOSS, f"{what}: the digest is {found}, it should be {digest}")


def read_document(data: bytes, digest: str, content_type: str) -> Document:
    """Say what a manifest's bytes are. What the document says of itself goes before the HTTP header.

    Raises RemoteError(INVALID_ARGUMENT).
    """
    shape = _decode(_Shape, data, "the manifest")
    stated = shape.media_type or content_type.partition(";")[0].strip().lower()
    _refuse_schema1(shape, stated)
    kind = _kind(shape)
    expected = INDEXES if kind is Kind.INDEX else MANIFESTS
    if shape.media_type is not None and shape.media_type not in expected:
        raise invalid(f"the manifest calls itself {shape.media_type[:200]!r}, but it is an {kind.value}")
    if stated not in expected:
        stated = OCI_INDEX if kind is Kind.INDEX else OCI_MANIFEST
    return Document(data, digest, kind, stated)


def _refuse_schema1(shape: _Shape, stated: str) -> None:
    if shape.schema_version == 1 or _there(shape.fs_layers) or stated.startswith(SCHEMA1):
        raise invalid(
            "the image has a Docker schema 1 manifest, a format that is no longer supported: push it again"
        )
    if shape.schema_version != 2:
        raise invalid(f"the manifest's schemaVersion is {shape.schema_version}, not 2")


def _kind(shape: _Shape) -> Kind:
    index = _there(shape.manifests)
    manifest = _there(shape.layers) or _there(shape.config)
    if index and manifest:
        raise invalid("the manifest is ambiguous: it has members of an index and of an image manifest")
    if not index and not manifest:
        raise invalid("the document is neither an image manifest nor an index")
    return Kind.INDEX if index else Kind.MANIFEST


def _there(member: msgspec.Raw) -> bool:
    return bytes(member) not in {b"", b"null"}


def choose(document: Document, platform: Platform) -> Descriptor:
    """The index's manifest for a platform. Raises RemoteError: INVALID_ARGUMENT, NOT_FOUND if there is none.

    Of entries that serve equally well the first wins (image-spec, "Image Index"). An entry without a
    platform is taken when nothing better is there; its config will tell.
    """
    index = _decode(Index, document.data, "the index")
    if len(index.manifests) > MAX_ENTRIES:
        raise invalid(f"the index has {len(index.manifests)} manifests, more than {MAX_ENTRIES}")
    ranked = [(rank, entry) for entry in index.manifests if (rank := _rank(entry, platform)) is not None]
    if not ranked:
        raise RemoteError(
            Code.NOT_FOUND, f"there is no image for {platform}, only for {_offered(index.manifests)}"
        )
    best = min(ranked, key=lambda pair: pair[0])[1]
    _check_descriptor(best, "the index's entry")
    return best


_NO_PLATFORM_RANK = 1000


def _rank(entry: Descriptor, platform: Platform) -> int | None:
    if entry.artifact_type or (entry.media_type and entry.media_type not in INDEXES | MANIFESTS):
        return None
    made_for = entry.platform
    if made_for is None or not made_for.architecture:
        return _NO_PLATFORM_RANK
    return platform.rank(made_for.os, made_for.architecture, made_for.variant or "")


def _offered(entries: Sequence[Descriptor]) -> str:
    found = {
        str(Platform(p.os, p.architecture, p.variant or "")) for entry in entries if (p := entry.platform)
    }
    return ", ".join(sorted(found - {"unknown/unknown"}))[:500] or "none"


def read_manifest(document: Document) -> Manifest:
    """Decode and check an image manifest. Raises RemoteError(INVALID_ARGUMENT)."""
    manifest = _decode(Manifest, document.data, "the manifest")
    _check_descriptor(manifest.config, "the config")
    if manifest.config.media_type and manifest.config.media_type not in CONFIGS:
        kind = manifest.artifact_type or manifest.config.media_type
        raise invalid(f"it is an artifact ({kind[:200]}), not a container image")
    if len(manifest.layers) > MAX_LAYERS:
        raise invalid(f"the image has {len(manifest.layers)} layers, more than {MAX_LAYERS}")
    for number, layer in enumerate(manifest.layers, 1):
        _check_layer(layer, f"layer {number}")
    return manifest


def _check_layer(layer: Descriptor, what: str) -> None:
    _check_descriptor(layer, what)
    if layer.media_type.endswith("+encrypted"):
        raise invalid(f"{what} is encrypted, which is not supported")
    if layer.media_type not in LAYERS:
        raise invalid(
            f"{what} has the media type {layer.media_type[:200]!r}, which is no layer of a container image"
        )
    if len(layer.urls or ()) > MAX_URLS:
        raise invalid(f"{what} has more than {MAX_URLS} urls")


def _check_descriptor(descriptor: Descriptor, what: str) -> None:
    try:
        check_digest(descriptor.digest)
    except RemoteError as error:
        raise invalid(f"{what}: {error.text}") from None
    if not 0 <= descriptor.size <= MAX_BLOB:
        raise invalid(f"{what} claims a size of {descriptor.size} bytes")


def read_config(data: bytes) -> Config:
    """Decode an image's config. Raises RemoteError(INVALID_ARGUMENT)."""
    config = _decode(Config, data, "the image config")
    if config.rootfs.type not in {"", "layers"}:
        raise invalid(f"the image config's rootfs is of type {config.rootfs.type[:100]!r}, not layers")
    for diff_id in config.rootfs.diff_ids:
        check_digest(diff_id)
    return config


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain id of each layer and all below it (image-spec, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


def layers_of(manifest: Manifest, config: Config) -> list[Layer]:
    """The layers, lowest first, each with its diff id and chain id. Raises RemoteError(INVALID_ARGUMENT)."""
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) != len(manifest.layers):
        raise invalid(f"the manifest has {len(manifest.layers)} layers, its config {len(diff_ids)} diff ids")
    return [
        Layer(
            digest=layer.digest,
            size=layer.size,
            media_type=layer.media_type,
            diff_id=diff_id,
            chain_id=chain_id,
            urls=layer.urls or [],
        )
        for layer, diff_id, chain_id in zip(manifest.layers, diff_ids, chain_ids(diff_ids), strict=True)
    ]


def _decode(kind: type[T], data: bytes, what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"{what} is malformed: {str(error)[:300]}") from None
