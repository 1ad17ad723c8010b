"""Runs in: the tests. What clients do while somebody is struck.

Each `Operation` prepares what it needs, acts, says what must be true afterwards, and takes itself back. A
subject is "name pod container" as far as there is each.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from ipc.cri import api_pb2 as cri
from tests.crash.crash_world import SLEEP, World
from tests.support.stream_clients import WebSocket

ECHO = "while read x; do echo got $x; done; exit 3"
ROUNDS = 5  # of question and answer in a session
SESSION_SECONDS = 40.0


class SessionRefused(Exception):
    """A session did not begin: who knew of its URL, or was just opening it, has died."""


class SessionBroken(Exception):
    """A session ended before its command did."""


class CommandStruck(Exception):
    """A signal ended the command of an exec: the runtime's child that was struck had become it."""


@dataclass
class Operation:
    """One operation of a client; when the runtime was away, `act` is done again with the same arguments."""

    name: str
    prepare: Callable[[World], str]
    act: Callable[[World, str], object]
    check: Callable[[World, str, object], None]
    undo: Callable[[World, str, object], None]


def _nothing(_world: World) -> str:
    return ""


def _idle_check(world: World, _name: str, _result: object) -> None:
    assert world.pods() == {world.witness_pod: cri.SANDBOX_READY}


def _already_gone(_world: World, _subject: str, _result: object) -> None:
    return None


# -- images ---------------------------------------------------------------------------------------------


def _pulled(world: World, _name: str, _result: object) -> None:
    status = cri.ImageStatusRequest(image=cri.ImageSpec(image=world.pulled_again))
    assert world.node.images.ImageStatus(status, timeout=10).image.id


def _pull(world: World, _name: str) -> object:
    request = cri.PullImageRequest(image=cri.ImageSpec(image=world.pulled_again))
    return world.node.images.PullImage(request, timeout=60)


def _unpull(world: World, _name: str, _result: object) -> None:
    request = cri.RemoveImageRequest(image=cri.ImageSpec(image=world.pulled_again))
    world.node.images.RemoveImage(request, timeout=30)


# -- pods -----------------------------------------------------------------------------------------------


def _fresh_pod_name(world: World) -> str:
    return world.fresh("run")


def _pod(world: World) -> str:
    name = world.fresh("pod")
    return f"{name} {world.run_pod(name)}"


def _is_ready(world: World, _name: str, result: object) -> None:
    assert world.pods() == {world.witness_pod: cri.SANDBOX_READY, str(result): cri.SANDBOX_READY}


def _remove_pod(world: World, _name: str, result: object) -> None:
    world.stop_pod(str(result))
    world.remove_pod(str(result))


def _undo_subject(world: World, subject: str, _result: object) -> None:
    _remove_pod(world, "", subject.split()[1])


def _stop_pod(world: World, subject: str) -> object:
    world.stop_pod(subject.split()[1])
    return subject


def _is_stopped(world: World, subject: str, _result: object) -> None:
    _name, pod, container = subject.split()
    assert world.pods() == {world.witness_pod: cri.SANDBOX_READY, pod: cri.SANDBOX_NOTREADY}
    assert world.states() == {world.witness: cri.CONTAINER_RUNNING, container: cri.CONTAINER_EXITED}


def _remove(world: World, subject: str) -> object:
    world.remove_pod(subject.split()[1])
    return subject


def _is_gone(world: World, _subject: str, _result: object) -> None:
    assert world.pods() == {world.witness_pod: cri.SANDBOX_READY}
    assert world.states() == {world.witness: cri.CONTAINER_RUNNING}


# -- containers -----------------------------------------------------------------------------------------


def _create(world: World, subject: str) -> str:
    name, pod = subject.split()
    return world.create(pod, name, SLEEP)


def _created(world: World) -> str:
    subject = _pod(world)
    return f"{subject} {_create(world, subject)}"


def _started(world: World) -> str:
    subject = _created(world)
    world.start(subject.split()[2])
    return subject


def _ended(world: World) -> str:
    subject = _started(world)
    world.stop(subject.split()[2])
    return subject


def _container_is(state: int) -> Callable[[World, str, object], None]:
    def check(world: World, subject: str, result: object) -> None:
        container = str(result) if state == cri.CONTAINER_CREATED else subject.split()[2]
        assert world.states() == {world.witness: cri.CONTAINER_RUNNING, container: state}
        assert world.state(container) == state

    return check


