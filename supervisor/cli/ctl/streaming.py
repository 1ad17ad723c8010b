"""Runs in: bulkheadctl.

Command lines of what is streamed: exec, attach, port-forward. The clients themselves are imported when one of
them is run.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ipc.cri import api_pb2 as cri
from supervisor.cli.ctl.arguments import USAGE, Commands, command
from supervisor.cli.ctl.connection import Connection, CtlError

if TYPE_CHECKING:
    from supervisor.cli.ctl.link import Link

TIMEOUT = 30.0  # to connect, and for the answer to the upgrade
HIGHEST_PORT = 65535


def register(commands: Commands) -> None:
    """Add this module's commands."""
    run = command(commands, "exec", execute, "Run a command in a container")
    run.add_argument(
        "-s", "--sync", action="store_true", help="wait for its end and show its output then, as probes do"
    )
    run.add_argument(
        "--timeout", dest="exec_timeout", type=_seconds, default=0, help="with -s: seconds, 0 for none"
    )
    _with_terminal(run)
    run.add_argument("id")
    run.add_argument("cmd", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    join = command(commands, "attach", attach, "Join the streams of a running container (leave: ^P ^Q)")
    _with_terminal(join)
    join.add_argument("id")
    forward = command(commands, "port-forward", port_forward, "Forward local ports to ports of a pod")
    forward.add_argument("--address", default="127.0.0.1", help="where to listen (default: 127.0.0.1)")
    _with_tls(forward)
    forward.add_argument("pod", help="pod sandbox id")
    forward.add_argument("ports", nargs="+", type=_ports, metavar="[LOCAL:]REMOTE")


def _with_terminal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--stdin", action="store_true", help="pass standard input on")
    parser.add_argument("-t", "--tty", action="store_true", help="with a terminal")
    parser.add_argument(
        "--transport",
        choices=("spdy", "websocket"),
        default="spdy",
        help="as kubelets speak it, older or newer",
    )
    _with_tls(parser)


def _with_tls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls-ca", default="", metavar="FILE", help="authority of the streaming server")
    parser.add_argument("--tls-cert", default="", metavar="FILE", help="certificate to show it")
    parser.add_argument("--tls-key", default="", metavar="FILE", help="its key, if that is another file")


def _seconds(text: str) -> int:
    """An argument in whole seconds. Raises ValueError, which argparse puts into words."""
    seconds = int(text)
    if seconds < 0:
        raise ValueError(text)
    return seconds


def _ports(text: str) -> tuple[int, int]:
    """LOCAL:REMOTE, REMOTE for the same on both sides, :REMOTE for any local one. Raises ValueError."""
    local, colon, remote = text.rpartition(":")
    pair = int(local or 0) if colon else int(remote), int(remote)
    if not (0 <= pair[0] <= HIGHEST_PORT and 0 < pair[1] <= HIGHEST_PORT):
        raise ValueError(text)
    return pair


def execute(connection: Connection, options: argparse.Namespace) -> int:
    """exec: streamed, or with -s by ExecSync."""
    words = options.cmd[1:] if options.cmd[:1] == ["--"] else options.cmd
    if not words:
        raise CtlError("exec needs a command", USAGE)
    if options.sync:
        return _exec_sync(connection, options, words)
    if options.exec_timeout:
        raise CtlError("--timeout goes with --sync", USAGE)
    request = cri.ExecRequest(
        container_id=options.id,
        cmd=words,
        stdin=options.stdin,
        stdout=True,
        stderr=not options.tty,
        tty=options.tty,
    )
    url = connection.call(connection.runtime.Exec, request).url
    return _remote(url, options, detachable=False)


def _exec_sync(connection: Connection, options: argparse.Namespace, words: list[str]) -> int:
    request = cri.ExecSyncRequest(container_id=options.id, cmd=words, timeout=options.exec_timeout)
    limit = options.exec_timeout + 10 if options.exec_timeout else connection.timeout
    answer = connection.call(connection.runtime.ExecSync, request, timeout=limit)
    sys.stdout.buffer.write(answer.stdout)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(answer.stderr)
    sys.stderr.buffer.flush()
    return answer.exit_code


def attach(connection: Connection, options: argparse.Namespace) -> int:
    """Join a container's streams until it, or we, end."""
    request = cri.AttachRequest(
        container_id=options.id, stdin=options.stdin, stdout=True, stderr=not options.tty, tty=options.tty
    )
    url = connection.call(connection.runtime.Attach, request).url
    return _remote(url, options, detachable=True)


def _remote(url: str, options: argparse.Namespace, *, detachable: bool) -> int:
    from supervisor.cli.ctl import remote

    wanted = remote.Wanted(options.stdin, options.tty, detachable)
    link = _link(url, options)
    try:
        return remote.Session(link, options.transport, wanted).run()
    finally:
        link.close()


def _link(url: str, options: argparse.Namespace) -> Link:
    from supervisor.cli.ctl.link import Link, Trust

    return Link(url, Trust(options.tls_ca, options.tls_cert, options.tls_key), TIMEOUT)


def port_forward(connection: Connection, options: argparse.Namespace) -> int:
    """Forward ports until interrupted."""
    from supervisor.cli.ctl import forwarding

    request = cri.PortForwardRequest(pod_sandbox_id=options.pod, port=[remote for _, remote in options.ports])
    link = _link(connection.call(connection.runtime.PortForward, request).url, options)
    sockets = {}
    try:
        sockets = forwarding.listeners(options.address, options.ports)
        forwarding.Forwarding(link, sockets).run()
        return 0
    finally:
        for sock in sockets:
            sock.close()
        link.close()
