"""Runs in: every process (types only). Owner: image (a pool, on demand). Caller: cri."""

from __future__ import annotations

from . import Body, Empty, Request, request


class Auth(Body):
    """CRI AuthConfig. `auth` is base64 of user:password; `registry_token` is a bearer token."""

    username: str = ""
    password: str = ""
    auth: str = ""
    server_address: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:  # secrets never reach a log
        return f"Auth(username={self.username!r}, ...)"


class Layer(Body):
    digest: str
    size: int
    media_type: str
    diff_id: str
    chain_id: str
    urls: list[str] = []


class Resolved(Body):
    """An image as a registry has it, every byte verified against its digest.

    `name` is the full reference with tag ("docker.io/library/busybox:1"), "" if pulled by digest only;
    `repo_digest` is repository@digest of what the reference named (the index, if it was one).
    `source` is opaque: it goes back in BlobFetch and names the endpoint (mirror) that answered.
    """

    name: str
    repo_digest: str
    manifest: bytes
    manifest_media_type: str
    manifest_digest: str
    config: bytes
    config_digest: str
    layers: list[Layer]  # lowest first
    source: str


@request("image.manifest.resolve", reply=Resolved, idempotent=True)
class ManifestResolve(Request[Resolved]):
    """Find the manifest for this platform. NOT_FOUND, UNAUTHENTICATED, PERMISSION_DENIED (denied, blocked;
    with reason SignatureValidationFailed: refused by the signature policy), UNAVAILABLE with reason
    RegistryUnavailable, INVALID_ARGUMENT for a manifest that is none.

    `namespace`: of the pod that the image is for, if that namespace has a policy of its own."""

    reference: str
    auth: Auth | None = None
    architecture: str = ""  # "" = this machine's
    os: str = "linux"
    variant: str = ""
    namespace: str = ""


class Progress(Body):
    bytes: int


class Fetched(Body):
    bytes: int


@request("image.blob.fetch", reply=Fetched, idempotent=False, fds=1, update=Progress)
class BlobFetch(Request[Fetched]):
    """Download one blob into the pipe that comes with the request, verifying size and digest as it goes.

    Resumes by range when a connection breaks. The pipe is closed when done; only the reply says that the
    digest was right. Updates tell the bytes so far, at most five a second.
    """

    source: str
    digest: str
    size: int
    urls: list[str] = []
    auth: Auth | None = None


class Normalised(Body):
    """`reference` in full form; `candidates` are what to try in order (short names, search registries)."""

    reference: str
    repository: str
    tag: str = ""
    digest: str = ""
    candidates: list[str] = []


@request("image.reference.normalise", reply=Normalised, idempotent=True)
class ReferenceNormalise(Request[Normalised]):
    reference: str


@request("image.registries.reload", idempotent=True)
class RegistriesReload(Request[Empty]):
    """Read registries.conf and certs.d again."""
