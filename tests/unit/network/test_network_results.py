"""What CNI plugins print: results of each version, errors, and nonsense."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import Code
from workers.network.results import PluginError, addresses, convert, parse_failure, parse_result

OLD = {
    "cniVersion": "0.4.0",
    "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/ns"}],
    "ips": [
        {"version": "4", "address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 1},
        {"version": "6", "address": "fd00::2/64", "interface": 1},
    ],
}


def test_addresses_lose_their_family_on_the_way_to_1_0_and_get_it_back() -> None:
    new = convert(OLD, "1.0.0")
    assert new["cniVersion"] == "1.0.0"
    assert [sorted(entry) for entry in new["ips"]] == [
        ["address", "gateway", "interface"],
        ["address", "interface"],
    ]
    assert convert(new, "0.4.0") == OLD


def test_a_result_without_a_version_is_in_that_of_its_list() -> None:
    assert parse_result(b'{"ips": []}', version="0.3.1") == {"cniVersion": "0.3.1", "ips": []}


def test_absent_and_null_lists_are_the_same() -> None:
    assert addresses(parse_result(b'{"ips": null, "interfaces": null}', version="1.0.0")) == []


def test_addresses_are_those_in_the_sandbox_in_order() -> None:
    result = json.loads(json.dumps(OLD))
    result["ips"] += [{"address": "10.0.0.1/24", "interface": 0}, {"address": "192.168.1.1/32"}]
    assert addresses(result) == ["10.0.0.2", "fd00::2", "192.168.1.1"]


@pytest.mark.parametrize(
    "result",
    [
        {"ips": {}},
        {"ips": ["10.0.0.1"]},
        {"interfaces": [1]},
        {"dns": []},
        {"cniVersion": "0.2.0"},
        {"cniVersion": 7},
        {"ips": [{"address": "10.0.0"}]},
        {"ips": [{}]},
        {"ips": [{"address": "10.0.0.1/8", "interface": "0"}], "interfaces": [{}]},
        {"ips": [{"address": "10.0.0.1/8", "interface": -1}], "interfaces": [{"sandbox": "x"}]},
        {"ips": [{"address": "10.0.0.1\x00/8"}]},
    ],
)
def test_a_result_that_lies_about_its_form_is_refused(result: dict[str, Any]) -> None:
    with pytest.raises(PluginError):
        addresses(parse_result(json.dumps(result).encode(), version="1.0.0"))


@given(
    st.binary()
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["ips", "interfaces", "address", "interface", "cniVersion"]), x)
        ),
    ).map(lambda v: json.dumps(v).encode())
)
def test_any_output_gives_addresses_or_a_sentence(data: bytes) -> None:
    try:
        addresses(parse_result(data, version="1.0.0"))
    except PluginError as error:
        assert error.text


@pytest.mark.parametrize(
    ("stdout", "stderr", "text", "code"),
    [
        (b'{"code": 7, "msg": "a", "details": "b"}', b"noise", "a: b (CNI error 7)", Code.INTERNAL),
        (b'{"code": 11, "msg": "later"}', b"", "later (CNI error 11)", Code.UNAVAILABLE),
        (b'{"code": "x", "msg": "a"}', b"", "a (exit code 2)", Code.INTERNAL),
        (b"", b"panic:\n  at line 1\n", "panic: at line 1 (exit code 2)", Code.INTERNAL),
        (b"words on stdout", b"", "words on stdout (exit code 2)", Code.INTERNAL),
        (b"", b"", "it said nothing (exit code 2)", Code.INTERNAL),
    ],
)
def test_the_reason_of_a_failure_is_found_wherever_it_was_said(
    stdout: bytes, stderr: bytes, text: str, code: Code
) -> None:
    error = parse_failure(2, stdout, stderr)
    assert error.text == text
    assert error.remote().code is code


def test_a_failure_by_signal_is_told_and_its_words_are_bounded() -> None:
    error = parse_failure(-9, b"", b"\x1b[31m" + b"x" * 100_000)
    assert error.text.endswith("x (killed by signal 9)")
    assert len(error.text) < 3000
    assert error.text.isprintable()
