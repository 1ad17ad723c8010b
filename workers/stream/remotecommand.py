"""Runs in: stream. Sans-IO.

The remote command protocols (exec and attach), whatever carries them: which streams there are, sizes of a
terminal out of a client's JSON, and the status at the end as each version writes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

STDIN, STDOUT, STDERR, ERROR, RESIZE = "stdin", "stdout", "stderr", "error", "resize"

#: WebSocket channels.
CHANNELS = (STDIN, STDOUT, STDERR, ERROR, RESIZE)

SIZE_LIMIT = 1024  # bytes of one JSON object of a client
_MAX_SIDE = 0xFFFF
_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class Wanted:
    """What a session was asked for."""

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False

    def outputs(self) -> list[str]:
        """The streams to the client but for the error stream."""
        return [name for name, wanted in ((STDOUT, self.stdout), (STDERR, self.stderr)) if wanted]

    def spdy_streams(self, protocol: str) -> frozenset[str]:
        """The streams that a client opens with this version."""
        resize = self.tty and protocol in {"v3.channel.k8s.io", "v4.channel.k8s.io"}
        flags = {STDIN: self.stdin, STDOUT: self.stdout, STDERR: self.stderr, RESIZE: resize, ERROR: True}
        return frozenset(name for name, wanted in flags.items() if wanted)


# -- sizes ------------------------------------------------------------------------------------------------


class BadSize(ValueError):
    """What came on the resize stream is not what belongs there; the stream is read no further."""


class _Size(msgspec.Struct):
    Width: int = 0
    Height: int = 0


class Sizes:
    """Reads concatenated JSON objects; holds at most SIZE_LIMIT bytes of one that is not whole."""

    _WHOLE = re.compile(rb"\{[^{}]*\}")

    def __init__(self) -> None:
        self._rest = b""

    def receive(self, data: bytes) -> list[tuple[int, int]]:
        """The sizes (width, height) that are whole now; nonsensical ones are left out. Raises BadSize."""
        text, at, found = self._rest + data, 0, []
        while match := self._WHOLE.match(text, at := _skip(text, at)):
            if len(match[0]) > SIZE_LIMIT:
                raise BadSize("a terminal size of many words")
            found.append(_size(match[0]))
            at = match.end()
        self._rest = text[at:]
        if len(self._rest) > SIZE_LIMIT or self._rest[:1] not in {b"", b"{"} or b"{" in self._rest[1:]:
            raise BadSize("this is no terminal size")
        return [size for size in found if all(0 < side <= _MAX_SIDE for side in size)]


def _skip(text: bytes, at: int) -> int:
    while text[at : at + 1] and text[at] in _SPACE:
        at += 1
    return at


def _size(raw: bytes) -> tuple[int, int]:
    try:
        size = msgspec.json.decode(raw, type=_Size)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadSize(str(error)) from None
    return size.Width, size.Height


# -- the end ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a session ended: an error of ours, or an exit code."""

    exit_code: int = 0
    error: str = ""


def status(outcome: Outcome, protocol: str) -> bytes:
    """What goes to the error stream: JSON in v4 and v5, else plain text and only on failure."""
    if not protocol.startswith(("v4.", "v5.")):
        return _text(outcome).encode()
    if outcome.error:
        return msgspec.json.encode(
            {
                "status": "Failure",
                "message": f"Internal error occurred: {outcome.error}",
                "reason": "InternalError",
                "code": 500,
            }
        )
    if not outcome.exit_code:
        return b'{"status":"Success"}'
    cause = {"reason": "ExitCode", "message": str(outcome.exit_code)}
    return msgspec.json.encode(
        {
            "status": "Failure",
            "message": _text(outcome),
            "reason": "NonZeroExitCode",
            "details": {"causes": [cause]},
        }
    )


def _text(outcome: Outcome) -> str:
    if outcome.error:
        return f"Internal error occurred: {outcome.error}"
    if outcome.exit_code:
        return f"command terminated with non-zero exit code: {outcome.exit_code}"
    return ""
