"""The default validator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ipc.nri import nri_pb2 as pb
from ipc.settings import NriValidator
from workers.nri import validator
from workers.nri.owners import Owners

CONTAINER = pb.Container(id="c", name="main")


def judge(
    owners: Owners,
    *,
    plugins: Iterable[str] = (),
    annotations: Any = None,
    **keys: Any,
) -> str:
    """What it objects to, "" for nothing."""
    pod = pb.PodSandbox(annotations=annotations or {})
    try:
        validator.validate(NriValidator(enable=True, **keys), pod, CONTAINER, owners, set(plugins))
    except validator.Rejected as error:
        return str(error)
    return ""


def owned(field: pb.Field, key: str = "") -> Owners:
    owners = Owners()
    if field == pb.OciHooks:
        owners.share("c", field, "10-x")
    else:
        owners.claim("c", field, "10-x", key)
    return owners


@pytest.mark.parametrize(
    ("key", "field", "entry"),
    [
        ("reject_oci_hook_adjustment", pb.OciHooks, ""),
        ("reject_unconfined_seccomp_adjustment", pb.SeccompPolicy, ""),
        ("reject_namespace_adjustment", pb.Namespace, "ipc"),
        ("reject_sysctl_adjustment", pb.Sysctl, "net.a"),
    ],
)
def test_what_is_forbidden_is_rejected_with_its_plugin(key: str, field: pb.Field, entry: str) -> None:
    owners, forbidden = owned(field, entry), dict[str, Any]({key: True})
    assert judge(owners) == ""
    assert "10-x" in judge(owners, **forbidden)
    assert judge(Owners(), **forbidden) == ""


def test_seccomp_is_judged_by_the_policy_that_the_container_had() -> None:
    keys: dict[str, Any] = {"reject_runtime_default_seccomp_adjustment": True}
    assert judge(owned(pb.SeccompPolicy), **keys) == ""
    CONTAINER.linux.seccomp_profile.profile_type = pb.SecurityProfile.RUNTIME_DEFAULT
    try:
        assert "default" in judge(owned(pb.SeccompPolicy), **keys)
    finally:
        CONTAINER.ClearField("linux")


def test_required_plugins_of_the_node_and_of_the_pod() -> None:
    keys: dict[str, Any] = {"required_plugins": ["a"], "tolerate_missing_annotation": "alone"}
    assert "a" in judge(Owners(), **keys)
    assert judge(Owners(), plugins={"a"}, **keys) == ""
    assert judge(Owners(), annotations={"alone": "true"}, **keys) == ""
    assert "neither true nor false" in judge(Owners(), annotations={"alone": "maybe"}, **keys)
    asked = {f"{validator.REQUIRED}/container.main": "- b\n- 'c'\n", validator.REQUIRED: "[d]"}
    assert judge(Owners(), annotations=asked) == "required plugins are not there: b, c"
    assert judge(Owners(), plugins={"b", "c"}, annotations=asked) == ""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[]", []),
        ("[\"a\", b, 'c-d',]", ["a", "b", "c-d"]),
        ("- one\n-  two \n", ["one", "two"]),
        ("", []),
    ],
)
def test_yaml_lists_of_names(text: str, names: list[str]) -> None:
    assert validator.yaml_list(text) == names


@pytest.mark.parametrize("text", ["one", "{a: b}", "[a, [b]]", "- a: b", "- &x a", "-a", "[,]"])
def test_what_is_no_list_of_names_is_rejected(text: str) -> None:
    with pytest.raises(validator.Rejected, match="no YAML list"):
        validator.yaml_list(text)
