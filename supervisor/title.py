"""Runs in: the supervisor and its children.

Process titles, by setproctitle's extension module alone. Its package imports logging, and with it threading,
whose fork hook makes every child dirty half a megabyte: with one monitor per container that is most of what
a monitor costs.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable
from typing import cast

_EXTENSION = "setproctitle._setproctitle"


def _load() -> Callable[[str], None]:
    package = importlib.util.find_spec("setproctitle")  # finds it, does not import it
    if package is None or package.submodule_search_locations is None:
        raise ImportError("setproctitle is not installed")
    spec = importlib.machinery.PathFinder.find_spec(_EXTENSION, list(package.submodule_search_locations))
    if spec is None or spec.loader is None:
        raise ImportError("setproctitle has no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("Callable[[str], None]", module.setproctitle)


#: Set the title of this process, as `ps` shows it.
set_title: Callable[[str], None] = _load()
