"""policy.json, policies of namespaces, keys, registries.d: what is read, and what is said of faults."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from ipc.reference import parse
from ipc.trust import Accept, ExactReference, OpenPgp, Place, Reject, Sigstore, Trust, Unsupported, scopes
from supervisor.config import ImageConfig
from supervisor.configfile import ConfigError
from supervisor.trust import DEFAULT_POLICY, keyring, load, read_policy, unsupported

PGP = bytes([0x98, 0x33]) + b"a key"
ARMORED = (
    b"a comment\n-----BEGIN PGP PUBLIC KEY BLOCK-----\nVersion: 1\n\n"
    + base64.encodebytes(PGP)
    + b"=abcd\n-----END PGP PUBLIC KEY BLOCK-----\n"
)
PEM = b"-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"
ACCEPT: dict[str, Any] = {"type": "insecureAcceptAnything"}
SIGNED: dict[str, Any] = {"type": "signedBy", "keyType": "GPGKeys"}
SIGSTORE: dict[str, Any] = {"type": "sigstoreSigned"}
DATA = {"keyData": base64.b64encode(PGP).decode()}


def policy(requirement: Any, *, transport: str = "docker") -> bytes:
    document = {"default": [{"type": "reject"}], "transports": {transport: {"a.test": [requirement]}}}
    return json.dumps(document).encode()


def identity(kind: str, **members: str) -> dict[str, Any]:
    return {"signedIdentity": {"type": kind, **members}}


def config(directory: Path, text: bytes) -> ImageConfig:
    path = directory / "policy.json"
    path.write_bytes(text)
    (directory / "policies").mkdir(exist_ok=True)
    (directory / "registries.d").mkdir(exist_ok=True)
    return ImageConfig(
        policy=str(path), policy_dir=f"{directory}/policies", registries_d=f"{directory}/registries.d"
    )


def fault(text: bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read_policy("/p.json", text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{\n"default": [\n}', "/p.json:3: not JSON: "),
        (b"[]", "/p.json: Expected `object`"),
        (b"{}", "missing required field `default`"),
        (b'{"default": []}', "/p.json: default: it has no requirement"),
        (b'{"default": [{"type": "reject"}], "Default": []}', "unknown field `Default`"),
        (b'{"default": [], "default": []}', "'default' comes twice"),
        (b'{"default": [{"type": "maybe"}]}', "/p.json: default[0]: Invalid value 'maybe'"),
        (b'{"default": [{"type": "reject", "x": 1}]}', "unknown field `x`"),
        (b"\xff", "/p.json: 'utf-8'"),
        (policy(ACCEPT | {"keyPath": "/x"}), "transports.docker['a.test'][0]: Object contains unknown field"),
        (policy({"type": "no"}, transport="oci"), "transports.oci['a.test'][0]: Invalid value 'no'"),
        (policy({"type": "signedBy"}), "missing required field `keyType`"),
        (policy(SIGNED | {"keyType": "other"}), "keyType 'other' is none"),
        (policy(SIGNED), "exactly one of keyPath, keyPaths, keyData"),
        (policy(SIGNED | DATA | {"keyPath": "/x"}), "exactly one of"),
        (policy(SIGNED | {"keyPaths": []}), "keyPaths is empty"),
        (policy(SIGNED | {"keyPath": "keys/a.gpg"}), "must be an absolute path"),
        (policy(SIGNED | {"keyPath": "/nowhere/a.gpg"}), "keyPath: /nowhere/a.gpg: there is no such file"),
        (policy(SIGNED | {"keyData": "%"}), "keyData is not base64"),
        (policy(SIGNED | {"keyData": "aGVsbG8="}), "it has no OpenPGP public key"),
        (policy(SIGSTORE | DATA), "it is no public key in PEM"),
        (policy(SIGSTORE), "exactly one of keyPath, keyPaths, keyData, keyDatas"),
        (policy(SIGNED | DATA | identity("matchAll")), "Invalid value 'matchAll'"),
        (policy(SIGNED | DATA | identity("exactReference", dockerReference="a.test/x")), "no tag"),
        (policy(SIGNED | DATA | identity("exactRepository", dockerRepository="x:1")), "more than"),
        (policy(SIGNED | DATA | identity("exactRepository", dockerRepository="UP")), "not an image"),
        (policy(SIGNED | DATA | identity("remapIdentity", prefix="a/", signedPrefix="b")), "no prefix"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: bytes, said: str) -> None:
    assert said in fault(text)
    assert fault(text).startswith("/p.json")


def test_requirements_are_read_with_their_keys(tmp_path: Path) -> None:
    (tmp_path / "a.gpg").write_bytes(PGP)
    (tmp_path / "b.asc").write_bytes(ARMORED + ARMORED)
    (tmp_path / "k.pub").write_bytes(PEM)
    both = SIGNED | {"keyPaths": [f"{tmp_path}/a.gpg", f"{tmp_path}/b.asc"]}
    exact = {"signedIdentity": {"type": "exactReference", "dockerReference": "b.test/x:1"}}
    assert read_policy("p", policy(both)).docker["a.test"] == [OpenPgp([PGP, PGP + PGP])]
    found = read_policy("p", policy(SIGNED | DATA | exact)).docker["a.test"]
    assert found == [OpenPgp([PGP], ExactReference("b.test/x:1"))]
    named = read_policy("p", policy(SIGSTORE | {"keyPath": f"{tmp_path}/k.pub"}))
    given = read_policy("p", policy(SIGSTORE | {"keyDatas": [base64.b64encode(PEM).decode()]}))
    assert named == given
    assert named.docker["a.test"] == [Sigstore([PEM])]
    with pytest.raises(ConfigError, match="no OpenPGP public key"):
        keyring("here", PEM)


def test_what_cannot_be_verified_is_kept_as_what_nothing_meets() -> None:
    for extra, named in (
        ({"fulcio": {}}, "Fulcio"),
        ({"pki": {}}, "PKI"),
        ({"keyPath": "/nowhere", "rekorPublicKeyPath": "/nowhere"}, "Rekor"),
        ({"keyData": "x", "rekorPublicKeyDatas": []}, "Rekor"),
    ):
        requirement = read_policy("p", policy(SIGSTORE | extra)).docker["a.test"][0]
        assert requirement == Unsupported(f"sigstoreSigned with {named}")
    base = read_policy("p", policy({"type": "signedBaseLayer", "baseLayerIdentity": {"type": "matchExact"}}))
    assert base.docker["a.test"] == [Unsupported("signedBaseLayer")]
    old = read_policy("p", policy(SIGNED | {"keyType": "X509Certificates", "keyPath": "/x"}))
    assert "keyType X509Certificates cannot be verified" in unsupported(Trust(policy=old))[0]


def test_the_most_exact_scope_counts() -> None:
    digest = f"sha256:{'0' * 64}"
    reference = parse("a.b.test:5000/x/y:1")
    assert scopes(reference) == [
        "a.b.test:5000/x/y:1", "a.b.test:5000/x/y", "a.b.test:5000/x", "a.b.test:5000", "*.b.test", "*.test",
    ]  # fmt: skip
    assert scopes(reference.with_digest(digest))[0] == f"a.b.test:5000/x/y@{digest}"
    assert scopes(parse("busybox"))[0] == "docker.io/library/busybox:latest"
    assert scopes(parse("busybox"))[1:] == [
        "docker.io/library/busybox",
        "docker.io/library",
        "docker.io",
        "*.io",
    ]
    document: dict[str, Any] = {
        "default": [{"type": "reject"}],
        "transports": {"docker": {"*.test": [ACCEPT]}},
    }
    found = read_policy("p", json.dumps(document).encode())
    assert found.requirements(reference) == [Accept()]
    assert found.requirements(parse("test/x")) == [Reject()]
    document["transports"]["docker"]["a.b.test:5000/x"] = [{"type": "reject"}]
    document["transports"]["docker"][""] = [ACCEPT]
    found = read_policy("p", json.dumps(document).encode())
    assert found.requirements(reference) == [Reject()]
    assert found.requirements(parse("elsewhere.org/x")) == [Accept()]


def test_a_policy_may_be_absent_only_where_nobody_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no such file, and image\.policy names it"):
        load(ImageConfig(policy=f"{tmp_path}/none.json"))
    monkeypatch.setattr("supervisor.trust.DEFAULT_POLICY", f"{tmp_path}/none.json")
    assert load(ImageConfig(policy=f"{tmp_path}/none.json", policy_dir="")) == Trust()
    assert ImageConfig().policy == DEFAULT_POLICY


def test_namespaces_and_places_of_signatures(tmp_path: Path) -> None:
    where = config(tmp_path, policy(SIGNED | DATA))
    (tmp_path / "policies" / "prod.json").write_bytes(b'{"default": [{"type": "reject"}]}')
    (tmp_path / "registries.d" / "a.yaml").write_text(
        "default-docker:\n  sigstore: https://sigs.test/\n  sigstore-staging: file:///x\n"
    )
    (tmp_path / "registries.d" / "b.yaml").write_text(
        "docker:\n  a.test: {lookaside: 'file:///srv/sigs'}\n  a.test/x: {use-sigstore-attachments: true}\n"
    )
    (tmp_path / "registries.d" / "c.yml").write_text("nobody reads this: [")
    found = load(where)
    reference = parse("a.test/x/y:1")
    assert found.policy_for("prod").requirements(reference) == [Reject()]  # type: ignore[union-attr]  # it is there
    assert found.policy_for("other") is found.policy
    assert found.lookaside(reference) == "file:///srv/sigs"
    assert found.attachments(reference)
    assert not found.attachments(parse("a.test/z:1"))
    assert found.lookaside(parse("b.test/x")) == "https://sigs.test"
    assert found.directories() == ["/srv/sigs"]
    assert found.gpgv.endswith("/gpgv")
    assert not found.openssl
    assert Trust(policy=found.policy).directories() == ["/var/lib/containers/sigstore"]
    assert Trust(policy=found.policy).lookaside(reference) == "file:///var/lib/containers/sigstore"
    (tmp_path / "policies" / "prod.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match=r"prod\.json:1: not JSON"):
        load(where)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("docker: [", "d/b.yaml: while parsing"),
        ("docker:\n  a.test: {lookaside: ftp://x/y}\n", "docker['a.test']: 'ftp://x/y' is no URL"),
        ("docker:\n  a.test: {lookaside: 'file://host/y'}\n", "is no URL"),
        ("docker:\n  a.test: {lookaside: 'file:///a:b'}\n", "neither ':' nor '..'"),
        ("docker:\n  a.test: {use-sigstore-attachments: 1}\n", "Expected `bool | null`"),
        ("default-docker: {}\n", "default-docker: another file"),
        ("docker:\n  x.test: {}\n", "docker['x.test']: another file"),
    ],
)
def test_a_wrong_place_of_signatures_is_told(tmp_path: Path, text: str, said: str) -> None:
    where = config(tmp_path, policy(SIGNED | DATA))
    (tmp_path / "registries.d" / "a.yaml").write_text("default-docker: {}\ndocker: {x.test: {}}\n")
    (tmp_path / "registries.d" / "b.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(where)
    assert said in str(caught.value)


def test_nobody_looks_for_signatures_that_nobody_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = config(tmp_path, policy(ACCEPT))
    (tmp_path / "registries.d" / "b.yaml").write_text("docker: [")
    found = load(where)
    assert found.places == {}
    assert found.default_place == Place()
    assert (found.gpgv, found.directories()) == ("", [])
    monkeypatch.setattr("supervisor.trust.find_program", lambda _name: "")
    (tmp_path / "registries.d" / "b.yaml").unlink()
    with pytest.raises(ConfigError, match="needs the program gpgv"):
        load(config(tmp_path, policy(SIGNED | DATA)))
