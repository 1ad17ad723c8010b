"""The signature policy without keys: which names a signature counts for, and that every demand must hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import cast

import pytest

from ipc import trust
from ipc.errors import Code, RemoteError
from ipc.reference import parse
from ipc.trust import Accept, Identity, OpenPgp, Reject, Requirement, Sigstore, Unsupported
from workers.image.client import Client
from workers.image.manifests import Document, Kind
from workers.image.policy import COSIGN, SIMPLE, Attached, Subject, enforce, matches
from workers.image.registries import Endpoint
from workers.image.signatures import ANNOTATION, PAYLOAD, Places
from workers.image.transport import Transport
from workers.image.verifier import Answered, Asked, OpenPgpAsked, judged

DIGEST = f"sha256:{'1' * 64}"
INDEX = f"sha256:{'2' * 64}"
NAME = "a.test/x/y:1"
EXACT = trust.MatchExact()
USUAL = trust.MatchRepoDigestOrExact()
REPOSITORY = trust.MatchRepository()
OTHER = trust.ExactReference("b.test/z:2")
ANY_OTHER = trust.ExactRepository("b.test/z")
REMAP = trust.RemapIdentity("a.test/x", "b.test")


@pytest.mark.parametrize(
    ("identity", "reference", "signed", "counts"),
    [
        (EXACT, NAME, NAME, True),
        (EXACT, NAME, "a.test/x/y:2", False),
        (EXACT, NAME, "a.test/x/y", False),
        (EXACT, f"a.test/x/y@{DIGEST}", NAME, False),
        (EXACT, f"a.test/x/y@{DIGEST}", f"a.test/x/y@{DIGEST}", True),
        (EXACT, "busybox", "docker.io/library/busybox:latest", True),
        (EXACT, "busybox", "busybox:latest", True),
        (USUAL, NAME, NAME, True),
        (USUAL, NAME, "a.test/x/z:1", False),
        (USUAL, NAME, "a.test/x/y", False),
        (USUAL, f"a.test/x/y@{DIGEST}", "a.test/x/y:7", True),
        (USUAL, f"a.test/x/y:1@{DIGEST}", "a.test/x/y:7", True),
        (USUAL, f"a.test/x/y@{DIGEST}", "a.test/x/y", False),
        (USUAL, f"a.test/x/y@{DIGEST}", "a.test/x/z:1", False),
        (REPOSITORY, NAME, "a.test/x/y:9", True),
        (REPOSITORY, NAME, "a.test/x/y", True),
        (REPOSITORY, NAME, "a.test/x", False),
        (REPOSITORY, NAME, "no reference", False),
        (OTHER, NAME, "b.test/z:2", True),
        (OTHER, NAME, "b.test/z:3", False),
        (OTHER, NAME, NAME, False),
        (ANY_OTHER, NAME, "b.test/z:3", True),
        (ANY_OTHER, NAME, "b.test/z", True),
        (ANY_OTHER, NAME, NAME, False),
        (REMAP, NAME, "b.test/y:1", True),
        (REMAP, NAME, NAME, False),
        (REMAP, "a.test/xx/y:1", "b.test/y:1", False),
        (REMAP, "c.test/x/y:1", "c.test/x/y:1", True),
        (REMAP, f"a.test/x/y@{DIGEST}", "b.test/y:4", True),
        (USUAL, NAME, "", False),
        (REPOSITORY, NAME, "", False),
    ],
)
def test_which_names_a_signature_counts_for(
    identity: Identity, reference: str, signed: str, *, counts: bool
) -> None:
    assert matches(identity, parse(reference), signed) is counts


class Found:
    """Signatures that are there; it remembers what was looked for."""

    def __init__(self, simple: dict[str, list[bytes]], attached: dict[str, list[Attached]]) -> None:
        self._simple = simple
        self._attached = attached
        self.looked: list[str] = []

    def simple(self, digest: str) -> Iterator[bytes]:
        self.looked.append(digest)
        yield from self._simple.get(digest, [])

    def attached(self, digest: str) -> Iterator[Attached]:
        self.looked.append(digest)
        yield from self._attached.get(digest, [])


def claim(digest: str, kind: str = SIMPLE, name: str = NAME) -> bytes:
    body = {"type": kind, "image": {"docker-manifest-digest": digest}, "identity": {"docker-reference": name}}
    return json.dumps({"critical": body, "optional": None}).encode()


def ask(asked: Asked) -> Answered:
    """A signature is good if it begins with the name of the key."""
    if isinstance(asked, OpenPgpAsked):
        key, _, text = asked.message.partition(b":")
        return Answered("", text) if key in asked.keyrings else Answered("it is by another key")
    return Answered("" if asked.signature == asked.key else "it is not by that key", asked.payload)


def refused(*requirements: Requirement, found: Found | None = None) -> str:
    subject = Subject(parse(NAME), (DIGEST, INDEX))
    try:
        enforce(list(requirements), subject, found or Found({}, {}), ask)
    except RemoteError as error:
        assert (error.code, error.reason) == (Code.PERMISSION_DENIED, "SignatureValidationFailed")
        return error.text
    return ""


def test_every_requirement_must_hold_and_the_first_that_does_not_is_told() -> None:
    mine = Found({DIGEST: [b"mine:" + claim(DIGEST)]}, {})
    assert not refused(Accept())
    assert "are rejected" in refused(Accept(), Reject())
    assert "requires nothing known, which is not supported" in refused(Accept(), Unsupported("nothing known"))
    assert not refused(OpenPgp([b"mine"]), Accept(), found=mine)
    assert not refused(OpenPgp([b"yours", b"mine"]), found=mine)
    assert "by another key" in refused(OpenPgp([b"mine"]), OpenPgp([b"yours"]), found=mine)
    assert "sigstore), and there is none" in refused(OpenPgp([b"mine"]), Sigstore([b"mine"]), found=mine)
    assert "(OpenPGP), and there is none" in refused(OpenPgp([b"mine"]))


def test_a_signature_of_the_index_is_one_of_the_image_but_not_of_whatever_it_says() -> None:
    assert not refused(OpenPgp([b"mine"]), found=Found({INDEX: [b"mine:" + claim(INDEX)]}, {}))
    said = refused(OpenPgp([b"mine"]), found=Found({INDEX: [b"mine:" + claim(DIGEST)]}, {}))
    assert "of another image" in said
    mine = Found({DIGEST: [b"mine:" + claim(DIGEST)]}, {})
    assert not refused(OpenPgp([b"mine"]), found=mine)
    assert mine.looked == [DIGEST]  # one is enough


def test_what_is_signed_by_sigstore_is_told_from_what_is_signed_simply() -> None:
    good = Attached(claim(DIGEST, COSIGN), b"mine")
    assert not refused(Sigstore([b"yours", b"mine"]), found=Found({}, {DIGEST: [good]}))
    simple = Attached(claim(DIGEST), b"mine")
    assert "is of type" in refused(Sigstore([b"mine"]), found=Found({}, {DIGEST: [simple]}))
    crossed = Found({DIGEST: [b"mine:" + claim(DIGEST, COSIGN)]}, {})
    assert "is of type" in refused(OpenPgp([b"mine"]), found=crossed)
    assert "not by that key" in refused(Sigstore([b"yours"]), found=Found({}, {DIGEST: [good]}))
    many = Found({DIGEST: [b"yours:"] * 8}, {})
    assert "(and 3 more)" in refused(OpenPgp([b"mine"]), found=many)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("PLAINTEXT 62 1 x|NEWSIG|GOODSIG 1 a|VALIDSIG 1", ""),
        ("PLAINTEXT 62 1 x|NEWSIG|GOODSIG 1 a|VALIDSIG 1|EXPKEYSIG 1", "key has expired"),
        ("PLAINTEXT 62 1 x|NEWSIG|EXPSIG 1 a|VALIDSIG 1", "signature has expired"),
        ("PLAINTEXT 62 1 x|NEWSIG|REVKEYSIG 1 a|VALIDSIG 1", "revoked"),
        ("PLAINTEXT 62 1 x|NEWSIG|BADSIG 1 a", "signature is wrong"),
        ("NODATA 1", "no OpenPGP message"),
        ("PLAINTEXT 62 1 x|PLAINTEXT 62 1 y|NEWSIG|GOODSIG 1 a|VALIDSIG 1", "not once: PLAINTEXT"),
        ("PLAINTEXT 62 1 x|NEWSIG|NEWSIG|GOODSIG 1 a|GOODSIG 1 a|VALIDSIG 1|VALIDSIG 1", "not once: NEWSIG"),
        ("", "not once: PLAINTEXT NEWSIG GOODSIG VALIDSIG"),
    ],
)
def test_what_gpgv_says_must_be_exactly_what_it_says_of_one_good_signature(lines: str, said: str) -> None:
    status = "".join(f"[GNUPG:] {line}\n" for line in lines.split("|") if line).encode()
    assert (not judged(0, status)) if not said else said in judged(0, status)
    assert "status 2" in judged(2, b"[GNUPG:] GOODSIG x\n")


class Hostile:
    """A registry whose manifest of signatures says what it likes."""

    endpoint = Endpoint("a.test", "x/y")

    def __init__(self, **layer: object) -> None:
        head = {"digest": DIGEST, "size": 2, "mediaType": PAYLOAD, "annotations": {ANNOTATION: "c2ln"}}
        self._data = json.dumps({"layers": [head | layer]}).encode()

    def manifest(self, tag: str, _retries: int) -> Document:
        assert tag == f"{DIGEST.replace(':', '-')}.sig"
        return Document(self._data, DIGEST, Kind.MANIFEST, "")

    def small_blob(self, *_words: object) -> bytes:
        return b"{}"


def attached(**layer: object) -> list[Attached]:
    here = trust.Trust(default_place=trust.Place(attachments=True))
    client, transport = cast(Client, Hostile(**layer)), cast(Transport, None)
    return list(Places(here, client, transport, parse(NAME)).attached(DIGEST))


def test_what_a_registry_says_of_signatures_is_believed_in_no_respect() -> None:
    assert attached() == [Attached(b"{}", b"sig")]
    assert attached(annotations={ANNOTATION: "\u00fc"}) == [Attached(b"{}", b"")]
    assert attached(annotations={ANNOTATION: "c2l"}) == [Attached(b"{}", b"")]
    assert attached(annotations=None) == attached(mediaType="text/plain") == []
    wrong: list[dict[str, object]] = [{"digest": "md5:00"}, {"digest": "sha256:../x"}, {"annotations": []}]
    for one in wrong:
        with pytest.raises(RemoteError):
            attached(**one)
