"""Both faces over real sockets, with peers that die, lie, or do not read."""

from __future__ import annotations

import array
import asyncio
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from ipc import aio, blocking, channel, serve, wire
from ipc.calls import Packet
from ipc.channel import Channel, Peer
from ipc.errors import Code, RemoteError
from ipc.fds import FdSet
from ipc.loop import Loop
from ipc.messages import Body, Empty, Request, storage
from ipc.table import Handler, Handlers, table

R = TypeVar("R", bound=Body)
LAYER = storage.LayerBegin(chain_id="c", parent="", diff_id="d", blob_digest="b", blob_size=1, media_type="m")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_descriptor_leaks() -> Iterator[None]:
    gc.collect()  # what other tests left to the collector
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before


class Forked:
    """A server in a child process; the listening socket stays here, as it stays with the supervisor."""

    def __init__(self, path: Path, handlers: Callable[[Loop], Handlers]) -> None:
        self.path = str(path)
        self.listener = channel.listen(self.path)
        self._handlers = handlers
        self.pid = 0

    def start(self) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                loop = Loop()
                serve.Server(loop, self._handlers(loop), {}).listen(self.listener)
                loop.run()
            finally:
                os._exit(1)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def close(self) -> None:
        self.kill()
        self.listener.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[Callable[[Loop], Handlers]], Forked]]:
    made: list[Forked] = []

    def make(handlers: Callable[[Loop], Handlers]) -> Forked:
        made.append(Forked(tmp_path / "s.sock", handlers))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close()


def pipe_handlers(_loop: Loop) -> Handlers:
    def begin(call: serve.Call, _body: storage.LayerBegin) -> None:
        read, write = os.pipe()
        os.close(read)
        call.reply(storage.LayerBegun(present=False), [write])

    def abort(_call: serve.Call, _body: storage.LayerAbort) -> Empty:
        return Empty()

    def image(_call: serve.Call, body: storage.ImageGet) -> storage.ImageFound:
        record = storage.ImageRecord(id=body.reference, config=b"c" * 300_000)
        return storage.ImageFound(image=record)

    def never(_call: serve.Call, _body: storage.FsInfoGet) -> None:
        return None

    return table(
        Handler(storage.LayerBegin, begin, {"root"}),
        Handler(storage.LayerAbort, abort, {"root"}),
        Handler(storage.ImageGet, image, {"root"}),
        Handler(storage.FsInfoGet, never, {"root"}),
    )


Make = Callable[[Callable[[Loop], Handlers]], Forked]


@pytest.mark.usefixtures("no_descriptor_leaks")
def test_descriptors_arrive_and_none_leaks(tmp_path: Path) -> None:
    one = Forked(tmp_path / "s.sock", pipe_handlers)
    one.start()
    with blocking.Client(one.path, timeout=5) as client:
        body, fds = client.call_fds(LAYER)
        assert not body.present
        with fds:
            assert os.readlink(f"/proc/self/fd/{fds.get()}").startswith("pipe:")
        assert client.call(LAYER) == storage.LayerBegun(present=False)  # nobody takes the descriptor
    one.close()


def test_a_large_body_travels_in_a_memfd_and_comes_whole(server: Make) -> None:
    one = server(pipe_handlers)
    with blocking.Client(one.path, timeout=5) as client:
        found = client.call(storage.ImageGet(reference="r" * 100_000))
    assert found.image is not None
    assert found.image.id == "r" * 100_000
    assert len(found.image.config) == 300_000


def test_a_deadline_ends_a_call_that_nobody_answers(server: Make) -> None:
    one = server(pipe_handlers)
    with blocking.Client(one.path) as client:
        with pytest.raises(RemoteError) as caught:
            client.call(storage.FsInfoGet(), timeout=0.1)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        client.call(storage.LayerAbort(chain_id="x"), timeout=5)


def test_a_call_waits_in_the_backlog_while_the_server_is_dead(server: Make) -> None:
    one = server(pipe_handlers)
    one.kill()
    timer = threading.Timer(0.2, one.start)
    timer.start()

    assert asyncio.run(ask_once(one.path, storage.LayerAbort(chain_id="x"))) == Empty()
    timer.join()


async def ask_once(path: str, request: Request[R]) -> R:
    client = aio.Client(path)
    try:
        return await client.call(request, timeout=5)
    finally:
        await client.close()


