from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.install.conftest import Installer
from tests.install.index import Cut, Index, Stall, Status
from tests.worker.conftest import alive, until

from packhorse.config import Network
from packhorse.errors import ConfigError, PackhorseError
from packhorse.root import Root, State

FOO = "foo-1.0-py3-none-any.whl"


def _tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def old(index: Index, installer: Installer) -> dict[str, bytes]:
    """The files of an environment that is in force."""
    index.add("foo", "0.9")
    installer(dependencies=["foo==0.9"])
    return _tree(installer.root.packages)


# --- the environment ---


def test_requirements_with_all_they_include_and_dependencies_are_installed(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    for name in ("foo", "bar", "baz", "inline"):
        index.add(name, "1.0")
    index.add("bar", "2.0", requires=["deep"])
    index.add("deep", "1.0")
    index.add("deep", "2.0")
    (tmp_path / "my files").mkdir()
    (tmp_path / "my files" / "constraints.txt").write_text("deep<2")
    (tmp_path / "my files" / "more.txt").write_text("bar\n-c constraints.txt")
    (tmp_path / "first.txt").write_text("foo  # ours\n-r 'my files/more.txt'")
    (tmp_path / "second.txt").write_text("baz")

    done = installer(
        requirements=[str(tmp_path / "first.txt"), str(tmp_path / "second.txt")],
        dependencies=["inline==1.0"],
        verify=["foo", "deep"],
    )

    names = {path.name for path in installer.root.packages.glob("*.dist-info")}
    assert names == {
        f"{name}.dist-info" for name in ("foo-1.0", "bar-2.0", "deep-1.0", "baz-1.0", "inline-1.0")
    }
    assert done.distributions == 5
    assert [outcome.module for outcome in done.imports] == ["foo", "deep"]


def test_paths_in_requirements_lead_from_the_configuration(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    index.add("foo", "1.0").rename(tmp_path / FOO)
    (tmp_path / "requirements.txt").write_text(f"./{FOO}")

    installer(requirements=[str(tmp_path / "requirements.txt")], file=tmp_path / "packhorse.toml")

    assert (installer.root.packages / "foo.py").exists()


def test_the_second_time_nothing_is_done(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    first = installer(dependencies=["foo"])
    requests = len(index.requests)

    second = installer(dependencies=["foo"])

    assert (first.installed, second.installed) == (True, False)
    assert second.fingerprint == first.fingerprint == installer.root.state().fingerprint
    assert (second.files, second.bytes, second.distributions) == (first.files, first.bytes, 1)
    assert len(index.requests) == requests


def test_it_is_done_again_where_that_is_asked_for(
    index: Index, installer: Installer, old: dict[str, bytes]
) -> None:
    (installer.root.packages / "foo.py").write_text("broken")

    assert installer(dependencies=["foo==0.9"], reinstall=True).installed
    assert (installer.root.packages / "foo.py").read_bytes() == old["foo.py"]


def test_changed_requirements_are_noticed(index: Index, installer: Installer, tmp_path: Path) -> None:
    index.add("foo", "1.0")
    index.add("bar", "1.0")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("foo")
    installer(requirements=[str(requirements)])
    requirements.write_text("bar")

    assert installer(requirements=[str(requirements)]).installed
    assert {path.name for path in installer.root.packages.glob("*.py")} == {"bar.py"}


def test_lost_packages_are_noticed(index: Index, installer: Installer, old: dict[str, bytes]) -> None:
    for path in installer.root.packages.iterdir():
        path.rename(installer.root.path / path.name)

    assert installer(dependencies=["foo==0.9"]).installed


def test_the_state_says_what_was_installed_and_keeps_the_shared_manifests(
    index: Index, installer: Installer
) -> None:
    index.add("foo", "1.0")
    installer.root.record(
        State(state="complete", fingerprint="old", manifest="m", shared=("s",), snapshot="id")
    )

    done = installer(dependencies=["foo"])

    state = installer.root.state()
    assert (state.state, state.fingerprint, state.durable) == ("complete", done.fingerprint, True)
    assert (state.manifest, state.shared, state.snapshot) == ("", ("s",), "")
    assert state.soabi.startswith("cpython-") and state.platform.startswith("linux-")


def test_nothing_configured_is_an_error_that_says_what_to_add(installer: Installer) -> None:
    with pytest.raises(ConfigError, match=r"requirements, dependencies or wheels under \[environment\]"):
        installer(verify=["foo"])


def test_sizes_are_told(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0", {"foo.bin": os.urandom(3_000_000)})

    done = installer(dependencies=["foo"])

    assert 3_000_000 < done.bytes <= done.root_bytes < 4_000_000
    assert done.peak_root_bytes >= done.root_bytes
    assert done.seconds > 0 and done.peak_rss_bytes > 10_000_000
    assert done.log == str(next(installer.root.logs.iterdir()))


# --- where things are written ---


_BACKEND = """
import json, os, sys, tempfile, zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    with open({seen!r}, "w") as file:
        json.dump([tempfile.gettempdir(), os.getcwd(), sys.path, os.environ["PIP_CACHE_DIR"]], file)
    info = "foo-1.0.dist-info/"
    with zipfile.ZipFile(os.path.join(directory, "foo-1.0-py3-none-any.whl"), "w") as archive:
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: foo\\nVersion: 1.0\\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(info + "RECORD", "")
    return "foo-1.0-py3-none-any.whl"
"""


def test_everything_is_written_inside_the_root(installer: Installer, tmp_path: Path) -> None:
    """A build tells where pip's temporary files are, where it is built, and what it can import."""
    source, seen = tmp_path / "source", tmp_path / "seen"
    source.mkdir()
    (source / "backend.py").write_text(_BACKEND.format(seen=str(seen)))
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "foo"\nversion = "1.0"\n'
    )
    archive = shutil.make_archive(str(tmp_path / "foo-1.0"), "gztar", tmp_path, "source")
    before = set(Path(installer.environ["HOME"]).rglob("*"))
    installer.environ["PYTHONPATH"] = f"{installer.root.packages}:{installer.root.site}"
    installer.environ["PATH"] = "/nowhere"  # pip asks a rustc that it finds, and rustup's writes into HOME

    done = installer(dependencies=[f"foo @ {Path(archive).as_uri()}"])

    temporary, built_in, path, cache = json.loads(seen.read_text())
    assert all(place.startswith(f"{installer.root.tmp}/") for place in (temporary, built_in, cache))
    assert not any(
        place.startswith((str(installer.root.packages), str(installer.root.site))) for place in path
    )
    assert set(Path(installer.environ["HOME"]).rglob("*")) == before
    assert list(installer.root.tmp.iterdir()) == list(installer.root.build.iterdir()) == []
    assert done.distributions == 1


def test_downloads_are_kept_only_where_that_is_asked_for(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    installer.environ["PIP_TRUSTED_HOST"] = index.host  # else pip caches nothing that came without TLS

    installer(dependencies=["foo"])
    assert list(installer.root.pip.rglob("*")) == []
    installer(dependencies=["foo"], keep_downloads=True, reinstall=True)
    assert any(path.is_file() for path in installer.root.pip.rglob("*"))


def test_settings_of_pip_that_lead_elsewhere_are_overruled(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    index.add("foo", "1.0")
    elsewhere = tmp_path / "elsewhere"
    settings = ("target", "prefix", "root", "log", "report", "src")
    lines = [f"{name} = {elsewhere}/{name}" for name in settings]
    flags = ["user = true", "dry-run = true", "require-virtualenv = true", "quiet = 3", "no-clean = true"]
    (tmp_path / "pip.conf").write_text("\n".join(["[global]", *lines, *flags, f"index-url = {index.url}"]))
    del installer.environ["PIP_INDEX_URL"]
    installer.environ |= {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    installer.environ |= {f"PIP_{name.upper()}": f"{elsewhere}/{name}" for name in settings}
    installer.environ |= {"PIP_USER": "1", "PIP_DRY_RUN": "1", "PIP_REQUIREMENT": "/nothing"}

    installer(dependencies=["foo"])

    assert (installer.root.packages / "foo.py").exists()
    assert not elsewhere.exists()


# --- failures ---


def test_a_failing_import_leaves_the_old_environment_and_is_named(
    index: Index, installer: Installer, old: dict[str, bytes]
) -> None:
    index.add(
        "foo", "1.0", {"foo.py": "print('some output')\nraise ImportError('libfoo.so: undefined symbol: x')"}
    )
    before = installer.root.state()

    with pytest.raises(PackhorseError) as raised:
        installer(dependencies=["foo"], verify=["json", "foo", "not_there"])

    assert "The environment before it stays in force" in raised.value.what
    assert "`import foo`: ImportError: libfoo.so: undefined symbol: x" in raised.value.what
    assert "`import not_there`: ModuleNotFoundError: No module named 'not_there'" in raised.value.what
    log = raised.value.remedy.split()[-1].rstrip(".")
    assert "some output" in Path(log).read_text()
    assert _tree(installer.root.packages) == old
    assert installer.root.state() == before
    assert not installer.root.staging.exists()


def test_the_import_check_sees_the_new_packages_with_their_pth_files_and_the_workers_environment(
    index: Index, installer: Installer, old: dict[str, bytes]
) -> None:
    index.add(
        "foo",
        "1.0",
        {"foo.py": "import hidden\nassert foo_home", "foo.pth": "hidden\n", "hidden/hidden.py": ""},
    )
    index.add("foo", "1.1", {
        "foo.py": (
            "import hidden, os, tempfile\n"
            "assert os.environ['HF_HOME'].startswith(os.environ['PACKHORSE_ROOT'])\n"
            "assert tempfile.gettempdir().startswith(os.environ['PACKHORSE_ROOT'])\n"
        ),
        "foo.pth": "hidden\n",
        "hidden/hidden.py": "",
    })  # fmt: skip

    assert [outcome.ok for outcome in installer(dependencies=["foo"], verify=["foo"]).imports] == [True]


def test_the_environment_in_force_can_be_checked_again(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    installer(dependencies=["foo"], verify=["foo"])

    assert [outcome.ok for outcome in installer.check("foo")] == [True]
    (installer.root.packages / "foo.py").write_text("1/0")
    with pytest.raises(PackhorseError, match="`import foo`: ZeroDivisionError: division by zero"):
        installer.check("foo")


def test_a_failing_pip_shows_its_last_lines_and_the_log(
    index: Index, installer: Installer, old: dict[str, bytes]
) -> None:
    before = installer.root.state()

    with pytest.raises(PackhorseError) as raised:
        installer(dependencies=["foo", "not-to-be-found==9"])

    assert "ERROR: No matching distribution found for not-to-be-found==9" in raised.value.what
    log = raised.value.remedy.split()[-1].rstrip(".")
    assert "Collecting foo" in Path(log).read_text()
    assert _tree(installer.root.packages) == old
    assert installer.root.state() == before
    assert installer.waits == []


def test_an_environment_that_a_command_uses_is_not_replaced(
    index: Index, installer: Installer, old: dict[str, bytes]
) -> None:
    requests = len(index.requests)
    descriptor = installer.root.use_packages()
    try:
        with pytest.raises(PackhorseError, match="in use by a running command"):
            installer(dependencies=["foo==0.9"], reinstall=True)
        assert not installer(dependencies=["foo==0.9"]).installed
    finally:
        os.close(descriptor)

    assert len(index.requests) == requests
    assert _tree(installer.root.packages) == old


def test_a_wheel_for_another_python_is_refused(index: Index, installer: Installer, tmp_path: Path) -> None:
    from tests.install.index import wheel

    path = wheel(tmp_path, "foo", "1.0", tag="cp27-cp27m-win32")

    with pytest.raises(PackhorseError, match="The wheel of foo does not fit"):
        installer(wheels=[{"name": "foo", "path": str(path)}])


# --- the network ---


def test_an_index_and_a_file_that_fail_twice_are_asked_three_times(
    index: Index, installer: Installer
) -> None:
    index.add("foo", "1.0")
    index.fail("foo/", Status(503), Status(500))
    index.fail(FOO, Status(502), Status(429))

    installer(dependencies=["foo"])

    assert index.requests == ["foo/", "foo/", "foo/", FOO, FOO, FOO]
    assert [int(wait) for wait in installer.waits] == [1, 2, 1, 2]
    assert any(
        note.startswith("foo/: the server answered 500; attempt 3 of 3 in 2.") for note in installer.notes
    )
    assert any(
        note.startswith(f"{FOO}: the server answered 502; attempt 2 of 3 in 1.") for note in installer.notes
    )


def test_the_attempts_come_to_an_end(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    index.fail(FOO, *[Status(503)] * 100)

    with pytest.raises(PackhorseError, match=rf"{FOO} could not be downloaded: the server answered 503"):
        installer(dependencies=["foo"], network=Network(attempts=4))

    assert index.requests.count(FOO) == 4
    assert [int(wait) for wait in installer.waits] == [1, 2, 4]


@pytest.mark.parametrize("code", [404, 403])
def test_a_file_that_is_not_there_or_refused_is_asked_for_once(
    index: Index, installer: Installer, code: int
) -> None:
    index.add("foo", "1.0")
    index.fail(FOO, *[Status(code)] * 100)

    with pytest.raises(PackhorseError, match=f"HTTP error {code}"):
        installer(dependencies=["foo"])

    assert index.requests.count(FOO) == 1


def test_a_wrong_hash_is_not_tried_again(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    index.hashes[FOO] = "0" * 64

    with pytest.raises(PackhorseError, match="is not the file that was announced") as raised:
        installer(dependencies=["foo"])

    assert raised.value.exit_code == 4
    assert index.requests.count(FOO) == 1


def test_a_download_that_breaks_goes_on_where_it_was(index: Index, installer: Installer) -> None:
    content = os.urandom(2_000_000)
    index.add("foo", "1.0", {"foo.bin": content})
    index.fail(FOO, Cut(after=1_000_000))

    installer(dependencies=["foo"])

    assert (installer.root.packages / "foo.bin").read_bytes() == content
    assert index.requests.count(FOO) == 2
    assert any("the connection broke at 1,000,000 of 2,0" in note for note in installer.notes)


def test_a_large_file_gets_the_long_timeout_and_its_own_count_from_the_first_attempt(
    index: Index, installer: Installer
) -> None:
    """Its size is known before it is fetched."""
    index.add("foo", "1.0", {"foo.bin": os.urandom(1_000_000)})
    index.fail(FOO, Status(503), Stall(after=10, seconds=1.5))

    installer(
        dependencies=["foo"],
        network=Network(
            attempts=1, timeout_small=1.0, timeout_large=30, large_size=500_000, large_attempts=2
        ),
    )

    assert len(installer.waits) == 1
    assert any(note.startswith(FOO) and "; attempt 2 of 2 in 1." in note for note in installer.notes)


def test_files_that_arrived_are_not_fetched_again_by_the_next_attempt(
    index: Index, installer: Installer
) -> None:
    index.add("bar", "1.0", requires=["foo"])
    index.add("foo", "1.0")
    index.fail(FOO, Status(503))
    installer.environ["PIP_TRUSTED_HOST"] = index.host

    installer(dependencies=["bar"])

    assert index.requests.count("bar-1.0-py3-none-any.whl") == 1


def test_an_extra_index_that_does_not_answer_is_told(index: Index, installer: Installer) -> None:
    index.add("foo", "1.0")
    installer.environ["PIP_EXTRA_INDEX_URL"] = "http://127.0.0.1:9/simple/"

    installer(dependencies=["foo"])

    assert any(
        "without an index that did not answer" in note and "127.0.0.1:9" in note for note in installer.notes
    )


def test_credentials_of_an_index_work_and_reach_neither_log_nor_messages(
    index: Index, installer: Installer
) -> None:
    index.add("foo", "1.0")
    index.credentials = "some%20user:hunter2".replace("%20", " ")
    installer.environ["PIP_INDEX_URL"] = index.url.replace("://", "://some%20user:hunter2@")

    installer(dependencies=["foo"])
    with pytest.raises(PackhorseError) as raised:
        installer(dependencies=["foo", "nothing"])

    said = installer.log + str(raised.value) + "".join(installer.notes)
    assert "Looking in indexes" in said
    assert "hunter2" not in said and "some%20user" not in said


def test_credentials_of_a_requirement_reach_neither_log_nor_messages(
    index: Index, installer: Installer, tmp_path: Path
) -> None:
    path = index.add("foo", "1.0")
    index.credentials = "me:hunter2"
    index.fail(path.name, Status(503), *[Status(404)] * 100)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"foo @ http://me:hunter2@{index.host}/files/{path.name}?token=s3cr3t")

    with pytest.raises(PackhorseError) as raised:
        installer(requirements=[str(requirements)])

    said = installer.log + str(raised.value) + "".join(installer.notes)
    assert path.name in said
    assert "hunter2" not in said and "s3cr3t" not in said


# --- being stopped ---


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a configuration that installs foo."""
    directory = tmp_path / "project"
    directory.mkdir()
    (directory / "packhorse.toml").write_text(
        f'[environment]\npython = "{sys.executable}"\ndependencies = ["foo"]\nverify = ["foo"]\n'
    )
    return directory


def _processes_in(directory: Path) -> list[int]:
    """Processes whose command line or working directory names the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(directory) in words and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_install_that_is_stopped_leaves_the_old_environment_and_the_next_one_works(
    index: Index,
    installer: Installer,
    packhorse: Packhorse,
    project: Path,
    old: dict[str, bytes],
    number: signal.Signals,
) -> None:
    index.add("foo", "1.0", {"foo.py": "NEW = True", "foo.bin": os.urandom(100_000)})
    index.fail(FOO, Stall(after=50_000))
    arguments = ["install", "--root", str(installer.root.path)]
    before, requests = installer.root.state(), index.requests.count(FOO)
    with subprocess.Popen(
        [*packhorse.command, *arguments],
        cwd=project,
        env=installer.environ,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        until(lambda: index.requests.count(FOO) > requests)
        running.send_signal(number)
        running.wait(timeout=20)

    assert running.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    until(lambda: not _processes_in(installer.root.path))
    assert _tree(installer.root.packages) == old
    assert installer.root.state() == before
    if number != signal.SIGKILL:
        assert list(installer.root.tmp.iterdir()) == []
        assert not installer.root.staging.exists()

    again = packhorse(*arguments, cwd=project, env=installer.environ)

    assert again.returncode == 0, again.stderr
    assert (installer.root.packages / "foo.py").read_text() == "NEW = True"
    assert list(installer.root.tmp.iterdir()) == []
    assert not installer.root.staging.exists()


def test_an_install_killed_at_any_moment_leaves_one_whole_environment(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path, old: dict[str, bytes]
) -> None:
    """Killed as soon as something in the root tells how far it is; the last two moments are short."""
    index.add("foo", "1.0", {"foo.py": "NEW = True"})
    root = installer.root
    command = [*packhorse.command, "install", "--root", str(root.path)]
    old_fingerprint = root.state().fingerprint
    moments = [
        (root.staging / "installed").exists,
        (root.staging / "installed" / "foo.py").exists,
        lambda: root.state().state != "complete",
        root.retired.exists,
    ]
    for moment in moments:
        with subprocess.Popen(
            command, cwd=project, env=installer.environ, stderr=subprocess.DEVNULL
        ) as running:
            until(lambda: moment() or running.poll() is not None)  # noqa: B023 - called within this turn
            running.kill()
        files, state = _tree(Root.open(root.path).packages), root.state()
        is_old = state.fingerprint == old_fingerprint
        if state.state != "complete":
            is_old = files == old
        assert (
            files == old
            if is_old
            else files["foo.py"] == b"NEW = True" and "foo-1.0.dist-info/RECORD" in files
        )

    assert subprocess.run(command, cwd=project, env=installer.environ, check=False).returncode == 0
    assert _tree(root.packages)["foo.py"] == b"NEW = True"


# --- the command ---


def test_the_command_prints_a_table_and_its_json_all_that_is_promised(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path
) -> None:
    index.add("foo", "1.0")
    arguments = ["install", "--root", str(installer.root.path)]

    table = packhorse(*arguments, cwd=project, env=installer.environ)
    again = packhorse(*arguments, cwd=project, env=installer.environ)
    facts = packhorse(*arguments, "--reinstall", "--json", cwd=project, env=installer.environ)

    assert table.returncode == again.returncode == facts.returncode == 0
    assert (
        "import foo" in table.stdout
        and "1 distribution, " in table.stdout
        and str(installer.root.logs) in table.stdout
    )
    assert again.stdout.startswith("Up to date")
    promised = {
        "seconds",
        "files",
        "bytes",
        "root_bytes",
        "peak_root_bytes",
        "os_disk_bytes",
        "peak_rss_bytes",
    }
    assert promised <= set(json.loads(facts.stdout))


def test_a_failed_command_says_error_and_remedy_as_json(
    installer: Installer, packhorse: Packhorse, project: Path
) -> None:
    failed = packhorse(
        "install", "--root", str(installer.root.path), "--json", cwd=project, env=installer.environ
    )

    assert failed.returncode == 1
    facts = json.loads(failed.stdout)
    assert "No matching distribution found for foo" in facts["error"]
    assert "log" in facts["remedy"] and facts["exit_code"] == 1
    assert "Traceback" not in failed.stderr


def test_a_root_that_a_pull_left_half_restored_is_not_installed_over(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path
) -> None:
    index.add("foo", "1.0")
    installer.root.record(State(state="partial"))
    arguments = ["install", "--root", str(installer.root.path)]

    refused = packhorse(*arguments, cwd=project, env=installer.environ)

    assert refused.returncode == 1
    assert "packhorse pull" in refused.stderr
    assert packhorse(*arguments, "--reinstall", cwd=project, env=installer.environ).returncode == 0


# --- a full disk ---


def _on_a_small_disk(
    size: str, packhorse: Packhorse, installer: Installer, project: Path
) -> subprocess.CompletedProcess[str]:
    mount = f'mount -t tmpfs -o mode=0700,size={size} none {installer.root.path} && exec "$@"'
    return subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            mount,
            "sh",
            *packhorse.command,
            "install",
            "--root",
            str(installer.root.path),
        ],
        cwd=project,
        env=installer.environ,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.namespaces
def test_a_disk_that_is_nearly_full_is_refused_before_anything_is_fetched(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path
) -> None:
    failed = _on_a_small_disk("20m", packhorse, installer, project)

    assert failed.returncode == 5
    assert "MB free, but an installation needs at least 67 MB." in failed.stderr
    assert index.requests == []


@pytest.mark.namespaces
@pytest.mark.parametrize("size", [60_000_000, 100_000_000])
def test_a_disk_that_fills_up_is_named(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path, size: int
) -> None:
    """One file fits once but not twice, the other not at all; the server tells no sizes before."""
    index.ranges = index.metadata = False
    index.add("foo", "1.0", {"foo.bin": bytes(size)})

    failed = _on_a_small_disk("80m", packhorse, installer, project)

    assert failed.returncode == 5, failed.stderr
    assert "was full while" in failed.stderr or "but what is to be installed" in failed.stderr
    assert "attempt 2" not in failed.stderr


@pytest.mark.namespaces
def test_what_will_not_fit_is_told_before_a_wheel_is_fetched(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path
) -> None:
    index.add("foo", "1.0", {"foo.py": "", "foo.bin": bytes(60_000_000), "foo.a": bytes(5_000_000)})

    failed = _on_a_small_disk("80m", packhorse, installer, project)

    assert failed.returncode == 5, failed.stderr
    assert (
        "takes 65 MB, and its largest wheel (foo-1.0-py3-none-any.whl) 65 MB while it is unpacked: "
        in failed.stderr
    )
    assert "The largest are foo (65 MB)." in failed.stderr
    assert 'To workers that restore it profile = "slim" saves about 5 MB.' in failed.stderr
    assert index.requests == ["foo/"]


@pytest.mark.namespaces
def test_wheels_that_are_kept_need_room_too(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path
) -> None:
    """Three wheels of 15 MB: their files and one of them would find room on a disk of 80 MB, all do not."""
    for name in ("bar", "baz"):
        index.add(name, "1.0", {f"{name}.bin": os.urandom(15_000_000)})
    index.add("foo", "1.0", {"foo.py": "", "foo.bin": os.urandom(15_000_000)}, requires=["bar", "baz"])
    installer.environ |= {"PACKHORSE_ENVIRONMENT_KEEP_DOWNLOADS": "true"}

    failed = _on_a_small_disk("80m", packhorse, installer, project)

    assert failed.returncode == 5, failed.stderr
    assert "takes 45 MB, and the wheels that keep-downloads keeps 45 MB: " in failed.stderr
    assert "Without keep-downloads only the largest wheel needs room." in failed.stderr
    assert sorted(index.requests) == ["bar/", "baz/", "foo/"]


@pytest.mark.namespaces
def test_a_disk_with_room_for_the_files_and_one_wheel_is_enough(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path
) -> None:
    """Three wheels of 20 MB that nothing makes smaller, on a disk of 84 MB; all wheels and files take 120 MB."""
    index.add("foo", "1.0", {"foo.py": "", "foo.bin": os.urandom(20_000_000)}, requires=["bar", "baz"])
    index.add("bar", "1.0", {"bar.bin": os.urandom(20_000_000)})
    index.add("baz", "1.0", {"baz.bin": os.urandom(20_000_000)})

    done = _on_a_small_disk("84m", packhorse, installer, project)

    assert done.returncode == 0, done.stderr


@pytest.mark.namespaces
def test_a_disk_that_is_full_while_uv_resolves_is_named(
    index: Index, installer: Installer, packhorse: Packhorse, project: Path
) -> None:
    """uv unpacks wheels of this machine to read their metadata."""
    index.add("foo", "1.0", {"foo.bin": os.urandom(100_000_000)})
    installer.environ |= {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(index.directory)}
    installer.environ |= {"PACKHORSE_ENVIRONMENT_ENGINE": "uv"}

    failed = _on_a_small_disk("80m", packhorse, installer, project)

    assert failed.returncode == 5, failed.stderr
    assert "was full while uv worked" in failed.stderr
