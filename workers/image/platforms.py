"""Runs in: image. Sans-IO.

Which of an index's manifests is for a machine: the names that OCI images use for architectures and their
variants (image-spec, "Image Index", property `platform`), and how well one serves the other.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

#: What `uname -m` says -> architecture and variant of the image-spec.
MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
    "loongarch64": ("loong64", ""),
    "mips64": ("mips64le", ""),
}

#: What a variant runs, the best first; "" stands for an image that names none.
VARIANTS = {
    ("arm", "v8"): ("v8", "v7", "v6", "v5", ""),
    ("arm", "v7"): ("v7", "", "v6", "v5"),
    ("arm", "v6"): ("v6", "v5", ""),
    ("arm", "v5"): ("v5", ""),
    ("arm64", "v8"): ("v8", ""),
    ("amd64", "v4"): ("v4", "v3", "v2", "v1", ""),
    ("amd64", "v3"): ("v3", "v2", "v1", ""),
    ("amd64", "v2"): ("v2", "v1", ""),
    ("amd64", "v1"): ("v1", ""),
}

#: The variant that is meant when none is named.
DEFAULT_VARIANTS = {"arm": "v7", "arm64": "v8", "amd64": "v1"}


@dataclass(frozen=True)
class Platform:
    """What images are wanted for."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def rank(self, os: str, architecture: str, variant: str) -> int | None:
        """How well an image made for these serves this platform: 0 is best, None not at all."""
        if (os, architecture) != (self.os, self.architecture):
            return None
        wanted = self.variant or DEFAULT_VARIANTS.get(architecture, "")
        runnable = VARIANTS.get((architecture, wanted), (wanted, "") if wanted else ("",))
        return runnable.index(variant) if variant in runnable else None


def wanted(os: str, architecture: str, variant: str) -> Platform:
    """The platform that a request names; an empty architecture is this machine's."""
    if architecture:
        return Platform(os, architecture, variant)
    machine = platform.machine()
    own, own_variant = MACHINES.get(machine, (machine, ""))
    return Platform(os, own, variant or own_variant)
