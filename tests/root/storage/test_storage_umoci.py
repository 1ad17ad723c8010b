"""Runs in: pytest, as root. One image, unpacked by umoci and by us: the same tree, seen through overlayfs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
from pathlib import Path

from ipc.messages import storage
from tests.support.storage_worker import Layer, Worker, digest, info, put_image, tar_of

DIR, SYM, LNK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def capability() -> tarfile.TarInfo:
    header = info("usr/bin/ping", uid=3)
    value = bytes.fromhex("0100000200200000000000000000000000000000")
    header.pax_headers = {"SCHILY.xattr.security.capability": value.decode("latin-1")}
    return header


LAYERS = [
    [
        (info("./", DIR, mode=0o755), b""),
        (info("etc", DIR, mode=0o750, uid=1, gid=2), b""),
        (info("etc/passwd"), b"root:x:0:0:root:/root:/bin/sh\n"),
        (info("usr", DIR), b""),
        (info("usr/bin", DIR, mode=0o711), b""),
        (info("usr/bin/su", mode=0o4755), b"elf" * 1000),
        (info("usr/bin/hard", LNK, linkname="usr/bin/su"), b""),
        (info("bin", SYM, linkname="usr/bin"), b""),
        (info("doomed", DIR), b""),
        (info("doomed/file"), b"x"),
        (info("opaque", DIR, mode=0o700), b""),
        (info("opaque/old"), b"x"),
        (info("single"), b"x"),
        (info("dev", DIR), b""),
        (info("dev/fifo", tarfile.FIFOTYPE), b""),
        (info("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666), b""),
    ],
    [
        (info("etc/shadow", mode=0o600, gid=42), b"secret"),
        (info(".wh.doomed"), b""),
        (info(".wh.single"), b""),
        (info("opaque", DIR, mode=0o711, uid=9), b""),
        (info("opaque/.wh..wh..opq"), b""),
        (info("opaque/new"), b"y"),
        (capability(), b"elf"),
    ],
    [
        (info("doomed", DIR, mode=0o705), b""),
        (info("doomed/again"), b"z"),
        (info("usr/bin/su", mode=0o755), b"harmless"),
        (info("etc/.wh.passwd"), b""),
    ],
]


def layout(path: Path, layers: list[Layer]) -> None:
    """Write an OCI image layout with one image, tagged t."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        name = digest(data)
        (blobs / name[7:]).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{media_type}", "digest": name, "size": len(data)}

    rootfs = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(json.dumps(config).encode(), "config.v1+json"),
        "layers": [put(layer.blob, "layer.v1.tar+gzip") for layer in layers],
    }
    entry = put(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "t"}
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def facts(root: Path) -> dict[str, tuple[object, ...]]:
    """Kind, owner, mode, device, size, link, attributes, time and content of everything below root."""
    found: dict[str, tuple[object, ...]] = {}
    for base, directories, files in os.walk(root):
        for path in (Path(base, name) for name in directories + files):
            status = path.lstat()
            regular, link = stat.S_ISREG(status.st_mode), stat.S_ISLNK(status.st_mode)
            attributes = {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
                if not name.startswith("user.rootlesscontainers")
            }
            found[str(path.relative_to(root))] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                path.read_bytes() if regular else b"",
                str(path.readlink()) if link else "",
                sorted(attributes.items()),
                status.st_mtime,
            )
    return found


def test_an_image_unpacks_as_umoci_unpacks_it() -> None:
    layers: list[Layer] = []
    for members in LAYERS:
        layers.append(Layer(tar_of(members), layers[-1].chain_id if layers else ""))
    with Worker() as worker, worker.client() as client:
        layout(worker.base / "image", layers)
        bundle = worker.base / "bundle"
        subprocess.run(["umoci", "unpack", "--image", f"{worker.base}/image:t", bundle], check=True)
        image = put_image(client, layers)
        request = storage.ContainerCreate(
            container_id="c", pod_id="p", image_id=image.id, user=storage.ContainerUser()
        )
        ours, theirs = facts(Path(client.call(request).rootfs)), facts(bundle / "rootfs")
        assert ours.keys() == theirs.keys()
        for name, fact in theirs.items():
            assert ours[name] == fact, name
        mounted = Path(client.call(request).rootfs)
        assert (mounted / "usr/bin/hard").stat().st_mode & 0o7777 == 0o4755
