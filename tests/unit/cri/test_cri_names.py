"""Ids and their prefixes; operations that are joined by key."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import Code, RemoteError, invalid
from workers.cri.names import Ids, new_id
from workers.cri.operations import Operations, uncancelled


def test_new_ids_are_64_hexadecimal_digits_and_differ() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(id_) == 64 and set(id_) <= set("0123456789abcdef") for id_ in ids)


def test_a_unique_prefix_finds_its_id() -> None:
    ids = Ids("container")
    for id_ in ("aa11", "ab22", "b333"):
        ids.add(id_)
    assert ids.find("aa") == "aa11"
    assert ids.find("b") == "b333"
    assert ids.find("ab22") == "ab22"
    assert ids.find("c") is None
    assert ids.find("not-hex") is None
    assert ids.match("a") == ["aa11", "ab22"]


def test_an_ambiguous_or_empty_prefix_is_refused() -> None:
    ids = Ids("container")
    ids.add("aa11")
    ids.add("ab22")
    for text in ("a", ""):
        with pytest.raises(RemoteError) as caught:
            ids.find(text)
        assert caught.value.code is Code.INVALID_ARGUMENT


@given(st.sets(st.text("0123456789abcdef", min_size=1, max_size=4)), st.text("0123456789abcdef", max_size=3))
def test_prefixes_match_as_a_scan_would(known: set[str], prefix: str) -> None:
    ids = Ids("x")
    for id_ in known:
        ids.add(id_)
    assert ids.match(prefix) == sorted(id_ for id_ in known if id_.startswith(prefix))
    for id_ in known:
        ids.discard(id_)
    assert len(ids) == 0


def test_a_repeated_operation_joins_the_running_one() -> None:
    async def scenario() -> None:
        operations, runs = Operations(), 0

        async def work() -> int:
            nonlocal runs
            runs += 1
            await asyncio.sleep(0.01)
            return runs

        results = await asyncio.gather(*(operations.run(("k",), work) for _ in range(5)))
        assert results == [1] * 5
        assert await operations.run(("k",), work) == 2

    asyncio.run(scenario())


def test_an_operation_goes_on_when_its_client_gives_up() -> None:
    async def scenario() -> None:
        operations, done = Operations(), asyncio.Event()

        async def work() -> str:
            await asyncio.sleep(0.02)
            done.set()
            return "result"

        client = asyncio.create_task(operations.run(("k",), work))
        await asyncio.sleep(0)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        assert await operations.run(("k",), work) == "result"
        assert done.is_set()

    asyncio.run(scenario())


def test_ending_an_operation_waits_for_its_undoing_and_tells_its_clients() -> None:
    async def scenario() -> None:
        operations, undone = Operations(), False

        async def work() -> None:
            nonlocal undone
            try:
                await asyncio.Event().wait()
            finally:
                await uncancelled(asyncio.sleep(0.01))
                undone = True

        client = asyncio.create_task(operations.run(("create", "pod"), work))
        await asyncio.sleep(0.01)
        await operations.end(lambda key: key[1] == "pod")
        assert undone
        with pytest.raises(RemoteError) as caught:
            await client
        assert caught.value.code is Code.FAILED_PRECONDITION

    asyncio.run(scenario())


def test_failures_reach_every_joined_client() -> None:
    async def scenario() -> None:
        operations = Operations()

        async def work() -> None:
            await asyncio.sleep(0)
            raise invalid("no")

        results = await asyncio.gather(
            *(operations.run(("k",), work) for _ in range(3)), return_exceptions=True
        )
        assert [type(result) for result in results] == [RemoteError] * 3
        assert len(operations) == 0

    asyncio.run(scenario())


def test_a_bug_in_the_background_is_told_to_the_owner() -> None:
    async def scenario() -> None:
        operations = Operations()
        told: list[BaseException] = []
        operations.on_bug = told.append

        async def buggy() -> None:
            raise KeyError("bug")

        operations.background("b", buggy())
        await asyncio.sleep(0.01)
        assert [type(error) for error in told] == [KeyError]

    asyncio.run(scenario())


def test_nothing_is_begun_while_closing() -> None:
    async def scenario() -> None:
        operations = Operations()
        await operations.close(0)

        async def work() -> None:
            return

        with pytest.raises(RemoteError) as caught:
            await operations.run(("k",), work)
        assert caught.value.code is Code.UNAVAILABLE

    asyncio.run(scenario())
