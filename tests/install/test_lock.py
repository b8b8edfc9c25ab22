from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from tests.conftest import Packhorse
from tests.install.conftest import Installer
from tests.install.index import Index, source, wheel

from packhorse.config_values import toml
from packhorse.errors import ConfigError, IntegrityError, PackhorseError
from packhorse.install.chosen import Chosen
from packhorse.install.lock import Target, chosen_by, encoded

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

    @property
    def environ(self) -> dict[str, str]:
        """That of the commands."""
        return self._installer.environ

    @environ.setter
    def environ(self, environ: dict[str, str]) -> None:
        self._installer.environ = environ

    def require(self, *lines: str, lock: bool = True) -> None:
        (self.directory / "requirements.txt").write_text("\n".join(lines))
        self._write('lock = "pylock.toml"\n' if lock else "")

    def wheels(self, text: str) -> None:
        self._write(f'lock = "pylock.toml"\n[[environment.wheels]]\n{text}')

    def _write(self, text: str) -> None:
        (self.directory / "packhorse.toml").write_text(
            f'[environment]\npython = "{sys.executable}"\nrequirements = ["requirements.txt"]\n{text}'
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        root = ("--root", str(self._installer.root.path))
        return self._packhorse(*arguments, *root, cwd=self.directory, env=self._installer.environ)

    def move(self, directory: Path) -> None:
        """Let it lie elsewhere from now on."""
        directory.parent.mkdir(exist_ok=True)
        self.directory = self.directory.rename(directory)
        self.lock = directory / self.lock.name

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


def test_a_directory_that_is_missing_is_told_before_anything_is_resolved(
    index: Index, project: Project
) -> None:
    project.environ = {**project.environ, "PACKHORSE_ENVIRONMENT_LOCK": "nowhere/pylock.toml"}
    done = project("lock")
    assert done.returncode == 2
    assert f"There is no directory {project.directory}/nowhere for the lock file." in done.stderr
    assert index.requests == []


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


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("ssh://git:hunter2@example.org/foo", "ssh://git@example.org/foo"),
        ("https://me:hunter2@example.org/foo", "https://example.org/foo"),
    ],
)
def test_of_who_reads_a_repository_only_the_account_of_ssh_is_kept(
    tmp_path: Path, given: str, kept: str
) -> None:
    lock = tmp_path / "pylock.toml"
    python = Target(dict(default_environment()), ["py3-none-any"])  # type: ignore[call-overload]
    repository = {"vcs_info": {"vcs": "git", "commit_id": "0" * 40}}
    lock.write_bytes(encoded([Chosen("foo", "1.0", given, direct=repository)], python, "", tmp_path))

    assert "hunter2" not in lock.read_text()
    assert [each.url for each in chosen_by(str(lock), python)] == [kept]


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
    assert (
        "pylock.toml, named in environment.lock, does not exist. `packhorse lock` makes it, " in done.stderr
    )
    assert "Run `packhorse lock`, or correct" in project("status").stdout


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


