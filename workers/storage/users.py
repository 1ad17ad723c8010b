"""Runs in: children of storage.

Who a container runs as: names are looked up in the image's own /etc/passwd and /etc/group. The files are
opened below the image's root with RESOLVE_IN_ROOT, so no link of the image leads out of it, and read line by
line to a limit (CVE-2025-4437): they are an image's, and may be a device, a fifo or a gigabyte.

Owns the rules of the OCI image-spec's `User` and of CRI's SupplementalGroupsPolicy. Refuses names that the
image does not have. A number needs no entry: its group is 0 then.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from ipc import kernel
from ipc.errors import invalid
from ipc.messages.storage import ContainerUser

MAX_FILE = 1024 * 1024
MAX_LINE = 64 * 1024
MAX_ID = 2**32 - 2
USERS_FILE = "etc/passwd"
GROUPS_FILE = "etc/group"


@dataclass(frozen=True)
class PasswdEntry:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class GroupEntry:
    name: str
    gid: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class ResolvedUser:
    """What goes into the OCI spec's process.user, and HOME."""

    uid: int
    gid: int
    additional_gids: list[int]
    home: str
    name: str


def resolve(root_fd: int, user: ContainerUser) -> ResolvedUser:
    """Resolve `user` in the image whose root is `root_fd`. INVALID_ARGUMENT if a name is unknown."""
    wanted, group = _wanted(user)
    entry = _find_user(root_fd, wanted)
    gid = entry.gid if group is None else _find_group(root_fd, group)
    if user.gid is not None:
        gid = _checked(user.gid, "group")
    return ResolvedUser(
        uid=entry.uid,
        gid=gid,
        additional_gids=_additional(root_fd, user, entry.name, gid),
        home=entry.home if entry.home.startswith("/") else "/",
        name=entry.name,
    )


def _wanted(user: ContainerUser) -> tuple[int | str, int | str | None]:
    """The user and, if the image names one, the group: numbers where they are numbers."""
    if user.uid is not None:
        return _checked(user.uid, "user"), None
    if user.name:
        return user.name, None
    name, colon, group = user.image_user.partition(":")
    return _number_or_name(name or "0", "user"), _number_or_name(group, "group") if colon and group else None


def _number_or_name(text: str, what: str) -> int | str:
    return _checked(int(text), what) if text.isascii() and text.isdigit() and len(text) < 12 else text


def _checked(number: int, what: str) -> int:
    if not 0 <= number <= MAX_ID:
        raise invalid(f"{number} is no {what} id")
    return number


def _find_user(root_fd: int, wanted: int | str) -> PasswdEntry:
    for line in lines(root_fd, USERS_FILE):
        entry = parse_passwd(line)
        if entry is not None and wanted in (entry.uid, entry.name):
            return entry
    if isinstance(wanted, int):
        return PasswdEntry("", wanted, 0, "/")
    raise invalid(f"the image has no user {wanted!r} in its /etc/passwd")


def _find_group(root_fd: int, wanted: int | str) -> int:
    if isinstance(wanted, int):
        return wanted
    for entry in groups(root_fd):
        if entry.name == wanted:
            return entry.gid
    raise invalid(f"the image has no group {wanted!r} in its /etc/group")


def _additional(root_fd: int, user: ContainerUser, name: str, gid: int) -> list[int]:
    """The process's groups, its own first: a file's "everybody but this group" must hold for it too
    (CVE-2022-2995 and its kin)."""
    found = [gid]
    if not user.strict and name:
        found += [entry.gid for entry in groups(root_fd) if name in entry.members]
    found += [_checked(number, "group") for number in user.supplemental]
    return list(dict.fromkeys(found))


def groups(root_fd: int) -> Iterator[GroupEntry]:
    """The image's groups."""
    for line in lines(root_fd, GROUPS_FILE):
        entry = parse_group(line)
        if entry is not None:
            yield entry


def parse_passwd(line: str) -> PasswdEntry | None:
    """One line of passwd(5), None if it is not one."""
    fields = line.split(":")
    if len(fields) < 4 or not fields[0] or not (_is_id(fields[2]) and _is_id(fields[3])):
        return None
    return PasswdEntry(fields[0], int(fields[2]), int(fields[3]), fields[5] if len(fields) > 5 else "/")


def parse_group(line: str) -> GroupEntry | None:
    """One line of group(5), None if it is not one."""
    fields = line.split(":")
    if len(fields) < 3 or not fields[0] or not _is_id(fields[2]):
        return None
    members = fields[3].split(",") if len(fields) > 3 else []
    return GroupEntry(fields[0], int(fields[2]), tuple(m.strip() for m in members if m.strip()))


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= MAX_ID


def lines(root_fd: int, path: str) -> Iterator[str]:
    """The lines of a small text file of the image; none if there is no such file.

    INVALID_ARGUMENT if it is larger than MAX_FILE, has a line over MAX_LINE, or is no regular file.
    """
    fd = _open_inside(root_fd, path)
    if fd is None:
        return
    with os.fdopen(fd, "rb") as file:
        left = MAX_FILE
        while line := file.readline(MAX_LINE + 1):
            left -= len(line)
            if left < 0 or len(line) > MAX_LINE:
                raise invalid(f"the image's /{path} is too large: {MAX_FILE} bytes are read at most")
            yield line.decode("utf-8", "surrogateescape").strip()


def _open_inside(root_fd: int, path: str) -> int | None:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    resolve_flags = kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS | kernel.RESOLVE_NO_XDEV
    try:
        # O_PATH first: opening a device node of the image could do something.
        looked_at = kernel.openat2(root_fd, path, os.O_PATH, resolve=resolve_flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise invalid(f"cannot open the image's /{path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(looked_at).st_mode):
            raise invalid(f"the image's /{path} is no regular file")
        return os.open(f"/proc/self/fd/{looked_at}", flags | os.O_CLOEXEC)
    finally:
        os.close(looked_at)
