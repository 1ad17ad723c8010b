"""Runs in: every worker, last of all steps into its sandbox (data only; ipc/confine.py installs).

The seccomp list of each worker. Unprivileged workers have closed lists: what is not named is refused, and
nobody may execute, fork, trace, mount, make a namespace or load code. Storage and network have open lists,
which their children (unpack, CNI plugins and what those execute) inherit and survive.
"""

from __future__ import annotations

from ipc import syscall_groups as calls
from ipc.seccomp import Policy

_COMMON = calls.PROCESS | calls.DESCRIPTORS | calls.READ_FILES | calls.SOCKETS
_CONDITIONS = {**calls.CONDITIONAL, **calls.THREADS}

LISTS: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            name="cri",  # SQLite, a socket to bind in a directory of its own, the ends of monitors
            allowed=_COMMON | calls.WRITE_FILES | {"pidfd_open"},
            conditional={**_CONDITIONS, **calls.LOCAL_SOCKETS},
            missing=calls.MISSING,
        ),
        Policy(
            name="image",
            allowed=_COMMON,
            conditional={**_CONDITIONS, **calls.INTERNET_SOCKETS},
            missing=calls.MISSING,
        ),
        Policy(
            name="stream",
            allowed=_COMMON,
            conditional={**_CONDITIONS, **calls.INTERNET_SOCKETS, **calls.TERMINALS},
            missing=calls.MISSING,
        ),
        Policy(
            name="ops",
            allowed=_COMMON,
            conditional={**_CONDITIONS, **calls.LOCAL_SOCKETS},
            missing=calls.MISSING,
        ),
        Policy(
            name="nri",
            allowed=_COMMON,
            conditional={**_CONDITIONS, **calls.LOCAL_SOCKETS},
            missing=calls.MISSING,
        ),
        Policy(
            name="storage",  # executes nothing, speaks to this host only
            denied=calls.DANGEROUS | {"bpf", "execve", "execveat"},
            conditional=calls.LOCAL_SOCKETS,
            open_list=True,
        ),
        Policy(
            name="network",  # bpf stays open: some plugins attach programs to the links they make
            denied=calls.DANGEROUS,
            open_list=True,
        ),
    )
}
