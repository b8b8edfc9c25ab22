"""`packhorse verify` reads every file: what is corrupt, changed or missing is named and ends with 4."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse

from packhorse.snapshot.contents import content_on_disk
from packhorse.snapshot.index import Index
from packhorse.snapshot.scan import look


@pytest.fixture
def environ(environ: dict[str, str], root_path: Path, tmp_path: Path) -> dict[str, str]:
    """One root and one store for all commands of a test."""
    return {
        **environ,
        "PACKHORSE_ROOT": str(root_path),
        "PACKHORSE_STORAGE_URL": (tmp_path / "store").as_uri(),
    }


@pytest.fixture
def pushed(root_path: Path, packhorse: Packhorse) -> Path:
    """A root that was pushed: each persistent directory in use has small, large and linked files."""
    root_path.mkdir(mode=0o700)
    for name in ("packages", "models"):
        (root_path / name / "empty").mkdir(parents=True)
        (root_path / name).chmod(0o700)
        (root_path / name / "small").write_text("small")
        (root_path / name / "large").write_bytes(os.urandom(3_000_000))
        (root_path / name / "link").symlink_to("small")
        (root_path / name / "zz other name").hardlink_to(root_path / name / "small")
    assert packhorse("push").returncode == 0
    return root_path


def _verify(packhorse: Packhorse, code: int) -> str:
    done = packhorse("verify", "--json")
    assert done.returncode == code, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    if code:
        assert facts["exit_code"] == code
        assert "packhorse pull" in facts["remedy"]
    return done.stderr


def test_a_sound_root_is_told_so(packhorse: Packhorse, pushed: Path) -> None:
    facts = json.loads(packhorse("verify", "--json").stdout)
    assert (facts["files"], facts["corrupt"], facts["changed"], facts["missing"], facts["added"]) == (
        8,
        [],
        [],
        [],
        [],
    )
    assert facts["bytes"] == 2 * (3_000_000 + 5 + 5)
    text = packhorse("verify").stdout
    assert text.startswith("All as snapshot ")
    assert text.endswith(" says: 8 files (6 MB).\n")


def _spoil(file: Path) -> None:
    """Another byte under the same size and times, as a bad disk has it."""
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(status.st_size // 2)
        byte = stream.read(1)
        stream.seek(status.st_size // 2)
        stream.write(bytes((byte[0] ^ 1,)))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("directory", ["packages", "models"])
@pytest.mark.parametrize("name", ["small", "large"])
def test_a_wrong_byte_under_an_unchanged_time_is_corrupt_and_a_pull_brings_it_back(
    packhorse: Packhorse, pushed: Path, directory: str, name: str
) -> None:
    file = pushed / directory / name
    before = file.read_bytes()
    _spoil(file)
    assert f"corrupt: {directory}/{name}\n" in _verify(packhorse, 4)
    assert packhorse("pull").returncode == 0
    assert file.read_bytes() == before
    _verify(packhorse, 0)


def test_a_pull_brings_back_what_the_disk_lost_without_a_trace(packhorse: Packhorse, pushed: Path) -> None:
    """No write of ours, and so no time of change: the index vouches for it until it was read."""
    files = [pushed / name for name in ("packages/large", "packages/small", "models/large")]
    index, base = Index(pushed / ".packhorse/index"), os.fsencode(pushed)
    for file in files:
        path = os.fsencode(file.relative_to(pushed))
        content = content_on_disk(os.fsencode(file), file.stat().st_size)
        _spoil(file)
        item = look(base, path)
        assert item is not None
        index.restored(path, item.signature, (content, item.mode))
    index.save()
    assert "already holds this" in packhorse("pull").stdout
    assert "corrupt: models/large" in _verify(packhorse, 4)
    packhorse("pull")
    _verify(packhorse, 0)


@pytest.mark.parametrize("directory", ["packages", "models"])
def test_whatever_changed_is_named(packhorse: Packhorse, pushed: Path, directory: str) -> None:
    top = pushed / directory
    for name, change, kind in (
        ("small", lambda: (top / "small").write_text("SMALL"), "changed"),
        ("large", lambda: os.truncate(top / "large", 5), "changed"),
        ("large", lambda: (top / "large").chmod(0o600), "changed"),
        ("link", (top / "link").unlink, "missing"),
        ("link", lambda: ((top / "link").unlink(), (top / "link").symlink_to("large")), "changed"),
        ("zz other name", lambda: ((top / "zz other name").unlink(), (top / "zz other name").write_text("other")), "changed"),
        ("small", lambda: ((top / "small").unlink(), (top / "small").mkdir()), "changed"),
        ("empty", (top / "empty").rmdir, "missing"),
        ("empty", lambda: ((top / "empty").rmdir(), (top / "empty").write_text("a file")), "changed"),
    ):  # fmt: skip
        shutil.copytree(pushed, pushed.with_name("saved"), symlinks=True)
        change()
        assert f"{kind}: {directory}/{name}\n" in _verify(packhorse, 4)
        shutil.rmtree(pushed)
        pushed.with_name("saved").rename(pushed)
        _verify(packhorse, 0)


def test_who_changed_a_shared_file_is_told_that_a_pull_leaves_it(packhorse: Packhorse, pushed: Path) -> None:
    (pushed / "packages/small").write_text("SMALL")
    assert "models/" not in packhorse("verify").stderr
    (pushed / "models/large").write_text("mine")
    assert (
        "Changed files of models/, deps/ and pip/ stay: save them with `packhorse push`, or remove them first."
        in packhorse("verify").stderr
    )
    assert packhorse("pull").returncode == 0
    assert (pushed / "models/large").read_text() == "mine"
    (pushed / "models/large").unlink()
    assert packhorse("pull").returncode == 0
    _verify(packhorse, 0)


def test_bytecode_that_appeared_is_told_and_no_failure(packhorse: Packhorse, pushed: Path) -> None:
    (pushed / "packages/__pycache__").mkdir()
    (pushed / "packages/__pycache__/small.pyc").write_text("bytecode")
    facts = json.loads(packhorse("verify", "--json").stdout)
    assert facts["added"] == ["packages/__pycache__/small.pyc"]
    _verify(packhorse, 0)


def test_a_shared_file_that_was_changed_and_pushed_is_sound(packhorse: Packhorse, pushed: Path) -> None:
    (pushed / "models/small").unlink()
    (pushed / "models/small").write_text("version 2")
    packhorse("push")
    _verify(packhorse, 0)


def test_imports_without_modules_are_told(packhorse: Packhorse, pushed: Path) -> None:
    said = "environment.verify names no modules, so none is imported"
    done = packhorse("verify", "--imports", "--json")
    assert (done.returncode, json.loads(done.stdout)["imports"]) == (0, [])
    assert said in done.stderr
    assert said not in packhorse("verify").stderr


def test_nothing_to_compare_with_ends_with_3(packhorse: Packhorse) -> None:
    done = packhorse("verify", "--json")
    assert done.returncode == 3
    assert "packhorse push" in json.loads(done.stdout)["remedy"]


def test_the_store_is_not_needed(packhorse: Packhorse, pushed: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "store")
    _verify(packhorse, 0)


def test_packages_that_were_not_pushed_are_told_as_not_checked(packhorse: Packhorse, root_path: Path) -> None:
    (root_path / "models").mkdir(parents=True)
    (root_path / "models/weights").write_text("weights")
    root_path.chmod(0o700)
    assert packhorse("push").returncode == 0
    (root_path / "packages/module.py").touch()
    assert json.loads(packhorse("verify", "--json").stdout)["added"] == ["packages/module.py"]
    assert "1 file (7 B). Not part of it: 1 file in packages/." in packhorse("verify").stdout


def test_a_root_that_holds_nothing_of_a_store_is_told(packhorse: Packhorse, root_path: Path) -> None:
    root_path.mkdir(mode=0o700)
    done = packhorse("verify")
    assert done.returncode == 3
    assert f"What {root_path} holds was neither pushed nor pulled" in done.stderr
