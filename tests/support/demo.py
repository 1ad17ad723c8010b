"""Runs in: `make demo`.

Bulkhead shown in half a minute: a daemon on directories of its own, an image from a registry on loopback, a
pod with a container in it, its log, an exec, the workers; two workers are killed and nothing notices;
everything is removed again, and what was left behind is counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.support import machine
from tests.support.daemon import Node, alive, wait_for
from tests.support.images import served

COUNTER = 'i=0; while true; do echo "tick $i from $(hostname)"; i=$((i+1)); sleep 0.2; done'


def say(text: str) -> None:
    """Print what comes next."""
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def show(node: Node, *words: str) -> str:
    """Run bulkheadctl as a user would, print command and output, return the output."""
    print(f"$ bulkheadctl {' '.join(words)}", flush=True)
    output = node.ctl(*words).stdout
    print(output.rstrip(), flush=True)
    return output.strip()


def write(path: Path, document: object) -> str:
    """Write a JSON file; return its path."""
    path.write_text(json.dumps(document, indent=2))
    return str(path)


def demo(node: Node, image: str) -> None:
    """Everything, in the order of a user's first minutes."""
    say("the daemon runs: version and conditions")
    show(node, "version")
    show(node, "status")
    say("pull an image from a registry on loopback")
    show(node, "pull", image)
    show(node, "images")
    say("run a pod with one container")
    pod_file = write(
        node.root / "pod.json",
        {
            "metadata": {"name": "demo", "namespace": "default", "uid": "demo-uid"},
            "hostname": "demo",
            "log_directory": str(node.logs),
            "linux": {},
        },
    )
    container_file = write(
        node.root / "container.json",
        {
            "metadata": {"name": "counter"},
            "image": {"image": image},
            "command": ["sh", "-c", COUNTER],
            "log_path": "counter.log",
            "linux": {},
        },
    )
    pod = show(node, "runp", pod_file)
    container = show(node, "create", pod, container_file, pod_file)
    show(node, "start", container)
    time.sleep(1)
    show(node, "pods")
    show(node, "ps")
    say("its log, and a command in it")
    show(node, "logs", "--tail", "3", container)
    show(node, "exec", container, "sh", "-c", "id; ip -4 -o addr show eth0")
    say("every process of the map, and what holds in each worker")
    show(node, "workers")
    show(node, "workers", "--sandbox")
    crash(node, container)
    say("remove everything")
    show(node, "stop", "--grace", "0", container)
    show(node, "rm", container)
    show(node, "stopp", pod)
    show(node, "rmp", pod)
    show(node, "rmi", image)


def crash(node: Node, container: str) -> None:
    """Kill the CRI front and the storage worker; the container goes on."""
    say("SIGKILL cri and storage: the container does not notice")
    pid = json.loads((node.run_root / "monitors" / container / "state.json").read_text())["pid"]
    killed = [*node.kill_worker("cri"), *node.kill_worker("storage")]
    start = time.monotonic()
    wait_for(node.answers, "cri answers again")
    print(f"killed {killed}; the socket answered again after {time.monotonic() - start:.2f} s")
    print(f"the container's process {pid} is {'still there' if alive(pid) else 'GONE'}")
    show(node, "logs", "--tail", "2", container)
    show(node, "workers")


def main() -> None:
    """Set up, show, take down."""
    machine.enter()
    with served() as images:
        node = Node(registries=images.registries_conf, bridge="bhdemo0")
        say("bulkhead serve")
        print(f"$ bulkhead {' '.join(node.command()[3:])}")
        with node:
            demo(node, images.busybox)
        say("done: no mount, namespace, address, cgroup or process was left behind")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {error}")
