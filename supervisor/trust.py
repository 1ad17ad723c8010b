"""Runs in: the supervisor, `bulkhead config --check`, `bulkhead info`.

Reads what may be pulled: policy.json, the policies of namespaces, the keys that they name, registries.d. All
of it is read when the configuration is, so that a fault is found before anything changes, and the worker that
goes by it, which can see none of these files, is handed all that it needs. A fault is named with its file and
place.
"""

from __future__ import annotations

import binascii
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from ipc import trust, yamlfiles
from ipc.errors import RemoteError
from ipc.reference import parse
from ipc.trust import Identity, OpenPgp, Place, Policy, Requirement, Sigstore, Trust
from supervisor.config import ImageConfig
from supervisor.configfile import ConfigError
from supervisor.files import find_program

#: Where there need not be a file: without it, anything may be pulled.
DEFAULT_POLICY = "/etc/containers/policy.json"
MAX_POLICY = 4 << 20
MAX_KEY = 1 << 20
_PEM_KEY = b"-----BEGIN PUBLIC KEY-----"
_ARMOR = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----[ \t]*\r?\n(?:[^\r\n]+: [^\r\n]*\r?\n)*[ \t]*\r?\n"
    rb"([A-Za-z0-9+/=\r\n]+?)(?:\r?\n=[A-Za-z0-9+/]{4})?\r?\n-----END PGP PUBLIC KEY BLOCK-----"
)
_NEW_FORMAT, _PACKET, _PUBLIC_KEY = 0x40, 0x80, 6  # RFC 9580, "Packet Headers" and "Packet Types"

T = TypeVar("T")


# -- policy.json as it is written --------------------------------------------------------------------------


