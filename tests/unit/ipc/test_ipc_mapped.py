"""What is mapped of libraries and not used goes back; nothing that was written is lost."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ipc import kernel, mapped
from ipc.mapped import Mapped, clean

CODE = b"""\
7f0000000000-7f0000400000 r-xp 00001000 fe:01 77                         /usr/lib/a library.so
Size:               4096 kB
Rss:                1024 kB
Pss:                1024 kB
Private_Clean:      1024 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
"""

LIBRARY = """
import re
from ipc import mapped
from grpc._cython import cygrpc

def resident():
    paragraphs = re.split("^(?=[0-9a-f]+-)", open("/proc/self/smaps").read(), flags=re.M)
    return sum(int(re.search("^Rss: +([0-9]+)", one, re.M)[1]) for one in paragraphs if "cygrpc" in one)

found = mapped.Mapped()
before = resident()
assert before > 2000, before
assert not found.settle() and resident() >= before, "not yet"
mapped.time.monotonic = lambda later=mapped.time.monotonic() + mapped.PAUSE: later
assert found.settle()
assert resident() < before / 2, (before, resident())
assert cygrpc.CompressionOptions and cygrpc.ChannelCredentials, "it is there when it is needed"
cygrpc.channelz_get_top_channels(0)
assert not found.settle()
"""

WRITTEN = """
import ctypes, mmap, os, tempfile
from ipc import mapped

size = 1 << 20
with tempfile.TemporaryFile() as file:
    file.write(b"f" * size)
    file.flush()
    area = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    area[5000:5004] = b"mine"
    assert area[:] != b"", "all of it is resident"
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.PROT_READ) == 0
    smaps = open("/proc/self/smaps", "rb").read()
    assert b"%x-" % start in smaps, "a mapping of its own"
    assert all(begin != start for begin, end in mapped.clean(smaps))
    mapped.time.monotonic = lambda later=mapped.time.monotonic() + mapped.PAUSE: later
    found = mapped.Mapped()
    found._due = 0
    assert found.settle()
    assert area[5000:5004] == b"mine"
    os._exit(0)  # the mapping cannot be closed while it is pointed to
"""


@pytest.mark.parametrize("script", [LIBRARY, WRITTEN], ids=["library", "written"])
def test_only_what_the_file_has_goes_back(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"r-xp", b"rwxp"),
        (b"r-xp", b"rw-p"),
        (b"r-xp", b"---p"),
        (b"r-xp", b"r-xs"),
        (b"/usr/lib/a library.so", b"[heap]"),
        (b"/usr/lib/a library.so", b""),
        (b"Anonymous:             0 kB", b"Anonymous:             4 kB"),
        (b"Rss:                1024 kB", b"Rss:                 128 kB"),
        (b"Anonymous:             0 kB\n", b""),
    ],
)
def test_what_is_written_to_shared_small_or_no_file_stays(old: bytes, new: bytes) -> None:
    assert list(clean(CODE)) == [(0x7F0000000000, 0x7F0000400000)]
    assert list(clean(CODE.replace(old, new))) == []


def test_the_sizes_of_a_mapping_are_its_own() -> None:
    dirty = CODE.replace(b"7f00004", b"7f00003").replace(
        b"Anonymous:             0", b"Anonymous:            12"
    )
    assert list(clean(dirty + CODE)) == list(clean(CODE + dirty)) == [(0x7F0000000000, 0x7F0000400000)]


def test_a_mapping_that_the_kernel_keeps_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError

    monkeypatch.setattr(kernel, "drop_pages", refuse)
    found = Mapped()
    found._due = 0
    assert found.settle()


def test_without_proc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(mapped, "PAUSE", 0.0)
    assert Mapped().settle() is False
