"""docs/cri-fields.md says what becomes of every field of the API, and says it of no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from ipc.cri import api_pb2
from workers.cri.main import image_service, image_streams, runtime_service, runtime_streams
from workers.cri.observing import Observing
from workers.cri.service import Service
from workers.cri.spec import validate

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/cri-fields.md"
MESSAGES = api_pb2.DESCRIPTOR.message_types_by_name
WORDS = {"honoured", "refused", "answered", "nothing"}
#: RPCs whose messages are not of pods, containers or images; the page says so.
ELSEWHERE = {
    "CheckpointContainer", "CheckpointPod", "ContainerStats", "GetContainerEvents",
    "ListContainerStats", "ListMetricDescriptors", "ListPodSandboxMetrics", "ListPodSandboxStats",
    "PodSandboxStats", "RestorePod", "StreamContainerStats", "StreamPodSandboxMetrics",
    "StreamPodSandboxStats",
}  # fmt: skip


def described() -> dict[str, dict[str, tuple[str, str]]]:
    """The page: message -> field -> effect and explanation."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    message: dict[str, tuple[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("### "):
            message = found.setdefault(line[4:], {})
        elif row := re.fullmatch(r"\| `([\w*]+)` \| ([\w, ]+) \| (.*) \|", line):
            assert row[1] not in message, f"{row[1]} has two rows"
            message[row[1]] = (row[2], row[3])
    return found


def walk(descriptor: Descriptor, seen: set[str]) -> None:
    if descriptor.name in seen or descriptor.GetOptions().map_entry:
        return
    seen.add(descriptor.name)
    for field in descriptor.fields:
        if field.message_type is not None:
            walk(field.message_type, seen)


def reachable() -> set[str]:
    seen: set[str] = set()
    for service in api_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            if method.name not in ELSEWHERE:
                walk(method.input_type, seen)
                walk(method.output_type, seen)
    return seen


TABLE = described()


def test_every_message_has_its_table_and_no_other_has() -> None:
    assert set(TABLE) == reachable()


@pytest.mark.parametrize("message", sorted(reachable()))
def test_every_field_has_its_row_and_no_other_has(message: str) -> None:
    rows = set(TABLE.get(message, {}))
    if message.startswith("Windows"):
        assert rows == {"*"}
    else:
        assert rows == {field.name for field in MESSAGES[message].fields}


def rows() -> Iterator[tuple[str, str, str, str]]:
    for message, fields in TABLE.items():
        for field, (effect, how) in fields.items():
            yield message, field, effect, how


def test_every_row_says_its_effect_in_the_pages_words() -> None:
    for message, field, effect, how in rows():
        assert set(effect.split(", ")) <= WORDS, f"{message}.{field}"
        assert how or effect == "answered", f"{message}.{field}: how?"


def test_every_module_that_is_named_is_there() -> None:
    named = set(re.findall(r"`((?:workers|ipc|supervisor|tests)/[\w/.]+)`", PAGE.read_text()))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def message_of(path: str) -> tuple[str, str]:
    """ "linux.security_context.x" of a container's config -> the message and field that it ends in."""
    *above, last = path.split(".")
    descriptor = MESSAGES["ContainerConfig"]
    for name in above:
        inner = descriptor.fields_by_name[name].message_type
        assert inner is not None
        descriptor = inner
    return descriptor.name, last


def test_what_the_code_refuses_the_page_refuses_with_the_same_error() -> None:
    for refusal in validate.REFUSED:
        message, field = message_of(refusal.field)
        effect, how = TABLE[message][field]
        assert "refused" in effect, f"{message}.{field}"
        assert refusal.code.name in how
        assert refusal.reason in how


def test_what_the_page_refuses_of_a_container_the_code_refuses() -> None:
    refused = {message_of(refusal.field) for refusal in validate.REFUSED}
    for message in ("ContainerConfig", "Mount", "Device", "CDIDevice", "LinuxContainerSecurityContext"):
        for field, (effect, _) in TABLE[message].items():
            assert ("refused" in effect) == ((message, field) in refused), f"{message}.{field}"


def test_the_rpcs_of_the_page_are_served(service: Service) -> None:
    served = {*runtime_service(service), *image_service(service)}
    served |= {*runtime_streams(service), *image_streams(service)}
    for api in api_pb2.DESCRIPTOR.services_by_name.values():
        for method in api.methods:
            assert method.name in served or method.name in ELSEWHERE, method.name


@pytest.fixture
def service() -> Service:
    """One that serves nothing: only the tables of its RPCs are looked at."""

    class _Any(Service):
        def __init__(self) -> None:  # no node, no peers
            self.observing = Observing.__new__(Observing)

    return _Any()
