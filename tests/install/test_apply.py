from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.install.conftest import Installer
from tests.install.index import Index, Status, source, wheel

from packhorse.config import Network
from packhorse.errors import PackhorseError

FOO = "foo-1.0-py3-none-any.whl"
BAR = "bar-1.0-py3-none-any.whl"


def _inodes(directory: Path) -> dict[str, int]:
    return {
        path.relative_to(directory).as_posix(): path.lstat().st_ino
        for path in directory.rglob("*")
        if not path.is_dir()
    }


def _recorded(packages: Path, info: str) -> set[str]:
    with open(packages / info / "RECORD", newline="") as record:
        return {row[0] for row in csv.reader(record)}


def _wheels(index: Index) -> list[str]:
    """The wheels that were fetched, in any order, since this was last asked."""
    found = sorted(request for request in index.requests if request.endswith(".whl"))
    index.requests.clear()
    return found


# --- the same as pip ---


def test_files_lie_where_pip_puts_them(index: Index, installer: Installer, tmp_path: Path) -> None:
    """Scripts, data, headers, entry points, namespaces, modes and names, as `pip install --target`."""
    index.add(
        "foo",
        "1.0",
        {
            "google/foo/__init__.py": "def main(): print('hello from foo')\n",
            "foo-1.0.data/scripts/tool": "#!python\nprint('tool')\n",
            "foo-1.0.data/data/share/foo/x": "data",
            "foo-1.0.data/headers/foo.h": "header",
            "foo-1.0.data/platlib/foo_native.py": "",
            "foo-1.0.data/purelib/foo_pure.py": "",
            "foo-1.0.dist-info/entry_points.txt": "[console_scripts]\nfoo = google.foo:main\n",
            "broken.py": "this is no Python\n",
            'odd "name", ü.txt': "",
        },
    )
    index.add("bar", "1.0", {"google/bar/__init__.py": "", "bin-like.txt": ""}, requires=["foo"])
    installer(dependencies=["bar"])
    by_pip = tmp_path / "by-pip"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", by_pip, "bar"],
        env=installer.environ,
        check=True,
    )

    if (by_pip / "include/site").exists():  # so in a virtual environment
        for path in (by_pip / "include/site").iterdir():
            path.rename(by_pip / "include" / path.name)
    ours, its = installer.root.packages, _inodes(by_pip)
    assert {name for name in _inodes(ours) if not name.endswith("provenance_url.json")} == its.keys()
    for name in its:
        assert (ours / name).stat().st_mode == (by_pip / name).stat().st_mode, name
        if not name.endswith((".pyc", "RECORD", "INSTALLER", "bin/foo", "bin/tool")):
            assert (ours / name).read_bytes() == (by_pip / name).read_bytes(), name
    assert (ours / "bin/tool").read_text().endswith("\nprint('tool')\n")
    assert (
        subprocess.run(
            [ours / "bin/foo"], capture_output=True, check=True, env={"PYTHONPATH": str(ours)}
        ).stdout
        == b"hello from foo\n"
    )


def test_metadata_tells_where_a_distribution_came_from_and_all_its_files(
    index: Index, installer: Installer
) -> None:
    path = index.add("foo", "1.0", requires=["bar"])
    index.add("bar", "1.0", {"bar/__init__.py": "", "bar/deep/x.conf.py": ""})
    installer(dependencies=[f"foo @ http://{index.host}/files/{path.name}?token=secret"])
    packages = installer.root.packages

    assert _recorded(packages, "foo-1.0.dist-info") | _recorded(packages, "bar-1.0.dist-info") == set(
        _inodes(packages)
    )
    direct = json.loads((packages / "foo-1.0.dist-info/direct_url.json").read_bytes())
    assert direct["url"] == f"http://{index.host}/files/{FOO}?token="
    origin = json.loads((packages / "bar-1.0.dist-info/provenance_url.json").read_bytes())
    assert origin["url"] == f"http://{index.host}/files/{BAR}"
    assert len(origin["archive_info"]["hashes"]["sha256"]) == 64
    assert (packages / "foo-1.0.dist-info/REQUESTED").exists()
    assert not (packages / "bar-1.0.dist-info/REQUESTED").exists()
    assert (packages / "foo-1.0.dist-info/INSTALLER").read_text() == "packhorse\n"


