"""What every command owes to whoever started it: one answer, whatever became of its descriptors and its directory."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from tests.conftest import Packhorse, unprivileged

from packhorse.root import Root


@pytest.fixture
def environ(environ: dict[str, str], root_path: Path, tmp_path: Path) -> dict[str, str]:
    """One root and one store for all commands of a test."""
    return {
        **environ,
        "PACKHORSE_ROOT": str(root_path),
        "PACKHORSE_STORAGE_URL": (tmp_path / "store").as_uri(),
    }


def _shell(packhorse: Packhorse, line: str) -> subprocess.CompletedProcess[str]:
    """A line of sh, in which `packhorse` is the command."""
    words = line.replace("packhorse", shlex.join(packhorse.command), 1)
    return subprocess.run(
        ["sh", "-c", words],
        cwd=packhorse.directory,
        env=packhorse.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("line", ["packhorse status --json >/dev/full", "packhorse status >/dev/full"])
def test_a_full_stdout_ends_a_command_with_5_and_no_traceback(packhorse: Packhorse, line: str) -> None:
    done = _shell(packhorse, line)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert "no space left" in done.stderr


@pytest.mark.parametrize(
    "words", [["status"], ["status", "--json"], ["--help"], ["--version"], ["status", "--help"]], ids=" ".join
)
def test_a_reader_that_goes_away_ends_a_command_with_141(packhorse: Packhorse, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*packhorse.command, *words],
        cwd=packhorse.directory,
        env={**packhorse.environ},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_paths_that_are_not_utf_8_are_shown(packhorse: Packhorse, tmp_path: Path) -> None:
    root = os.fsdecode(bytes(tmp_path) + b"/\xff")
    done = packhorse("status", "--json", "--root", root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["root"] == root
    strict = packhorse("status", "--root", root, env={"PYTHONIOENCODING": "utf-8:strict"})
    assert strict.returncode == 0, strict.stderr
    assert "\\udcff" in strict.stdout


@pytest.mark.parametrize("command", ["run", "exec", "profile"])
def test_stdout_is_the_childs_also_where_the_command_is_left_out(packhorse: Packhorse, command: str) -> None:
    done = packhorse(command, "--json")
    assert (done.returncode, done.stdout) == (125, "")
    assert "--json" not in packhorse(command, "--help").stdout


@pytest.mark.namespaces
def test_a_pull_that_is_process_1_ends_when_it_is_told_to(packhorse: Packhorse, root_path: Path) -> None:
    (root_path / "models").mkdir(parents=True, mode=0o700)
    root_path.chmod(0o700)
    (root_path / "models" / "weights").write_text("weights")
    assert packhorse("push").returncode == 0
    with Root.open(root_path).writing():  # the pull waits for us
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *packhorse.command, "pull"],
            cwd=packhorse.directory,
            env={**packhorse.environ},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert "waiting for" in process.stderr.readline()
        [first] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        process.stderr.close()


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_a_push_works_without_a_stderr(packhorse: Packhorse, root_path: Path, stderr: str) -> None:
    packhorse("status")
    (root_path / "models" / "weights").write_text("weights")
    done = _shell(packhorse, f"packhorse push --json {stderr}")
    assert done.returncode == 0
    assert json.loads(done.stdout)["pushed"] == ["shared"]


@pytest.mark.parametrize("closed", ["<&-", "<&- 2>&-", "2>&-"])
def test_a_command_has_descriptors_of_its_own_where_ours_were_closed(
    packhorse: Packhorse, root_path: Path, closed: str
) -> None:
    command = shlex.quote(
        'readlink /proc/$$/fd/0 /proc/$$/fd/2 >"$PACKHORSE_ROOT/models/fds"; echo lost >&2; exit 7'
    )
    assert _shell(packhorse, f"packhorse run -q -- sh -c {command} {closed}").returncode == 7
    for number, target in zip((0, 2), (root_path / "models" / "fds").read_text().split(), strict=True):
        if number == 2 and "2>&-" not in closed:
            assert target.startswith("pipe:")
        elif number == 0 and "<&-" not in closed:
            assert str(root_path) not in target
        else:
            assert target == "/dev/null"


@pytest.mark.parametrize("command", ["status", "init", "demo --directory here"])
def test_a_working_directory_that_is_gone_is_told(packhorse: Packhorse, command: str) -> None:
    (packhorse.directory / "gone").mkdir()
    done = _shell(packhorse, f"cd gone && rmdir ../gone && packhorse {command} --json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "The working directory was removed."


@pytest.mark.parametrize("command", ["run", "profile"])
def test_an_empty_name_of_a_status_file_is_told(packhorse: Packhorse, command: str) -> None:
    done = packhorse(command, "--status-file", "", "--", "true")
    assert done.returncode == 125
    assert "Invalid value for '--status-file': a file is expected." in done.stderr


@pytest.mark.parametrize("flag", ["--json", "-v", "--root=/tmp"])
def test_a_shared_flag_before_the_command_is_told_where_it_belongs(packhorse: Packhorse, flag: str) -> None:
    done = packhorse(flag, "status")
    assert done.returncode == 2
    assert f"{flag.partition('=')[0]} stands behind the command's name" in done.stderr


@pytest.mark.parametrize(("words", "helps"), [("install --root", "install"), ("run --tag", "run"), ("snapshots a", "snapshots")])  # fmt: skip
def test_a_wrong_command_line_names_the_help_of_its_command(
    packhorse: Packhorse, words: str, helps: str
) -> None:
    assert f". `packhorse {helps} --help` shows" in packhorse(*words.split()).stderr


@pytest.mark.parametrize("command", ["init", "demo"])
def test_help_does_not_offer_flags_that_are_refused(packhorse: Packhorse, command: str) -> None:
    shown = packhorse(command, "--help").stdout
    for flag in ("--config", "--root", "--store", "--tag"):
        assert flag not in shown
        assert packhorse(command, flag, "x").returncode == 2
    assert "--json" in shown


def test_one_entry_is_told_in_the_singular(packhorse: Packhorse, root_path: Path) -> None:
    packhorse("status")
    (root_path / "models" / "a").write_text("a")
    assert packhorse("push").returncode == 0
    (root_path / "models" / "b").write_text("b")
    shown = packhorse("status").stdout
    assert "1 shared entry is not saved" in shown
    (root_path / "models" / "b").unlink()
    assert "1 file " in packhorse("status").stdout
    (root_path / "models" / "a").unlink()
    assert "1 shared entry of the tag is missing or older here" in packhorse("status").stdout


def _unprivileged(packhorse: Packhorse) -> Packhorse:
    """The command, for which permissions count even where it is root's."""
    prefix = unprivileged()

    class Without(Packhorse):
        @property
        def command(self) -> list[str]:
            return [*prefix, *super().command]

    return Without(packhorse.environ, packhorse.directory)


