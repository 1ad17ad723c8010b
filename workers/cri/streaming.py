"""Runs in: cri. Exec, Attach and PortForward: URLs for clients, and what stream asks with them.

An RPC checks its request and answers a URL with a token; nothing runs yet. The stream worker redeems the
token and later opens the session: only then the monitor starts the process or joins the container's streams,
or network connects to a port. The descriptors pass through here once, the bytes never.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass

import msgspec

from ipc import aio, log
from ipc.cri import api_pb2 as pb
from ipc.errors import invalid, not_found, precondition
from ipc.fds import FdSet
from ipc.messages.cri import Redeemed, SessionOpen, TokenRedeem
from ipc.messages.monitor import AttachOpen, ExecOpen, SessionOpened
from ipc.messages.network import PortConnect
from workers.cri.containers import Containers
from workers.cri.kept import read_bytes
from workers.cri.node import Node
from workers.cri.pods import Pods
from workers.cri.spec import exec_process
from workers.cri.state import Container, Phase, Pod
from workers.cri.tokens import KEY_SIZE, Signer, Tokens

OPEN_TIMEOUT = 60.0
#: For what is redeemed to be opened: a client has half a minute for its streams.
SESSION_LIFETIME = 90.0
HIGHEST_PORT = 65535


@dataclass(frozen=True)
class Streams:
    """Which streams a client has asked for."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool


@dataclass(frozen=True)
class Asked:
    """A whole request, checked: what its token stands for."""

    kind: str  # "exec", "attach", "portforward"
    pod_id: str
    container_id: str = ""
    streams: Streams = Streams(stdin=False, stdout=False, stderr=False, tty=False)
    command: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()


@dataclass(frozen=True)
class Names:
    """What is handed over: names, what they stand for, until when."""

    tokens: list[tuple[str, Asked, float]]
    sessions: list[tuple[str, Asked, float]]


