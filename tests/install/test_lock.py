from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.install.conftest import Installer
from tests.install.index import Index, wheel

from packhorse.config_values import toml
from packhorse.errors import ConfigError, IntegrityError, PackhorseError

FOO = "foo-1.0-py3-none-any.whl"


@pytest.fixture
def project(index: Index, installer: Installer, packhorse: Packhorse, tmp_path: Path) -> Project:
    index.add("foo", "1.0", requires=["bar>=1"])
    index.add("bar", "1.0")
    return Project(installer, packhorse, tmp_path / "project")


class Project:
    """A directory with a configuration whose requirements are locked."""

    def __init__(self, installer: Installer, packhorse: Packhorse, directory: Path) -> None:
        directory.mkdir()
        self.directory, self._installer, self._packhorse = directory, installer, packhorse
        self.lock = directory / "pylock.toml"
        self.require("foo")

    def require(self, *lines: str) -> None:
        (self.directory / "requirements.txt").write_text("\n".join(lines))
        (self.directory / "packhorse.toml").write_text(
            f'[environment]\npython = "{sys.executable}"\nrequirements = ["requirements.txt"]\nlock = "pylock.toml"\n'
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        root = ("--root", str(self._installer.root.path))
        return self._packhorse(*arguments, *root, cwd=self.directory, env=self._installer.environ)

    def locked(self) -> dict[str, object]:
        done = self("lock", "--json")
        assert done.returncode == 0, done.stderr
        facts: dict[str, object] = json.loads(done.stdout)
        return facts


def test_a_lock_file_has_exact_files_with_hashes_and_sizes(index: Index, project: Project) -> None:
    facts = project.locked()

    path = index.directory / FOO
    document = toml(project.lock.read_text(), "pylock.toml")
    bar, foo = document["packages"]
    assert (bar["name"], foo["name"], foo["version"]) == ("bar", "foo", "1.0")
    assert foo["wheels"] == [
        {
            "name": FOO,
            "url": f"http://{index.host}/files/{FOO}",
            "size": path.stat().st_size,
            "hashes": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        }
    ]
    assert document["lock-version"] == "1.0"
    assert document["requires-python"] == f"=={sys.version_info.major}.{sys.version_info.minor}.*"
    assert facts["distributions"] == 2
    assert facts["changed"] is True
    assert not any(request.endswith(".whl") for request in index.requests)  # no wheel was downloaded


def test_the_same_requirements_give_the_same_lock_file(project: Project) -> None:
    project.locked()
    before = project.lock.read_bytes()

    assert project.locked()["changed"] is False
    assert project.lock.read_bytes() == before


def test_an_installation_from_a_lock_is_exact_and_resolves_nothing(index: Index, project: Project) -> None:
    project.locked()
    index.add("foo", "2.0")
    index.add("bar", "2.0")
    index.requests.clear()

    done = project("install", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["distributions"] == 2
    assert sorted(index.requests) == ["bar-1.0-py3-none-any.whl", FOO]  # no page of the index


def test_another_file_than_was_locked_is_refused(index: Index, project: Project) -> None:
    project.locked()
    content = bytearray((index.directory / FOO).read_bytes())
    content[-100] ^= 1
    (index.directory / FOO).write_bytes(content)

    done = project("install")

    assert done.returncode == IntegrityError.exit_code == 4
    assert f"{FOO} is not the file that was announced" in done.stderr


def test_requirements_that_changed_since_are_noticed(project: Project) -> None:
    project.locked()
    assert project("lock", "--check").returncode == 0
    project.require("foo", "# a comment", "")
    assert project("lock", "--check").returncode == 0
    project.require("foo", "bar")

    for arguments in (["install"], ["lock", "--check"]):
        refused = project(*arguments)
        assert refused.returncode == 2
        assert "was made for other requirements" in refused.stderr
        assert "Run `packhorse lock`." in refused.stderr
    project.locked()
    assert project("install").returncode == 0


def test_another_lock_leads_to_another_installation(index: Index, project: Project) -> None:
    project.locked()
    assert project("install").returncode == 0
    index.add("bar", "2.0")
    project.locked()
    done = project("install", "--json")

    assert json.loads(done.stdout)["installed"] is True
    assert "1 of 2 distributions are unchanged" in done.stderr
    assert json.loads(project("install", "--json").stdout)["installed"] is False


def test_a_lock_that_is_not_there_is_told(project: Project) -> None:
    done = project("install")

    assert done.returncode == 2
    assert "pylock.toml, named in environment.lock, does not exist" in done.stderr


def test_a_failed_lock_leaves_the_one_before(project: Project) -> None:
    project.locked()
    before = project.lock.read_bytes()
    project.require("foo", "not-to-be-found")

    assert project("lock").returncode == 1
    assert project.lock.read_bytes() == before


def test_wheels_of_a_directory_without_hashes_are_locked_with_some(
    installer: Installer, project: Project, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    path = wheel(links, "local", "1.0")
    project.require("--no-index", f"--find-links {links}", "local")
    project.locked()

    [package] = toml(project.lock.read_text(), "")["packages"]
    assert package["wheels"][0]["hashes"] == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert project("install").returncode == 0
    assert (installer.root.packages / "local.py").exists()


# --- lock files of other tools ---


def _locked(tmp_path: Path, text: str) -> str:
    path = tmp_path / "other" / "pylock.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'lock-version = "1.0"\ncreated-by = "other"\n{text}')
    return str(path)


def test_the_wheel_that_fits_the_worker_is_taken(index: Index, installer: Installer, tmp_path: Path) -> None:
    """Of several files, by the tags and markers of the worker's Python; a path is relative to the lock file."""
    other = tmp_path / "other"
    other.mkdir()
    here = wheel(other, "foo", "1.0", {"foo.py": "here = True\n"})
    lock = _locked(
        tmp_path,
        f"""
        [[packages]]
        name = "foo"
        version = "1.0"
        [[packages.wheels]]
        name = "foo-1.0-cp27-cp27m-win32.whl"
        url = "http://{index.host}/files/foo-1.0-cp27-cp27m-win32.whl"
        hashes = {{sha256 = "{"0" * 64}"}}
        [[packages.wheels]]
        path = "{here.name}"
        hashes = {{sha256 = "{hashlib.sha256(here.read_bytes()).hexdigest()}"}}
        [[packages]]
        name = "elsewhere"
        version = "1.0"
        marker = "sys_platform == 'win32'"
        [[packages.wheels]]
        url = "http://{index.host}/files/elsewhere-1.0-py3-none-any.whl"
        hashes = {{sha256 = "{"0" * 64}"}}
        """,
    )

    assert installer(lock=lock, verify=["foo"]).distributions == 1
    assert (installer.root.packages / "foo.py").read_text() == "here = True\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('requires-python = "<3"\npackages = []\n', "has nothing for the worker's Python"),
        ("packages = 3\n", "is not a lock file that can be read"),
        ("[[packages]]\nname = 'foo'\nversion = '1'\n", "is not a lock file that can be read"),
        ("packages = [\n", "is not valid TOML"),
    ],
)
def test_a_lock_file_that_says_nothing_for_this_python_is_refused(
    installer: Installer, tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        installer(lock=_locked(tmp_path, text))


def test_a_locked_file_that_is_gone_is_named(index: Index, project: Project) -> None:
    project.locked()
    (index.directory / FOO).unlink()

    done = project("install")

    assert done.returncode == PackhorseError.exit_code == 1
    assert f"{FOO} cannot be downloaded: HTTP error 404" in done.stderr
