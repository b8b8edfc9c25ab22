"""`packhorse snapshots` lists what was pushed, newest first, and each id can be pulled."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse


@pytest.fixture
def environ(environ: dict[str, str], root_path: Path, tmp_path: Path) -> dict[str, str]:
    """One root and one store for all commands of a test."""
    return {
        **environ,
        "PACKHORSE_ROOT": str(root_path),
        "PACKHORSE_STORAGE_URL": (tmp_path / "store").as_uri(),
    }


def _push(packhorse: Packhorse, root: Path, content: str, *words: str) -> dict[str, Any]:
    (root / "packages").mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    (root / "packages/file").write_text(content)
    done = packhorse("push", "--json", *words)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _listed(packhorse: Packhorse, *words: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(packhorse("snapshots", "--json", *words).stdout)["snapshots"]
    return rows


def test_an_empty_store_has_none(packhorse: Packhorse) -> None:
    assert _listed(packhorse) == []
    assert packhorse("snapshots").stdout.startswith("There are no snapshots in file://")
    assert _listed(packhorse, "--tag", "other") == []


def test_a_tag_that_is_not_there_ends_with_3_and_names_those_that_are(
    packhorse: Packhorse, root_path: Path
) -> None:
    for tag in ("main", "v2"):
        _push(packhorse, root_path, "content", "--tag", tag)
    done = packhorse("snapshots", "--tag", "nosuch")
    assert (done.returncode, done.stdout) == (3, "")
    assert "There is no tag nosuch in file://" in done.stderr
    assert "; there are: main, v2. Name one of those with --tag" in done.stderr
    for number in range(12):
        _push(packhorse, root_path, "content", "--tag", f"a{number:02}")
    assert "there are: a00, a01, a02, a03, a04, a05, a06, a07, a08, a09 and 4 more." in (
        packhorse("snapshots", "--tag", "nosuch").stderr
    )


def test_a_long_tag_is_a_word_of_its_own(packhorse: Packhorse, root_path: Path) -> None:
    for tag in ("main", "t" * 64):
        _push(packhorse, root_path, "content", "--tag", tag)
    lines = packhorse("snapshots").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["TAG", "t" * 64, "main"]
    assert len({line.index("packages") for line in lines[1:]}) == 1


def test_they_are_listed_newest_first_with_what_they_hold(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    pushed = [_push(packhorse, root_path, "x" * size) for size in (10, 20, 30)]
    rows = _listed(packhorse)
    assert [row["snapshot"] for row in rows] == [facts["snapshot"] for facts in reversed(pushed)]
    assert [(row["tag"], row["part"], row["files"], row["bytes"], row["partial"]) for row in rows] == [
        ("main", "packages", 1, size, False) for size in (30, 20, 10)
    ]
    assert all(row["soabi"] and row["platform"] for row in rows)
    written = datetime.fromisoformat(rows[0]["time"])
    assert abs(written - datetime.now(timezone.utc)) < timedelta(minutes=10)
    table = packhorse("snapshots").stdout.splitlines()
    assert table[0].split()[:3] == ["SNAPSHOT", "TAG", "TIME"]
    assert [line.split()[0] for line in table[1:]] == [row["snapshot"][:12] for row in rows]
    for row in rows:
        done = packhorse("pull", table[1 + rows.index(row)].split()[0], "--root", tmp_path / row["snapshot"])
        assert done.returncode == 0
        assert (tmp_path / row["snapshot"] / "packages/file").stat().st_size == row["bytes"]


def test_those_of_one_tag_and_the_newest_of_each_are_chosen(packhorse: Packhorse, root_path: Path) -> None:
    for number in range(3):
        _push(packhorse, root_path, f"main {number}")
        _push(packhorse, root_path, f"other {number}", "--tag", "other")
    assert [row["tag"] for row in _listed(packhorse)].count("other") == 3
    assert {row["tag"] for row in _listed(packhorse, "--tag", "other")} == {"other"}
    newest = _listed(packhorse, "-n", "1")
    assert sorted(row["tag"] for row in newest) == ["main", "other"]
    assert {row["bytes"] for row in newest} == {len("main 2"), len("other 2")}


def test_a_fold_that_cannot_be_read_ends_with_4(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    for number in range(3):
        _push(packhorse, root_path, "content")
        (root_path / "models" / f"file {number}").write_text("content")
        assert packhorse("push").returncode == 0
    assert packhorse("prune", "--keep", "1").returncode == 0
    [fold] = (tmp_path / "store/tags").rglob("*-fold-*")
    fold.write_bytes(b"garbage")
    done = packhorse("snapshots", "--json")
    assert done.returncode == 4
    facts = json.loads(done.stdout)
    assert facts["exit_code"] == 4
    assert f"The object {fold.relative_to(tmp_path / 'store')} cannot be read" in facts["error"]
