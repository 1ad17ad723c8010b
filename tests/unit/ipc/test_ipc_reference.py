"""Image references: what people write becomes one full form, and nonsense is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import Code, RemoteError
from ipc.reference import Reference, check_digest, has_domain, image_id, parse

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("user/app", "docker.io/user/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:v1", "localhost:5000/app:v1"),
        ("registry.k8s.io/e2e-test-images/busybox:1.29-4", "registry.k8s.io/e2e-test-images/busybox:1.29-4"),
        ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("quay.io/x/my__name-with--dashes.a", "quay.io/x/my__name-with--dashes.a:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"quay.io/x/y:tag@{DIGEST}", f"quay.io/x/y:tag@{DIGEST}"),
        ("Example.COM/app", "Example.COM/app:latest"),
    ],
)
def test_references_are_normalised(text: str, full: str) -> None:
    assert str(parse(text)) == full
    assert parse(full) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "busybox ",
        "Busybox",
        "busybox:",
        "busybox:-x",
        "busybox:" + "t" * 129,
        "busybox:tag\n",
        "quay.io/",
        "quay.io//x",
        "quay.io/x/",
        "/x",
        "a_-b",
        "../../etc/passwd",
        "quay.io/../x",
        "-host.io/x",
        "quay.io:port/x",
        "busybox@",
        "busybox@sha256:abc",
        "busybox@md5:" + "0" * 32,
        f"busybox@{DIGEST}@{DIGEST}",
        f"busybox@sha256:{HEX.upper()}",
        "x" * 5000,
        "quay.io/" + "a/" * 200 + "a",
        HEX,
        DIGEST,
        "büsybox",
    ],
)
def test_what_is_no_reference_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(RemoteError) as caught:
        parse(text)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert len(caught.value.text) < 600


def test_parts_of_a_reference() -> None:
    reference = parse(f"quay.io/x/y:tag@{DIGEST}")
    assert reference == Reference("quay.io", "x/y", "tag", DIGEST)
    assert reference.repository == "quay.io/x/y"
    assert reference.name == "quay.io/x/y:tag"
    assert reference.repo_digest == reference.key == f"quay.io/x/y@{DIGEST}"
    assert parse("busybox").key == "docker.io/library/busybox:latest"
    assert parse(f"busybox@{DIGEST}").name == ""
    assert str(parse("busybox").with_digest(DIGEST)) == f"docker.io/library/busybox:latest@{DIGEST}"


def test_image_ids_are_no_names() -> None:
    assert image_id(HEX) == image_id(DIGEST) == DIGEST
    assert image_id("busybox") is None
    assert image_id(HEX[:12]) is None
    assert image_id(DIGEST + "0") is None


def test_short_names_are_told_from_full_ones() -> None:
    assert not has_domain("busybox")
    assert not has_domain("user/app")
    assert has_domain("localhost/app")
    assert has_domain("quay.io/app")


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_digests_have_the_length_of_their_algorithm(algorithm: str) -> None:
    length = {"sha256": 64, "sha384": 96, "sha512": 128}[algorithm]
    assert check_digest(f"{algorithm}:{'a' * length}")
    with pytest.raises(RemoteError):
        check_digest(f"{algorithm}:{'a' * (length - 1)}")


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_refused_and_the_full_form_is_stable(text: str) -> None:
    try:
        reference = parse(text)
    except RemoteError:
        return
    assert parse(str(reference)) == reference
