"""Runs in: the command line `bulkhead`, which with `serve` becomes the supervisor.

Reads flags and configuration and says in a sentence what is wrong with them; the supervisor itself is
supervisor/server.py. Exit codes: 0 ended in order, 1 could not run, 2 usage or configuration, 3 `upgrade`
found nothing that could be upgraded in place, a restart is what helps, 4 `check` has found something that is
wrong still, or `wipe` found something in its way.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ipc.release import version as release
from supervisor.config import LEVELS, Config
from supervisor.configfile import MAIN_FILE, ConfigError, Effective, effective
from supervisor.settings import identities
from supervisor.table import TABLE, Table

FAILED, USAGE = 1, 2


def main(arguments: Sequence[str] | None = None, *, table: Table = TABLE) -> int:
    """Run a command; return the exit code. Tests bring a process table of their own."""
    options = parser().parse_args(arguments)
    options.table = table
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"bulkhead: {line}", file=sys.stderr)
        return USAGE


class Parser(argparse.ArgumentParser):
    """Help is as wide as everywhere; argparse would ask shutil, which brings all compressors along."""

    def _get_formatter(self) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(self.prog, width=_width())


def _width() -> int:
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (OSError, ValueError):  # no terminal, or nonsense
        columns = 0
    return (columns or 80) - 2


def parser() -> argparse.ArgumentParser:
    """Return the whole command line."""
    top = Parser(prog="bulkhead", description="A container runtime for Kubernetes.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser("serve", help="run the supervisor in the foreground")
    serve.set_defaults(run=_serve)
    _configuration_flags(serve)
    serve.add_argument("--daemon", action="store_true", help="go into the background")
    serve.add_argument(
        "--pid-file", metavar="FILE", help="with --daemon: write the pid here and lock the file"
    )
    serve.add_argument("--log-file", metavar="FILE", help="with --daemon: log here (<run root>/bulkhead.log)")
    serve.add_argument(
        "--check", action="store_true", help="only load everything, tell this build as JSON, and end"
    )
    upgrade = commands.add_parser(
        "upgrade", help="make the running supervisor execute the program that is installed now, in place"
    )
    upgrade.set_defaults(run=_upgrade)
    _configuration_flags(upgrade)
    upgrade.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="how long to wait for its end (120)"
    )
    config = commands.add_parser("config", help="print the effective configuration")
    config.set_defaults(run=_config)
    _configuration_flags(config)
    config.add_argument("--default", action="store_true", help="print the built-in defaults")
    config.add_argument(
        "--check", action="store_true", help="print only what is wrong, and say so by exit code"
    )
    info = commands.add_parser("info", help="what this host can and cannot do, and what to do about it")
    info.set_defaults(run=_info)
    _configuration_flags(info)
    info.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="for people, or programs"
    )
    _upkeep(commands)
    migrate = commands.add_parser("migrate", help="make a configuration out of another runtime's")
    migrate.set_defaults(run=_migrate)
    migrate.add_argument("--from", dest="origin", choices=("crio",), required=True, help="whose")
    migrate.add_argument("--config", metavar="FILE", default="/etc/crio/crio.conf", help="its main file")
    migrate.add_argument("--config-dir", metavar="DIR", help="its drop-in directory (<configuration file>.d)")
    migrate.add_argument("--write", metavar="FILE", help="write it there, not to standard output")
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return top


def _upkeep(commands: Any) -> None:
    from supervisor.cli.checks.report import flags

    check = commands.add_parser("check", help="look whether everything on disk is as it should be; mend it")
    check.set_defaults(run=_check)
    _configuration_flags(check)
    flags(check)
    wipe = commands.add_parser("wipe", help="remove every container, every image, or both")
    wipe.set_defaults(run=_wipe)
    _configuration_flags(wipe)
    what = wipe.add_mutually_exclusive_group(required=True)
    what.add_argument("--containers", action="store_true", help="pods, containers, and what belongs to them")
    what.add_argument("--images", action="store_true", help="images and their layers")
    what.add_argument("--all", action="store_true", help="both")
    wipe.add_argument("--force", action="store_true", help="also what runs, and while the service runs")
    wipe.add_argument("-n", "--dry-run", action="store_true", help="only say what would be removed")


def _configuration_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help=f"configuration file ({MAIN_FILE})")
    parser.add_argument("--config-dir", metavar="DIR", help="drop-in directory (<configuration file>.d)")
    parser.add_argument("--root", metavar="DIR", help="persistent state")
    parser.add_argument("--run-root", metavar="DIR", help="state of this boot")
    parser.add_argument("--listen", metavar="PATH", help="the CRI socket")
    parser.add_argument("--cni-conf-dir", metavar="DIR", help="network configurations")
    parser.add_argument("--cni-bin-dir", metavar="DIR", action="append", help="plugins (may be repeated)")
    parser.add_argument("--log-level", choices=LEVELS, help="how much is logged")


def flags_table(options: argparse.Namespace) -> dict[str, Any]:
    """Return the flags as a configuration table."""
    cni = {"conf_dir": _path(options.cni_conf_dir), "bin_dirs": options.cni_bin_dir}
    if cni["bin_dirs"]:
        cni["bin_dirs"] = [os.path.abspath(directory) for directory in options.cni_bin_dir]
    table = {
        "root": _path(options.root),
        "run_root": _path(options.run_root),
        "listen": _path(options.listen and options.listen.removeprefix("unix://")),
        "log_level": options.log_level,
        "cni": {name: value for name, value in cni.items() if value},
    }
    return {name: value for name, value in table.items() if value}


def _path(value: str | None) -> str | None:
    return os.path.abspath(value) if value else None


def _load(options: argparse.Namespace) -> Config:
    return _effective(options).config


def _effective(options: argparse.Namespace) -> Effective:
    found = effective(options.config, options.config_dir, flags_table(options))
    identities(found.config.users, options.table)
    return found


def _serve(options: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        print("bulkhead: serve must run as root", file=sys.stderr)
        return FAILED
    # Relative paths of the flags must survive the change of directory: a reload reads them again.
    for name in ("config", "config_dir", "pid_file", "log_file"):
        setattr(options, name, _path(getattr(options, name)))
    config = _load(options)
    if options.check:
        return _trial(options, config)
    from supervisor.heritage import VARIABLE
    from supervisor.upgrade import Start

    options.start = Start()
    if options.daemon and VARIABLE not in os.environ:
        return _daemon(options, config)
    return _supervise(options, config)


def _trial(options: argparse.Namespace, config: Config) -> int:
    """What an upgrade in place wants to know before it executes this program."""
    from supervisor.trial import check

    print(check(config, identities(config.users, options.table), options.table))
    return 0


def _supervise(options: argparse.Namespace, config: Config) -> int:
    from supervisor.directories import InstanceRunning
    from supervisor.notify import Notifier
    from supervisor.server import Supervisor
    from supervisor.title import set_title
    from supervisor.upgrade import inherited

    heritage = inherited(os.environ)
    notifier = Notifier(os.environ)
    set_title("bulkhead: supervisor [priv]")
    if heritage is None:
        _standard_descriptors()
    try:
        Supervisor(
            config, notifier, lambda: _load(options), options.table, start=options.start, heritage=heritage
        ).run()
    except (InstanceRunning, OSError) as error:
        print(f"bulkhead: {error}", file=sys.stderr)
        return FAILED
    if heritage is not None and options.daemon and options.pid_file:
        os.unlink(options.pid_file)  # who made it would have
    return 0


def _upgrade(options: argparse.Namespace) -> int:
    from supervisor.cli.upgrading import upgrade

    return upgrade(_load(options).run_root, options.timeout)


def _standard_descriptors() -> None:
    """Standard input is /dev/null, and nothing else gets the numbers 0 to 2."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    while null <= 2:
        null = os.open("/dev/null", os.O_RDWR)
    os.close(null)


