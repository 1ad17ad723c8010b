"""Runs in: image.

One registry endpoint's API (distribution-spec, "Pull"): manifests and blobs of one repository, with the
login that it asks for. Plain HTTP is spoken only to an endpoint that registries.conf calls insecure, after
HTTPS failed there. It refuses to send credentials to a token server over plain HTTP unless that, too, is
insecure by configuration or by being the same host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ipc.errors import Code, RemoteError
from ipc.reference import DEFAULT_DOMAIN, check_digest
from ipc.settings import ImageSettings
from workers.image import manifests
from workers.image.certificates import Certificates
from workers.image.credentials import AuthFile, Credentials
from workers.image.failures import Failure, refused, said
from workers.image.manifests import Descriptor, Document
from workers.image.operation import Operation
from workers.image.proxies import Proxies
from workers.image.registries import Endpoint, RegistriesFiles
from workers.image.tokens import (
    Authorization,
    Challenge,
    TokenCache,
    TokenKey,
    TokenRequest,
    challenges,
    read_token,
    token_request,
)
from workers.image.transport import Answer, Transport, origin_of
from workers.image.verifier import Verifier

#: The registry's API is not on the host that gave it its name.
API_HOSTS = {DEFAULT_DOMAIN: "registry-1.docker.io"}
MAX_ERROR_BODY = 16 * 1024
MAX_TOKEN_BODY = 1 << 20
OK = 200
PARTIAL = 206
UNAUTHORIZED = 401

T = TypeVar("T")


@dataclass
class Tools:
    """What all requests of this worker share."""

    settings: ImageSettings
    registries: RegistriesFiles
    certificates: Certificates
    auth_file: AuthFile
    tokens: TokenCache
    proxies: Proxies
    verifier: Verifier | None

    def transport(self, operation: Operation) -> Transport:
        """Connections for one operation."""
        return Transport(operation, self.settings, self.certificates, self.proxies)


def make_tools(
    settings: ImageSettings,
    proxies: Proxies,
    certificates: Certificates,
    auth_file: AuthFile,
    verifier: Verifier | None = None,
) -> Tools:
    """Everything else fresh, nothing read yet."""
    registries = RegistriesFiles(settings.registries_conf, settings.registries_conf_dir)
    return Tools(settings, registries, certificates, auth_file, TokenCache(), proxies, verifier)


def retrying(operation: Operation, retries: int, attempt: Callable[[], T]) -> T:
    """Call until it succeeds, fails for good, or `retries` repetitions failed too. Raises Failure."""
    done = 0
    while True:
        try:
            return attempt()
        except Failure as failure:
            allowed = retries if failure.retries is None else min(retries, failure.retries)
            if not failure.transient or done >= allowed:
                raise
            done += 1
            operation.sleep(failure.delay(done))


class Client:
    """One endpoint as one user. `scheme` is "" until an answer came, if it is not known before."""

    def __init__(
        self,
        tools: Tools,
        transport: Transport,
        endpoint: Endpoint,
        credentials: Credentials | None,
        scheme: str = "",
    ) -> None:
        self.endpoint = endpoint
        self.scheme = scheme
        self._tools = tools
        self._transport = transport
        self._credentials = credentials
        self._host = API_HOSTS.get(endpoint.host, endpoint.host)

    # -- documents ------------------------------------------------------------------------------------

    def manifest(self, tag_or_digest: str, retries: int) -> Document:
        """Fetch and verify a manifest or an index. Raises Failure, RemoteError, Cancelled."""
        return retrying(self._transport.operation, retries, lambda: self._manifest(tag_or_digest))

    def _manifest(self, tag_or_digest: str) -> Document:
        answer = self.get(f"manifests/{tag_or_digest}", accept=manifests.ACCEPT)
        try:
            data = answer.read_all(self._tools.settings.max_manifest_bytes, "the manifest")
        finally:
            answer.close()
        digest = self._verified(data, tag_or_digest, answer.header("Docker-Content-Digest"))
        return manifests.read_document(data, digest, answer.header("Content-Type"))

    def _verified(self, data: bytes, tag_or_digest: str, header: str) -> str:
        """The manifest's digest: the one asked for, or its own, which the header may only confirm."""
        what = f"{self.endpoint.name}: the manifest"
        if ":" in tag_or_digest:
            manifests.verify(data, tag_or_digest, what)
            return tag_or_digest
        if header:
            try:
                check_digest(header)
            except RemoteError as error:
                raise Failure(Code.DATA_LOSS, f"{what}: {error.text}") from None
            manifests.verify(data, header, what)
        return manifests.digest_of(data)

    def config(self, descriptor: Descriptor, retries: int) -> bytes:
        """Fetch and verify an image config. Raises Failure, RemoteError, Cancelled."""
        limit = self._tools.settings.max_config_bytes
        return self.small_blob(descriptor, limit, "the image config", retries)

    def small_blob(self, descriptor: Descriptor, limit: int, what: str, retries: int) -> bytes:
        """Fetch and verify a blob of at most `limit` bytes. Raises Failure, RemoteError, Cancelled."""
        if descriptor.size > limit:
            text = f"{self.endpoint.name}: {what} is larger than the limit of {limit} bytes"
            raise Failure(Code.INVALID_ARGUMENT, text)
        work = self._transport.operation
        return retrying(work, retries, lambda: self._small_blob(descriptor, limit, what))

    def _small_blob(self, descriptor: Descriptor, limit: int, what: str) -> bytes:
        answer = self.get(f"blobs/{descriptor.digest}")
        try:
            data = answer.read_all(limit, what)
        finally:
            answer.close()
        check_size(data, descriptor, f"{self.endpoint.name}: {what}")
        return data

    # -- requests -------------------------------------------------------------------------------------

    def get(self, path: str, *, accept: str = "", start: int = 0) -> Answer:
        """GET below /v2/<repository>/, from byte `start`; the answer is a success.

        Raises Failure, Cancelled. An answer to `start` may still begin at byte 0 (status 200).
        """
        headers = {"Accept": accept} if accept else {}
        if start:
            headers["Range"] = f"bytes={start}-"
        if self.scheme:
            return self._get(self.scheme, path, headers)
        try:
            answer = self._get("https", path, headers)
        except Failure as failure:
            if failure.answered or not self.endpoint.insecure:
                raise
            answer = self._get_plain(path, headers, failure)
        return answer

    def _get_plain(self, path: str, headers: dict[str, str], https: Failure) -> Answer:
        try:
            return self._get("http", path, headers)
        except Failure as failure:
            if not failure.answered:
                failure.text += f" (and over HTTPS: {https.text})"
            raise

    def _get(self, scheme: str, path: str, headers: dict[str, str]) -> Answer:
        url = f"{scheme}://{self._host}/v2/{self.endpoint.repository}/{path}"
        key = TokenKey(str(origin_of(url)), self.endpoint.repository, self._credentials)
        answer = self._ask(url, headers, self._known(key))
        if answer.status == UNAUTHORIZED and not answer.foreign:
            answer.discard()
            self._tools.tokens.forget(key)
            authorization = self._log_in(answer, url)
            self._tools.tokens.put(key, authorization)
            answer = self._ask(url, headers, authorization.header)
        self.scheme = scheme
        return self._success(answer)

    def _known(self, key: TokenKey) -> str:
        if self._credentials is not None and self._credentials.registry_token:
            return f"Bearer {self._credentials.registry_token}"
        return self._tools.tokens.get(key)

    def _ask(self, url: str, headers: dict[str, str], authorization: str) -> Answer:
        if authorization:
            headers = headers | {"Authorization": authorization}
        return self._transport.get(url, headers, insecure=self.endpoint.insecure)

    def _success(self, answer: Answer) -> Answer:
        return success(answer, self._place(answer))

    def _place(self, answer: Answer) -> str:
        return f"{self.endpoint.name} (redirected to {answer.host})" if answer.foreign else self.endpoint.name

    # -- login ----------------------------------------------------------------------------------------

    def _log_in(self, answer: Answer, url: str) -> Authorization:
        """What the challenge asks for. Raises Failure."""
        asked = {challenge.scheme: challenge for challenge in challenges(answer.headers("WWW-Authenticate"))}
        if self._credentials is not None and self._credentials.registry_token:
            raise self._unauthenticated("the registry token was refused")
        if "bearer" in asked:
            return self._fetch_token(asked["bearer"], url)
        basic = self._credentials.basic if self._credentials else ""
        if "basic" in asked and basic:
            return Authorization(basic, float("inf"))
        raise self._unauthenticated(
            "it wants a login, and there are no credentials for it"
            if asked
            else "it refuses access without saying how to log in"
        )

    def _fetch_token(self, challenge: Challenge, url: str) -> Authorization:
        realm = challenge.get("realm")
        insecure = self._check_realm(realm, url)
        request = token_request(challenge, self.endpoint.repository, self._credentials)
        headers = {"Authorization": request.authorization} if request.authorization else {}
        try:
            answer = self._ask_token_server(realm, request, headers, insecure=insecure)
        except Failure as failure:
            failure.answered = True  # the registry itself did
            failure.text = f"{self.endpoint.name}: token server {failure.text}"
            raise
        try:
            return self._read_token(answer)
        finally:
            answer.close()

    def _ask_token_server(
        self, realm: str, request: TokenRequest, headers: dict[str, str], *, insecure: bool
    ) -> Answer:
        if request.method == "POST":
            return self._transport.post(realm, headers, request.form, insecure=insecure)
        separator = "&" if "?" in realm else "?"
        return self._transport.get(f"{realm}{separator}{request.query}", headers, insecure=insecure)

    def _check_realm(self, realm: str, url: str) -> bool:
        """Whether the token server's TLS is not verified. Raises Failure if it may not be asked at all."""
        try:
            server = origin_of(realm)
        except Failure as failure:
            raise self._unauthenticated(f"its token server's address is unusable: {failure.text}") from None
        same_host = server.host == origin_of(url).host
        insecure = (self.endpoint.insecure and same_host) or self._tools.registries.current().insecure(
            str(server)
        )
        if server.scheme == "http" and not insecure:
            raise self._unauthenticated(f"its token server {server} speaks plain HTTP, which is refused")
        return insecure

    def _read_token(self, answer: Answer) -> Authorization:
        body = answer.read_all(MAX_TOKEN_BODY, "the token server's answer")
        if answer.status in {400, 401, 403}:
            given = "the credentials" if self._credentials else "access without credentials"
            words = f"the token server {answer.host} refused {given}, HTTP {answer.status}"
            raise self._unauthenticated(": ".join(part for part in (words, said(body)) if part))
        if answer.status != OK:
            raise refused(
                f"{self.endpoint.name}: token server {answer.host}",
                answer.status,
                body,
                answer.header("Retry-After"),
            )
        token = read_token(body)
        if token is None:
            raise self._unauthenticated(f"the token server {answer.host} answered without a token")
        return token

    def _unauthenticated(self, why: str) -> Failure:
        return Failure(Code.UNAUTHENTICATED, f"{self.endpoint.name}: {why}")


def success(answer: Answer, place: str) -> Answer:
    """The answer, if it is one of success; else close it and raise Failure."""
    if answer.status in {OK, PARTIAL}:
        return answer
    try:
        body = answer.read_all(MAX_ERROR_BODY, "the error")
    except Failure:
        body = b""  # the status says enough
    finally:
        answer.close()
    raise refused(place, answer.status, body, answer.header("Retry-After"))


def check_size(data: bytes, descriptor: Descriptor, what: str) -> None:
    """Raises RemoteError(DATA_LOSS) if size or digest is not the descriptor's."""
    if len(data) != descriptor.size:
        raise RemoteError(Code.DATA_LOSS, f"{what} has {len(data)} bytes, it should have {descriptor.size}")
    manifests.verify(data, descriptor.digest, what)
