"""CNI configuration files: what is taken, what is refused and with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.network.conflist import ConfigError, Network, parse, plugin_config

BRIDGE = {"type": "bridge", "capabilities": {"ips": True, "mac": False}, "ipam": {"type": "host-local"}}


def parsed(path: str = "/d/1.conflist", **changes: Any) -> Network:
    document = {"cniVersion": "1.0.0", "name": "pods", "plugins": [BRIDGE], **changes}
    return parse(json.dumps({k: v for k, v in document.items() if v is not None}).encode(), path=path)


def test_a_list_is_read() -> None:
    network = parsed(disableCheck=True)
    assert (network.name, network.version, network.path) == ("pods", "1.0.0", "/d/1.conflist")
    assert network.disable_check
    assert not network.disable_gc
    assert network.plugins == [BRIDGE]


def test_a_file_of_one_plugin_becomes_a_list_of_one() -> None:
    single = {"cniVersion": "0.4.0", "name": "pods", "type": "bridge", "mtu": 1400}
    network = parse(json.dumps(single).encode(), path="/d/1.conf")
    assert (network.name, network.versions) == ("pods", ["0.4.0"])
    assert network.plugins == [single]


def test_a_list_in_a_file_with_the_other_suffix_stays_a_list() -> None:
    assert parsed("/d/1.json").plugins == [BRIDGE]


@pytest.mark.parametrize(
    ("versions", "known"),
    [
        ({"cniVersion": "0.3.1"}, ["0.3.1"]),
        ({"cniVersion": "1.1.0", "cniVersions": ["0.4.0", "1.1.0", "9.0.0"]}, ["1.1.0", "0.4.0"]),
        ({"cniVersion": None, "cniVersions": ["1.0.0"]}, ["1.0.0"]),
    ],
)
def test_versions_are_those_that_both_know_the_newest_first(
    versions: dict[str, Any], known: list[str]
) -> None:
    assert parsed(**versions).versions == known


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": None}, '"name" is missing'),
        ({"name": "a/b"}, "is not made of letters"),
        ({"name": 5}, '"name" is missing'),
        ({"cniVersion": None}, '"cniVersion" is missing'),
        ({"cniVersion": "0.2.0"}, "CNI version 0.2.0 is not supported"),
        ({"cniVersion": 1}, '"cniVersion" is not a string'),
        ({"plugins": None}, '"plugins" is not a list'),
        ({"plugins": []}, '"plugins" is not a list'),
        ({"plugins": ["bridge"]}, "plugin 0 is not a JSON object"),
        ({"plugins": [BRIDGE, {}]}, 'plugin 1 has no "type"'),
        ({"plugins": [{"type": "../../bin/sh"}]}, "is not the name of a program"),
        ({"plugins": [{"type": "a", "capabilities": {"b": 1}}]}, "does not say true or false"),
        ({"disableCheck": "perhaps"}, '"disableCheck" is neither true nor false'),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parsed(**changes)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="not"):
        parse(data, path="/d/1.conflist")


def test_flags_may_be_written_as_words() -> None:
    assert parsed(disableCheck="true", disableGC="False").disable_check


@given(
    st.binary() | st.dictionaries(st.text(), st.integers() | st.text()).map(lambda d: json.dumps(d).encode())
)
def test_any_bytes_give_a_network_or_a_sentence(data: bytes) -> None:
    try:
        network = parse(data, path="/d/1.conf")
    except ConfigError:
        return
    assert network.plugins


def read(config: bytes) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(config)
    return document


def test_a_plugin_reads_its_keys_with_the_lists_name_and_version() -> None:
    config = read(plugin_config(parsed(), BRIDGE))
    assert config == {"type": "bridge", "ipam": {"type": "host-local"}, "cniVersion": "1.0.0", "name": "pods"}


def test_a_plugin_gets_only_the_capabilities_that_it_declared_and_that_have_a_value() -> None:
    config = read(
        plugin_config(parsed(), BRIDGE, runtime_config={"ips": ["10.0.0.1"], "mac": "x", "dns": {}})
    )
    assert config["runtimeConfig"] == {"ips": ["10.0.0.1"]}


def test_keys_that_are_the_runtimes_do_not_pass_from_the_file() -> None:
    entry = {"type": "x", "prevResult": {}, "runtimeConfig": {}, "cni.dev/valid-attachments": []}
    config = read(plugin_config(parsed(), entry, previous={"ips": []}, extra={"cni.dev/attachments": [1]}))
    assert config == {
        "type": "x",
        "name": "pods",
        "cniVersion": "1.0.0",
        "prevResult": {"ips": []},
        "cni.dev/attachments": [1],
    }


def test_a_network_is_narrowed_in_its_own_order() -> None:
    network = parsed(cniVersions=["0.4.0", "1.1.0"])
    assert network.at("0.4.0", "1.0.0", "0.3.0").versions == ["1.0.0", "0.4.0"]
    assert network.at("9.9.9").versions == []
