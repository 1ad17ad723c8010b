"""`bulkhead check` and `bulkhead wipe` against a whole node: what is broken for real is found, mended one by
one, and nothing else is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc import kernel
from ipc.cri import api_pb2
from tests.support import machine
from tests.support.cri_client import Client
from tests.support.daemon import CGROUPS, NETWORK, REPO, Node, environment
from tests.support.images import Served, served

STRAY = "5" * 64
FOUND = 4


@pytest.fixture(scope="module")
def images() -> Iterator[Served]:
    machine.enter()
    with served(larger_files=2) as found:
        yield found


@pytest.fixture(scope="module")
def node(images: Served) -> Iterator[Node]:
    with Node(registries=images.registries_conf, bridge="bhchk0") as found:
        yield found


@pytest.fixture(scope="module")
def client(node: Node, images: Served) -> Client:
    node.ctl("pull", images.larger)
    client = Client(node, images)
    client.pull()
    return client


def bulkhead(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program as an administrator would."""
    flags = node.command()[4:]
    command = [sys.executable, "-m", "supervisor", words[0], *flags, *words[1:]]
    return subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, check=False, env=environment(), timeout=120
    )


def check(node: Node, *words: str) -> tuple[int, list[dict[str, Any]]]:
    done = bulkhead(node, "check", "-o", "json", *words)
    assert done.returncode in (0, FOUND), done.stderr
    return done.returncode, json.loads(done.stdout)


def clean(node: Node, *words: str) -> None:
    code, found = check(node, *words)
    assert (code, objects(found)) == (0, {})


def objects(findings: list[dict[str, Any]]) -> dict[str, str]:
    return {finding["object"]: finding["problem"] for finding in findings}


def file_of(node: Node, name: str) -> Path:
    """A file of the larger image, in its layer."""
    return next(path for path in (node.state / "layers").glob(f"*/diff/{name}"))


