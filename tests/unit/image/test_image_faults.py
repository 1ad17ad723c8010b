"""What registries do wrong, and what the client makes of it: retried, resumed, or refused with a sentence."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages.image import Auth
from tests.support.fault_registry import (
    Behaviour,
    FaultRegistry,
    answering,
    chunked,
    head,
    redirecting,
    saying,
)
from tests.support.image_client import Pipe, blob_request, download, make_settings, pull, tools_of
from tests.support.registry import (
    Authority,
    Layer,
    digest_of,
    insecure_registries,
    make_image,
    make_index,
)
from workers.image.blobs import Sink, fetch
from workers.image.client import Tools
from workers.image.operation import Cancelled, Operation

_BYTES = random.Random(1).randbytes(600_000)
LAYER = Layer(_BYTES, digest_of(_BYTES), "")
IMAGE = make_image([LAYER])
CREDENTIALS = Auth(username="user", password="s3cret-word")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.image.failures._FIRST_DELAY", 0.01)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[FaultRegistry]:
    with FaultRegistry(IMAGE) as server:
        insecure_registries(tmp_path / "registries.conf", server.address)
        yield server


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return tools_of(make_settings(tmp_path, read_timeout=0.5))


def name_on(server: FaultRegistry) -> str:
    return f"{server.address}/test/image:1"


def get_blob(server: FaultRegistry, tools: Tools, auth: Auth | None = None) -> bytes:
    found = pull(tools, name_on(server), auth=auth)
    return download(tools, blob_request(found, found.layers[0], auth))


# -- blobs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_where_it_broke(
    registry: FaultRegistry, tools: Tools, ranges: bool
) -> None:
    registry.ranges = ranges
    registry.on(LAYER.digest, *(registry.breaking(after) for after in (100_000, 0, 150_000, 400_000)))
    assert get_blob(registry, tools) == LAYER.data
    asked = [seen.headers.get("Range") for seen in registry.seen if seen.path.endswith(LAYER.digest)]
    assert asked[0] is None
    assert asked[1] == asked[2] == "bytes=100000-"
    assert len(asked) == (4 if ranges else 5)


def test_a_blob_that_changes_between_two_readings_is_data_loss(registry: FaultRegistry, tools: Tools) -> None:
    registry.ranges = False
    other = b"x" + LAYER.data[1:]
    registry.on(LAYER.digest, registry.breaking(100_000), saying(other))
    with pytest.raises(RemoteError, match="differs from the first") as caught:
        get_blob(registry, tools)
    assert caught.value.code is Code.DATA_LOSS


def test_a_part_that_was_not_asked_for_is_refused(registry: FaultRegistry, tools: Tools) -> None:
    rest = LAYER.data[50_000:]
    wrong = answering(206, {"Content-Range": f"bytes 50000-599999/{len(LAYER.data)}"}, rest)
    registry.on(LAYER.digest, registry.breaking(100_000), wrong)
    with pytest.raises(RemoteError, match="asked for byte 100000, got byte 50000"):
        get_blob(registry, tools)


def test_a_wrong_digest_is_data_loss(registry: FaultRegistry, tools: Tools) -> None:
    registry.on(LAYER.digest, saying(b"x" + LAYER.data[1:]))
    with pytest.raises(RemoteError, match=r"the digest is sha256:.*, it should be") as caught:
        get_blob(registry, tools)
    assert caught.value.code is Code.DATA_LOSS
    assert registry.address in caught.value.text


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        (saying(LAYER.data[:-1]), "has 599999 bytes, it should have 600000"),
        (saying(LAYER.data + b"x"), "has 600001 bytes, it should have 600000"),
        (chunked(lambda data: data + b"x"), "longer than its 600000 bytes"),
        (chunked(lambda data: data[:-1]), "ended at byte 599999 of 600000"),
    ],
)
def test_a_lying_size_is_data_loss(
    registry: FaultRegistry, tools: Tools, behaviour: Behaviour, sentence: str
) -> None:
    registry.on(LAYER.digest, behaviour)
    with pytest.raises(RemoteError, match=sentence) as caught:
        get_blob(registry, tools)
    assert caught.value.code is Code.DATA_LOSS


def test_a_body_without_length_is_taken(registry: FaultRegistry, tools: Tools) -> None:
    registry.on(LAYER.digest, chunked())
    assert get_blob(registry, tools) == LAYER.data


def test_overload_and_errors_of_the_server_are_waited_out(registry: FaultRegistry, tools: Tools) -> None:
    registry.on(LAYER.digest, answering(503), answering(429, {"Retry-After": "0"}), answering(500))
    registry.on("/manifests/1", answering(502), answering(429))
    assert get_blob(registry, tools) == LAYER.data


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (500, Code.UNAVAILABLE, "RegistryUnavailable"),
        (503, Code.UNAVAILABLE, "RegistryUnavailable"),
        (429, Code.RESOURCE_EXHAUSTED, ""),
        (403, Code.PERMISSION_DENIED, ""),
        (401, Code.UNAUTHENTICATED, ""),
        (404, Code.NOT_FOUND, ""),
        (400, Code.INVALID_ARGUMENT, ""),
        (418, Code.UNAVAILABLE, "RegistryUnavailable"),
    ],
)
def test_statuses_have_codes(
    registry: FaultRegistry, tools: Tools, status: int, code: Code, reason: str
) -> None:
    body = json.dumps({"errors": [{"code": "SOME_CODE", "message": "some\u001bwords"}]}).encode()
    for path in ("/manifests/1", LAYER.digest):
        found = None if path.startswith("/") else pull(tools, name_on(registry))
        registry.always(path, answering(status, {}, body))
        with pytest.raises(RemoteError) as caught:
            if found is None:
                pull(tools, name_on(registry))
            else:
                download(tools, blob_request(found, found.layers[0]))
        assert (caught.value.code, caught.value.reason) == (code, reason)
        assert registry.address in caught.value.text
        assert "\x1b" not in caught.value.text
        if status != 401:
            assert "SOME_CODE: somewords" in caught.value.text
        registry.always(path, registry.well)


def test_a_registry_that_asks_for_a_long_wait_is_not_waited_for(
    registry: FaultRegistry, tools: Tools
) -> None:
    registry.always("/manifests/1", answering(429, {"Retry-After": "3600"}))
    begun = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        pull(tools, name_on(registry))
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("kind", ["hanging", "dripping"])
def test_a_stalled_transfer_is_given_up_and_taken_up_again(
    registry: FaultRegistry, tools: Tools, kind: str
) -> None:
    stalled = registry.hanging(100) if kind == "hanging" else registry.dripping(0.05)
    registry.on(LAYER.digest, stalled)
    assert get_blob(registry, tools) == LAYER.data


def test_a_registry_that_never_answers_is_unavailable(registry: FaultRegistry, tools: Tools) -> None:
    registry.always("/manifests/1", registry.silent)
    with pytest.raises(RemoteError, match="no answer in time") as caught:
        pull(tools, name_on(registry))
    assert caught.value.reason == "RegistryUnavailable"


def test_a_refused_connection_and_an_unknown_name_are_unavailable(tmp_path: Path) -> None:
    for host, sentence in [("127.0.0.1:1", "Connection refused"), ("nowhere.invalid", "cannot resolve")]:
        with pytest.raises(RemoteError, match=sentence) as caught:
            pull(tools_of(make_settings(tmp_path)), f"{host}/test/image:1")
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "RegistryUnavailable")
        assert host in caught.value.text


# -- the pipe ---------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_ends_the_download(registry: FaultRegistry, tools: Tools) -> None:
    found = pull(tools, name_on(registry))
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    null_fd = os.open(os.devnull, os.O_WRONLY)
    sink = Sink(write_fd, null_fd)
    with pytest.raises(RemoteError, match="the unpacker went away") as caught:
        fetch(tools, Operation(), blob_request(found, found.layers[0]), sink, lambda _bytes: None)
    assert caught.value.code is Code.UNAVAILABLE
    sink.close()
    os.close(null_fd)


@pytest.mark.parametrize("where", ["network", "pipe", "sleep"])
def test_a_cancelled_download_ends_at_once(registry: FaultRegistry, tools: Tools, where: str) -> None:
    found = pull(tools, name_on(registry))
    if where == "network":
        registry.on(LAYER.digest, registry.hanging(1000))
    if where == "sleep":
        registry.on(LAYER.digest, answering(429, {"Retry-After": "50"}))
    operation = Operation()
    read_fd, write_fd = os.pipe()  # nobody reads
    null_fd = os.open(os.devnull, os.O_WRONLY)
    sink = Sink(write_fd, null_fd)
    if where == "pipe":
        os.write(write_fd, b"x" * 1_000_000)
    ended: list[BaseException] = []

    def work() -> None:
        try:
            fetch(tools, operation, blob_request(found, found.layers[0]), sink, lambda _bytes: None)
        except (Cancelled, RemoteError) as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    begun = time.monotonic()
    operation.cancel()
    sink.abandon()
    thread.join(5)
    assert time.monotonic() - begun < 1.0
    assert [type(error) for error in ended] == [Cancelled]
    while os.read(read_fd, 1 << 20):
        pass  # the pipe is at its end although the descriptor is still open
    sink.close()
    os.close(read_fd)
    os.close(null_fd)


def test_progress_is_reported_and_not_too_often(registry: FaultRegistry, tools: Tools) -> None:
    def slowly(handler: object, data: bytes) -> None:
        head(handler, 200, len(data))  # type: ignore[arg-type]  # the handler of the server
        for start in range(0, len(data), 6000):
            handler.wfile.write(data[start : start + 6000])  # type: ignore[attr-defined]  # as above
            time.sleep(0.008)

    found = pull(tools, name_on(registry))
    registry.on(LAYER.digest, slowly)
    pipe, null_fd, told = Pipe(), os.open(os.devnull, os.O_WRONLY), list[int]()
    sink = Sink(pipe.write_fd, null_fd)
    begun = time.monotonic()
    fetch(tools, Operation(), blob_request(found, found.layers[0]), sink, told.append)
    took = time.monotonic() - begun
    sink.close()
    os.close(null_fd)
    assert pipe.data() == LAYER.data
    assert told == sorted(told)
    assert 2 <= len(told) <= took * 5 + 1


# -- manifests --------------------------------------------------------------------------------------------


def test_a_huge_manifest_is_refused_before_it_is_read(registry: FaultRegistry, tools: Tools) -> None:
    huge = b" " * (1 << 20) + b"{}"
    for behaviour in (saying(huge), chunked(lambda _data: huge)):
        registry.on("/manifests/1", behaviour)
        with pytest.raises(RemoteError, match="larger than the limit of 1048576 bytes") as caught:
            pull(tools, name_on(registry))
        assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_manifest_must_have_the_digest_that_the_header_names(registry: FaultRegistry, tools: Tools) -> None:
    right = {"Docker-Content-Digest": IMAGE.digest}
    registry.on("/manifests/1", saying(IMAGE.manifest, right))
    assert pull(tools, name_on(registry)).manifest_digest == IMAGE.digest
    registry.on("/manifests/1", saying(IMAGE.manifest + b" ", right))
    with pytest.raises(RemoteError, match="the digest is") as caught:
        pull(tools, name_on(registry))
    assert caught.value.code is Code.DATA_LOSS


def test_a_manifest_by_digest_must_have_that_digest(registry: FaultRegistry, tools: Tools) -> None:
    registry.on(IMAGE.digest, saying(IMAGE.manifest + b" "))
    with pytest.raises(RemoteError, match="the digest is") as caught:
        pull(tools, f"{registry.address}/test/image@{IMAGE.digest}")
    assert caught.value.code is Code.DATA_LOSS


def test_a_config_must_have_its_digest_and_size(registry: FaultRegistry, tools: Tools) -> None:
    for body in (IMAGE.config[:-1], IMAGE.config + b" ", IMAGE.config.replace(b"linux", b"Linux")):
        registry.on(IMAGE.image_id, saying(body))
        with pytest.raises(RemoteError, match="it should") as caught:
            pull(tools, name_on(registry))
        assert caught.value.code is Code.DATA_LOSS


def test_an_index_that_lies_about_a_manifest_is_refused(tmp_path: Path, tools: Tools) -> None:
    index = make_index({("linux", "amd64", ""): IMAGE})
    lying = json.loads(index.manifest)
    lying["manifests"][0]["size"] += 1
    with FaultRegistry(index) as server:
        insecure_registries(tmp_path / "registries.conf", server.address)
        server.on("/manifests/1", saying(json.dumps(lying).encode()))
        with pytest.raises(RemoteError, match="bytes, it should have") as caught:
            pull(tools, name_on(server), architecture="amd64")
        assert caught.value.code is Code.DATA_LOSS
        assert pull(tools, name_on(server), architecture="amd64").manifest_digest == IMAGE.digest


def test_an_image_for_another_system_is_refused(tmp_path: Path, tools: Tools) -> None:
    with FaultRegistry(make_image([LAYER], os="windows")) as server:
        insecure_registries(tmp_path / "registries.conf", server.address)
        with pytest.raises(RemoteError, match="the image is for windows"):
            pull(tools, name_on(server))


# -- redirects and secrets --------------------------------------------------------------------------------


def basic_login(registry: FaultRegistry) -> None:
    """Make the registry want basic credentials for everything."""
    right = "Basic " + base64.b64encode(b"user:s3cret-word").decode()

    def behave(handler: object, data: bytes) -> None:
        if handler.headers.get("Authorization") == right:  # type: ignore[attr-defined]  # the server's handler
            registry.well(handler, data)  # type: ignore[arg-type]  # as above
        else:
            answering(401, {"WWW-Authenticate": 'Basic realm="tests"'})(handler, data)  # type: ignore[arg-type]  # as above

    registry.always("", behave)


def test_a_redirect_to_another_port_gets_no_credentials(registry: FaultRegistry, tools: Tools) -> None:
    basic_login(registry)
    with FaultRegistry(IMAGE) as store:
        registry.on(LAYER.digest, redirecting(f"{store.url}{{path}}?signature=s1gned"))
        assert get_blob(registry, tools, CREDENTIALS) == LAYER.data
        assert [seen.path.partition("?")[2] for seen in store.seen] == ["signature=s1gned"]
        assert all("Authorization" not in seen.headers for seen in store.seen)
        assert registry.seen[-1].headers["Authorization"].startswith("Basic ")


def test_a_redirect_within_the_registry_keeps_them(registry: FaultRegistry, tools: Tools) -> None:
    basic_login(registry)
    pull(tools, name_on(registry), auth=CREDENTIALS)  # the login is known from now on
    registry.on("/manifests/1", redirecting("/v2/test/other/manifests/1"))
    pull(tools, name_on(registry), auth=CREDENTIALS)
    assert "/v2/test/other/manifests/1" in registry.paths()
    assert registry.seen[-1].headers["Authorization"].startswith("Basic ")


def test_a_redirect_back_over_another_host_gets_none(registry: FaultRegistry, tools: Tools) -> None:
    basic_login(registry)
    found = pull(tools, name_on(registry), auth=CREDENTIALS)
    with FaultRegistry(IMAGE) as store:
        store.always("", redirecting(f"{registry.url}/back"))
        registry.on(LAYER.digest, redirecting(f"{store.url}{{path}}"))
        with pytest.raises(RemoteError, match="redirected"):
            download(tools, blob_request(found, found.layers[0], CREDENTIALS))
    assert registry.seen[-1].path == "/back"
    assert "Authorization" not in registry.seen[-1].headers


def test_a_login_is_not_given_to_where_a_redirect_leads(registry: FaultRegistry, tools: Tools) -> None:
    with FaultRegistry(IMAGE) as store:
        store.always("", answering(401, {"WWW-Authenticate": 'Basic realm="x"'}))
        registry.on(LAYER.digest, redirecting(f"{store.url}{{path}}"))
        with pytest.raises(RemoteError, match="redirected to") as caught:
            get_blob(registry, tools, CREDENTIALS)
        assert caught.value.code is Code.UNAUTHENTICATED
        assert len(store.seen) == 1
        assert "Authorization" not in store.seen[0].headers


def test_a_circle_of_redirects_ends(registry: FaultRegistry, tools: Tools) -> None:
    registry.always("/manifests/1", redirecting("{path}"))
    with pytest.raises(RemoteError, match="more than 10 redirects"):
        pull(tools, name_on(registry))
    assert len(registry.seen) == 11


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://user:pw@127.0.0.1/x", "http://["]
)
def test_a_redirect_to_anything_but_http_is_refused(
    registry: FaultRegistry, tools: Tools, target: str
) -> None:
    registry.on("/manifests/1", redirecting(target))
    with pytest.raises(RemoteError, match="redirects, but") as caught:
        pull(tools, name_on(registry))
    assert "pw" not in caught.value.text


def test_https_is_not_left_for_plain_http(tmp_path: Path, tools: Tools) -> None:
    authority = Authority(tmp_path / "ca")
    with FaultRegistry(IMAGE, tls=authority.issue("server")) as server, FaultRegistry(IMAGE) as store:
        directory = tmp_path / "certs.d" / server.address
        directory.mkdir(parents=True)
        (directory / "ca.crt").write_bytes(authority.certificate.read_bytes())
        server.always(LAYER.digest, redirecting(f"{store.url}{{path}}?signature=s1gned"))
        with pytest.raises(RemoteError, match="redirects to plain HTTP") as caught:
            get_blob(server, tools)
        assert "s1gned" not in caught.value.text
        assert not store.seen
        (directory / "ca.crt").unlink()
        insecure_registries(tmp_path / "registries.conf", server.address)
        assert get_blob(server, tools) == LAYER.data


@pytest.mark.parametrize("realm", ["http://127.0.0.2:1/token", "ftp://x/", "", "http://u:p@127.0.0.1/"])
def test_credentials_do_not_go_to_a_token_server_over_plain_http(
    registry: FaultRegistry, tools: Tools, realm: str
) -> None:
    challenge = f'Bearer realm="{realm}",service="s",scope="repository:test/image:pull"'
    registry.always("", answering(401, {"WWW-Authenticate": challenge}))
    with pytest.raises(RemoteError, match="token server") as caught:
        pull(tools, name_on(registry), auth=CREDENTIALS)
    assert caught.value.code is Code.UNAUTHENTICATED


@pytest.mark.parametrize("body", [b"{}", b"no json", b'{"token": "a\\nb"}', b'{"token": 1}'])
def test_a_token_server_without_a_token_is_told(registry: FaultRegistry, tools: Tools, body: bytes) -> None:
    challenge = f'Bearer realm="{registry.url}/token"'
    registry.always("/token", saying(body))
    registry.always("", answering(401, {"WWW-Authenticate": challenge}))
    with pytest.raises(RemoteError, match="answered without a token") as caught:
        pull(tools, name_on(registry), auth=CREDENTIALS)
    assert "s3cret-word" not in caught.value.text


def test_errors_never_show_credentials(registry: FaultRegistry, tools: Tools) -> None:
    challenge = f'Bearer realm="{registry.url}/token"'
    registry.always("/token", answering(401))
    registry.always("", answering(401, {"WWW-Authenticate": challenge}))
    for auth in (CREDENTIALS, Auth(identity_token="s3cret-word"), Auth(registry_token="s3cret-word")):
        with pytest.raises(RemoteError) as caught:
            pull(tools, name_on(registry), auth=auth)
        assert "s3cret-word" not in caught.value.text
        assert "s3cret-word" not in repr(auth)


def test_credentials_of_the_request_do_not_go_to_a_mirror(
    registry: FaultRegistry, tools: Tools, tmp_path: Path
) -> None:
    basic_login(registry)
    with FaultRegistry(IMAGE) as mirror:
        challenge = {"WWW-Authenticate": 'Basic realm="x"'}
        mirror.always("", answering(401, challenge))
        mirror_table = f'[[registry.mirror]]\nlocation = "{mirror.address}/x"\ninsecure = true\n'
        insecure_registries(tmp_path / "registries.conf", registry.address, more=mirror_table)
        assert get_blob(registry, tools, CREDENTIALS) == LAYER.data
        assert mirror.seen
        assert all("Authorization" not in seen.headers for seen in mirror.seen)
        named = Auth(username="user", password="s3cret-word", server_address=mirror.address)
        with pytest.raises(RemoteError):
            pull(tools, name_on(registry), auth=named)
        assert "Authorization" in mirror.seen[-1].headers


# -- foreign layers ---------------------------------------------------------------------------------------


def foreign_image(url: str) -> tuple[bytes, Layer]:
    document = json.loads(IMAGE.manifest)
    document["layers"][0]["urls"] = [url]
    return json.dumps(document).encode(), LAYER


def test_a_foreign_layer_comes_from_its_url_without_credentials(
    registry: FaultRegistry, tools: Tools, tmp_path: Path
) -> None:
    basic_login(registry)
    authority = Authority(tmp_path / "ca")
    with FaultRegistry(IMAGE, tls=authority.issue("server")) as store:
        directory = tmp_path / "certs.d" / store.address
        directory.mkdir(parents=True)
        (directory / "ca.crt").write_bytes(authority.certificate.read_bytes())
        manifest, layer = foreign_image(f"{store.url}/some/{LAYER.digest}")
        registry.on("/manifests/1", answering(401, {"WWW-Authenticate": "Basic"}), saying(manifest))
        found = pull(tools, name_on(registry), auth=CREDENTIALS)
        registry.on(layer.digest, answering(404), answering(404))
        assert download(tools, blob_request(found, found.layers[0], CREDENTIALS)) == layer.data
        assert all("Authorization" not in seen.headers for seen in store.seen)
        store.always("", answering(401, {"WWW-Authenticate": "Basic"}))
        with pytest.raises(RemoteError):
            download(tools, blob_request(found, found.layers[0], CREDENTIALS))
        assert all("Authorization" not in seen.headers for seen in store.seen)


def test_a_foreign_layer_over_plain_http_is_refused(registry: FaultRegistry, tools: Tools) -> None:
    with FaultRegistry(IMAGE) as store:
        manifest, layer = foreign_image(f"{store.url}/some/{LAYER.digest}")
        registry.on("/manifests/1", saying(manifest))
        registry.always(layer.digest, answering(404))
        with pytest.raises(RemoteError, match="url is plain HTTP"):
            get_blob(registry, tools)
        assert not store.seen


# -- blocked and listed -----------------------------------------------------------------------------------


def test_a_blocked_registry_is_not_asked(registry: FaultRegistry, tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "registries.conf").write_text(
        f'[[registry]]\nlocation = "{registry.address}"\nblocked = true\n'
    )
    with pytest.raises(RemoteError, match="blocked") as caught:
        pull(tools, name_on(registry))
    assert caught.value.code is Code.PERMISSION_DENIED
    assert not registry.seen


def test_all_endpoints_are_named_when_all_fail(tmp_path: Path, tools: Tools) -> None:
    (tmp_path / "registries.conf").write_text(
        '[[registry]]\nlocation = "127.0.0.1:1"\n[[registry.mirror]]\nlocation = "127.0.0.1:2/cache"\n'
    )
    with pytest.raises(RemoteError) as caught:
        pull(tools, "127.0.0.1:1/test/image:1")
    assert re.search(r"127\.0\.0\.1:2.*; .*127\.0\.0\.1:1", caught.value.text)


def test_attempts_are_limited(registry: FaultRegistry, tools: Tools) -> None:
    registry.always("/manifests/1", answering(500))
    with pytest.raises(RemoteError):
        pull(tools, name_on(registry))
    assert len(registry.seen) == 1 + 3
