"""Runs in: every process (types only).

Owner: stream, of `stream.*`; caller: root (bulkheadctl). The requests named `cri.*` are what stream asks of
cri to get its sessions; they stand here because both sides of a session are described in one place.
"""

from __future__ import annotations

from . import Body, Request, request


class SessionState(Body):
    """One session, for operators."""

    kind: str  # "exec", "attach", "portforward"
    transport: str  # "spdy", "websocket"
    protocol: str  # the subprotocol, "" for none
    pod_id: str
    container_id: str
    age_ms: int
    idle_ms: int
    bytes_in: int  # of the connection: from the client, and to it
    bytes_out: int


class StreamInfo(Body):
    sessions: int  # exec, attach and port-forward sessions that are open
    table: list[SessionState] = []
    connections: int = 0  # those that ask, and those of sessions


@request("stream.info.get", reply=StreamInfo, idempotent=True)
class InfoGet(Request[StreamInfo]):
    """Which sessions there are."""


class Redeemed(Body):
    """What a token was given for. `session` names it from now on; it is as secret as the token was."""

    session: str
    pod_id: str
    pod_uid: str = ""  # for texts
    container_id: str = ""  # "" for port-forward
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False
    ports: list[int] = []  # of a port-forward over WebSocket


@request("cri.token.redeem", reply=Redeemed, idempotent=False)
class TokenRedeem(Request[Redeemed]):
    """Use up a token. Nothing starts yet: the client has yet to open its streams.

    NOT_FOUND if it is unknown, used, too old or for another kind.
    """

    token: str
    kind: str  # "exec", "attach", "portforward"


class SessionOpened(Body):
    """The reply's descriptors, named in their order. stream owns them (and may make them non-blocking):

    `stdin` takes what the client sends, `stdout` and `stderr` give what goes to it: pipes or sockets.
    `terminal` is the master of a pty: its size is set there, and for what has no descriptor of its own it is
    also stdin and stdout. `status` is the read end of a pipe into which the holder of the other end writes
    one SessionEnd (msgpack) when the session is over; when stream closes it, the client is gone and an exec
    is to end. `socket` is a connected socket, for port-forward, alone.
    """

    fds: list[str]


class SessionEnd(Body):
    """What comes through the status pipe; end of file without it means that the monitor is gone."""

    exit_code: int = 0  # of an exec; 128+n for signal n
    error: str = ""  # it could not be started, or was ended: a sentence


@request("cri.session.open", reply=SessionOpened, idempotent=False)
class SessionOpen(Request[SessionOpened]):
    """Start the exec, attach, or connect to a port of the pod (once for each connection that is forwarded).

    NOT_FOUND if there is no such session. For port-forward a session is good as long as its pod is ready,
    whatever happens to cri meanwhile.
    """

    session: str
    port: int = 0
