"""Runs in: bulkheadctl, a client process of its own.

The command line: arguments in, one function called, a clear sentence and an exit code for every error.
Exit codes: 0 done, 1 the runtime answered with an error, 2 wrong usage, 3 the runtime cannot be reached, 4
`check` has found something that is wrong still;
`exec` passes on the exit code of the command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from supervisor.cli.ctl import complete, containers, images, node, observe, overview, pods, streaming, upkeep
from supervisor.cli.ctl.connection import Connection, CtlError

DEFAULT_SOCKET = "/run/bulkhead/bulkhead.sock"
DEFAULT_RUN_ROOT = "/run/bulkhead"


def parser() -> argparse.ArgumentParser:
    """Return the whole command line."""
    top = argparse.ArgumentParser(
        prog="bulkheadctl",
        description="Testing client of Bulkhead, and the operator's window on its workers.",
    )
    top.add_argument(
        "-r",
        "--socket",
        default=os.environ.get("BULKHEAD_SOCKET", DEFAULT_SOCKET),
        help=f"the CRI socket (default: $BULKHEAD_SOCKET or {DEFAULT_SOCKET})",
    )
    top.add_argument(
        "--run-root",
        default=os.environ.get("BULKHEAD_RUN_ROOT", DEFAULT_RUN_ROOT),
        help=f"run root of the daemon, for `workers` (default: $BULKHEAD_RUN_ROOT or {DEFAULT_RUN_ROOT})",
    )
    top.add_argument(
        "-t", "--timeout", type=float, default=120.0, help="seconds for a request (default: 120)"
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (overview, node, upkeep, pods, containers, streaming, images, observe, complete):
        module.register(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    options = parser().parse_args(arguments)
    try:
        with Connection(options.socket, options.run_root, options.timeout) as connection:
            code = options.function(connection, options)
        sys.stdout.flush()
    except CtlError as error:
        print(f"bulkheadctl: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader (head, less) had enough
        code = 0
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
