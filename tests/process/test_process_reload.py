"""SIGHUP on the whole daemon: what can change live does, what cannot is said, and a fault changes nothing."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.daemon import PLUGINS, Node, wait_for
from tests.support.images import served
from tests.support.kubelet import Kubelet, refusal
from tests.support.signing import Gpg, claim, put


class ConfiguredNode(Node):
    """A node whose daemon has in its file what could be a flag: flags win, and a reload changes no flag."""

    def command(self) -> list[str]:
        command = super().command()
        return command[: command.index("--cni-conf-dir")]

    def _config_text(self) -> str:
        cni = f'[cni]\nconf_dir = "{self.conf_dir}"\nbin_dirs = ["{PLUGINS}"]\n'
        return cni + "[timeouts]\nping = 0.2\n" + super()._config_text()


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    machine.enter()
    with (
        served(larger_files=1) as images,
        ConfiguredNode(registries=images.registries_conf, bridge="bhreload0") as node,
    ):
        yield Kubelet(node, images)


def log(node: Node) -> str:
    return (node.root / "daemon.log").read_text(errors="replace")


def reload(node: Node, drop_in: str, *said: str) -> None:
    """Put another drop-in in place and reload; wait for what the log says then."""
    (node.root / "bulkhead.toml.d" / "10-test.toml").write_text(drop_in)
    before = len(log(node))
    assert node.daemon is not None
    node.daemon.send_signal(signal.SIGHUP)
    for text in said:
        wait_for(functools.partial(is_said, node, text, before), f"the log says {text!r}")


def is_said(node: Node, text: str, begin: int) -> bool:
    return text in log(node)[begin:]


def taken(*kinds: str) -> list[str]:
    """What workers say that have new settings."""
    return [f'worker={kind} msg="settings taken"' for kind in kinds]


def runtime_of(kubelet: Kubelet, container_id: str) -> str:
    path = kubelet.node.run_root / "monitors" / container_id / "state.json"
    return str(json.loads(path.read_text())["runtime_name"])


def status(kubelet: Kubelet, *, verbose: bool = False) -> Any:
    return kubelet.node.runtime.Status(pb.StatusRequest(verbose=verbose), timeout=10)


def test_runtimes_and_their_default_change_for_the_next_pods(kubelet: Kubelet) -> None:
    kubelet.pull("busybox")
    sandbox = kubelet.sandbox()
    first = kubelet.created(sandbox=sandbox)
    text = 'default_runtime = "runc"\n[runtimes.other]\npath = "/usr/bin/crun"\n'
    said = 'changed="default_runtime runtimes"'
    reload(kubelet.node, text, said, *taken("cri"))
    assert runtime_of(kubelet, kubelet.created()) == "runc"
    assert runtime_of(kubelet, kubelet.created("other")) == "other"
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="second"),
        image=pb.ImageSpec(image=kubelet.name("busybox")),
        command=["true"],
        linux=pb.LinuxContainerConfig(
            security_context=pb.LinuxContainerSecurityContext(
                namespace_options=sandbox.linux.security_context.namespace_options
            )
        ),
    )
    request = pb.CreateContainerRequest(
        pod_sandbox_id=kubelet.run_pod(sandbox), config=config, sandbox_config=sandbox
    )
    second = kubelet.node.runtime.CreateContainer(request, timeout=60).container_id
    assert [runtime_of(kubelet, one) for one in (first, second)] == ["crun", "crun"]  # a pod keeps its own
    names = {handler.name for handler in status(kubelet).runtime_handlers}
    assert names == {"", "crun", "runc", "other"}
    host = json.loads(status(kubelet, verbose=True).info["host"])
    assert {one["name"]: bool(one["version"]) for one in host["runtimes"]} == {
        "crun": True,
        "runc": True,
        "other": True,
    }
    reload(kubelet.node, "", *taken("cri"))
    assert "no runtime handler is named 'other'" in refusal(lambda: kubelet.created("other")).details()
    assert runtime_of(kubelet, kubelet.created()) == "crun"


def test_pinned_images_defaults_and_timeouts_change_at_once(kubelet: Kubelet) -> None:
    kubelet.pull("busybox")

    def pinned() -> list[bool]:
        images = kubelet.node.images.ListImages(pb.ListImagesRequest(), timeout=10).images
        return [image.pinned for image in images]

    assert pinned() == [False]
    text = '[image]\npinned_images = ["*busybox*"]\n[containers]\ndefault_env = ["FROM_NODE=yes"]\n'
    text += "[timeouts]\nunpack = 100\nnetwork_teardown = 50\n"
    reload(kubelet.node, text, *taken("cri", "storage", "network"))
    assert pinned() == [True]
    assert kubelet.output("", "echo $FROM_NODE") == "yes\n"
    reload(kubelet.node, "", *taken("cri"))
    assert pinned() == [False]
    assert kubelet.output("", "echo $FROM_NODE") == "\n"


def test_the_log_level_changes_everywhere(kubelet: Kubelet) -> None:
    kubelet.pull("busybox")
    reload(kubelet.node, 'log_level = "error"\n')
    wait_for(lambda: quiet(kubelet), "nobody says what is no error")
    said = ["changed=log_level", "monitors that run keep their log level"]
    reload(kubelet.node, 'log_level = "info"\n', *said, *taken("cri", "storage", "network", "image"))


def quiet(kubelet: Kubelet) -> bool:
    before = len(log(kubelet.node))
    kubelet.pull("busybox")
    kubelet.remove(kubelet.running())
    kubelet.node.remove_everything()
    return "level=info" not in log(kubelet.node)[before:]


def test_what_is_slow_is_named_with_its_stage_in_the_form_that_was_asked_for(kubelet: Kubelet) -> None:
    node = kubelet.node
    kubelet.pull("busybox")
    plugin = node.root / "bin" / "crawling"
    plugin.parent.mkdir()
    plugin.write_text(f'#!/bin/sh\n[ "$CNI_COMMAND" != ADD ] || sleep 1.5\nexec {PLUGINS}/bridge\n')
    plugin.chmod(0o755)
    (node.root / "slow.d").mkdir()
    conflist = (
        (node.conf_dir / "10-test.conflist").read_text().replace('"type": "bridge"', '"type": "crawling"')
    )
    (node.root / "slow.d" / "10-slow.conflist").write_text(conflist)
    text = 'log_format = "json"\nlog_filter = "slow request|configuration"\n[timeouts]\nslow = 0.3\n'
    text += f'[cni]\nconf_dir = "{node.root}/slow.d"\nbin_dirs = ["{plugin.parent}", "{PLUGINS}"]\n'
    reload(node, text, "configuration reloaded")
    before = len(log(node))
    kubelet.run_pod(kubelet.sandbox())
    lines = [json.loads(line) for line in log(node)[before:].splitlines()]
    assert {line["msg"] for line in lines} == {"slow request"}
    stages = {(line["kind"], line["type"]): line["stage"] for line in lines}
    assert stages["cri", "RunPodSandbox"] == "network.pod.setup"
    assert stages["network", "network.pod.setup"].startswith("namespaces and CNI ADD of ")
    node.remove_everything()  # while there still is the plugin that has to undo its work


def test_networks_and_registries_are_read_from_other_places(kubelet: Kubelet) -> None:
    node = kubelet.node
    kubelet.pull("busybox")
    (node.root / "empty").mkdir()
    reload(node, f'[cni]\nconf_dir = "{node.root}/empty"\n', *taken("network"))
    assert [one.status for one in status(kubelet).status.conditions] == [True, False]
    reload(node, "", *taken("network"))
    assert [one.status for one in status(kubelet).status.conditions] == [True, True]
    closed = node.root / "closed.conf"
    closed.write_text(f'[[registry]]\nlocation = "{kubelet.images.address}"\nblocked = true\n')
    text = f'[image]\nregistries_conf = "{closed}"\n'
    reload(node, text, *taken("image"))
    wait_for(lambda: "blocked" in refused_pull(kubelet), "the registry is blocked")
    reload(node, "", 'msg="configuration reloaded"')
    wait_for(lambda: not refused_pull(kubelet), "the registry is open again")


def refused_pull(kubelet: Kubelet, *, image: str = "larger", namespace: str = "") -> str:
    pod = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(namespace=namespace))
    request = pb.PullImageRequest(image=pb.ImageSpec(image=kubelet.name(image)), sandbox_config=pod)
    try:
        kubelet.node.images.PullImage(request, timeout=30)
    except grpc.RpcError as error:
        return str(error)
    return ""


def test_a_signature_policy_holds_from_the_reload_on_and_kubelets_see_why(kubelet: Kubelet) -> None:
    node, where = kubelet.node, kubelet.images.address
    policy, policies = node.root / "policy.json", node.root / "policies"
    policies.mkdir()
    files = f'[image]\npolicy = "{policy}"\npolicy_dir = "{policies}"\n'
    files += f'registries_d = "{node.root}/registries.d"\n[timeouts]\nidle_exit = 1.0\n'
    policy.write_text('{"default": [{"type": "reject"}]}')
    reload(node, files, 'msg="configuration reloaded"', "image.policy ")
    said = refused_pull(kubelet)
    assert "StatusCode.UNKNOWN" in said
    assert 'details = "SignatureValidationFailed: ' in said
    policy.write_text('{"default": [{"type": "accept"}]}')
    reload(node, files, 'msg="configuration not reloaded"', f"{policy}: default[0]: Invalid value 'accept'")
    assert "are rejected" in refused_pull(kubelet)
    with Gpg() as gpg:
        (node.root / "key.gpg").write_bytes(gpg.key("builder"))
        signature = gpg.sign("builder", claim(kubelet.images.larger_digest, kubelet.name("larger")))
    put(node.root / "signatures", "test/larger", kubelet.images.larger_digest, signature)
    (node.root / "registries.d").mkdir()
    (node.root / "registries.d" / "all.yaml").write_text(
        f"docker: {{'{where}': {{lookaside: 'file://{node.root}/signatures'}}}}"
    )
    signed = f'{{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "{node.root}/key.gpg"}}'
    policy.write_text(f'{{"default": [{signed}]}}')
    (policies / "closed.json").write_text('{"default": [{"type": "reject"}]}')
    reload(node, files, "changed=image.policy", *taken("cri"))
    wait_for(lambda: not refused_pull(kubelet), "a worker verifies the signature")
    assert "are rejected" in refused_pull(kubelet, namespace="closed")
    assert not refused_pull(kubelet, namespace="open")
    unsigned = refused_pull(kubelet, image="busybox")
    assert "requires a signature (OpenPGP), and there is none" in unsigned


def test_a_fault_changes_nothing_and_a_fixed_key_is_said_to_be_one(kubelet: Kubelet) -> None:
    before = status(kubelet, verbose=True)
    faulty = 'default_runtime = "runc"\nlog_levle = "debug"\n'
    said = ['msg="configuration not reloaded"', "10-test.toml:2", "nearest valid key is log_level"]
    reload(kubelet.node, faulty, *said)
    reload(kubelet.node, "default_runtime = [", 'msg="configuration not reloaded"', "not TOML")
    reload(kubelet.node, 'default_runtime = "absent"\n', 'msg="configuration not reloaded"')
    after = status(kubelet, verbose=True)
    assert after.info["config"] == before.info["config"]
    assert after.runtime_handlers == before.runtime_handlers
    text = '[grpc]\nmax_requests = 9\n[restart]\nmax_delay = 3.0\n[cni]\ncache_dir = "/elsewhere"\n'
    fixed = 'msg="this key takes a restart" key=grpc.max_requests'
    reload(kubelet.node, text, fixed, "key=cni.cache_dir", "changed=restart.max_delay")
