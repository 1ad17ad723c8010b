"""Runs in: cri. The part of an image's config that a container is made of (OCI image-spec, config.md).

Owns the reading of it. An image is not to be trusted: labels and annotations of it go nowhere, wrong types
are refused, and nothing but the fields below is read.
"""

from __future__ import annotations

import msgspec

from ipc.errors import invalid

from . import validate

MAX_VOLUMES = 256


class Execution(msgspec.Struct, rename="pascal"):
    """The `config` object of the image's config."""

    user: str = ""
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str = ""
    stop_signal: str = ""
    volumes: dict[str, object] | None = None


class _ImageConfig(msgspec.Struct):
    config: Execution | None = None


_DECODER = msgspec.json.Decoder(_ImageConfig)


def execution(image_config: bytes) -> Execution:
    """Decode it. INVALID_ARGUMENT if it is no image config; an image without `config` has an empty one."""
    try:
        return _DECODER.decode(image_config).config or Execution()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the image's config is not valid: {error}") from None


def volumes(config: Execution) -> list[str]:
    """The directories that the image declares as VOLUMEs: they are made in its root where it lacks them."""
    paths = sorted(
        validate.clean_path("the image's VOLUME", f"/{path.lstrip('/')}") for path in config.volumes or {}
    )
    if len(paths) > MAX_VOLUMES:
        raise invalid(f"the image declares more than {MAX_VOLUMES} VOLUMEs")
    return [path for path in paths if path != "/"]
