"""bulkheadctl without a runtime: logs, words for sizes and times, errors as sentences with exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ipc.cri import api_pb2 as cri
from supervisor.cli.ctl import arguments, logs, output
from supervisor.cli.ctl.connection import CtlError

STAMP = "2026-01-02T03:04:05.000000006+00:00"


def record(text: str, tag: str = "F", stream: str = "stdout") -> str:
    return f"{STAMP} {stream} {tag} {text}\n"


def test_partial_records_are_joined_and_streams_kept_apart(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "0.log"
    path.write_text(record("he", "P") + record("llo") + record("bad", stream="stderr"))
    logs.show(str(path), follow=False, tail=-1, timestamps=False, running=lambda: False)
    assert capfdbinary.readouterr() == (b"hello\n", b"bad\n")


def test_tail_shows_the_last_lines_only(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = tmp_path / "0.log"
    path.write_text("".join(record(str(n)) for n in range(10)))
    logs.show(str(path), follow=False, tail=2, timestamps=False, running=lambda: False)
    assert capfdbinary.readouterr().out == b"8\n9\n"


def test_follow_goes_on_through_rotation_and_ends_with_the_container(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "0.log"
    path.write_text(record("one"))
    alive = threading.Event()
    alive.set()

    def write() -> None:
        time.sleep(0.2)
        path.rename(tmp_path / "0.log.1")
        with (tmp_path / "0.log.1").open("a") as old:
            old.write(record("two"))
        path.write_text(record("three"))
        time.sleep(0.4)
        with path.open("a") as new:
            new.write(record("four"))
        alive.clear()

    writer = threading.Thread(target=write)
    writer.start()
    logs.show(str(path), follow=True, tail=-1, timestamps=False, running=alive.is_set)
    writer.join()
    assert capfdbinary.readouterr().out == b"one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (59.9, "59s"), (61, "1m1s"), (3600, "1h"), (90061, "1d1h"), (-5, "0s")]
)
def test_durations_read_in_two_units(seconds: float, words: str) -> None:
    assert output.duration(seconds) == words


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
def test_sizes_read_in_the_unit_that_fits(count: int, words: str) -> None:
    assert output.size(count) == words


def test_a_config_file_may_use_either_spelling_and_a_wrong_key_is_named(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"metadata": {"nam": "x"}}))
    good.write_text(json.dumps({"metadata": {"name": "x"}, "log_directory": "/l"}))
    assert arguments.load(str(good), cri.PodSandboxConfig()).log_directory == "/l"
    with pytest.raises(CtlError, match="nam") as caught:
        arguments.load(str(bad), cri.PodSandboxConfig())
    assert caught.value.exit_code == arguments.USAGE


def ctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supervisor.cli.bulkheadctl", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_runtime_that_does_not_answer_is_a_sentence_and_exit_code_3(tmp_path: Path) -> None:
    done = ctl("-r", str(tmp_path / "none.sock"), "pods")
    assert done.returncode == 3
    assert done.stderr.startswith("bulkheadctl: no runtime answers at")
    assert "Traceback" not in done.stderr
    done = ctl("--run-root", str(tmp_path), "workers")
    assert done.returncode == 3
    assert "cannot reach" in done.stderr


@pytest.mark.parametrize("words", [["nonsense"], ["pods", "--label", "x"], ["exec", "abc"]])
def test_wrong_usage_is_exit_code_2(words: list[str]) -> None:
    done = ctl(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
