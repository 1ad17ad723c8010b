"""The state file: what is written is there after a crash, names are owned, boots are told apart."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages.monitor import ExitRecord
from tests.support.cri_world import container_config, pod_config
from workers.cri.names import new_id
from workers.cri.state import ContainerRecord, Phase, Pod, PodRecord, Store


def open_store(tmp_path: Path, boot_id: str = "boot") -> Store:
    return Store(str(tmp_path / "state.db"), boot_id)


def add_pod(store: Store, name: str = "pod") -> Pod:
    return store.add_pod(PodRecord(id=new_id(), created_at_ns=1, handler=""), pod_config(name))


def test_pods_containers_and_intents_survive_a_crash(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pod = add_pod(store)
    pod.record.phase, pod.record.ips = Phase.READY, ["10.0.0.1"]
    store.save_pod(pod, done="pod.run")
    record = ContainerRecord(id=new_id(), pod_id=pod.id, created_at_ns=2)
    container = store.add_container(record, container_config())
    container.record.exit = ExitRecord(container_id=container.id, exit_code=3)
    store.save_container(container)
    store.save_spec(container.id, b"{}")
    store.begin(container.id, "container.stop", {"grace": "5.0"})

    again = open_store(tmp_path)  # the first was never closed
    assert again.pods[pod.id].record == pod.record
    assert again.pods[pod.id].config == pod.config
    assert again.containers[container.id].record == container.record
    assert again.spec(container.id) == b"{}"
    kinds = {(intent.subject, intent.kind) for intent in again.intents()}
    assert kinds == {(container.id, "container.create"), (container.id, "container.stop")}
    assert again.container_named(container.name) is again.containers[container.id]


def test_another_boot_forgets_everything(tmp_path: Path) -> None:
    add_pod(open_store(tmp_path))
    store = open_store(tmp_path, "another boot")
    assert not store.pods
    assert not store.intents()
    assert not open_store(tmp_path, "another boot").pods


def test_a_file_of_another_schema_is_kept_beside_its_place(tmp_path: Path) -> None:
    add_pod(open_store(tmp_path))
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    assert not open_store(tmp_path).pods
    with sqlite3.connect(tmp_path / "state.db.damaged") as db:
        assert db.execute("SELECT count(*) FROM pods").fetchone() == (1,)


def scribble(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


def tear(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))


def other_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE pods (unlike TEXT)")


def other_rows(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE pods SET record = x'c1'")


def other_configs(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE pods SET config = x'ffff'")


def other_types(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE pods SET record = 7")


@pytest.mark.parametrize("harm", [scribble, tear, other_tables, other_rows, other_configs, other_types])
def test_a_damaged_file_is_set_aside_and_the_state_begins_empty(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    store = open_store(tmp_path)
    pod = add_pod(store)
    store.close()
    harm(tmp_path / "state.db")
    store = open_store(tmp_path)
    assert not store.pods
    assert (tmp_path / "state.db.damaged").exists()
    assert store.kept.ids() == [pod.id]
    add_pod(store, "another")
    assert len(open_store(tmp_path).pods) == 1


def test_a_pods_file_goes_with_the_pod_and_with_the_boot(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pod = add_pod(store)
    assert store.kept.ids() == [pod.id]
    store.drop_pod(pod)
    assert store.kept.ids() == []
    add_pod(store)
    assert open_store(tmp_path, "another boot").kept.ids() == []


def test_a_name_is_free_as_soon_as_its_owner_is_gone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = add_pod(store)
    assert store.pod_named(first.name) is first
    first.record.phase = Phase.GONE
    store.save_pod(first)
    assert store.pod_named(first.name) is None
    second = add_pod(store)
    assert open_store(tmp_path).pod_named(second.name) is not None
    store.drop_pod(first)  # the reaper is done: the new owner keeps the name
    assert store.pod_named(second.name) is second


def test_what_is_being_made_or_removed_is_hidden(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pod = add_pod(store)
    assert store.match_pods("") == []
    pod.record.phase = Phase.READY
    store.save_pod(pod)
    assert store.match_pods("") == [pod]
    assert store.match_pods(pod.id[:5]) == [pod]
    pod.record.phase = Phase.GONE
    assert store.match_pods("") == []


def test_unknown_ids_are_not_found(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for look in (store.need_pod, store.need_container, store.spec):
        with pytest.raises(RemoteError) as caught:
            look("abc")
        assert caught.value.code is Code.NOT_FOUND


def test_a_removed_pod_is_not_written_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pod = add_pod(store)
    store.drop_pod(pod)
    store.save_pod(pod)
    assert not open_store(tmp_path).pods


def fill(store: Store) -> None:
    """The file may grow no more."""
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_refuses_what_begins_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store)
    with pytest.raises(RemoteError, match="cri cannot write its state") as caught:
        add_pod(store, "p" * 20_000)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert not store.pods
    assert not store.intents()
    assert not store.kept.ids()
    assert not open_store(tmp_path).pods


def test_what_has_come_to_pass_is_written_when_the_disk_takes_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pod = add_pod(store)
    fill(store)
    pod.record.phase, pod.record.ips = Phase.READY, ["10.0.0.1"] * 2000
    store.save_pod(pod, done="pod.run")
    assert store.pods[pod.id].phase is Phase.READY
    assert store.has_intent(pod.id, "pod.run")
    store.flush()
    assert open_store(tmp_path).pods[pod.id].phase is Phase.CREATING
    store._db.execute("PRAGMA max_page_count = 4294967294")
    store.flush()
    assert open_store(tmp_path).pods[pod.id].record == pod.record
    assert not open_store(tmp_path).intents()
