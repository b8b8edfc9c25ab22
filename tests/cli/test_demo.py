"""What `packhorse demo` promises: the main job for everybody to see, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.conftest import Packhorse

COMMANDS = ["install", "push", "status", "run", "snapshots", "run"]


@pytest.fixture
def scratch(tmp_path: Path, environ: dict[str, str]) -> Path:
    """The directory for the temporary files of a test's commands."""
    path = tmp_path / "scratch"
    path.mkdir()
    environ["TMPDIR"] = str(path)
    return path


@pytest.fixture
def no_index(environ: dict[str, str]) -> None:
    """pip finds no package at all."""
    environ["PIP_NO_INDEX"] = "1"


def test_it_shows_each_command_and_leaves_nothing(
    packhorse: Packhorse, scratch: Path, tmp_path: Path
) -> None:
    demo = packhorse("demo", timeout=180, env={"PACKHORSE_STORAGE_TAG": "not!allowed"})
    assert demo.returncode == 0, demo.stderr
    shown = [line.split()[2] for line in demo.stdout.splitlines() if line.startswith("$ packhorse")]
    assert shown == COMMANDS
    assert "worker: my 1st start" in demo.stdout
    assert "worker: my 2nd start" in demo.stdout, "what the first saved at its end was restored"
    assert demo.stdout.count("$ rm -rf root") == 2
    assert os.listdir(scratch) == []
    assert {path.name for path in tmp_path.iterdir()} == {"scratch", "home"}
    assert not (tmp_path / "home/.cache").exists(), "pip kept its downloads to the root"


def test_with_json_stdout_is_one_object_and_the_directory_asked_for_is_kept(
    packhorse: Packhorse, scratch: Path, tmp_path: Path
) -> None:
    demo = packhorse("demo", "--directory", "kept/here", "--json", timeout=180)
    assert demo.returncode == 0, demo.stderr
    facts = json.loads(demo.stdout)
    assert facts["directory"] == str(tmp_path / "kept/here")
    assert [step["command"].split()[1] for step in facts["steps"]] == COMMANDS
    assert 0 < sum(step["seconds"] for step in facts["steps"]) <= facts["seconds"]
    assert {path.name for path in (tmp_path / "kept/here").iterdir()} == {
        *("packhorse.toml", "worker.py", "root", "store"),
    }
    assert (tmp_path / "kept/here/root/models/starts").read_text() == "2"
    assert os.listdir(scratch) == []
    again = packhorse("demo", "--directory", "kept/here")
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_a_step_that_fails_ends_it_and_nothing_is_left(
    packhorse: Packhorse, scratch: Path, no_index: None
) -> None:
    demo = packhorse("demo")
    assert demo.returncode == 1
    assert "No matching distribution found for numpy" in demo.stderr, "the step says what was wrong"
    assert "The demo stopped: `packhorse install` ended with exit code 1." in demo.stderr
    assert "Traceback" not in demo.stderr
    assert os.listdir(scratch) == []


def test_settings_for_other_work_are_refused(packhorse: Packhorse, scratch: Path) -> None:
    refused = packhorse("demo", "--root", "elsewhere")
    assert refused.returncode == 2
    assert "demo takes no --root" in refused.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_one_that_is_interrupted_leaves_nothing(
    packhorse: Packhorse, scratch: Path, number: int, code: int
) -> None:
    process = subprocess.Popen(
        [*packhorse.command, "demo"],
        cwd=packhorse.directory,
        env=dict(packhorse.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(scratch.glob("packhorse-demo-*/root/.packhorse/next/*")):
            assert process.poll() is None
            assert time.monotonic() < deadline, "no installation began"
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
        process.wait()
    assert os.listdir(scratch) == []
