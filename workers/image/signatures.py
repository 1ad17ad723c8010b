"""Runs in: image. Where an image's signatures are (containers-registries.d(5)).

Simple signatures lie below a lookaside URL, `<repository>@<digest>/signature-<n>`, numbered from 1; those
of sigstore beside the image in its registry, under a tag that is made of its digest. Owns nothing. Refuses
more and larger ones than anybody makes. The place is that of the endpoint which the manifest came from, as
everywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

import msgspec

from ipc.errors import Code, RemoteError
from ipc.reference import Reference, check_digest
from ipc.trust import FILE, Trust
from workers.image.client import OK, Client, retrying
from workers.image.failures import Failure, refused
from workers.image.manifests import Descriptor, Document
from workers.image.policy import Attached
from workers.image.transport import Transport

MAX_SIGNATURE = 4 << 20
MAX_SIGNATURES = 128
RETRIES = 2
ABSENT = frozenset({404, 410})
PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
ANNOTATION = "dev.cosignproject.cosign/signature"


class _Layer(Descriptor):
    annotations: dict[str, str] | None = None


class _Manifest(msgspec.Struct):
    layers: list[_Layer]


class Places:
    """The signatures of an image at one endpoint."""

    def __init__(self, trust: Trust, client: Client, transport: Transport, reference: Reference) -> None:
        endpoint = client.endpoint
        self._trust = trust
        self._client = client
        self._transport = transport
        domain, path = endpoint.host, endpoint.repository
        self._place = Reference(domain, path, reference.tag, reference.digest)

    def simple(self, digest: str) -> Iterator[bytes]:
        """OpenPGP messages. Raises RemoteError, Cancelled."""
        base = f"{self._trust.lookaside(self._place)}/{self._place.path}@{digest.replace(':', '=', 1)}"
        for number in range(1, MAX_SIGNATURES + 1):
            found = self._look(f"{base}/signature-{number}")
            if found is None:
                return
            yield found
        raise _too_many()

    def _look(self, url: str) -> bytes | None:
        if url.startswith(FILE):
            return _read(url.removeprefix(FILE))
        return retrying(self._transport.operation, RETRIES, lambda: self._fetch(url))

    def _fetch(self, url: str) -> bytes | None:
        answer = self._transport.get(url, {})
        try:
            if answer.status in ABSENT:
                return None
            body = answer.read_all(MAX_SIGNATURE, "the signature")
            if answer.status != OK:
                raise refused(answer.host, answer.status, body, answer.header("Retry-After"))
            return body
        finally:
            answer.close()

    def attached(self, digest: str) -> Iterator[Attached]:
        """Signatures of sigstore, none unless registries.d says so. Raises RemoteError, Cancelled."""
        if not self._trust.attachments(self._place):
            return
        document = self._signatures_of(digest)
        layers = [] if document is None else _layers(document)
        for layer in layers:
            text = (layer.annotations or {}).get(ANNOTATION, "")
            if layer.media_type == PAYLOAD and text:
                check_digest(layer.digest)
                payload = self._client.small_blob(layer, MAX_SIGNATURE, "the signature's payload", RETRIES)
                yield Attached(payload, _decoded(text))

    def _signatures_of(self, digest: str) -> Document | None:
        try:
            return self._client.manifest(f"{digest.replace(':', '-', 1)}.sig", RETRIES)
        except Failure as failure:
            if failure.code is Code.NOT_FOUND:
                return None
            raise


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SIGNATURE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RemoteError(Code.FAILED_PRECONDITION, f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_SIGNATURE:
        raise RemoteError(Code.INVALID_ARGUMENT, f"{path} is larger than the limit of {MAX_SIGNATURE} bytes")
    return data


def _layers(document: Document) -> list[_Layer]:
    try:
        layers = msgspec.json.decode(document.data, type=_Manifest).layers
    except (msgspec.DecodeError, RecursionError) as error:
        raise RemoteError(
            Code.INVALID_ARGUMENT, f"the manifest of signatures is malformed: {error}"
        ) from None
    if len(layers) > MAX_SIGNATURES:
        raise _too_many()
    return layers


def _decoded(text: str) -> bytes:
    """What is not base64 is no signature of anything: the verification says so."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # not of ASCII, or binascii.Error
        return b""


def _too_many() -> RemoteError:
    return RemoteError(Code.INVALID_ARGUMENT, f"there are more than {MAX_SIGNATURES} signatures")
