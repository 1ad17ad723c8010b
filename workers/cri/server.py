"""Runs in: cri. The gRPC front: what every RPC goes through, whatever it is.

Owns the listening socket, the bound on RPCs in flight, the mapping of errors to statuses, one log line and
one count per RPC. A RemoteError becomes its status; any other exception is a bug of ours: it is logged with
its stack and answered INTERNAL, and the front goes on serving, since a kubelet's other pods need it. RPCs of
the CRI that have no handler answer UNIMPLEMENTED. Nothing is ever answered UNKNOWN.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import grpc
import grpc.aio

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import GRPC_STATUS, Code, RemoteError
from ipc.messages.supervisor import InFlight
from workers.cri import stages
from workers.cri.metrics import RpcStats
from workers.cri.relay import Relay

STATUS_BY_NUMBER = {status.value[0]: status for status in grpc.StatusCode}
MAX_MESSAGE = 3500  # characters of a status text: trailers share one 8 KiB header list
#: Reasons why an image cannot be pulled that kubelets tell their users.
KUBELET_WORDS = frozenset({"RegistryUnavailable", "SignatureValidationFailed"})
#: RPCs that kubelets send every second; their success is logged only at debug level.
QUIET = ("List", "Stream", "Status", "Version", "RuntimeConfig", "ImageFsInfo", "ImageStatus")
#: Streams that last until somebody ends them.
ENDLESS = {"GetContainerEvents"}
#: RPCs that are not begun again at a successor: they need no state any more, and must not happen twice.
FINISHED_HERE = {"ExecSync"}
AGE_JITTER = 1.1  # gRPC takes up to a tenth more or less than the age that it is told
LINGER = 1.0  # seconds between the last answer and the end
SETTLE = 2.0  # seconds for what is going on when a successor takes over


@dataclass
class Rpc:
    """One RPC in the hands of its handler."""

    name: str
    number: int
    context: grpc.aio.ServicerContext[Any, Any]
    subject: Mapping[str, str] = field(default_factory=dict)  # what it is about, for the log
    since: float = field(default_factory=time.monotonic)
    waits: list[str] = field(default_factory=list)  # messages to other processes that it waits for
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    moved: bool = False  # it goes on at the successor

    def timeout(self, most: float) -> float:
        """Seconds that what answers this RPC may take: the client's deadline, and at most `most`."""
        left = self.context.time_remaining()
        return most if left is None else max(0.0, min(left, most))


Handler = Callable[[Rpc, Any], Awaitable[Any]]
StreamHandler = Callable[[Rpc, Any], AsyncIterator[Any]]
Streamer = Callable[[bytes], AsyncIterator[bytes]]


