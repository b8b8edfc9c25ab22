"""A profile tells which files a command opened, in the order it did, and the command notices nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.worker.conftest import Start, alive, pending, python, status, until

from packhorse.config import Storage
from packhorse.profile_name import name_of
from packhorse.root import Root
from packhorse.store import profiles
from packhorse.store.objects import Store

SIZE = 1_100_000
FILES = ("packages/a.so", "packages/b.so", "packages/c/d.so", "deps/e", "models/f")


@pytest.fixture
def environ(environ: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A store beside the root."""
    return {**environ, "PACKHORSE_STORAGE_URL": (tmp_path / "store").as_uri()}


@pytest.fixture
def root(root_path: Path) -> Path:
    """A root with large files, and small ones, which nobody records."""
    Root.open(root_path)
    (root_path / "packages/c").mkdir()
    for number, name in enumerate(FILES):
        (root_path / name).write_bytes(bytes([number]) * SIZE)
    (root_path / "packages/small.py").write_bytes(b"#" * 1000)
    return root_path


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., list[str]]:
    """The files of a stored profile, in its order."""

    def read(*command: str, name: str = "") -> list[str]:
        store = Store(Storage(url=(tmp_path / "store").as_uri()), {})
        profile = profiles.read(store, "main", name or name_of(command), pytest.fail)
        assert profile is not None
        seconds = [each.seconds for each in profile.files]
        assert seconds == sorted(seconds)
        assert all(0 <= each < 100 for each in seconds)
        return [os.fsdecode(each.path) for each in profile.files]

    return read


def test_every_way_of_opening_counts_once_and_in_order(
    packhorse: Packhorse, root: Path, opened: Callable[..., list[str]], tmp_path: Path
) -> None:
    program = f"""
import mmap
os.chdir({str(root)!r})
os.stat("models/f"); os.listdir("deps")
open("packages/small.py").close()
with open("packages/c/d.so", "rb") as file:
    say(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[0])
subprocess.run(["sh", "-c", "cat packages/b.so | wc -c"])
if not (pid := os.fork()):
    say(os.read(os.open("deps/e", os.O_RDONLY), 1)[0])
    os._exit(0)
os.waitpid(pid, 0)
open("packages/c/d.so", "rb").close()
subprocess.run(["dd", "if=packages/a.so", "of=/dev/null", "status=none"])
sys.stderr.write("said\\n")
sys.exit(7)
"""
    file = tmp_path / "status.json"
    done = packhorse("profile", "--status-file", file, *python(program))
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["2", str(SIZE), "3"]
    assert "said" in done.stderr.splitlines()
    command = python(program)[1:]
    assert opened(*command) == ["packages/c/d.so", "packages/b.so", "deps/e", "packages/a.so"]
    facts = json.loads(file.read_bytes())
    assert facts["phase"] == "ended"
    assert facts["exit_code"] == 7
    assert facts["profile"] == {
        "name": name_of(command),
        "tag": "main",
        "files": 4,
        "bytes": 4 * SIZE,
        "large_files": 5,
        "large_bytes": 5 * SIZE,
        "skipped": 0,
        "error": "",
    }


def test_files_opened_for_writing_read_only_files_and_hard_links_are_recorded(
    packhorse: Packhorse, root: Path, opened: Callable[..., list[str]]
) -> None:
    (root / "packages/a.so").chmod(0o400)
    os.link(root / "packages/b.so", root / "packages/z.so")
    program = f"""
os.chdir({str(root)!r})
with open("packages/z.so", "r+b") as file: file.write(b"changed")
say(open("packages/b.so", "rb").read(7))
open("packages/a.so", "rb").close()
os.truncate("deps/e", 5)
os.unlink("models/f")
"""
    done = packhorse("profile", "--name", "writes", *python(program))
    assert (done.returncode, done.stdout) == (0, "b'changed'\n"), done.stderr
    assert opened(name="writes") == ["packages/b.so", "packages/a.so", "deps/e"]
    assert (root / "deps/e").stat().st_size == 5
    assert not (root / "models/f").exists()


def test_recording_may_take_as_long_as_anybody_says(
    packhorse: Packhorse, root: Path, opened: Callable[..., list[str]]
) -> None:
    done = packhorse("profile", "--name", "long", "--for", "inf", "--", "cat", root / "models/f")
    assert done.returncode == 0, done.stderr
    assert opened(name="long") == ["models/f"]


