"""Runs in: unpack.

Makes a directory tree of an archive's entries, below one directory descriptor. The tree is empty at first
and nobody else writes it, so what is where is known without looking; the kernel is told all the same never
to follow a link (openat2 with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS for parents, the *at calls for the
last name), and the process can see nothing but this tree.

Owns: the meaning of hostile or sloppy archives.
- A leading "/" means the image's root: several image builders write such names. ".." is refused everywhere.
- A relative symbolic link that climbs out of the root is refused. Entries below a link made by the same
  layer go where it leads, if it is relative; through an absolute link nothing is written.
- A later entry replaces an earlier one of its name, but a directory stays where a directory comes again.
- trusted.* attributes are refused; those that belong to the host's policies (security.selinux and so on)
  are left out and reported.

Directories get their owner, mode, attributes and times last, deepest first: until then the process, which
has no CAP_DAC_OVERRIDE, can enter them all. Directories that the archive only implies are reported: their
looks come from the layers below, which an unpack child cannot see.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import zlib
from collections.abc import Callable

from ipc import kernel
from ipc.errors import Code, RemoteError, invalid

from . import tarstream, whiteouts
from .content import Content
from .report import LayerReport
from .tarstream import Entry, TarReader
from .whiteouts import Meaning, shown

MAX_LINK_HOPS = 40
#: Directories of the same layer that later entries may replace; each costs a walk.
MAX_REPLACED_TREES = 1000
MAX_OPEN_DIRECTORIES = 32
MAX_ID = 2**32 - 2  # 2**32 - 1 means "leave it" to chown(2)
MAX_SECONDS = 2**40  # beyond every file system; utimensat(2) clamps what it is given
DISK_BLOCK = 4096
#: Where a directory's metadata does not come from anywhere.
IMPLIED_MODE = 0o755

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.ENFILE, errno.EMFILE}
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EPERM}
_KEPT_XATTRS = ("user.", "security.capability", "system.posix_acl_")
_BENEATH = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS
_DEVICE_BITS = {
    tarstream.CHAR: stat.S_IFCHR,
    tarstream.BLOCK_DEVICE: stat.S_IFBLK,
    tarstream.FIFO: stat.S_IFIFO,
}


def split(name: bytes) -> list[bytes]:
    """The components of an entry's name. INVALID_ARGUMENT for ".." and NUL."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts or b"\0" in name:
        raise invalid(f"the layer's archive names {shown(name)!r}, which points out of the image")
    return parts


def check_link(parts: list[bytes], target: bytes) -> None:
    """INVALID_ARGUMENT if a relative link at `parts` climbs above the image's root."""
    depth = len(parts) - 1
    for part in () if target.startswith(b"/") else target.split(b"/"):
        if part == b"..":
            depth -= 1
        elif part not in (b"", b"."):
            depth += 1
        if depth < 0:
            where = shown(b"/".join(parts))
            raise invalid(
                f"the link {where!r} in the layer's archive points out of the image: {shown(target)!r}"
            )


