"""Signatures: real keys of gpg and openssl, a real registry, a lookaside on the web and one in a directory,
and the image worker in its real sandbox, whose verifier has another one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from ipc import aio
from ipc.errors import Code, RemoteError
from ipc.messages.image import ManifestResolve
from supervisor.config import ImageConfig
from supervisor.trust import load
from tests.support import signing
from tests.support.image_worker import Worker
from tests.support.registry import (
    ARCHITECTURE,
    Image,
    Registry,
    insecure_registries,
    make_image,
    make_index,
    make_layer,
    push,
)
from tests.support.sandboxed import UIDS, Host, host
from tests.support.signing import Gpg, attachment, attachment_tag, claim, put

NONE = "requires a signature"
MATCH_REPOSITORY = {"type": "matchRepository"}


@pytest.fixture
def where() -> Iterator[Host]:
    with host() as here:
        yield here


def image(text: str) -> Image:
    return make_image([make_layer({"name": text.encode()})])


@dataclass
class Case:
    """An image in a repository of its own, its signatures, and what is said of it: "" if it is accepted."""

    repository: str
    said: str
    messages: tuple[bytes, ...] = ()
    image: Image | None = None
    digest: str = ""  # which of it the signatures are of, if not its own


def write_policy(where: Host, docker: dict[str, Any], places: dict[str, Any]) -> ImageConfig:
    policy = where.base / "policy.json"
    policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": docker}}))
    directory = where.base / "registries.d"
    directory.mkdir(exist_ok=True)
    (directory / "all.yaml").write_text(json.dumps({"docker": places}))  # JSON is YAML
    return ImageConfig(policy=str(policy), policy_dir="", registries_d=str(directory))


async def outcome(client: aio.Client, reference: str) -> str:
    """ "" if it may be pulled, else why not; the refusal must be the one that kubelets know."""
    try:
        await client.call(ManifestResolve(reference=reference), timeout=30)
    except RemoteError as error:
        assert (error.code, error.reason) == (Code.PERMISSION_DENIED, "SignatureValidationFailed"), error
        return error.text
    return ""


def simple_cases(gpg: Gpg, address: str) -> Iterator[Case]:
    """Every way in which a simple signature is good or not."""

    def signed(repository: str, by: str = "good", *, digest: str = "", named: str = "", **how: bool) -> bytes:
        reference = named or f"{address}/test/{repository}:1"
        return gpg.sign(by, claim(digest or image(repository).digest, reference), **how)

    yield Case("good", "", (signed("good"),))
    yield Case("armored", "", (signed("armored", "armored"),))
    yield Case("second", "", (signed("second", "other"), b"junk", signed("second")))
    yield Case("unsigned", NONE)
    yield Case("otherkey", "by a key that the policy does not name", (signed("otherkey", "other"),))
    yield Case(
        "replayed", "does not stand for this name", (signed("replayed", named=f"{address}/test/good:1"),)
    )
    yield Case(
        "othertag", "does not stand for this name", (signed("othertag", named=f"{address}/test/othertag:2"),)
    )
    yield Case(
        "nametag", "does not stand for this name", (signed("nametag", named=f"{address}/test/nametag"),)
    )
    yield Case("otherdigest", "of another image", (signed("otherdigest", digest=image("good").digest),))
    yield Case("truncated", "no signature is acceptable", (signed("truncated")[:-20],))
    yield Case("expired", "expired", (signed("expired", "expired", expired=True),))
    yield Case("plain", "no OpenPGP message", (claim(image("plain").digest, f"{address}/test/plain:1"),))
    yield Case("nojson", "not of the form", (gpg.sign("good", b"[1, 2]"),))
    doubled = claim(image("doubled").digest, f"{address}/test/doubled:1").replace(
        b"{", b'{"critical": {}, ', 1
    )
    yield Case("doubled", "comes twice", (gpg.sign("good", doubled),))
    yield Case(
        "kind", "is of type", (gpg.sign("good", claim("x", f"{address}/test/kind:1", "something else")),)
    )
    yield Case("twofold", "no signature is acceptable", (signed("twofold") + signed("twofold"),))
    yield Case("huge", "larger than the limit", (signed("huge") + bytes(5 << 20),))
    yield Case(
        "bomb", "no signature is acceptable", (gpg.run("-u", "good", "--sign", data=b" " * (64 << 20)),)
    )
    index = make_index({("linux", ARCHITECTURE, ""): image("indexed")})
    yield Case("indexed", "", (signed("indexed", digest=index.digest),), index, index.digest)
    yield Case("inside", "", (signed("inside"),), make_index({("linux", ARCHITECTURE, ""): image("inside")}))
    yield Case("local", "", (signed("local"),))
    yield Case("both", "by a key that the policy does not name", (signed("both"),))


def test_simple_signatures_are_demanded_and_believed_as_the_policy_says(where: Host, tmp_path: Path) -> None:
    async def scenario() -> None:
        worker = Worker(where, trust=load(config))
        async with worker.running() as client:
            for case in cases:
                said = await outcome(client, f"{registry.address}/test/{case.repository}:1")
                assert (not said) if not case.said else case.said in said, f"{case.repository}: {said}"
            assert "are rejected" in await outcome(client, f"{registry.address}/elsewhere/good:1")
            verifier = psutil.Process(worker.process.pid).children()[0]  # type: ignore[union-attr]  # it runs
            confined(verifier)
            os.kill(verifier.pid, signal.SIGKILL)
            assert "has ended" in await outcome(client, f"{registry.address}/test/good:1")
            assert await worker.wait() == 0  # it makes room for one that has a verifier
        assert "late imports" not in worker.stderr

    with Gpg() as gpg, Registry(tmp_path / "registry") as registry, signing.lookaside(tmp_path) as url:
        for name in ("good", "other"):
            (where.base / f"{name}.gpg").write_bytes(gpg.key(name))
        (where.base / "armored.asc").write_bytes(gpg.key("armored", armor=True))
        (where.base / "expired.gpg").write_bytes(gpg.key("expired", expired=True))
        cases = list(simple_cases(gpg, registry.address))
        for case in cases:
            pushed = case.image or image(case.repository)
            push(registry, f"test/{case.repository}", "1", pushed)
            top = where.base / "signatures" if case.repository == "local" else tmp_path / "signatures"
            put(top, f"test/{case.repository}", case.digest or image(case.repository).digest, *case.messages)
        push(registry, "elsewhere/good", "1", image("good"))
        insecure_registries(where.base / "registries.conf", registry.address)
        keys = [str(where.base / name) for name in ("good.gpg", "armored.asc", "expired.gpg")]
        signed_by = {"type": "signedBy", "keyType": "GPGKeys"}
        other = signed_by | {"keyPath": str(where.base / "other.gpg")}
        demands = {
            f"{registry.address}/test": [signed_by | {"keyPaths": keys}],
            f"{registry.address}/test/both": [signed_by | {"keyPaths": keys}, other],
        }
        local = {f"{registry.address}/test/local": {"lookaside": f"file://{where.base}/signatures"}}
        config = write_policy(where, demands, {registry.address: {"sigstore": url}} | local)
        asyncio.run(scenario())


def confined(process: psutil.Process) -> None:
    """The verifier has nothing but its work."""
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert set(status["Uid"].split()) == {str(UIDS["image"])}
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
    assert set(os.listdir(f"/proc/{process.pid}/root")) <= {"usr", "lib", "lib64", "etc", "dev", "scratch"}
    assert os.listdir(f"/proc/{process.pid}/root/scratch") == []
    assert len(os.listdir(f"/proc/{process.pid}/fd")) <= 6


def test_signatures_of_sigstore_beside_the_image_are_demanded_and_believed(
    where: Host, tmp_path: Path
) -> None:
    def signed(
        repository: str, key: signing.EcKey, *, digest: str = "", named: str = ""
    ) -> tuple[bytes, bytes]:
        name = named or f"{registry.address}/test/{repository}"
        payload = claim(digest or image(repository).digest, name, "cosign container image signature")
        return payload, key.sign(payload)

    async def scenario() -> None:
        worker = Worker(where, trust=load(config))
        async with worker.running() as client:
            for repository, (_, expected) in cases.items():
                said = await outcome(client, f"{registry.address}/test/{repository}:1")
                assert (not said) if not expected else expected in said, f"{repository}: {said}"
            assert NONE in await outcome(client, f"{registry.address}/unused/good:1")
            assert "Fulcio, which is not supported" in await outcome(
                client, f"{registry.address}/fulcio/good:1"
            )
            assert "are rejected" in await outcome(client, f"{registry.address}/none/good:1")
        assert "late imports" not in worker.stderr

    with Registry(tmp_path / "registry") as registry:
        good, other = (signing.EcKey(tmp_path, name) for name in ("good", "other"))
        payload, signature = signed("altered", good)
        cases: dict[str, tuple[list[tuple[bytes, bytes]], str]] = {
            "good": ([signed("good", other), signed("good", good)], ""),
            "unsigned": ([], NONE),
            "otherkey": ([signed("otherkey", other)], "not by the policy's key"),
            "altered": ([(payload.replace(b"a test", b"a lie!"), signature)], "not by the policy's key"),
            "replayed": (
                [signed("replayed", good, named=f"{registry.address}/test/good")],
                "does not stand for",
            ),
            "otherdigest": ([signed("otherdigest", good, digest=image("good").digest)], "of another image"),
        }
        for repository, (signatures, _) in cases.items():
            digest = push(registry, f"test/{repository}", "1", image(repository))
            if signatures:
                push(registry, f"test/{repository}", attachment_tag(digest), attachment(signatures))
        for repository in ("unused", "fulcio", "none"):
            digest = push(registry, f"{repository}/good", "1", image("good"))
            push(registry, f"{repository}/good", attachment_tag(digest), attachment([signed("good", good)]))
        insecure_registries(where.base / "registries.conf", registry.address)
        demand = {"type": "sigstoreSigned", "keyPath": str(good.public), "signedIdentity": MATCH_REPOSITORY}
        fulcio = {"type": "sigstoreSigned", "fulcio": {"oidcIssuer": "https://example.org"}}
        demands = {
            f"{registry.address}/test": [demand],
            f"{registry.address}/unused": [demand],
            f"{registry.address}/fulcio": [fulcio],
        }
        places = {f"{registry.address}/test": {"use-sigstore-attachments": True}}
        config = write_policy(where, demands, places)
        asyncio.run(scenario())
