"""The registry client against Debian's docker-registry: TLS, certificates, basic and token login."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages.image import Auth
from tests.support.image_client import blob_request, download, make_settings, pull, tools_of
from tests.support.registry import (
    Authority,
    Image,
    Registry,
    TokenServer,
    insecure_registries,
    make_image,
    make_index,
    make_layer,
    push,
)
from workers.image.client import Tools

LAYERS = [
    make_layer({"etc/": b"", "etc/one": b"one\n" * 1000}, compression="gzip"),
    make_layer({"etc/two": b"two\n" * 1000}, compression="zstd"),
    make_layer({"etc/three": b"three\n" * 1000}, compression=""),
]
IMAGE = make_image(LAYERS, config={"Cmd": ["/bin/true"]})


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as registry:
        insecure_registries(tmp_path / "registries.conf", registry.address)
        yield registry


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return tools_of(make_settings(tmp_path))


@pytest.mark.parametrize("docker", [False, True])
def test_an_image_comes_whole_in_both_formats(plain: Registry, tools: Tools, docker: bool) -> None:
    image = make_image(LAYERS if not docker else LAYERS[:1], docker=docker)
    digest = push(plain, "test/image", "1", image)
    found = pull(tools, f"{plain.address}/test/image:1")
    assert found.name == f"{plain.address}/test/image:1"
    assert found.repo_digest == f"{plain.address}/test/image@{digest}"
    assert (found.manifest, found.manifest_digest) == (image.manifest, digest)
    assert (found.config, found.config_digest) == (image.config, image.image_id)
    assert found.manifest_media_type == image.media_type
    assert [layer.diff_id for layer in found.layers] == [layer.diff_id for layer in image.layers]
    for layer, made in zip(found.layers, image.layers, strict=True):
        assert download(tools, blob_request(found, layer)) == made.data


def test_a_digest_alone_gives_no_name(plain: Registry, tools: Tools) -> None:
    digest = push(plain, "test/image", "1", IMAGE)
    found = pull(tools, f"{plain.address}/test/image@{digest}")
    assert found.name == ""
    assert found.repo_digest.endswith(f"@{digest}")
    both = pull(tools, f"{plain.address}/test/image:other@{digest}")
    assert both.name == f"{plain.address}/test/image:other"


@pytest.mark.parametrize("docker", [False, True])
def test_an_index_gives_the_image_of_the_platform(plain: Registry, tools: Tools, docker: bool) -> None:
    images: dict[tuple[str, str, str], Image] = {
        ("linux", architecture, variant): make_image(
            [make_layer({"name": f"{architecture}{variant}".encode()})],
            architecture=architecture,
            docker=docker,
        )
        for architecture, variant in [("amd64", ""), ("arm64", "v8"), ("arm", "v6"), ("arm", "v7")]
    }
    digest = push(plain, "test/index", "1", make_index(images, docker=docker))
    for (_, architecture, variant), image in images.items():
        found = pull(tools, f"{plain.address}/test/index:1", architecture=architecture, variant=variant)
        assert found.manifest_digest == image.digest
        assert found.repo_digest == f"{plain.address}/test/index@{digest}"
    with pytest.raises(RemoteError, match="no image for linux/s390x, only for") as caught:
        pull(tools, f"{plain.address}/test/index:1", architecture="s390x")
    assert caught.value.code is Code.NOT_FOUND


def test_unknown_tags_and_repositories_are_not_found(plain: Registry, tools: Tools) -> None:
    push(plain, "test/image", "1", IMAGE)
    for name in ("test/image:2", "test/nothing:1", f"test/image@sha256:{'0' * 64}"):
        with pytest.raises(RemoteError, match="not found") as caught:
            pull(tools, f"{plain.address}/{name}")
        assert caught.value.code is Code.NOT_FOUND
        assert f"{plain.address}/{name}" in caught.value.text


def test_plain_http_is_refused_where_nothing_allows_it(plain: Registry, tmp_path: Path) -> None:
    push(plain, "test/image", "1", IMAGE)
    (tmp_path / "registries.conf").unlink()
    with pytest.raises(RemoteError, match="TLS failed") as caught:
        pull(tools_of(make_settings(tmp_path)), f"{plain.address}/test/image:1")
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "RegistryUnavailable")


def test_tls_needs_a_trusted_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    settings = make_settings(tmp_path)
    with Registry(tmp_path / "registry", tls=authority.issue("server")) as registry:
        push(registry, "test/image", "1", IMAGE)
        name = f"{registry.address}/test/image:1"
        with pytest.raises(RemoteError, match=r"TLS failed.*issuer") as caught:
            pull(tools_of(settings), name)
        assert caught.value.reason == "RegistryUnavailable"
        directory = tmp_path / "certs.d" / registry.address
        directory.mkdir(parents=True)
        tools = tools_of(settings)
        shutil.copy(authority.certificate, directory / "ca.crt")
        found = pull(tools, name)
        assert download(tools, blob_request(found, found.layers[0])) == LAYERS[0].data
        (directory / "ca.crt").unlink()
        with pytest.raises(RemoteError, match="TLS failed"):
            pull(tools, name)  # the change is seen without a restart
        insecure_registries(tmp_path / "registries.conf", registry.address)
        assert pull(tools, name).config == IMAGE.config


def test_a_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with Registry(tmp_path / "registry", tls=authority.issue("server", "DNS:elsewhere.test")) as registry:
        directory = tmp_path / "certs.d" / registry.address
        directory.mkdir(parents=True)
        shutil.copy(authority.certificate, directory / "ca.crt")
        with pytest.raises(RemoteError, match=r"TLS failed.*IP address mismatch"):
            pull(tools_of(make_settings(tmp_path)), f"{registry.address}/test/image:1")


def test_client_certificates_come_from_certs_d(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    client = authority.issue("client")
    tls = authority.issue("server")
    with Registry(tmp_path / "registry", tls=tls, client_ca=authority.certificate) as registry:
        push(registry, "test/image", "1", IMAGE, client=client)
        directory = tmp_path / "certs.d" / registry.address
        directory.mkdir(parents=True)
        shutil.copy(authority.certificate, directory / "ca.crt")
        tools = tools_of(make_settings(tmp_path, retries=0))
        with pytest.raises(RemoteError):
            pull(tools, f"{registry.address}/test/image:1")
        shutil.copy(client.certificate, directory / "client.cert")
        with pytest.raises(RemoteError, match=r"client\.cert has no key") as caught:
            pull(tools, f"{registry.address}/test/image:1")
        assert caught.value.code is Code.FAILED_PRECONDITION
        shutil.copy(client.key, directory / "client.key")
        assert pull(tools, f"{registry.address}/test/image:1").config == IMAGE.config


AUTHS = [
    Auth(username="user", password="secret:1"),
    Auth(auth=base64.b64encode(b"user:secret:1").decode()),
]


@pytest.mark.parametrize("auth", AUTHS)
def test_basic_login_of_the_request(tmp_path: Path, auth: Auth) -> None:
    with Registry(tmp_path / "registry", users={"user": "secret:1"}) as registry:
        push(registry, "test/image", "1", IMAGE)
        insecure_registries(tmp_path / "registries.conf", registry.address)
        tools = tools_of(make_settings(tmp_path))
        found = pull(tools, f"{registry.address}/test/image:1", auth=auth)
        assert "secret" not in found.source
        assert download(tools, blob_request(found, found.layers[0], auth)) == LAYERS[0].data
        for wrong, sentence in [
            (None, "there are no credentials"),
            (Auth(username="user", password="wrong"), "wants other credentials"),
        ]:
            with pytest.raises(RemoteError, match=sentence) as caught:
                pull(tools, f"{registry.address}/test/image:1", auth=wrong)
            assert caught.value.code is Code.UNAUTHENTICATED
            assert "wrong" not in caught.value.text
            with pytest.raises(RemoteError, match=sentence):
                download(tools, blob_request(found, found.layers[0], wrong))


def test_basic_login_of_the_auth_file_by_longest_key(tmp_path: Path) -> None:
    with Registry(tmp_path / "registry", users={"user": "secret"}) as registry:
        push(registry, "team/app/image", "1", IMAGE)
        insecure_registries(tmp_path / "registries.conf", registry.address)
        path = tmp_path / "auth.json"
        right, wrong = (
            {"auth": base64.b64encode(f"user:{word}".encode()).decode()} for word in ("secret", "no")
        )
        tools = tools_of(make_settings(tmp_path, auth_file=path))
        name = f"{registry.address}/team/app/image:1"
        with pytest.raises(RemoteError, match="there are no credentials"):
            pull(tools, name)  # a missing file is an empty one
        path.write_text(json.dumps({"auths": {registry.address: wrong, f"{registry.address}/team": right}}))
        assert pull(tools, name).config == IMAGE.config
        path.write_text(
            json.dumps({"auths": {f"{registry.address}/team/app": wrong, registry.address: right}})
        )
        with pytest.raises(RemoteError, match="wants other credentials"):
            pull(tools, name)


@pytest.fixture
def token_server(tmp_path: Path) -> Iterator[TokenServer]:
    with TokenServer(tmp_path / "tokens", username="user", password="secret") as server:
        yield server


def test_token_login_asks_once_for_many_requests(tmp_path: Path, token_server: TokenServer) -> None:
    with Registry(tmp_path / "registry", tokens=token_server) as registry:
        push(registry, "test/image", "1", IMAGE)
        insecure_registries(tmp_path / "registries.conf", registry.address)
        tools = tools_of(make_settings(tmp_path))
        auth = Auth(username="user", password="secret")
        found = pull(tools, f"{registry.address}/test/image:1", auth=auth)
        for layer in found.layers:
            download(tools, blob_request(found, layer, auth))
        assert len(token_server.requests) == 1
        method, parameters, _ = token_server.requests[0]
        assert method == "GET"
        assert parameters == {
            "service": TokenServer.SERVICE,
            "scope": "repository:test/image:pull",
            "account": "user",
        }


def test_token_login_without_or_with_wrong_credentials(tmp_path: Path, token_server: TokenServer) -> None:
    with Registry(tmp_path / "registry", tokens=token_server) as registry:
        push(registry, "test/image", "1", IMAGE)
        insecure_registries(tmp_path / "registries.conf", registry.address)
        tools = tools_of(make_settings(tmp_path))
        right = Auth(username="user", password="secret")
        pull(tools, f"{registry.address}/test/image:1", auth=right)
        for auth in (None, Auth(username="user", password="wrong")):
            with pytest.raises(RemoteError, match=r"the token server .* refused") as caught:
                pull(tools, f"{registry.address}/test/image:1", auth=auth)  # nobody gets another's token
            assert caught.value.code is Code.UNAUTHENTICATED


def test_identity_and_registry_tokens(tmp_path: Path, token_server: TokenServer) -> None:
    with Registry(tmp_path / "registry", tokens=token_server) as registry:
        push(registry, "test/image", "1", IMAGE)
        insecure_registries(tmp_path / "registries.conf", registry.address)
        tools = tools_of(make_settings(tmp_path))
        name = f"{registry.address}/test/image:1"
        identity = token_server.identity_token
        assert pull(tools, name, auth=Auth(identity_token=identity)).config == IMAGE.config
        method, parameters, _ = token_server.requests[-1]
        assert (method, parameters["grant_type"]) == ("POST", "refresh_token")
        asked = len(token_server.requests)
        bearer = token_server.token("repository:test/image:pull")
        assert pull(tools, name, auth=Auth(registry_token=bearer)).config == IMAGE.config
        with pytest.raises(RemoteError, match="the registry token was refused") as caught:
            pull(tools, name, auth=Auth(registry_token="wrong"))
        assert caught.value.code is Code.UNAUTHENTICATED
        assert len(token_server.requests) == asked


def test_an_expired_token_is_fetched_anew(tmp_path: Path, token_server: TokenServer) -> None:
    token_server.expires_in = 1  # the registry's clock; we are told 60 at least
    with Registry(tmp_path / "registry", tokens=token_server) as registry:
        push(registry, "test/image", "1", IMAGE)
        insecure_registries(tmp_path / "registries.conf", registry.address)
        tools = tools_of(make_settings(tmp_path))
        auth = Auth(username="user", password="secret")
        for _ in range(2):
            assert pull(tools, f"{registry.address}/test/image:1", auth=auth).config == IMAGE.config


def test_a_mirror_is_asked_first_and_the_registry_fills_its_gaps(tmp_path: Path) -> None:
    with Registry(tmp_path / "one") as mirror, Registry(tmp_path / "two") as origin:
        push(mirror, "cache/test/image", "1", IMAGE)
        push(origin, "test/image", "1", IMAGE)
        other = make_image(LAYERS[:1], config={"Cmd": ["/other"]})
        push(origin, "test/image", "2", other)
        conf = (
            f'[[registry]]\nprefix = "images.test"\nlocation = "{origin.address}"\ninsecure = true\n'
            f'[[registry.mirror]]\nlocation = "{mirror.address}/cache"\ninsecure = true\n'
        )
        (tmp_path / "registries.conf").write_text(conf)
        tools = tools_of(make_settings(tmp_path))
        found = pull(tools, "images.test/test/image:1")
        assert found.repo_digest.startswith("images.test/test/image@")
        assert json.loads(found.source)["endpoints"][0]["host"] == mirror.address
        mirror.delete_blob_data(found.layers[1].digest)
        for layer, made in zip(found.layers, LAYERS, strict=True):
            assert download(tools, blob_request(found, layer)) == made.data
        assert pull(tools, "images.test/test/image:2").config == other.config
        with pytest.raises(RemoteError) as caught:
            pull(tools, "images.test/test/image:3")
        assert caught.value.code is Code.NOT_FOUND
        assert mirror.address in caught.value.text
        assert origin.address in caught.value.text
