from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from packhorse.errors import ConfigError
from packhorse.install.interpreter import worker_interpreter


def _executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_python_on_the_path_of_the_worker_is_taken(tmp_path: Path) -> None:
    python3 = _executable(tmp_path / "a" / "python3", f'exec {sys.executable} "$@"')
    python = _executable(tmp_path / "b" / "python", "exit 1")

    found = worker_interpreter("", {"PATH": f"{python.parent}:{python3.parent}"})

    assert found.path == sys.executable  # what the script stands for
    assert found.version == ".".join(map(str, sys.version_info[:3]))
    assert found.soabi == sysconfig.get_config_var("SOABI")
    assert found.platform == sysconfig.get_platform()


def test_python_is_taken_where_there_is_no_python3(tmp_path: Path) -> None:
    python = _executable(tmp_path / "python", f'exec {sys.executable} "$@"')

    assert worker_interpreter("", {"PATH": str(python.parent)}).path == sys.executable


def test_without_any_python_on_the_path_it_is_that_of_packhorse() -> None:
    assert worker_interpreter("", {"PATH": "/nowhere"}).path == sys.executable


def test_the_configured_python_wins_and_may_be_a_name(tmp_path: Path) -> None:
    named = _executable(
        tmp_path / "python9",
        """echo '{"path": "/opt/python9", "version": "9.1.2", "soabi": "cpython-91", "platform": "linux-x86_64"}'""",
    )

    for configured in ("python9", str(named)):
        found = worker_interpreter(configured, {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
        assert (found.path, found.minor, found.soabi) == ("/opt/python9", "9.1", "cpython-91")


def test_no_process_is_started_for_the_python_that_runs_packhorse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)

    assert worker_interpreter(sys.executable, {}).path == sys.executable


def test_a_python_that_is_not_there_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/python3.*environment\.python"):
        worker_interpreter("/nowhere/python3", {})


@pytest.mark.parametrize("script", ["exit 3", "echo Python 2.7", "kill $$"])
def test_what_is_no_python_3_is_an_error_with_a_remedy(tmp_path: Path, script: str) -> None:
    odd = _executable(tmp_path / "odd", script)

    with pytest.raises(ConfigError, match=r"does not answer as a Python 3.*environment\.python"):
        worker_interpreter(str(odd), {})