def dies_once(marker: Path) -> Callable[[Loop], Handlers]:
    def handlers(_loop: Loop) -> Handlers:
        def abort(_call: serve.Call, _body: storage.LayerAbort) -> Empty:
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return Empty()

        def put(_call: serve.Call, _body: storage.LayerBegin) -> Empty:
            os.kill(os.getpid(), signal.SIGKILL)
            return Empty()

        return table(Handler(storage.LayerAbort, abort, {"root"}), Handler(storage.LayerBegin, put, {"root"}))

    return handlers


@pytest.mark.parametrize("face", ["aio", "blocking"])
def test_an_idempotent_request_is_sent_again_to_the_next_server(
    server: Make, tmp_path: Path, face: str
) -> None:
    one = server(dies_once(tmp_path / "died"))

    def revive() -> None:
        os.waitpid(one.pid, 0)
        one.start()

    thread = threading.Thread(target=revive)
    thread.start()
    request = storage.LayerAbort(chain_id="x")
    if face == "blocking":
        with blocking.Client(one.path, timeout=5) as client:
            assert client.call(request) == Empty()
    else:
        assert asyncio.run(ask_once(one.path, request)) == Empty()
    thread.join()
    assert (tmp_path / "died").exists()


def test_a_request_that_is_not_idempotent_ends_as_unavailable(tmp_path: Path) -> None:
    class Once(storage.LayerBegin):
        NAME = "storage.layer.begin"
        REPLY = storage.LayerBegun
        IDEMPOTENT = False

    one = Forked(tmp_path / "s.sock", dies_once(tmp_path / "died"))
    one.start()
    request = Once(**msgspec.structs.asdict(LAYER))
    with pytest.raises(RemoteError) as caught:
        asyncio.run(ask_once(one.path, request))
    assert caught.value.code is Code.UNAVAILABLE
    os.waitpid(one.pid, 0)
    one.pid = 0
    one.close()


# -- raw peers against a Channel --------------------------------------------------------------------------


def test_a_peer_that_dies_with_unread_data_gives_what_it_sent_and_then_the_end() -> None:
    mine, theirs = channel.pair()
    mine.send(b"never read")
    theirs.send(b"last words")
    theirs.close()
    ours = Channel(mine)
    packet = ours.receive()
    assert packet is not None
    assert packet[0] == b"last words"
    assert ours.receive() is None
    ours.close()


@pytest.mark.usefixtures("no_descriptor_leaks")
def test_truncated_control_data_is_a_protocol_error_and_leaks_nothing() -> None:
    mine, theirs = channel.pair()
    null = os.open("/dev/null", os.O_RDONLY)
    rights = array.array("i", [null] * (wire.FD_LIMIT + 4))
    theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    ours = Channel(mine)
    with pytest.raises(wire.ProtocolError):
        ours.receive()
    ours.close()
    theirs.close()
    os.close(null)


def test_a_peer_that_never_reads_is_bounded_and_then_refused() -> None:
    mine, theirs = channel.pair()
    ours = Channel(mine)
    packet = b"x" * 60_000
    with pytest.raises(channel.PeerStalled):
        for _ in range(channel.QUEUE_PACKETS + 1000):
            ours.send(Packet(packet, FdSet()))
    ours.close()
    theirs.close()


@pytest.mark.usefixtures("no_descriptor_leaks")
def test_more_descriptors_than_announced_close_the_connection() -> None:
    mine, theirs = channel.pair()
    loop = Loop()
    connection = serve.Connection(loop, mine, Peer(1, 0, 0, "root"), pipe_handlers(loop))
    null = os.open("/dev/null", os.O_RDONLY)
    head = wire.encode_head(wire.Kind.REQUEST, 1, type_="storage.layer.abort", body=b"\x80")
    theirs.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null]))])
    loop.turn(1)
    assert connection.closed
    os.close(null)
    theirs.close()
    loop.close()


def test_descriptors_that_a_message_may_not_carry_are_refused() -> None:
    answers = raw_request("storage.layer.abort", wire.encode_body(storage.LayerAbort(chain_id="x")), fds=1)
    assert wire.decode_error(answers.body).code is Code.INVALID_ARGUMENT


def test_an_unknown_type_over_a_socket_is_unimplemented() -> None:
    assert wire.decode_error(raw_request("a.b.c", b"\x80").body).code is Code.UNIMPLEMENTED


def raw_request(type_: str, body: bytes, fds: int = 0) -> wire.Envelope:
    mine, theirs = channel.pair()
    loop = Loop()
    connection = serve.Connection(loop, mine, Peer(1, 0, 0, "root"), pipe_handlers(loop))
    null = os.open("/dev/null", os.O_RDONLY)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * fds))] if fds else []
    theirs.sendmsg([wire.encode_head(wire.Kind.REQUEST, 1, type_=type_, fds=fds, body=body)], rights)
    loop.turn(1)
    head = wire.decode_head(theirs.recv(wire.PACKET_LIMIT))
    assert head.kind == wire.Kind.ERROR
    assert not connection.closed
    connection.close()
    os.close(null)
    theirs.close()
    loop.close()
    return head


