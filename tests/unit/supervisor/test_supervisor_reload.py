"""What a reload changes: everything but what a running instance is built on, and each key is named."""

from __future__ import annotations

import dataclasses

from supervisor.config import CniConfig, Config, GrpcConfig, ImageConfig, RuntimeConfig, TimeoutsConfig
from supervisor.configfile import key_paths
from supervisor.reload import FIXED, change, differences


def test_live_keys_are_taken_and_named() -> None:
    old = Config()
    new = dataclasses.replace(
        old,
        log_level="debug",
        runtimes={"runc": RuntimeConfig(path="/bin/true")},
        image=ImageConfig(pinned_images=["a*"]),
        timeouts=TimeoutsConfig(ping=1.0),
        cni=CniConfig(conf_dir="/elsewhere"),
    )
    found = change(old, new)
    assert found.config == new
    assert found.refused == []
    assert found.taken == ["log_level", "runtimes", "cni.conf_dir", "image.pinned_images", "timeouts.ping"]


def test_fixed_keys_stay_and_are_named() -> None:
    old = Config()
    new = dataclasses.replace(
        old,
        root="/elsewhere",
        cni=CniConfig(cache_dir="/elsewhere", default_network="net"),
        grpc=GrpcConfig(max_requests=8),
    )
    found = change(old, new)
    assert found.refused == ["root", "cni.cache_dir", "grpc.max_requests"]
    assert found.taken == ["cni.default_network"]
    assert found.config == dataclasses.replace(old, cni=CniConfig(default_network="net"))


def test_the_same_configuration_changes_nothing() -> None:
    assert change(Config(), Config()).taken == []
    assert list(differences(Config(), Config())) == []


def test_every_fixed_key_exists() -> None:
    known = {".".join(path) for path in key_paths()} | {path[0] for path in key_paths()}
    assert set(FIXED) <= known
