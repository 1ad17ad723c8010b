"""Runs in: image; and in `verifier`, its child, which alone executes programs: gpgv, and openssl.

Whether a signature is that of a key. The programs are the host's own (the one is what apt trusts, the other
what its TLS does); no cryptography is ours. The child is forked in `prepare`, if the policy asks for
signatures, since nothing can be executed once the worker's sandbox is shut. It has a sandbox of its own:
the worker's user, no capability, no network, no other process, a root with the two programs, their
libraries and a scratch directory in it, bounded time and memory. It owns that directory, which is empty
between two questions.

A question and its answer are msgpack with their length before; one at a time. What the child says is
believed: it is what the policy trusts to verify.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from ipc import confine, kernel, log
from ipc.errors import Code, RemoteError
from workers.jobs import close_other_fds

NAME = "verifier"
NOGROUP = 65534
TIMEOUT = 60.0  # seconds for a question; the programs themselves have less
MAX_TEXT = 1 << 20  # bytes of what was signed
LIMITS = {"CPU": 10, "AS": 512 << 20, "FSIZE": 8 << 20, "NOFILE": 64, "CORE": 0}
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
_SCRATCH = "/scratch"
_READ_ONLY = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
_LENGTH = struct.Struct(">Q")
#: gnupg's doc/DETAILS: what may be said of a good signature, each exactly once.
_WANTED = ("PLAINTEXT", "NEWSIG", "GOODSIG", "VALIDSIG")
_BAD = {
    "BADSIG": "the signature is wrong",
    "NO_PUBKEY": "it is by a key that the policy does not name",
    "ERRSIG": "it cannot be verified",
    "EXPSIG": "the signature has expired",
    "EXPKEYSIG": "its key has expired",
    "REVKEYSIG": "its key was revoked",
    "NODATA": "it is no OpenPGP message",
}


class OpenPgpAsked(msgspec.Struct, tag=True):
    """Is this a message that one of the keys signed? The text that it is of is the answer."""

    keyrings: list[bytes]
    message: bytes


class SigstoreAsked(msgspec.Struct, tag=True):
    """Is this the signature of the payload by this key (PEM)?"""

    key: bytes
    signature: bytes
    payload: bytes


Asked = OpenPgpAsked | SigstoreAsked
_DECODER: msgspec.msgpack.Decoder[Asked] = msgspec.msgpack.Decoder(Asked)


class Answered(msgspec.Struct):
    """`why` is "" if the signature is good; then `text` is what was signed."""

    why: str
    text: bytes = b""


class Verifier:
    """The worker's end. Safe for threads."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.pid = pid
        self._sock = sock
        self._lock = threading.Lock()
        self.lost = False

    def ask(self, asked: Asked) -> Answered:
        """Raises RemoteError(UNAVAILABLE) if there is nobody who can tell; then for good."""
        with self._lock:
            if self.lost:
                raise _lost()
            try:
                self._sock.settimeout(TIMEOUT)
                send(self._sock, msgspec.msgpack.encode(asked))
                answer = receive(self._sock)
            except OSError:
                answer = None
            if answer is None:
                self.lost = True
                raise _lost()
            return msgspec.msgpack.decode(answer, type=Answered)

    def close(self) -> None:
        """Let it end, and wait for that."""
        with contextlib.suppress(OSError), self._sock:
            self._sock.settimeout(1.0)
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.recv(1)


def _lost() -> RemoteError:
    return RemoteError(
        Code.UNAVAILABLE, "the process that verifies signatures has ended; another one will start"
    )


def send(sock: socket.socket, data: bytes) -> None:
    """Raises OSError."""
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive(sock: socket.socket) -> bytes | None:
    """One message, None at the end. Raises OSError."""
    head = _exactly(sock, _LENGTH.size)
    return None if head is None else _exactly(sock, _LENGTH.unpack(head)[0])


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < size:
        piece = sock.recv(min(size - len(pieces), 1 << 20))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)


# -- the child: its beginning ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Programs:
    """Absolute paths; "" for one that nothing needs."""

    gpgv: str
    openssl: str


