"""Runs in: the tests. Certificates of the stream worker's listener."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from ipc.log import Log
from ipc.settings import StreamSettings
from ipc.tls import Certificates
from tests.support.certificates import certificate


def settings(cert: str, key: str) -> StreamSettings:
    return StreamSettings(root="/r", run_root="/s", tls_cert=cert, tls_key=key)


def test_changed_files_are_read_again_and_broken_ones_change_nothing(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")
    certificates = Certificates(settings(cert, key), Log("stream"))
    first = certificates.context()
    assert certificates.context() is first
    Path(cert).write_text("half")
    assert certificates.context() is first
    other, other_key = certificate(tmp_path, "two")
    Path(other_key).rename(key)
    Path(other).rename(cert)
    second = certificates.context()
    assert second is not None
    assert second is not first
    assert second.minimum_version is ssl.TLSVersion.TLSv1_2


def test_without_a_certificate_there_is_no_tls_and_a_missing_one_is_an_error() -> None:
    assert Certificates(settings("", ""), Log("stream")).context() is None
    with pytest.raises(FileNotFoundError):
        Certificates(settings("/nowhere.pem", ""), Log("stream")).context()


def test_another_worker_is_needed_for_files_that_this_one_may_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    cert, key = certificate(tmp_path, "one")
    certificates = Certificates(settings(cert, key), Log("stream"), lambda: now)
    certificates.context()
    other, other_key = certificate(tmp_path, "two")
    Path(other_key).rename(key)
    Path(other).rename(cert)
    assert not certificates.outdated()  # they may not be complete yet
    now = 2.0
    assert not certificates.outdated()  # it reads them itself
    monkeypatch.setattr("os.access", lambda path, _mode: path != key)
    assert certificates.outdated()
    Path(key).unlink()
    assert not certificates.outdated()
    now = 1000.0  # nothing can be seen: perhaps they have changed
    assert certificates.outdated()
    assert not Certificates(settings("", ""), Log("stream"), lambda: now).outdated()
