"""What runs, as whom, with which environment: the precedence of node, image and request."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from tests.support import spec_inputs as make
from workers.cri.spec import exec_process
from workers.cri.spec import image as image_module
from workers.cri.spec import process as process_module
from workers.cri.spec.capabilities import DEFAULT, NAMES
from workers.cri.spec.security import apparmor_wanted
from workers.cri.spec.signals import NAMES as SIGNAL_NAMES
from workers.cri.spec.signals import stop_signal

Security = api_pb2.LinuxContainerSecurityContext


def process(config: api_pb2.ContainerConfig | None = None, **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = make.spec(config, **changes)["process"]
    return result


def image(**fields: Any) -> bytes:
    """An image config whose `config` object is exactly these fields."""
    return msgspec.json.encode({"config": fields})


@pytest.mark.parametrize(
    ("command", "args", "entrypoint", "cmd", "expected"),
    [
        ([], [], ["e"], ["c"], ["e", "c"]),
        ([], [], None, ["c"], ["c"]),
        ([], [], ["e"], None, ["e"]),
        ([], ["a"], ["e"], ["c"], ["e", "a"]),
        (["x"], [], ["e"], ["c"], ["x"]),
        (["x"], ["a", "b"], ["e"], ["c"], ["x", "a", "b"]),
        ([], ["a"], None, None, ["a"]),
    ],
)
def test_command_replaces_entrypoint_and_cmd_and_args_replace_cmd(
    command: list[str], args: list[str], entrypoint: Any, cmd: Any, expected: list[str]
) -> None:
    config = make.container(command=command, args=args)
    assert process(config, image_config=image(Entrypoint=entrypoint, Cmd=cmd))["args"] == expected


@pytest.mark.parametrize("content", [b"{}", b'{"config":null}', b'{"config":{"Cmd":[""]}}'])
def test_no_command_at_all_is_refused(content: bytes) -> None:
    with pytest.raises(RemoteError, match="no command") as refused:
        process(image_config=content)
    assert refused.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"config":{"Env":"A=1"}}', b'{"config":{"Cmd":[1]}}', b"\xff"]
)
def test_image_config_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(RemoteError, match="image's config is not valid"):
        process(image_config=content)


def environment(config: api_pb2.ContainerConfig | None = None, **changes: Any) -> dict[str, str]:
    entries = process(config, **changes)["env"]
    pairs = [entry.split("=", 1) for entry in entries]
    assert len({key for key, _ in pairs}) == len(pairs), "a variable stands twice"
    return dict(pairs)


def test_environment_of_the_request_beats_the_image_beats_the_node() -> None:
    config = make.container(envs=[api_pb2.KeyValue(key="C", value=b"request")])
    found = environment(
        config,
        settings=make.settings(default_env=["A=node", "B=node", "C=node", "NOTHING"]),
        image_config=make.image_config(Env=["B=image", "C=image", "=odd"]),
    )
    assert (found["A"], found["B"], found["C"]) == ("node", "image", "request")
    assert "NOTHING" not in found
    assert "" not in found


def test_path_hostname_and_home_are_set_where_nobody_sets_them() -> None:
    found = environment()
    assert found["PATH"] == process_module.DEFAULT_PATH
    assert (found["HOSTNAME"], found["HOME"]) == ("pod-host", "/root")
    own = image(Cmd=["x"], Env=["PATH=/own", "HOME=/there", "HOSTNAME=mine"])
    assert {"PATH": "/own", "HOME": "/there", "HOSTNAME": "mine"}.items() <= environment(
        image_config=own
    ).items()


def test_term_is_set_with_a_terminal_only() -> None:
    assert "TERM" not in environment()
    assert environment(make.container(tty=True))["TERM"] == "xterm"
    own = make.container(tty=True, envs=[api_pb2.KeyValue(key="TERM", value=b"vt100")])
    assert environment(own)["TERM"] == "vt100"
    assert process(own)["terminal"] is True


def test_values_keep_equals_signs_and_utf8() -> None:
    config = make.container(envs=[api_pb2.KeyValue(key="A", value="x=ü=\n".encode())])
    assert environment(config)["A"] == "x=ü=\n"


@pytest.mark.parametrize(
    ("key", "value"), [("", b"x"), ("A=B", b"x"), ("A", b"\xff"), ("A", b"x\0y"), ("A\0", b"")]
)
def test_variable_that_cannot_be_passed_on_is_refused(key: str, value: bytes) -> None:
    with pytest.raises(RemoteError, match="envs"):
        process(make.container(envs=[api_pb2.KeyValue(key=key, value=value)]))


@pytest.mark.parametrize(
    ("requested", "of_image", "expected"),
    [("", "", "/"), ("", "/app/", "/app"), ("", "app", "/app"), ("/x//y/", "/app", "/x/y")],
)
def test_working_directory_of_the_request_beats_the_image(
    requested: str, of_image: str, expected: str
) -> None:
    config = make.container(working_dir=requested)
    assert process(config, image_config=image(Cmd=["x"], WorkingDir=of_image))["cwd"] == expected


@pytest.mark.parametrize("path", ["app", "/../x", "/a/../../b"])
def test_relative_or_climbing_working_directory_is_refused(path: str) -> None:
    with pytest.raises(RemoteError, match="working_dir"):
        process(make.container(working_dir=path))


def test_primary_group_is_among_the_supplementary_ones() -> None:
    user = process(rootfs=make.rootfs(uid=7, gid=8, additional_gids=[9, 8]))["user"]
    assert user == {"uid": 7, "gid": 8, "additionalGids": [8, 9]}


def capability_sets(
    add: list[str] | None = None,
    drop: list[str] | None = None,
    ambient: list[str] | None = None,
    **changes: Any,
) -> dict[str, list[str]]:
    wanted = api_pb2.Capability(
        add_capabilities=add or [], drop_capabilities=drop or [], add_ambient_capabilities=ambient or []
    )
    sets: dict[str, list[str]] = process(make.container(Security(capabilities=wanted)), **changes)[
        "capabilities"
    ]
    return sets


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        ([], [], set(DEFAULT)),
        (["NET_ADMIN"], [], {*DEFAULT, "CAP_NET_ADMIN"}),
        (["cap_net_admin"], ["Cap_Kill"], {*DEFAULT, "CAP_NET_ADMIN"} - {"CAP_KILL"}),
        (["ALL"], [], set(NAMES)),
        (["all"], ["SYS_ADMIN"], set(NAMES) - {"CAP_SYS_ADMIN"}),
        ([], ["ALL"], set()),
        (["CHOWN"], ["ALL"], {"CAP_CHOWN"}),
        (["ALL", "KILL"], ["ALL"], {"CAP_KILL"}),
        (["KILL"], ["KILL"], set(DEFAULT) - {"CAP_KILL"}),
    ],
)
def test_capabilities_are_added_and_dropped(add: list[str], drop: list[str], expected: set[str]) -> None:
    sets = capability_sets(add, drop)
    for name in ("bounding", "effective", "permitted"):
        assert set(sets[name]) == expected
    assert sets["inheritable"] == sets["ambient"] == []


def test_default_capabilities_are_those_of_the_configuration() -> None:
    sets = capability_sets(settings=make.settings(default_capabilities=["NET_RAW", "CAP_KILL"]))
    assert set(sets["effective"]) == {"CAP_NET_RAW", "CAP_KILL"}


def test_ambient_capability_is_in_every_set() -> None:
    sets = capability_sets(drop=["ALL"], ambient=["NET_RAW"])
    assert all(names == ["CAP_NET_RAW"] for names in sets.values())


@pytest.mark.parametrize("name", ["", "CAP_", "EVERYTHING", "CAP_CAP_KILL"])
def test_unknown_capability_is_refused(name: str) -> None:
    with pytest.raises(RemoteError, match="is not the name of a capability"):
        capability_sets(add=[name])


def test_what_the_node_does_not_have_is_left_out_with_a_note() -> None:
    host = make.host(capabilities=[name for name in NAMES if name != "CAP_SYS_RESOURCE"])
    config = make.container(Security(privileged=True))
    made = make.built(config, host=host, sandbox=make.privileged_sandbox())
    sets = msgspec.json.decode(made.spec)["process"]["capabilities"]
    assert set(sets["bounding"]) == set(NAMES) - {"CAP_SYS_RESOURCE"}
    assert any("CAP_SYS_RESOURCE" in note for note in made.degraded)


def test_rlimits_come_from_the_configuration() -> None:
    ulimits = ["nofile=10:20", "core=0", "MEMLOCK=unlimited", "nproc=5:-1"]
    assert process(settings=make.settings(default_ulimits=ulimits))["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_MEMLOCK", "soft": 2**64 - 1, "hard": 2**64 - 1},
        {"type": "RLIMIT_NPROC", "soft": 5, "hard": 2**64 - 1},
    ]
    assert "rlimits" not in process()


@pytest.mark.parametrize(
    "entry", ["nofile", "nofile=", "nofile=a", "files=1", "nofile=2:1", "nofile=-2", "core=1:2:3"]
)
def test_ulimit_that_is_none_is_the_nodes_fault(entry: str) -> None:
    with pytest.raises(RemoteError, match="default_ulimits") as refused:
        process(settings=make.settings(default_ulimits=[entry]))
    assert refused.value.code is Code.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("wanted", "floor", "expected"), [(0, -1000, 0), (-998, -1000, -998), (-998, 0, 0), (7, 0, 7)]
)
def test_oom_score_is_as_low_as_the_node_lets_us_go(wanted: int, floor: int, expected: int) -> None:
    config = make.container(resources=api_pb2.LinuxContainerResources(oom_score_adj=wanted))
    made = make.built(config, host=make.host(oom_score_floor=floor))
    assert msgspec.json.decode(made.spec)["process"]["oomScoreAdj"] == expected
    assert bool(made.degraded) is (wanted < floor)


@pytest.mark.parametrize("wanted", [-1001, 1001])
def test_oom_score_out_of_range_is_refused(wanted: int) -> None:
    with pytest.raises(RemoteError, match="oom_score_adj"):
        process(make.container(resources=api_pb2.LinuxContainerResources(oom_score_adj=wanted)))


def test_exec_process_is_the_containers_own_with_another_command() -> None:
    made = make.built(make.container(Security(no_new_privs=True), tty=True))
    own = msgspec.json.decode(made.spec)["process"]
    assert msgspec.json.decode(exec_process(made.spec, ["ls", "-l"])) == own | {
        "args": ["ls", "-l"],
        "terminal": False,
    }


def test_exec_with_a_terminal_has_a_term() -> None:
    process_object = msgspec.json.decode(exec_process(make.built().spec, ["sh"], tty=True))
    assert process_object["terminal"] is True
    assert "TERM=xterm" in process_object["env"]
    own = make.built(make.container(envs=[api_pb2.KeyValue(key="TERM", value=b"vt100")])).spec
    entries = msgspec.json.decode(exec_process(own, ["sh"], tty=True))["env"]
    assert [entry for entry in entries if entry.startswith("TERM=")] == ["TERM=vt100"]


def limit_of_stack(soft: int) -> dict[str, Any]:
    return {"type": "RLIMIT_STACK", "soft": soft, "hard": soft}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"args": ["sh", "x" * 131072]},
            "argument 'x{32}' has 131072 bytes: .* at most 131071",
        ),
        ({"env": ["BIG=" + "ü" * 65536]}, "variable 'BIG' has 131076 bytes: .* at most 131071"),
        ({"args": ["x" * 131071] * 16}, "together: the kernel takes at most 2097152"),
        ({"args": ["x" * 131071] * 2, "rlimits": [limit_of_stack(4096)]}, "kernel takes at most 131072"),
    ],
)
def test_more_than_execve_takes_is_refused_with_the_limit(changes: dict[str, Any], words: str) -> None:
    made = {"args": ["x" * 131071], "env": ["A=b"], "rlimits": [limit_of_stack(8 << 20)]}
    process_module.check_size(made)
    with pytest.raises(RemoteError, match=words) as refused:
        process_module.check_size(made | changes)
    assert refused.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("command", [[], ["a\0b"]])
def test_exec_of_nothing_is_refused(command: list[str]) -> None:
    with pytest.raises(RemoteError):
        exec_process(make.built().spec, command)


@pytest.mark.parametrize(
    ("requested", "of_image", "expected"),
    [
        ("SIGNAL_RUNTIME_DEFAULT", "", "SIGTERM"),
        ("SIGNAL_RUNTIME_DEFAULT", "SIGQUIT", "SIGQUIT"),
        ("SIGNAL_RUNTIME_DEFAULT", "quit", "SIGQUIT"),
        ("SIGNAL_RUNTIME_DEFAULT", "3", "SIGQUIT"),
        ("SIGNAL_RUNTIME_DEFAULT", "37", "SIGRTMIN+3"),
        ("SIGNAL_RUNTIME_DEFAULT", "63", "SIGRTMAX-1"),
        ("SIGNAL_RUNTIME_DEFAULT", "SIGRTMIN+3", "SIGRTMIN+3"),
        ("SIGNAL_SIGUSR1", "SIGQUIT", "SIGUSR1"),
        ("SIGNAL_SIGRTMINPLUS15", "", "SIGRTMIN+15"),
        ("SIGNAL_SIGRTMAXMINUS14", "", "SIGRTMAX-14"),
        ("SIGNAL_SIGPOLL", "", "SIGIO"),
    ],
)
def test_stop_signal_of_the_request_beats_the_image(requested: str, of_image: str, expected: str) -> None:
    config = make.container(stop_signal=requested)
    assert make.built(config, image_config=image(Cmd=["x"], StopSignal=of_image)).stop_signal == expected


def test_every_signal_of_the_api_has_one_of_our_names() -> None:
    execution = image_module.Execution()
    names = {
        stop_signal(api_pb2.ContainerConfig(stop_signal=api_pb2.Signal.Name(value)), execution)
        for value in api_pb2.Signal.values()
        if value
    }
    assert names <= SIGNAL_NAMES


@pytest.mark.parametrize("text", ["0", "65", "99999", "SIGFOO", "SIGRTMIN+16", "²"])
def test_stop_signal_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RemoteError, match="StopSignal"):
        make.built(image_config=image(Cmd=["x"], StopSignal=text))


def test_apparmor_profile_is_the_default_one_where_there_is_one() -> None:
    host = make.host(apparmor=True)
    loaded = make.rootfs(apparmor_loaded=True)
    assert process(host=host, apparmor_default="bh", rootfs=loaded)["apparmorProfile"] == "bh"
    assert "apparmorProfile" not in process(apparmor_default="bh", rootfs=loaded)
    made = make.built(host=host)
    assert any("AppArmor" in note for note in made.degraded)


def profile(kind: str, reference: str = "") -> api_pb2.SecurityProfile:
    return api_pb2.SecurityProfile(profile_type=kind, localhost_ref=reference)


def test_apparmor_follows_the_request() -> None:
    host, loaded = make.host(apparmor=True), make.rootfs(apparmor_loaded=True)
    named = make.container(Security(apparmor=profile("Localhost", "localhost/mine")))
    assert process(named, host=host, rootfs=loaded)["apparmorProfile"] == "mine"
    old = make.container(Security(apparmor_profile="localhost/mine"))
    assert process(old, host=host, rootfs=loaded)["apparmorProfile"] == "mine"
    free = make.container(Security(apparmor=profile("Unconfined")))
    assert process(free, host=host, apparmor_default="bh")["apparmorProfile"] == "unconfined"
    assert "apparmorProfile" not in process(free)
    privileged = make.container(Security(privileged=True))
    sandbox = make.privileged_sandbox()
    assert "apparmorProfile" not in process(privileged, sandbox=sandbox, host=host, apparmor_default="bh")


@pytest.mark.parametrize(
    ("security", "wanted"),
    [
        (Security(), "bh"),
        (Security(apparmor=profile("RuntimeDefault")), "bh"),
        (Security(apparmor=profile("Localhost", "localhost/mine")), "mine"),
        (Security(apparmor_profile="localhost/mine"), "mine"),
        (Security(apparmor=profile("Unconfined")), ""),
        (Security(privileged=True), ""),
        (Security(privileged=True, apparmor=profile("Localhost", "mine")), "mine"),
    ],
)
def test_storage_is_asked_for_the_apparmor_profile_that_counts(security: Security, wanted: str) -> None:
    assert apparmor_wanted(security, "bh") == wanted


def test_apparmor_that_cannot_be_given_is_refused() -> None:
    with pytest.raises(RemoteError, match="no AppArmor"):
        process(make.container(Security(apparmor=profile("Localhost", "mine"))))
    with pytest.raises(RemoteError, match="'mine' is not loaded"):
        process(
            make.container(Security(apparmor=profile("Localhost", "mine"))), host=make.host(apparmor=True)
        )
    with pytest.raises(RemoteError, match="not loaded"):
        process(make.container(Security(apparmor=profile("RuntimeDefault"))), host=make.host(apparmor=True))
    for text in ("localhost/", "whatever"):
        with pytest.raises(RemoteError, match="apparmor"):
            process(make.container(Security(apparmor_profile=text)), host=make.host(apparmor=True))


def test_selinux_labels_follow_the_options_of_container_then_pod() -> None:
    host = make.host(selinux=True)
    options = api_pb2.SELinuxOption(type="my_t", level="s0:c1,c2")
    made = make.spec(make.container(Security(selinux_options=options)), host=host)
    assert made["process"]["selinuxLabel"] == "system_u:system_r:my_t:s0:c1,c2"
    assert made["linux"]["mountLabel"] == "system_u:object_r:container_file_t:s0:c1,c2"
    pod = make.sandbox(api_pb2.LinuxSandboxSecurityContext(selinux_options=options))
    assert process(host=host, sandbox=pod)["selinuxLabel"] == "system_u:system_r:my_t:s0:c1,c2"
    assert "selinuxLabel" not in process(host=host)


def test_selinux_options_on_a_node_without_it_are_noted() -> None:
    options = api_pb2.SELinuxOption(level="s0:c1")
    made = make.built(make.container(Security(selinux_options=options)))
    assert any("SELinux" in note for note in made.degraded)
    with pytest.raises(RemoteError, match="not a label"):
        make.built(make.container(Security(selinux_options=api_pb2.SELinuxOption(type="a:b"))))