def test_a_directory_that_may_not_be_read_keeps_nothing_else_from_being_saved(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    packhorse("status")
    closed = root_path / "models" / "closed"
    closed.mkdir()
    (closed / "secret").write_text("secret")
    (root_path / "models" / "weights").write_text("weights")
    (root_path / "models" / "unreadable").write_text("unreadable")
    (root_path / "models" / "unreadable").chmod(0)
    closed.chmod(0)
    try:
        unprivileged = _unprivileged(packhorse)
        done = unprivileged("push", "--json")
        assert done.returncode == 0, done.stderr
        assert "models/closed is a directory that may not be read; it is not saved" in done.stderr
        assert "models/unreadable could not be read" in done.stderr
        shown = unprivileged("status")
        assert shown.returncode == 0, shown.stderr
    finally:
        closed.chmod(0o700)
    assert packhorse("pull", "--root", tmp_path / "other").returncode == 0
    assert (tmp_path / "other" / "models" / "weights").read_text() == "weights"
    assert not (tmp_path / "other" / "models" / "unreadable").exists()


def test_the_status_tells_what_it_can_where_a_directory_may_be_listed_but_not_entered(
    packhorse: Packhorse, root_path: Path
) -> None:
    packhorse("status")
    (root_path / "models" / "weights").write_text("weights")
    listed = root_path / "models" / "listed"
    listed.mkdir()
    (listed / "secret").write_text("secret")
    listed.chmod(0o400)
    try:
        done = _unprivileged(packhorse)("status", "--json")
    finally:
        listed.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["directories"]["models"]["files"] == 1


def test_packages_that_may_not_be_read_are_not_pushed_in_part(packhorse: Packhorse, root_path: Path) -> None:
    packhorse("status")
    closed = root_path / "packages" / "closed"
    closed.mkdir()
    (closed / "module.py").write_text("")
    (root_path / "packages" / "other.py").write_text("")
    closed.chmod(0)
    try:
        assert _unprivileged(packhorse)("push").returncode == 1
    finally:
        closed.chmod(0o700)
    assert json.loads(packhorse("snapshots", "--json").stdout) == {"snapshots": []}


def test_a_file_of_the_packages_that_may_not_be_read_is_named_as_such(
    packhorse: Packhorse, root_path: Path
) -> None:
    packhorse("status")
    (root_path / "packages" / "module.py").write_text("")
    (root_path / "packages" / "secret.py").write_text("secret")
    (root_path / "packages" / "secret.py").chmod(0)
    done = _unprivileged(packhorse)("push")
    assert done.returncode == 1
    assert "packages/secret.py may not be read by this user." in done.stderr
    assert "Change its owner or its mode" in done.stderr
