"""Runs in: every process.

Which release this is. Reads it from the name of the distribution's directory, where importlib.metadata would
load the standard library's mail, archive and random modules: two megabytes for a number.
"""

from __future__ import annotations

import functools
import os
import sys
import tomllib
from pathlib import Path

DISTRIBUTION = "bulkhead-cri"
_PREFIX, _SUFFIX = DISTRIBUTION.replace("-", "_") + "-", ".dist-info"


def version() -> str:
    """The version of the installed distribution, in a clone that of its project file. Raises OSError."""
    for directory in sys.path:
        for name in _names(directory):
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
                return name[len(_PREFIX) : -len(_SUFFIX)]
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


@functools.cache
def build() -> str:
    """What tells two installed builds of one release apart: the name of the package's tree, else the
    version."""
    tree = Path(__file__).resolve().parent.parent.name
    return tree if tree[:1].isdigit() else version()


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory or ".")
    except OSError:  # sys.path may name what is not there, or an archive
        return []
