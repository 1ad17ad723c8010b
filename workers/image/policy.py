"""Runs in: image. Whether an image may be pulled (containers-policy.json(5)).

An image may be pulled if every requirement of the policy's scope holds. A signature counts if it is by a
key of the requirement, and if what was signed names this very manifest and, by the requirement's identity,
this reference. What was signed is looked at only after the signature was found good. Whatever cannot be
found out is a refusal. Sans-IO: where signatures are is `signatures`, whose they are `verifier`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ipc import trust
from ipc.errors import Code, RemoteError
from ipc.reference import Reference
from ipc.trust import Identity, OpenPgp, Requirement, Requirements, Sigstore
from workers.image.verifier import MAX_TEXT, Answered, Asked, OpenPgpAsked, SigstoreAsked

REASON = "SignatureValidationFailed"  # the word that kubelets know
SIMPLE = "atomic container signature"
COSIGN = "cosign container image signature"
MAX_TOLD = 5  # signatures whose fault is told

Ask = Callable[[Asked], Answered]


class Rejected(Exception):
    """Why a signature does not count."""


@dataclass(frozen=True)
class Attached:
    """A signature of sigstore, and the payload that it is of."""

    payload: bytes
    signature: bytes


class Signatures(Protocol):
    """The signatures that there are of a manifest."""

    def simple(self, digest: str) -> Iterator[bytes]: ...

    def attached(self, digest: str) -> Iterator[Attached]: ...


@dataclass(frozen=True)
class Subject:
    """What is to be pulled: `digests` are those of the platform's manifest and of the indexes that led to it,
    a signature of any of them will do."""

    reference: Reference
    digests: tuple[str, ...]


def enforce(requirements: Requirements, subject: Subject, signatures: Signatures, ask: Ask) -> None:
    """Raises RemoteError(PERMISSION_DENIED, SignatureValidationFailed) for the first that does not hold."""
    for requirement in requirements:
        why = _against(requirement, subject, signatures, ask)
        if why:
            raise refusal(subject.reference, why)


def refusal(reference: Reference, why: str) -> RemoteError:
    """The policy does not let an image be pulled."""
    return RemoteError(
        Code.PERMISSION_DENIED, f"the signature policy refuses {reference}: {why}", reason=REASON
    )


def needs_signatures(requirements: Requirements) -> bool:
    """Whether anything has to be looked for."""
    return any(isinstance(one, OpenPgp | Sigstore) for one in requirements)


def _against(requirement: Requirement, subject: Subject, signatures: Signatures, ask: Ask) -> str:
    """What speaks against an image, "" if the requirement holds."""
    if isinstance(requirement, trust.Accept):
        return ""
    if isinstance(requirement, trust.Reject):
        return "images of this name are rejected"
    if isinstance(requirement, trust.Unsupported):
        return f"it requires {requirement.what}, which is not supported"
    faults: list[str] = []
    for digest in subject.digests:
        for check in _checks(requirement, digest, subject.reference, signatures, ask):
            try:
                check()
                return ""
            except Rejected as error:
                faults.append(str(error))
    if not faults:
        kind = "OpenPGP" if isinstance(requirement, OpenPgp) else "sigstore"
        return f"it requires a signature ({kind}), and there is none"
    more = f" (and {len(faults) - MAX_TOLD} more)" if len(faults) > MAX_TOLD else ""
    return "no signature is acceptable: " + "; ".join(faults[:MAX_TOLD]) + more


def _checks(
    requirement: OpenPgp | Sigstore, digest: str, reference: Reference, signatures: Signatures, ask: Ask
) -> Iterator[Callable[[], None]]:
    """A check per signature, each of which raises Rejected."""
    if isinstance(requirement, OpenPgp):
        for message in signatures.simple(digest):
            yield lambda: _check_simple(requirement, message, digest, reference, ask)  # noqa: B023 - called at once
    else:
        for one in signatures.attached(digest):
            yield lambda: _check_attached(requirement, one, digest, reference, ask)  # noqa: B023 - called at once


def _check_simple(requirement: OpenPgp, message: bytes, digest: str, reference: Reference, ask: Ask) -> None:
    found = ask(OpenPgpAsked(requirement.keyrings, message))
    if found.why:
        raise Rejected(found.why)
    check_claim(found.text, SIMPLE, digest, reference, requirement.identity)


def _check_attached(
    requirement: Sigstore, one: Attached, digest: str, reference: Reference, ask: Ask
) -> None:
    answers = (ask(SigstoreAsked(key, one.signature, one.payload)) for key in requirement.keys)
    whys = []
    for found in answers:
        if not found.why:
            break
        whys.append(found.why)
    else:
        raise Rejected(whys[0])
    check_claim(one.payload, COSIGN, digest, reference, requirement.identity)


# -- what was signed (containers-signature(5), "The cryptographic signature's payload") ----------------------


class _Image(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    docker_manifest_digest: str


class _Names(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    docker_reference: str


class _Critical(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    image: _Image
    identity: _Names


class _Claim(msgspec.Struct, forbid_unknown_fields=True):
    critical: _Critical
    optional: dict[str, Any] | None = None


def check_claim(text: bytes, kind: str, digest: str, reference: Reference, identity: Identity) -> None:
    """What a good signature says must be of this manifest and for this reference. Raises Rejected."""
    if len(text) > MAX_TEXT:
        raise Rejected("what was signed is too long")
    try:
        critical = msgspec.convert(trust.read_json(text), _Claim).critical
    except ValueError as error:
        raise Rejected(f"what was signed is not of the form that it should be: {str(error)[:200]}") from None
    if critical.type != kind:
        raise Rejected(f"what was signed is of type {critical.type[:100]!r}")
    if critical.image.docker_manifest_digest != digest:
        raise Rejected(f"it is of another image, {critical.image.docker_manifest_digest[:100]}")
    if not matches(identity, reference, critical.identity.docker_reference):
        raise Rejected(
            f"it is for {critical.identity.docker_reference[:300]!r}, which does not stand for this name"
        )


def matches(identity: Identity, reference: Reference, signed: str) -> bool:
    """Whether a signature for `signed` counts (containers-policy.json(5), "signedIdentity")."""
    if isinstance(identity, trust.MatchRepository):
        return trust.repository_of(signed) == reference.repository
    if isinstance(identity, trust.ExactRepository):
        return trust.repository_of(signed) == trust.repository_of(identity.docker_repository)
    try:
        named = trust.parse_signed(signed)
    except RemoteError:
        return False
    return named is not None and _is(identity, named, reference)  # a repository alone names no image


def _is(identity: Identity, named: Reference, reference: Reference) -> bool:
    if isinstance(identity, trust.ExactReference):
        return named == trust.parse_signed(identity.docker_reference)
    if isinstance(identity, trust.MatchExact):
        return _same(named, reference)
    if isinstance(identity, trust.RemapIdentity):
        return _same_but_digest(named, _remapped(identity, reference))
    return _same_but_digest(named, reference)


def _same(named: Reference, reference: Reference) -> bool:
    return trust.identity_of(named) == trust.identity_of(reference)


def _same_but_digest(named: Reference, reference: Reference | None) -> bool:
    """matchRepoDigestOrExact: what is asked for by digest need only be of the same repository."""
    if reference is None:
        return False
    if reference.digest:
        return named.repository == reference.repository
    return _same(named, reference)


def _remapped(identity: trust.RemapIdentity, reference: Reference) -> Reference | None:
    """The reference with another prefix, where it has the one; None if that is no reference."""
    text = str(reference)
    rest = text.removeprefix(identity.prefix)
    if rest == text or (rest and rest[0] not in ":/@"):
        return reference
    try:
        return trust.parse_signed(identity.signed_prefix + rest)
    except RemoteError:
        return None
