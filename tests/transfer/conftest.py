"""Workers that share a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.servers import S3Server
from tests.transfer.workers import Worker

from packhorse.config import Storage

NewWorker = Callable[..., Worker]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A store in a directory."""
    return Storage(url=(tmp_path / "store").as_uri())


@pytest.fixture
def new_worker(tmp_path: Path, storage: Storage) -> NewWorker:
    """Makes workers of one store, by name."""
    return lambda name="root", tag="main": Worker(tmp_path / name, Storage(url=storage.url, tag=tag))


@pytest.fixture(params=["file", "seaweedfs", "rclone"])
def any_worker(request: pytest.FixtureRequest, tmp_path: Path) -> NewWorker:
    """The same for each kind of store."""
    if request.param == "file":
        return lambda name="root": Worker(tmp_path / name, Storage(url=(tmp_path / "store").as_uri()))
    server: S3Server = request.getfixturevalue("seaweedfs" if request.param == "seaweedfs" else "rclone_s3")
    storage = Storage(url=f"s3://{server.new_bucket()}/some/prefix", endpoint=server.endpoint)
    return lambda name="root": Worker(tmp_path / name, storage, server.environ())