def _daemon(options: argparse.Namespace, config: Config) -> int:
    import daemon  # type: ignore[import-untyped]  # it comes without stubs
    from daemon import pidfile

    if not _free(config, options.pid_file):
        return FAILED
    log_path = options.log_file or f"{config.run_root}/bulkhead.log"
    os.makedirs(os.path.dirname(log_path), exist_ok=True)
    lock = pidfile.TimeoutPIDLockFile(options.pid_file, 0) if options.pid_file else None
    with (
        open(log_path, "ab", buffering=0) as log,
        daemon.DaemonContext(pidfile=lock, stdout=log, stderr=log, umask=0o022, signal_map={}),
    ):
        return _supervise(options, config)


def _free(config: Config, pid_file: str | None) -> bool:
    """Say it here if another instance runs; in the background nobody would see it. A stale pid file goes."""
    from supervisor import directories

    locks = directories.Locks()
    try:
        directories.prepare_roots(config)
        for directory in (config.root, config.run_root):
            locks.take(directory)
    except (directories.InstanceRunning, OSError) as error:
        print(f"bulkhead: {error}", file=sys.stderr)
        return False
    finally:
        locks.release()
    return not pid_file or _free_pid_file(pid_file)


def _free_pid_file(path: str) -> bool:
    try:
        if os.path.lexists(path):
            os.unlink(path)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        os.unlink(path)
    except OSError as error:
        print(f"bulkhead: {path}: a pid file cannot be made there: {error.strerror}", file=sys.stderr)
        return False
    return True


def _config(options: argparse.Namespace) -> int:
    from supervisor.configtext import render

    if options.default:
        print(render(Config()), end="")
        return 0
    found = _effective(options)
    if options.check:
        _check_trust(found.config)
    else:
        print(render(found.config, found.origin), end="")
    return 0


def _check_trust(config: Config) -> None:
    """Read what may be pulled. Raises ConfigError; what can be read but not met is said."""
    from supervisor.trust import load, unsupported

    for sentence in unsupported(load(config.image)):
        print(f"bulkhead: {sentence}", file=sys.stderr)


def _info(options: argparse.Namespace) -> int:
    from supervisor.cli.hostcheck import findings
    from supervisor.cli.hosttext import show

    found = findings(_load(options))
    show(found, options.output)
    return FAILED if any(finding.state == "missing" for finding in found) else 0


def _check(options: argparse.Namespace) -> int:
    from supervisor.cli.checks.commands import check

    return check(_load(options), options.table, options)


def _wipe(options: argparse.Namespace) -> int:
    from supervisor.cli.checks.wipe import wipe

    return wipe(_load(options), options.table, options)


def _migrate(options: argparse.Namespace) -> int:
    from supervisor.cli.migrate import MigrationError, from_crio, read_crio

    try:
        migration = from_crio(read_crio(options.config, options.config_dir))
        if options.write:
            with open(options.write, "x", encoding="utf-8") as file:
                file.write(migration.text)
    except (MigrationError, OSError) as error:
        print(f"bulkhead: {error}", file=sys.stderr)
        return FAILED
    if not options.write:
        print(migration.text, end="")
    for sentence in migration.left:
        print(f"bulkhead: {sentence}", file=sys.stderr)
    return 0


def _version(_options: argparse.Namespace) -> int:
    print(f"bulkhead {release()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
