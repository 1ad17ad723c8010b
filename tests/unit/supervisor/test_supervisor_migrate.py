"""`bulkhead migrate --from crio`, `bulkhead config` with origins, `bulkhead info`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from supervisor.cli.bulkhead import main
from supervisor.cli.hostcheck import Finding
from supervisor.cli.hosttext import lines
from supervisor.cli.migrate import ADVICE, CRIO, from_crio, read_crio
from supervisor.configfile import key_paths, load

MAIN = """
[crio]
storage_driver = "overlay"
[crio.api]
stream_port = "10010"
stream_idle_timeout = "2h"
[crio.runtime]
log_level = "warn"
default_sysctls = ["net.ipv4.ping_group_range=0 0"]
conmon = "/usr/bin/conmon"
ctr_stop_timeout = 45
default_ulimits = []
[crio.runtime.runtimes.runc]
runtime_path = "/opt/runc"
runtime_type = "oci"
monitor_path = "/usr/bin/conmon"
[crio.image]
pause_image = "registry.example/pause:3.10"
[crio.unheard_of]
key = 1
"""
DROP_IN = """
[crio.runtime]
log_level = "trace"
default_runtime = "runc"
"""


@pytest.fixture
def crio(tmp_path: Path) -> Path:
    path = tmp_path / "crio.conf"
    path.write_text(MAIN)
    (tmp_path / "crio.conf.d/deeper").mkdir(parents=True)
    (tmp_path / "crio.conf.d/deeper/10-runtime").write_text(DROP_IN)
    return path


def test_what_has_a_counterpart_is_carried_over(crio: Path, tmp_path: Path) -> None:
    migration = from_crio(read_crio(str(crio), None))
    assert tomllib.loads(migration.text) == {
        "log_level": "debug",
        "default_runtime": "runc",
        "stream": {"port": 10010, "idle_timeout": 7200.0},
        "containers": {"default_sysctls": {"net.ipv4.ping_group_range": "0 0"}},
        "timeouts": {"container_stop": 45.0},
        "runtimes": {"runc": {"path": "/opt/runc"}},
        "image": {"pause_image": "registry.example/pause:3.10"},
    }
    ours = tmp_path / "bulkhead.toml"
    ours.write_text(migration.text)
    assert load(str(ours)).runtimes["runc"].path == "/opt/runc"


def test_what_has_none_is_listed_with_its_place(crio: Path) -> None:
    left = from_crio(read_crio(str(crio), None)).left
    assert [sentence.split(": ")[1].split(" ")[0] for sentence in left] == [
        "crio.storage_driver",
        "crio.runtime.conmon",
        "crio.runtime.runtimes.runc.monitor_path",
        "crio.unheard_of.key",
    ]
    assert left[0].startswith(f"{crio}:3: ")
    assert "a monitor of Bulkhead's own" in left[1]


def test_a_value_that_cannot_be_is_listed_too(tmp_path: Path) -> None:
    path = tmp_path / "crio.conf"
    path.write_text('[crio.api]\nstream_idle_timeout = "1h30m"\n')
    migration = from_crio(read_crio(str(path), None))
    assert len(migration.left) == 1
    assert "no time that can be carried over" in migration.left[0]


def test_keys_are_carried_to_keys_that_exist() -> None:
    ours = {".".join(path) for path in key_paths()}
    assert {target for target, _ in CRIO.values()} <= ours
    assert not [prefix for prefix in ADVICE if prefix in CRIO]


def test_the_command_writes_no_file_over_another(
    crio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "ours.toml"
    words = ["migrate", "--from", "crio", "--config", str(crio), "--write", str(target)]
    assert main(words) == 0
    assert 'default_runtime = "runc"' in target.read_text()
    assert "crio.runtime.conmon has no counterpart" in capsys.readouterr().err
    assert main(words) == 1
    assert "File exists" in capsys.readouterr().err
    assert main(["migrate", "--from", "crio", "--config", str(tmp_path / "none")]) == 1


def test_the_configuration_is_shown_with_the_origin_of_each_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bulkhead.toml"
    path.write_text('log_level = "debug"\n[image]\nretries = 7\n')
    (tmp_path / "bulkhead.toml.d").mkdir()
    drop_in = tmp_path / "bulkhead.toml.d/10.toml"
    drop_in.write_text("\n[image]\nretries = 8\n")
    words = ["config", "--config", str(path), "--root", "/srv/bulkhead"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f'log_level = "debug"  # {path}:1\n' in shown
    assert f"retries = 8  # {drop_in}:3\n" in shown
    assert 'root = "/srv/bulkhead"  # command line\n' in shown
    assert 'run_root = "/run/bulkhead"  # default\n' in shown
    assert tomllib.loads(shown)["image"]["retries"] == 8
    assert main([*words, "--check"]) == 0
    assert capsys.readouterr().out == ""
    drop_in.write_text("[image]\nretry = 8\n")
    assert main([*words, "--check"]) == 2
    assert (
        f"{drop_in}:2: unknown key image.retry; the nearest valid key is image.retries"
        in capsys.readouterr().err
    )


def test_info_tells_what_the_host_has_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "-o", "json"])
    found = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"kernel", "cgroups", "overlayfs", "seccomp", "runtime crun", "CNI plugins", "CRIU"} <= set(found)
    assert found["runtime crun"]["state"] == "ok"
    wanting = [finding for finding in found.values() if finding["state"] == "missing"]
    assert all(finding["advice"] for finding in wanting)


def test_info_is_coloured_on_terminals_alone() -> None:
    finding = Finding("CRIU", "limited", "not installed", "for checkpoints only")
    plain, advice = lines([finding], colour=False)
    assert plain == "limited  CRIU  not installed"
    assert advice.strip() == "- for checkpoints only"
    assert "\033[33m" in next(iter(lines([finding], colour=True)))
