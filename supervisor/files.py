"""Runs in: the supervisor.

What little of shutil the supervisor needs, without the compression libraries that shutil loads.
"""

from __future__ import annotations

import os
import stat

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_program(name: str, path: str = SEARCH_PATH) -> str:
    """Return the first executable file of this name in a search path, "" if there is none."""
    candidates = (os.path.join(directory, name) for directory in path.split(":"))
    return next((c for c in candidates if os.path.isfile(c) and os.access(c, os.X_OK)), "")


def remove_tree(path: str) -> None:
    """Remove a file, or a directory and everything in it, never following a link; absent is success.

    Raises OSError, for a mount point too.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        os.unlink(path)
        return
    for _, directories, files, fd in os.fwalk(path, topdown=False, follow_symlinks=False):
        for name in files:
            os.unlink(name, dir_fd=fd)
        for name in directories:
            _remove_entry(name, fd)
    os.rmdir(path)


def _remove_entry(name: str, directory_fd: int) -> None:
    """What fwalk calls a directory may be a link to one."""
    if stat.S_ISLNK(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=directory_fd)
    else:
        os.rmdir(name, dir_fd=directory_fd)
