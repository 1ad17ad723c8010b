"""Runs in: network.

The network worker and, in `handlers`, everything it answers. As root with NET_ADMIN and SYS_ADMIN, in the
node's mount and network namespaces: its mounts are seen by monitors, its plugins work on the node's links.
It parses nothing from a network and calls nobody; everything that can take long runs in children.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import msgspec

from ipc.loop import Loop
from ipc.messages import network
from ipc.settings import NetworkSettings
from ipc.table import Handler, Handlers, table
from workers import boot
from workers.jobs import Jobs
from workers.network.children import Children
from workers.network.confdir import ConfDir, Selection
from workers.network.dialling import Dialling
from workers.network.operations import Places
from workers.network.pods import Pods
from workers.network.status import Status
from workers.network.upkeep import Upkeep


@dataclass
class State:
    """What the settings come to; made anew when they change."""

    settings: NetworkSettings
    boot_id: str
    places: Places = field(init=False)
    configurations: ConfDir = field(init=False)

    def __post_init__(self) -> None:
        self.use(self.settings)

    def use(self, settings: NetworkSettings) -> None:
        """Work with these settings from now on."""
        self.settings = settings
        self.places = Places(
            records=settings.cache_dir or os.path.join(settings.run_root, "net"),
            pins=os.path.join(settings.run_root, "ns"),
            bin_dirs=settings.bin_dirs,
            setup_timeout=settings.setup_timeout,
            teardown_timeout=settings.teardown_timeout,
            boot_id=self.boot_id,
        )
        self.configurations = ConfDir(settings.conf_dir, settings.default_network)
        os.makedirs(self.places.records, mode=0o700, exist_ok=True)
        os.makedirs(self.places.pins, mode=0o711, exist_ok=True)

    def current_places(self) -> Places:
        """Directories and times in force."""
        return self.places

    def selection(self) -> Selection:
        """The network in use now."""
        return self.configurations.current()


def prepare(context: boot.Context[NetworkSettings]) -> State:
    """Make the directories; as root, before the sandbox shuts."""
    return State(context.settings, boot_id())


def boot_id() -> str:
    """What names this boot of the machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def run(context: boot.Context[NetworkSettings], state: State) -> None:
    """Serve until told to stop. What then still runs is killed, and undone by the next network worker."""
    loop = Loop()
    jobs = Jobs(loop)
    children = Children(jobs)
    pods = Pods(children, state.current_places, state.selection)
    status = Status(children, state.current_places, state.selection)

    def reload(settings: bytes) -> None:
        state.use(msgspec.msgpack.decode(settings, type=NetworkSettings))
        jobs.renew()

    jobs.let_stay()
    dialling = Dialling(jobs, state.current_places)
    boot.serve(
        context,
        loop,
        handlers(pods, status, dialling, Upkeep(jobs, state.current_places, state.selection)),
        on_reload=reload,
        doing=pods.doing,
        queued=pods.waiting,
        jobs=jobs.states,
    )
    jobs.kill_all()


def handlers(pods: Pods, status: Status, dialling: Dialling, upkeep: Upkeep) -> Handlers:
    """The worker's API: who may ask what of whom."""
    cri = frozenset({"cri"})
    readers = frozenset({"cri", "root"})
    return table(
        Handler(network.PodSetup, pods.setup, callers=cri),
        Handler(network.PodTeardown, pods.teardown, callers=cri),
        Handler(network.PodCheck, pods.check, callers=readers),
        Handler(network.PodList, pods.list, callers=readers),
        Handler(network.StatusGet, status.get, callers=readers),
        Handler(network.StoreCheck, upkeep.check, callers=readers),
        Handler(network.StoreMend, upkeep.mend, callers=frozenset({"root"})),
        Handler(network.PortConnect, dialling.connect, callers=cri),
    )
