"""Runs in: the tests' supervisor, as every kind of worker.

A worker that does what a file tells it: `<run_root>/faults/<kind>` holds one word of FAULTS. It answers
`storage.fs.info` with its pid, so that a test sees who served it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from ipc.errors import RemoteError
from ipc.loop import Loop
from ipc.messages import control, storage
from ipc.table import Handler, table
from workers import boot, boot_aio

CALLERS = frozenset({"root"})
FAULTS = (
    "",
    "crash",
    "crash-late",
    "mute",
    "lie",
    "stderr",
    "flood",
    "fork",
    "bug",
    "slow-stop",
    "slow-start",
)


def fault(context: boot.Context[Any]) -> str:
    """The word of the kind's fault file."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"{context.settings.run_root}/faults/{context.kind}").read_text().strip()
    return ""


def prepare(context: boot.Context[Any]) -> str:
    word = fault(context)
    if word == "crash":
        os._exit(3)
    if word == "slow-start":
        time.sleep(0.5)
    if word == "bug":
        raise ValueError("a bug that the test ordered")
    return word


def run(context: boot.Context[Any], state: str) -> None:
    context.log.info("fake worker runs", fault=state)
    if state == "lie":
        context.report.uid = 12345
    if state == "mute":
        time.sleep(3600)
    if state == "stderr":
        os.write(2, b"something for standard error\nand more\n")
    if state == "flood":
        for number in range(20_000):
            context.log.info("flood", number=number)
    if state == "fork" and os.fork() == 0:
        os.setsid()
        time.sleep(3600)
    if context.kind == "image":
        asyncio.run(_run_aio(context))
    elif context.kind == "cri":
        asyncio.run(_run_cri(context))
    else:
        _run_loop(context, state)


def _answer(context: boot.Context[Any], limit: int = 0) -> storage.FsInfo:
    return storage.FsInfo(mountpoint=context.kind, used_bytes=os.getpid(), used_inodes=limit)


def _run_loop(context: boot.Context[Any], state: str) -> None:
    loop = Loop()

    def info(_call: object, _body: storage.FsInfoGet) -> storage.FsInfo:
        if state == "hang":
            time.sleep(3600)
        return _answer(context)

    if state == "crash-late":
        loop.call_later(0.1, lambda: os.kill(os.getpid(), signal.SIGSEGV))
    if state == "slow-stop":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        boot.serve(context, loop, {}, on_stop=lambda: time.sleep(3600))
    boot.serve(context, loop, table(Handler(storage.FsInfoGet, info, CALLERS)))


async def _run_aio(context: boot.Context[Any]) -> None:
    async def info(_call: object, _body: storage.FsInfoGet) -> storage.FsInfo:
        return _answer(context)

    handlers = table(Handler(storage.FsInfoGet, info, CALLERS))
    await boot_aio.serve_aio(context, handlers, idle_exit=context.settings.idle_exit)


async def _run_cri(context: boot.Context[Any]) -> None:
    async def hand_over(_path: str) -> None:
        service.stop()

    service = boot_aio.AioService(context, {}, on_hand_over=hand_over)
    await service.start()
    path = f"{context.settings.bind_directory}/{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        try:
            await service.tell(control.SocketBound(path=path))
        except RemoteError as error:
            context.log.error("refused", why=error)
        if context.standby:
            await service.turn()
        await service.wait()