class Streaming:
    """The three RPCs and the two messages of stream."""

    def __init__(self, node: Node, containers: Containers, pods: Pods) -> None:
        self._node = node
        self._containers = containers
        self._pods = pods
        self._tokens: Tokens[Asked] = Tokens()
        self._sessions: Tokens[Asked] = Tokens(lifetime=SESSION_LIFETIME)
        self._signer: Signer | None = None
        self._ready = asyncio.Event()

    def open_sessions(self) -> None:
        """The state is loaded: sessions can be opened."""
        self._ready.set()

    # -- a successor ------------------------------------------------------------------------------------

    def _handed(self) -> str:
        return f"{self._node.settings.run_root}/cri/tokens"

    def let_go(self) -> None:
        """Names that clients have got are good with the next worker too. Raises OSError."""
        data = msgspec.msgpack.encode(Names(self._tokens.rows(), self._sessions.rows()))
        fd = os.open(self._handed(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)

    def take_over(self) -> None:
        """Take what the worker before us has let go. Raises OSError."""
        data = read_bytes(self._handed())
        if data is not None:
            os.unlink(self._handed())
            names = msgspec.msgpack.decode(data, type=Names)
            self._tokens.take(names.tokens)
            self._sessions.take(names.sessions)

    # -- RPCs -----------------------------------------------------------------------------------------

    def exec(self, request: pb.ExecRequest) -> str:
        """The URL of an exec. Raises RemoteError INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION."""
        streams = checked(request)
        if not request.cmd:
            raise invalid("the command to execute is empty")
        container = self._containers.need_running(request.container_id)
        exec_process(self._node.store.spec(container.id), request.cmd, tty=request.tty)  # its own refusals
        pod_id = container.record.pod_id
        return self._url(Asked("exec", pod_id, container.id, streams, tuple(request.cmd)))

    def attach(self, request: pb.AttachRequest) -> str:
        """The URL of an attach. Raises as `exec` does."""
        streams = checked(request)
        container = self._attachable(request.container_id)
        return self._url(Asked("attach", container.record.pod_id, container.id, streams))

    def _attachable(self, text: str) -> Container:
        container = self._containers.need(text)
        if container.phase not in {Phase.CREATED, Phase.RUNNING}:
            raise precondition(f"container {container.id} is not created or running: {container.phase}")
        return container

    def port_forward(self, request: pb.PortForwardRequest) -> str:
        """The URL of a port-forward. Raises RemoteError INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION."""
        if not request.pod_sandbox_id:
            raise invalid("the request has no pod sandbox id")
        wrong = [port for port in request.port if not 0 < port <= HIGHEST_PORT]
        if wrong:
            raise invalid(f"{wrong[0]} is no port")
        pod = self._pods.need_ready(request.pod_sandbox_id)
        return self._url(Asked("portforward", pod.id, ports=tuple(request.port)))

    def _url(self, asked: Asked) -> str:
        return f"{self._node.settings.stream_url}/{asked.kind}/{self._tokens.issue(asked)}"

    # -- of stream ------------------------------------------------------------------------------------

    async def redeem(self, _call: aio.Call, body: TokenRedeem) -> Redeemed:
        """cri.token.redeem. A token that is tried for another kind is used up."""
        asked = self._tokens.redeem(body.token)
        if asked is None or asked.kind != body.kind:
            raise not_found("there is no such token")
        pod = self._node.store.need_pod(asked.pod_id)
        return Redeemed(
            session=self._name(asked),
            pod_id=pod.id,
            pod_uid=pod.config.metadata.uid,
            container_id=asked.container_id,
            stdin=asked.streams.stdin,
            stdout=asked.streams.stdout,
            stderr=asked.streams.stderr,
            tty=asked.streams.tty,
            ports=list(asked.ports),
        )

    def _name(self, asked: Asked) -> str:
        if asked.kind == "portforward":
            return self._signed().name(asked.pod_id)
        return self._sessions.issue(asked)

    def _signed(self) -> Signer:
        if self._signer is None:
            self._signer = Signer(session_key(f"{self._node.settings.run_root}/cri/session.key"))
        return self._signer

    async def open(self, call: aio.Call, body: SessionOpen) -> SessionOpened:
        """cri.session.open"""
        await self._ready.wait()
        pod_id = self._signed().pod(body.session)
        if pod_id is not None:
            opened, fds = await self._connect(call, self._pods.need_ready(pod_id), body.port)
        else:
            opened, fds = await self._remote_command(call, body.session)
        with fds:
            call.reply_fds += [fds.take(index) for index in range(len(fds))]
        return opened

    async def _connect(self, call: aio.Call, pod: Pod, port: int) -> tuple[SessionOpened, FdSet]:
        if not 0 < port <= HIGHEST_PORT:
            raise invalid(f"{port} is no port")
        request = PortConnect(pod_id=pod.id, port=port)
        _, fds = await self._node.peers.network.call_fds(request, timeout=_left(call))
        return SessionOpened(fds=["socket"]), fds

    async def _remote_command(self, call: aio.Call, session: str) -> tuple[SessionOpened, FdSet]:
        asked = self._sessions.redeem(session)
        if asked is None:
            raise not_found("there is no such session")
        streams = asked.streams
        request: ExecOpen | AttachOpen
        if asked.kind == "exec":
            self._containers.need_running(asked.container_id)
            request = ExecOpen(
                process=self._process(asked),
                stdin=streams.stdin,
                stdout=streams.stdout,
                stderr=streams.stderr,
                tty=streams.tty,
            )
        else:
            self._attachable(asked.container_id)
            request = AttachOpen(stdin=streams.stdin, stdout=streams.stdout, stderr=streams.stderr)
        log.get().info("session opened", kind=asked.kind, container=asked.container_id, pod=asked.pod_id)
        return await self._node.peers.monitor(asked.container_id).call_fds(request, timeout=_left(call))

    def _process(self, asked: Asked) -> bytes:
        spec = self._node.store.spec(asked.container_id)
        return exec_process(spec, asked.command, tty=asked.streams.tty)


def _left(call: aio.Call) -> float:
    return OPEN_TIMEOUT if call.remaining is None else min(OPEN_TIMEOUT, call.remaining)


def checked(request: pb.ExecRequest | pb.AttachRequest) -> Streams:
    """The streams of a request. Raises INVALID_ARGUMENT for what no client can mean."""
    if not request.container_id:
        raise invalid("the request has no container id")
    if request.tty and request.stderr:
        raise invalid("tty and stderr exclude each other: a terminal has one output")
    if not (request.stdin or request.stdout or request.stderr):
        raise invalid("one of stdin, stdout and stderr must be asked for")
    return Streams(request.stdin, request.stdout, request.stderr, request.tty)


def session_key(path: str) -> bytes:
    """The key that this boot's sessions are signed with, made by the first who needs it. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        key = file.read()
        if len(key) == KEY_SIZE:
            return key
    key = os.urandom(KEY_SIZE)
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(key)
    os.replace(temporary, path)
    return key