def test_an_unsealed_body_memfd_closes_the_connection() -> None:
    mine, theirs = channel.pair()
    loop = Loop()
    connection = serve.Connection(loop, mine, Peer(1, 0, 0, "root"), pipe_handlers(loop))
    memfd = os.memfd_create("loose")
    os.write(memfd, b"\x80")
    head = wire.encode_head(wire.Kind.REQUEST, 1, type_="storage.layer.abort", body=None)
    theirs.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memfd]))])
    loop.turn(1)
    assert connection.closed
    os.close(memfd)
    theirs.close()
    loop.close()


def test_a_call_is_abandoned_when_its_caller_goes() -> None:
    mine, theirs = channel.pair()
    loop = Loop()
    abandoned: list[str] = []

    def never(call: serve.Call, _body: Body) -> None:
        call.on_abandon(lambda: abandoned.append(call.type))

    handlers = table(Handler(storage.FsInfoGet, never, {"root"}))
    connection = serve.Connection(loop, mine, Peer(1, 0, 0, "root"), handlers)
    theirs.send(wire.encode_head(wire.Kind.REQUEST, 1, type_="storage.fs.info", body=b"\x80"))
    loop.turn(1)
    assert len(connection.in_flight) == 1
    theirs.close()
    loop.turn(1)
    assert abandoned == ["storage.fs.info"]
    assert connection.closed
    loop.close()


def test_a_deadline_that_travels_ends_the_call_at_the_receiver() -> None:
    mine, theirs = channel.pair()
    loop = Loop()
    serve.Connection(loop, mine, Peer(1, 0, 0, "root"), pipe_handlers(loop))
    deadline = time.monotonic_ns() + 50_000_000
    theirs.send(
        wire.encode_head(wire.Kind.REQUEST, 1, type_="storage.fs.info", deadline_ns=deadline, body=b"\x80")
    )
    end = time.monotonic() + 5
    while time.monotonic() < end:
        loop.turn(0.1)
        try:
            head = wire.decode_head(theirs.recv(wire.PACKET_LIMIT))
            break
        except BlockingIOError:
            continue
    assert wire.decode_error(head.body).code is Code.DEADLINE_EXCEEDED
    assert time.monotonic_ns() >= deadline
    theirs.close()
    loop.close()


def test_the_asyncio_server_answers_cancels_and_reports_its_bugs(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")

    async def scenario() -> None:
        cancelled = asyncio.Event()

        async def slow(_call: aio.Call, _body: Body) -> Empty:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return Empty()

        async def bug(_call: aio.Call, _body: Body) -> Empty:
            raise KeyError("ours")

        async def abort(call: aio.Call, body: storage.LayerAbort) -> Empty:
            assert call.caller == "root"
            if body.chain_id == "bad":
                raise RemoteError(Code.NOT_FOUND, "no such chain")
            return Empty()

        handlers = table(
            Handler(storage.FsInfoGet, slow, {"root"}),
            Handler(storage.ImageList, bug, {"root"}),
            Handler(storage.LayerAbort, abort, {"root"}),
        )
        listener = channel.listen(path)
        server = aio.Server(handlers, {})
        server.start(listener)
        client = aio.Client(path)
        assert await client.call(storage.LayerAbort(chain_id="x")) == Empty()
        with pytest.raises(RemoteError, match="no such chain"):
            await client.call(storage.LayerAbort(chain_id="bad"))
        task = asyncio.create_task(client.call(storage.FsInfoGet()))
        await asyncio.sleep(0.05)
        assert [one.type for one in server.in_flight()] == ["storage.fs.info"]
        task.cancel()
        await asyncio.wait_for(cancelled.wait(), 5)
        with pytest.raises(RemoteError) as caught:
            await client.call(storage.ImageList())
        assert caught.value.code is Code.INTERNAL
        assert isinstance(server.failed.exception(), KeyError)
        await client.close()
        await server.close()
        listener.close()

    asyncio.run(scenario())


def test_a_path_that_is_too_long_for_a_socket_address_works_all_the_same(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    one = Forked(deep / "s.sock", pipe_handlers)
    one.start()
    request = storage.LayerAbort(chain_id="x")
    with blocking.Client(one.path, timeout=5) as client:
        assert client.call(request) == Empty()
    assert asyncio.run(ask_once(one.path, request)) == Empty()
    one.close()
