"""Runs in: the supervisor (which reads the files, supervisor/trust.py), image (which goes by them). Sans-IO.

What may be pulled, as data: containers-policy.json(5) and containers-registries.d(5) after they were read,
checked and completed with the keys that they name; and which entry of such a file counts for a reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from ipc.errors import RemoteError
from ipc.reference import Reference, parse

#: Where simple signatures lie if registries.d names no other place.
FILE = "file://"
DEFAULT_LOOKASIDE = f"{FILE}/var/lib/containers/sigstore"

T = TypeVar("T")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", rename="camel"):
    """Base of what policy.json distinguishes by "type"; a member that we do not know is an error."""


# -- what a signature must say that it is for ("signedIdentity") -------------------------------------------


class MatchExact(_Strict, frozen=True, tag="matchExact"):
    """The reference as it is."""


class MatchRepoDigestOrExact(_Strict, frozen=True, tag="matchRepoDigestOrExact"):
    """The reference as it is; of one with a digest only the repository, for the digest is signed anyway."""


class MatchRepository(_Strict, frozen=True, tag="matchRepository"):
    """The same repository, with whatever tag."""


class ExactReference(_Strict, frozen=True, tag="exactReference"):
    """This reference, whatever the image is called here."""

    docker_reference: str


class ExactRepository(_Strict, frozen=True, tag="exactRepository"):
    """This repository, whatever the image is called here."""

    docker_repository: str


class RemapIdentity(_Strict, frozen=True, tag="remapIdentity"):
    """As matchRepoDigestOrExact, after `prefix` of the reference was replaced by `signed_prefix`."""

    prefix: str
    signed_prefix: str


Identity = (
    MatchExact | MatchRepoDigestOrExact | MatchRepository | ExactReference | ExactRepository | RemapIdentity
)


# -- requirements, complete --------------------------------------------------------------------------------


class Accept(msgspec.Struct, frozen=True, tag=True):
    """insecureAcceptAnything."""


class Reject(msgspec.Struct, frozen=True, tag=True):
    """reject."""


class OpenPgp(msgspec.Struct, frozen=True, tag=True):
    """signedBy with GPG keys: `keyrings` are binary, a signature by any key of any of them will do."""

    keyrings: list[bytes]
    identity: Identity = MatchRepoDigestOrExact()


class Sigstore(msgspec.Struct, frozen=True, tag=True):
    """sigstoreSigned with public keys: `keys` are PEM, a signature by any of them will do."""

    keys: list[bytes]
    identity: Identity = MatchRepoDigestOrExact()


class Unsupported(msgspec.Struct, frozen=True, tag=True):
    """What we cannot verify, so nothing meets it; `what` says what."""

    what: str


Requirement = Accept | Reject | OpenPgp | Sigstore | Unsupported
Requirements = list[Requirement]


class Policy(msgspec.Struct, frozen=True):
    """One policy.json: the requirements of docker's scopes, and those of everything else."""

    default: Requirements
    docker: dict[str, Requirements] = {}

    def requirements(self, reference: Reference) -> Requirements:
        """What a reference has to meet: all of it."""
        found = best(self.docker, reference)
        return self.docker.get("", self.default) if found is None else found

    def every(self) -> list[Requirement]:
        """All requirements of all scopes."""
        lists = [self.default, *self.docker.values()]
        return [requirement for one in lists for requirement in one]


class Place(msgspec.Struct, frozen=True):
    """Where signatures of a scope are: registries.d's `lookaside` and `use-sigstore-attachments`."""

    lookaside: str = ""
    attachments: bool | None = None


class Trust(msgspec.Struct, frozen=True):
    """Everything. `policy` None: there is no policy.json, anything may be pulled.

    `namespaces`: policies that hold for pods of a Kubernetes namespace instead. `gpgv`, `openssl`: programs
    that verify, "" where nothing needs them.
    """

    policy: Policy | None = None
    namespaces: dict[str, Policy] = {}
    default_place: Place = Place()
    places: dict[str, Place] = {}
    gpgv: str = ""
    openssl: str = ""

    def policy_for(self, namespace: str) -> Policy | None:
        """The policy of a pod's namespace, "" for what is pulled for no pod."""
        return self.namespaces.get(namespace, self.policy)

    def every(self) -> list[Requirement]:
        """All requirements of all policies."""
        policies = [policy for policy in (self.policy, *self.namespaces.values()) if policy is not None]
        return [requirement for policy in policies for requirement in policy.every()]

    def lookaside(self, reference: Reference) -> str:
        """The URL below which simple signatures of a reference lie."""
        names = [place.lookaside for place in self._places(reference)]
        return next(filter(None, names), DEFAULT_LOOKASIDE)

    def directories(self) -> list[str]:
        """The local directories in which simple signatures are looked for."""
        if not any(isinstance(one, OpenPgp) for one in self.every()):
            return []
        default = self.default_place.lookaside or DEFAULT_LOOKASIDE
        named = {default, *(place.lookaside for place in self.places.values())}
        return sorted(url.removeprefix(FILE) for url in named if url.startswith(FILE))

    def attachments(self, reference: Reference) -> bool:
        """Whether signatures of sigstore lie beside the image in its registry."""
        answers = (place.attachments for place in self._places(reference))
        return next((answer for answer in answers if answer is not None), False)

    def _places(self, reference: Reference) -> list[Place]:
        found = [self.places[scope] for scope in scopes(reference) if scope in self.places]
        return [*found, self.default_place]


# -- scopes --------------------------------------------------------------------------------------------------


def scopes(reference: Reference) -> list[str]:
    """What may stand for a reference in such a file, the most exact first (containers-policy.json(5),
    "docker:"): the reference, its repository and each part of it up to the host, wildcards of the host."""
    found = [identity_of(reference)]
    name = reference.repository
    while True:
        found.append(name)
        name, slash, _ = name.rpartition("/")
        if not slash:
            break
    host = reference.domain.partition(":")[0]
    while "." in host:
        host = host.partition(".")[2]
        found.append(f"*.{host}")
    return found


def identity_of(reference: Reference) -> str:
    """A reference as policies name it: a digest goes before a tag, for it is more exact."""
    return reference.repo_digest or reference.name


def best(entries: Mapping[str, T], reference: Reference) -> T | None:
    """The entry of the most exact scope."""
    return next((entries[scope] for scope in scopes(reference) if scope in entries), None)


# -- reading -------------------------------------------------------------------------------------------------


def read_json(data: bytes) -> Any:
    """JSON in which no member comes twice: who reads the first and who reads the last must agree.

    Raises ValueError; for bad syntax with line and column.
    """
    import json  # here, for most hosts have no policy and all processes load this module

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} comes twice")
        return found

    try:
        return json.loads(data.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_signed(text: str) -> Reference | None:
    """A reference as a signature or a policy spells it; None for one with neither tag nor digest, which is no
    name of an image. Raises RemoteError(INVALID_ARGUMENT)."""
    reference = parse(text)
    return reference if has_tag_or_digest(text) else None


def repository_of(text: str) -> str | None:
    """The repository that a text names, None if it names none."""
    try:
        return parse(text).repository
    except RemoteError:
        return None


def has_tag_or_digest(text: str) -> bool:
    """Whether a reference says which image of its repository it means."""
    return "@" in text or ":" in text.rpartition("/")[2]