def test_a_script_whose_name_is_not_utf_8_has_a_profile(
    packhorse: Packhorse, root: Path, opened: Callable[..., list[str]]
) -> None:
    script = os.fsdecode(b"serve-\xff.py")
    (packhorse.directory / script).write_text(f"open({str(root / FILES[0])!r}, 'rb').close()")
    done = packhorse("profile", "--", "python3", script)
    assert done.returncode == 0, done.stderr
    assert opened("python3", script) == [FILES[0]]


def test_a_file_that_somebody_has_open_is_left_out_and_counted(
    packhorse: Packhorse, root: Path, opened: Callable[..., list[str]]
) -> None:
    with (root / "packages/a.so").open("rb"):
        done = packhorse("profile", "--name", "busy", "--", "cat", *(str(root / name) for name in FILES[:2]))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 2 * SIZE
    assert "1 file could not be watched" in done.stderr
    assert opened(name="busy") == ["packages/b.so"]


WAITS = """
taking(10)
open(sys.argv[1] + "/packages/b.so", "rb").close()
say("ready")
take(10)
say(open(sys.argv[1] + "/packages/a.so", "rb").read(1)[0])
sys.exit(3)
"""


def recorder_of(supervisor: int, child: str) -> int:
    """The process id of the recorder: the other child of the supervisor."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    [recorder] = [int(pid) for pid in children if pid != child]
    return recorder


def sleeps_in(pid: int) -> str:
    """Where in the kernel a process sleeps, if it does; "0" everywhere where that is not told."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return Path(f"/proc/{pid}/wchan").read_text() if state == "S" else ""