@pytest.mark.parametrize("engine", ["pip", "uv"])
def test_a_lock_moves_together_with_the_wheels_that_it_names(
    index: Index, installer: Installer, project: Project, tmp_path: Path, engine: str
) -> None:
    """Found by a page of links, named by a requirement or as an extra wheel: none by where it lay."""
    links, extra = project.directory / "wheels", project.directory / "more wheels"
    for directory in (links, extra):
        directory.mkdir()
    wheel(links, "linked", "1.0", requires=["named"])
    named = wheel(links, "named", "1.0")
    by_path = wheel(extra, "by-path", "1.0")
    wheel(extra, "by-links", "1.0")
    project.require("--no-index", "--find-links wheels", "linked", f"./wheels/{named.name}")
    project.wheels(
        f'name = "by-path"\npath = "more wheels/{by_path.name}"\n'
        '[[environment.wheels]]\nname = "by-links"\nfind-links = ["more wheels"]\n'
    )
    project.environ |= {"PACKHORSE_ENVIRONMENT_ENGINE": engine}
    project.locked()
    lock = project.lock.read_bytes()
    assert str(tmp_path) not in lock.decode()
    assert f'path = "more wheels/{by_path.name}"' in lock.decode()

    project.move(tmp_path / "elsewhere" / "deeper")
    done = project("install", "--locked", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["distributions"] == 4
    assert index.requests == []
    assert project.locked()["changed"] is False
    project.move(tmp_path / "back")
    assert json.loads(project("install", "--json").stdout)["installed"] is False

    (project.directory / "wheels" / named.name).unlink()
    refused = project("install", "--reinstall")
    assert refused.returncode == 1
    assert (
        f"{named.name} cannot be read from {project.directory}/wheels: No such file or directory."
        in refused.stderr
    )


def test_a_lock_moves_together_with_the_project_that_it_names(
    installer: Installer, project: Project, tmp_path: Path
) -> None:
    source(project.directory / "source")
    project.require("--editable ./source")
    project.locked()
    assert 'path = "source"' in project.lock.read_text()

    project.move(tmp_path / "elsewhere" / "deeper")
    assert project("install", "--locked").returncode == 0
    assert (installer.root.packages / "foo.pth").read_text() == f"{project.directory}/source\n"


def test_a_lock_that_names_a_wheel_by_the_url_of_its_file_is_taken(
    installer: Installer, tmp_path: Path
) -> None:
    links = tmp_path / "far wheels"
    links.mkdir()
    path = wheel(links, "foo", "1.0")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    lock = _locked(
        tmp_path,
        f'''
        [[packages]]
        name = "foo"
        version = "1.0"
        [[packages.wheels]]
        url = "{path.as_uri()}"
        hashes = {{sha256 = "{digest}"}}
        ''',
    )

    assert installer(lock=lock, verify=["foo"]).distributions == 1


@pytest.mark.parametrize("engine", ["pip", "uv"])
def test_either_engine_locks_the_same(index: Index, project: Project, engine: str) -> None:
    project.locked()
    before = toml(project.lock.read_text(), "")["packages"]
    project.lock.unlink()
    project.environ |= {"PACKHORSE_ENVIRONMENT_ENGINE": engine, "UV_DEFAULT_INDEX": index.url}

    project.locked()

    assert toml(project.lock.read_text(), "")["packages"] == before


def test_hashes_of_the_requirements_hold_for_a_lock(index: Index, project: Project) -> None:
    digests = {
        name: hashlib.sha256((index.directory / f"{name}-1.0-py3-none-any.whl").read_bytes()).hexdigest()
        for name in ("foo", "bar")
    }
    project.require(*(f"{name}==1.0 --hash=sha256:{digest}" for name, digest in digests.items()))
    project.locked()
    assert not any(request.endswith(".whl") for request in index.requests)
    assert project("install").returncode == 0

    project.require(f"foo==1.0 --hash=sha256:{'0' * 64}", f"bar==1.0 --hash=sha256:{digests['bar']}")
    refused = project("lock")
    assert refused.returncode == IntegrityError.exit_code


def test_the_chosen_extra_wheels_are_in_it(index: Index, project: Project, installer: Installer) -> None:
    """With hashes; so that installing looks at no page of links."""
    replaced = index.add("fast", "0.9")
    path = index.add("fast", "1.0", {"fast.py": "extra = True\n"})
    path = path.rename(path.with_name("fast-1.0+cpu-py3-none-any.whl"))
    project.require("foo", "fast==0.9")
    project.wheels(f'name = "fast"\nversion = "1.0"\nfind-links = ["{index.url}fast/"]\n')
    project.locked()

    [fast] = [each for each in toml(project.lock.read_text(), "")["packages"] if each["name"] == "fast"]
    assert fast["archive"]["url"].endswith("/fast-1.0+cpu-py3-none-any.whl")
    assert fast["archive"]["hashes"] == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    index.requests.clear()
    done = project("install", "--json")
    assert done.returncode == 0, done.stderr
    assert (installer.root.packages / "fast.py").read_text() == "extra = True\n"
    assert json.loads(done.stdout)["wheels"] == [{"name": "fast", "old": "", "new": "1.0"}]
    assert "fast/" not in index.requests and replaced.name not in index.requests

    project.wheels(f'name = "fast"\nfind-links = ["{index.url}fast/"]\n')
    assert "was made for other requirements" in project("install").stderr


# --- another Python or platform ---


def test_a_lock_can_be_made_for_another_python_and_platform(index: Index, project: Project) -> None:
    index.add(
        "foo",
        "2.0",
        tag="cp313-cp313-manylinux_2_17_aarch64",
        requires=["old; python_version < '3.12'", "new; python_version >= '3.12'"],
    )
    for tag in ("cp313-cp313-manylinux_2_34_aarch64", "cp311-cp311-manylinux_2_17_x86_64"):
        index.add("foo", "2.0", tag=tag)
    for name in ("old", "new"):
        index.add(name, "1.0")
    project.require("foo==2.0")
    project.environ |= {"UV_DEFAULT_INDEX": index.url}
    flags = ("--python-version", "3.13", "--platform", "manylinux_2_28_aarch64")

    done = project("lock", *flags)

    assert done.returncode == 0, done.stderr
    document = toml(project.lock.read_text(), "")
    assert document["requires-python"] == "==3.13.*"
    assert "aarch64" in document["environments"][0]
    assert [each["name"] for each in document["packages"]] == ["foo", "new"]
    [locked] = document["packages"][0]["wheels"]
    assert locked["name"] == "foo-2.0-cp313-cp313-manylinux_2_17_aarch64.whl"
    assert project("lock", "--check", *flags).returncode == 0
    assert project("install").returncode == 2  # not for the Python that is here


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--python-version", "2"), "2 is no version of Python"),
        (("--python-version", "3.1٢"), "3.1٢ is no version of Python"),
        (
            ("--platform", "manylinux_2_27_x86_64"),
            "does not resolve for the version of manylinux that --platform",
        ),
        (("--platform", "windows"), "windows is not a platform that can be locked for"),
    ],
)
def test_what_cannot_be_locked_for_is_told(project: Project, flags: tuple[str, ...], said: str) -> None:
    refused = project("lock", *flags)
    assert refused.returncode == 2
    assert said in refused.stderr


