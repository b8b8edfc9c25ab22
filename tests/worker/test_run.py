"""What `run` and `exec` promise: the root comes up, the command's code wins, what changed is saved in time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import Packhorse, unprivileged
from tests.worker.conftest import (
    PATIENT,
    Start,
    Started,
    alive,
    ephemeral,
    held_back,
    pending,
    python,
    status,
    until,
)

from packhorse.root import Root, State

SAVING = {"PACKHORSE_RUN_BACKUP": "models"}


# --- exit codes and stdout ---


@pytest.mark.parametrize("command", ["run", "exec"])
@pytest.mark.parametrize(
    ("child", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -9 $$"], 128 + signal.SIGKILL),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["no-such-command"], 127),
        (["./no-such-file"], 127),
        (["./not-executable"], 126),
        (["./no-interpreter"], 126),
        (["./no-program"], 126),
        (["/"], 126),
    ],
)
def test_the_exit_code(packhorse: Packhorse, command: str, child: list[str], code: int) -> None:
    for name, content in (("not-executable", ""), ("no-interpreter", "#!/no/such\n"), ("no-program", "x")):
        (packhorse.directory / name).write_text(content)
        (packhorse.directory / name).chmod(0o644 if name == "not-executable" else 0o755)
    done = packhorse(command, "-q", "--", *child)
    assert done.returncode == code
    assert done.stdout == ""
    if code in (126, 127):
        assert done.stderr.startswith(f'packhorse: exec: "{child[0]}": ')
        assert done.stderr.count(". ") == 1
    else:
        assert done.stderr == ""


def test_what_makes_a_file_executable_can_be_pasted_into_a_shell(packhorse: Packhorse) -> None:
    (packhorse.directory / "my script").touch()
    assert "`chmod +x './my script'`" in packhorse("exec", "--", "./my script").stderr


@pytest.mark.parametrize("arguments", [["run"], ["exec"], ["run", "--no-such-flag", "--", "true"]])
def test_a_wrong_command_line_is_125(packhorse: Packhorse, arguments: list[str]) -> None:
    assert packhorse(*arguments).returncode == 125


def test_a_wrong_configuration_is_125_and_the_command_does_not_run(packhorse: Packhorse) -> None:
    done = packhorse("run", "--", "touch", "ran", env={"PACKHORSE_RUN_GRACE": "soon"})
    assert done.returncode == 125
    assert not (packhorse.directory / "ran").exists()


@pytest.mark.parametrize("command", ["run", "exec"])
def test_stdout_is_the_childs_alone(packhorse: Packhorse, command: str) -> None:
    done = subprocess.run(
        [*packhorse.command, command, "--json", "-v", "--", "printf", "%b", r"a\0\377b"],
        env=packhorse.environ,
        cwd=packhorse.directory,
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"a\0\xffb"


def test_stdin_is_the_childs(packhorse: Packhorse) -> None:
    assert packhorse("run", "-q", "cat", stdin="typed").stdout == "typed"


def test_the_command_needs_no_dashes_and_keeps_its_own(packhorse: Packhorse) -> None:
    assert packhorse("run", "-q", "printf", "%s,", "-q", "--", "--help").stdout == "-q,--,--help,"


def test_the_command_is_looked_up_among_the_packages_first(packhorse: Packhorse, root_path: Path) -> None:
    command = Root.open(root_path).packages / "bin" / "true"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho mine\n")
    command.chmod(0o755)
    assert packhorse("exec", "true").stdout == "mine\n"


def test_modules_in_the_working_directory_do_not_stand_in_for_packhorses_own(packhorse: Packhorse) -> None:
    (packhorse.directory / "click.py").write_text("raise SystemExit(99)")
    (packhorse.directory / "json.py").write_text("raise SystemExit(99)")
    command = [shutil.which("packhorse", path=packhorse.environ["PATH"]) or "packhorse"]
    done = subprocess.run(
        [*command, "run", "--", "sh", "-c", SAVES],
        env={**packhorse.environ, **SAVING},
        cwd=packhorse.directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "not everything is saved" in done.stderr) == (0, False)


def test_modules_in_the_packages_do_not_stand_in_for_packhorses_own(
    packhorse: Packhorse, root_path: Path
) -> None:
    (Root.open(root_path).packages / "click.py").write_text("raise SystemExit(99)")
    assert packhorse("exec", "--", "python", "-c", "import click").returncode == 99
    inner = [*packhorse.command, "run", "-q", "--", "python", "-c", "import click"]
    backup = f"{SAVES} && {' '.join(packhorse.command)} run -q -- true"
    done = packhorse("run", "-q", "--", "sh", "-c", backup, env=SAVING)
    assert (done.returncode, done.stderr) == (0, "")
    assert packhorse("run", "-q", "--", *inner).returncode == 99


def test_a_reader_of_stderr_that_goes_away_disturbs_nothing(start: Start, packhorse: Packhorse) -> None:
    (packhorse.directory / "no-backup").touch()
    env = {**SAVING, "PACKHORSE_STORAGE_URL": f"file://{packhorse.directory}/no-backup"}
    supervisor = start(
        *("run", "--", "sh", "-c", f"{SAVES}; exit 3"),
        before=("bash", "-c", '"$@" 2> >(read -r line)', "bash"),
        env=env,
    )
    assert supervisor.wait() == 3


@pytest.mark.parametrize("filled", [False, True], ids=["that the root is empty", "the path report"])
def test_a_reader_of_stderr_that_reads_nothing_keeps_no_signal_away(
    start: Start, packhorse: Packhorse, root_path: Path, filled: bool
) -> None:
    """Whatever is said first."""
    if filled:
        (Root.open(root_path).packages / "module.py").touch()
    with _full_pipe(packhorse.directory / "stderr"):
        started = start("run", "--", "sleep", "1000", before=("sh", "-c", 'exec "$@" 2> stderr', "sh"))
        until(
            lambda: all(_waits_in(started.pid).endswith(("pipe_write", "S 0")) for _ in range(50)),
            "it to write",
        )
        started.send(signal.SIGTERM)
        assert started.wait() == 128 + signal.SIGTERM


def _waits_in(pid: int) -> str:
    """The state of a process and the function of the kernel that it waits in; "0" where that is not told."""
    process = Path(f"/proc/{pid}")
    waits = (process / "wchan").read_text()
    return f"{(process / 'stat').read_text().rpartition(')')[2].split()[0]} {waits}"


@contextlib.contextmanager
def _full_pipe(path: Path) -> Iterator[None]:
    """A pipe with a name, into which nothing more fits; nobody reads."""
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, bytes(1024))
    try:
        yield
    finally:
        os.close(pipe)


# --- what the command is told, and what stays behind ---


def test_the_path_report_tells_what_python_will_look_through(packhorse: Packhorse, root_path: Path) -> None:
    packages = Root.open(root_path).packages
    for name in ("alpha", "alpha-1.0.dist-info", "bin", "__pycache__"):
        (packages / name).mkdir()
    for name in ("beta.py", "gamma.cpython-311-x86_64-linux-gnu.so", "README.txt"):
        (packages / name).touch()
    (packages / "circle").symlink_to("circle")
    env = {"PACKHORSE_RUN_APP_PATH": "/no/app", "PYTHONPATH": "/no/such:/usr"}
    done = packhorse("run", "--", "sh", "-c", "echo $PYTHONPATH; echo $TMPDIR", env=env)
    pythonpath, tmpdir = done.stdout.splitlines()
    report = done.stderr.splitlines()
    assert report[0] == "packhorse: sys.path begins with"
    assert [line.split(" ", 3)[3] for line in report[1:6]] == [
        "/no/app (app-path, does not exist)",
        f"{packages} (3 top-level packages)",
        f"{root_path}/.packhorse/site (processes the .pth files of packages)",
        "/no/such (inherited PYTHONPATH, does not exist)",
        "/usr (inherited PYTHONPATH)",
    ]
    assert pythonpath.split(":") == [line.split(" ", 3)[3].partition(" (")[0] for line in report[1:6]]
    assert report[6] == f"packhorse: TMPDIR is {tmpdir}"
    assert report[7].startswith("packhorse: python is /")
    assert packhorse("run", "-q", "--", "true").stderr == ""


def test_an_environment_that_is_empty_for_want_of_a_configuration_is_told(
    packhorse: Packhorse, root_path: Path
) -> None:
    empty = "and nothing is stored, so the environment is empty"
    none = f"no packhorse.toml was found from {packhorse.directory} upwards {empty}"
    assert none in packhorse("run", "--", "true").stderr
    file = packhorse.directory / "packhorse.toml"
    file.write_text('[storage]\ntag = "mine"')
    of_file = f"{file} names nothing to install under [environment] {empty}"
    assert of_file in packhorse("run", "--", "true").stderr
    (Root.open(root_path).packages / "module.py").touch()
    assert empty not in packhorse("run", "--", "true").stderr


def test_the_ephemeral_directories_are_empty_afterwards(packhorse: Packhorse, root_path: Path) -> None:
    program = 'touch "$TMPDIR/file" && mkdir -p "$PIP_BUILD_DIR/a/b" && chmod 500 "$PIP_BUILD_DIR/a"'
    assert packhorse("run", "--", "sh", "-c", program).returncode == 0
    assert ephemeral(root_path) == []


def test_what_a_crash_left_is_cleaned_before_the_command_runs(packhorse: Packhorse, root_path: Path) -> None:
    (Root.open(root_path).tmp / "leftover").mkdir()
    done = packhorse("run", "--", "ls", root_path / "tmp")
    assert "leftover" not in done.stdout.split()


def test_two_runs_and_an_exec_share_a_root(start: Start, root_path: Path) -> None:
    program = """