def _start(world: World, subject: str) -> object:
    container = subject.split()[2]
    if world.state(container) != cri.CONTAINER_RUNNING:  # a kubelet looks before it tries again
        world.start(container)
    return container


def _stop(world: World, subject: str) -> object:
    world.stop(subject.split()[2], grace=1)
    return subject


def _remove_container(world: World, subject: str) -> object:
    world.remove_container(subject.split()[2])
    return subject


def _container_is_gone(world: World, subject: str, _result: object) -> None:
    assert world.pods() == {world.witness_pod: cri.SANDBOX_READY, subject.split()[1]: cri.SANDBOX_READY}
    assert world.states() == {world.witness: cri.CONTAINER_RUNNING}


# -- exec -----------------------------------------------------------------------------------------------


def _exec(world: World, subject: str) -> object:
    request = cri.ExecSyncRequest(
        container_id=subject.split()[2], cmd=["sh", "-c", "echo in; sleep 0.1; echo out"], timeout=20
    )
    answer = world.node.runtime.ExecSync(request, timeout=30)
    if answer.exit_code in (128 + signal.SIGKILL, 128 + signal.SIGSEGV):
        raise CommandStruck(answer.exit_code)
    return answer.stdout


def _exec_said(_world: World, _subject: str, result: object) -> None:
    assert result == b"in\nout\n"


def _session(world: World, subject: str) -> object:
    """Ask, hear the answer, again and again; return everything that was heard, and the exit code."""
    request = cri.ExecRequest(
        container_id=subject.split()[2], cmd=["sh", "-c", ECHO], stdin=True, stdout=True, stderr=True
    )
    client = _connected(world.node.runtime.Exec(request, timeout=30).url)
    with client.sock:
        try:
            return _talk(client)
        except (OSError, EOFError, SessionBroken) as error:
            kind = SessionBroken if client.channels[1] else SessionRefused
            raise kind(repr(error)) from error


def _connected(url: str) -> WebSocket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    try:
        sock = socket.create_connection((parts.hostname, parts.port or 0), timeout=SESSION_SECONDS)
        return WebSocket.connect(sock, parts.path, protocol="v5.channel.k8s.io")
    except (OSError, EOFError, AssertionError) as error:
        raise SessionRefused(repr(error)) from error


def _talk(client: WebSocket) -> tuple[bytes, int]:
    for number in range(ROUNDS):
        client.send(0, b"%d\n" % number)
        while not client.channels[1].endswith(b"got %d\n" % number):
            client.frame()
            if client.closed:
                raise SessionBroken(client.channels[3].decode(errors="replace"))
        time.sleep(0.02)
    client.end(0)
    client.to_end()
    status = json.loads(client.channels[3] or b"{}")
    if status.get("reason") != "NonZeroExitCode":
        raise SessionBroken(str(status))
    return client.channels[1], int(status["details"]["causes"][0]["message"])


def _heard_all(_world: World, _subject: str, result: object) -> None:
    assert result == (b"".join(b"got %d\n" % number for number in range(ROUNDS)), 3)


OPERATIONS = [
    Operation("idle", _nothing, lambda world, _name: time.sleep(0.05), _idle_check, _already_gone),
    Operation("pull", _nothing, _pull, _pulled, _unpull),
    Operation(
        "RunPodSandbox", _fresh_pod_name, lambda world, name: world.run_pod(name), _is_ready, _remove_pod
    ),
    Operation("CreateContainer", _pod, _create, _container_is(cri.CONTAINER_CREATED), _undo_subject),
    Operation("StartContainer", _created, _start, _container_is(cri.CONTAINER_RUNNING), _undo_subject),
    Operation("ExecSync", _started, _exec, _exec_said, _undo_subject),
    Operation("exec session", _started, _session, _heard_all, _undo_subject),
    Operation("StopContainer", _started, _stop, _container_is(cri.CONTAINER_EXITED), _undo_subject),
    Operation("RemoveContainer", _ended, _remove_container, _container_is_gone, _undo_subject),
    Operation("StopPodSandbox", _started, _stop_pod, _is_stopped, _undo_subject),
    Operation("RemovePodSandbox", _started, _remove, _is_gone, _already_gone),
]
