"""registries.conf, short names, credentials, challenges and proxies, without any registry."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages.image import Auth
from ipc.reference import parse
from workers.image import proxies
from workers.image.credentials import AuthFile, Credentials, applies, of_auth, select
from workers.image.failures import Failure, combine, refused
from workers.image.names import normalise
from workers.image.registries import Endpoint, Registries, RegistriesFiles, match_length
from workers.image.tokens import (
    Authorization,
    Challenge,
    TokenCache,
    TokenKey,
    challenges,
    read_token,
    token_request,
)
from workers.image.transport import STALL_BYTES, StallGuard

DIGEST = "sha256:" + "a" * 64


def read(tmp_path: Path, text: str, **drop_ins: str) -> Registries:
    (tmp_path / "registries.conf").write_text(text)
    (tmp_path / "d").mkdir(exist_ok=True)
    for name, content in drop_ins.items():
        (tmp_path / "d" / f"{name}.conf").write_text(content)
    return RegistriesFiles(str(tmp_path / "registries.conf"), str(tmp_path / "d")).current()


def route(registries: Registries, text: str) -> list[str]:
    return [endpoint.name for endpoint in registries.route(parse(text))]


@pytest.mark.parametrize(
    ("text", "prefix", "length"),
    [
        ("quay.io/x/y:1", "quay.io", 7),
        ("quay.io/x/y:1", "quay.io/x", 9),
        ("quay.io/x/y:1", "quay.io/x/y", 11),
        ("quay.io/x/y:1", "quay.io/x/y:1", 13),
        ("quay.io/x/y:12", "quay.io/x/y:1", None),
        ("quay.io/xy/z:1", "quay.io/x", None),
        ("quay.io:5000/x", "quay.io", None),
        ("quay.io:5000/x", "quay.io:5000", 12),
        ("quay.io.evil/x", "quay.io", None),
        ("a.b.example.com/x", "*.example.com", 15),
        ("example.com/x", "*.example.com", None),
        ("evilexample.com/x", "*.example.com", None),
        ("evil.com/a.example.com/x", "*.example.com", None),
        (f"quay.io/x@{DIGEST}", "quay.io/x", 9),
    ],
)
def test_prefixes_match_whole_components(text: str, prefix: str, length: int | None) -> None:
    assert match_length(text, prefix) == length


def test_without_configuration_a_reference_names_its_endpoint(tmp_path: Path) -> None:
    registries = RegistriesFiles(str(tmp_path / "none"), "").current()
    assert registries.route(parse("busybox")) == [Endpoint("docker.io", "library/busybox")]


def test_the_longest_prefix_rewrites_the_location(tmp_path: Path) -> None:
    registries = read(
        tmp_path,
        """
        [[registry]]
        prefix = "example.com"
        location = "internal.test:5000/all"
        [[registry]]
        prefix = "example.com/team"
        location = "team.test"
        insecure = true
        [[registry]]
        prefix = "*.wild.test"
        location = "tame.test/wild"
        [[registry]]
        prefix = "*.kept.test"
        insecure = true
        [[registry]]
        prefix = "pinned.test/x/y:1"
        """,
    )
    assert route(registries, "example.com/a/b:1") == ["internal.test:5000/all/a/b"]
    assert route(registries, "example.com/team/b:1") == ["team.test/b"]
    assert registries.route(parse("example.com/team/b:1"))[0].insecure
    assert route(registries, "example.com/teams/b:1") == ["internal.test:5000/all/teams/b"]
    assert route(registries, "a.b.wild.test/x:1") == ["tame.test/wild/x"]
    assert registries.route(parse("a.kept.test/x")) == [Endpoint("a.kept.test", "x", insecure=True)]
    assert route(registries, "pinned.test/x/y:1") == ["pinned.test/x/y"]
    assert registries.insecure("team.test") is False
    assert registries.insecure("a.kept.test") is True


def test_mirrors_serve_tags_or_digests_as_they_say(tmp_path: Path) -> None:
    registries = read(
        tmp_path,
        """
        [[registry]]
        location = "example.com"
        [[registry.mirror]]
        location = "all.test/m"
        [[registry.mirror]]
        location = "digests.test"
        pull-from-mirror = "digest-only"
        insecure = true
        [[registry.mirror]]
        location = "tags.test"
        pull-from-mirror = "tag-only"
        [[registry]]
        location = "digest.example.com"
        mirror-by-digest-only = true
        [[registry.mirror]]
        location = "mirror.test"
        """,
    )
    assert route(registries, "example.com/x:1") == ["all.test/m/x", "tags.test/x", "example.com/x"]
    pinned = registries.route(parse(f"example.com/x:1@{DIGEST}"))
    assert [endpoint.name for endpoint in pinned] == ["all.test/m/x", "digests.test/x", "example.com/x"]
    assert [endpoint.insecure for endpoint in pinned] == [False, True, False]
    assert [endpoint.mirror for endpoint in pinned] == [True, True, False]
    assert route(registries, "digest.example.com/x:1") == ["digest.example.com/x"]
    assert route(registries, f"digest.example.com/x@{DIGEST}") == ["mirror.test/x", "digest.example.com/x"]


def test_blocked_is_denied_and_a_longer_prefix_may_allow(tmp_path: Path) -> None:
    registries = read(
        tmp_path,
        '[[registry]]\nprefix = "example.com"\nblocked = true\n[[registry]]\nprefix = "example.com/ok"\n',
    )
    with pytest.raises(RemoteError, match="blocked") as caught:
        registries.route(parse("example.com/x:1"))
    assert caught.value.code is Code.PERMISSION_DENIED
    assert route(registries, "example.com/ok/x:1") == ["example.com/ok/x"]


def test_a_location_that_makes_no_name_is_told(tmp_path: Path) -> None:
    registries = read(tmp_path, '[[registry]]\nprefix = "example.com"\nlocation = "UPPER.test/UPPER"\n')
    with pytest.raises(RemoteError, match=r"registries\.conf turns example\.com/x") as caught:
        registries.route(parse("example.com/x:1"))
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_drop_ins_come_later_in_lexical_order(tmp_path: Path) -> None:
    registries = read(
        tmp_path,
        'unqualified-search-registries = ["one.test"]\nshort-name-mode = "enforcing"\n'
        '[[registry]]\nlocation = "a.test"\nblocked = true\n'
        '[[registry]]\nlocation = "b.test"\nblocked = true\n'
        '[aliases]\n"app" = "one.test/app"\n"tool" = "one.test/tool"\n',
        b='[[registry]]\nlocation = "a.test"\n[aliases]\n"app" = "three.test/app"\n',
        a='unqualified-search-registries = ["two.test"]\n[aliases]\n"app" = "two.test/app"\n',
    )
    (tmp_path / "d" / "ignored.txt").write_text("not TOML [")
    assert registries.search == ("two.test",)
    assert registries.short_name_mode == "enforcing"
    assert registries.aliases == {"app": "three.test/app", "tool": "one.test/tool"}
    assert route(registries, "a.test/x") == ["a.test/x"]
    with pytest.raises(RemoteError, match="blocked"):
        route(registries, "b.test/x")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[registry]\n", "line 1"),
        ('[[registry]]\nlocation = "a.test"\ninsecure = "yes"\n', r"insecure"),
        ("[[registry]]\nblocked = true\n", "neither prefix nor location"),
        ('[[registry]]\nlocation = "https://a.test"\n', "scheme"),
        ('[[registry]]\nlocation = "a.test"\n[[registry.mirror]]\nlocation = ""\n', "no location"),
        (
            '[[registry]]\nprefix = "a.test"\n[[registry.mirror]]\nlocation = "m"\npull-from-mirror = "x"',
            "pull-from-mirror",
        ),
        (
            (
                '[[registry]]\nlocation = "a.test"\nmirror-by-digest-only = true\n'
                '[[registry.mirror]]\nlocation = "m"\npull-from-mirror = "tag-only"\n'
            ),
            "both set",
        ),
        ('short-name-mode = "sometimes"\n', "short-name-mode"),
        ('[registries.search]\nregistries = ["a.test"]\n', "version 1"),
        ('[registries.block]\nregistries = ["a.test"]\n', "version 1"),
    ],
)
@pytest.mark.parametrize("place", ["registries.conf", "d/drop.conf"])
def test_a_wrong_file_is_named_with_the_reason(tmp_path: Path, text: str, sentence: str, place: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / place).write_text(text)
    files = RegistriesFiles(str(tmp_path / "registries.conf"), str(tmp_path / "d"))
    for _ in range(2):  # it stays wrong
        with pytest.raises(RemoteError, match=sentence) as caught:
            files.current()
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert str(tmp_path / place) in caught.value.text


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "registries.conf"
    files = RegistriesFiles(str(path), str(tmp_path / "d"))
    assert files.current().search is None
    path.write_text('unqualified-search-registries = ["one.test"]')
    assert files.current().search == ("one.test",)
    assert files.current() is files.current()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.conf").write_text('unqualified-search-registries = ["two.test"]')
    assert files.current().search == ("two.test",)
    (tmp_path / "d" / "x.conf").unlink()
    assert files.current().search == ("one.test",)
    before = path.stat()
    path.write_text('unqualified-search-registries = ["uno.test"]')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.reload().search == ("uno.test",)


# -- short names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "aliases", "text", "candidates"),
    [
        (None, {}, "busybox", ["docker.io/library/busybox:latest"]),
        (None, {}, "quay.io/x/y:1", ["quay.io/x/y:1"]),
        (("quay.io", "docker.io"), {}, "app:1", ["quay.io/app:1", "docker.io/library/app:1"]),
        (("quay.io/team",), {}, f"app@{DIGEST}", [f"quay.io/team/app@{DIGEST}"]),
        (("quay.io",), {"app": "reg.test/x/app"}, "app:2", ["reg.test/x/app:2"]),
        (("quay.io",), {"x/app": "reg.test/app"}, f"x/app:2@{DIGEST}", [f"reg.test/app:2@{DIGEST}"]),
        (("quay.io",), {"app": ""}, "app", ["quay.io/app:latest"]),
        (("quay.io",), {"app": "reg.test/app"}, "x/app", ["quay.io/x/app:latest"]),
        (("quay.io",), {}, "localhost/app", ["localhost/app:latest"]),
    ],
)
def test_short_names_have_candidates(
    search: tuple[str, ...] | None, aliases: dict[str, str], text: str, candidates: list[str]
) -> None:
    found = normalise(text, Registries(search=search, aliases=aliases))
    assert found.candidates == candidates
    assert found.reference == candidates[0]
    assert str(parse(found.reference)) == found.reference


def test_an_ambiguous_or_homeless_short_name_is_refused() -> None:
    with pytest.raises(RemoteError, match="ambiguous"):
        normalise("app", Registries(search=("a.test", "b.test"), short_name_mode="enforcing"))
    assert normalise("app", Registries(search=("a.test",), short_name_mode="enforcing"))
    with pytest.raises(RemoteError, match="names no registry"):
        normalise("app", Registries(search=()))
    with pytest.raises(RemoteError, match=r"alias 'app' in registries\.conf"):
        normalise("app", Registries(aliases={"app": "bad//x"}))
    with pytest.raises(RemoteError, match="not an image reference"):
        normalise("App", Registries())


# -- credentials ------------------------------------------------------------------------------------------


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("auth", "found"),
    [
        (Auth(), None),
        (Auth(server_address="x.test"), None),
        (Auth(username="u", password="p"), Credentials("u", "p")),
        (Auth(auth=encoded("u:p:q")), Credentials("u", "p:q")),
        (Auth(username="<token>", password="t"), Credentials(identity_token="t")),
        (Auth(auth=encoded("<token>:"), identity_token="t"), Credentials(identity_token="t")),
        (Auth(registry_token="t"), Credentials(registry_token="t")),
    ],
)
def test_credentials_of_a_request(auth: Auth, found: Credentials | None) -> None:
    assert of_auth(auth) == found


@pytest.mark.parametrize("auth", ["no base64!", encoded("nocolon"), base64.b64encode(b"\xff:x").decode()])
def test_bad_credentials_are_refused_and_not_shown(auth: str) -> None:
    with pytest.raises(RemoteError) as caught:
        of_auth(Auth(auth=auth))
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert auth not in caught.value.text


@pytest.mark.parametrize(
    ("server_address", "endpoint", "sent"),
    [
        ("", Endpoint("reg.test", "x"), True),
        ("", Endpoint("moved.test", "x"), True),  # by registries.conf
        ("", Endpoint("mirror.test", "x", mirror=True), False),
        ("", Endpoint("reg.test", "cache/x", mirror=True), True),
        ("https://reg.test/v2/", Endpoint("reg.test", "x"), True),
        ("reg.test/team", Endpoint("reg.test", "x"), True),
        ("*.test", Endpoint("reg.test", "x"), True),
        ("mirror.test", Endpoint("mirror.test", "x", mirror=True), True),
        ("mirror.test", Endpoint("reg.test", "x"), False),
        ("other.test", Endpoint("reg.test", "x"), False),
        ("reg.test:5000", Endpoint("reg.test", "x"), False),
    ],
)
def test_credentials_go_only_where_they_are_for(server_address: str, endpoint: Endpoint, sent: bool) -> None:
    auth = Auth(username="u", password="p", server_address=server_address)
    assert applies(auth, "reg.test", endpoint) is sent


def test_docker_hub_has_many_names() -> None:
    endpoint = Endpoint("docker.io", "library/x")
    for address in ("https://index.docker.io/v1/", "docker.io", "registry-1.docker.io", "index.docker.io"):
        assert applies(Auth(server_address=address), "docker.io", endpoint)


def test_the_auth_file_is_searched_by_the_longest_key(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    auths = {
        "https://index.docker.io/v1/": {"auth": encoded("hub:1")},
        "quay.io": {"auth": encoded("quay:1")},
        "quay.io/team": {"username": "team", "password": "1"},
        "quay.io/team/app": {"identitytoken": "t"},
        "http://old.test:5000/v1": {"auth": encoded("old:1")},
        "empty.test": {},
    }
    path.write_text(json.dumps({"auths": auths, "credsStore": "desktop", "currentContext": "x"}))
    file = AuthFile(str(path))
    for host, repository, found in [
        ("docker.io", "library/busybox", Credentials("hub", "1")),
        ("quay.io", "x", Credentials("quay", "1")),
        ("quay.io", "teams/x", Credentials("quay", "1")),
        ("quay.io", "team/x/y", Credentials("team", "1")),
        ("quay.io", "team/app", Credentials(identity_token="t")),
        ("old.test:5000", "x", Credentials("old", "1")),
        ("old.test", "x", None),
        ("empty.test", "x", None),
        ("other.test", "quay.io/x", None),
    ]:
        assert file.find(Endpoint(host, repository)) == found
    request = Auth(username="u", password="p")
    assert select(request, "quay.io", Endpoint("quay.io", "x"), file) == Credentials("u", "p")
    assert select(request, "reg.test", Endpoint("quay.io", "x", mirror=True), file) == Credentials(
        "quay", "1"
    )
    assert select(Auth(), "quay.io", Endpoint("quay.io", "x"), file) == Credentials("quay", "1")


def test_an_auth_file_changes_vanishes_and_breaks(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    file, endpoint = AuthFile(str(path)), Endpoint("quay.io", "x")
    assert file.find(endpoint) is None
    path.write_text(json.dumps({"auths": {"quay.io": {"auth": encoded("u:p")}}}))
    assert file.find(endpoint) == Credentials("u", "p")
    path.unlink()
    assert file.replaced
    assert file.find(endpoint) == Credentials("u", "p")  # until the next worker, or its successor is seen
    path.write_text(json.dumps({"auths": {"quay.io": {"auth": encoded("u:q")}}}))
    assert file.find(endpoint) == Credentials("u", "q")
    assert not file.replaced
    path.write_text('{"auths": {"quay.io": {"auth": 1, "password": "s3cret"')
    with pytest.raises(RemoteError, match=r"config\.json") as caught:
        file.find(endpoint)
    assert "s3cret" not in caught.value.text
    assert AuthFile("").find(endpoint) is None


# -- tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (
            ['Bearer realm="https://a/t",service="s s",scope="repository:x:pull,push"'],
            [
                Challenge(
                    "bearer",
                    (("realm", "https://a/t"), ("service", "s s"), ("scope", "repository:x:pull,push")),
                )
            ],
        ),
        (
            ['Basic realm="a, b=\\"c\\"", Bearer realm=x , error="e"'],
            [
                Challenge("basic", (("realm", 'a, b="c"'),)),
                Challenge("bearer", (("realm", "x"), ("error", "e"))),
            ],
        ),
        (["Negotiate", "BASIC realm=x"], [Challenge("negotiate"), Challenge("basic", (("realm", "x"),))]),
        (["Basic"], [Challenge("basic")]),
        ([""], []),
        (['="'], []),
    ],
)
def test_challenges_are_read(headers: list[str], found: list[Challenge]) -> None:
    assert challenges(headers) == found


def test_token_requests_by_kind_of_credentials() -> None:
    challenge = Challenge("bearer", (("realm", "r"), ("service", "s")))
    anonymous = token_request(challenge, "x/y", None)
    assert anonymous == type(anonymous)("GET", "service=s&scope=repository%3Ax%2Fy%3Apull", "", "")
    login = token_request(challenge, "x", Credentials("u", "p"))
    assert login.authorization == f"Basic {encoded('u:p')}"
    assert "account=u" in login.query
    traded = token_request(challenge, "x", Credentials(identity_token="t"))
    assert (traded.method, traded.query, traded.authorization) == ("POST", "", "")
    assert "refresh_token=t" in traded.form


def test_tokens_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    cache = TokenCache()
    key = TokenKey("https://a", "x", None)
    token = read_token(b'{"access_token": "abc", "expires_in": 120}')
    assert token is not None
    cache.put(key, token)
    assert cache.get(key) == "Bearer abc"
    assert cache.get(TokenKey("https://a", "x", Credentials("u", "p"))) == ""
    now += 111
    assert cache.get(key) == ""
    short = read_token(b'{"token": "a", "expires_in": 1}')
    assert short is not None
    assert short.expires == now + 50
    for number in range(1500):
        cache.put(TokenKey(f"https://{number}", "x", None), Authorization("h", now + 50))
    assert cache.get(TokenKey("https://0", "x", None)) == ""
    assert cache.get(TokenKey("https://1499", "x", None)) == "h"


# -- proxies and the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "direct"),
    [
        ("", "reg.test", 443, False),
        ("", "127.0.0.1", 5000, True),
        ("", "localhost", 5000, True),
        ("", "[::1]", 5000, True),
        ("*", "reg.test", 443, True),
        ("reg.test", "reg.test", 443, True),
        ("REG.test", "reg.TEST", 443, True),
        ("reg.test", "a.reg.test", 443, True),
        ("reg.test", "areg.test", 443, False),
        (".reg.test", "a.reg.test", 443, True),
        (".reg.test", "reg.test", 443, False),
        ("*.reg.test", "a.reg.test", 443, True),
        ("x, reg.test:5000", "reg.test", 5000, True),
        ("reg.test:5000", "reg.test", 443, False),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("10.0.0.0/8", "reg.test", 443, False),
        ("10.1.2.3", "10.1.2.3", 443, True),
        ("fd00::/8", "[fd00::1]", 443, True),
        ("fd00::1", "fd00::1", 443, True),
        ("bad/net", "10.1.2.3", 443, False),
    ],
)
def test_no_proxy_names_hosts_addresses_and_networks(
    no_proxy: str, host: str, port: int, direct: bool
) -> None:
    found = proxies.from_environment({"HTTPS_PROXY": "proxy.test:3128", "no_proxy": no_proxy})
    assert found.proxy_for("https", host, port) == ("" if direct else "http://proxy.test:3128")
    assert found.proxy_for("http", host, port) == ""


@pytest.mark.parametrize("proxy", ["socks5://u:s3cret@x:1", "http://", "http://[", "http://x:port"])
def test_a_proxy_that_is_none_is_told_without_its_password(proxy: str) -> None:
    found = proxies.from_environment({"https_proxy": proxy})
    with pytest.raises(RemoteError, match="HTTPS_PROXY is not") as caught:
        found.proxy_for("https", "reg.test", 443)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert "s3cret" not in caught.value.text


def test_only_waiting_without_bytes_is_a_stall() -> None:
    guard = StallGuard(10.0)
    assert all(guard.count(STALL_BYTES, 9.9) for _ in range(5))
    assert guard.count(1, 9.0)
    assert not guard.count(STALL_BYTES - 2, 1.1)


def test_errors_of_all_endpoints_make_one_sentence() -> None:
    first = refused("mirror.test/x", 404, b"", "")
    last = refused("reg.test/x", 503, b"no json", "7")
    assert (last.transient, last.retry_after) == (True, 7.0)
    assert last.delay(1) >= 7.0
    error = combine("cannot resolve x", [first, last])
    assert (error.code, error.reason) == (Code.UNAVAILABLE, "RegistryUnavailable")
    assert error.text == (
        "cannot resolve x: mirror.test/x: not found, HTTP 404; "
        "reg.test/x: it cannot serve the request, HTTP 503"
    )
    assert not refused("x", 429, b"", "61").transient
    assert refused("x", 429, b"", "Wed, 21 Oct 2026 07:28:00 GMT").retry_after is None
    assert Failure(Code.UNAVAILABLE, "x").delay(50) < 20
