"""The supervisor loads the AppArmor profile that RuntimeDefault means, where that is its business."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor import hostinfo

PROFILES = "docker-default (enforce)\nbulkhead-default-of-somebody (complain)\n"


@pytest.fixture(autouse=True)
def parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostinfo, "find_program", lambda name: f"/sbin/{name}")


def test_a_profile_that_is_not_loaded_is_loaded_from_the_first_place_that_has_it() -> None:
    command = hostinfo.apparmor_command("bulkhead-default", PROFILES)
    assert command[:3] == ["/sbin/apparmor_parser", "--replace", "--skip-cache"]
    assert command[3].endswith("/bulkhead-default")


def test_a_profile_that_is_loaded_or_somebody_elses_is_left_alone() -> None:
    assert hostinfo.apparmor_command("bulkhead-default", PROFILES + "bulkhead-default (enforce)\n") == []
    assert hostinfo.apparmor_command("my-own", PROFILES) == []


def test_a_host_without_the_parser_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostinfo, "find_program", lambda _name: "")
    assert hostinfo.apparmor_command("bulkhead-default", PROFILES) == []


def test_the_profile_of_the_tree_has_the_name_that_is_configured_and_stands_on_nothing() -> None:
    text = Path(hostinfo.APPARMOR_FILES[-1]).read_text()
    assert f"profile {hostinfo.APPARMOR_DEFAULT} " in text
    assert "include" not in text.replace("It includes nothing", "")
