"""Runs in: the tests, as root. bulkheadctl's clients against the real stream worker, with real processes."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.messages.cri import Redeemed
from tests.support import sandboxed, stream_worker
from tests.support.certificates import certificate
from tests.support.sandboxed import Host
from tests.support.stream_worker import Job, Worker

REPO = Path(__file__).resolve().parents[3]
TRANSPORTS = ("spdy", "websocket")


@pytest.fixture
def host() -> Iterator[Host]:
    with sandboxed.host() as here:
        yield here


@pytest.fixture
def worker(host: Host) -> Iterator[Worker]:
    with stream_worker.started(host) as here:
        yield here


def program(url: str, transport: str, *, tty: bool = False, ca: str = "") -> list[str]:
    """What `exec` and `attach` run once they have their URL."""
    code = (
        "import sys\n"
        "from supervisor.cli.ctl import link, remote\n"
        "from supervisor.cli.ctl.connection import CtlError\n"
        "try:\n"
        f"    made = link.Link({url!r}, link.Trust({ca!r}), 10)\n"
        f"    sys.exit(remote.Session(made, {transport!r}, remote.Wanted(True, {tty}, True)).run())\n"
        "except CtlError as error:\n"
        "    sys.exit(f'told: {error}')\n"
    )
    return [sys.executable, "-c", code]


def url(worker: Worker, job: Job, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{worker.port}{worker.cri.token(job)}"


def ran(words: list[str], data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(words, cwd=REPO, input=data, capture_output=True, check=False, timeout=30)


def command(script: str, *, tty: bool = False, error: str = "") -> Job:
    redeemed = Redeemed(session="s", pod_id="p", container_id="c", stdin=True, stdout=True, stderr=not tty)
    redeemed.tty = tty
    return Job("exec", redeemed, ["/bin/sh", "-c", script], error=error)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_much_goes_in_and_comes_out_and_the_exit_code_is_passed_on(worker: Worker, transport: str) -> None:
    data = os.urandom(3 << 20)
    target = url(worker, command("cat; echo wrong >&2; exit 7"))
    done = ran(program(target, transport), data)
    assert done.stdout == data
    assert (done.stderr, done.returncode) == (b"wrong\n", 7)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_terminal_is_raw_has_its_size_and_follows_it(worker: Worker, transport: str) -> None:
    script = 'stty size; until [ "$(stty size)" = "40 120" ]; do sleep 0.05; done; echo seen; exit 3'
    target = url(worker, command(script, tty=True))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPO)
        size(0, 30, 90)
        words = program(target, transport, tty=True)
        os.execv(words[0], words)
    until(terminal, "0 ")  # it may be there before its size is
    size(terminal, 40, 120)
    until(terminal, "seen")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    os.close(terminal)


def size(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def until(terminal: int, text: str) -> str:
    """What is drawn, as soon as `text` is in it."""
    drawn = b""
    while text.encode() not in drawn:
        drawn += os.read(terminal, 4096)
    return drawn.decode()


def test_ctrl_p_ctrl_q_leaves(worker: Worker) -> None:
    words = program(url(worker, command("echo begun; cat", tty=True)), "spdy", tty=True)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPO)
        os.execv(words[0], words)
    until(terminal, "begun")
    os.write(terminal, b"\x10\x11")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_what_goes_wrong_is_a_sentence(worker: Worker) -> None:
    for transport in TRANSPORTS:
        for target, words in (
            (f"http://127.0.0.1:{worker.port}/exec/none", "the server refuses: there is no such session"),
            (
                url(worker, command("", error="no runtime")),
                "executing command in container: no runtime",
            ),
        ):
            done = ran(program(target, transport), b"")
            assert done.returncode == 1
            assert done.stderr.startswith(b"told: ")
            assert words in done.stderr.decode()


def test_tls_is_spoken_and_a_stranger_is_not_trusted(host: Host) -> None:
    cert, key = certificate(host.base, "localhost")
    with stream_worker.started(host, tls_cert=cert, tls_key=key) as worker:
        for transport in TRANSPORTS:
            target = url(worker, command("cat; exit 4"), "https").replace("127.0.0.1", "localhost")
            done = subprocess.run(
                program(target, transport, ca=cert),
                cwd=REPO,
                input=b"x" * 300_000,
                capture_output=True,
                check=False,
            )
            assert (len(done.stdout), done.returncode) == (300_000, 4), done.stderr
        target = url(worker, command("true"), "https").replace("127.0.0.1", "localhost")
        done = ran(program(target, "spdy"), b"")
        assert b"cannot connect" in done.stderr


def forwarder(target: str) -> subprocess.Popen[str]:
    code = (
        "from supervisor.cli.ctl import forwarding, link\n"
        f"made = link.Link({target!r}, link.Trust(), 10)\n"
        "forwarding.Forwarding(made, forwarding.listeners('127.0.0.1', [(0, 80)])).run()\n"
    )
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_connections_are_forwarded_with_their_half_closes_and_refusals_are_told(worker: Worker) -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for _ in range(2):
            sock, _address = server.accept()
            with sock:
                received = b"".join(iter(lambda: sock.recv(65536), b""))  # noqa: B023 - called at once
                sock.sendall(received[::-1])

    thread = threading.Thread(target=serve)
    thread.start()
    job = Job("portforward", Redeemed(session="s", pod_id="p"), port=server.getsockname()[1])
    with forwarder(url(worker, job)) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        port = int(running.stdout.readline().split()[3])
        for data in (os.urandom(2 << 20), b"second"):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert b"".join(iter(lambda: sock.recv(65536), b"")) == data[::-1]
        thread.join(10)
        server.close()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            assert sock.recv(1) == b""
        assert "error forwarding port 80" in running.stderr.readline()
        running.kill()
