"""What an invocation works with: the store beside the root is as private as the root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.conftest import Packhorse


def test_the_store_beside_the_root_is_private(packhorse: Packhorse, root_path: Path) -> None:
    assert packhorse("status", "--root", str(root_path)).returncode == 0
    assert Path(f"{root_path}-store").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("command", ["pull", "push", "status", "snapshots"])
def test_a_store_beside_the_root_that_others_can_write_to_is_refused(
    command: str, packhorse: Packhorse, root_path: Path
) -> None:
    planted = Path(f"{root_path}-store")
    planted.mkdir()
    planted.chmod(0o777)
    refused = packhorse(command, "--root", str(root_path))
    assert refused.returncode == 2
    assert "can be written by other users" in refused.stderr


@pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="only root can chown")
def test_a_store_beside_the_root_that_somebody_else_made_is_refused(
    packhorse: Packhorse, root_path: Path
) -> None:
    planted = Path(f"{root_path}-store")
    planted.mkdir(mode=0o700)
    os.chown(planted, 12345, 12345)
    refused = packhorse("pull", "--root", str(root_path))
    assert refused.returncode == 2
    assert "belongs to user 12345" in refused.stderr


def test_a_store_that_was_named_is_taken_as_it_is(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    flags = ("--root", str(root_path), "--store", shared.as_uri())
    assert packhorse("status", *flags).returncode == 0
