"""What tests can rely on of the fixtures that they share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Packhorse


def test_settings_of_whoever_runs_the_tests_do_not_leak_in(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name in ("PACKHORSE_TAG", "AWS_PROFILE", "PYTHONPATH", "PIP_RETRIES", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, "mine")
    environ = request.getfixturevalue("environ")
    assert {name for name, value in environ.items() if value == "mine"} == {"PIP_RETRIES", "SSL_CERT_FILE"}
    assert Path(environ["HOME"]).is_relative_to(request.getfixturevalue("tmp_path"))


def test_the_command_line_hands_back_what_it_printed_and_how_it_ended(packhorse: Packhorse) -> None:
    shown = packhorse("--version")
    assert (shown.returncode, shown.stdout.split()[0]) == (0, "packhorse")
    refused = packhorse("fly")
    assert refused.returncode == 2
    assert "no command `fly`" in refused.stderr


@pytest.mark.parametrize(("ci", "outcome"), [("true", "1 error"), ("", "1 skipped")])
def test_what_needs_namespaces_fails_in_ci_without_them_and_is_skipped_elsewhere(
    ci: str, outcome: str, environ: dict[str, str]
) -> None:
    selected = ["tests/test_os_disk.py", "-k", "test_the_os_disk_is_small", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *selected],
        cwd=Path(__file__).parent.parent,
        env={**environ, "PATH": "/nonexistent", "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout.splitlines()[-1]
    assert "Namespaces need root" in done.stdout or "unshare (util-linux) is not installed" in done.stdout
