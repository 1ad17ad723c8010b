"""Runs in: cri. The file of the state: opened, checked, or set aside.

Owns the tables of `<run_root>/cri/state.db` (SQLite) and what counts as damage: a file that is no database,
a broken one, one of a schema that this release does not know. Such a file is never guessed at; it is kept
beside its place for whoever wants to look, and an empty one takes it. The disk's own trouble (full, not to
be read) is no damage and ends the worker.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator

from ipc.errors import Code, RemoteError, internal

SCHEMA = 1
TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pods (id TEXT PRIMARY KEY, record BLOB NOT NULL, config BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS containers
    (id TEXT PRIMARY KEY, record BLOB NOT NULL, config BLOB NOT NULL, spec BLOB);
CREATE TABLE IF NOT EXISTS intents
    (subject TEXT NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL, at_ns INTEGER NOT NULL,
     PRIMARY KEY (subject, kind)) WITHOUT ROWID;
"""
#: SQLite's results that speak of the file's content. ERROR: tables that are not ours.
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH}
#: The file, its log, the log's index.
_PARTS = ("", "-wal", "-shm")
ASIDE = ".damaged"


class Damaged(RuntimeError):
    """The file cannot be used."""


def connect(path: str) -> sqlite3.Connection:
    """Open the file or make it. Raises Damaged, sqlite3.Error."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        _check(db)
    except Damaged:
        db.close()
        raise
    except sqlite3.Error as error:
        db.close()
        raise damage(error) from error
    return db


def damage(error: sqlite3.Error) -> Exception:
    """What an error of SQLite means: Damaged, or the error itself."""
    # what Python itself finds (text that is not UTF-8) has no code
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return Damaged(str(error)) if code & 0xFF in _DAMAGE else error


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """What the disk refuses meanwhile is an answer. Raises RemoteError; damage stays what it is."""
    try:
        yield
    except sqlite3.Error as error:
        if isinstance(damage(error), Damaged):
            raise
        full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
        raise _refusal(str(error), full=full) from error
    except OSError as error:
        raise _refusal(str(error), full=error.errno in {errno.ENOSPC, errno.EDQUOT}) from error


def _refusal(why: str, *, full: bool) -> RemoteError:
    text = f"cri cannot write its state: {why}"
    return RemoteError(Code.RESOURCE_EXHAUSTED, text) if full else internal(text)


def _check(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = OFF")
    db.executescript(TABLES)
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise Damaged(found)
    row = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
    if row is not None and row[0] != str(SCHEMA):
        raise Damaged(f"its schema is {row[0]}, this release knows {SCHEMA}")


def integrity(db: sqlite3.Connection) -> str:
    """What a thorough look at the file finds, "" for nothing."""
    try:
        found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        return str(error)
    return "" if found == "ok" else found


def set_aside(path: str) -> str:
    """Rename the file and its companions over those set aside before; return the new path. Raises OSError."""
    for part in _PARTS:
        with contextlib.suppress(FileNotFoundError):
            os.replace(path + part, path + ASIDE + part)
    return path + ASIDE