def start(programs: Programs, run_root: str, uid: int) -> Verifier:
    """Fork the child; call it as root with one thread. Raises OSError."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # this worker has no other child, and cannot wait later
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child(theirs, programs, run_root, uid, parent)
    theirs.close()
    return Verifier(ours, pid)


def _child(sock: socket.socket, programs: Programs, run_root: str, uid: int, parent: int) -> None:
    status = 1
    try:
        _become(sock, programs, run_root, uid, parent)
        while (asked := receive(sock)) is not None:
            send(sock, msgspec.msgpack.encode(answer(programs, _DECODER.decode(asked))))
        status = 0
    except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
        log.get().bug("verifier failed", error)
    finally:
        os._exit(status)


def _become(sock: socket.socket, programs: Programs, run_root: str, uid: int, parent: int) -> None:
    from setproctitle import setproctitle

    with contextlib.suppress(OSError):
        log.get().connect()  # while its path can be reached
    kernel.die_with_parent(signal.SIGKILL, parent)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    close_other_fds({0, 1, 2, log.get().fileno(), sock.fileno()})
    setproctitle(f"bulkhead: image {NAME}")
    kernel.unshare(_NAMESPACES)
    _enter_view(programs, f"{run_root}/view", uid)
    lacking = confine.limit(LIMITS) + confine.become(uid, NOGROUP, (), ())
    kernel.die_with_parent(signal.SIGKILL, parent)  # the change of user cleared it
    confine.no_new_privileges()
    for sentence in lacking + confine.filter_calls(confine.LISTS["verify"]):
        log.get().warning("verifier is confined less than it should be", lacking=sentence)


def _enter_view(programs: Programs, root: str, uid: int) -> None:
    """A root directory with the programs, their libraries and the scratch directory, and nothing else."""
    os.makedirs(root, mode=0o700, exist_ok=True)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount(NAME, root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0755,size=64k,nr_inodes=64")
    for path in (*LIBRARIES, *filter(None, (programs.gpgv, programs.openssl)), "/dev/null"):
        if os.path.exists(path):
            _bind(path, root + path)
    os.mkdir(root + _SCRATCH)
    options = f"mode=0700,size=32m,nr_inodes=64,uid={uid},gid={NOGROUP}"
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("scratch", root + _SCRATCH, "tmpfs", flags, options)
    _change_root(root)
    kernel.mount("", "/", "", _READ_ONLY)
    os.chdir(_SCRATCH)


def _bind(path: str, target: str) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    kernel.bind_mount(path, target)
    kernel.mount("", target, "", _READ_ONLY & ~kernel.MS_NODEV if path == "/dev/null" else _READ_ONLY)


def _change_root(root: str) -> None:
    os.chdir(root)
    try:
        kernel.pivot_root(".", ".")
        kernel.umount(".", kernel.MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the host runs from its initial RAM disk (pivot_root(2), NOTES)
            raise
        kernel.mount(".", "/", "", kernel.MS_MOVE)
        os.chroot(".")
    os.chdir("/")


# -- the child: its work -----------------------------------------------------------------------------------


def answer(programs: Programs, asked: Asked) -> Answered:
    """Ask the program. The current directory is the scratch directory; it is left empty."""
    if isinstance(asked, OpenPgpAsked):
        return _gpgv(programs.gpgv, asked)
    return _openssl(programs.openssl, asked)


def _gpgv(program: str, asked: OpenPgpAsked) -> Answered:
    keyrings = {f"keyring-{number}": data for number, data in enumerate(asked.keyrings)}
    options = [word for name in keyrings for word in ("--keyring", f"./{name}")]
    with _files({**keyrings, "message": asked.message}, "text"):
        words = ["--homedir", ".", "--status-fd", "1", "--weak-digest", "SHA1", "--output", "./text"]
        status, said = _run([program, *words, *options, "./message"])
        why = judged(status, said)
        return Answered(why) if why else Answered("", _text())


def judged(status: int, said: bytes) -> str:
    """What gpgv's status lines say against a signature, "" for nothing. There must be one and no other."""
    lines = (line.decode("ascii", "replace").split() for line in said.splitlines())
    words = [line[1] for line in lines if line[:1] == ["[GNUPG:]"] and line[1:]]
    for word, sentence in _BAD.items():
        if word in words:
            return sentence
    wrong = [word for word in _WANTED if words.count(word) != 1]
    if status or wrong:
        return f"gpgv does not say that it is good (status {status}, not once: {' '.join(wrong) or 'none'})"
    return ""


def _text() -> bytes:
    with open("text", "rb") as file:
        return file.read(MAX_TEXT + 1)


def _openssl(program: str, asked: SigstoreAsked) -> Answered:
    names = {"key": asked.key, "signature": asked.signature, "payload": asked.payload}
    with _files(names):
        words = ["dgst", "-sha256", "-verify", "./key", "-signature", "./signature", "./payload"]
        status, said = _run([program, *words])
    if status == 0 and said.strip() == b"Verified OK":
        return Answered("", asked.payload)
    return Answered("it is not by the policy's key, or wrong")


@contextlib.contextmanager
def _files(contents: dict[str, bytes], *results: str) -> Iterator[None]:
    try:
        for name, data in contents.items():
            with open(name, "xb") as file:
                file.write(data)
        yield
    finally:
        for name in (*contents, *results):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _run(argv: list[str]) -> tuple[int, bytes]:
    """Status and standard output of a program. Raises OSError."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, write_fd, 1),
        (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
    ]
    environment = {"LC_ALL": "C", "OPENSSL_CONF": "/dev/null"}
    with os.fdopen(read_fd, "rb") as output:
        try:
            pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions, setsigdef=[signal.SIGPIPE])
        finally:
            os.close(write_fd)
        said = output.read(MAX_TEXT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said
