"""Pushes over lines that are slow, and to stores that no longer answer."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.install.faults import Fault, relay
from tests.servers import S3Server
from tests.transfer.uplink import Uplink

from packhorse.config import Storage
from packhorse.errors import StorageError
from packhorse.snapshot.frames import Bytes
from packhorse.store import credentials, sending, uploader
from packhorse.store.objects import Store, UnreachableError
from packhorse.store.uploader import Uploader

MIB = 1 << 20


def _store(server: S3Server, uplink: Uplink) -> Store:
    return Store(
        Storage(url=f"s3://{server.new_bucket()}/prefix", endpoint=uplink.endpoint), server.environ()
    )


def test_what_takes_longer_to_send_than_an_answer_may_take_arrives(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "ANSWER", 1)
    content = os.urandom(5 * MIB)
    with Uplink(seaweedfs.endpoint, rate=MIB) as uplink:
        store = _store(seaweedfs, uplink)
        store.put("packs/a", [content[: 3 * MIB], content[3 * MIB :]])
        assert uplink.sent < 2 * len(content)  # sent once
        assert b"".join(store.ranges("packs/a", [(0, len(content))])) == content


@pytest.mark.parametrize("size", [1, 3 * MIB])
def test_a_store_that_no_longer_answers_is_given_up(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(credentials, "ANSWER", 1)
    monkeypatch.setattr(credentials, "SENDING", 1)
    monkeypatch.setattr("packhorse.store.objects._RETRIES", {"max_retries": 1})
    with Uplink(seaweedfs.endpoint, swallow_after=0) as uplink:
        with pytest.raises(UnreachableError, match="cannot be reached: no answer in time"):
            _store(seaweedfs, uplink).put("packs/a", bytes(size))
        assert uplink.swallowing.is_set()


class _Counting(Store):
    """A store that counts how many objects are put into it at a time, as each begins."""

    def __init__(self, storage: Storage, environ: Mapping[str, str]) -> None:
        super().__init__(storage, environ)
        self._lock = threading.Lock()
        self._now = 0
        self.at_once: list[int] = []

    def put(self, key: str, content: bytes | Sequence[Bytes]) -> None:
        with self._lock:
            self._now += 1
            self.at_once.append(self._now)
        try:
            super().put(key, content)
        finally:
            with self._lock:
                self._now -= 1


@pytest.mark.parametrize(
    ("connections", "fast", "slow", "held", "most", "last"),
    [
        (None, 60.0, 90.0, 40 * MIB, 4, 4),  # every pack is fast: as many as there may be
        (None, 60.0, 90.0, 60 * MIB, 6, 6),  # more, as there is room for more
        (None, 0.0, 90.0, 40 * MIB, 2, 2),  # none is
        (None, 0.0, 0.0, 40 * MIB, 2, 1),  # each takes too long
        (None, 60.0, 90.0, 3 * MIB, 3, 3),  # there is no memory for more
        (None, 60.0, 90.0, 1, 1, 1),  # a pack that has more than there may be goes alone
        (6, 0.0, 0.0, 1, 6, 6),  # pinned
    ],
)
def test_packs_at_a_time_follow_the_line_and_the_memory_or_are_pinned(
    seaweedfs: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    connections: int | None,
    fast: float,
    slow: float,
    held: int,
    most: int,
    last: int,
) -> None:
    monkeypatch.setattr(uploader, "_FAST", fast)
    monkeypatch.setattr(uploader, "_SLOW", slow)
    with Uplink(seaweedfs.endpoint, rate=6 * MIB) as uplink:
        url = f"s3://{seaweedfs.new_bucket()}/prefix"
        store = _Counting(Storage(url=url, endpoint=uplink.endpoint), seaweedfs.environ())
        sink = Uploader(store, connections=connections, held=held)
        for number in range(12):
            sink(f"{number}", [os.urandom(MIB)])
        sink.finish()
    assert max(store.at_once) == most
    assert max(store.at_once[-3:]) == last  # the very last one may come after the others
    assert sink.bytes == 12 * MIB
    assert len(Store(Storage(url=url, endpoint=seaweedfs.endpoint), seaweedfs.environ()).list("packs/")) == 12


@pytest.mark.timeout(60)  # the client itself waits 300 seconds
def test_a_pack_on_a_stuck_connection_is_sent_once_more(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_LEAST", 1.0)
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}/prefix", endpoint=seaweedfs.endpoint)
    server = seaweedfs.endpoint.removeprefix("http://")
    with relay(server, lambda number: Fault("stall", 0) if number == 0 else None) as faulty:
        through = Storage(url=storage.url, endpoint=f"http://{faulty.host}")
        sink = Uploader(Store(through, seaweedfs.environ()))
        for number in range(6):
            sink(f"{number}", [os.urandom(MIB), os.urandom(MIB)])
        sink.finish()
        assert faulty.broken == 1
    assert [item.size for item in Store(storage, seaweedfs.environ()).list("packs/")] == [2 * MIB] * 6


def test_over_a_slow_line_no_pack_is_sent_twice(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_LEAST", 0.0)
    with Uplink(seaweedfs.endpoint, rate=2 * MIB) as uplink:
        sink = Uploader(_store(seaweedfs, uplink))
        for number in range(8):
            sink(f"{number}", [os.urandom(MIB)])
        sink.finish()
        assert 8 * MIB < uplink.sent < 9 * MIB


def test_a_pack_that_cannot_be_sent_ends_the_others(seaweedfs: S3Server) -> None:
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}/prefix", endpoint=seaweedfs.endpoint)
    sink = Uploader(Store(storage, {**seaweedfs.environ(), "AWS_SECRET_ACCESS_KEY": "another"}))
    with pytest.raises(StorageError, match="refuses the credentials"):
        for number in range(100):
            sink(f"{number}", [b"content"])
    with pytest.raises(StorageError):
        sink.finish()


@pytest.fixture
def filled(root_path: Path) -> Path:
    """A root with several packs to save."""
    (root_path / "models").mkdir(parents=True, mode=0o700)
    root_path.chmod(0o700)
    for number in range(6):
        (root_path / "models" / f"shard{number}").write_bytes(os.urandom(8 * MIB))
    return root_path


def _environ(server: S3Server, uplink: Uplink) -> dict[str, str]:
    return {**server.environ(), "PACKHORSE_STORAGE_ENDPOINT": uplink.endpoint}


@pytest.mark.parametrize(("command", "swallow_after"), [("push", 0), ("push", MIB), ("pull", 0)])
def test_ctrl_c_ends_a_command_whose_store_no_longer_answers(
    packhorse: Packhorse, seaweedfs: S3Server, filled: Path, command: str, swallow_after: int
) -> None:
    store = f"s3://{seaweedfs.new_bucket()}/prefix"
    words = ["--root", str(filled), "--store", store, "-q"]
    with Uplink(seaweedfs.endpoint, swallow_after=swallow_after) as uplink:
        process = subprocess.Popen(
            [*packhorse.command, command, *words],
            env={**packhorse.environ, **_environ(seaweedfs, uplink)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert uplink.swallowing.wait(60)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)  # the store is asked for 60 seconds at least
    assert process.returncode == 130
    assert told.strip() == "packhorse: interrupted."