class Front:
    """The gRPC server. `open()` lets requests through; until then they wait."""

    def __init__(
        self, stats: RpcStats, *, max_requests: int, max_message_bytes: int, max_connection_age: float = 60.0
    ) -> None:
        self._stats = stats
        self._max_requests = max_requests
        self._numbers = count(1)
        self._running: dict[int, Rpc] = {}
        self._open = asyncio.Event()
        self._streams: set[asyncio.Task[Any] | None] = set()
        self._relay: Relay | None = None  # once a successor has taken over
        self._passed = 0  # RPCs that it is serving for us
        self._leaving = False
        self._max_message_bytes, self._age = max_message_bytes, max_connection_age
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),
            # Not for its own sake: after a server's stop begins it kills RPCs that cross its goodbye, but one
            # that is said because of age is heard by clients without a loss.
            ("grpc.max_connection_age_ms", int(max_connection_age * 1000)),
        ]
        self._server = grpc.aio.server(options=options)

    # -- set-up ---------------------------------------------------------------------------------------

    def add_service(
        self,
        name: str,
        handlers: Mapping[str, Handler],
        streams: Mapping[str, StreamHandler],
    ) -> None:
        """Serve one service of the CRI. Raises ValueError if a handler is of no RPC, or of the wrong kind."""
        described = pb.DESCRIPTOR.services_by_name[name]
        methods = described.methods_by_name
        for given, streaming in ((handlers, False), (streams, True)):
            right = {rpc for rpc, method in methods.items() if method.server_streaming is streaming}
            if unknown := given.keys() - right:
                raise ValueError(f"{name} has no RPC {sorted(unknown)} with streaming={streaming}")
        rows: dict[str, Any] = {
            rpc: self._stream_row(methods[rpc], streams.get(rpc))
            if methods[rpc].server_streaming
            else self._row(methods[rpc], handlers.get(rpc))
            for rpc in methods
        }
        handler = grpc.method_handlers_generic_handler(described.full_name, rows)
        self._server.add_generic_rpc_handlers((handler,))

    def add_stream(self, service: str, method: str, streamer: Streamer) -> None:
        """Serve one server stream of plain bytes, beside the CRI."""

        async def serve(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
            self._streams.add(task := asyncio.current_task())
            try:
                await self._open.wait()
                if self._relay is not None:
                    streamer_ = self._relay
                    async for item in streamer_.stream(f"/{service}/{method}", request, context):
                        yield item
                    return
                async for item in streamer(request):
                    yield item
            finally:
                self._streams.discard(task)

        rows: dict[str, Any] = {method: grpc.unary_stream_rpc_method_handler(serve)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, rows),))

    def _row(self, method: Any, handler: Handler | None) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler or unimplemented),
            request_deserializer=getattr(pb, method.input_type.name).FromString,
            response_serializer=to_bytes,
        )

    def _stream_row(self, method: Any, handler: StreamHandler | None) -> grpc.RpcMethodHandler[Any, Any]:
        serve: Any = self._streaming(method, handler or unimplemented_stream)
        return grpc.unary_stream_rpc_method_handler(
            serve,
            request_deserializer=getattr(pb, method.input_type.name).FromString,
            response_serializer=to_bytes,
        )

    # -- life -----------------------------------------------------------------------------------------

    async def start(self, path: str) -> None:
        """Bind at a path and accept. Raises RuntimeError if it cannot be bound."""
        self._server.add_insecure_port(f"unix:{path}")
        await self._server.start()

    def open(self) -> None:
        """The state is loaded: serve."""
        self._open.set()

    async def stop(self, grace: float) -> None:
        """Accept no more, give running RPCs `grace` seconds. Endless streams get none."""
        self._end_streams()
        await self._server.stop(grace)

    def _end_streams(self) -> None:
        for task in self._streams:
            if task is not None:
                task.cancel()

    # -- a successor ------------------------------------------------------------------------------------

    def pass_on(self, path: str) -> None:
        """What is asked from now on is passed on to the successor; endless streams end in order."""
        self._relay = Relay(path, self._max_message_bytes)
        self._end_streams()

    async def settled(self, busy: Callable[[], bool]) -> None:
        """Wait until what had begun is over, but not for long, nor for what is finished here anyway."""
        end = time.monotonic() + SETTLE
        while (self._unfinished() or busy()) and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def _unfinished(self) -> list[Rpc]:
        return [rpc for rpc in self._running.values() if rpc.name not in FINISHED_HERE]

    def move(self) -> None:
        """What is not over by now goes on at the successor."""
        for rpc in self._unfinished():
            rpc.moved = True
            if rpc.task is not None:
                rpc.task.cancel()

    async def drained(self) -> None:
        """Return when clients have connected to the successor and nothing is served here any more."""
        await asyncio.sleep(self._age * AGE_JITTER + SETTLE)
        while self._running or self._passed:
            await asyncio.sleep(0.1)
        self._leaving = True
        self._end_streams()
        while self._streams:
            await asyncio.sleep(0.01)
        # What was answered last must be read by then: an end with unread data resets the connection.
        await asyncio.sleep(LINGER)

    def in_flight(self) -> list[InFlight]:
        """What is being served."""
        now = time.monotonic()
        return [
            InFlight(
                type=rpc.name,
                age_ms=int((now - rpc.since) * 1000),
                peer="kubelet",
                doing=", ".join(rpc.waits),
            )
            for rpc in self._running.values()
        ]

    # -- one RPC --------------------------------------------------------------------------------------

    def _unary(self, method: Any, handler: Handler) -> Callable[[Any, Any], Awaitable[Any]]:
        async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if self._relay is not None:
                return await self._pass(method, request, context)
            rpc = Rpc(method.name, next(self._numbers), context, subject_of(request))
            try:
                answer, error = await self._serve(rpc, handler, request)
            except asyncio.CancelledError:
                if not rpc.moved or rpc.task is None:
                    raise
                rpc.task.uncancel()
                return await self._pass(method, request, context)
            if error is not None:
                await context.abort(status_of(error), error.message[:MAX_MESSAGE])
            return answer

        return serve

    async def _pass(self, method: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        assert self._relay is not None
        self._passed += 1
        try:
            return await self._relay.unary(_path(method), request.SerializeToString(), context)
        finally:
            self._passed -= 1

    async def _pass_stream(
        self, method: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[bytes, None]:
        assert self._relay is not None
        self._streams.add(task := asyncio.current_task())
        try:
            async for message in self._relay.stream(_path(method), request.SerializeToString(), context):
                yield message
        except asyncio.CancelledError:
            if not self._leaving or task is None:
                raise
            task.uncancel()
        finally:
            self._streams.discard(task)

    async def _serve(self, rpc: Rpc, handler: Handler, request: Any) -> tuple[Any, RemoteError | None]:
        answer, error = None, None
        code: str = Code.CANCELLED  # unless it comes to an end of its own
        self._running[rpc.number] = rpc
        stages.waits.set(rpc.waits)
        try:
            self._admit()
            await self._open.wait()
            answer = await handler(rpc, request)
            code = "ok"
        except RemoteError as known:
            code, error = known.code, known
        except Exception as bug:  # noqa: BLE001 - logged with its stack; other pods must still be served
            log.get().bug("rpc crashed", bug, rpc=rpc.name, request=rpc.number)
            code, error = Code.INTERNAL, bug_of(rpc)
        finally:
            del self._running[rpc.number]
            self._note(rpc, "moved" if rpc.moved else code, "" if error is None else error.message)
        return answer, error

    def _admit(self) -> None:
        if len(self._running) > self._max_requests:
            raise RemoteError(
                Code.RESOURCE_EXHAUSTED, f"{self._max_requests} requests are being served already; try again"
            )

    def _note(self, rpc: Rpc, code: str, text: str) -> None:
        seconds = time.monotonic() - rpc.since
        if rpc.name not in ENDLESS:
            self._stats.observe(rpc.name, seconds, failed=code not in {"ok", "moved"})
        fields: dict[str, Any] = {"rpc": rpc.name, "request": rpc.number, "code": code}
        fields |= {"ms": round(seconds * 1000, 1), **rpc.subject}
        if text:
            fields["error"] = text
        quiet = code == "ok" and rpc.name.startswith(QUIET)
        quiet |= code == "ok" and rpc.name.endswith(("Status", "Stats"))
        (log.get().debug if quiet else log.get().info)("rpc", **fields)

    def _streaming(self, method: Any, handler: StreamHandler) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            if self._relay is not None:
                async with contextlib.aclosing(self._pass_stream(method, request, context)) as passed:
                    async for message in passed:
                        yield message
                return
            rpc = Rpc(method.name, next(self._numbers), context)
            end = _End()
            task = self._streams_begin(rpc)
            try:
                self._admit()
                await self._open.wait()
                async with contextlib.aclosing(_ended(handler, rpc, request, end)) as messages:
                    async for message in messages:
                        yield message
            except RemoteError as known:
                end.code, end.error = known.code, known
            except asyncio.CancelledError:
                if self._relay is None or task is None:
                    raise
                task.uncancel()  # an end in order: the client asks again, and the successor answers
            finally:
                self._streams_end(rpc, task)
                self._note(rpc, end.code, "" if end.error is None else end.error.message)
            if end.error is not None:
                await context.abort(status_of(end.error), end.error.message[:MAX_MESSAGE])

        return serve

    def _streams_begin(self, rpc: Rpc) -> asyncio.Task[Any] | None:
        """Lists in pieces count among the RPCs in flight like others. Endless streams do not: they would use
        the bound up, and their age means nothing."""
        if rpc.name not in ENDLESS:
            self._running[rpc.number] = rpc
            return None
        task = asyncio.current_task()
        self._streams.add(task)
        return task

    def _streams_end(self, rpc: Rpc, task: asyncio.Task[Any] | None) -> None:
        self._running.pop(rpc.number, None)
        self._streams.discard(task)


@dataclass
class _End:
    """How a stream ended."""

    code: str = Code.CANCELLED  # unless it comes to an end of its own
    error: RemoteError | None = None


async def _ended(handler: StreamHandler, rpc: Rpc, request: Any, end: _End) -> AsyncGenerator[Any, None]:
    """What a handler yields; its end, or how it failed, is noted."""
    try:
        async for message in handler(rpc, request):
            yield message
        end.code = "ok"
    except RemoteError as known:
        end.code, end.error = known.code, known
    except Exception as bug:  # noqa: BLE001 - logged with its stack; other pods must still be served
        log.get().bug("rpc crashed", bug, rpc=rpc.name, request=rpc.number)
        end.code, end.error = Code.INTERNAL, bug_of(rpc)


def _path(method: Any) -> str:
    """The name of an RPC in gRPC."""
    return f"/{method.containing_service.full_name}/{method.name}"


def bug_of(rpc: Rpc) -> RemoteError:
    """What a client is told of a bug."""
    return RemoteError(Code.INTERNAL, f"{rpc.name}: a bug in cri, see its log")


def to_bytes(message: Any) -> bytes:
    """Serialize a message; what is bytes already (a list that was kept) stays."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def subject_of(request: Any) -> dict[str, str]:
    """The pod, container or image that a request names, for its log line."""
    named = {
        "pod": getattr(request, "pod_sandbox_id", ""),
        "container": getattr(request, "container_id", ""),
        "image": getattr(getattr(request, "image", None), "image", ""),
        "name": getattr(getattr(getattr(request, "config", None), "metadata", None), "name", ""),
    }
    return {key: value[:200] for key, value in named.items() if value}


async def unimplemented(rpc: Rpc, _request: Any) -> Any:
    """The handler of RPCs that have none."""
    raise RemoteError(Code.UNIMPLEMENTED, f"{rpc.name} is not implemented")


async def unimplemented_stream(rpc: Rpc, request: Any) -> AsyncIterator[Any]:
    """The same for streams."""
    yield await unimplemented(rpc, request)


def status_of(error: RemoteError) -> grpc.StatusCode:
    """The gRPC status of an error.

    Kubelets look for these words at the beginning of what PullImage says, and find them only in errors of
    status UNKNOWN: before any other text they put the status.
    """
    if error.reason in KUBELET_WORDS:
        return grpc.StatusCode.UNKNOWN
    return STATUS_BY_NUMBER[GRPC_STATUS[error.code]]
