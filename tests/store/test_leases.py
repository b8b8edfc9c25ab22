"""Leases: one builds, the others wait, and the dead are passed over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from packhorse.config import Storage
from packhorse.store.leases import ALIVE, Lease
from packhorse.store.objects import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Storage(url=(tmp_path / "store").as_uri()), {})


def test_the_older_claim_holds_the_lease_until_it_is_given_back(store: Store) -> None:
    with Lease(store, "env") as first:
        assert first.held()
        with Lease(store, "env") as second:
            assert first.held()
            assert not second.held()
            first.__exit__()
            assert second.held()


def test_leases_of_other_names_do_not_meet(store: Store) -> None:
    with Lease(store, "env") as first, Lease(store, "other") as second:
        assert first.held()
        assert second.held()


def test_a_claim_without_signs_of_life_is_passed_over(store: Store, tmp_path: Path) -> None:
    dead = Lease(store, "env")
    dead.__enter__()
    dead._ended.set()  # its process was killed
    with Lease(store, "env") as waiting:
        assert not waiting.held()
        silent = time.time() - ALIVE - 1
        for file in (tmp_path / "store" / "leases" / "env").glob(f"{dead._nonce}.*"):
            os.utime(file, (silent, silent))
        assert waiting.held()


def test_nothing_is_left_of_a_lease(store: Store) -> None:
    with Lease(store, "env"):
        assert len(store.list("leases/")) == 2
    assert store.list("leases/") == []
