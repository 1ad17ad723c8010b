"""Runs in: unpack, storage.

What a name in a layer's archive means for the layers below (OCI image-spec, layer.md, "Whiteouts"), and how
overlayfs spells it: a character device 0/0 hides a name, the extended attribute trusted.overlay.opaque=y on
a directory hides all that was in it.

An `unpack` child has no CAP_SYS_ADMIN and cannot write trusted.*; it makes the devices (CAP_MKNOD) and notes
the opaque directories, and the commit job writes the attribute.
"""

from __future__ import annotations

import enum
import os
import stat

from ipc.errors import invalid

PREFIX = b".wh."
META_PREFIX = b".wh..wh."
OPAQUE_NAME = b".wh..wh..opq"
OPAQUE_XATTR = "trusted.overlay.opaque"
DEVICE = os.makedev(0, 0)


def shown(name: bytes) -> str:
    """A name from an archive, made fit for a log line."""
    text = name[:200].decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Meaning(enum.Enum):
    """What an entry is, by its base name."""

    PLAIN = "plain"
    WHITEOUT = "whiteout"  # hides one name of the layers below
    OPAQUE = "opaque"  # hides everything in this directory that lies below
    METADATA = "metadata"  # AUFS's own bookkeeping: left out


def meaning(base: bytes) -> tuple[Meaning, bytes]:
    """The meaning of a base name, and the name that it hides (for WHITEOUT).

    INVALID_ARGUMENT for a whiteout of nothing, of `.` and of `..`.
    """
    if not base.startswith(PREFIX):
        return Meaning.PLAIN, base
    if base == OPAQUE_NAME:
        return Meaning.OPAQUE, b""
    if base.startswith(META_PREFIX):
        return Meaning.METADATA, b""
    hidden = base[len(PREFIX) :]
    if hidden in (b"", b".", b".."):
        raise invalid(f"{shown(base)!r} in the layer's archive hides no name")
    return Meaning.WHITEOUT, hidden


def is_whiteout(status: os.stat_result) -> bool:
    """True for a whiteout of overlayfs."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == DEVICE
