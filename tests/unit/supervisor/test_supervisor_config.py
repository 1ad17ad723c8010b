"""Configuration: files, drop-ins, flags, and what is said of a fault."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ipc import settings
from ipc.release import version
from ipc.trust import Policy, Reject, Trust
from supervisor import configtext
from supervisor.cli.bulkhead import main
from supervisor.config import Config, RuntimeConfig, UsersConfig
from supervisor.configfile import ConfigError, find_line, key_paths, load
from supervisor.sandbox.spec import Identity
from supervisor.settings import Derivation, identities, uids
from supervisor.table import TABLE


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "bulkhead.toml.d").mkdir()
    return tmp_path


def write(etc: Path, text: str, name: str = "bulkhead.toml") -> Path:
    path = etc / name
    path.write_text(text)
    return path


def faults(etc: Path, text: str, **flags: Any) -> str:
    path = write(etc, text)
    with pytest.raises(ConfigError) as caught:
        load(str(path), flags=flags)
    return str(caught.value).replace(f"{etc}/", "")


def test_defaults_are_complete_without_a_file(tmp_path: Path) -> None:
    config = load(str(write(tmp_path, "")))
    assert config.listen == "/run/bulkhead/bulkhead.sock"
    assert config.default_runtime == "crun"
    assert config.runtimes["crun"].root == "/run/bulkhead/runtimes/crun"
    assert config.cgroup_manager in {"systemd", "cgroupfs"}


def test_drop_ins_win_in_lexical_order_and_flags_win_over_all(etc: Path) -> None:
    path = write(etc, 'log_level = "debug"\n[cni]\nconf_dir = "/a"\nbin_dirs = ["/x", "/y"]\n')
    write(etc, '[cni]\nconf_dir = "/b"\nbin_dirs = ["/z"]\n', "bulkhead.toml.d/10-a.toml")
    write(etc, '[cni]\nconf_dir = "/c"\n', "bulkhead.toml.d/20-b.toml")
    write(etc, '[cni]\nconf_dir = "/d"\n', "bulkhead.toml.d/30-c.conf")
    config = load(str(path), flags={"root": "/r"})
    assert (config.cni.conf_dir, config.cni.bin_dirs) == ("/c", ["/z"])
    assert (config.log_level, config.root) == ("debug", "/r")
    assert load(str(path), flags={"cni": {"conf_dir": "/e"}}).cni.conf_dir == "/e"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "\nlog_levle = 'info'\n",
            "bulkhead.toml:2: unknown key log_levle; the nearest valid key is log_level",
        ),
        (
            "[image]\n\nretires = 1\n",
            "bulkhead.toml:3: unknown key image.retires; the nearest valid key is image.retries",
        ),
        ("[network]\nconf_dir = '/x'\n", "bulkhead.toml:1: unknown key network; the nearest valid key is"),
        (
            "[storage]\nconf_dir = '/x'\n",
            "bulkhead.toml:2: unknown key storage.conf_dir; the nearest valid key is cni.conf_dir",
        ),
        ("root = 3\n", "bulkhead.toml:1: root must be a string, not 3"),
        ("[image]\nretries = true\n", "bulkhead.toml:2: image.retries must be a whole number, not True"),
        ("[image]\nretries = -1\n", "bulkhead.toml:2: image.retries must be between 0 and 100, not -1"),
        ("[cni]\nbin_dirs = '/x'\n", "bulkhead.toml:2: cni.bin_dirs must be a list of strings, not '/x'"),
        ("[cni]\nbin_dirs = ['x']\n", "bulkhead.toml:2: cni.bin_dirs has 'x': it must be an absolute path"),
        ("cni = 1\n", "bulkhead.toml:1: cni must be a table, not 1"),
        ("root = '/a/../b'\n", "bulkhead.toml:1: root must not contain '..'"),
        (
            "log_level = 'loud'\n",
            "bulkhead.toml:1: log_level must be one of debug, info, warning, error, not 'loud'",
        ),
        (
            "[runtimes.crun]\npaht = '/x'\n",
            "bulkhead.toml:2: unknown key runtimes.crun.paht; the nearest valid key is runtimes.crun.path",
        ),
        ("[runtimes]\n'a b' = {path = '/x'}\n", "bulkhead.toml:2: 'a b' cannot be a runtime's name"),
        ("default_runtime = 'kata'\n", "bulkhead.toml:1: default_runtime 'kata': known are crun, runc"),
        ("[users]\ncri = 0\n", "bulkhead.toml:2: users.cri must be a uid above 0"),
        ("[users]\ncri = 'no one'\n", "bulkhead.toml:2: users.cri must be a user name or a number"),
        ("[containers]\ndefault_env = ['X']\n", "has 'X', which is not of the form NAME=VALUE"),
        (
            "[containers]\ndefault_sysctls = {a = 1}\n",
            "bulkhead.toml:2: containers.default_sysctls.a must be a string, not 1",
        ),
        ("[containers]\ndefault_capabilities = ['FOO']\n", "has 'FOO', which is not a capability's name"),
        (
            "[containers]\ndefault_sysctls = {a = '1'}\n",
            ":2: containers.default_sysctls has 'a', which is not",
        ),
        ("[containers]\ndefault_sysctls = {'kernel.panic' = '1'}\n", "which is not of a network or IPC"),
        ("[containers]\ndefault_ulimits = ['nofile']\n", "which is not of the form name=soft:hard"),
        ("[containers]\ndefault_ulimits = ['nofile=2:1']\n", "the soft limit is above the hard one"),
        ("[containers]\ndefault_ulimits = ['nofile=-1:1']\n", "the soft limit is above the hard one"),
        ("[containers]\ndefault_ulimits = ['bogus=1']\n", "there is no limit bogus"),
        ("root = '/x'\nroot = '/y'\n", "bulkhead.toml:2: not TOML:"),
        ('root = "/a\\u0000b"\n', "bulkhead.toml:1: root must not contain control characters"),
        ("[timeouts]\nping = inf\n", "bulkhead.toml:2: timeouts.ping must be less, not inf"),
        ("[timeouts]\nping = nan\n", "bulkhead.toml:2: timeouts.ping must be at least 0.1, not nan"),
        ("[grpc]\nmax_message_bytes = 0\n", "grpc.max_message_bytes must be at least 4194304, not 0"),
        (
            "root = '/x'\nrun_root = '/x/y'\n",
            "bulkhead.toml:2: root and run_root must not lie in one another",
        ),
        ("[ops]\naddress = '::'\n", "bulkhead.toml:2: ops.address needs ops.tls_cert"),
        ("[ops]\naddress = 'here'\n", "bulkhead.toml:2: ops.address must be an IP address, not 'here'"),
        ("[stream]\ntls_key = '/k'\n", "bulkhead.toml:2: stream.tls_key needs stream.tls_cert"),
        ("run_root = '/" + "x" * 60 + "'\n", "bulkhead.toml:1: run_root is too long"),
    ],
)
def test_a_fault_names_file_line_and_the_nearest_key(etc: Path, text: str, fault: str) -> None:
    assert fault in faults(etc, text)


def test_defaults_for_containers_that_can_be_used_are_taken(tmp_path: Path) -> None:
    text = (
        "[containers]\n"
        "default_capabilities = ['CAP_CHOWN', 'NET_RAW']\n"
        "default_sysctls = {'net.ipv4.ping_group_range' = '0 0', 'kernel.shm_rmid_forced' = '1'}\n"
        "default_ulimits = ['nofile=1024:-1', 'core=0']\n"
    )
    config = load(str(write(tmp_path, text)))
    assert config.containers.default_ulimits == ["nofile=1024:-1", "core=0"]
    assert len(config.containers.default_sysctls) == 2


def test_every_fault_of_every_file_is_told(etc: Path) -> None:
    write(etc, "x = 1\n", "bulkhead.toml.d/a.toml")
    told = faults(etc, "y = 1\nz = 2\n").splitlines()
    assert [line.split(":")[0] for line in told] == [
        "bulkhead.toml",
        "bulkhead.toml",
        "bulkhead.toml.d/a.toml",
    ]


def test_a_named_file_that_is_missing_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="no such directory"):
        load(str(write(tmp_path, "")), str(tmp_path / "none.d"))


def test_a_line_is_found_through_headers_dots_and_quotes() -> None:
    text = 'a = 1\n[t]\n"b" = 2\nc.d = 3\n# e = 5\n[t.u]\ne = 4\n'
    places = {path: find_line(text, path) for path in [("a",), ("t", "b"), ("t", "c", "d"), ("t", "u", "e")]}
    assert list(places.values()) == [1, 3, 4, 7]


def test_what_is_printed_is_read_back_the_same(tmp_path: Path) -> None:
    original = load(str(write(tmp_path, "[runtimes.kata]\npath = '/k'\nargs = ['-x', 'a\"b']\n")))
    printed = write(tmp_path, configtext.render(original), "printed.toml")
    assert load(str(printed)) == original


def test_every_key_is_printed_with_its_meaning() -> None:
    text = configtext.render(Config(runtimes={"NAME": RuntimeConfig()}))
    for path in key_paths():
        assert f"{path[-1]} = " in text


def test_config_and_version_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "[image]\nretries = 9\n")
    assert main(["config", "--config", str(path), "--run-root", "/tmp/r", "--cni-bin-dir", "/p"]) == 0
    printed = capsys.readouterr().out
    assert "retries = 9" in printed
    assert 'listen = "/tmp/r/bulkhead.sock"' in printed
    assert 'bin_dirs = ["/p"]' in printed
    assert main(["config", "--default"]) == 0
    assert "retries = 5" in capsys.readouterr().out
    assert main(["version"]) == 0
    for text, fault in (("x = 1", "unknown key x"), ("[users]\ncri = 'nobody-at-all'", "there is no user")):
        path.write_text(text)
        assert main(["config", "--config", str(path)]) == 2
        assert fault in capsys.readouterr().err


def test_the_version_is_that_of_the_distribution() -> None:
    pyproject = Path(__file__).resolve().parents[3] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["version"] == version()


# -- what workers are told -------------------------------------------------------------------------


def test_users_default_to_fixed_uids_and_must_differ() -> None:
    who = identities(UsersConfig(), TABLE)
    assert who["cri"] == Identity(64101, 64101)
    assert who["storage"] == Identity(0, 0)
    assert uids(who) == {
        64101: "cri",
        64102: "image",
        64103: "stream",
        64104: "ops",
        64105: "init",
        64106: "nri",
    }
    with pytest.raises(ConfigError, match="the same user"):
        identities(UsersConfig(cri=64102), TABLE)
    with pytest.raises(ConfigError, match="there is no user 'nobody-at-all'"):
        identities(UsersConfig(cri="nobody-at-all"), TABLE)
    with pytest.raises(ConfigError, match="is root"):
        identities(UsersConfig(cri="root"), TABLE)


def test_every_setting_of_every_worker_follows_the_configuration(tmp_path: Path) -> None:
    """A field that no key can change would be a setting that cannot be set."""
    one = Config().resolved()
    changed = {}
    for declared in dataclasses.fields(Config):
        changed[declared.name] = _different(getattr(one, declared.name))
    changed["default_runtime"] = "other"
    changed["runtimes"]["own"] = RuntimeConfig(path="/opt/bin/crun")
    changed["cgroup_manager"] = "systemd"
    changed["log_level"] = "debug"
    two = Config(**changed)
    who = {"cri": Identity(1, 2)}
    policy = Policy([Reject()])
    trust = Trust(policy=policy, namespaces={"prod": policy})  # what the files say that the keys name
    first, second = Derivation(one, {}), Derivation(two, who, trust=trust)
    for kind in ("cri", "image", "storage", "network", "monitor", "stream", "ops", "nri"):
        before, after = first.of(kind), second.of(kind)
        assert isinstance(before, settings.Common)
        unwired = {"nri_worker"} if kind == "cri" else set()  # which worker runs is no configuration
        for name in before.__struct_fields__:
            follows = getattr(before, name) != getattr(after, name)
            assert follows != (name in unwired), f"{kind}: {name} cannot be configured"


def _different(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{f.name: _different(getattr(value, f.name)) for f in fields})
    match value:
        case str():
            return f"{value}/other" if value else "/other"
        case int() | float():
            return value + 1
        case list():
            return [*value, "other"]
        case _:
            return {**value, "other": RuntimeConfig()} if value else {"other": "1"}
