"""Runs in: `bulkhead wipe`.

Takes everything of an instance away: what a check would find if nobody were known, by the same means.
Containers that run, and a service that runs, are in the way unless it is forced; a service is then asked,
through the CRI.
"""

from __future__ import annotations

import argparse
import os

from ipc.messages.checking import REPAIRED, Finding, Known
from supervisor import held
from supervisor.cli.checks.commands import TROUBLE, absent, complain
from supervisor.cli.checks.stopped import Stopped, locked
from supervisor.config import Config
from supervisor.directories import InstanceRunning
from supervisor.table import Table

REFUSED = 4


def wipe(config: Config, table: Table, options: argparse.Namespace) -> int:
    """`bulkhead wipe`: return the exit code."""
    missing = absent(config)
    if missing:
        return complain(missing)
    try:
        with locked(config):
            return _Wipe(config, Stopped(config, table), options).run()
    except InstanceRunning as error:
        if not options.force:
            complain(f"{error}; stop the service, or use --force")
            return REFUSED
        return _through_the_service(config, options)
    except TROUBLE as error:
        return complain(str(error))


class _Wipe:
    """One wipe of an instance that nobody runs."""

    def __init__(self, config: Config, stopped: Stopped, options: argparse.Namespace) -> None:
        self._config = config
        self._stopped = stopped
        self._containers = options.containers or options.all
        self._images = options.images or options.all
        self._force = options.force
        self._dry = options.dry_run

    def run(self) -> int:
        """Say what goes, and let it go unless something is in the way."""
        findings = self._of_containers()
        for line in self._lines(findings):
            print(f"{'would remove' if self._dry else 'remove'} {line}")
        alive = self._alive()
        if self._dry:
            return 0
        if alive and not self._force:
            complain(f"{len(alive)} container(s) run: {', '.join(alive[:3])}; end them, or use --force")
            return REFUSED
        return self._remove(findings)

    def _of_containers(self) -> list[Finding]:
        """Of no known container and pod, everything is a leftover."""
        found = self._stopped.inspect(Known(), deep=False)
        return [finding for finding in found if self._containers and _of_somebody(finding)]

    def _alive(self) -> list[str]:
        root = f"{self._config.run_root}/monitors"
        return [name for name in held.names(root) if held.is_held(f"{root}/{name}")]

    def _lines(self, findings: list[Finding]) -> list[str]:
        lines = [f"{finding.object} ({finding.owner})" for finding in findings]
        if self._images:
            lines += [f"{self._layers()} layer(s) and every image in {self._config.root}"]
        return lines

    def _layers(self) -> int:
        directory = f"{self._config.root}/layers"
        return len(os.listdir(directory)) if os.path.isdir(directory) else 0

    def _remove(self, findings: list[Finding]) -> int:
        left: list[Finding] = []
        if self._containers:
            left = self._remove_containers(findings)
        elif self._images and self._alive():
            raise OSError("containers run on these images: wipe --all, or end them")
        for finding in left:
            complain(f"{finding.object}: {finding.problem}: {finding.why}")
        if left:
            return 1
        if self._images:
            self._stopped.wipe_images()
        return 0

    def _remove_containers(self, findings: list[Finding]) -> list[Finding]:
        """Twice: what was in use the first time (a group, a mount) is not the second time."""
        self._stopped.mend(Known(), findings)
        again = self._of_containers()
        left = self._stopped.mend(Known(), again) if again else []
        if not any(finding.state != REPAIRED for finding in left):
            self._stopped.forget_all()
        return [finding for finding in left if finding.state != REPAIRED]


def _of_somebody(finding: Finding) -> bool:
    """Whether it is about a container or pod, not about an image."""
    return bool(finding.subject) or finding.key.startswith(("group:", "address:"))


def _through_the_service(config: Config, options: argparse.Namespace) -> int:
    from supervisor.cli.ctl.emptying import empty

    return empty(config, containers=options.containers or options.all, images=options.images or options.all)
