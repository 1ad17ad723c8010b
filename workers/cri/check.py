"""Runs in: cri.

What cri says of its own state when a node is checked: whom it knows, and what is wrong with the file that it
keeps them in and with what stands beside it. Its file is what memory says, written down: what can be mended
here is an intent or a pod's file of somebody who is gone.
"""

from __future__ import annotations

from collections.abc import Iterator

from ipc.messages.checking import Finding, Known, repaired
from ipc.messages.cri import StateCheck, StateChecked
from workers.cri.names import sandbox_id
from workers.cri.node import Node
from workers.cri.rebuild import running
from workers.cri.state import Phase, Store

OWNER = "cri"
FILE, INTENT, POD_FILE = "file", "intent", "pod-file"
_LIVE = frozenset({Phase.CREATED, Phase.RUNNING})


def check(node: Node, body: StateCheck) -> StateChecked:
    """cri.state.check"""
    found = list(_findings(node.store))
    if body.repair:
        for finding in found:
            _mend(node.store, finding)
    return StateChecked(known=known(node), findings=found)


def known(node: Node) -> Known:
    """Everybody, in the making or in removal too; and what runs, though nobody can tell what it is."""
    store = node.store
    strangers = running(f"{node.settings.run_root}/monitors")
    expected = {sandbox_id(pod.id) for pod in store.pods.values()}
    live = {c.id for c in store.containers.values() if c.phase in _LIVE}
    return Known(
        pods=sorted({*store.pods, *strangers.values()}),
        containers=sorted({*store.containers, *strangers, *expected}),
        running=sorted(live | set(strangers)),
        ready=sorted(pod.id for pod in store.pods.values() if pod.phase is Phase.READY),
    )


def _findings(store: Store) -> Iterator[Finding]:
    damage = store.damage()
    if damage:
        repair = "`bulkheadctl restart cri`: set aside and made again"
        yield Finding(owner=OWNER, object="state of pods and containers", problem=damage, repair=repair)
        return
    for intent in store.intents():
        if intent.subject not in store.pods and intent.subject not in store.containers:
            yield Finding(
                owner=OWNER,
                object=f"intent {intent.kind} of {intent.subject}",
                problem="nobody knows it",
                repair="dropped",
                key=f"{INTENT}:{intent.kind}:{intent.subject}",
            )
    for pod_id in sorted(set(store.kept.ids()) - set(store.pods)):
        yield Finding(
            owner=OWNER,
            object=f"file of pod {pod_id}",
            problem="nobody knows the pod",
            repair="removed",
            key=f"{POD_FILE}:{pod_id}",
        )


def _mend(store: Store, finding: Finding) -> None:
    kind, _, name = finding.key.partition(":")
    if kind == INTENT:
        intent, _, subject = name.partition(":")
        store.end(subject, intent)
        repaired(finding)
    elif kind == POD_FILE:
        store.kept.remove(name)
        repaired(finding)
