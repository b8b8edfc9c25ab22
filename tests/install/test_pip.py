from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Cut, Index, Status

from packhorse.errors import PackhorseError
from packhorse.install import pip
from packhorse.install.interpreter import worker_interpreter


@pytest.fixture(scope="module")
def without_pip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has no pip."""
    directory = tmp_path_factory.mktemp("without-pip")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    return str(directory / "bin" / "python3")


def test_the_workers_own_pip_is_taken(environ: dict[str, str]) -> None:
    found = pip.find(worker_interpreter(sys.executable, environ), environ)

    assert found.words == (sys.executable, "-I", "-m", "pip")
    assert found.version >= (20, 0)


def test_a_worker_without_pip_is_served_by_that_of_packhorse(
    index: Index, installer: Installer, without_pip: str
) -> None:
    index.add(
        "foo", "1.0", {"foo.py": "", "foo-1.0.data/scripts/foo": "#!python\nimport sys; print(sys.prefix)\n"}
    )

    installer(dependencies=["foo"], python=without_pip, verify=["foo"])

    command = [installer.root.packages / "bin" / "foo"]
    started = subprocess.run(command, capture_output=True, text=True, check=True)
    assert started.stdout.strip() == str(Path(without_pip).parent.parent)


def test_the_pip_that_comes_with_python_installs_over_a_network_that_breaks(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    """It may be an old one, which takes half a file for a whole one."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    content = os.urandom(1_000_000)
    path = index.add("foo", "1.0", {"foo.py": "", "foo.bin": content})
    index.fail("foo/", Status(503))
    index.fail(path.name, Cut(after=600_000), Status(503))

    installer(dependencies=["foo"], python=str(tmp_path / "venv" / "bin" / "python3"), verify=["foo"])

    assert (installer.root.packages / "foo.bin").read_bytes() == content


def test_without_any_pip_the_remedy_is_told(
    environ: dict[str, str], without_pip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", without_pip)

    with pytest.raises(PackhorseError, match=r"no pip for .*ensurepip"):
        pip.find(worker_interpreter(without_pip, environ), environ)


def test_a_pip_directory_where_packhorse_is_called_is_not_taken_for_pip(
    index: Index, installer: Installer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add("foo", "1.0")
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path)

    assert installer(dependencies=["foo"], verify=["foo"]).installed
