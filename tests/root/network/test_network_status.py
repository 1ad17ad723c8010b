"""What the worker says of the node's network, and what it asks of plugins without a pod."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ipc.messages import network
from tests.support.network_node import CriClient, Node, node, pod_setup, serving

#: A plugin of version 1.1.0, which the distribution's plugins are not yet.
MODERN = """
config=$(cat)
printf '%s\\n' "$config" >> ROOT/$CNI_COMMAND.log
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}';;
ADD) echo '{"cniVersion":"1.1.0","ips":[{"address":"10.9.9.9/24"}]}';;
STATUS)
    [ ! -e ROOT/down ] && exit 0
    echo '{"cniVersion":"1.1.0","code":50,"msg":"the agent does not answer"}'
    exit 1;;
esac
"""


@pytest.fixture
def here() -> Iterator[Node]:
    with node() as made:
        yield made


@pytest.fixture
def client(here: Node) -> Iterator[CriClient]:
    with serving(here) as made:
        yield made


def modern(here: Node, **more: object) -> None:
    here.fake("modern", MODERN.replace("ROOT", str(here.root)))
    plugins = [{"type": "modern"}]
    here.write_conf("10.conflist", {"cniVersion": "1.1.0", "name": "testnet", "plugins": plugins, **more})


def runs(here: Node, command: str) -> list[dict[str, object]]:
    path = here.root / f"{command}.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_without_configuration_the_directory_is_named(here: Node, client: CriClient) -> None:
    state = client.call(network.StatusGet())
    assert not state.ready
    assert state.reason == "NetworkPluginNotReady"
    assert state.message == f"no CNI network in {here.conf_dir}: no file with .conflist, .conf, .json"


def test_each_bad_file_is_named_and_a_good_one_makes_it_ready(here: Node, client: CriClient) -> None:
    here.write_conf("01-a.conflist", "{")
    here.write_conf("02-b.conf", {"cniVersion": "1.0.0", "name": "b"})
    message = client.call(network.StatusGet()).message
    assert "01-a.conflist: not JSON" in message
    assert '02-b.conf: plugin 0 has no "type"' in message
    path = here.bridge_conf()
    state = client.call(network.StatusGet())
    assert state.ready, state
    assert (state.network, state.configuration) == ("testnet", str(path))
    path.unlink()
    assert not client.call(network.StatusGet()).ready


def test_a_missing_program_makes_it_unready_by_name(here: Node, client: CriClient) -> None:
    here.bridge_conf({"type": "nowhere"})
    state = client.call(network.StatusGet())
    assert not state.ready
    assert 'CNI plugin "nowhere"' in state.message


def test_a_program_that_does_not_know_the_lists_version_makes_it_unready(
    here: Node, client: CriClient
) -> None:
    here.bridge_conf(version="1.1.0")
    state = client.call(network.StatusGet())
    assert not state.ready
    assert 'CNI plugin "bridge" knows versions' in state.message
    assert 'network "testnet" asks for 1.1.0' in state.message


def test_status_is_asked_of_plugins_at_most_every_few_seconds(here: Node, client: CriClient) -> None:
    modern(here)
    for _ in range(20):
        assert client.call(network.StatusGet()).ready
    assert len(runs(here, "STATUS")) == 1
    assert len(runs(here, "VERSION")) == 1
    (here.root / "down").touch()
    modern(here, disableCheck=True)  # another configuration: asked at once
    state = client.call(network.StatusGet())
    assert not state.ready
    assert "the agent does not answer" in state.message
    assert len(runs(here, "VERSION")) == 2  # the program was written anew too


def test_gc_runs_once_before_the_first_add_and_spares_every_pod(here: Node, client: CriClient) -> None:
    modern(here)
    assert client.call(pod_setup("pod0")).ips == ["10.9.9.9"]
    client.call(pod_setup("pod1"))
    collected = runs(here, "GC")
    assert len(collected) == 1
    assert collected[0]["cni.dev/valid-attachments"] == []
    assert "prevResult" not in collected[0]
    here.kill()
    here.start()
    client.call(pod_setup("pod2"))
    assert len(runs(here, "GC")) == 1
    here.kill()
    (here.run_root / "net" / "gc.marks").unlink()  # as if it had never been done
    here.start()
    client.call(pod_setup("pod3"))
    standing = [{"containerID": f"pod{number}", "ifname": "eth0"} for number in range(3)]
    assert runs(here, "GC")[1]["cni.dev/valid-attachments"] == standing
    for pod_id in ("pod0", "pod1", "pod2", "pod3"):
        client.call(network.PodTeardown(pod_id=pod_id))


def test_a_list_that_forbids_gc_is_not_collected(here: Node, client: CriClient) -> None:
    modern(here, disableGC=True)
    client.call(pod_setup())
    assert runs(here, "GC") == []
    client.call(network.PodTeardown(pod_id="pod0"))


def test_the_named_network_is_taken_whatever_stands_before_it(here: Node) -> None:
    here.settings.default_network = "wanted"
    with serving(here) as client:
        here.bridge_conf()
        state = client.call(network.StatusGet())
        assert 'no CNI network "wanted"' in state.message
        entry = {"type": "ptp", "ipam": here.host_local()}
        path = here.write_conf("90.conflist", {"cniVersion": "1.0.0", "name": "wanted", "plugins": [entry]})
        assert client.call(network.StatusGet()).configuration == str(path)
