"""Runs in: every process.

The house's own way to talk: typed messages over Unix SOCK_SEQPACKET sockets, descriptors beside them.
`wire`, `calls` and `messages` do no I/O; `aio`, `loop`, `serve` and `blocking` are its faces.
"""

import sys

# msgspec takes typing_extensions where it is (grpc brings it along) and does without where it is not: so do
# all processes that have no grpc, and are a megabyte smaller. Whoever imports it later gets it.
_HIDDEN = "typing_extensions"
_hide = _HIDDEN not in sys.modules
if _hide:
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]  # the language's own way to say: there is none
import msgspec as msgspec  # noqa: E402 - here, while that is so

if _hide:
    del sys.modules[_HIDDEN]
