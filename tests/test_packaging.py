"""What users get: the wheel built from this checkout, installed with its dependencies by pip."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from packhorse.cli import COMMANDS

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--wheel-dir", str(directory), str(CHECKOUT))
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment without pip that holds packhorse and what it depends on, nothing else."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=False)
    _pip("--python", str(directory / "bin" / "python"), "install", str(wheel))
    return directory


def test_the_tool_with_all_it_needs_is_under_40_mb(installed: Path) -> None:
    sizes = {}
    for folder, _, names in os.walk(installed):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            sizes[os.path.join(folder, name)] = max(status.st_size, status.st_blocks * 512)
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert sum(sizes.values()) < 40_000_000, f"largest: {largest}"


def test_the_wheel_holds_the_package_its_types_its_templates_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert b"Apache License" in archive.read(licence)
    assert "packhorse/py.typed" in names
    assert any(name.startswith("packhorse/templates/") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"packhorse"}


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    source = CHECKOUT / "src"
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    caches = {
        file for file in files if "__pycache__" in file.parts or any(p.startswith(".") for p in file.parts)
    }
    with zipfile.ZipFile(wheel) as archive:
        assert files - caches <= {Path(name) for name in archive.namelist()}


def test_the_version_is_the_wheels(wheel: Path, installed: Path, environ: dict[str, str]) -> None:
    version = wheel.name.split("-")[1]
    for command in (["packhorse"], ["python", "-m", "packhorse"]):
        shown = _run(installed, environ, *command, "--version")
        assert shown.stdout == f"packhorse {version}\n"


def test_help_lists_every_command(installed: Path, environ: dict[str, str]) -> None:
    listed = {
        line.split()[0]
        for line in _run(installed, environ, "packhorse", "--help").stdout.splitlines()
        if line
    }
    assert set(COMMANDS) <= listed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, installed: Path, environ: dict[str, str]) -> None:
    shown = _run(installed, environ, "packhorse", command, "--help")
    assert f"Usage: packhorse {command}" in shown.stdout


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _run(
    installed: Path, environ: dict[str, str], program: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [installed / "bin" / program, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
