from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index

from packhorse.install import disk_check
from packhorse.install.disk_check import Finding
from packhorse.progress import Silent


@pytest.fixture
def packages(index: Index, installer: Installer) -> Path:
    """An environment as pip and packhorse leave it: two distributions, a command, bytecode, a namespace package."""
    for name in ("one", "two"):
        index.add(
            name,
            "1.0",
            {
                f"{name}/__init__.py": f"NAME = {name!r}\n",
                f"{name}/data.bin": os.urandom(1000),
                "common/__init__.py": "",
                f"{name}-1.0.dist-info/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
                f"{name}-1.0.data/data/share/{name}.txt": "shared",
            },
        )
    installer(dependencies=["one", "two"], verify=["one", "two"], python="python3")
    return installer.root.packages


def _check(packages: Path, *, digests: bool = False, path: str | None = None) -> list[Finding]:
    environ = {"PATH": os.environ["PATH"] if path is None else path}
    return disk_check.check(packages, environ, Silent(), digests=digests)


def _only(findings: list[Finding]) -> tuple[str, str, list[str]]:
    [finding] = findings
    assert finding.count == len(finding.paths) and finding.remedy
    return finding.check, finding.level, finding.paths


def test_nothing_is_wrong_with_what_was_just_installed(packages: Path) -> None:
    assert list(packages.rglob("*.pyc"))
    assert _check(packages, digests=True) == []


def test_a_missing_file_is_a_problem(packages: Path) -> None:
    (packages / "one" / "data.bin").unlink()
    assert _only(_check(packages)) == ("records", "problem", ["one/data.bin"])


def test_a_changed_file_is_found_by_its_size_or_by_its_digest(packages: Path) -> None:
    data = packages / "one" / "data.bin"
    data.write_bytes(data.read_bytes() + b"x")
    assert _only(_check(packages)) == ("records", "problem", ["one/data.bin"])
    data.write_bytes(b"x" * 1000)
    assert _check(packages) == []
    assert _only(_check(packages, digests=True)) == ("records", "problem", ["one/data.bin"])


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("shake_128=AAAA,1000", False),
        ("shake_256=AAAA,01000", False),
        ("md4=AAAA,1000", False),
        (f"sha256=AAAA,{'9' * 5000}", True),
    ],
)
def test_a_record_may_say_what_it_likes_of_digests_and_sizes(packages: Path, row: str, wrong: bool) -> None:
    record = packages / "one-1.0.dist-info/RECORD"
    record.write_text(re.sub("(?m)^one/data.bin,.*", f"one/data.bin,{row}", record.read_text()))
    findings = _check(packages, digests=True)
    assert [finding.paths for finding in findings] == ([["one/data.bin"]] if wrong else [])


def test_bytecode_comes_and_goes(packages: Path) -> None:
    for path in packages.rglob("*.pyc"):
        path.unlink()
    (packages / "one" / "__pycache__").mkdir(exist_ok=True)
    (packages / "one" / "__pycache__" / "__init__.cpython-399.pyc").touch()
    assert _check(packages) == []


def test_bytecode_without_its_source_is_a_leftover(packages: Path) -> None:
    (packages / "one" / "__pycache__" / "gone.cpython-311.pyc").touch()
    assert _only(_check(packages)) == ("unowned", "warning", ["one/__pycache__/gone.cpython-311.pyc"])


def test_files_of_no_distribution_are_told(packages: Path) -> None:
    (packages / "notes.txt").touch()
    (packages / "by_hand").mkdir()
    (packages / "by_hand" / "module.py").touch()
    [finding] = _check(packages)
    assert finding.paths == ["by_hand/module.py", "notes.txt"]
    assert finding.what == "Files belong to no distribution: single files (1), by_hand (1)."


def test_what_vanishes_meanwhile_is_no_failure(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packages / "one/gone").mkdir()
    (packages / "one/vanishing").touch()
    listing = os.scandir

    def scandir(path: str) -> Any:
        if path != str(packages / "one"):
            return listing(path)
        with listing(path) as entries:
            found = list(entries)
            (packages / "one/gone").rmdir()
            (packages / "one/vanishing").unlink()
        return contextlib.nullcontext(found)

    monkeypatch.setattr(os, "scandir", scandir)
    assert _check(packages) == []


def test_names_do_not_command_the_terminal(packages: Path) -> None:
    (packages / "red\x1b[31m\n").mkdir()
    (packages / "red\x1b[31m\n" / os.fsdecode(b"\xff")).touch()
    [finding] = _check(packages)
    assert "red\\x1b[31m\\x0a (1)" in finding.what
    assert finding.paths == [r"red\x1b[31m\x0a/\xff"]


def test_two_distributions_that_wrote_one_file_are_told(index: Index, installer: Installer) -> None:
    index.add("headless", "1.0", {"cv/__init__.py": "A = 1\n", "cv/same.py": "", "cv/__pycache__/x.pyc": "a"})
    index.add("full", "1.0", {"cv/__init__.py": "B = 22\n", "cv/same.py": "", "cv/__pycache__/x.pyc": "b"})
    installer(dependencies=["headless", "full"])

    [finding] = [each for each in _check(installer.root.packages, digests=True) if each.check != "unowned"]

    assert (finding.check, finding.level, finding.paths) == ("overlaps", "warning", ["cv/__init__.py"])
    assert finding.what.startswith("full and headless wrote the same files")


def test_leftovers_of_another_version_are_a_problem(packages: Path) -> None:
    old = packages / "one-0.9.dist-info"
    old.mkdir()
    (old / "RECORD").write_text("one-0.9.dist-info/RECORD,,\n")
    check, level, paths = _only(_check(packages))
    assert (check, level, paths) == ("leftovers", "problem", ["one-0.9.dist-info", "one-1.0.dist-info"])


def test_a_distribution_without_a_record_is_a_leftover(packages: Path) -> None:
    (packages / "one-1.0.dist-info" / "RECORD").unlink()
    leftover, unowned = _check(packages)
    assert (leftover.check, leftover.level, leftover.paths) == ("leftovers", "problem", ["one-1.0.dist-info"])
    assert unowned.check == "unowned"


def test_what_pip_set_aside_is_a_leftover(packages: Path) -> None:
    (packages / "~ne").mkdir()
    (packages / "~ne" / "module.py").touch()
    assert _only(_check(packages)) == ("leftovers", "problem", ["~ne/module.py"])


def test_commands_without_their_interpreter_are_a_problem(packages: Path, tmp_path: Path) -> None:
    assert _only(_check(packages, path=str(tmp_path)))[:2] == ("commands", "problem")
    (packages / "bin" / "one").write_text("#!/gone/python3\n")
    broken = [finding for finding in _check(packages) if finding.check == "commands"]
    assert broken[0].paths == ["bin/one: /gone/python3"]


def test_nothing_is_changed(packages: Path) -> None:
    def tree() -> list[tuple[str, int, int]]:
        return sorted(
            (str(path), path.lstat().st_mtime_ns, path.lstat().st_ino) for path in packages.rglob("*")
        )

    before = tree()
    (packages / "one" / "data.bin").touch()
    before = tree()
    _check(packages, digests=True)
    assert tree() == before
