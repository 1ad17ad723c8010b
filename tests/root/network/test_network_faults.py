"""Plugins that fail, hang, crash and lie, and a worker that is killed: nothing half done, nothing lost.

A fake plugin only stands beside the real ones, to go wrong at the moment that the test needs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages import network
from tests.support.network_node import CriClient, Node, node, pod_setup, serving, wait_for

#: Passes the result before it on, as a chained plugin does. A test's own lines follow.
PASS = """
config=$(cat)
pass() {
    printf '%s' "$config" | /usr/bin/python3 -S -c '
import json, sys
print(json.dumps(json.load(sys.stdin).get("prevResult", {})))'
}
case $CNI_COMMAND in VERSION)
    echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}'
    exit 0;;
esac
"""


#: A caller that can be killed.
CALLER = """
import sys
from tests.support.network_node import CriClient, pod_setup
CriClient(sys.argv[1]).call(pod_setup())
"""
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def here() -> Iterator[Node]:
    with node(setup_timeout=20.0, teardown_timeout=10.0) as made:
        yield made


@pytest.fixture
def client(here: Node) -> Iterator[CriClient]:
    with serving(here) as made:
        yield made


def fails(client: CriClient, request: Any = None) -> RemoteError:
    with pytest.raises(RemoteError) as failure:
        client.call(request or pod_setup())
    return failure.value


def nothing_is_left(here: Node, client: CriClient) -> None:
    assert client.call(network.PodList()).pods == []
    assert here.held_addresses() == []
    assert not any(here.pins.iterdir())


def test_the_plugins_own_sentence_is_answered(here: Node, client: CriClient) -> None:
    here.fake(
        "bad",
        PASS
        + """[ $CNI_COMMAND = ADD ] || exit 0
        echo '{"cniVersion":"1.0.0","code":7,"msg":"no such uplink","details":"ens9 is missing"}'; exit 1""",
    )
    here.bridge_conf({"type": "bad"})
    error = fails(client)
    assert error.code is Code.INTERNAL
    assert (
        error.text
        == 'CNI plugin "bad", ADD, network "testnet": no such uplink: ens9 is missing (CNI error 7)'
    )
    nothing_is_left(here, client)


def test_try_again_later_is_unavailable(here: Node, client: CriClient) -> None:
    here.fake(
        "bad",
        PASS
        + """[ $CNI_COMMAND = ADD ] || exit 0
        echo '{"cniVersion":"1.0.0","code":11,"msg":"agent is starting"}'; exit 1""",
    )
    here.bridge_conf({"type": "bad"})
    assert fails(client).code is Code.UNAVAILABLE
    nothing_is_left(here, client)


@pytest.mark.parametrize(
    ("last_line", "said"),
    [
        ("echo this is no JSON", "its result is not JSON: this is no JSON"),
        ("true", "its result is not JSON"),
        ("echo '[]'", "its result is not a JSON object"),
        ('echo \'{"cniVersion":"9.9.9"}\'', "CNI version '9.9.9'"),
        ('echo \'{"cniVersion":"1.0.0","ips":[{"address":"nonsense"}]}\'', "'nonsense' for an address"),
        ('echo \'{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/8","interface":7}]}\'', "interface 7"),
        ("echo oh dear >&2; exit 3", "oh dear (exit code 3)"),
        ("kill -9 $$", "killed by signal 9"),
        ("exec yes", "printed more than"),
    ],
)
def test_what_a_plugin_says_wrongly_is_named_and_undone(
    here: Node, client: CriClient, last_line: str, said: str
) -> None:
    here.fake("bad", PASS + f"[ $CNI_COMMAND = ADD ] || exit 0\n{last_line}\n")
    here.bridge_conf({"type": "bad"})
    error = fails(client)
    assert said in error.text
    assert 'CNI plugin "bad", ADD' in error.text or "its result" in error.text
    nothing_is_left(here, client)


def test_a_plugin_that_hangs_is_killed_with_all_it_started(here: Node) -> None:
    here.settings.setup_timeout = 1.0
    with serving(here) as client:
        here.fake(
            "bad",
            PASS
            + f"""[ $CNI_COMMAND = ADD ] || exit 0
            (sleep 600; echo {here.root}) & echo waiting for the moon >&2; wait""",
        )
        here.bridge_conf({"type": "bad"})
        begun = time.monotonic()
        error = fails(client)
        assert error.code is Code.DEADLINE_EXCEEDED
        assert "waiting for the moon" in error.text
        assert time.monotonic() - begun < 5
        nothing_is_left(here, client)


def test_a_plugin_that_is_missing_is_named_with_the_directories(here: Node, client: CriClient) -> None:
    here.bridge_conf({"type": "nowhere"})
    error = fails(client)
    assert f"there is no such program in {here.fake_dir}, /usr/lib/cni" in error.text
    assert client.call(network.PodList()).pods == ["pod0"]  # DEL needs it too: kept, to be done later
    here.fake("nowhere", PASS)
    client.call(network.PodTeardown(pod_id="pod0"))
    nothing_is_left(here, client)


def test_a_failed_del_keeps_the_record_until_it_works(here: Node, client: CriClient) -> None:
    here.fake("bad", PASS + 'if [ $CNI_COMMAND = DEL ]; then echo \'{"msg":"not today"}\'; exit 1; fi; pass')
    here.bridge_conf({"type": "bad"})
    pod = client.call(pod_setup())
    error = fails(client, network.PodTeardown(pod_id="pod0"))
    assert "not today" in error.text
    assert client.call(network.PodList()).pods == ["pod0"]
    assert here.held_addresses() == pod.ips
    here.fake("bad", PASS)
    client.call(network.PodTeardown(pod_id="pod0"))
    nothing_is_left(here, client)


def test_setup_after_a_failed_teardown_begins_anew(here: Node, client: CriClient) -> None:
    here.fake("bad", PASS + "if [ $CNI_COMMAND = DEL ]; then exit 1; fi; pass")
    here.bridge_conf({"type": "bad"})
    client.call(pod_setup())
    fails(client, network.PodTeardown(pod_id="pod0"))
    fails(client)
    here.fake("bad", PASS + "pass")
    assert len(client.call(pod_setup()).ips) == 1
    assert len(here.held_addresses()) == 1
    client.call(network.PodTeardown(pod_id="pod0"))


def test_if_undoing_fails_too_both_are_told_and_it_is_finished_later(here: Node, client: CriClient) -> None:
    here.fake("bad", PASS + "echo broken in $CNI_COMMAND >&2; exit 1")
    here.bridge_conf({"type": "bad"})
    error = fails(client)
    assert "broken in ADD" in error.text
    assert "broken in DEL" in error.text
    assert client.call(network.PodList()).pods == ["pod0"]
    here.fake("bad", PASS + "pass")
    assert len(client.call(pod_setup()).ips) == 1
    assert len(here.held_addresses()) == 1
    client.call(network.PodTeardown(pod_id="pod0"))
    nothing_is_left(here, client)


def test_del_gets_the_recorded_result_capabilities_and_args(here: Node, client: CriClient) -> None:
    here.fake(
        "spy",
        PASS + f'printf "%s" "$config" > {here.root}/$CNI_COMMAND.json; '
        f"env | grep ^CNI_ > {here.root}/$CNI_COMMAND.env; pass",
    )
    capabilities = {"portMappings": True, "io.kubernetes.cri.pod-annotations": True, "dns": False, "x": True}
    here.bridge_conf({"type": "spy", "capabilities": capabilities})
    request = pod_setup(
        annotations={"team": "blue"},
        dns_servers=["10.0.0.10"],
        port_mappings=[
            network.PortMapping(protocol="UDP", container_port=53, host_port=5353, host_ip="127.0.0.1")
        ],
    )
    pod = client.call(request)
    client.call(network.PodTeardown(pod_id="pod0"))
    told = json.loads((here.root / "DEL.json").read_text())
    assert told["prevResult"] == json.loads(pod.cni_result)
    assert told["runtimeConfig"] == {
        "portMappings": [{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}],
        "io.kubernetes.cri.pod-annotations": {"team": "blue"},
    }
    assert "capabilities" not in told
    environment = dict(line.split("=", 1) for line in (here.root / "DEL.env").read_text().splitlines())
    assert environment == {
        "CNI_COMMAND": "DEL",
        "CNI_CONTAINERID": "pod0",
        "CNI_NETNS": pod.namespaces["net"],
        "CNI_IFNAME": "eth0",
        "CNI_PATH": f"{here.fake_dir}:/usr/lib/cni",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=name-of-pod0;"
        "K8S_POD_INFRA_CONTAINER_ID=pod0;K8S_POD_UID=uid-of-pod0",
    }


def test_a_daemon_that_a_plugin_leaves_behind_holds_nothing_up(here: Node, client: CriClient) -> None:
    here.fake(
        "daemon",
        PASS
        + f"""[ $CNI_COMMAND = ADD ] || exit 0
        sleep 600 & echo $! > {here.root}/daemon.pid; pass""",
    )
    here.bridge_conf({"type": "daemon"})
    begun = time.monotonic()
    client.call(pod_setup())
    client.call(network.PodTeardown(pod_id="pod0"))
    assert time.monotonic() - begun < 10
    os.kill(int((here.root / "daemon.pid").read_text()), signal.SIGKILL)


def test_an_operation_whose_callers_time_is_over_is_undone_and_can_be_begun_again(
    here: Node, client: CriClient
) -> None:
    here.fake("slow", PASS + f"[ $CNI_COMMAND = ADD ] && {{ touch {here.root}/begun; sleep 1; }}; pass")
    here.bridge_conf({"type": "slow"})
    with here.client(timeout=0.3) as impatient:
        assert fails(impatient).code is Code.DEADLINE_EXCEEDED
    # ADD was given no longer than its caller would wait; this caller waits.
    assert len(client.call(pod_setup()).ips) == 1
    assert len(here.held_addresses()) == 1
    client.call(network.PodTeardown(pod_id="pod0"))


def test_an_operation_whose_caller_went_is_finished(here: Node, client: CriClient) -> None:
    here.fake("slow", PASS + f"[ $CNI_COMMAND = ADD ] && {{ touch {here.root}/begun; sleep 1; }}; pass")
    here.bridge_conf({"type": "slow"})
    going = subprocess.Popen([sys.executable, "-c", CALLER, here.socket_path], cwd=REPOSITORY)
    wait_for((here.root / "begun").exists)
    going.kill()
    going.wait()
    wait_for(lambda: json.loads((here.records / "pod0.json").read_text())["state"] == "ready")
    begun = time.monotonic()
    assert client.call(pod_setup()).ips == here.held_addresses()
    assert time.monotonic() - begun < 1  # from the record
    client.call(network.PodTeardown(pod_id="pod0"))
    nothing_is_left(here, client)


def in_background(here: Node, result: list[Any]) -> threading.Thread:
    def call() -> None:
        with here.client() as own:
            try:
                result.append(own.call(pod_setup()))
            except RemoteError as error:
                result.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_worker_killed_in_the_middle_of_add_leaves_one_address_after_the_retry(
    here: Node, client: CriClient, order: str
) -> None:
    slow = {"type": "slow"}
    here.fake(
        "slow",
        PASS
        + f"[ $CNI_COMMAND = ADD ] && {{ touch {here.root}/begun; sleep $(cat {here.root}/nap); }}\n"
        + f"[ $CNI_COMMAND = DEL ] && [ ! -e {here.root}/stumbled ] && touch {here.root}/stumbled && exit 1\n"
        + "pass",
    )
    (here.root / "nap").write_text("600")
    plugins = [slow, here.bridge()] if order == "before" else [here.bridge(), slow]
    here.write_conf("10.conflist", {"cniVersion": "1.0.0", "name": "testnet", "plugins": plugins})
    result: list[Any] = []
    caller = in_background(here, result)
    wait_for((here.root / "begun").exists)
    assert len(here.held_addresses()) == (order == "after")
    here.kill()
    (here.root / "nap").write_text("0")
    here.start()
    caller.join(30)
    assert isinstance(result[0], network.PodNetwork), result  # the caller only waited longer
    assert (here.root / "stumbled").exists()  # DEL of what was half made may fail once
    assert here.held_addresses() == result[0].ips
    assert len(here.links()) == 2  # the bridge and one veth
    client.call(network.PodTeardown(pod_id="pod0"))
    nothing_is_left(here, client)


def test_what_a_killed_workers_plugin_started_does_nothing_more(here: Node, client: CriClient) -> None:
    # The grandchild outlives plugin and worker, as host-local under bridge would.
    here.fake(
        "slow",
        PASS
        + f"""[ $CNI_COMMAND = ADD ] && [ ! -e {here.root}/begun ] && {{
        (touch {here.root}/begun; sleep 1.5; touch {here.root}/late) & wait; }}; pass""",
    )
    here.bridge_conf({"type": "slow"})
    result: list[Any] = []
    caller = in_background(here, result)
    wait_for((here.root / "begun").exists)
    here.kill()
    here.start()
    caller.join(30)
    assert isinstance(result[0], network.PodNetwork), result
    time.sleep(1.6)
    assert not (here.root / "late").exists()
    assert "orphan of an interrupted network operation killed" in here.log()
    client.call(network.PodTeardown(pod_id="pod0"))


def test_a_worker_killed_in_the_middle_of_del_is_followed_by_one_that_finishes(
    here: Node, client: CriClient
) -> None:
    here.fake(
        "slow",
        PASS
        + f"[ $CNI_COMMAND = DEL ] && {{ touch {here.root}/begun; sleep $(cat {here.root}/nap); }}; pass",
    )
    here.bridge_conf({"type": "slow"})
    (here.root / "nap").write_text("600")
    client.call(pod_setup())
    removed = threading.Thread(target=lambda: client.call(network.PodTeardown(pod_id="pod0")))
    removed.start()
    wait_for((here.root / "begun").exists)
    here.kill()
    (here.root / "nap").write_text("0")
    here.start()
    removed.join(30)
    assert not removed.is_alive()
    nothing_is_left(here, client)


def test_a_worker_killed_while_idle_is_not_missed(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    pod = client.call(pod_setup())
    here.kill()
    here.start()
    assert client.call(pod_setup()) == pod
    client.call(network.PodCheck(pod_id="pod0"))
    client.call(network.PodTeardown(pod_id="pod0"))
    nothing_is_left(here, client)


def test_a_child_that_is_killed_is_undone(here: Node, client: CriClient) -> None:
    here.fake("killer", PASS + "[ $CNI_COMMAND = ADD ] && kill -9 $PPID; pass")
    here.bridge_conf({"type": "killer"})
    error = fails(client)
    assert error.code is Code.UNAVAILABLE
    assert "killed by signal 9" in error.text
    nothing_is_left(here, client)


def test_a_record_of_an_earlier_boot_is_undone_before_the_pod_is_made(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    client.call(pod_setup())
    path = here.records / "pod0.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"boot_id": "another"}))
    assert len(client.call(pod_setup()).ips) == 1
    assert len(here.held_addresses()) == 1
    assert json.loads(path.read_text())["boot_id"] != "another"
    client.call(network.PodTeardown(pod_id="pod0"))


def test_a_damaged_record_is_set_aside(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    path = here.records / "pod0.json"
    path.write_text("{")
    assert client.call(network.PodList()).pods == ["pod0"]
    client.call(network.PodTeardown(pod_id="pod0"))
    assert client.call(network.PodList()).pods == []
    (here.records / "pod0.json.damaged").unlink()