def test_two_installations_of_the_same_wheels_have_the_same_bytes(index: Index, installer: Installer) -> None:
    """Bytecode included, so that their snapshots share what they store."""
    index.add("foo", "1.0", {"foo/__init__.py": "x = 1\n", "foo/y.py": "def f(): return 2\n"})

    def installed() -> dict[str, tuple[bytes, int]]:
        installer(dependencies=["foo"], reinstall=True)
        files = (path for path in installer.root.packages.rglob("*") if path.is_file())
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    first, second = installed(), installed()
    of_the_wheel = {name for name in first if name.endswith((".py", ".pyc"))}
    assert len([name for name in of_the_wheel if name.endswith(".pyc")]) == 2
    assert {name: first[name][0] for name in of_the_wheel} == {name: second[name][0] for name in of_the_wheel}
    assert first["y.py"][1] == second["y.py"][1]
    assert str(installer.root.packages / "foo/y.py").encode() in next(
        content for name, (content, _) in first.items() if name.startswith("y.c")
    )


def test_bytecode_in_a_wheel_is_made_again_without_a_word(
    index: Index, installer: Installer, recwarn: pytest.WarningsRecorder
) -> None:
    cached = f"__pycache__/foo.{sys.implementation.cache_tag}.pyc"
    index.add("foo", "1.0", {"foo.py": "x = 1\n", cached: "not bytecode"})
    installer(dependencies=["foo"])

    assert (installer.root.packages / cached).read_bytes() != b"not bytecode"
    assert [str(warning.message) for warning in recwarn] == []


# --- only what changed ---


def test_one_changed_package_of_many_installs_one(index: Index, installer: Installer) -> None:
    names = [f"package-{number}" for number in range(12)]
    for name in names:
        module = name.replace("-", "_")
        index.add(name, "1.0", {f"{module}/__init__.py": "", f"shared/{module}/x.py": ""})
    installer(dependencies=names)
    before = _inodes(installer.root.packages)
    assert len(_wheels(index)) == 12
    index.add("package-3", "2.0", {"package_3/__init__.py": "new = True\n"})

    done = installer(dependencies=names)
    assert not done.installed  # an open requirement: nothing changed here
    done = installer(dependencies=[*names, "package-3>1"], verify=["package_3"])

    assert _wheels(index) == ["package_3-2.0-py3-none-any.whl"]
    after = _inodes(installer.root.packages)
    kept = {name for name in before if "package_3" not in name}
    assert all(after[name] == before[name] for name in kept)
    assert {name for name in after if "package_3" in name} == {
        "package_3/__init__.py",
        f"package_3/__pycache__/__init__.{sys.implementation.cache_tag}.pyc",
        *(
            f"package_3-2.0.dist-info/{name}"
            for name in ("METADATA", "WHEEL", "RECORD", "INSTALLER", "REQUESTED", "provenance_url.json")
        ),
    }
    assert any("11 of 12 distributions are unchanged" in note for note in installer.notes)