def test_a_killed_recorder_does_not_hurt_the_command(start: Start, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    supervisor = start("profile", "--status-file", file, *python(WAITS), root)
    assert supervisor.line() == "ready"
    pid = until(lambda: status(file).get("pid"))
    os.kill(recorder_of(supervisor.pid, str(pid)), signal.SIGKILL)
    os.kill(pid, signal.SIGUSR1)
    assert supervisor.line() == "0"
    assert supervisor.wait() == 3
    assert "there is no profile" in supervisor.errors()
    assert "before the profile was stored" in status(file)["profile"]["error"]


def test_a_recorder_ends_with_a_killed_supervisor_and_the_command_goes_on(
    start: Start, root: Path, tmp_path: Path
) -> None:
    file = tmp_path / "status.json"
    supervisor = start("profile", "--status-file", file, *python(WAITS), root)
    assert supervisor.line() == "ready"
    pid = until(lambda: status(file).get("pid"))
    recorder = recorder_of(supervisor.pid, str(pid))
    supervisor.send(signal.SIGKILL)
    supervisor.wait()
    until(
        lambda: (
            not Path(f"/proc/{recorder}").exists() or b") Z" in Path(f"/proc/{recorder}/stat").read_bytes()
        )
    )
    os.kill(pid, signal.SIGUSR1)
    assert supervisor.line() == "0"


def test_a_server_that_is_stopped_has_a_profile(
    start: Start, root: Path, opened: Callable[..., list[str]]
) -> None:
    supervisor = start("profile", "--name", "server", *python(WAITS), root)
    assert supervisor.line() == "ready"
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait() == 128 + signal.SIGTERM
    assert opened(name="server") == ["packages/b.so"]


def test_recording_ends_after_its_time_and_the_command_goes_on(
    packhorse: Packhorse, root: Path, opened: Callable[..., list[str]]
) -> None:
    program = f"""
os.chdir({str(root)!r})
def watched(name):
    leased = f":{{os.stat(name).st_ino}} "
    for _ in range(5):  # a line is missing now and then while others come and go
        if any("LEASE" in line and leased in line for line in open("/proc/locks")):
            return True
        time.sleep(0.01)
    return False
in_time = watched("packages/b.so")
open("packages/b.so", "rb").close()
while watched("packages/a.so"): pass
open("packages/a.so", "rb").close()
say(in_time)
"""
    for seconds in ("0.5", "5", "20"):  # where the machine is so busy that the command starts later
        done = packhorse("profile", "--name", "short", "--for", seconds, *python(program))
        assert done.returncode == 0, done.stderr
        if done.stdout == "True\n":
            break
    assert opened(name="short") == ["packages/b.so"]


def test_a_recorder_that_stood_still_until_its_time_was_over_waits_for_the_end(
    start: Start, root: Path, tmp_path: Path, opened: Callable[..., list[str]]
) -> None:
    file = tmp_path / "status.json"
    words = ("--name", "still", "--for", "2", "--status-file", file)
    supervisor = start("profile", *words, *python(WAITS), root)
    assert supervisor.line() == "ready"
    pid = until(lambda: status(file).get("pid"))
    recorder = recorder_of(supervisor.pid, str(pid))
    os.kill(recorder, signal.SIGSTOP)
    stopped = time.monotonic()
    until(lambda: time.monotonic() - stopped > 2.1)
    os.kill(recorder, signal.SIGCONT)
    leased = f":{(root / 'packages/a.so').stat().st_ino} "
    until(lambda: not any(leased in line for line in Path("/proc/locks").read_text().splitlines()))
    in_sigwait = until(lambda: sleeps_in(supervisor.pid))
    until(lambda: not alive(recorder) or sleeps_in(recorder) == in_sigwait)
    assert alive(recorder), supervisor.errors()
    os.kill(pid, signal.SIGUSR1)
    assert supervisor.line() == "0"
    assert supervisor.wait() == 3
    assert opened(name="still") == ["packages/b.so"]


@pytest.mark.parametrize("number", [signal.SIGWINCH, signal.SIGTERM])
def test_a_signal_while_the_profile_is_stored_leaves_it_the_time_there_is(
    start: Start, root: Path, tmp_path: Path, opened: Callable[..., list[str]], number: signal.Signals
) -> None:
    file = tmp_path / "status.json"
    program = f"""
taking(10)
open({str(root / "packages/b.so")!r}, "rb").close()
say("ready")
take(10)
sys.exit(3)
"""
    words = ("--name", "resized", "--status-file", file)
    supervisor = start("profile", *words, *python(program), env={"PACKHORSE_RUN_GRACE": "60"})
    assert supervisor.line() == "ready"
    pid = until(lambda: status(file).get("pid"))
    recorder = recorder_of(supervisor.pid, str(pid))
    os.kill(recorder, signal.SIGSTOP)
    os.kill(pid, signal.SIGUSR1)
    until(lambda: status(file)["phase"] == "storing")
    supervisor.send(number)
    until(lambda: not pending(supervisor.pid, number))
    os.kill(recorder, signal.SIGCONT)
    assert supervisor.wait() == 3
    assert opened(name="resized") == ["packages/b.so"]


def test_a_command_that_opens_nothing_large_has_no_profile(
    packhorse: Packhorse, root: Path, tmp_path: Path
) -> None:
    done = packhorse("profile", "--", "true")
    assert done.returncode == 0
    assert "there is no profile: The command opened no file" in done.stderr
    assert not list((tmp_path / "store").rglob("profiles"))


def test_a_store_that_refuses_is_told_and_the_commands_code_wins(packhorse: Packhorse, root: Path) -> None:
    where = {"PACKHORSE_STORAGE_URL": "file:///proc/nowhere"}
    done = packhorse("profile", "--", "sh", "-c", f"cat {root}/deps/e >/dev/null; exit 4", env=where)
    assert done.returncode == 4
    assert "there is no profile" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--", "no-such-program"), 127),
        (("--name", "../x", "--", "true"), 125),
        (("--for", "0", "--", "true"), 125),
        (("--for", "nan", "--", "true"), 125),
        ((), 125),
    ],
)
def test_failures_before_the_command_have_the_codes_of_exec(
    packhorse: Packhorse, root: Path, arguments: tuple[str, ...], code: int
) -> None:
    done = packhorse("profile", *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert "packhorse:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("limits", "everything"), [("-n 71", False), ("-Sn 71", True)])
def test_few_descriptors_watch_the_largest_files_and_the_command_keeps_its_limit(
    packhorse: Packhorse, root: Path, opened: Callable[..., list[str]], limits: str, everything: bool
) -> None:
    (root / "packages/b.so").write_bytes(b"b" * (SIZE + 1))
    child = f"cat {' '.join(str(root / name) for name in FILES)} >/dev/null; ulimit -Sn"
    words = [*packhorse.command, "profile", "--name", "few", "--", "sh", "-c", child]
    limited = subprocess.run(
        ["sh", "-c", f'ulimit {limits}; exec "$@"', "sh", *words],
        env=packhorse.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (limited.returncode, limited.stdout) == (0, "71\n"), limited.stderr
    assert "packages/b.so" in opened(name="few")
    assert (len(opened(name="few")) == len(FILES)) == everything
    assert ("could not be watched" not in limited.stderr) == everything


def test_a_recorder_that_is_killed_before_it_records_is_told(start: Start, root: Path) -> None:
    supervisor = start("profile", "--", "true")

    def recorder() -> int:
        for pid in Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split():
            if b"\0record\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        return 0

    os.kill(until(recorder, "a recorder"), signal.SIGKILL)
    assert supervisor.wait() == 125
    assert "The process that records was killed by SIGKILL" in supervisor.errors()
    assert "message above" not in supervisor.errors()