class _Strict(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", rename="camel"):
    """A requirement; a member that we do not know is an error, as containers-policy.json(5) wants it."""


class _Accept(_Strict, tag="insecureAcceptAnything"):
    pass


class _Reject(_Strict, tag="reject"):
    pass


class _SignedBy(_Strict, tag="signedBy"):
    key_type: str
    key_path: str | None = None
    key_paths: list[str] | None = None
    key_data: str | None = None
    signed_identity: Identity = trust.MatchRepoDigestOrExact()


class _SigstoreSigned(_Strict, tag="sigstoreSigned"):
    key_path: str | None = None
    key_paths: list[str] | None = None
    key_data: str | None = None
    key_datas: list[str] | None = None
    fulcio: Any = None
    pki: Any = None
    rekor_public_key_path: Any = None
    rekor_public_key_paths: Any = None
    rekor_public_key_data: Any = None
    rekor_public_key_datas: Any = None
    signed_identity: Identity = trust.MatchRepoDigestOrExact()


class _SignedBaseLayer(_Strict, tag="signedBaseLayer"):
    base_layer_identity: Any


_Written = _Accept | _Reject | _SignedBy | _SigstoreSigned | _SignedBaseLayer
#: What a requirement of sigstore may ask for besides a key, and we cannot verify.
_BEYOND = ("fulcio", "pki", *(f"rekor_public_key_{kind}" for kind in ("path", "paths", "data", "datas")))


class _PolicyFile(msgspec.Struct, forbid_unknown_fields=True):
    default: list[Any]
    transports: dict[str, dict[str, list[Any]]] = {}


class _Section(msgspec.Struct, rename="kebab"):
    """A scope of registries.d; `sigstore` is the older name of `lookaside`."""

    lookaside: str = ""
    sigstore: str = ""
    use_sigstore_attachments: bool | None = None


class _PlacesFile(msgspec.Struct, rename="kebab"):
    default_docker: _Section | None = None
    docker: dict[str, _Section] = {}


# -- all of it ---------------------------------------------------------------------------------------------


def load(config: ImageConfig) -> Trust:
    """Read everything. Raises ConfigError with a line per fault."""
    policy = _main_policy(config.policy)
    namespaces = dict(_namespaces(config.policy_dir))
    found = Trust(policy=policy, namespaces=namespaces)
    signed = [one for one in found.every() if isinstance(one, OpenPgp | Sigstore)]
    if not signed:
        return found  # nobody looks for a signature
    default, places = _places(config.registries_d)
    return Trust(
        policy=policy,
        namespaces=namespaces,
        default_place=default,
        places=places,
        gpgv=_program("gpgv", any(isinstance(one, OpenPgp) for one in signed)),
        openssl=_program("openssl", any(isinstance(one, Sigstore) for one in signed)),
    )


def unsupported(found: Trust) -> list[str]:
    """What is asked for that nothing can meet here, a sentence each."""
    kinds = {one.what for one in found.every() if isinstance(one, trust.Unsupported)}
    return [
        f"signature policy: {what} cannot be verified, so images that need it are refused"
        for what in sorted(kinds)
    ]


def _program(name: str, needed: bool) -> str:
    path = find_program(name) if needed else ""
    if needed and not path:
        raise ConfigError(f"the signature policy needs the program {name}: install it")
    return path or ""


def _read(path: str, most: int) -> bytes:
    """Raises ConfigError; FileNotFoundError."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(data) > most:
        raise ConfigError(f"{path}: it is larger than {most} bytes")
    return data


# -- policies ----------------------------------------------------------------------------------------------


def _main_policy(path: str) -> Policy | None:
    """The policy; None if there is none where there need not be one."""
    try:
        return read_policy(path, _read(path, MAX_POLICY)) if path else None
    except FileNotFoundError:
        if path == DEFAULT_POLICY:
            return None
        raise ConfigError(f"{path}: there is no such file, and image.policy names it") from None


def _namespaces(directory: str) -> Iterator[tuple[str, Policy]]:
    """NAMESPACE.json, one each."""
    for path in _files(directory, ".json"):
        yield os.path.basename(path).removesuffix(".json"), read_policy(path, _must_read(path))


def _must_read(path: str, most: int = MAX_POLICY) -> bytes:
    try:
        return _read(path, most)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None


def _files(directory: str, suffix: str) -> list[str]:
    try:
        names = sorted(os.listdir(directory)) if directory else []
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from None
    return [os.path.join(directory, name) for name in names if name.endswith(suffix)]


def read_policy(path: str, data: bytes) -> Policy:
    """One policy.json. Raises ConfigError."""
    try:
        file = msgspec.convert(trust.read_json(data), _PolicyFile)
    except ValueError as error:  # msgspec's, JSON's, that of an encoding
        raise ConfigError(_placed(path, error)) from None
    found = Policy(
        default=_requirements(f"{path}: default", file.default),
        docker={
            scope: _requirements(f"{path}: transports.docker[{scope!r}]", listed)
            for scope, listed in file.transports.get("docker", {}).items()
        },
    )
    for transport, scoped in file.transports.items():
        if transport != "docker":  # images come from registries only, but what is wrong is wrong
            for scope, listed in scoped.items():
                _requirements(f"{path}: transports.{transport}[{scope!r}]", listed)
    return found


def _placed(path: str, error: ValueError) -> str:
    line = getattr(error, "lineno", 0)
    text = getattr(error, "msg", str(error))
    return f"{path}:{line}: not JSON: {text}" if line else f"{path}: {text}"


def _requirements(place: str, listed: list[Any]) -> list[Requirement]:
    if not listed:
        raise ConfigError(f"{place}: it has no requirement; write insecureAcceptAnything or reject")
    return [_requirement(f"{place}[{number}]", one) for number, one in enumerate(listed)]


def _requirement(place: str, written: Any) -> Requirement:
    try:
        one: _Written = msgspec.convert(written, _Written)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{place}: {error}") from None
    if isinstance(one, _Accept):
        return trust.Accept()
    if isinstance(one, _Reject):
        return trust.Reject()
    if isinstance(one, _SignedBaseLayer):
        return trust.Unsupported("signedBaseLayer")
    _check_identity(place, one.signed_identity)
    return _signed_by(place, one) if isinstance(one, _SignedBy) else _sigstore_signed(place, one)


def _signed_by(place: str, one: _SignedBy) -> Requirement:
    if one.key_type in {"signedByGPGKeys", "X509Certificates", "signedByX509CAs"}:
        return trust.Unsupported(f"keyType {one.key_type}")
    if one.key_type != "GPGKeys":
        raise ConfigError(f"{place}: keyType {one.key_type!r} is none")
    keys = _keys(place, {"keyPath": one.key_path, "keyPaths": one.key_paths, "keyData": one.key_data})
    return OpenPgp([keyring(where, data) for where, data in keys], one.signed_identity)


def _sigstore_signed(place: str, one: _SigstoreSigned) -> Requirement:
    beyond = [name for name in _BEYOND if getattr(one, name) is not None]
    if beyond:
        kind = {"fulcio": "Fulcio", "pki": "PKI"}.get(beyond[0], "Rekor")
        return trust.Unsupported(f"sigstoreSigned with {kind}")
    given = {
        "keyPath": one.key_path,
        "keyPaths": one.key_paths,
        "keyData": one.key_data,
        "keyDatas": one.key_datas,
    }
    keys = _keys(place, given)
    for where, data in keys:
        if _PEM_KEY not in data:
            raise ConfigError(f"{where}: it is no public key in PEM")
    return Sigstore([data for _, data in keys], one.signed_identity)


def _keys(place: str, given: Mapping[str, str | list[str] | None]) -> list[tuple[str, bytes]]:
    """The keys of a requirement, each with where it stands; exactly one member may give them."""
    there = {name: value for name, value in given.items() if value is not None}
    if len(there) != 1:
        raise ConfigError(f"{place}: exactly one of {', '.join(given)} must be there")
    name, value = next(iter(there.items()))
    values = [value] if isinstance(value, str) else value
    if not values:
        raise ConfigError(f"{place}: {name} is empty")
    if "Path" in name:
        return [(path, _key_file(place, name, path)) for path in values]
    return [(f"{place}: {name}", _base64(f"{place}: {name}", text)) for text in values]


def _key_file(place: str, name: str, path: str) -> bytes:
    if not os.path.isabs(path):
        raise ConfigError(f"{place}: {name} must be an absolute path, {path!r} is none")
    try:
        return _must_read(path, MAX_KEY)
    except ConfigError as error:
        raise ConfigError(f"{place}: {name}: {error}") from None


def _base64(place: str, text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error is one
        raise ConfigError(f"{place} is not base64") from None


def keyring(place: str, data: bytes) -> bytes:
    """Binary OpenPGP keys of binary or armored ones, which gpgv does not read. Raises ConfigError."""
    if b"-----BEGIN PGP" in data:
        data = b"".join(_base64(place, _joined(block)) for block in _ARMOR.findall(data))
    if not data or not _is_public_key(data[0]):
        raise ConfigError(f"{place}: it has no OpenPGP public key")
    return data


def _joined(block: bytes) -> str:
    return b"".join(block.split()).decode()


def _is_public_key(first: int) -> bool:
    """Whether a packet that begins so is a public key."""
    if not first & _PACKET:
        return False
    kind = first & 0x3F if first & _NEW_FORMAT else (first & 0x3F) >> 2
    return kind == _PUBLIC_KEY


def _check_identity(place: str, identity: Identity) -> None:
    """What an identity names must be a name. Raises ConfigError."""
    try:
        if (
            isinstance(identity, trust.ExactReference)
            and trust.parse_signed(identity.docker_reference) is None
        ):
            raise ConfigError(
                f"{place}: dockerReference {identity.docker_reference!r} has no tag and no digest"
            )
        if isinstance(identity, trust.ExactRepository):
            parse(identity.docker_repository)
            if trust.has_tag_or_digest(identity.docker_repository):
                raise ConfigError(
                    f"{place}: dockerRepository {identity.docker_repository!r} is more than a repository"
                )
    except RemoteError as error:
        raise ConfigError(f"{place}: {error.text}") from None
    if isinstance(identity, trust.RemapIdentity):
        for name in (identity.prefix, identity.signed_prefix):
            if not name or "://" in name or name.endswith("/"):
                raise ConfigError(f"{place}: {name!r} is no prefix of a reference")


# -- registries.d ------------------------------------------------------------------------------------------


def _places(directory: str) -> tuple[Place, dict[str, Place]]:
    """All files of registries.d; what two of them say differs from what either meant, so it is an error."""
    default, places = None, dict[str, Place]()
    for path in _files(directory, ".yaml"):
        try:
            file = msgspec.convert(yamlfiles.parse(_must_read(path, yamlfiles.MAX_YAML)) or {}, _PlacesFile)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
        if file.default_docker is not None:
            if default is not None:
                raise ConfigError(f"{path}: default-docker: another file of {directory} has it too")
            default = _place(f"{path}: default-docker", file.default_docker)
        for scope, section in file.docker.items():
            if scope in places:
                raise ConfigError(f"{path}: docker[{scope!r}]: another file of {directory} has it too")
            places[scope] = _place(f"{path}: docker[{scope!r}]", section)
    return default or Place(), places


def _place(where: str, section: _Section) -> Place:
    from urllib.parse import urlsplit  # only where somebody looks for signatures

    url = (section.lookaside or section.sigstore).rstrip("/")
    parts = urlsplit(url)
    local = parts.scheme == "file" and not parts.netloc and parts.path.startswith("/")
    if url and not local and not (parts.scheme in {"http", "https"} and parts.netloc):
        raise ConfigError(f"{where}: {url!r} is no URL of http, https or file:///")
    if local and (":" in parts.path or ".." in parts.path.split("/")):
        raise ConfigError(f"{where}: the directory {parts.path} must have neither ':' nor '..' in its name")
    return Place(url, section.use_sigstore_attachments)
