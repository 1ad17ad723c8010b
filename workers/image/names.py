"""Runs in: image. Sans-IO.

What an operator's short names stand for: aliases first, then each search registry in turn
(containers-registries.conf(5), "short-name aliasing"). Where nothing is configured, a short name is of
docker.io, as Kubernetes manifests expect.
"""

from __future__ import annotations

from ipc.errors import RemoteError, invalid
from ipc.messages.image import Normalised
from ipc.reference import DEFAULT_DOMAIN, Reference, has_domain, parse
from workers.image.registries import Registries


def normalise(text: str, registries: Registries) -> Normalised:
    """The full form of a reference and what to try for it. Raises RemoteError(INVALID_ARGUMENT)."""
    plain = parse(text)
    candidates = [plain] if has_domain(text) else _candidates(text, registries)
    first = candidates[0]
    return Normalised(
        reference=str(first),
        repository=first.repository,
        tag=first.tag,
        digest=first.digest,
        candidates=[str(candidate) for candidate in candidates],
    )


def _candidates(text: str, registries: Registries) -> list[Reference]:
    name, rest = _split(text)
    alias = registries.aliases.get(name)
    if alias:
        return [_parse(alias + rest, f"the alias {name!r}")]
    search = (DEFAULT_DOMAIN,) if registries.search is None else registries.search
    if not search:
        raise invalid(
            f"{text!r} names no registry, and unqualified-search-registries in registries.conf is empty"
        )
    if len(search) > 1 and registries.short_name_mode == "enforcing":
        raise invalid(
            f"{text!r} is ambiguous: short-name-mode is enforcing, and there are "
            f"{len(search)} search registries"
        )
    return [_parse(f"{registry}/{text}", "unqualified-search-registries") for registry in search]


def _split(text: str) -> tuple[str, str]:
    """Name, and tag and digest as they stand."""
    head, slash, last = text.partition("@")[0].rpartition("/")
    name = head + slash + last.partition(":")[0]
    return name, text[len(name) :]


def _parse(text: str, origin: str) -> Reference:
    try:
        return parse(text)
    except RemoteError as error:
        raise invalid(f"{origin} in registries.conf: {error.text}") from None
