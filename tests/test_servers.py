"""What the tests' object stores can be relied on for, and what one of them is known to ignore."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import obstore
import psutil
import pytest
from obstore.exceptions import (
    AlreadyExistsError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store
from tests import servers
from tests.servers import S3Server


@pytest.fixture(params=["seaweedfs", "rclone_s3"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, S3Server)
    return found


@pytest.fixture
def store(server: S3Server) -> S3Store:
    return server.store(server.new_bucket(), "some/prefix")


def test_what_was_put_is_got_back(store: S3Store) -> None:
    content = os.urandom(3_000_000)
    obstore.put(store, "packs/one", content)
    assert bytes(obstore.get(store, "packs/one").bytes()) == content


def test_an_object_that_is_not_there_is_reported_as_such(store: S3Store) -> None:
    with pytest.raises(FileNotFoundError):
        obstore.get(store, "packs/none")


def test_a_listing_has_every_object_below_the_prefix_and_nothing_else(store: S3Store) -> None:
    names = {f"packs/{number:03}" for number in range(30)}
    for name in (*names, "tags/main"):
        obstore.put(store, name, b"x")
    listed = [entry for batch in obstore.list(store, "packs", chunk_size=7) for entry in batch]
    assert {entry["path"] for entry in listed} == names
    assert {entry["size"] for entry in listed} == {1}


def test_buckets_are_apart(server: S3Server) -> None:
    first, second = server.store(server.new_bucket()), server.store(server.new_bucket())
    obstore.put(first, "only/here", b"x")
    assert not obstore.list(second).collect()


def test_another_key_is_refused(server: S3Server) -> None:
    bucket = server.new_bucket()
    stranger = S3Server(server.endpoint, server.access_key, "another secret").store(bucket)
    with pytest.raises((PermissionDeniedError, UnauthenticatedError)):
        obstore.put(stranger, "a", b"x")


def test_seaweedfs_answers_a_range_with_that_range(seaweedfs: S3Server) -> None:
    store = seaweedfs.store(seaweedfs.new_bucket())
    obstore.put(store, "pack", bytes(range(256)) * 40_000)
    assert bytes(obstore.get_range(store, "pack", start=5_000_007, length=5)) == bytes(range(71, 76))


def test_seaweedfs_keeps_the_first_of_two_conditional_writes(seaweedfs: S3Server) -> None:
    store = seaweedfs.store(seaweedfs.new_bucket())
    obstore.put(store, "lease", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "lease", b"second", mode="create")
    assert bytes(obstore.get(store, "lease").bytes()) == b"first"


def test_rclone_ignores_ranges(rclone_s3: S3Server) -> None:
    store = rclone_s3.store(rclone_s3.new_bucket())
    obstore.put(store, "pack", b"0123456789")
    with pytest.raises(GenericError, match="NotPartial"):
        obstore.get_range(store, "pack", start=3, length=2)


def test_rclone_ignores_conditions_of_writes(rclone_s3: S3Server) -> None:
    store = rclone_s3.store(rclone_s3.new_bucket())
    obstore.put(store, "lease", b"first", mode="create")
    obstore.put(store, "lease", b"second", mode="create")
    assert bytes(obstore.get(store, "lease").bytes()) == b"second"


def test_the_credentials_reach_a_client_through_the_environment(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweedfs.environ().items():
        monkeypatch.setenv(name, value)
    store = S3Store(seaweedfs.new_bucket(), endpoint=seaweedfs.endpoint, client_options={"allow_http": True})
    obstore.put(store, "a", b"x")


def test_a_server_that_ends_leaves_no_process_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with servers.rclone_s3() as server:
        obstore.put(server.store(server.new_bucket()), "a", b"x")
        assert os.listdir(tmp_path)
        assert _processes_naming(tmp_path)
    assert not os.listdir(tmp_path)
    assert not _processes_naming(tmp_path)


def test_a_server_that_cannot_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(servers, "_free_ports", lambda count: [taken.getsockname()[1]])
        with pytest.raises(ChildProcessError, match="address already in use"), servers.rclone_s3():
            pass


def _processes_naming(path: Path) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(path) in " ".join(process.info["cmdline"] or [])
    ]
