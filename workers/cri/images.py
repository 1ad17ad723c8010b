"""Runs in: cri. ImageService but for PullImage (pull.py): finding, listing and removing images.

Images belong to storage; nothing of them is kept here. A reference is parsed here, so that asking for an
image does not start the image worker; only a short name that is not found under its usual full name is
resolved by it (registries.conf may send short names elsewhere).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

import msgspec

from ipc.cri import api_pb2 as pb
from ipc.errors import RemoteError, invalid, not_found
from ipc.messages import image as image_messages
from ipc.messages import storage
from ipc.messages.storage import FsInfo, ImageRecord
from ipc.reference import has_domain, image_id, parse
from ipc.settings import CriSettings
from workers.cri.node import Node
from workers.cri.operations import CLEAN
from workers.cri.peers import SHORT
from workers.cri.spec import image as image_config

#: A text that may be an abbreviated image id; a name of that form is looked up as a name first.
_ID_PREFIX = re.compile(r"(sha256:)?[0-9a-f]{3,64}", re.ASCII)


class Images:
    """What storage has of images."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def find(self, spec: pb.ImageSpec, timeout: float = SHORT) -> ImageRecord | None:
        """The image that a spec means: by its exact id, by name, digest or abbreviated id.

        None if absent. Raises RemoteError(INVALID_ARGUMENT) if no image is named.
        """
        text = asked(spec)
        for reference in lookups(text):
            found = await self._get(reference, timeout)
            if found is not None:
                return found
        return await self._find_short(text, timeout)

    async def need(self, spec: pb.ImageSpec) -> ImageRecord:
        """As `find`. Raises RemoteError(NOT_FOUND)."""
        found = await self.find(spec)
        if found is None:
            raise not_found(f"image {asked(spec)[:300]!r} is not on this node; pull it first")
        return found

    async def _get(self, reference: str, timeout: float) -> ImageRecord | None:
        request = storage.ImageGet(reference=reference)
        return (await self._node.peers.storage.call(request, timeout=timeout)).image

    async def _find_short(self, text: str, timeout: float) -> ImageRecord | None:
        if has_domain(text) or image_id(text) or not is_reference(text):
            return None
        for candidate in await self.candidates(text, timeout):
            found = await self._get(parse(candidate).key, timeout)
            if found is not None:
                return found
        return None

    async def candidates(self, text: str, timeout: float) -> list[str]:
        """The full references that a reference may mean, best first."""
        if has_domain(text):
            return [str(parse(text))]
        request = image_messages.ReferenceNormalise(reference=text)
        answer = await self._node.peers.image.call(request, timeout=timeout)
        return answer.candidates or [answer.reference]

    async def list(self, spec: pb.ImageSpec | None, timeout: float) -> list[ImageRecord]:
        """All images, or the one that the filter means."""
        if spec is not None and (spec.image or spec.image_ref):
            found = await self.find(spec, timeout)
            return [] if found is None else [found]
        return (await self._node.peers.storage.call(storage.ImageList(), timeout=timeout)).images

    async def remove(self, spec: pb.ImageSpec, timeout: float) -> None:
        """By id the image with all names, by name that name. Absent is success; in use is an error."""
        text = asked(spec)
        found = await self.find(spec, timeout)
        if found is None:
            return
        await self._node.operations.over(CLEAN, timeout)  # containers that are removed no longer use it
        request = storage.ImageRemove(reference=removal(text, found))
        await self._node.peers.storage.call(request, timeout=timeout)

    async def fs_info(self, timeout: float) -> FsInfo:
        """What images and containers occupy."""
        return await self._node.peers.storage.call(storage.FsInfoGet(), timeout=timeout)


def asked(spec: pb.ImageSpec) -> str:
    """What an ImageSpec means: the pinned id if there is one, else what was written.

    Raises RemoteError(INVALID_ARGUMENT) if it is empty.
    """
    text = spec.image_ref or spec.image
    if not text:
        raise invalid("no image is named")
    return text


def is_reference(text: str) -> bool:
    """Whether the text can be read as an image reference."""
    try:
        parse(text)
    except RemoteError:
        return False
    return True


def lookups(text: str) -> Iterable[str]:
    """What to look a text up as, in this order. Raises RemoteError(INVALID_ARGUMENT) if it is nothing."""
    whole = image_id(text)
    if whole:
        return [whole]
    abbreviated = bool(_ID_PREFIX.fullmatch(text))
    if text.startswith("sha256:") and abbreviated:
        return [text]
    key = parse(text).key
    return [key, text] if abbreviated else [key]


def removal(text: str, found: ImageRecord) -> str:
    """What to remove: the name as storage knows it, or the id if the text was (the beginning of) one."""
    known = {*found.names, *found.digests}
    names = [key for key in lookups(text) if key in known]
    if names:
        return names[0]
    if _ID_PREFIX.fullmatch(text):
        return found.id
    short = [name for name in found.names if name.endswith(f"/{text}") or name.endswith(f"/{text}:latest")]
    return (short or [found.id])[0]


def is_pinned(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether a name is on the list of images that are never collected ("name", "name*", "*name*")."""
    names = list(names)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def pinned(settings: CriSettings) -> list[str]:
    """Patterns of the images that are never collected; the pause image is one of them."""
    pause = settings.pause_image
    return [*settings.pinned_images, *(lookups(pause) if pause and is_reference(pause) else [])]


def to_cri(record: ImageRecord, pinned: Iterable[str] = ()) -> pb.Image:
    """The CRI view of an image. The user stands as number or name, never both.

    What is pinned is said by the configuration in force, whatever it was at the pull.
    """
    image = pb.Image(
        id=record.id,
        repo_tags=record.names,
        repo_digests=record.digests,
        size=record.size,
        pinned=is_pinned([*record.names, *record.digests, record.id], pinned),
    )
    user = _user(record)
    if user.isascii() and user.isdigit():
        image.uid.value = int(user)
    else:
        image.username = user
    return image


def _user(record: ImageRecord) -> str:
    try:
        return image_config.execution(record.config).user.partition(":")[0]
    except RemoteError:
        return ""  # an image whose config is broken can be listed and removed, not run


def verbose_info(record: ImageRecord) -> dict[str, str]:
    """Verbose ImageStatus: the image's config as it is, and where it stands in use."""
    details = {
        "chainID": record.layers[-1] if record.layers else "",
        "layers": record.layers,
        "inUse": record.in_use,
        "imageSpec": msgspec.Raw(record.config),
    }
    try:
        return {"info": msgspec.json.encode(details).decode()}
    except UnicodeDecodeError:  # a config that is not text
        return {}