taking(15)
open(os.path.join(os.environ["TMPDIR"], "mine"), "w").close()
say(os.environ["TMPDIR"])
take(15)
say(os.listdir(os.environ["TMPDIR"]))
"""
    started = [start(command, *python(program)) for command in ("run", "run", "exec")]
    assert len({each.line() for each in started}) == 3
    for each in started:
        each.send(signal.SIGTERM)
        assert each.line() == "['mine']"
        assert each.wait() == 0
    assert ephemeral(root_path) == []


def test_a_command_inside_another_has_its_own_tmpdir(packhorse: Packhorse, root_path: Path) -> None:
    inner = " ".join(packhorse.command)
    done = packhorse("run", "--", "sh", "-c", f'echo "$TMPDIR"; {inner} exec -- sh -c \'echo "$TMPDIR"\'')
    outer, nested = done.stdout.split()
    assert outer != nested
    assert Path(nested).parent == root_path / "tmp"


def test_exec_refuses_a_root_that_is_partly_restored(packhorse: Packhorse, root_path: Path) -> None:
    Root.open(root_path).record(State(state="partial"))
    done = packhorse("exec", "--", "true")
    assert done.returncode == 125
    assert "packhorse pull" in done.stderr
    assert ephemeral(root_path) == []


@pytest.mark.parametrize("command", ["run", "exec"])
def test_an_environment_of_another_python_is_refused(
    packhorse: Packhorse, root_path: Path, command: str
) -> None:
    Root.open(root_path).record(State(state="complete", soabi="cpython-27m", platform="linux-m68k"))
    done = packhorse(command, "--", "touch", "ran")
    assert done.returncode == 125
    assert "cpython-27m on linux-m68k" in done.stderr
    assert not (packhorse.directory / "ran").exists()


def test_an_environment_of_this_python_is_taken(packhorse: Packhorse, root_path: Path) -> None:
    from packhorse.install.interpreter import worker_interpreter

    ours = worker_interpreter("", packhorse.environ)
    Root.open(root_path).record(State(state="complete", soabi=ours.soabi, platform=ours.platform))
    assert packhorse("exec", "--", "true").returncode == 0


@pytest.mark.parametrize("command", ["run", "exec"])
@pytest.mark.parametrize("child", ["python", "./bin/python9.1", "python3"])
def test_a_python_of_another_version_than_the_packages_is_told(
    packhorse: Packhorse, root_path: Path, command: str, child: str
) -> None:
    from packhorse.install.interpreter import worker_interpreter

    ours = worker_interpreter("", packhorse.environ)
    Root.open(root_path).record(State(state="complete", soabi=ours.soabi, platform=ours.platform))
    other = packhorse.directory / "bin"
    other.mkdir()
    (other / "python9.1").write_text("#!/bin/sh\n")
    (other / "python9.1").chmod(0o755)
    (other / "python").symlink_to("python9.1")
    search = f"{other}{os.pathsep}{packhorse.environ['PATH']}"
    done = packhorse(command, "-q", "--", child, "-c", "", env={"PATH": search})
    assert done.returncode == 0
    told = f"python is Python 9.1, and the packages were made for {ours.minor}: "
    told = told if child == "python" else told.replace("python is", "./bin/python9.1 is")
    assert done.stderr.count(told) == (child != "python3")
    assert done.stderr.count(f"Start {ours.path}, or name") == (child != "python3")


@pytest.mark.parametrize("command", ["run", "exec"])
def test_a_signal_ends_the_wait_for_packages_that_are_being_exchanged(
    start: Start, root_path: Path, command: str
) -> None:
    root = Root.open(root_path)
    with root.packages_unused() as unused:
        assert unused
        supervisor = start(command, "--", "true")
        waits = re.compile(rf"-> FLOCK +ADVISORY +READ +{supervisor.pid} ")
        until(lambda: waits.search(Path("/proc/locks").read_text()))
        supervisor.send(signal.SIGTERM)
        assert supervisor.wait() == 128 + signal.SIGTERM
    assert ephemeral(root_path) == []


@pytest.mark.parametrize("command", ["run", "exec"])
def test_an_environment_that_became_partial_while_it_was_waited_for_is_refused(
    start: Start, root_path: Path, command: str
) -> None:
    """As by an early start of another worker on the same root."""
    root = Root.open(root_path)
    with root.packages_unused() as unused:
        assert unused
        supervisor = start(command, "--", "touch", "ran")
        waits = re.compile(rf"-> FLOCK +ADVISORY +READ +{supervisor.pid} ")
        until(lambda: waits.search(Path("/proc/locks").read_text()))
        root.record(State(state="partial"))
    assert supervisor.wait() == 125
    assert "only partly restored" in supervisor.errors()
    assert not (root_path.parent / "ran").exists()


# --- the status file ---


def test_the_status_file_follows_the_phases(packhorse: Packhorse) -> None:
    file = packhorse.directory / "status.json"
    program = f"until grep -q running {file}; do :; done; cat {file}; echo $$ >&2; exit 3"
    done = packhorse("run", "--status-file", file, "--", "sh", "-c", program)
    running, ended = json.loads(done.stdout), status(file)
    assert (running["phase"], running["exit_code"]) == ("running", None)
    assert running["pid"] == int(done.stderr.splitlines()[-1])
    assert (ended["phase"], ended["exit_code"], ended["pid"]) == ("ended", 3, running["pid"])
    assert set(ended["seconds"]) == {"booting", "running"}
    assert (ended["boot"], ended["backup"]) == (None, None)


def test_a_status_file_that_cannot_be_written_is_an_error_before_the_command_runs(
    packhorse: Packhorse,
) -> None:
    done = packhorse("run", "--status-file", "no/such/directory", "--", "touch", "ran")
    assert done.returncode == 125
    assert not (packhorse.directory / "ran").exists()


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR], ids=["pipe", "device"])
def test_a_pipe_or_a_device_is_not_replaced_by_the_status_file(packhorse: Packhorse, kind: int) -> None:
    node = packhorse.directory / "node"
    try:
        os.mknod(node, kind | 0o600, os.makedev(1, 3))  # as /dev/null
    except PermissionError:
        pytest.skip("Whoever runs these tests may not make a device.")
    done = packhorse("run", "--status-file", node, "--", "touch", "ran")
    assert done.returncode == 125
    assert "device or a pipe" in done.stderr
    assert stat.S_IFMT(node.lstat().st_mode) == kind
    assert not (packhorse.directory / "ran").exists()


def test_what_stdout_goes_to_is_not_replaced_by_the_status_file(start: Start, packhorse: Packhorse) -> None:
    log, link = packhorse.directory / "log", packhorse.directory / "stdout"
    link.symlink_to("/proc/self/fd/1")  # as /dev/stdout
    to_log = ("sh", "-c", 'exec "$@" > log', "sh")
    run = start("run", "--status-file", link, "--", "touch", "ran", before=to_log)
    assert run.wait() == 125
    assert "stdout or stderr" in run.errors()
    assert (os.readlink(link), log.read_bytes()) == ("/proc/self/fd/1", b"")
    assert not (packhorse.directory / "ran").exists()


def test_the_status_file_tells_that_the_command_could_not_be_started(packhorse: Packhorse) -> None:
    file = packhorse.directory / "status.json"
    packhorse("run", "--status-file", file, "--", "no-such-command")
    assert (status(file)["phase"], status(file)["exit_code"]) == ("ended", 127)


# --- boot ---


@pytest.fixture
def pushed(packhorse: Packhorse, root_path: Path) -> None:
    """A snapshot with a module, and a worker that lost its root."""
    root = Root.open(root_path)
    (root.packages / "restored.py").write_text("value = 7")
    (root.models / "weights").write_bytes(b"w" * 1000)
    assert packhorse("push").returncode == 0
    shutil.rmtree(root_path)


@pytest.mark.usefixtures("pushed")
def test_a_worker_that_lost_its_root_gets_it_back(packhorse: Packhorse, root_path: Path) -> None:
    file = packhorse.directory / "status.json"
    done = packhorse("run", "--status-file", file, *python("import restored; say(restored.value)"))
    assert (done.returncode, done.stdout) == (0, "7\n")
    assert (root_path / "models" / "weights").read_bytes() == b"w" * 1000
    assert status(file)["boot"]["action"] == "pulled"


@pytest.mark.usefixtures("pushed")
def test_a_snapshot_can_be_named(packhorse: Packhorse) -> None:
    done = packhorse("run", "--snapshot", "0" * 64, "--", "touch", "ran")
    assert done.returncode == 125
    assert not (packhorse.directory / "ran").exists()


def test_a_boot_that_fails_is_125_and_the_command_does_not_run(packhorse: Packhorse, root_path: Path) -> None:
    env = {"PACKHORSE_ENVIRONMENT_DEPENDENCIES": "anything", "PACKHORSE_RUN_ON_MISSING": "fail"}
    file = packhorse.directory / "status.json"
    done = packhorse("run", "--status-file", file, "--", "touch", "ran", env=env)
    assert done.returncode == 125
    assert "Traceback" not in done.stderr
    assert not (packhorse.directory / "ran").exists()
    assert (status(file)["phase"], status(file)["exit_code"]) == ("ended", 125)
    assert ephemeral(root_path) == []


@pytest.mark.usefixtures("pushed")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_boot_ends_it(
    start: Start, packhorse: Packhorse, root_path: Path, number: signal.Signals
) -> None:
    root = Root.open(root_path)
    file = packhorse.directory / "status.json"
    with root.writing():  # the pull waits for us
        supervisor = start("run", "--status-file", file, "--", "touch", "ran")
        until(lambda: "waiting for" in supervisor.errors())
        supervisor.send(number)
        assert supervisor.wait() == 128 + number
    assert not (packhorse.directory / "ran").exists()
    assert status(file)["exit_code"] == 128 + number
    assert ephemeral(root_path) == []


@pytest.mark.usefixtures("pushed")
@pytest.mark.parametrize("begin", ["complete", "early"])
def test_a_boot_that_is_killed_is_told(
    start: Start, packhorse: Packhorse, root_path: Path, begin: str
) -> None:
    root = Root.open(root_path)
    with root.writing():  # the pull waits for us
        supervisor = start("run", "--", "touch", "ran", env={"PACKHORSE_RUN_START": begin})
        until(lambda: "waiting for" in supervisor.errors())
        [boot] = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        os.kill(int(boot), signal.SIGKILL)
        assert supervisor.wait() == 125
    assert "The process that restores was killed by SIGKILL" in supervisor.errors()
    assert not (packhorse.directory / "ran").exists()


@pytest.mark.usefixtures("pushed")
def test_a_store_that_may_not_be_read_is_not_taken_for_an_empty_one(
    start: Start, packhorse: Packhorse, root_path: Path
) -> None:
    store = root_path.with_name("root-store")
    store.chmod(0)
    try:
        supervisor = start("run", "--", "touch", "ran", before=tuple(unprivileged()))
        assert supervisor.wait() == 125
    finally:
        store.chmod(0o700)
    assert str(store) in supervisor.errors()
    assert not (packhorse.directory / "ran").exists()


@pytest.mark.usefixtures("pushed")
def test_what_the_boot_leaves_behind_is_ended_but_nobody_elses(
    start: Start, packhorse: Packhorse, root_path: Path
) -> None:
    """Of a script that started a daemon and then made way for packhorse, the daemon stays."""
    interpreter = packhorse.directory / "python"
    pids = packhorse.directory / "pids"
    pids.touch()
    interpreter.write_text(
        f'#!/bin/sh\nsleep 1000 >/dev/null 2>&1 & echo $! >> {pids}\nexec {sys.executable} "$@"\n'
    )
    interpreter.chmod(0o755)
    script = f'(until test -e {packhorse.directory}/go; do sleep 0.01; done; setsid sleep 1000 & echo $!) & exec "$@"'
    with Root.open(root_path).writing():  # the pull waits for us
        supervisor = start(
            *("run", "--", "sh", "-c", "echo child; exec sleep 1000"),
            before=("sh", "-c", script, "sh"),
            env={"PACKHORSE_ENVIRONMENT_PYTHON": str(interpreter)},
        )
        until(lambda: "waiting for" in supervisor.errors())
        (packhorse.directory / "go").touch()
        daemon = int(supervisor.line())
        until(lambda: daemon in _children(supervisor.pid))
    assert supervisor.line() == "child"
    assert alive(daemon)
    left_by_boot = [int(pid) for pid in pids.read_text().split()]
    assert left_by_boot
    assert not any(map(alive, left_by_boot[:1]))
    os.kill(daemon, signal.SIGKILL)


# --- backup ---


def _saved(packhorse: Packhorse, root_path: Path, name: str) -> bool:
    """Whether a worker that lost its root gets a model back."""
    other = root_path.with_name("other-root")
    done = packhorse("pull", "--root", other, "--store", f"file://{root_path}-store")
    found = (other / "models" / name).exists()
    shutil.rmtree(other, ignore_errors=True)
    assert done.returncode in (0, 3)
    return found


SAVES = 'mkdir -p "$HF_HOME" && echo weights > "$HF_HOME/model.bin"'
MODEL = "huggingface/model.bin"


@pytest.mark.parametrize("code", [0, 3])
def test_what_changed_is_saved_when_the_command_ends(
    packhorse: Packhorse, root_path: Path, code: int
) -> None:
    file = packhorse.directory / "status.json"
    done = packhorse("run", "--status-file", file, "--", "sh", "-c", f"{SAVES}; exit {code}", env=SAVING)
    assert done.returncode == code
    assert done.stdout == ""
    assert status(file)["backup"]["files"] == 1
    assert "backing-up" in status(file)["seconds"]
    assert _saved(packhorse, root_path, MODEL)


def test_what_changed_is_saved_after_sigterm(start: Start, packhorse: Packhorse, root_path: Path) -> None:
    supervisor = start("run", "--", "sh", "-c", f"{SAVES}; echo ready; exec sleep 1000", env=SAVING)
    supervisor.line()
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait() == 128 + signal.SIGTERM
    assert _saved(packhorse, root_path, MODEL)
    assert ephemeral(root_path) == []


@pytest.mark.namespaces
@pytest.mark.parametrize("meanwhile", [False, True], ids=["alone", "beside another"])
def test_what_changed_is_saved_although_the_disk_is_full(
    packhorse: Packhorse, root_path: Path, meanwhile: bool
) -> None:
    """Also where another worker has pushed meanwhile, so that the push has to read what that one saved."""
    another = Root.open(root_path.with_name("another"))
    (another.models / "theirs").write_text("theirs")
    push = [*packhorse.command, "push", "--root", str(another.path), "--store", f"file://{root_path}-store"]
    pushes = shlex.join(push) if meanwhile else "true"
    root_path.mkdir()
    fills = "head -c 40M /dev/zero >$PACKHORSE_ROOT/tmp/fill; exit 9"
    words = [*packhorse.command, "run", "--", "sh", "-c", f"{SAVES}; {pushes} || exit; {fills}"]
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount -t tmpfs -o size=8m,mode=0700 tmpfs {root_path} && exec "$@"',
            "sh",
            *words,
        ],
        cwd=packhorse.directory,
        env={**packhorse.environ, **SAVING},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 9, done.stderr
    assert _saved(packhorse, root_path, MODEL)
    assert _saved(packhorse, root_path, "theirs") is meanwhile
    assert "is full" in done.stderr
    assert "not everything is saved" not in done.stderr


def test_exec_saves_nothing(packhorse: Packhorse, root_path: Path) -> None:
    packhorse("exec", "--", "sh", "-c", SAVES, env=SAVING)
    assert not root_path.with_name("root-store").exists()


@pytest.fixture
def model(root_path: Path) -> Path:
    """A model that the store does not have."""
    file = Root.open(root_path).models / "model.bin"
    file.write_bytes(b"weights")
    return file


def test_after_sigterm_a_backup_that_hangs_is_killed_at_the_end_of_grace(
    start: Start, packhorse: Packhorse, root_path: Path, model: Path
) -> None:
    file = packhorse.directory / "status.json"
    env = {**SAVING, "PACKHORSE_RUN_GRACE": "2.5"}
    with held_back(model):
        supervisor = start("run", "--status-file", file, *python("say(); signal.pause()"), env=env)
        supervisor.line()
        before = time.monotonic()
        supervisor.send(signal.SIGTERM)
        assert supervisor.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - before < 2.5 + 0.5
    assert "error" in status(file)["backup"]
    assert "not everything is saved" in supervisor.errors()
    assert ephemeral(root_path) == []


def test_a_child_that_takes_all_of_grace_leaves_no_time_for_a_backup(
    start: Start, packhorse: Packhorse, root_path: Path
) -> None:
    (Root.open(root_path).models / "model.bin").touch()
    file = packhorse.directory / "status.json"
    env = {**SAVING, "PACKHORSE_RUN_GRACE": "0.6", "PACKHORSE_RUN_STOP_TIMEOUT": "0.5"}
    program = "signal.signal(15, signal.SIG_IGN); say(); time.sleep(1000)"
    supervisor = start("run", "--status-file", file, *python(program), env=env)
    supervisor.line()
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait() == 128 + signal.SIGKILL
    assert "no time left" in status(file)["backup"]["error"]


def test_cleaning_that_takes_long_is_given_up_at_the_end_of_grace(start: Start, root_path: Path) -> None:
    """The next start does it."""
    env = {"PACKHORSE_RUN_GRACE": "1.5"}
    supervisor = start("run", *python("say(os.environ['TMPDIR']); signal.pause()"), env=env)
    tmp = Path(supervisor.line())
    session = root_path / ".packhorse" / "sessions" / "abcdef"
    session.write_bytes(b"")
    with held_back(session):
        before = time.monotonic()
        supervisor.send(signal.SIGTERM)
        assert supervisor.wait() == 128 + signal.SIGTERM
        assert 1.4 < time.monotonic() - before < 1.5 + 0.5
        assert tmp.exists()
    assert start("run", "--", "true").wait() == 0
    assert not tmp.exists()


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_further_signal_ends_the_final_backup_at_once(
    start: Start, packhorse: Packhorse, root_path: Path, model: Path, numbers: list[signal.Signals]
) -> None:
    file = packhorse.directory / "status.json"
    env = {**SAVING, "PACKHORSE_RUN_GRACE": "60"}
    with held_back(model):
        supervisor = start("run", "--status-file", file, "--", "sh", "-c", "exit 3", env=env)
        until(lambda: status(file).get("phase") == "backing-up")
        for number in numbers:
            backup = until(lambda: _children(supervisor.pid))
            supervisor.send(number)
            until(lambda pids=backup: not any(map(alive, pids)))
        assert supervisor.wait() == 3
    assert "error" in status(file)["backup"]


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _periodic_backup(supervisor: Started, file: Path) -> int:
    """The process of a backup beside the command, once there is one; `file` is the status file."""
    child = until(lambda: status(file)["pid"])
    return until(lambda: [pid for pid in _children(supervisor.pid) if pid != child])[0]


def test_sigterm_during_the_final_backup_limits_it_to_grace_and_saves_what_it_can(
    start: Start, packhorse: Packhorse, root_path: Path, model: Path
) -> None:
    file = packhorse.directory / "status.json"
    with held_back(model):
        supervisor = start("run", "--status-file", file, "--", "sh", "-c", "exit 3", env=SAVING)
        until(lambda: status(file).get("phase") == "backing-up")
        unlimited = until(lambda: _children(supervisor.pid))
        supervisor.send(signal.SIGTERM)
        limited = until(lambda: [pid for pid in _children(supervisor.pid) if pid not in unlimited])
        until(lambda: b"--deadline" in Path(f"/proc/{limited[0]}/cmdline").read_bytes())
    assert supervisor.wait() == 3
    assert status(file)["backup"]["files"] == 1
    assert _saved(packhorse, root_path, "model.bin")


def test_a_periodic_backup_saves_while_the_command_runs(
    start: Start, packhorse: Packhorse, root_path: Path
) -> None:
    env = {**SAVING, "PACKHORSE_RUN_BACKUP_EVERY": "0.2"}
    file = packhorse.directory / "status.json"
    supervisor = start(
        "run", "--status-file", file, "--", "sh", "-c", f"{SAVES}; echo ready; exec sleep 1000", env=env
    )
    supervisor.line()
    until(lambda: (status(file).get("backup") or {}).get("files") == 1)
    assert status(file)["phase"] == "running"
    supervisor.send(signal.SIGKILL)
    os.kill(status(file)["pid"], signal.SIGKILL)
    supervisor.wait()
    assert _saved(packhorse, root_path, MODEL)


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT])
def test_a_periodic_backup_does_not_use_up_the_time_of_the_last_one(
    start: Start, packhorse: Packhorse, root_path: Path, model: Path, ended_by: signal.Signals
) -> None:
    """SIGTERM, while the child runs, ends it at once; so does SIGINT after it, and then none follows."""
    file = packhorse.directory / "status.json"
    env = {**SAVING, "PACKHORSE_RUN_BACKUP_EVERY": "0.2", "PACKHORSE_RUN_GRACE": "60"}
    program = "taking(10); say(); take(10); sys.exit(3)"
    with held_back(model):
        supervisor = start("run", "--status-file", file, *python(program), env=env)
        supervisor.line()
        periodic = _periodic_backup(supervisor, file)
        if ended_by == signal.SIGINT:
            supervisor.send(signal.SIGUSR1)
            until(lambda: status(file)["phase"] == "backing-up")
        supervisor.send(ended_by)
        until(lambda: not alive(periodic))
        if ended_by == signal.SIGINT:
            assert supervisor.wait() == 3
            return
    assert supervisor.wait() == 128 + signal.SIGTERM
    assert _saved(packhorse, root_path, "model.bin")


def test_sigterm_after_the_command_has_a_periodic_backup_make_way_for_the_last_one(
    start: Start, packhorse: Packhorse, root_path: Path, model: Path
) -> None:
    """Here while what the command left behind is being ended."""
    file = packhorse.directory / "status.json"
    env = {**SAVING, "PACKHORSE_RUN_BACKUP_EVERY": "0.2", "PACKHORSE_RUN_GRACE": "60"}
    program = """
