"""Short-lived children: their results, their ends, and what they leave (nothing)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import Code, RemoteError
from ipc.loop import Loop
from workers.jobs import Beside, Jobs


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def outcome(loop: Loop, function: Any, *args: Any, **kwargs: Any) -> Any:
    results: list[Any] = []
    Jobs(loop).start(function, *args, on_done=results.append, **kwargs)
    end = time.monotonic() + 10
    while not results and time.monotonic() < end:
        loop.turn(1)
    return results[0]


def test_a_value_comes_back_whole(loop: Loop) -> None:
    assert outcome(loop, lambda n: {"x": b"y" * n}, 1_000_000) == {"x": b"y" * 1_000_000}


def test_a_remote_error_comes_back_with_its_code(loop: Loop) -> None:
    def refuse() -> None:
        raise RemoteError(Code.NOT_FOUND, "no", reason="Why")

    error = outcome(loop, refuse)
    assert isinstance(error, RemoteError)
    assert (error.code, error.text, error.reason) == (Code.NOT_FOUND, "no", "Why")


def test_a_killed_child_is_unavailable_and_names_the_signal(loop: Loop) -> None:
    error = outcome(loop, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert isinstance(error, RemoteError)
    assert error.code is Code.UNAVAILABLE
    assert "signal 9" in error.text


def test_a_child_that_hangs_is_killed_at_its_timeout_with_all_it_started(loop: Loop) -> None:
    read, write = os.pipe()

    def hang() -> None:
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode() + b"\n")
            time.sleep(60)
        time.sleep(60)

    error = outcome(loop, hang, timeout=0.3, fds=[write], name="hang about")
    assert isinstance(error, RemoteError)
    assert error.code is Code.DEADLINE_EXCEEDED
    grandchild = int(os.read(read, 20))
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{grandchild}/exe") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{grandchild}/exe")  # a zombie has none: it waits for its reaper
    os.close(read)
    os.close(write)


def test_a_child_holds_only_the_descriptors_it_was_given(loop: Loop) -> None:
    mine = os.open("/dev/null", os.O_RDONLY)
    given = os.open("/dev/null", os.O_RDONLY)

    def look() -> list[bool]:
        def is_open(fd: int) -> bool:
            try:
                os.fstat(fd)
            except OSError:
                return False
            return True

        return [is_open(mine), is_open(given)]

    assert outcome(loop, look, fds=[given]) == [False, True]
    os.close(mine)
    os.close(given)


def test_children_die_with_their_worker() -> None:
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        loop = Loop()

        def tell() -> None:
            os.write(write, str(os.getpid()).encode())
            time.sleep(60)

        Jobs(loop).start(tell, on_done=print, fds=[write])
        loop.run()
    child = int(os.read(read, 20))
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}/exe") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{child}/exe")
    os.close(read)
    os.close(write)


def test_a_process_beside_takes_its_steps_when_it_is_told_to(tmp_path: Path) -> None:
    two = tmp_path / "two"
    with Beside((tmp_path / "one").touch, lambda: two.write_text(str(os.getpid()))) as other:
        assert list(tmp_path.iterdir()) == []
        other.step()
        assert [path.name for path in tmp_path.iterdir()] == ["one"]
        other.step()
        assert two.read_text() == str(other.pid) != str(os.getpid())
    with pytest.raises(ProcessLookupError):
        os.kill(other.pid, 0)


def test_what_a_step_raises_is_raised_here() -> None:
    def refuse() -> None:
        raise RemoteError(Code.NOT_FOUND, "not there")

    with Beside(refuse, lambda: os.rmdir("/nonexistent")) as other:
        with pytest.raises(RemoteError, match="not there") as refused:
            other.step()
        assert refused.value.code is Code.NOT_FOUND
        with pytest.raises(FileNotFoundError):
            other.step()


def test_a_process_beside_that_dies_is_an_error() -> None:
    with Beside(lambda: os.kill(os.getpid(), signal.SIGKILL)) as other:
        with pytest.raises(RemoteError) as caught:
            other.step()
        assert caught.value.code is Code.UNAVAILABLE
