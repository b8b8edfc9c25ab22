"""Trees are removed whatever their shape."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from tests.conftest import unprivileged

from packhorse import atomic


def _make_deep(top: Path, depth: int) -> None:
    """Directories inside each other, deeper than a path can name, with a file and a link in each."""
    top.mkdir()
    directory = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=directory))
        os.symlink("/", "link", dir_fd=directory)
        os.mkdir("d", dir_fd=directory)
        deeper = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = deeper
    os.close(directory)


def test_a_tree_of_any_depth_is_removed(tmp_path: Path) -> None:
    _make_deep(tmp_path / "deep", 3000)
    atomic.remove_tree(tmp_path / "deep")
    assert list(tmp_path.iterdir()) == []


def test_a_tree_deeper_than_descriptors_are_allowed_is_removed(tmp_path: Path) -> None:
    _make_deep(tmp_path / "deep", 200)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        atomic.remove_tree(tmp_path / "deep")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert list(tmp_path.iterdir()) == []


def test_closed_directories_are_opened_up_but_not_the_one_that_the_tree_lies_in(tmp_path: Path) -> None:
    program = f"""
import os
from pathlib import Path
from packhorse import atomic
top = Path({str(tmp_path)!r})
for mode in (0o000, 0o555):
    os.makedirs(top / "tree/closed/below")
    for directory in ("tree/closed/below", "tree/closed", "tree"):
        os.chmod(top / directory, mode)
    atomic.remove_tree(top / "tree")
    assert not (top / "tree").exists()
os.mkdir(top / "tree")
os.chmod(top, 0o555)
try:
    atomic.remove_tree(top / "tree")
except PermissionError:
    os._exit(0)
os._exit(1)
"""
    assert subprocess.run([*unprivileged(), sys.executable, "-c", program], check=False).returncode == 0
    assert tmp_path.stat().st_mode & 0o777 == 0o555