taking(10, 15)
if not os.fork(): os.setsid(); say(os.getpid()); take(15); say("asked"); signal.pause()
take(10)
"""
    with held_back(model):
        supervisor = start("run", "--status-file", file, *python(program), env=env, before=PATIENT)
        left = int(supervisor.line())
        periodic = _periodic_backup(supervisor, file)
        supervisor.send(signal.SIGUSR1)
        assert supervisor.line() == "asked"
        supervisor.send(signal.SIGTERM)
        until(lambda: not pending(supervisor.pid, signal.SIGTERM))
        os.kill(left, signal.SIGKILL)
        until(lambda: not alive(periodic))
    assert supervisor.wait() == 0
    assert _saved(packhorse, root_path, "model.bin")


def test_after_the_last_backup_no_periodic_one_is_started(
    start: Start, packhorse: Packhorse, root_path: Path, model: Path
) -> None:
    """Though the time of one comes just when the last one has ended, here since nobody reads what is said of it."""
    file = packhorse.directory / "status.json"
    env = {**SAVING, "PACKHORSE_RUN_BACKUP_EVERY": "0.5"}
    os.mkfifo(packhorse.directory / "stderr")
    stderr = os.open(packhorse.directory / "stderr", os.O_RDWR | os.O_NONBLOCK)
    with held_back(model):
        supervisor = start(
            *("run", "--status-file", file, "--", "sh", "-c", "exit 3"),
            env=env,
            before=("sh", "-c", 'exec "$@" 2> stderr', "sh"),
        )
        until(lambda: status(file).get("phase") == "backing-up")
        until(lambda: _children(supervisor.pid))
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(stderr, bytes(1024))
        supervisor.send(signal.SIGINT)
        until(lambda: not _children(supervisor.pid))
        ended = time.monotonic()
        until(lambda: time.monotonic() - ended > 0.6)
        os.read(stderr, 1 << 20)
        assert supervisor.wait() == 3
        assert not _backups_of(root_path)
    os.close(stderr)


def _backups_of(root: Path) -> list[int]:
    """The processes that save what changed in a root."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, variables = (directory / "cmdline").read_bytes(), (directory / "environ").read_bytes()
            if b"\0backup\0" in words and f"PACKHORSE_ROOT={root}\0".encode() in variables:
                found.append(int(directory.name))
    return found


