"""Leases: one of those that want to build does, and a dead one is in nobody's way."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from tests.servers import S3Server

from packhorse.config import Storage
from packhorse.store.leases import ALIVE, Lease
from packhorse.store.objects import Store


@pytest.fixture(params=["file", "seaweedfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return Store(Storage(url=tmp_path.as_uri()), {})
    server: S3Server = request.getfixturevalue("seaweedfs")
    return Store(Storage(url=f"s3://{server.new_bucket()}", endpoint=server.endpoint), server.environ())


def test_of_those_that_claim_at_the_same_moment_one_holds_at_a_time(store: Store) -> None:
    holding: list[int] = []
    most: list[int] = []
    together = threading.Barrier(5)

    def worker(number: int) -> None:
        together.wait()
        with Lease(store, "environment") as lease:
            end = time.monotonic() + 60
            while not lease.held():
                assert time.monotonic() < end
            holding.append(number)
            most.append(len(holding))
            assert lease.held()
            store.list("")
            holding.remove(number)

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    assert store.list("leases/") == []


def test_a_holder_keeps_the_lease_from_one_that_looks_older(tmp_path: Path) -> None:
    store = Store(Storage(url=tmp_path.as_uri()), {})
    with Lease(store, "environment") as first:
        assert first.held()
        with Lease(store, "environment") as second:
            for file in tmp_path.rglob("*.claim"):
                same_second = 0 if second._nonce in file.name else 999_000_000
                os.utime(file, ns=(0, 1_000_000_000 * int(time.time()) + same_second))
            assert not second.held()
            assert first.held()
        assert first.held()


def test_leases_of_different_names_do_not_meet(tmp_path: Path) -> None:
    store = Store(Storage(url=tmp_path.as_uri()), {})
    with Lease(store, "one") as one, Lease(store, "other") as other:
        assert one.held()
        assert other.held()


def test_a_claim_without_signs_of_life_stops_counting(tmp_path: Path) -> None:
    store = Store(Storage(url=tmp_path.as_uri()), {})
    dead = Lease(store, "environment")
    dead.__enter__()
    assert dead.held()
    dead._ended.set()  # as if it had been killed: its claim and its mark stay
    dead._thread.join()
    with Lease(store, "environment") as waiting:
        for age, held in ((ALIVE - 5, False), (ALIVE + 5, True)):
            for file in tmp_path.rglob(f"{dead._nonce}.*"):
                os.utime(file, (time.time() - age, time.time() - age))
            assert waiting.held() is held
