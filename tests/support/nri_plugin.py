"""Runs in: the tests.

A node resource plugin: the plugin's side of the interface with our own codecs, in threads of the test. Each
request is answered in a thread of its own, so that a handler may block, or ask the runtime for something.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from google.protobuf.message import Message

from ipc.nri import nri_pb2 as pb
from workers.nri import interface, mux, ttrpc

#: Answers a request; None is an empty answer.
Handler = Callable[[Any], Message | None]


class No(Exception):
    """A handler says no."""

    def __init__(self, text: str, code: int = ttrpc.Status.UNKNOWN) -> None:
        super().__init__(text)
        self.code = code


class Plugin:
    """One plugin; `handlers` by the names of calls. Use as a context manager, or `join` and `close`."""

    def __init__(
        self, sock: str | socket.socket, name: str = "test", index: str = "10", **handlers: Handler
    ) -> None:
        self.name, self.index = name, index
        self.handlers = handlers
        self.seen: list[tuple[str, Any]] = []
        self.pods: list[pb.PodSandbox] = []
        self.containers: list[pb.Container] = []
        self.configuration: pb.ConfigureRequest | None = None
        self.synchronized = threading.Event()
        self.closed = threading.Event()
        self._sock = _connected(sock) if isinstance(sock, str) else sock
        self._answerer, self._caller = ttrpc.Answerer(), ttrpc.Caller()
        self._answers: dict[int, ttrpc.Answer] = {}
        self._news = threading.Condition()
        self._sending = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    # -- life -----------------------------------------------------------------------------------------

    def __enter__(self) -> Plugin:
        return self.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def join(self, seconds: float = 20.0) -> Plugin:
        """Register and wait until it is synchronized."""
        self.register()
        assert self.synchronized.wait(seconds), "the plugin was not synchronized"
        return self

    def register(self) -> None:
        """RegisterPlugin."""
        self.ask("RegisterPlugin", pb.RegisterPluginRequest(plugin_name=self.name, plugin_idx=self.index))

    def close(self) -> None:
        """Go away; the other side may be faster."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        assert self.closed.wait(10), "the reader ends with the connection"
        self._sock.close()

    # -- looking --------------------------------------------------------------------------------------

    def events(self, of: str = "") -> list[str]:
        """Names of the events that came, in order; those of one pod or container."""
        return [method for method, request in list(self.seen) if not of or of in _ids(request)]

    def wait_for(self, method: str, of: str = "", seconds: float = 10.0) -> Any:
        """Wait for an event of a pod or container, and return its request."""
        end = time.monotonic() + seconds
        while True:
            for name, request in list(self.seen):
                if name == method and (not of or of in _ids(request)):
                    return request
            assert time.monotonic() < end, f"{method} did not come; there were {self.events()}"
            time.sleep(0.01)

    # -- asking ---------------------------------------------------------------------------------------

    def ask(self, method: str, request: Message, seconds: float = 10.0) -> Any:
        """Call the runtime. Raises No with its words."""
        stream, data = self._caller.ask(interface.RUNTIME, method, request.SerializeToString(), 0)
        self.send(mux.frames(mux.RUNTIME_SERVICE, data))
        with self._news:
            assert self._news.wait_for(lambda: stream in self._answers, seconds), f"{method}: no answer"
            answer = self._answers.pop(stream)
        if answer.code:
            raise No(answer.text, answer.code)
        return interface.RUNTIME_CALLS[method].reply.FromString(answer.payload)

    def update(
        self, updates: Sequence[pb.ContainerUpdate] = (), evict: Sequence[pb.ContainerEviction] = ()
    ) -> list[str]:
        """UpdateContainers; the ids of containers that could not be updated."""
        reply = self.ask("UpdateContainers", pb.UpdateContainersRequest(update=updates, evict=evict), 30)
        return [one.container_id for one in reply.failed]

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        with self._sending:
            self._sock.sendall(data)

    # -- being asked ----------------------------------------------------------------------------------

    def _read(self) -> None:
        demultiplexer = mux.Demultiplexer()
        try:
            while data := self._sock.recv(1 << 16):
                for number, piece in demultiplexer.feed(data):
                    self._piece(number, piece)
        except OSError:
            pass
        self.closed.set()

    def _piece(self, number: int, piece: bytes) -> None:
        if number == mux.RUNTIME_SERVICE:
            for answer in self._caller.feed(piece):
                with self._news:
                    self._answers[answer.stream] = answer
                    self._news.notify_all()
        else:
            for asked in self._answerer.feed(piece):
                threading.Thread(target=self._answer, args=(asked,), daemon=True).start()

    def _answer(self, asked: ttrpc.Asked) -> None:
        try:
            data = self._answerer.answer(asked.stream, self._reply(asked).SerializeToString())
        except No as error:
            data = self._answerer.refuse(asked.stream, error.code, str(error))
        try:
            self.send(mux.frames(mux.PLUGIN_SERVICE, data))
        except OSError:
            return  # the runtime has hung up
        if asked.method == "Synchronize":
            self.synchronized.set()

    def _reply(self, asked: ttrpc.Asked) -> Message:
        call = interface.PLUGIN_CALLS[asked.method]
        request: Any = call.request.FromString(asked.payload)
        default = call.reply()
        if isinstance(request, pb.ConfigureRequest):
            self.configuration = request
        elif isinstance(request, pb.SynchronizeRequest):
            self.pods += request.pods
            self.containers += request.containers
            default = pb.SynchronizeResponse(more=request.more)
        else:
            self.seen.append((asked.method, request))
        handler = self.handlers.get(asked.method)
        reply = handler(request) if handler is not None else None
        return default if reply is None else reply


def _ids(request: Any) -> set[str]:
    names = request.DESCRIPTOR.fields_by_name
    return {getattr(request, name).id for name in ("pod", "container") if name in names}


def _connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    return sock


def main() -> int:
    """As an installed plugin: annotates every container with its configuration, until it is let go."""
    sock = socket.socket(fileno=int(os.environ["NRI_PLUGIN_SOCKET"]))

    def create(_request: pb.CreateContainerRequest) -> Message:
        assert plugin.configuration is not None
        reply = pb.CreateContainerResponse()
        reply.adjust.env.add(key="INSTALLED", value=plugin.configuration.config.strip())
        return reply

    name, index = os.environ["NRI_PLUGIN_NAME"], os.environ["NRI_PLUGIN_IDX"]
    plugin = Plugin(sock, name, index, CreateContainer=create)
    print(f"plugin {index}-{name} runs as uid {os.getuid()}", flush=True)
    plugin.register()
    plugin.closed.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
