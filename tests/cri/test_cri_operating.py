"""What an operator does, against a whole daemon: a look at everything, a reload, a stack dump, pruning, a
bundle.
"""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import machine
from tests.support.daemon import REPO, Node, wait_for
from tests.support.images import Served, served


@pytest.fixture(scope="module")
def images() -> Iterator[Served]:
    machine.enter()
    with served(larger_files=2) as found:
        yield found


@pytest.fixture(scope="module")
def node(images: Served) -> Iterator[Node]:
    with Node(registries=images.registries_conf, bridge="bhop0") as found:
        pod = {"metadata": {"name": "web", "namespace": "shop", "uid": "u"}, "log_directory": str(found.logs)}
        container = {
            "metadata": {"name": "server"},
            "image": {"image": images.busybox},
            "command": ["sleep", "1000"],
            "log_path": "server.log",
        }
        (found.root / "pod.json").write_text(json.dumps(pod))
        (found.root / "container.json").write_text(json.dumps(container))
        for image in (images.busybox, images.larger):
            found.ctl("pull", image)
        pod_id = found.ctl("runp", str(found.root / "pod.json")).stdout.strip()
        words = ("create", pod_id, str(found.root / "container.json"), str(found.root / "pod.json"))
        found.ctl("start", found.ctl(*words).stdout.strip())
        yield found
        assert f"Removed sandbox {pod_id}" in found.ctl("rmp", "--all", "--force").stdout


def test_status_is_one_screen(node: Node) -> None:
    text = node.ctl("status").stdout
    assert len(text.splitlines()) < 24
    assert text.startswith("Bulkhead ")
    assert "healthy" in text
    assert "pods        1 ready" in text
    assert "containers  1 running" in text
    assert "images      2, " in text
    assert "1 monitors" in text
    told = yaml.safe_load(node.ctl("info", "-o", "yaml").stdout)
    assert told == json.loads(node.ctl("status", "-o", "json").stdout) | {"freeBytes": told["freeBytes"]}
    assert told["counts"] == {"pods": {"ready": 1}, "containers": {"running": 1}, "images": 2}
    assert "\033" not in text


def test_colours_are_for_terminals(node: Node) -> None:
    def shown(**environment: str) -> str:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "supervisor.cli.bulkheadctl", "-r", str(node.socket)]
        subprocess.run(
            [*command, "--run-root", str(node.run_root), "status"],
            cwd=REPO,
            stdout=theirs,
            check=True,
            env={**os.environ, **environment},
        )
        os.close(theirs)
        text = os.read(ours, 65536).decode()
        os.close(ours)
        return text

    assert "\033[32mhealthy" in shown()
    assert "\033[32m" not in shown(NO_COLOR="1")


def test_a_death_is_on_the_screen(node: Node) -> None:
    node.kill_worker("network")
    wait_for(lambda: node.pids("network"), "network comes back")
    assert "last death  network: signal 9 (SIGKILL)" in node.ctl("status", check=False).stdout


def test_top_tells_pods_and_processes(node: Node) -> None:
    text = node.ctl("top", "-n", "1", "-d", "0.1").stdout
    assert any(line.startswith("pod") and "shop/web" in line and "%" in line for line in text.splitlines())
    assert any(line.startswith("process") and "cri" in line for line in text.splitlines())


def test_a_stack_dump_shows_where_a_worker_is(node: Node) -> None:
    pids = node.pids("cri")
    text = node.ctl("debug", "cri").stdout
    assert f"cri {pids[0]}:" in text
    assert "workers/cri/main.py" in text
    assert node.pids("cri") == pids
    assert node.ctl("debug", "nothing", check=False).returncode == 1


def test_a_reload_says_what_it_did(node: Node) -> None:
    drop_in = node.root / "bulkhead.toml.d/50-reload.toml"
    drop_in.write_text("[pools]\nimage = 3\n[grpc]\nmax_requests = 9\n")
    assert node.ctl("reload").stdout == "changed: pools.image\ntakes a restart: grpc.max_requests\n"
    drop_in.write_text("[pools]\nimages = 3\n")
    done = node.ctl("reload", check=False)
    assert done.returncode == 1
    assert f"{drop_in}:2: unknown key pools.images; the nearest valid key is pools.image" in done.stderr
    drop_in.unlink()
    assert node.ctl("reload").stdout == "changed: pools.image\n"


def test_prune_removes_what_nobody_uses(node: Node, images: Served) -> None:
    assert f"would delete: {images.larger}" in node.ctl("prune", "--dry-run").stdout
    text = node.ctl("prune", "--exited").stdout
    assert f"deleted: {images.larger}" in text
    assert images.busybox not in text
    assert len(node.ctl("images", "-q").stdout.split()) == 1


def test_a_bundle_holds_state_and_no_secrets(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    assert node.ctl("bundle", str(path)).stdout == f"{path}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        parts = {member.name.removeprefix("bulkhead/"): archive.extractfile(member) for member in archive}
        texts = {name: part.read().decode() for name, part in parts.items() if part is not None}
    assert {"status.json", "workers.json", "host.json", "config.toml", "log.txt", "mounts.txt"} <= set(texts)
    assert json.loads(texts["workers.json"])["workers"][0]["kind"] == "supervisor"
    assert f'run_root = "{node.run_root}"' in texts["config.toml"]
    assert "sleep 1000" not in "".join(texts.values())
    assert node.ctl("bundle", str(path), check=False).returncode == 1


def asked(node: Node, path: str) -> tuple[int, str]:
    """GET a path of the worker `ops`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(15)
        client.connect(str(node.run_root / "ops.sock"))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def test_pages_of_ops_tell_readiness_configuration_and_containers(node: Node) -> None:
    assert asked(node, "/readyz") == (200, "ok\n")
    status, text = asked(node, "/config")
    assert status == 200
    assert tomllib.loads(text)["run_root"] == str(node.run_root)
    container = node.ctl("ps", "-q").stdout.strip()
    status, text = asked(node, f"/containers/{container[:20]}")
    facts = json.loads(text)
    assert status == 200
    assert (facts["id"], facts["pod_name"], facts["state"]) == (container, "web", "running")
    assert facts["pid"] > 1
    assert facts["ip_addresses"]
    status, text = asked(node, "/containers/none")
    assert status == 404
    assert "no container" in text
    assert asked(node, "/containers/")[0] == 404