def test_pip_cannot_lock_for_another_python(project: Project) -> None:
    project.environ |= {"PACKHORSE_ENVIRONMENT_ENGINE": "pip"}
    refused = project("lock", "--python-version", "3.13")
    assert refused.returncode == 2
    assert "pip cannot resolve for another Python" in refused.stderr


# --- only what is locked ---


def test_locked_fails_without_a_lock_or_with_a_stale_one(project: Project, packhorse: Packhorse) -> None:
    project.locked()
    assert project("install", "--locked").returncode == 0
    assert project("run", "--locked", "--", "true").returncode == 0

    project.require("foo", "bar")
    for command, code in ((("install", "--locked"), 2), (("run", "--locked", "--", "true"), 125)):
        refused = project(*command)
        assert refused.returncode == code
        assert "was made for other requirements" in refused.stderr

    project.require("foo", lock=False)
    refused = project("install", "--locked")
    assert refused.returncode == 2
    assert "No lock file is configured" in refused.stderr


def test_locked_holds_a_lock_of_another_tool_against_the_requirements(index: Index, project: Project) -> None:
    """It does not tell what it was made from."""
    project.locked()
    own = project.lock.read_text()
    project.lock.write_text(own[: own.index("[tool.packhorse]")])
    assert project("install", "--locked").returncode == 0

    away = "away @ https://me:SECRET@example.org/away-1.0.tar.gz?token=SECRET"
    project.require("foo>=2", "bar ; sys_platform == 'win32'", away)
    assert project("install").returncode == 0
    refused = project("install", "--locked")
    assert refused.returncode == 2
    unmet = "foo>=2, away @ https://example.org/away-1.0.tar.gz?token="
    assert f"does not have what the requirements ask for: {unmet}." in refused.stderr


def test_status_tells_of_a_stale_lock(project: Project) -> None:
    def state() -> object:
        done = project("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["lock"]["state"]

    project.locked()
    assert state() == "fits"
    project.require("bar")
    assert state() == "stale"
    assert "run `packhorse lock`" in project("status").stdout
    project.lock.write_text('lock-version = "1.0"\ncreated-by = "other"\npackages = []\n')
    assert state() == "of another tool"


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
        (
            "[[packages]]\nname = 'foo'\narchive = {url = 'http://[::1/foo.zip', hashes = {sha256 = '00'}}\n",
            "is not a lock file that can be read",
        ),
        ("tool = 3\npackages = []\n", "is not a lock file that can be read"),
        ("packages = [\n", "is not valid TOML"),
    ],
)
def test_a_lock_file_that_says_nothing_for_this_python_is_refused(
    installer: Installer, tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        installer(lock=_locked(tmp_path, text))
    assert refused.value.remedy.startswith("Run `packhorse lock`")


@pytest.mark.parametrize("hashes", ["crc32 = '00'", "shake_128 = '00'", "sha256 = ''"])
def test_a_file_that_no_hash_can_be_held_against_is_refused(
    installer: Installer, tmp_path: Path, hashes: str
) -> None:
    text = f"[[packages]]\nname = 'foo'\narchive = {{path = 'foo-1.0.zip', hashes = {{{hashes}}}}}\n"
    with pytest.raises(ConfigError, match=r"foo-1\.0\.zip has no hash that can be checked"):
        installer(lock=_locked(tmp_path, text))


@pytest.mark.parametrize("tool", ["tool.packhorse = 3", "tool.packhorse.wheels = 3"])
def test_what_another_tool_says_of_itself_does_not_matter(
    index: Index, installer: Installer, tmp_path: Path, tool: str
) -> None:
    here = wheel(tmp_path, "foo", "1.0")
    digest = hashlib.sha256(here.read_bytes()).hexdigest()
    files = f"wheels = [{{path = '../{here.name}', hashes = {{sha256 = '{digest}'}}}}]"
    text = f"{tool}\n[[packages]]\nname = 'foo'\nversion = '1.0'\n{files}\n"
    installer(lock=_locked(tmp_path, text))
    assert (installer.root.packages / "foo.py").exists()


def test_a_locked_file_that_is_gone_is_named(index: Index, project: Project) -> None:
    project.locked()
    (index.directory / FOO).unlink()

    done = project("install")

    assert done.returncode == PackhorseError.exit_code == 1
    assert f"{FOO} cannot be downloaded: HTTP error 404" in done.stderr