class Extractor:
    """Writes entries below `root_fd`, which it only borrows. `lowest`: no layer lies below, so whiteouts
    hide nothing and are left out. What is made is noted in `content`."""

    def __init__(
        self,
        root_fd: int,
        *,
        max_entries: int,
        max_bytes: int,
        lowest: bool = False,
        content: Content | None = None,
    ) -> None:
        self._root = root_fd
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._lowest = lowest
        self._entries = 0
        self._size = DISK_BLOCK
        self._directories: dict[bytes, Entry | None] = {b"": None}  # None: implied
        self._links: dict[bytes, bytes] = {}
        self._opaque: set[bytes] = set()
        self._ignored_xattrs: set[str] = set()
        self._replaced_trees = 0
        self._open: dict[bytes, int] = {}
        self._content = content or Content()
        self._makers: dict[bytes, Callable[[int, bytes, bytes, Entry], None]] = {
            tarstream.LINK: self._hard_link,
            tarstream.SYMLINK: self._symlink,
            tarstream.CHAR: self._node,
            tarstream.BLOCK_DEVICE: self._node,
            tarstream.FIFO: self._node,
        }

    def extract(self, reader: TarReader) -> LayerReport:
        """Write every entry of `reader`. Raises RemoteError; the tree is of no use then."""
        self._reader = reader
        entry: Entry | None = None
        try:
            for entry in reader:
                self._count()
                self._one(entry)
            entry = None
            return self._finish()
        except OSError as error:
            raise _explain(error, entry) from error
        finally:
            self._close_directories()

    def _count(self) -> None:
        self._entries += 1
        if self._entries > self._max_entries:
            raise _exhausted(f"the layer has more than {self._max_entries} entries")

    def _one(self, entry: Entry) -> None:
        _check_numbers(entry)
        parts = split(entry.name)
        if not parts:
            self._describe_root(entry)
            return
        kind, base = whiteouts.meaning(parts[-1])
        if kind is Meaning.METADATA or any(p.startswith(whiteouts.PREFIX) for p in parts[:-1]):
            return  # AUFS's bookkeeping directories and what is in them
        parent = self._parent(parts[:-1])
        path = parent + b"/" + base if parent else base
        if kind is Meaning.PLAIN:
            self._plain(parent, path, base, entry)
        elif kind is Meaning.OPAQUE:
            self._opaque.add(parent)
        else:
            self._whiteout(parent, path, base)

    def _describe_root(self, entry: Entry) -> None:
        if entry.kind != tarstream.DIRECTORY:
            raise invalid(f"entry {entry.shown!r} would replace the image's root directory")
        self._directories[b""] = entry

    def _plain(self, parent: bytes, path: bytes, base: bytes, entry: Entry) -> None:
        parent_fd = self._directory_fd(parent)
        if entry.kind == tarstream.DIRECTORY:
            if path not in self._directories:
                self._make_directory(parent_fd, path, base)
            self._directories[path] = entry
        elif entry.kind == tarstream.REGULAR:
            self._file(parent_fd, path, base, entry)
        else:
            self._makers[entry.kind](parent_fd, path, base, entry)

    # -- parents --------------------------------------------------------------------------------------

    def _parent(self, parts: list[bytes]) -> bytes:
        """The directory that `parts` leads to, made if need be. Its path has no links in it."""
        path = b"/".join(parts)
        if path not in self._directories:
            path = self._resolve(parts) if self._links else path
            self._make_parents(path)
        return path

    def _resolve(self, parts: list[bytes]) -> bytes:
        done: list[bytes] = []
        pending = parts[::-1]
        hops = 0
        while pending:
            part = pending.pop()
            if part == b"..":
                self._climb(done, parts)
                continue
            target = self._links.get(b"/".join((*done, part)))
            if target is None:
                done.append(part)
                continue
            hops += 1
            if target.startswith(b"/") or hops > MAX_LINK_HOPS:
                raise _through_link(parts, target)
            pending += [p for p in target.split(b"/") if p not in (b"", b".")][::-1]
        return b"/".join(done)

    def _climb(self, done: list[bytes], parts: list[bytes]) -> None:
        if not done:
            raise _through_link(parts, b"..")
        done.pop()

    def _make_parents(self, path: bytes) -> None:
        at = -1
        while at < len(path):
            at = path.find(b"/", at + 1)
            at = len(path) if at < 0 else at
            prefix = path[:at]
            if prefix not in self._directories:
                self._count()
                above, _, base = prefix.rpartition(b"/")
                self._make_implied(above, prefix, base)

    def _make_implied(self, above: bytes, prefix: bytes, base: bytes) -> None:
        above_fd = self._directory_fd(above)
        with contextlib.suppress(FileNotFoundError):
            if not whiteouts.is_whiteout(os.stat(base, dir_fd=above_fd, follow_symlinks=False)):
                raise invalid(f"the layer's archive has {shown(prefix)!r} both as a file and as a directory")
        self._make_directory(above_fd, prefix, base)
        self._directories[prefix] = None

    def _make_directory(self, parent_fd: int, path: bytes, base: bytes) -> None:
        try:
            os.mkdir(base, 0o700, dir_fd=parent_fd)
        except FileExistsError:
            if self._remove(parent_fd, path, base):
                self._opaque.add(path)  # it was hidden, and comes again: nothing of below shines through
            os.mkdir(base, 0o700, dir_fd=parent_fd)
        self._size += DISK_BLOCK
        self._content.directory(path)

    def _directory_fd(self, path: bytes) -> int:
        if not path:
            return self._root
        fd = self._open.get(path)
        if fd is None:
            if len(self._open) >= MAX_OPEN_DIRECTORIES:
                os.close(self._open.pop(next(iter(self._open))))
            flags = os.O_PATH | os.O_DIRECTORY
            fd = self._open[path] = kernel.openat2(self._root, path, flags, resolve=_BENEATH)
        return fd

    def _close_directories(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    # -- members --------------------------------------------------------------------------------------

    def _make_anew(self, parent_fd: int, path: bytes, base: bytes, make: Callable[[], None]) -> None:
        """Make something that is no directory; what an earlier entry left there goes first."""
        try:
            make()
        except FileExistsError:
            self._remove(parent_fd, path, base)
            make()

    def _file(self, parent_fd: int, path: bytes, base: bytes, entry: Entry) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(base, flags, 0o600, dir_fd=parent_fd)
        except FileExistsError:
            self._remove(parent_fd, path, base)
            fd = os.open(base, flags, 0o600, dir_fd=parent_fd)
        try:
            self._write(fd, path, entry)
            self._describe(fd, entry)
        finally:
            os.close(fd)

    def _write(self, fd: int, path: bytes, entry: Entry) -> None:
        if entry.real_size > self._max_bytes:
            raise _exhausted(f"{entry.shown!r} in the layer is {entry.real_size} bytes large")
        self._size += -(-entry.size // DISK_BLOCK) * DISK_BLOCK
        if entry.segments is None:
            self._content.file(path, entry.size, self._copy(fd, entry.size))
            return
        for offset, length in entry.segments:
            os.lseek(fd, offset, os.SEEK_SET)
            self._copy(fd, length)
        os.ftruncate(fd, entry.real_size)

    def _copy(self, fd: int, size: int) -> int:
        """The next `size` bytes go into a file. Returns their CRC-32."""
        crc = 0
        for piece in self._reader.data(size):
            crc = zlib.crc32(piece, crc)
            written = os.write(fd, piece)
            while written < len(piece):
                written += os.write(fd, piece[written:])
        return crc

    def _symlink(self, parent_fd: int, path: bytes, base: bytes, entry: Entry) -> None:
        if not entry.link or b"\0" in entry.link:
            raise invalid(f"the link {entry.shown!r} in the layer's archive leads nowhere")
        check_link(path.split(b"/"), entry.link)
        self._make_anew(parent_fd, path, base, lambda: os.symlink(entry.link, base, dir_fd=parent_fd))
        self._links[path] = entry.link
        self._content.link(path, entry.link)
        os.chown(base, entry.uid, entry.gid, dir_fd=parent_fd, follow_symlinks=False)
        self._named_xattrs(parent_fd, base, entry)
        os.utime(base, ns=_times(entry), dir_fd=parent_fd, follow_symlinks=False)

    def _hard_link(self, parent_fd: int, path: bytes, base: bytes, entry: Entry) -> None:
        parts = split(entry.link)
        if not parts:
            raise invalid(f"the hard link {entry.shown!r} in the layer's archive leads nowhere")
        above = self._resolve(parts[:-1])
        if above not in self._directories:
            raise invalid(f"{entry.shown!r} links to {shown(entry.link)!r}, which the layer does not have")
        if path == (above + b"/" + parts[-1] if above else parts[-1]):
            return
        self._make_anew(parent_fd, path, base, lambda: self._link_to(above, parts[-1], base, parent_fd))

    def _link_to(self, above: bytes, source: bytes, base: bytes, parent_fd: int) -> None:
        source_fd = self._directory_fd(above)
        os.link(source, base, src_dir_fd=source_fd, dst_dir_fd=parent_fd, follow_symlinks=False)

    def _node(self, parent_fd: int, path: bytes, base: bytes, entry: Entry) -> None:
        device = _device(entry)
        mode = 0o600 | _DEVICE_BITS[entry.kind]
        self._make_anew(parent_fd, path, base, lambda: os.mknod(base, mode, device, dir_fd=parent_fd))
        os.chown(base, entry.uid, entry.gid, dir_fd=parent_fd, follow_symlinks=False)
        os.chmod(base, entry.mode, dir_fd=parent_fd)  # just made, and no link
        self._named_xattrs(parent_fd, base, entry)
        os.utime(base, ns=_times(entry), dir_fd=parent_fd, follow_symlinks=False)

    def _whiteout(self, parent: bytes, path: bytes, base: bytes) -> None:
        """Hide a name of the layers below. What this layer has of that name stays (layer.md)."""
        if path in self._directories:
            self._opaque.add(path)
        elif not self._lowest:
            with contextlib.suppress(FileExistsError):
                fd = self._directory_fd(parent)
                os.mknod(base, stat.S_IFCHR, whiteouts.DEVICE, dir_fd=fd)

    # -- replacing ------------------------------------------------------------------------------------

    def _remove(self, parent_fd: int, path: bytes, base: bytes) -> bool:
        """Remove what an earlier entry made. True if it was a whiteout."""
        if path in self._directories:
            self._remove_tree(path)
            return False
        hidden = whiteouts.is_whiteout(os.stat(base, dir_fd=parent_fd, follow_symlinks=False))
        os.unlink(base, dir_fd=parent_fd)
        self._links.pop(path, None)
        self._content.gone(path)
        return hidden

    def _remove_tree(self, path: bytes) -> None:
        self._replaced_trees += 1
        if self._replaced_trees > MAX_REPLACED_TREES:
            raise invalid("the layer's archive replaces its own directories over and over")
        below = path + b"/"
        doomed = [p for p in self._directories if p == path or p.startswith(below)]
        for directory in sorted(doomed, reverse=True):
            self._empty(directory)
            above, _, base = directory.rpartition(b"/")
            os.rmdir(base, dir_fd=self._directory_fd(above))
            if directory in self._open:
                os.close(self._open.pop(directory))
            del self._directories[directory]
            self._content.gone(directory)
            self._opaque.discard(directory)
        for link in [p for p in self._links if p.startswith(below)]:
            del self._links[link]

    def _empty(self, directory: bytes) -> None:
        """Unlink the files of a directory whose subdirectories are gone."""
        fd = kernel.openat2(self._root, directory, os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)
        try:
            for name in os.listdir(fd):
                os.unlink(name, dir_fd=fd)
                self._content.gone(directory + b"/" + os.fsencode(name))
        finally:
            os.close(fd)

    # -- metadata -------------------------------------------------------------------------------------

    def _describe(self, fd: int, entry: Entry) -> None:
        late = self._early_xattrs(fd, entry) if entry.xattrs else ()
        os.fchown(fd, entry.uid, entry.gid)  # clears setuid and capabilities
        os.fchmod(fd, entry.mode)
        for name, value in late:
            self._set_xattr(fd, name, value, entry)
        os.utime(fd, ns=_times(entry))

    def _early_xattrs(self, fd: int, entry: Entry) -> list[tuple[str, bytes]]:
        """Set the user.* attributes, which need write permission: the file must still be ours. Returns the
        others, which a change of owner or mode would clear."""
        wanted = self._wanted_xattrs(entry)
        for name, value in wanted:
            if name.startswith("user."):
                self._set_xattr(fd, name, value, entry)
        return [(name, value) for name, value in wanted if not name.startswith("user.")]

    def _wanted_xattrs(self, entry: Entry) -> list[tuple[str, bytes]]:
        wanted = []
        for name, value in (entry.xattrs or {}).items():
            if name.startswith("trusted."):
                raise invalid(f"{entry.shown!r} in the layer's archive sets {name!r}, which is the host's")
            if name.startswith(_KEPT_XATTRS):
                wanted.append((name, value))
            else:
                self._ignore_xattr(name)
        return wanted

    def _ignore_xattr(self, name: str) -> None:
        if len(self._ignored_xattrs) < 20:
            self._ignored_xattrs.add(shown(os.fsencode(name)))

    def _named_xattrs(self, parent_fd: int, base: bytes, entry: Entry) -> None:
        """Attributes of what cannot be opened: there is no setxattrat(2) on the kernels of today."""
        wanted = self._wanted_xattrs(entry)
        if wanted:
            os.fchdir(parent_fd)
            for name, value in wanted:
                self._set_xattr(base, name, value, entry)

    def _set_xattr(self, target: int | bytes, name: str, value: bytes, entry: Entry) -> None:
        try:
            os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise invalid(f"cannot set {name!r} of {entry.shown!r}: {error.strerror}") from error
            self._ignore_xattr(name)

    def _finish(self) -> LayerReport:
        self._close_directories()
        for path in sorted(self._directories, reverse=True):  # children come after their parents by name
            self._describe_directory(path, self._directories[path])
        return LayerReport(
            size=self._size,
            entries=self._entries,
            implied=sorted(p for p, entry in self._directories.items() if entry is None),
            opaque=sorted(self._opaque),
            ignored_xattrs=sorted(self._ignored_xattrs),
        )

    def _describe_directory(self, path: bytes, entry: Entry | None) -> None:
        described = entry or Entry(name=path, kind=tarstream.DIRECTORY, mode=IMPLIED_MODE)
        fd = kernel.openat2(self._root, path or b".", os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)
        try:
            self._describe(fd, described)
        finally:
            os.close(fd)


def _check_numbers(entry: Entry) -> None:
    if not (0 <= entry.uid <= MAX_ID and 0 <= entry.gid <= MAX_ID):
        raise invalid(f"{entry.shown!r} in the layer's archive has the owner {entry.uid}:{entry.gid}")


def _device(entry: Entry) -> int:
    major, minor = entry.device
    if not (0 <= major < 2**12 and 0 <= minor < 2**20):
        raise invalid(f"{entry.shown!r} in the layer's archive is the impossible device {major}:{minor}")
    return os.makedev(major, minor)


def _times(entry: Entry) -> tuple[int, int]:
    limit = MAX_SECONDS * 10**9
    when = max(-limit, min(limit, entry.mtime_ns))
    return when, when


def _exhausted(text: str) -> RemoteError:
    return RemoteError(Code.RESOURCE_EXHAUSTED, text)


def _through_link(parts: list[bytes], target: bytes) -> RemoteError:
    where = shown(b"/".join(parts))
    return invalid(f"the layer's archive writes to {where!r} through a link to {shown(target)!r}")


def _explain(error: OSError, entry: Entry | None) -> RemoteError:
    """What the kernel refused, as an answer: a full disk, or an entry that cannot be."""
    what = f"cannot unpack {entry.shown!r}" if entry else "cannot finish the layer"
    text = f"{what}: {error.strerror}"
    if error.errno in _FULL:
        return _exhausted(text)
    return RemoteError(Code.INTERNAL if error.errno == errno.EIO else Code.INVALID_ARGUMENT, text)
