"""Runs in: cri, image, bulkheadctl. Image references: parsing and normalisation, sans-IO.

`parse` turns what people write ("busybox", "quay.io/x/y:1", "name@sha256:...") into a Reference in full
form, by the grammar that registries and the OCI distribution specification share ("Pulling manifests":
`<name>` and `<reference>`). A name without a registry gets `docker.io`, one path component there gets
`library/`, and a reference with neither tag nor digest gets `latest`. What is not a reference is refused
with a sentence; image ids are recognised by `image_id`, never taken for names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ipc.errors import RemoteError, invalid

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
#: Other spellings of the default registry.
DOMAIN_ALIASES = {"index.docker.io": DEFAULT_DOMAIN, "registry-1.docker.io": DEFAULT_DOMAIN}
#: The name (domain and path) may not be longer, by the distribution specification's advice.
MAX_NAME = 255
MAX_REFERENCE = 4096

_HEX_OF_ALGORITHM = {"sha256": 64, "sha384": 96, "sha512": 128}
_LABEL = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """One image reference in full form. `tag` or `digest` (or both) is set."""

    domain: str  # "docker.io", "localhost:5000", "[::1]:5000"
    path: str  # "library/busybox"
    tag: str = ""
    digest: str = ""  # "sha256:..."

    @property
    def repository(self) -> str:
        """Domain and path: "docker.io/library/busybox"."""
        return f"{self.domain}/{self.path}"

    @property
    def name(self) -> str:
        """The full reference with its tag ("docker.io/library/busybox:1"), "" if there is only a digest."""
        return f"{self.repository}:{self.tag}" if self.tag else ""

    @property
    def repo_digest(self) -> str:
        """repository@digest, "" if there is no digest."""
        return f"{self.repository}@{self.digest}" if self.digest else ""

    @property
    def key(self) -> str:
        """What finds the image in a store: the digest is exact and goes before the tag."""
        return self.repo_digest or self.name

    def with_digest(self, digest: str) -> Reference:
        """The same repository and tag, pinned to a digest (validated)."""
        return replace(self, digest=check_digest(digest))

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.repository}{tag}{digest}"


def parse(text: str) -> Reference:
    """Normalise a reference. Raises RemoteError(INVALID_ARGUMENT) with a sentence if it is none.

    >>> str(parse("busybox"))
    'docker.io/library/busybox:latest'
    """
    if not text or len(text) > MAX_REFERENCE:
        raise invalid("the image reference is empty" if not text else "the image reference is too long")
    if image_id(text) is not None:
        raise _bad(text, "it is an image id, not a name")
    name, digest = _split_digest(text)
    name, tag = _split_tag(name)
    domain, path = split_domain(name)
    _check_name(text, domain, path)
    if tag and not _TAG.fullmatch(tag):
        raise _bad(text, f"the tag {tag!r} is malformed")
    return Reference(domain, path, tag or ("" if digest else DEFAULT_TAG), digest)


def image_id(text: str) -> str | None:
    """ "sha256:HEX" if the text is a whole image id (64 hexadecimal digits, prefix optional), else None."""
    match = _ID.fullmatch(text)
    return f"sha256:{match[1]}" if match else None


def has_domain(text: str) -> bool:
    """Whether the reference names its registry; one that does not is a short name."""
    first, slash, _ = text.partition("/")
    return bool(slash) and _looks_like_domain(first)


def split_domain(name: str) -> tuple[str, str]:
    """Split a name without tag and digest into registry and path, with the defaults filled in."""
    first, slash, rest = name.partition("/")
    if not slash or not _looks_like_domain(first):
        first, rest = DEFAULT_DOMAIN, name
    domain = DOMAIN_ALIASES.get(first, first)
    if domain == DEFAULT_DOMAIN and "/" not in rest:
        rest = f"library/{rest}"
    return domain, rest


def check_digest(digest: str) -> str:
    """Return the digest if it is `algorithm:hex` of a known algorithm and the right length.

    Raises RemoteError(INVALID_ARGUMENT).
    """
    algorithm, _, value = digest.partition(":")
    length = _HEX_OF_ALGORITHM.get(algorithm)
    if length is None:
        raise invalid(f"the digest {digest[:128]!r} is not of a known algorithm (sha256, sha384, sha512)")
    if len(value) != length or not re.fullmatch(r"[0-9a-f]+", value, re.ASCII):
        raise invalid(f"the digest {digest[:192]!r} does not have {length} lower-case hexadecimal digits")
    return digest


def _looks_like_domain(first: str) -> bool:
    """A first component is a registry if it has a dot, a port or upper-case letters, or is localhost."""
    return "." in first or ":" in first or first == "localhost" or first != first.lower()


def _split_digest(text: str) -> tuple[str, str]:
    name, at, digest = text.partition("@")
    if at:
        check_digest(digest)
    return name, digest


def _split_tag(name: str) -> tuple[str, str]:
    """The tag follows a colon after the last slash; a colon before it belongs to the registry's port."""
    head, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and not tag:
        raise _bad(name, "the tag is empty")
    return head + slash + last, tag


def _check_name(text: str, domain: str, path: str) -> None:
    if not _DOMAIN.fullmatch(domain):
        raise _bad(text, f"{domain!r} is no registry name")
    if len(domain) + 1 + len(path) > MAX_NAME:
        raise _bad(text, f"the name is longer than {MAX_NAME} characters")
    for component in path.split("/"):
        if not _COMPONENT.fullmatch(component):
            raise _bad(text, f"{component!r} is no repository name (lower-case letters, digits, . _ -)")


def _bad(text: str, why: str) -> RemoteError:
    return invalid(f"{text[:300]!r} is not an image reference: {why}")
