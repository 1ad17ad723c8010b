"""Manifests, indexes, configs, chain ids and the choice of a platform, without any registry."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import Code, RemoteError
from workers.image import manifests
from workers.image.manifests import Document, Kind
from workers.image.platforms import Platform, wanted

DIGEST = "sha256:" + "a" * 64
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = {"mediaType": manifests.OCI_CONFIG, "digest": DIGEST, "size": 10}
LAYER = {"mediaType": LAYER_TYPE, "digest": DIGEST, "size": 20}
MANIFEST: dict[str, Any] = {"schemaVersion": 2, "config": CONFIG, "layers": [LAYER]}
INDEX: dict[str, Any] = {"schemaVersion": 2, "manifests": []}


def document(content: Any, content_type: str = "") -> Document:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return manifests.read_document(data, manifests.digest_of(data), content_type)


def entry(os: str, architecture: str, variant: str = "", **more: Any) -> dict[str, Any]:
    name = f"{os}{architecture}{variant}".encode()
    digest = f"sha256:{hashlib.sha256(name).hexdigest()}"
    made_for = {"os": os, "architecture": architecture, "variant": variant}
    media_type = manifests.OCI_MANIFEST
    return {"mediaType": media_type, "digest": digest, "size": 1, "platform": made_for} | more


def refused(content: Any, code: Code = Code.INVALID_ARGUMENT) -> str:
    with pytest.raises(RemoteError) as caught:
        manifests.read_manifest(document(content))
    assert caught.value.code is code
    return caught.value.text


@pytest.mark.parametrize(
    ("stated", "content_type", "found"),
    [
        (None, manifests.DOCKER_MANIFEST, manifests.DOCKER_MANIFEST),
        (None, "application/json; charset=utf-8", manifests.OCI_MANIFEST),
        (None, "", manifests.OCI_MANIFEST),
        (manifests.DOCKER_MANIFEST, manifests.OCI_MANIFEST, manifests.DOCKER_MANIFEST),
        (manifests.OCI_MANIFEST, "text/plain", manifests.OCI_MANIFEST),
    ],
)
def test_a_document_knows_its_type_better_than_the_server(
    stated: str | None, content_type: str, found: str
) -> None:
    content = MANIFEST | ({"mediaType": stated} if stated else {})
    assert document(content, content_type).media_type == found
    assert document(content, content_type).kind is Kind.MANIFEST


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        ({"schemaVersion": 2, "fsLayers": []}, "schema 1"),
        (MANIFEST | {"schemaVersion": 3}, "schemaVersion is 3"),
        ({}, "schemaVersion is None"),
        ({"schemaVersion": 2}, "neither"),
        (MANIFEST | {"manifests": []}, "ambiguous"),
        (INDEX | {"config": CONFIG}, "ambiguous"),
        (MANIFEST | {"mediaType": manifests.OCI_INDEX}, "calls itself"),
        (INDEX | {"mediaType": manifests.OCI_MANIFEST}, "calls itself"),
        (b"", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[" * 100_000, "malformed"),
        ([], "malformed"),
        (MANIFEST | {"layers": {}}, "malformed"),
        (MANIFEST | {"layers": [LAYER | {"size": "20"}]}, "malformed"),
        (MANIFEST | {"layers": [LAYER | {"size": -1}]}, "claims a size"),
        (MANIFEST | {"layers": [LAYER | {"size": 1 << 60}]}, "claims a size"),
        (MANIFEST | {"layers": [LAYER | {"size": 10**30}]}, "claims a size"),
        (MANIFEST | {"layers": [LAYER | {"digest": "sha256:../../x"}]}, "layer 1: the digest"),
        (MANIFEST | {"layers": [LAYER | {"digest": "md5:" + "a" * 32}]}, "layer 1: the digest"),
        (MANIFEST | {"layers": [LAYER | {"mediaType": LAYER_TYPE + "+encrypted"}]}, "encrypted"),
        (MANIFEST | {"layers": [LAYER | {"mediaType": "text/html"}]}, "no layer of a container image"),
        (MANIFEST | {"layers": [LAYER | {"urls": ["https://x"] * 17}]}, "urls"),
        (MANIFEST | {"layers": [LAYER] * 501}, "501 layers"),
        (
            MANIFEST | {"config": CONFIG | {"mediaType": "application/vnd.cncf.helm.config.v1+json"}},
            "artifact",
        ),
        (
            MANIFEST
            | {
                "artifactType": "application/x.sbom",
                "config": CONFIG | {"mediaType": "application/vnd.oci.empty.v1+json"},
            },
            r"artifact (application/x.sbom)",
        ),
    ],
)
def test_what_is_no_image_manifest_is_refused(content: Any, sentence: str) -> None:
    assert sentence in refused(content)


def test_schema_1_by_its_content_type_is_refused() -> None:
    with pytest.raises(RemoteError, match="schema 1"):
        document({"schemaVersion": 2}, "application/vnd.docker.distribution.manifest.v1+prettyjws")


@given(
    st.binary(max_size=300)
    | st.recursive(st.none() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    try:
        manifests.read_manifest(manifests.read_document(data, DIGEST, ""))
    except RemoteError as error:
        assert error.code is Code.INVALID_ARGUMENT
        assert len(error.text) < 1000


def choose(entries: list[dict[str, Any]], platform: Platform) -> str:
    return manifests.choose(document(INDEX | {"manifests": entries}), platform).digest


@pytest.mark.parametrize(
    ("offered", "platform", "index"),
    [
        (["amd64", "arm64"], "amd64", 0),
        (["arm64", "amd64"], "amd64", 1),
        (["amd64/v3", "amd64"], "amd64", 1),
        (["amd64", "amd64/v3", "amd64/v2"], "amd64/v3", 1),
        (["amd64", "amd64/v4"], "amd64/v3", 0),
        (["arm/v6", "arm/v7", "arm/v5"], "arm/v7", 1),
        (["arm/v5", "arm/v6"], "arm/v7", 1),
        (["arm/v7", "arm/v6"], "arm/v6", 1),
        (["arm", "arm/v6"], "arm", 0),
        (["arm64"], "arm64/v8", 0),
        (["arm64/v8"], "arm64", 0),
        (["arm64/v9", "arm64"], "arm64/v8", 1),
        (["amd64", "amd64"], "amd64", 0),
        (["s390x"], "s390x", 0),
    ],
)
def test_the_best_entry_for_the_platform_is_chosen(offered: list[str], platform: str, index: int) -> None:
    entries = [
        entry("linux", *made_for.split("/")) | {"size": number} for number, made_for in enumerate(offered)
    ]
    architecture, _, variant = platform.partition("/")
    found = manifests.choose(
        document(INDEX | {"manifests": entries}), Platform("linux", architecture, variant)
    )
    assert found.size == index


def test_attestations_and_other_systems_are_passed_over() -> None:
    entries = [
        entry("unknown", "unknown"),
        entry("windows", "amd64"),
        entry("linux", "amd64", artifactType="application/vnd.x"),
        entry("linux", "amd64", mediaType="application/vnd.x"),
    ]
    amd64 = Platform("linux", "amd64")
    with pytest.raises(RemoteError, match="no image for linux/amd64, only for") as caught:
        choose(entries, amd64)
    assert caught.value.code is Code.NOT_FOUND
    assert "unknown" not in caught.value.text
    right = entry("linux", "amd64")
    assert choose([*entries, right], amd64) == right["digest"]


def test_an_entry_without_a_platform_is_the_last_resort() -> None:
    unnamed = {"mediaType": manifests.OCI_MANIFEST, "digest": DIGEST, "size": 1}
    named = entry("linux", "amd64")
    assert choose([unnamed], Platform("linux", "amd64")) == DIGEST
    assert choose([unnamed, named], Platform("linux", "amd64")) == named["digest"]


def test_this_machine_is_meant_when_no_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, platform in [
        ("x86_64", Platform("linux", "amd64")),
        ("aarch64", Platform("linux", "arm64", "v8")),
        ("armv7l", Platform("linux", "arm", "v7")),
        ("newchip", Platform("linux", "newchip")),
    ]:
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert wanted("linux", "", "") == platform
    assert wanted("linux", "arm", "v6") == Platform("linux", "arm", "v6")


def test_chain_ids_are_those_of_the_specification() -> None:
    diff_ids = [f"sha256:{letter * 64}" for letter in "abc"]
    first, second, third = manifests.chain_ids(diff_ids)
    assert first == diff_ids[0]
    assert second == "sha256:" + hashlib.sha256(f"{first} {diff_ids[1]}".encode()).hexdigest()
    assert third == "sha256:" + hashlib.sha256(f"{second} {diff_ids[2]}".encode()).hexdigest()
    assert manifests.chain_ids([]) == []


def config(diff_ids: list[Any], **more: Any) -> bytes:
    return json.dumps({"rootfs": {"type": "layers", "diff_ids": diff_ids}} | more).encode()


def test_layers_and_diff_ids_must_be_as_many() -> None:
    manifest = manifests.read_manifest(document(MANIFEST))
    layers = manifests.layers_of(manifest, manifests.read_config(config([DIGEST])))
    assert [(layer.digest, layer.size, layer.diff_id) for layer in layers] == [(DIGEST, 20, DIGEST)]
    for count in (0, 2):
        with pytest.raises(RemoteError, match=f"1 layers, its config {count} diff ids") as caught:
            manifests.layers_of(manifest, manifests.read_config(config([DIGEST] * count)))
        assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"null",
        b"",
        config(["sha256:short"]),
        config([1]),
        json.dumps({"rootfs": {"type": "other", "diff_ids": []}}).encode(),
    ],
)
def test_a_config_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteError) as caught:
        manifests.read_config(data)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_bytes_are_verified_by_every_known_algorithm(algorithm: str) -> None:
    digest = manifests.digest_of(b"bytes", algorithm)
    manifests.verify(b"bytes", digest, "it")
    with pytest.raises(RemoteError) as caught:
        manifests.verify(b"other", digest, "it")
    assert caught.value.code is Code.DATA_LOSS