def rot(path: Path) -> None:
    """A bit turns, and nobody writes down when."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def aged(path: Path) -> Path:
    """It was there before what goes on just now."""
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    return path


# -- strays, which every owner may have -------------------------------------------------------------------


def stray_container(node: Node) -> str:
    for directory in (
        node.state / "containers" / STRAY / "upper",
        node.run_root / "containers" / STRAY / "rootfs",
    ):
        directory.mkdir(parents=True)
    kernel.mount("left", str(node.run_root / "containers" / STRAY / "rootfs"), "tmpfs")
    return f"container {STRAY}"


def stray_pod(node: Node) -> str:
    shm = node.run_root / "pods" / STRAY / "shm"
    shm.mkdir(parents=True)
    kernel.mount("shm", str(shm), "tmpfs")
    return f"pod {STRAY}"


def stray_namespaces(node: Node) -> str:
    pins = node.run_root / "ns" / STRAY
    pins.mkdir()
    for name in ("net", "ipc"):
        (pins / name).touch()
    subprocess.run(["unshare", "-n", "mount", "--bind", "/proc/self/ns/net", str(pins / "net")], check=True)
    return f"pod {STRAY}"


def stray_address(node: Node) -> str:
    aged_file = node.addresses / NETWORK / "10.245.255.7"
    aged_file.write_text(f"{STRAY}\r\neth0")
    aged(aged_file)
    return f"address 10.245.255.7 of {NETWORK}"


def stray_monitor(node: Node) -> str:
    directory = node.run_root / "monitors" / STRAY
    (directory / "bundle").mkdir(parents=True)
    (directory / "exit.json").write_text("{}")
    return f"container {STRAY}"


def stray_group(node: Node) -> str:
    group = CGROUPS / "pids" / f"{node._instance}.pods" / f"bulkhead-{STRAY}"
    group.mkdir(parents=True, exist_ok=True)
    return f"cgroup {group}"


STRAYS: list[Callable[[Node], str]] = [
    stray_container,
    stray_pod,
    stray_namespaces,
    stray_address,
    stray_monitor,
    stray_group,
]


def test_beside_a_service_that_runs_strays_and_bit_rot_are_mended_and_containers_run_on(
    node: Node, client: Client, images: Served
) -> None:
    pod, container = client.running("sleep", "1000")
    clean(node)
    expected = {make(node) for make in STRAYS}
    rotten, used = file_of(node, "data/0/0"), file_of(node, "bin/busybox")
    rot(rotten)
    code, found = check(node, "--deep")
    rotten_layer = f"layer sha256:{rotten.parents[3].name}"
    assert code == FOUND
    assert set(objects(found)) == expected | {rotten_layer}, found
    assert objects(found)[rotten_layer].startswith("data/0/0: the content is not")
    assert set(objects(check(node)[1])) == expected, "without --deep contents are not read"

    code, found = check(node, "--deep", "--repair")
    assert code == 0, found
    assert {finding["state"] for finding in found} == {"repaired"}
    clean(node, "--deep")
    listed = node.ctl("images").stdout
    assert "test/larger" not in listed
    assert "test/busybox" in listed
    assert node.ctl("check").stdout == "nothing is wrong\n"

    shutil.copy2(used, node.root / "good")
    used.write_bytes(b"short")
    code, (finding,) = check(node, "--repair")
    assert (code, finding["state"]) == (FOUND, "left")
    assert container in finding["why"]
    shutil.copyfile(node.root / "good", used)
    clean(node, "--deep")
    assert client.status(container).state == 1  # CONTAINER_RUNNING
    client.remove_pod(pod)
    node.ctl("pull", images.larger)


def test_while_the_service_is_stopped_everything_is_found_and_mended_too(
    node: Node, client: Client, images: Served
) -> None:
    pod, container = client.running("sleep", "1000")
    node.stop()
    clean(node)
    expected = {make(node) for make in STRAYS}
    gone = file_of(node, "data/1/0").parents[3]
    shutil.rmtree(gone)
    with contextlib.closing(sqlite3.connect(node.state / "images.db", isolation_level=None)) as db:
        db.execute("INSERT INTO images VALUES ('sha256:x', '{}', '', '', 0, 1, 0)")
        db.execute("INSERT INTO image_layers VALUES ('sha256:x', 0, 'sha256:nowhere')")
    state = node.run_root / "cri" / "state.db"
    with contextlib.closing(sqlite3.connect(state)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(state, state.stat().st_size // 2)
    code, found = check(node)
    told = objects(found)
    expected |= {f"layer sha256:{gone.name}", "image sha256:x", f"file {state}"}
    assert code == FOUND
    assert expected <= set(told)
    above = {name for name in set(told) - expected if told[name].startswith("the layer below it")}
    assert set(told) - expected == above

    code, found = check(node, "--repair")
    assert {finding["state"] for finding in found} == {"repaired"}, found
    assert code == 0
    clean(node)
    node.start()
    assert {one.id for one in node.runtime.ListContainers(api_pb2.ListContainersRequest()).containers} == {
        container
    }
    assert client.status(container).state == 1
    shown = node.ctl("images").stdout
    assert "test/larger" not in shown
    assert "test/busybox" in shown
    clean(node, "--deep")
    client.remove_pod(pod)


def test_wipe_refuses_what_lives_and_then_takes_everything(node: Node, client: Client) -> None:
    _, container = client.running("sleep", "1000")
    refused = bulkhead(node, "wipe", "--all")
    assert refused.returncode == FOUND
    assert "another instance runs" in refused.stderr
    node.stop()
    refused = bulkhead(node, "wipe", "--all")
    assert (refused.returncode, container[:12] in refused.stderr) == (FOUND, True)
    assert f"container {container}" in refused.stdout
    assert bulkhead(node, "wipe", "--all", "--dry-run", "--force").returncode == 0
    assert os.listdir(node.run_root / "monitors") == [container]

    done = bulkhead(node, "wipe", "--all", "--force")
    assert done.returncode == 0, done.stderr
    assert node.leftovers() == []
    assert os.listdir(node.state / "layers") == []
    clean(node)
    node.start()
    assert node.ctl("images", "-q").stdout == node.ctl("ps", "-a", "-q").stdout == ""
