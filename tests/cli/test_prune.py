"""`packhorse prune` as a person or a script meets it: what is kept, what it says, and that it waits two days."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server

HOUR = 3600


@pytest.fixture
def environ(environ: dict[str, str], root_path: Path, tmp_path: Path) -> dict[str, str]:
    """One root and one store for all commands of a test."""
    return {
        **environ,
        "PACKHORSE_ROOT": str(root_path),
        "PACKHORSE_STORAGE_URL": (tmp_path / "store").as_uri(),
    }


def _json(packhorse: Packhorse, *words: str | Path, code: int = 0, **options: Any) -> dict[str, Any]:
    done = packhorse(*words, "--json", **options)
    assert done.returncode == code, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _pushed(packhorse: Packhorse, root: Path, number: int, **options: Any) -> list[str]:
    """Push so many versions; their snapshots, oldest first."""
    packhorse("status", **options)
    snapshots = []
    for _ in range(number):
        (root / "packages/library.so").write_bytes(os.urandom(1_000_000))
        snapshots.append(_json(packhorse, "push", **options)["snapshot"])
    return snapshots


def _aged(store: Path, hours: float) -> None:
    for path in store.rglob("*"):
        if path.is_file():
            past = path.stat().st_mtime - hours * HOUR
            os.utime(path, (past, past))


def test_without_options_history_stays(packhorse: Packhorse, root_path: Path, tmp_path: Path) -> None:
    snapshots = _pushed(packhorse, root_path, 3)
    for _ in range(3):
        _aged(tmp_path / "store", 49)
        done = packhorse("prune")
        assert done.returncode == 0
        assert done.stdout.startswith("There is nothing to do.\nIn use: 3 MB")
    for snapshot in snapshots:
        assert packhorse("pull", snapshot, "--root", tmp_path / snapshot).returncode == 0


def test_what_is_forgotten_can_be_deleted_two_days_later(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    snapshots = _pushed(packhorse, root_path, 3)
    _aged(store, 25)
    planned = packhorse("prune", "--keep", "1", "--dry-run").stdout
    assert "Would have forgotten 2 entries of tags" in planned
    assert len(list(store.glob("tags/main/packages/*"))) == 3
    said = packhorse("prune", "--keep", "1").stdout.splitlines()
    assert said[0] == "Forgotten 2 entries of tags; 1 are left."
    assert said[1].startswith("Condemned 6 objects, 2 MB")
    assert said[-1].startswith("Condemned: 2 MB. A prune deletes it 48 hours after")
    assert len(list(store.glob("packs/*"))) == 3
    _aged(store, 49)
    assert "Deleted 6 objects, 2 MB." in packhorse("prune").stdout
    assert len(list(store.glob("packs/*"))) == 1
    assert packhorse("pull", snapshots[0], "--root", tmp_path / "old").returncode == 3
    assert packhorse("pull", snapshots[2], "--root", tmp_path / "new").returncode == 0
    assert packhorse("verify", "--root", tmp_path / "new").returncode == 0


def test_on_a_server_the_store_s_own_clock_counts(
    packhorse: Packhorse, root_path: Path, seaweedfs: S3Server
) -> None:
    env = seaweedfs.storing(f"s3://{seaweedfs.new_bucket()}/envs")
    _pushed(packhorse, root_path, 3, env=env)
    done = _json(packhorse, "prune", "--keep-within", "30d", env=env)
    assert (done["kept"], done["forgotten"]) == (3, 0)
    done = _json(packhorse, "prune", "--keep", "2", env=env)
    assert (done["kept"], done["forgotten"]) == (2, 1)
    assert (done["condemned"], done["deleted"]) == (0, 0), "all is younger than a day"
    assert len(_json(packhorse, "snapshots", env=env)["snapshots"]) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("--keep", "0"),
        ("--keep-within", "soon"),
        ("--keep-within", "0d"),
        ("--live-share", "2"),
        ("--live-share", "nan"),
    ],
)
def test_what_cannot_be_meant_is_refused(packhorse: Packhorse, words: tuple[str, ...]) -> None:
    refused = packhorse("prune", *words)
    assert refused.returncode == 2
    assert words[0] in refused.stderr


@pytest.mark.parametrize("time", ["30", "30 ", "1.5"])
def test_a_time_without_its_unit_is_refused(
    packhorse: Packhorse, root_path: Path, tmp_path: Path, time: str
) -> None:
    _pushed(packhorse, root_path, 2)
    refused = packhorse("prune", "--keep-within", time)
    assert refused.returncode == 2
    assert "Write the unit, such as 30d or 12h." in refused.stderr
    assert len(list((tmp_path / "store/tags/main/packages").iterdir())) == 2


@pytest.mark.parametrize("time", ["30d", "12h", "90 m", "1.5D", "3600s"])
def test_every_unit_is_taken(packhorse: Packhorse, time: str) -> None:
    assert _json(packhorse, "prune", "--keep-within", time)["forgotten"] == 0


def test_an_empty_store_is_no_failure(packhorse: Packhorse, tmp_path: Path) -> None:
    assert _json(packhorse, "prune", "--keep", "1")["kept"] == 0
    assert _json(packhorse, "prune", "--keep", "1", "--tag", "other")["kept"] == 0
    assert not (tmp_path / "store").exists()


def test_a_tag_that_is_not_there_is_told_and_nothing_is_changed(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    _pushed(packhorse, root_path, 2)
    before = sorted((tmp_path / "store").rglob("*"))
    facts = _json(packhorse, "prune", "--keep", "1", "--tag", "mian", code=3)
    assert facts["error"] == f"There is no tag mian in {(tmp_path / 'store').as_uri()}; there are: main."
    assert sorted((tmp_path / "store").rglob("*")) == before
    assert _json(packhorse, "prune", "--keep", "1", "--tag", "main")["forgotten"] == 1
    configured = {"PACKHORSE_STORAGE_TAG": "mian"}
    assert _json(packhorse, "prune", "--keep", "1", env=configured)["kept"] == 1