def test_a_package_that_is_not_wanted_any_more_goes(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    index.add("bar", "1.0")
    installer(dependencies=["foo", "bar"])
    installer(dependencies=["foo"])

    assert not any("bar" in name for name in _inodes(installer.root.packages))


def test_the_same_version_from_another_file_is_installed_again(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0", {"foo.py": "x = 1\n"})
    installer(dependencies=["foo"])
    index.add("foo", "1.0", {"foo.py": "x = 2\n"})
    index.add("bar", "1.0")
    installer(dependencies=["foo", "bar"])

    assert (installer.root.packages / "foo.py").read_text() == "x = 2\n"


def test_a_hash_in_capitals_is_the_same(index: Index, installer: Installer) -> None:
    foo = index.add("foo", "1.0")
    index.hashes[foo.name] = hashlib.sha256(foo.read_bytes()).hexdigest().upper()
    index.add("bar", "1.0")
    installer(dependencies=["foo"])
    installer(dependencies=["foo", "bar"])
    assert "1 of 2 distributions are unchanged and were linked" in installer.notes


def test_a_package_that_lost_a_file_is_installed_again(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    index.add("bar", "1.0")
    installer(dependencies=["foo"])
    (installer.root.packages / "foo.py").unlink()
    installer(dependencies=["foo", "bar"])

    assert (installer.root.packages / "foo.py").exists()


def test_everything_is_installed_again_where_that_is_asked_for(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    installer(dependencies=["foo"])
    installer(dependencies=["foo"], reinstall=True)

    assert _wheels(index) == [FOO, FOO]


def test_a_failed_installation_leaves_linked_files_as_they_were(index: Index, installer: Installer) -> None:
    """A wheel that brings a file of another distribution does not write through the link."""
    index.add("bar", "1.0", {"shared.py": "bar's\n"})
    installer(dependencies=["bar"])
    index.add("foo", "1.0", {"shared.py": "foo's\n"})

    with pytest.raises(PackhorseError, match="not_there"):
        installer(dependencies=["bar", "foo"], verify=["not_there"])
    assert (installer.root.packages / "shared.py").read_text() == "bar's\n"
    installer(dependencies=["bar", "foo"])
    assert (installer.root.packages / "shared.py").read_text() == "foo's\n"


def test_of_a_file_that_is_linked_and_brought_that_of_the_last_by_name_stays(
    index: Index, installer: Installer
) -> None:
    """As where all is brought."""
    index.add("bar", "1.0", {"shared.py": "bar's\n"})
    index.add("foo", "1.0", {"shared.py": "foo's\n"})
    installer(dependencies=["bar", "foo"])
    index.add("bar", "2.0", {"shared.py": "newer bar's\n"})
    installer(dependencies=["bar==2.0", "foo"])

    assert any("1 of 2 distributions are unchanged" in note for note in installer.notes)
    assert (installer.root.packages / "shared.py").read_text() == "foo's\n"


def test_wheels_of_a_directory_are_known_again_by_their_content(
    installer: Installer, index: Index, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    wheel(links, "foo", "1.0")
    (tmp_path / "r.txt").write_text(f"--no-index\n--find-links {links}\nfoo\n")
    (tmp_path / "more.txt").write_text(f"--no-index\n--find-links {links}\nfoo\nbar\n")
    installer(requirements=[str(tmp_path / "r.txt")])
    before = _inodes(installer.root.packages)
    wheel(links, "bar", "1.0")
    installer(requirements=[str(tmp_path / "more.txt")])

    assert _inodes(installer.root.packages)["foo.py"] == before["foo.py"]


# --- where files come from ---


def test_metadata_is_read_without_the_wheel(index: Index, installer: Installer) -> None:
    """With an index that offers it, and by parts of the wheel where it does not."""
    index.add("foo", "1.0", {"foo.bin": os.urandom(300_000)})
    installer(dependencies=["foo"])
    assert _wheels(index) == [FOO]

    index.metadata = False
    installer(dependencies=["foo"], reinstall=True)
    assert (installer.root.packages / "foo.bin").stat().st_size == 300_000


def test_an_index_without_metadata_and_parts_works(index: Index, installer: Installer) -> None:
    index.metadata = index.ranges = False
    index.add("foo", "1.0", requires=["bar"])
    index.add("bar", "1.0")

    assert installer(dependencies=["foo"]).distributions == 2


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The source of foo 1.0."""
    return source(tmp_path / "source tree")


def test_editable_local_and_archived_sources_are_built_by_pip(
    installer: Installer, index: Index, project: Path, tmp_path: Path
) -> None:
    index.add("bar", "1.0")
    archive = shutil.make_archive(str(tmp_path / "foo-1.0"), "gztar", tmp_path, project.name)
    requirements = tmp_path / "r.txt"
    packages = installer.root.packages

    for line, editable in (
        (f"-e '{project}'", True),
        (f"foo @ {project.as_uri()}", False),
        (f"foo @ {Path(archive).as_uri()}", False),
    ):
        requirements.write_text(f"{line}\nbar\n")
        installer(requirements=[str(requirements)], verify=["source", "bar"], reinstall=True)
        assert (packages / "source.py").exists() is not editable
        assert (packages / "foo-1.0.dist-info/RECORD").exists()


def test_a_repository_is_installed_at_its_commit_and_known_again(
    installer: Installer, index: Index, project: Path, tmp_path: Path
) -> None:
    git = ["git", "-C", str(project), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    line = f"foo @ git+file://{str(project).replace(' ', '%20')}"
    index.add("bar", "1.0")
    installer(dependencies=[line], verify=["source"])
    before = _inodes(installer.root.packages)["source.py"]
    installer(dependencies=[line, "bar"], verify=["source"])
    assert _inodes(installer.root.packages)["source.py"] == before

    (project / "source.py").write_text("changed = True\n")
    subprocess.run([*git, "commit", "-qam", "second"], check=True)
    installer(dependencies=[line], verify=["source"])
    assert (installer.root.packages / "source.py").read_text() == "changed = True\n"


def test_what_packhorse_is_refused_pip_fetches(index: Index, installer: Installer, tmp_path: Path) -> None:
    """Credentials that only pip knows: here of a keyring that answers nobody else."""
    keyring = tmp_path / "bin" / "keyring"
    keyring.parent.mkdir()
    answer = '{"username": "me", "password": "hunter2"}'
    keyring.write_text(f"#!/bin/sh\ngrep -qzx pip /proc/$PPID/cmdline && echo '{answer}'\n")
    keyring.chmod(0o755)
    index.credentials = "me:hunter2"
    index.add("foo", "1.0")
    installer.environ |= {
        "PATH": f"{keyring.parent}:{installer.environ['PATH']}",
        "PIP_INDEX_URL": index.url.replace("://", "://me@"),
        "PIP_KEYRING_PROVIDER": "subprocess",
    }

    installer(dependencies=["foo"], verify=["foo"])

    assert any(f"{FOO}: the server answered 401; pip fetches it" in note for note in installer.notes)
    assert "hunter2" not in installer.log


def test_kept_downloads_are_used_again(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    installer(dependencies=["foo"], keep_downloads=True)
    assert (installer.root.pip / "wheels" / FOO).exists()
    assert _wheels(index) == [FOO]

    installer(dependencies=["foo"], keep_downloads=True, reinstall=True)
    assert _wheels(index) == []
    (installer.root.pip / "wheels" / FOO).write_bytes(b"changed")
    installer(dependencies=["foo"], keep_downloads=True, reinstall=True)
    assert _wheels(index) == [FOO]


def test_a_file_that_is_no_wheel_is_named(index: Index, installer: Installer) -> None:
    path = index.add("foo", "1.0", {"foo.bin": bytes(1000)})
    index.faults["foo-1.0"] = []
    content = path.read_bytes()
    (installer.root.path / "x").write_bytes(content)
    path.write_bytes(content[:-50])
    index.metadata = False

    with pytest.raises(PackhorseError, match=r"foo"):
        installer(dependencies=["foo"])


# --- failures ---


def test_a_failing_wheel_stops_the_others(index: Index, installer: Installer) -> None:
    for number in range(40):
        index.add(f"package-{number}", "1.0", {f"package_{number}.bin": bytes(100_000)})
    index.fail("package_0-1.0-py3-none-any.whl", *[Status(404)] * 10)

    with pytest.raises(PackhorseError, match="HTTP error 404"):
        installer(dependencies=[f"package-{number}" for number in range(40)], network=Network(attempts=1))
    assert list(installer.root.packages.iterdir()) == []
    assert not installer.root.staging.exists()
