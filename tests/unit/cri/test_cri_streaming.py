"""Exec, Attach and PortForward at cri: what is refused, what a token is worth, which descriptors come."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError
from ipc.messages.cri import Redeemed, SessionOpen, TokenRedeem
from ipc.messages.monitor import ExecOpen
from tests.support.cri_world import Worker, World
from tests.unit.cri.test_cri_server import failure, play
from workers.cri.tokens import LIMIT, Signer, Tokens

URL = "http://127.0.0.1:1234"


@dataclass
class FakeCall:
    """As much of a call as the handlers look at."""

    reply_fds: list[int] = field(default_factory=list)
    remaining: float | None = None


async def redeem(worker: Worker, url: str, kind: str = "") -> Redeemed:
    base, _, path = url.partition("4/")
    assert base + "4" == URL
    named, token = path.split("/")
    call: Any = FakeCall()
    return await worker.service.streaming.redeem(call, TokenRedeem(token=token, kind=kind or named))


async def opened(worker: Worker, session: str, port: int = 0) -> tuple[list[str], str]:
    call: Any = FakeCall()
    answer = await worker.service.streaming.open(call, SessionOpen(session=session, port=port))
    [fd] = call.reply_fds
    with open(fd) as file:
        return answer.fds, file.read()


async def refused(step: Any, code: Code) -> None:
    with pytest.raises(RemoteError) as caught:
        await step
    assert caught.value.code is code


def exec_request(container: str, **fields: Any) -> pb.ExecRequest:
    return pb.ExecRequest(container_id=container, **{"cmd": ["id", "-u"], "stdout": True, **fields})


def test_a_token_is_good_once_and_for_its_kind_and_opens_one_session() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod, container = await worker.running()
        request = exec_request(container[:12], stdin=True, stderr=True)
        url = (await worker.runtime.Exec(request)).url
        redeemed = await redeem(worker, url)
        assert (redeemed.pod_id, redeemed.container_id) == (pod, container)
        assert (redeemed.stdin, redeemed.stdout, redeemed.stderr, redeemed.tty) == (True, True, True, False)
        assert redeemed.pod_uid == world_uid(worker, pod)
        await refused(redeem(worker, url), Code.NOT_FOUND)
        assert await opened(worker, redeemed.session) == (["stdout"], "id -u")
        [asked] = world.asked(ExecOpen)
        assert (asked.stdin, asked.stdout, asked.stderr, asked.tty) == (True, True, True, False)
        await refused(opened(worker, redeemed.session), Code.NOT_FOUND)
        other = (await worker.runtime.Exec(exec_request(container))).url
        await refused(redeem(worker, other, "attach"), Code.NOT_FOUND)
        await refused(redeem(worker, other), Code.NOT_FOUND)  # a try for another kind has used it up

    play(scenario, stream_url=URL)


def world_uid(worker: Worker, pod: str) -> str:
    return worker.node.store.pods[pod].config.metadata.uid


def test_attach_joins_and_port_forward_survives_a_new_cri() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod, container = await worker.running()
        url = (await worker.runtime.Attach(pb.AttachRequest(container_id=container, stdout=True))).url
        assert await opened(worker, (await redeem(worker, url)).session) == (["stdout"], "attached")
        url = (await worker.runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod, port=[80]))).url
        forward = await redeem(worker, url)
        assert forward.ports == [80]
        assert forward.container_id == ""
        assert await opened(worker, forward.session, 80) == (["socket"], f"{pod}:80")
        await refused(opened(worker, forward.session, 70000), Code.INVALID_ARGUMENT)
        forged = forward.session[:-2] + ("AA" if forward.session[-2:] != "AA" else "BB")
        await refused(opened(worker, forged, 80), Code.NOT_FOUND)
        key = os.stat(world.root / "cri" / "session.key")
        assert key.st_mode & 0o777 == 0o600
        await worker.crash()
        second = await Worker(world, stream_url=URL).start()
        try:
            assert await opened(second, forward.session, 81) == (["socket"], f"{pod}:81")
            await second.stop_pod(pod)
            await refused(opened(second, forward.session, 81), Code.FAILED_PRECONDITION)
        finally:
            await second.close()

    play(scenario, stream_url=URL)


def test_what_no_client_can_mean_is_refused_before_there_is_a_token() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        _pod, container = await worker.running()
        runtime = worker.runtime
        bad, absent, state = (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.FAILED_PRECONDITION,
        )
        for step, code in (
            (runtime.Exec(exec_request("")), bad),
            (runtime.Exec(exec_request(container, cmd=[])), bad),
            (runtime.Exec(exec_request(container, cmd=["a\0b"])), bad),
            (runtime.Exec(exec_request(container, tty=True, stderr=True)), bad),
            (runtime.Exec(exec_request(container, stdout=False)), bad),
            (runtime.Exec(exec_request("f" * 64)), absent),
            (runtime.Attach(pb.AttachRequest(container_id=container)), bad),
            (runtime.Attach(pb.AttachRequest(container_id="f" * 64, stdout=True)), absent),
            (runtime.PortForward(pb.PortForwardRequest()), bad),
            (runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id="f" * 64)), absent),
            (runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id="f" * 64, port=[0])), bad),
        ):
            assert (await failure(step))[0] == code
        url = (await runtime.Exec(exec_request(container))).url
        await worker.stop_container(container)
        assert (await failure(runtime.Exec(exec_request(container))))[0] == state
        attach = pb.AttachRequest(container_id=container, stdout=True)
        assert (await failure(runtime.Attach(attach)))[0] == state
        session = (await redeem(worker, url)).session  # given while it ran
        await refused(opened(worker, session), Code.FAILED_PRECONDITION)

    play(scenario, stream_url=URL)


def test_only_so_many_wait() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        _pod, container = await worker.running()
        for _ in range(LIMIT):
            worker.service.streaming.exec(exec_request(container))
        code, text = await failure(worker.runtime.Exec(exec_request(container)))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(LIMIT) in text

    play(scenario)


def test_tokens_live_a_minute_and_make_room() -> None:
    now = 0.0
    tokens: Tokens[str] = Tokens(limit=2, clock=lambda: now)
    first = tokens.issue("a")
    now = 30.0
    second = tokens.issue("b")
    with pytest.raises(RemoteError):
        tokens.issue("c")
    now = 60.0
    assert tokens.redeem(first) is None
    assert len(tokens) == 1
    third = tokens.issue("c")
    assert tokens.redeem(second) == "b"
    assert tokens.redeem(second) is None
    assert tokens.redeem(third[:-1]) is None
    assert tokens.redeem(third) == "c"
    assert len({tokens.issue("x"), tokens.issue("y"), first, second, third}) == 5


def test_only_the_one_who_signed_a_name_knows_it() -> None:
    name = Signer(b"k" * 32).name("pod.1")
    assert Signer(b"k" * 32).pod(name) == "pod.1"
    assert Signer(b"k" * 32).pod("whatever") is None
    for key, tried in ((b"K", name), (b"k", name + "A"), (b"k", name.replace("pod.1", "pod.2"))):
        with pytest.raises(RemoteError):
            Signer(key * 32).pod(tried)


def test_a_session_waits_until_the_state_is_loaded() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        streaming = worker.service.streaming
        streaming._ready.clear()
        call: Any = FakeCall()
        waiting = asyncio.ensure_future(streaming.open(call, SessionOpen(session="none")))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        streaming.open_sessions()
        await refused(waiting, Code.NOT_FOUND)

    play(scenario)
