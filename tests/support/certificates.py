"""Runs in: the tests. Certificates that sign themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificate(directory: Path, name: str) -> tuple[str, str]:
    """Make one; returns the paths of the certificate and of its key, which only root may read."""
    cert, key = f"{directory}/{name}.pem", f"{directory}/{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += [
        "-subj",
        f"/CN={name}",
        "-addext",
        f"subjectAltName=DNS:{name}",
        "-days",
        "2",
        "-keyout",
        key,
        "-out",
        cert,
    ]
    subprocess.run(command, check=True, capture_output=True)
    Path(key).chmod(0o600)
    return cert, key
