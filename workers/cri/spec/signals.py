"""Runs in: cri. The signal that StopContainer sends first.

Owns the spellings: CRI's enum (its numbers are not the kernel's), an image's StopSignal ("SIGQUIT", "quit",
"3"), and the one spelling of ours, "SIGRTMIN+3". Refuses what is no signal.
"""

from __future__ import annotations

from ipc.cri import api_pb2
from ipc.errors import invalid

from . import image
from .words import words

DEFAULT = "SIGTERM"
SIGRTMIN, SIGRTMAX = 34, 64

_PREFIX = "SIGNAL_"
#: Numbers 1 to 31, in order (signal(7), x86 and arm).
_STANDARD = tuple(
    f"SIG{name}"
    for name in words("""
        HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP
        TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS
    """)
)
_ALIASES = {"SIGCLD": "SIGCHLD", "SIGIOT": "SIGABRT", "SIGPOLL": "SIGIO"}
_REAL_TIME = (
    "SIGRTMIN",
    *(f"SIGRTMIN+{n}" for n in range(1, 16)),
    *(f"SIGRTMAX-{n}" for n in range(14, 0, -1)),
    "SIGRTMAX",
)
NAMES = frozenset((*_STANDARD, *_REAL_TIME))


def stop_signal(config: api_pb2.ContainerConfig, execution: image.Execution) -> str:
    """CRI, else image, else SIGTERM."""
    if config.stop_signal:
        return _of_request(config.stop_signal)
    text = execution.stop_signal.strip().upper()
    return _of_image(text) if text else DEFAULT


def _of_request(value: int) -> str:
    if value not in api_pb2.Signal.values():
        raise invalid(f"stop_signal: {value} is no signal")
    name = api_pb2.Signal.Name(api_pb2.Signal.ValueType(value)).removeprefix(_PREFIX)
    name = name.replace("PLUS", "+").replace("MINUS", "-")
    return _ALIASES.get(name, name)


def _of_image(text: str) -> str:
    name = _of_number(int(text)) if text.isascii() and text.isdigit() else text
    name = name if name.startswith("SIG") else f"SIG{name}"
    name = _ALIASES.get(name, name)
    if name not in NAMES:
        raise invalid(f"the image's StopSignal {text!r} is no signal")
    return name


def _of_number(number: int) -> str:
    if 0 < number <= len(_STANDARD):
        return _STANDARD[number - 1]
    if SIGRTMIN <= number <= SIGRTMAX:
        return _REAL_TIME[number - SIGRTMIN]
    return str(number)
