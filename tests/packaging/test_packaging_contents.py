"""What stands in the packages: the same in both, clean for the distributions' linters, and nothing that is
general.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import packages

RPM_CONFIG = packages.REPO / "packaging/rpm/rpmlint.toml"
#: Where Debian puts what others have elsewhere.
PLACES = (
    ("/lib/systemd/system/", "/usr/lib/systemd/system/"),
    ("/etc/default/", "/etc/sysconfig/"),
    ("/usr/share/zsh/vendor-completions/", "/usr/share/zsh/site-functions/"),
)
OF_DEBIAN = re.compile(
    r"/usr/share/(lintian/.*|doc/bulkhead/(copyright|changelog\.Debian\.gz|changelog\.gz))"
)
OF_RPM = ("/usr/share/licenses/bulkhead/LICENSE", "/usr/lib/bulkhead/current")


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package, unpacked."""
    packages.built()
    target = tmp_path_factory.mktemp("deb")
    output("dpkg-deb", "--extract", str(packages.package("deb1")), str(target))
    return target


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def contents(deb: Path) -> Iterator[tuple[str, str]]:
    """Each file of the Debian package by the name it would have in the other, and its hash."""
    for path in deb.rglob("*"):
        name = "/" + str(path.relative_to(deb))
        if path.is_file() and not OF_DEBIAN.fullmatch(name):
            data = path.read_bytes()
            if name.endswith(".gz"):  # Debian compresses manual pages
                name, data = name[:-3], subprocess.run(["zcat", path], capture_output=True, check=True).stdout
            for debian, others in PLACES:
                name = name.replace(debian, others, 1) if name.startswith(debian) else name
            yield name, hashlib.sha256(data).hexdigest()


def test_both_packages_carry_the_same_files(deb: Path) -> None:
    lines = output("rpm", "-qp", "--qf", "[%{FILENAMES} %{FILEDIGESTS}\n]", str(packages.package("rpm1")))
    rpm = dict(line.split(" ") for line in lines.splitlines() if not line.endswith(" "))
    for name in OF_RPM:
        rpm.pop(name, None)
    assert dict(contents(deb)) == rpm


def test_what_is_carried_is_private_and_compiled(deb: Path) -> None:
    names = [name for name, _ in contents(deb)]
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name]
    trees = {name.split("/")[4] for name in names if name.startswith("/usr/lib/bulkhead/")}
    assert len(trees) == 1
    sources = {name for name in names if name.endswith(".py")}
    assert {_compiled(name) for name in sources} <= set(names)
    assert {"/usr/sbin/bulkhead", "/usr/bin/bulkheadctl"} <= set(names)
    assert [name for name in names if name.startswith("/etc/bulkhead/")] == ["/etc/bulkhead/bulkhead.toml"]


def _compiled(source: str) -> str:
    directory, _, name = source.rpartition("/")
    return f"{directory}/__pycache__/{name.removesuffix('.py')}.cpython-311.pyc"


def test_requirements_are_exact(deb: Path) -> None:
    depends = output("dpkg-deb", "--field", str(packages.package("deb1")), "Depends")
    for word in ("python3 (>= 3.11)", "python3 (<< 3.12)", "crun | runc", "containernetworking-plugins"):
        assert word in depends
    assert "iptables | nftables" in depends
    assert "python3-" not in depends
    requires = output("rpm", "-qp", "--requires", str(packages.package("rpm1"))).splitlines()
    assert {
        "python(abi) = 3.11",
        "(crun or runc)",
        "containernetworking-plugins",
        "(iptables or nftables)",
    } <= set(requires)
    provides = output("rpm", "-qp", "--provides", str(packages.package("rpm1"))).splitlines()
    assert {line.split(" ")[0].partition("(")[0] for line in provides} == {"bulkhead", "config"}


def test_lintian_finds_nothing() -> None:
    found = output("lintian", "--allow-root", "--fail-on", "none", str(packages.package("deb1")))
    assert found == ""


def test_rpmlint_finds_nothing() -> None:
    found = output("rpmlint", "--config", str(RPM_CONFIG), str(packages.package("rpm1")))
    assert " 0 errors, 0 warnings" in found, found
