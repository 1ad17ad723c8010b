"""Runs in: the supervisor.

The assembly: makes what must stand, binds, preloads, forks the workers of the table, and from then on reacts:
to signals, to requests, to deaths. It tells the service manager when the CRI socket is in place. On SIGTERM
the workers end in the table's order; monitors and pod inits stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from typing import cast

from ipc.fds import close_all
from ipc.log import LEVELS, Log
from ipc.loop import Loop
from ipc.messages.supervisor import ConfigReloaded, HostInfo, WorkerState
from ipc.release import build
from ipc.serve import Server
from ipc.settings import MonitorSettings
from supervisor import cgroup, directories, hostinfo, reload, spawn
from supervisor.announcer import Announcer
from supervisor.config import Config
from supervisor.configfile import ConfigError
from supervisor.drains import Drains
from supervisor.heritage import Heritage, KindRow
from supervisor.inits import Inits
from supervisor.kinds import Kind
from supervisor.logsink import LogSink, SupervisorLog
from supervisor.logwriter import LogWriter
from supervisor.monitors import Monitors
from supervisor.notify import Notifier
from supervisor.nursery import Nursery
from supervisor.parents import Parents
from supervisor.policy import Policy, Rules
from supervisor.reaper import Reaper
from supervisor.requests import Requests
from supervisor.settings import (
    Derivation,
    bind_directory,
    default_cgroup_parent,
    identities,
    nri_needed,
    sandbox_paths,
    uids,
)
from supervisor.sockets import Place, Sockets, bind, inherit, listen, publish, relay, taken
from supervisor.table import SUPERVISOR_CALLERS, TABLE, Entry, Table
from supervisor.tally import Tally
from supervisor.trust import load as load_trust
from supervisor.trust import unsupported
from supervisor.upgrade import HELD_BACK, Start, Upgrade
from supervisor.worker import Ground, Phase

Reread = Callable[[], Config]


class Supervisor:
    """One instance. `reread` returns a configuration read anew, or raises ConfigError. `start`: how to
    execute this program again; `heritage`: what it has left to itself (supervisor/upgrade.py)."""

    def __init__(
        self,
        config: Config,
        notifier: Notifier,
        reread: Reread,
        table: Table = TABLE,
        *,
        start: Start | None = None,
        heritage: Heritage | None = None,
    ) -> None:
        self.config = config
        self.trust = load_trust(config.image)
        self._heritage = heritage
        self._start_as = start or Start()
        wanted = {kind: entry for kind, entry in table.items() if kind != "nri" or config.nri.enable}
        self.table = {kind: _sized(entry, config) for kind, entry in wanted.items()}
        self.who = identities(config.users, table)
        self.writer = LogWriter(environ=os.environ)
        self.writer.configure(config.log_format, config.log_filter)
        self.log: Log = SupervisorLog(config.log_level, self.writer)
        self.loop = Loop()
        self.kinds: dict[str, Kind] = {}
        self._notifier = notifier
        self._reread = reread
        self._locks = directories.Locks()
        self._stream_port = 0
        self._derivation = Derivation(config, self.who)
        self._nri_worker = 0
        self._started_at_ns = heritage.started_at_ns if heritage else time.time_ns()
        self._stopping = False

    # -- coming up ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Come up, serve until SIGTERM, go down. Raises InstanceRunning, OSError."""
        directories.prepare_roots(self.config)
        if self._heritage is not None:
            self._locks.inherit(self._heritage.lock_fds)
        else:
            for directory in (self.config.root, self.config.run_root):
                self._locks.take(directory)
        os.umask(0o022)
        os.chdir("/")
        self._assemble()
        self._start()
        self.loop.run()
        self._down()

    def _assemble(self) -> None:
        config = self.config
        rebooted = directories.prepare(config, self.who, in_use=self._heritage is not None)
        self.log.info("supervisor starts", pid_of=os.getpid(), run_root=config.run_root, rebooted=rebooted)
        hierarchies = cgroup.detect()
        instance = cgroup.instance_name(config.run_root)
        self.groups = cgroup.Groups(hierarchies, instance, cgroup.delegated_base(hierarchies))
        drains = Drains(config.run_root)
        if self._heritage is None:
            self._sweep(drains)
        self.groups.prepare()
        self.sink = LogSink(
            self.loop,
            f"{config.run_root}/ipc/log.sock",
            uids(self.who),
            writer=self.writer,
            fd=self._heritage.log_fd if self._heritage else -1,
        )
        self.reaper = Reaper(self.loop, self.log)
        self.reaper.become_subreaper()
        self.tally = Tally(f"{config.run_root}/tally")
        self.ground = Ground(
            loop=self.loop,
            log=self.log,
            sink=self.sink,
            reaper=self.reaper,
            groups=self.groups,
            timeouts=config.timeouts,
            paths=sandbox_paths(config, self.trust),
            log_socket=f"{config.run_root}/ipc/log.sock",
            drains=drains,
        )
        self._make_parts(hierarchies)

    def _sweep(self, drains: Drains) -> None:
        spared = {kind: drains.pids(kind) for kind in self._worker_kinds()}
        for kind in self.groups.sweep(spared):
            if spared[kind]:
                self.log.info("sessions of an earlier supervisor go on", kind=kind, pids=sorted(spared[kind]))
            else:
                self.log.warning("cgroup of an earlier supervisor stays", kind=kind)

    def _make_parts(self, hierarchies: cgroup.Hierarchies) -> None:
        cri = self.who.get("cri", self.who["monitor"])
        self.nursery = Nursery(self.ground)
        parent = default_cgroup_parent(self.config)
        self.inits = Inits(self.ground, self.who["init"], self.config.run_root, parent, self.nursery)
        self.monitors = Monitors(
            self.ground,
            self.table["monitor"],
            self._monitor_settings,
            cri,
            tally=self.tally,
            nursery=self.nursery,
            notifier=self._notifier,
        )
        systemd = self.config.cgroup_manager == "systemd"
        self.parents = Parents(self.ground, self.config.run_root, systemd=systemd)
        # All are bound before the first settings are made: cri is told where stream listens.
        left = {row.kind: row for row in self._heritage.kinds} if self._heritage else {}
        sockets = {kind: self._bind(self.table[kind], left.get(kind)) for kind in self._worker_kinds()}
        if "stream" in sockets and "http" in sockets["stream"].extra:
            self._stream_port = sockets["stream"].extra["http"].getsockname()[1]
        self._derivation = self._derive()
        self.kinds = {kind: self._make_kind(self.table[kind], sockets[kind]) for kind in sockets}
        for kind, row in left.items():
            if kind in self.kinds:
                self.kinds[kind].inherit(row)
            else:
                self._disinherit(row)
        self.announcer = Announcer(
            self._notifier, self.loop, self.log, self.kinds, lambda: self.config.timeouts.worker_answer
        )
        self.probe = hostinfo.HostProbe(
            self.loop,
            self.reaper,
            self.log,
            config=self.config,
            hierarchies=hierarchies,
            degraded=self.groups.degraded,
        )
        self.server = Server(self.loop, Requests(self).table(), uids(self.who), log=self.log)
        self.upgrade = Upgrade(self, self._start_as, self._heritage.upgrade if self._heritage else None)

    def _disinherit(self, row: KindRow) -> None:
        """A kind of the program before that this one does not have: its workers end."""
        for worker in row.workers:
            self.log.warning("worker of an unknown kind is killed", kind=row.kind, pid_of=worker.pid)
            os.kill(worker.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            close_all(fd for fd in (worker.stderr_fd, worker.control_fd) if fd >= 0)
        close_all([row.listener_fd, *row.extra_fds.values()])

    def _make_kind(self, entry: Entry, sockets: Sockets) -> Kind:
        return Kind(
            self.ground,
            entry,
            identity=self.who[entry.kind],
            settings=self._derivation.of(entry.kind),
            sockets=sockets,
            policy=Policy(_rules(self.config), time.monotonic, _chance),
            tally=self.tally,
            changed=self._kind_changed,
            bound=self._bound,
            relayed=self._relayed,
        )

    def _derive(self) -> Derivation:
        return Derivation(self.config, self.who, self._stream_port, self._nri_worker, self.trust)

    def _bind(self, entry: Entry, left: KindRow | None) -> Sockets:
        if left is not None:
            return inherit(left.listener_fd, left.extra_fds)
        path = f"{self.config.run_root}/ipc/{entry.kind}.sock"
        stream, ops = self.config.stream, self.config.ops
        http: dict[str, Place] = {"ops": ops.listen, "stream": (stream.address, stream.port)}
        places: dict[str, Place] = {
            "http": http.get(entry.kind, ""),
            "https": (ops.address, ops.port) if ops.address else "",
            "plugins": self._plugin_path() if entry.kind == "nri" else "",
        }
        return bind(entry, path, self.who, places)

    def _plugin_path(self) -> str:
        """Where plugins connect; another runtime's socket is not taken away from it."""
        nri = self.config.nri
        if nri.disable_connections:
            return ""
        if taken(nri.listen):
            self.log.error("plugins cannot connect: somebody else listens there", path=nri.listen)
            return ""
        return nri.listen

    def _worker_kinds(self) -> list[str]:
        return [entry.kind for entry in self.table.values() if entry.is_worker]

    def _monitor_settings(self) -> MonitorSettings:
        return cast(MonitorSettings, self._derivation.of("monitor"))

    def _start(self) -> None:
        self._catch_signals()
        self._preload()
        spawn.freeze()
        self._listener = self._listen()
        self.server.listen(self._listener)
        for kind in self.kinds.values():
            kind.start()
        self.probe.start()
        self.loop.call_soon(self.monitors.adopt)
        for sentence in self.groups.degraded:
            self.log.warning("degraded", lacks=sentence)
        self._warn_of_policy()
        self.probe.when_done(self._probed)
        self.announcer.start()
        if self._heritage is not None:
            self._go_on(self._heritage)

    def _listen(self) -> socket.socket:
        if self._heritage is not None:
            return socket.socket(fileno=self._heritage.listener_fd)
        return listen(
            f"{self.config.run_root}/ipc/supervisor.sock",
            sorted(self.who[kind].uid for kind in SUPERVISOR_CALLERS if kind in self.who),
        )

    def _go_on(self, heritage: Heritage) -> None:
        """This program was executed in place of another: everything that it had goes on."""
        self.monitors.inherit(heritage.wards)
        self.inits.inherit()
        self.reaper.reap()
        self.announcer.published = True
        self._heritage = None
        self.loop.call_soon(self.upgrade.exchange)

    def _preload(self) -> None:
        """What children share: a module imported after the fork dirties twice the pages that it needs."""
        for name in (spawn.BOOT, *(entry.module for entry in self.table.values() if entry.preload)):
            importlib.import_module(name)

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.on_signal(number, self.stop)
        self.loop.on_signal(signal.SIGHUP, self._hung_up)
        self.loop.on_signal(signal.SIGUSR1, self._dump)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    # -- an upgrade in place --------------------------------------------------------------------------

    def heritage(self) -> Heritage:
        """What the program after this one must know. Ends the nursery: the next one is made of that
        program."""
        self.nursery.end()
        return Heritage(
            release=build(),
            started_at_ns=self._started_at_ns,
            lock_fds=self._locks.descriptors,
            listener_fd=self._listener.fileno(),
            log_fd=self.sink.fileno(),
            kinds=[kind.row() for kind in self.kinds.values()],
            upgrade=self.upgrade.state,
            wards=self.monitors.rows(),
        )

    def settled(self) -> bool:
        """True if nothing is half done that only this program could finish."""
        busy = self.inits.starting or self.loop.pending or self.server.in_flight() or self._stopping
        return not busy and all(kind.settled for kind in self.kinds.values())

    def upgrading(self) -> None:
        """This program is about to be replaced by another."""
        self.announcer.reloading()

    def not_upgraded(self) -> None:
        """It was not: serve on."""
        self.server.listen(self._listener)
        self.announcer.reloaded()

    # -- telling the service manager --------------------------------------------------------------------

    def _bound(self, path: str) -> None:
        """cri has bound its socket: give it its public name."""
        self._relayed(path)
        publish(path, bind_directory(self.config), self.config.listen)
        self.announcer.published = True
        self.log.info("CRI socket in place", path=self.config.listen)
        self.announcer.changed()

    def _relayed(self, path: str) -> str:
        """The name by which a cri that was replaced finds the newest."""
        return relay(path, bind_directory(self.config), self.who["cri"].uid)

    def _kind_changed(self, kind: Kind) -> None:
        if kind.entry.kind == "nri" and "cri" in self.kinds and not self._stopping:
            self._tell_of_nri(next((w.pid for w in kind.workers.values() if w.phase is Phase.READY), 0))
        self.announcer.changed()

    def _tell_of_nri(self, pid: int) -> None:
        """cri asks a worker of plugins only where there is one: so it is told when one comes or goes."""
        if pid != self._nri_worker:
            self._nri_worker = pid
            self._derivation = self._derive()
            self.kinds["cri"].reload(self._derivation.of("cri"))

    def _probed(self, info: HostInfo) -> None:
        self.announcer.runtimes = [runtime.name for runtime in info.runtimes if runtime.version]
        self.announcer.changed()

    def states(self) -> list[WorkerState]:
        """Every process, the supervisor first, monitors last."""
        own = WorkerState(
            kind="supervisor",
            name="supervisor",
            state="stopping" if self._stopping else "ready",
            pid=os.getpid(),
            started_at_ns=self._started_at_ns,
            release=build(),
        )
        workers = [row for kind in self.kinds.values() for row in kind.states()]
        return [own, *workers, *self._outliving()]

    def _outliving(self) -> Iterable[WorkerState]:
        if self.nursery.pid:
            yield WorkerState(kind="nursery", name="nursery", state="ready", pid=self.nursery.pid)
        for init in self.inits.states():
            state = "ready" if init.alive else "ended"
            yield WorkerState(
                kind="init", name=f"init {init.pod_id}", state=state, pid=init.pid, uid=self.who["init"].uid
            )
        for monitor in self.monitors.states():
            state = "ready" if monitor.alive else "ended"
            yield WorkerState(
                kind="monitor",
                name=f"monitor {monitor.container_id}",
                state=state,
                pid=monitor.pid,
                restarts=monitor.successions,
            )

    def _dump(self) -> None:
        """SIGUSR1: the whole state into the log."""
        for row in self.states():
            self.log.info(
                "state",
                name=row.name,
                state=row.state,
                pid_of=row.pid,
                restarts=row.restarts,
                requests=len(row.requests),
                last_death=row.last_death,
            )
        self.log.info("counts", log_lines_dropped=self.sink.dropped, objects=len(gc.get_objects()))

    # -- reload ---------------------------------------------------------------------------------------

    def _hung_up(self) -> None:
        """SIGHUP."""
        self.reload()

    def reload(self) -> ConfigReloaded:
        """Read the configuration anew. A fault leaves everything as it was."""
        self.announcer.reloading()
        try:
            answer = self._take(self._reread())
        except ConfigError as error:
            answer = ConfigReloaded(faults=str(error).splitlines())
            for line in answer.faults:
                self.log.error("configuration not reloaded", fault=line)
        self.announcer.reloaded()
        return answer

    def _take(self, wanted: Config) -> ConfigReloaded:
        change = reload.change(self.config, wanted)
        trust = load_trust(change.config.image)
        if trust != self.trust and "image.policy" not in change.taken:
            change.taken.append("image.policy")  # what the files say that it names
        self.trust = trust
        self._warn_of_policy()
        for key in change.refused:
            self.log.warning("this key takes a restart", key=key)
        self.config = config = change.config
        self.log.level = LEVELS[config.log_level]
        self.writer.configure(config.log_format, config.log_filter)
        if "log_level" in change.taken:
            self.log.info("monitors that run keep their log level")
        self.ground.timeouts, self.ground.paths = config.timeouts, sandbox_paths(config, trust)
        self.inits.default_parent = default_cgroup_parent(config)
        self._derivation = self._derive()
        if hostinfo.PROBED & set(change.taken):
            self.probe.restart(config)  # before cri hears of it and asks
            self.probe.when_done(self._probed)
        for kind in self.kinds.values():
            kind.resize(_sized(kind.entry, config))
            kind.reform(_rules(config))
            kind.reload(self._derivation.of(kind.entry.kind))
        self.log.info("configuration reloaded", changed=" ".join(change.taken) or "nothing")
        return ConfigReloaded(changed=change.taken, refused=change.refused)

    def _warn_of_policy(self) -> None:
        for sentence in unsupported(self.trust):
            self.log.warning("not supported", what=sentence)

    def config_text(self) -> str:
        """The configuration in force, as a file would say it."""
        from supervisor.configtext import render  # asked for rarely

        return render(self.config)

    # -- going down -----------------------------------------------------------------------------------

    def stop(self) -> None:
        """SIGTERM: end the workers in the table's order, then leave."""
        if self._stopping:
            return
        self._stopping = True
        self.announcer.stopping()
        self.log.info("supervisor stops")
        orders = sorted({kind.entry.stop_order for kind in self.kinds.values()})
        self._stop_next(orders)

    def _stop_next(self, orders: list[int]) -> None:
        if not orders:
            self.loop.stop()
            return
        stage = [kind for kind in self.kinds.values() if kind.entry.stop_order == orders[0]]
        left = len(stage)

        def one_stopped() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._stop_next(orders[1:])

        for kind in stage:
            kind.stop(one_stopped)

    def _down(self) -> None:
        """Leave nothing behind but what containers need."""
        self.server.close()
        self._listener.close()
        self.nursery.end()
        for kind in self.kinds.values():
            kind.close()
        drains = self.ground.drains
        spared = {pid for kind in self._worker_kinds() for pid in drains.pids(kind)}
        self.groups.release(self._worker_kinds(), spared)
        for path in (self.config.listen, f"{self.config.run_root}/ipc/supervisor.sock"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        directories.empty(bind_directory(self.config))
        self.log.info("supervisor ends")
        self.sink.close()
        self._locks.release()


def _sized(entry: Entry, config: Config) -> Entry:
    """Give a pool its configured size."""
    maximum = getattr(config.pools, entry.kind, entry.maximum)
    minimum = int(nri_needed(config)) if entry.kind == "nri" else entry.minimum
    return dataclasses.replace(entry, minimum=minimum, maximum=max(maximum, minimum))


def _chance() -> float:
    """A number in [0, 1)."""
    return int.from_bytes(os.urandom(4), "big") / 2**32


def _rules(config: Config) -> Rules:
    restart = config.restart
    return Rules(
        max_delay=restart.max_delay,
        reset_after=restart.reset_after,
        failed_deaths=restart.failed_deaths,
        failed_window=restart.failed_window,
        slow_retry=restart.slow_retry,
    )
