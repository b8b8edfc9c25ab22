"""What stays silent is asked for again, what is slow is not, and errors count as if nothing had been asked twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from tests.install.faults import Fault, relay
from tests.servers import S3Server

from packhorse.config import Storage
from packhorse.store import soonest as module
from packhorse.store.objects import NotFoundError, Store
from packhorse.store.soonest import soonest

Heard = Callable[[], None]


@pytest.mark.timeout(25)  # the client itself waits 30 seconds for a byte
@pytest.mark.parametrize("after", [0, 300_000], ids=["before the answer", "in the middle of it"])
def test_a_connection_that_stalls_holds_no_document_up(seaweedfs: S3Server, after: int) -> None:
    url = f"s3://{seaweedfs.new_bucket()}/somewhere"
    content = random.Random(5).randbytes(1_000_000)
    Store(Storage(url=url, endpoint=seaweedfs.endpoint), seaweedfs.environ()).put("tags/a", content)
    server = seaweedfs.endpoint.removeprefix("http://")

    with relay(server, lambda number: Fault("stall", after) if number == 0 else None) as faulty:
        store = Store(Storage(url=url, endpoint=f"http://{faulty.host}"), seaweedfs.environ())
        assert store.get("tags/a") == content
        assert faulty.broken == 1
        assert [item.key for item in store.list("tags/")] == ["tags/a"]


@pytest.mark.timeout(25)
def test_a_connection_that_stalls_holds_no_listing_up(seaweedfs: S3Server) -> None:
    url = f"s3://{seaweedfs.new_bucket()}/somewhere"
    server = seaweedfs.endpoint.removeprefix("http://")

    with relay(server, lambda number: Fault("stall", 0) if number == 0 else None) as faulty:
        store = Store(Storage(url=url, endpoint=f"http://{faulty.host}"), seaweedfs.environ())
        assert store.list("tags/") == []
        assert faulty.broken == 1


@pytest.mark.timeout(25)
@pytest.mark.parametrize("size", [0, 10_000])
def test_a_connection_that_stalls_keeps_no_document_from_the_store(seaweedfs: S3Server, size: int) -> None:
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}/somewhere", endpoint=seaweedfs.endpoint)
    server = seaweedfs.endpoint.removeprefix("http://")

    with relay(server, lambda number: Fault("stall", 0) if number == 0 else None) as faulty:
        store = Store(Storage(url=storage.url, endpoint=f"http://{faulty.host}"), seaweedfs.environ())
        store.put("tags/a", bytes(size))
        assert faulty.broken == 1
    assert Store(storage, seaweedfs.environ()).get("tags/a") == bytes(size)


@pytest.mark.timeout(25)
def test_a_connection_that_stalls_keeps_nobody_from_the_first_byte_or_the_time(seaweedfs: S3Server) -> None:
    url = f"s3://{seaweedfs.new_bucket()}/somewhere"
    Store(Storage(url=url, endpoint=seaweedfs.endpoint), seaweedfs.environ()).put("packs/a", b"content")
    server = seaweedfs.endpoint.removeprefix("http://")

    with relay(server, lambda number: Fault("stall", 0) if number in (0, 2) else None) as faulty:
        for work in (
            lambda store: store.keeps_ranges("packs/a"),
            lambda store: store.modified("packs/a") > 0,
        ):
            store = Store(Storage(url=url, endpoint=f"http://{faulty.host}"), seaweedfs.environ())
            assert work(store)
        assert faulty.broken == 2


@pytest.mark.timeout(25)
def test_a_connection_that_stalls_keeps_nobody_from_hearing_that_there_is_nothing(
    seaweedfs: S3Server,
) -> None:
    url = f"s3://{seaweedfs.new_bucket()}/somewhere"
    server = seaweedfs.endpoint.removeprefix("http://")

    with relay(server, lambda number: Fault("stall", 0) if number in (0, 2) else None) as faulty:
        store = Store(Storage(url=url, endpoint=f"http://{faulty.host}"), seaweedfs.environ())
        assert not store.has("packs/a")
        store = Store(Storage(url=url, endpoint=f"http://{faulty.host}"), seaweedfs.environ())
        with pytest.raises(NotFoundError):
            store.modified("packs/a")
        assert faulty.broken == 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)


@pytest.mark.usefixtures("impatient")
def test_the_request_that_is_not_needed_any_more_is_ended() -> None:
    ended = []

    async def ask(again: bool, _: Heard) -> int:
        number = len(asked)
        asked.append(number)
        try:
            if number == 0:
                await asyncio.sleep(60)
            return number
        except asyncio.CancelledError:
            ended.append(number)
            raise

    asked: list[int] = []
    assert soonest(ask) == 1
    assert (asked, ended) == ([0, 1], [0])


@pytest.mark.usefixtures("impatient")
def test_what_is_slow_but_comes_is_asked_for_once() -> None:
    asked = []

    async def ask(again: bool, heard: Heard) -> str:
        asked.append(1)
        for _ in range(12):
            await asyncio.sleep(0.05)
            heard()
        return "here"

    assert soonest(ask) == "here"
    assert len(asked) == 1


@pytest.mark.usefixtures("impatient")
def test_what_the_first_request_fails_with_counts() -> None:
    async def ask(again: bool, _: Heard) -> str:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        soonest(ask)


@pytest.mark.usefixtures("impatient")
def test_what_a_second_request_fails_with_does_not_count() -> None:
    asked = []

    async def ask(again: bool, _: Heard) -> str:
        asked.append(again)
        if again:
            raise ConnectionError
        await asyncio.sleep(0.9)
        return "here"

    assert soonest(ask) == "here"
    assert asked == [False, True, True]


def test_it_can_be_asked_where_an_event_loop_runs() -> None:
    async def ask(again: bool, _: Heard) -> str:
        return "here"

    async def notebook(work: Callable[[Callable[[bool, Heard], Awaitable[str]]], str]) -> str:
        return work(ask)

    assert asyncio.run(notebook(soonest)) == "here"