def test_sighup_which_many_servers_reload_on_ends_no_periodic_backup(
    start: Start, packhorse: Packhorse, root_path: Path, model: Path
) -> None:
    file = packhorse.directory / "status.json"
    env = {**SAVING, "PACKHORSE_RUN_BACKUP_EVERY": "0.2"}
    program = "taking(1); say()\nwhile take(1): say('reloaded')"
    with held_back(model):
        supervisor = start("run", "--status-file", file, *python(program), env=env)
        supervisor.line()
        _periodic_backup(supervisor, file)
        supervisor.send(signal.SIGHUP)
        assert supervisor.line() == "reloaded"
    until(lambda: status(file)["backup"])
    assert status(file)["backup"].get("files") == 1
    model.write_bytes(b"more weights")
    until(lambda: status(file)["backup"].get("bytes") == len(b"more weights"))


@pytest.mark.parametrize("gone", ["models", ""])
def test_a_command_that_removes_the_root_keeps_its_code(
    packhorse: Packhorse, root_path: Path, gone: str
) -> None:
    done = packhorse("run", "-q", "--", "sh", "-c", f'rm -rf "{root_path / gone}"; exit 3', env=SAVING)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_a_backup_that_fails_is_told_but_the_commands_code_wins(
    packhorse: Packhorse, root_path: Path
) -> None:
    store = root_path.with_name("store")
    store.mkdir()
    file = packhorse.directory / "status.json"
    env = {**SAVING, "PACKHORSE_STORAGE_URL": f"file://{store}"}
    # A file stands where the store has to make a directory.
    done = packhorse(
        "run", "--status-file", file, "--", "sh", "-c", f"{SAVES}; touch {store}/packs; exit 3", env=env
    )
    assert done.returncode == 3
    assert "not everything is saved" in done.stderr
    assert "error" in status(file)["backup"]
