"""Runs in: image.

From a reference to a verified image: endpoint by endpoint, index to manifest to config. `source` is what
goes back to `blobs`: the endpoints, the one that answered first. It never has credentials in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ipc import log
from ipc.errors import Code, RemoteError, invalid, precondition
from ipc.messages.image import Auth, ManifestResolve, Resolved
from ipc.reference import Reference, parse
from workers.image import manifests, policy
from workers.image.client import Client, Tools, check_size
from workers.image.credentials import select
from workers.image.failures import combine
from workers.image.manifests import Config, Document, Kind
from workers.image.operation import Operation
from workers.image.platforms import Platform, wanted
from workers.image.registries import Endpoint
from workers.image.signatures import Places
from workers.image.transport import Transport
from workers.image.verifier import Answered, Asked

#: An index may name indexes (image-spec); nobody needs more.
MAX_INDEX_DEPTH = 3
#: A mirror that fails is passed over soon.
MIRROR_RETRIES = 1


class SourceEndpoint(msgspec.Struct, omit_defaults=True):
    """An endpoint in `source`. `scheme` is "" if it has not answered yet."""

    host: str
    repository: str
    scheme: str = ""
    insecure: bool = False
    mirror: bool = False

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.host, self.repository, self.insecure, self.mirror)


class Source(msgspec.Struct):
    """Where an image's blobs are: the form of Resolved.source and BlobFetch.source."""

    reference: str
    endpoints: list[SourceEndpoint]


def read_source(text: str) -> Source:
    """Raises RemoteError(INVALID_ARGUMENT) for what is not ours."""
    try:
        source = msgspec.json.decode(text, type=Source)
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(f"the source is none of ours: {error}") from None
    if not source.endpoints:
        raise invalid("the source names no endpoint")
    return source


def resolve(tools: Tools, operation: Operation, request: ManifestResolve) -> Resolved:
    """Find an image. Raises RemoteError, Cancelled."""
    reference = parse(request.reference)
    platform = wanted(request.os, request.architecture, request.variant)
    endpoints = tools.registries.current().route(reference)
    transport = tools.transport(operation)
    failures: list[RemoteError] = []
    try:
        for endpoint in endpoints:
            try:
                client = make_client(tools, transport, endpoint, auth=request.auth, domain=reference.domain)
                retries = MIRROR_RETRIES if endpoint is not endpoints[-1] else tools.settings.retries
                judge = Judge(tools, client, transport, reference, request.namespace)
                return _Resolution(client, platform, reference, retries, judge).run(endpoints)
            except RemoteError as error:
                operation.check()
                failures.append(error)
                log.get().info("endpoint failed", endpoint=endpoint.name, why=error.text)
    finally:
        transport.close()
    raise combine(f"cannot resolve {reference}", failures)


def make_client(
    tools: Tools,
    transport: Transport,
    endpoint: Endpoint,
    *,
    auth: Auth | None,
    domain: str,
    scheme: str = "",
) -> Client:
    """A client of an endpoint with the credentials that are for it; `domain` is the reference's."""
    credentials = select(auth, domain, endpoint, tools.auth_file)
    return Client(tools, transport, endpoint, credentials, scheme)


@dataclass(frozen=True)
class Judge:
    """The signature policy, for one reference at one endpoint. Calling it raises RemoteError, Cancelled."""

    tools: Tools
    client: Client
    transport: Transport
    reference: Reference
    namespace: str

    def __call__(self, digests: tuple[str, ...]) -> None:
        trust = self.tools.settings.trust
        rules = trust.policy_for(self.namespace)
        if rules is None:
            return
        places = Places(trust, self.client, self.transport, self.reference)
        subject = policy.Subject(self.reference, digests)
        try:
            policy.enforce(rules.requirements(self.reference), subject, places, self._ask)
        except RemoteError as error:
            self.transport.operation.check()
            if error.reason == policy.REASON:
                raise
            raise policy.refusal(self.reference, f"no signature could be verified: {error.text}") from error

    def _ask(self, asked: Asked) -> Answered:
        if self.tools.verifier is None:  # the policy came by a reload; the next worker has one
            raise precondition("this worker cannot verify, another one is on its way: try again")
        return self.tools.verifier.ask(asked)


class _Resolution:
    """One reference at one endpoint."""

    def __init__(
        self, client: Client, platform: Platform, reference: Reference, retries: int, judge: Judge
    ) -> None:
        self._judge = judge
        self._client = client
        self._platform = platform
        self._reference = reference
        self._retries = retries

    def run(self, endpoints: Sequence[Endpoint]) -> Resolved:
        named = self._client.manifest(self._reference.digest or self._reference.tag, self._retries)
        try:
            document, led_by = self._for_platform(named)
            self._judge((document.digest, *led_by))
            manifest = manifests.read_manifest(document)
            data = self._client.config(manifest.config, self._retries)
            config = manifests.read_config(data)
            self._check_platform(config)
            layers = manifests.layers_of(manifest, config)
        except RemoteError as error:
            raise self._located(error) from None
        log.get().info(
            "image resolved", image=self._reference, endpoint=self._client.endpoint.name, digest=named.digest
        )
        return Resolved(
            name=self._reference.name,
            repo_digest=f"{self._reference.repository}@{named.digest}",
            manifest=document.data,
            manifest_media_type=document.media_type,
            manifest_digest=document.digest,
            config=data,
            config_digest=manifest.config.digest,
            layers=layers,
            source=self._source(endpoints),
        )

    def _for_platform(self, document: Document) -> tuple[Document, list[str]]:
        """The platform's manifest, and the digests of the indexes that led to it."""
        led_by: list[str] = []
        for _ in range(MAX_INDEX_DEPTH):
            if document.kind is Kind.MANIFEST:
                return document, led_by
            led_by.append(document.digest)
            entry = manifests.choose(document, self._platform)
            document = self._client.manifest(entry.digest, self._retries)
            check_size(document.data, entry, "the manifest that the index names")
        if document.kind is Kind.INDEX:
            raise invalid(f"indexes are nested deeper than {MAX_INDEX_DEPTH}")
        return document, led_by

    def _check_platform(self, config: Config) -> None:
        if config.os and config.os != self._platform.os:
            raise RemoteError(Code.NOT_FOUND, f"the image is for {config.os[:50]}, not for {self._platform}")
        if config.architecture and config.architecture != self._platform.architecture:
            # Seen in the wild: cross-built images whose config names the builder.
            log.get().warning(
                "image names another architecture",
                image=self._reference,
                architecture=config.architecture,
                wanted=self._platform,
            )

    def _located(self, error: RemoteError) -> RemoteError:
        name = self._client.endpoint.name
        text = error.text if name in error.text else f"{name}: {error.text}"
        return RemoteError(error.code, text, reason=error.reason)

    def _source(self, endpoints: Sequence[Endpoint]) -> str:
        answered = self._client.endpoint
        order = [answered, *(endpoint for endpoint in endpoints if endpoint != answered)]
        listed = [
            SourceEndpoint(
                endpoint.host,
                endpoint.repository,
                self._client.scheme if endpoint == answered else "",
                endpoint.insecure,
                endpoint.mirror,
            )
            for endpoint in order
        ]
        return msgspec.json.encode(Source(str(self._reference), listed)).decode()
