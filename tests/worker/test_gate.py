"""What the gate promises: who opens a file that is not there yet gets its bytes, or is ended; nobody hangs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.worker import gate_driver, tracer
from tests.worker.conftest import Started, alive, python, status, until
from tests.worker.test_terminal import BASH, Console

from packhorse import atomic
from packhorse.root import Root

Run = Callable[..., Started]

PREAMBLE = """
import os, signal, subprocess, sys, time
from tests.worker.gate_restorer import *
r = Restorer()
"""


@pytest.fixture
def gate(packhorse: Packhorse, tmp_path: Path) -> Iterator[Run]:
    """Starts a supervisor with a restorer and a child, each given as a program."""
    started: list[Started] = []
    restorer = tmp_path / "restorer.py"

    def run(
        restores: str,
        *command: str,
        look: float = 0.2,
        env: Mapping[str, str] | None = None,
        before: tuple[str, ...] = (),
    ) -> Started:
        restorer.write_text(PREAMBLE + restores)
        environ = {
            **packhorse.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RESTORER": str(restorer),
            "PACKHORSE_RUN_ON_MISSING": "fail",  # so that there is something to boot
            **(env or {}),
        }
        words = command[1:] if command[0] == "--" else command
        argv = [*before, sys.executable, gate_driver.__file__, str(look), *words]
        started.append(Started(argv, environ, packhorse.directory))
        return started[-1]

    yield run
    for each in started:
        if each.process.poll() is None:
            each.send(signal.SIGTERM)
            try:
                each.process.wait(20)
            except subprocess.TimeoutExpired:
                each.process.kill()
        each.process.wait()
        if each.process.stdout is not None:
            each.process.stdout.close()


def _first_child(run: Started) -> int:
    return int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0])


FILL_WHEN_WANTED = 'r.hold("a"); r.start(); r.wanted("a"); r.fill("a"); r.record("pulled")'
READER = python('say(os.getpid()); say(repr(open("a").read(3)))')


@pytest.mark.parametrize(
    "command",
    [
        ("cat", "a"),
        ("dd", "if=a", "status=none"),
        python('fd = os.open("a", os.O_RDONLY); os.write(1, os.read(fd, 1 << 20))'),
        python('fd = os.open("a", os.O_RDWR); os.write(1, os.read(fd, 1 << 20))'),
        python('import mmap; f = open("a", "rb"); os.write(1, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[:])'),
        python('os.link("a", "b"); os.write(1, open("b", "rb").read())'),
        python('os.rename("a", "b"); os.write(1, open("b", "rb").read())'),
        python('os.chmod("a", 0o600); os.write(1, open("a", "rb").read())'),
        ("sh", "-c", "cat a & wait"),
        ("sh", "-c", "setsid sh -c 'cat a > out & exec true'; until [ -s out ]; do :; done; cat a"),
        python('os.execvp("cat", ["cat", "a"])'),
        python('subprocess.run(["cat", "a"])'),
    ],
    ids=lambda command: " ".join(command)[-50:],
)  # fmt: skip
def test_whoever_opens_a_file_gets_its_bytes(gate: Run, command: tuple[str, ...]) -> None:
    run = gate(FILL_WHEN_WANTED, *command)
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b"a" * (1 << 20), run.errors()
    assert run.wait() == 0, run.errors()


def test_a_file_that_is_truncated_or_overwritten_is_first_there(gate: Run, tmp_path: Path) -> None:
    program = 'os.truncate("a", 3); open("b", "wb").write(b"new"); say(open("a").read())'
    restores = 'r.hold("a", "b"); r.start()\nfor n in "ab": r.wanted(n); r.fill(n)'
    run = gate(restores, *python(program))
    assert run.line() == "aaa"
    assert run.wait() == 0
    assert (tmp_path / "b").read_bytes() == b"new"


def test_a_file_that_is_removed_waits_for_nobody(gate: Run, tmp_path: Path) -> None:
    run = gate('r.hold("a"); r.start(); sys.stdin.read(); r.link.receive()', "rm", "a")
    assert run.wait() == 0
    assert not (tmp_path / "a").exists()


def test_who_does_not_want_to_wait_is_told_so(gate: Run) -> None:
    program = """
try: os.open("a", os.O_RDONLY | os.O_NONBLOCK)
except BlockingIOError: say("would block", os.stat("a").st_size)
"""
    assert gate(FILL_WHEN_WANTED, *python(program)).line() == f"would block {1 << 20}"


def test_a_program_is_executed_as_soon_as_it_is_there_many_times(gate: Run) -> None:
    """Neither too early nor with ETXTBSY, whether by fork or vfork."""
    restores = """
content = open(shutil.which("true"), "rb").read()
names = [f"./p{n}" for n in range(60)]
r.hold(*names, size=len(content), mode=0o755)
r.start()
for name in names: r.wanted(name); r.fill(name, content=content)
"""
    program = """
for n in range(60):
    if n % 2: pid = os.posix_spawn(f"./p{n}", ["p"], os.environ)
    elif not (pid := os.fork()): os.execv(f"./p{n}", ["p"])
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code: say("failed", n, code)
say("done")
"""
    run = gate("import shutil\n" + restores, *python(program))
    assert run.line() == "done"
    assert run.wait() == 0, run.errors()


def test_a_file_that_takes_long_is_renewed(gate: Run) -> None:
    """Each time the kernel begins its count again, and whoever waits asks again, in a vfork and in threads too."""
    restores = 'r.hold("a"); r.start(); r.wanted("a", 4); r.fill("a")'
    program = """
import threading
threads = [threading.Thread(target=lambda: say(open("a").read(3))) for _ in range(3)]
for each in threads: each.start()
for each in threads: each.join()
"""
    run = gate(restores, *python(program))
    assert [run.line() for _ in range(3)] == ["aaa"] * 3
    assert run.wait() == 0


def test_a_program_that_takes_long_while_a_vfork_waits(gate: Run) -> None:
    restores = """
import shutil
content = open(shutil.which("echo"), "rb").read()
r.hold("./p", size=len(content), mode=0o755)
r.start(); r.wanted("./p", 4); r.fill("./p", content=content)
"""
    run = gate(restores, *python('subprocess.run(["./p", "there"])'))
    assert run.line() == "there"
    assert run.wait() == 0


STARTS_LATE = '''
import shutil
def lets_start(name, content):
    """The command can start only when this file, which the kernel needs for that, is there; that takes long."""
    r.hold(name, size=len(content), mode=0o755)
    r.record("started"); r.link.send(Start())
    r.wanted(name, 4); r.fill(name, content=content)
    assert isinstance(r.link.receive()[0], Child)
    r.record("pulled")
echo = open(shutil.which("echo"), "rb").read()
'''


def test_a_command_that_is_itself_not_there_yet_starts_when_it_is(gate: Run) -> None:
    run = gate(f'{STARTS_LATE}lets_start("p", echo)', "./p", "there")
    assert run.line() == "there"
    assert run.wait() == 0, run.errors()


def test_a_script_starts_when_the_interpreter_of_its_interpreter_is_there(gate: Run, tmp_path: Path) -> None:
    for script, interpreter in (("outer", "inner"), ("inner", "p")):
        (tmp_path / script).write_text(f"#! {tmp_path / interpreter} {script}\n")
        (tmp_path / script).chmod(0o755)
    run = gate(f'{STARTS_LATE}lets_start("p", echo)', "./outer", "there")
    assert run.line() == f"inner {tmp_path}/inner outer ./outer there"
    assert run.wait() == 0, run.errors()


def test_a_program_starts_when_its_loader_is_there(gate: Run, tmp_path: Path) -> None:
    program = Path(shutil.which("echo") or "").read_bytes()
    loader = re.search(rb"/[!-~]*/ld-[!-~]*\0", program)
    assert loader, "a program that is linked statically"
    (tmp_path / "p").write_bytes(program.replace(loader[0], b"./ld".ljust(len(loader[0]), b"\0")))
    (tmp_path / "p").chmod(0o755)
    content = f"open({os.fsdecode(loader[0][:-1])!r}, 'rb').read()"
    run = gate(f'{STARTS_LATE}lets_start("ld", {content})', "./p", "there")
    assert run.line() == "there"
    assert run.wait() == 0, run.errors()


@pytest.mark.parametrize("content", [b"#!/\n", b"\x7fELF\2\1" + b"\xff" * 58], ids=["directory", "noise"])
def test_a_command_that_cannot_start_is_told_as_without_a_gate(
    gate: Run, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "p").write_bytes(content)
    (tmp_path / "p").chmod(0o755)
    run = gate('r.hold("a"); r.record("started"); r.link.send(Start()); forever()', "./p")
    run.wait()
    assert 'exec: "./p": ' in run.errors()
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 126


NEVER_STARTS = 'r.hold("p", mode=0o755); r.record("started"); r.link.send(Start()); r.wanted("p", 2); '


def test_sigterm_ends_the_wait_for_a_command_that_is_not_there(gate: Run, tmp_path: Path) -> None:
    run = gate(f'{NEVER_STARTS}open("asked", "w").close(); forever()', "./p")
    until((tmp_path / "asked").exists)
    run.send(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    facts = json.loads((tmp_path / "status.json").read_text())
    assert (facts["phase"], facts["pid"]) == ("ended", None)


def test_a_command_that_never_arrives_is_not_started(gate: Run, tmp_path: Path) -> None:
    run = gate(f"{NEVER_STARTS}sys.exit(6)", "./p")
    assert run.wait() == 125
    assert "ended with exit code 6" in run.errors()
    assert json.loads((tmp_path / "status.json").read_text())["pid"] is None


def test_a_stop_does_not_continue_who_was_stopped_before(gate: Run) -> None:
    program = """
p = subprocess.Popen(["sleep", "1000"])
p.send_signal(signal.SIGSTOP)
os.waitid(os.P_PID, p.pid, os.WSTOPPED)
open("a").read()
say(open(f"/proc/{p.pid}/stat").read().rpartition(")")[2].split()[0])
p.kill()
"""
    run = gate('r.hold("a"); r.start(); r.wanted("a", 3); r.fill("a")', *python(program))
    assert run.line() == "T"
    assert run.wait() == 0


def test_someone_elses_sigcont_lets_nobody_through(gate: Run) -> None:
    """A health checker that continues the child a hundred times a second."""
    restores = """
r.hold("a"); r.start()
p = subprocess.Popen([sys.executable, "-c",
    f"import os, signal, time\\nwhile True: os.kill({r.child}, signal.SIGCONT); time.sleep(0.01)"])
r.wanted("a", 3); r.fill("a"); p.kill(); p.wait()
"""
    run = gate(restores, *python('say(open("a").read(3))'))
    assert run.line() == "aaa"
    assert run.wait() == 0


def test_while_somebody_else_waits_for_a_file_the_child_is_stopped(gate: Run, tmp_path: Path) -> None:
    restores = 'r.hold("a"); r.start(); r.wanted("a"); sys.stdin = open("go"); sys.stdin.read(); r.fill("a")'
    os.mkfifo(tmp_path / "go")
    run = gate(restores, *python('say("up", os.getpid()); say(open("a").read(3))'))
    pid = run.line().split()[1]
    outside = subprocess.Popen(["cat", "a"], cwd=tmp_path, stdout=subprocess.PIPE)
    until(lambda: "outside of the command" in run.errors())
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    (tmp_path / "go").write_text("")
    assert run.line() == "aaa"
    assert outside.communicate()[0] == b"a" * (1 << 20)
    assert run.wait() == 0
    assert run.errors().count("outside of the command") == 1


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("os.kill(os.getpid(), 9)", "was ended by signal 9"),
        ("sys.exit(6)", "ended with exit code 6"),
        ("", "ended before every file was there"),
        ("r.link.close(); forever()", "is gone"),
    ],
)
def test_a_restore_that_fails_ends_the_command(gate: Run, end: str, why: str) -> None:
    run = gate(f'r.hold("a"); r.start(); r.wanted("a"); {end}', *READER)
    pid = int(run.line())
    assert run.wait() == 125
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""
    assert run.errors().count("so the command was ended") == 1
    assert "so it goes on" not in run.errors()
    assert why in run.errors()
    assert not alive(pid)


def test_daemons_end_with_a_restore_that_fails(gate: Run, tmp_path: Path) -> None:
    restores = 'r.hold("a"); r.start(); r.wanted("a"); open("go").read(); os.kill(os.getpid(), 9)'
    os.mkfifo(tmp_path / "go")
    daemon = "setsid sh -c '(cat a > out; echo $$) & echo $!' &"
    run = gate(restores, "sh", "-c", f"{daemon} {daemon} (setsid sleep 1000 & echo $!); cat a")
    pids = [int(run.line()) for _ in range(3)]
    (tmp_path / "go").write_text("")
    assert run.wait() == 125
    assert not any(map(alive, pids))
    assert (tmp_path / "out").read_bytes() == b""


def test_a_restore_that_fails_before_the_start_is_a_boot_that_failed(gate: Run) -> None:
    run = gate('r.hold("a"); sys.exit(6)', "echo", "no")
    assert run.wait() == 125
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""


def test_a_restorer_that_ends_well_before_the_start_leaves_an_ordinary_run(gate: Run) -> None:
    run = gate('r.record("unchanged")', "echo", "yes")
    assert run.line() == "yes"
    assert run.wait() == 0


def test_a_killed_supervisor_takes_the_command_with_it(gate: Run, tmp_path: Path) -> None:
    restores = 'r.hold("a"); r.start(); r.wanted("a"); print; r.end_with_supervisor()'
    script = "setsid sh -c 'cat a > out & echo $!' ; (setsid sleep 1000 & echo $!); echo $$; cat a"
    run = gate(restores, "sh", "-c", script)
    pids = [int(run.line()) for _ in range(3)]
    run.process.kill()
    until(lambda: "orphans ended" in run.errors())
    assert not any(map(alive, pids))
    assert "supervisor of the command was killed" in run.errors()
    assert (tmp_path / "out").read_bytes() == b""


def test_a_supervisor_that_is_killed_while_the_command_is_stopped_takes_it_along(
    gate: Run, tmp_path: Path
) -> None:
    restores = 'r.hold("a"); r.start(); r.wanted("a"); r.end_with_supervisor()'
    run = gate(restores, *python('say("up", os.getpid()); say(open("a").read(3))'))
    pid = int(run.line().split()[1])
    outside = subprocess.Popen(["cat", "a"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    until(lambda: "outside of the command" in run.errors())
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    run.process.kill()
    until(lambda: "orphans ended" in run.errors())
    assert not alive(pid)
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""
    outside.wait()


def _stderr_to(fifo: Path, how: str) -> tuple[str, ...]:
    """What is put in front of a command whose stderr is a pipe with a name."""
    os.mkfifo(fifo)
    return ("bash", "-c", f'exec "$@" 2{how}{fifo}', "bash")


def test_a_killed_supervisor_takes_the_command_with_it_though_nobody_reads_stderr(
    gate: Run, tmp_path: Path
) -> None:
    before = _stderr_to(tmp_path / "stderr", ">")
    reader = os.open(tmp_path / "stderr", os.O_RDONLY | os.O_NONBLOCK)
    run = gate('r.hold("a"); r.start(); r.wanted("a"); r.end_with_supervisor()', *READER, before=before)
    pid = int(run.line())
    os.close(reader)
    run.process.kill()
    until(lambda: not alive(pid))
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""


FULL = """
fd = os.open("stderr", os.O_RDWR | os.O_NONBLOCK)
try:
    while True: os.write(fd, bytes(1024))
except BlockingIOError: say(os.getpid())
"""


def test_a_restore_that_fails_ends_the_command_though_stderr_is_full(gate: Run, tmp_path: Path) -> None:
    program = f'{FULL}say(repr(open("a").read(3)))'
    before = _stderr_to(tmp_path / "stderr", "<>")
    run = gate('r.hold("a"); r.start(); r.wanted("a"); sys.exit(6)', *python(program), before=before)
    pid = int(run.line())
    until(lambda: not alive(pid), "the end of the command")
    assert run.process.poll() is None, "it waits to tell why"
    reader = os.open(tmp_path / "stderr", os.O_RDONLY | os.O_NONBLOCK)
    os.read(reader, 1 << 20)
    assert run.wait() == 125
    assert b"so the command was ended" in os.read(reader, 1 << 20)
    os.close(reader)
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""


def test_a_command_that_goes_on_is_seen_to_though_stderr_is_full(gate: Run, tmp_path: Path) -> None:
    """It gets its signals, and is reaped; what there was to say is said when somebody reads."""
    restores = (
        'r.hold("a"); r.start(); r.fill("a")\nwhile not os.path.exists("fail"): time.sleep(0.01)\nos._exit(6)'
    )
    program = (
        f'taking(10, 15); open("a").read(1); {FULL}open("fail", "w").close(); say(take(10)); say(take(15))'
    )
    run = gate(restores, *python(program), before=_stderr_to(tmp_path / "stderr", "<>"))
    child = int(run.line())
    until(lambda: not status(tmp_path / "status.json")["restoring"], "the end of the restore")
    run.send(signal.SIGUSR1)
    assert run.line() == "SIGUSR1"
    os.kill(child, signal.SIGTERM)
    assert run.line() == "SIGTERM"
    until(lambda: status(tmp_path / "status.json")["phase"] == "ended", "the end")
    reader = os.open(tmp_path / "stderr", os.O_RDONLY | os.O_NONBLOCK)
    os.read(reader, 1 << 20)
    assert run.wait() == 0
    assert b"when every file was there" in os.read(reader, 1 << 20)
    os.close(reader)


def test_sigterm_ends_the_restore_after_the_command(gate: Run) -> None:
    """Which may still need a file for its own end."""
    restores = 'r.hold("a"); r.start(); r.wanted("a"); r.fill("a"); forever()'
    program = 'taking(15); say("up"); take(15); say(open("a").read(3)); sys.exit(7)'
    run = gate(restores, *python(program))
    assert run.line() == "up"
    run.send(signal.SIGTERM)
    assert run.line() == "aaa"
    assert run.wait() == 7


def test_sigterm_for_all_processes_at_once_leaves_the_command_its_time_to_end(gate: Run) -> None:
    """As systemd.kill(5) has it."""
    restores = 'r.hold("a"); r.start(); r.link.receive()'
    program = 'taking(10, 15); say("up"); say(take(15)); say(take(10)); sys.exit(7)'
    env = {"PACKHORSE_RUN_GRACE": "60", "PACKHORSE_RUN_STOP_TIMEOUT": "50"}
    run = gate(restores, *python(program), env=env)
    assert run.line() == "up"
    restorer = _first_child(run)
    run.send(signal.SIGTERM)
    os.kill(restorer, signal.SIGTERM)
    assert run.line() == "SIGTERM"
    until(lambda: not Path(f"/proc/{restorer}").exists(), "the end of the restorer")
    run.send(signal.SIGUSR1)
    assert run.line() == "SIGUSR1"
    assert run.wait() == 7
    assert "restore failed" not in run.errors()


def test_nobody_is_let_through_when_the_restorer_was_told_to_end_as_well(gate: Run) -> None:
    program = 'taking(15); say("up"); take(15); say(open("a").read(3))'
    env = {"PACKHORSE_RUN_GRACE": "60", "PACKHORSE_RUN_STOP_TIMEOUT": "50"}
    run = gate('r.hold("a"); r.start(); r.link.receive()', *python(program), env=env)
    assert run.line() == "up"
    restorer = _first_child(run)
    run.send(signal.SIGTERM)
    os.kill(restorer, signal.SIGTERM)
    assert run.wait() == 125
    assert "so the command was ended" in run.errors()
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""


def test_the_restore_ends_with_a_command_that_ends_by_itself(gate: Run) -> None:
    run = gate('say = r.hold("a"); r.start(); forever()', "sh", "-c", "exit 3")
    assert run.wait() == 3
    assert "restore failed" not in run.errors()


def test_a_signal_that_ends_nothing_leaves_the_restore_its_time_to_end(gate: Run, tmp_path: Path) -> None:
    """In which it keeps what it learnt."""
    restores = """
def keep(*_):
    for number in (signal.SIGWINCH, signal.SIGUSR1, signal.SIGHUP): os.kill(os.getppid(), number)
    time.sleep(0.1)
    open("kept", "w").close()
    os._exit(143)
signal.signal(signal.SIGTERM, keep)
r.hold("a"); r.start()
while True: time.sleep(0.01)
"""
    run = gate(restores, "sh", "-c", "exit 3")
    assert run.wait() == 3
    assert (tmp_path / "kept").exists()


def test_a_restore_does_not_outlast_the_grace(gate: Run) -> None:
    restores = 'signal.signal(signal.SIGTERM, signal.SIG_IGN); r.hold("a"); r.start(); forever()'
    env = {"PARTS_WITHIN": "1000", "PACKHORSE_RUN_GRACE": "0.6"}
    run = gate(restores, *python('taking(15); say("up"); take(15)'), env=env)
    assert run.line() == "up"
    run.send(signal.SIGTERM)
    assert run.wait() == 0


def test_the_status_file_tells_whether_the_restore_is_on_its_way(gate: Run, tmp_path: Path) -> None:
    program = """
import json
def facts(): return json.load(open("status.json"))
while facts()["phase"] != "running": pass
say(facts()["restoring"], facts()["boot"]["action"])
open("a").read()
while facts()["restoring"]: pass
say(facts()["boot"]["action"])
"""
    run = gate(FILL_WHEN_WANTED, *python(program))
    assert [run.line(), run.line()] == ["True started", "pulled"]
    assert run.wait() == 0
    assert json.loads((tmp_path / "status.json").read_text())["restoring"] is False


def test_the_command_keeps_the_limit_on_open_files_and_gets_none_of_the_held(gate: Run) -> None:
    restores = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
r.hold(*(f"f{n}" for n in range(400))); r.start(); r.fill(*r.files)
"""
    program = """
import resource
say(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
say([l for n in os.listdir("/proc/self/fd") if (l := os.path.basename(os.path.realpath(f"/proc/self/fd/{n}")))[:1] == "f" and l[1:].isdigit()])
say(open("f399").read(3))
"""
    run = gate(restores, *python(program), before=("prlimit", "--nofile=128:"))
    assert [run.line(), run.line(), run.line()] == ["128", "[]", "fff"]
    assert run.wait() == 0


def test_files_that_cannot_all_be_held_are_a_restore_that_fails(gate: Run) -> None:
    restores = 'r.hold("a"); r.link.hold([(n, r.files["a"][1], False) for n in range(1, 100)]); r.start()'
    run = gate(restores, "cat", "a", before=("prlimit", "--nofile=60:60"))
    assert run.wait() == 125
    assert "RLIMIT_NOFILE" in run.errors()


def test_after_a_restore_that_failed_the_command_starts_once_more_where_that_is_wanted(
    gate: Run, tmp_path: Path
) -> None:
    """The ordinary way: here an installation of nothing, which the second start waits for."""
    restores = 'r.hold("a"); r.start(); r.wanted("a"); os.remove(sys.argv[0]); os.remove("a"); sys.exit(6)'
    (tmp_path / "requirements.txt").write_text("")
    env = {
        "PACKHORSE_RUN_ON_RESTORE_FAILURE": "install",
        "PACKHORSE_RUN_ON_MISSING": "install",
        "PACKHORSE_ENVIRONMENT_REQUIREMENTS": "requirements.txt",
    }
    program = """
say("begins", *os.listdir(os.environ["TMPDIR"]))
open(os.path.join(os.environ["TMPDIR"], "left"), "w").close()
say(os.path.exists("a") and open("a").read())
"""
    run = gate(restores, *python(program), env=env)
    assert [run.line(), run.line(), run.line()] == ["begins", "begins", "False"], run.errors()
    assert run.wait() == 0
    assert "starting once more" in run.errors()


def test_no_periodic_backup_begins_while_all_is_restored_for_the_command_to_start_once_more(
    gate: Run, tmp_path: Path, root_path: Path
) -> None:
    (tmp_path / "requirements.txt").write_text("")
    env = {
        "PACKHORSE_RUN_ON_RESTORE_FAILURE": "install",
        "PACKHORSE_RUN_ON_MISSING": "install",
        "PACKHORSE_ENVIRONMENT_REQUIREMENTS": "requirements.txt",
        "PACKHORSE_RUN_BACKUP": '["models"]',
        "PACKHORSE_RUN_BACKUP_EVERY": "0.05s",
    }
    restores = 'r.hold("a"); r.start(); r.wanted("a"); os.remove(sys.argv[0]); os.remove("a"); sys.exit(6)'
    with atomic.locked(Root.open(root_path).private / "lock"):
        run = gate(restores, *python('say("begins"); os.path.exists("a") and open("a").read()'), env=env)
        assert run.line() == "begins"

        def own() -> list[str]:
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children]
            return [word.decode() for line in lines for word in line[3:4]]

        def woken() -> int:
            lines = Path(f"/proc/{run.pid}/status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith("voluntary")))

        until(lambda: own() == ["boot"], "the second boot")
        before = woken()
        until(lambda: woken() > before + 10 or own() != ["boot"])
        assert own() == ["boot"]
    assert run.line() == "begins"
    assert run.wait() == 0, run.errors()


def test_a_command_that_ended_by_itself_is_not_started_once_more(gate: Run, tmp_path: Path) -> None:
    """Though the restore fails while what it left behind is being ended."""
    (tmp_path / "requirements.txt").write_text("")
    env = {
        "PACKHORSE_RUN_ON_RESTORE_FAILURE": "install",
        "PACKHORSE_ENVIRONMENT_REQUIREMENTS": "requirements.txt",
        "LEAVES_WITHIN": "1000",
    }
    os.mkfifo(tmp_path / "go")
    program = """
taking(15); say("begins")
if not os.fork(): os.setsid(); take(15); open("go", "w").close(); time.sleep(1000)
"""
    run = gate('r.hold("a"); r.start(); open("go").read(); os._exit(6)', *python(program), env=env)
    assert run.line() == "begins"
    assert run.wait() == 0, run.errors()
    assert "the restore failed: " in run.errors()
    assert "starting once more" not in run.errors()


@pytest.mark.parametrize("end", ["sys.exit(6)", "os.kill(os.getpid(), 9)"])
def test_a_command_goes_on_for_which_everything_is_there_when_the_restore_fails(
    gate: Run, tmp_path: Path, end: str
) -> None:
    restores = f'r.hold("a"); r.start(); r.wanted("a"); r.fill("a"); {end}'
    run = gate(restores, *python('taking(15); say(open("a").read(3)); take(15); say("end"); sys.exit(7)'))
    assert run.line() == "aaa"
    until(lambda: json.loads((tmp_path / "status.json").read_text())["restoring"] is False)
    run.send(signal.SIGTERM)
    assert run.line() == "end"
    assert run.wait() == 7
    assert run.errors().count("so it goes on; the next start finishes the restore") == 1
    assert "restore failed" not in run.errors()


def test_a_command_starts_for_which_everything_is_there_when_the_restore_fails(gate: Run) -> None:
    """Before the supervisor looks; the root is recorded as partly restored."""
    restores = """
from packhorse.root import Root, State
Root(Path(r.options.result).parents[2]).record(State(state="partial"))
r.record("started"); r.link.send(Start()); os._exit(6)
"""
    run = gate(f"from pathlib import Path\n{restores}", *python('taking(15); say("up"); take(15)'))
    assert run.line() == "up", run.errors()
    run.send(signal.SIGTERM)
    assert run.wait() == 0, run.errors()


@pytest.mark.parametrize("stopped_by", ["renewals", "ctrl-z"])
def test_on_a_terminal_only_the_stops_of_others_are_job_control(
    packhorse: Packhorse, tmp_path: Path, stopped_by: str
) -> None:
    """After Ctrl-Z what is wanted is renewed before anybody runs on: nobody did so meanwhile."""
    restorer = tmp_path / "restorer.py"
    times, look = (4, "0.2") if stopped_by == "renewals" else (2, "1000")
    asked = f'for n in range({times}): signal.sigwait([write_leases.WANTED]); open("asked", "w").close()'
    restorer.write_text(f'{PREAMBLE}r.hold("a"); r.start()\n{asked}\nr.fill("a")')
    environ = {
        **packhorse.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RESTORER": str(restorer),
        "PACKHORSE_RUN_ON_MISSING": "fail",
        "PS1": "$ ",
        "TERM": "dumb",
    }
    console = Console(list(BASH), environ, str(tmp_path))
    try:
        console.type(
            f"{sys.executable} {gate_driver.__file__} {look} sh -c 'echo u''p; head -c 3 a; echo; echo e''nd'\n"
        )
        console.expect("up\r\n")
        if stopped_by == "ctrl-z":
            until((tmp_path / "asked").exists)
            console.type("\x1a")
            console.expect("Stopped")
            console.type("fg\n")
        shown = console.expect("(?s)(.*)aaa\r\nend")
        assert stopped_by == "ctrl-z" or "Stopped" not in shown[1]
        console.type("echo code-$?\n")
        console.expect("code-0")
        console.type("exit\n")
        assert console.exit_code() == 0
    finally:
        console.close()


def test_a_supervisor_that_stood_still_for_a_while_goes_on(gate: Run, tmp_path: Path) -> None:
    """Longer than until its next timer."""
    os.mkfifo(tmp_path / "go")
    run = gate('r.hold("a"); r.start(); open("go").read(); r.fill("a")', *READER)
    run.line()
    run.send(signal.SIGSTOP)
    stopped = time.monotonic()
    until(lambda: time.monotonic() - stopped > 1)
    run.send(signal.SIGCONT)
    (tmp_path / "go").write_text("")
    assert run.line() == "'aaa'"
    assert run.wait() == 0, run.errors()


@pytest.mark.namespaces
def test_a_command_is_ended_that_the_kernel_may_have_let_through_while_the_supervisor_stood_still(
    gate: Run, tmp_path: Path
) -> None:
    """As in a container that is frozen. Here the kernel waits longer than it says."""
    (tmp_path / "seconds").write_text("8\n")
    script = 'mount --bind seconds /proc/sys/fs/lease-break-time && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", script, "sh")
    run = gate('r.hold("a"); r.start(); forever()', *READER, before=before)
    pid = int(run.line())
    wchan = Path(f"/proc/{pid}/wchan")
    until(lambda: "lease" in wchan.read_text() or wchan.read_text() == "0", "the command to wait")
    run.send(signal.SIGSTOP)
    stopped = time.monotonic()
    until(lambda: time.monotonic() - stopped > 7)
    run.send(signal.SIGCONT)
    assert run.wait() == 125
    assert "stopped for too long" in run.errors()
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""
    assert not alive(pid)


# --- under a debugger ---

TRACER = (sys.executable, tracer.__file__)


@pytest.fixture
def attach() -> Iterator[Callable[[str, str], None]]:
    """Traces a process that runs already, in one manner or another."""
    started: list[subprocess.Popen[bytes]] = []

    def attach(manner: str, pid: str) -> None:
        started.append(subprocess.Popen([*TRACER, manner, "--attach", pid], stdout=subprocess.PIPE))
        assert started[-1].stdout is not None
        if not started[-1].stdout.readline():
            assert started[-1].wait() == tracer.REFUSED
            pytest.skip("Tracing a process that is not a child is refused here.")

    yield attach
    for each in started:
        each.kill()
        each.communicate()


@pytest.mark.parametrize("manner", ["seize", "attach", "ignore"])
def test_under_a_debugger_of_its_own_the_command_reads_what_is_there_in_the_end(
    gate: Run, manner: str
) -> None:
    """The debugger is stopped as well, and first."""
    restores = 'r.hold("a"); r.start(); r.wanted("a", 4); r.fill("a")'
    run = gate(restores, *TRACER, manner, *READER[1:])
    run.line()
    assert run.line() == "'aaa'"
    assert run.wait() == 0, run.errors()


def test_under_a_debugger_from_outside_that_keeps_it_stopped_the_command_reads_what_is_there_in_the_end(
    gate: Run, attach: Callable[[str, str], None]
) -> None:
    restores = 'r.hold("a"); r.start(); r.wanted("a", 4); r.fill("a")'
    run = gate(restores, *python('taking(10); say(os.getpid()); take(10); say(open("a").read(3))'))
    attach("seize", run.line())
    run.send(signal.SIGUSR1)
    assert run.line() == "aaa"
    assert run.wait() == 0, run.errors()


@pytest.mark.parametrize("manner", ["attach", "ignore"])
def test_a_command_that_a_debugger_from_outside_has_run_on_waits_or_is_ended(
    gate: Run, attach: Callable[[str, str], None], manner: str
) -> None:
    """Whichever it is, the kernel does not let it through to what is not there."""
    restores = 'r.hold("a"); r.start(); r.wanted("a", 4); r.fill("a"); forever()'
    run = gate(restores, *python('taking(10); say(os.getpid()); take(10); say(open("a").read(3))'))
    attach(manner, pid := run.line())
    run.send(signal.SIGUSR1)
    code = run.wait()
    assert run.process.stdout is not None
    said = run.process.stdout.read()
    if code:
        assert (code, said) == (125, b"")
        assert run.errors().count("does not stop, such as one that a debugger holds") == 1
    else:
        assert said == b"aaa\n"
    assert not alive(int(pid))


def test_a_command_that_does_not_stop_in_time_is_ended(gate: Run) -> None:
    """Before the kernel lets it through."""
    run = gate('r.hold("a"); r.start(); forever()', *READER, env={"STOPS_WITHIN": "0"})
    pid = int(run.line())
    assert run.wait() == 125
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""
    assert run.errors().count("a process of the command does not stop") == 1
    assert not alive(pid)


def test_a_restore_that_fails_ends_a_command_under_a_debugger(gate: Run) -> None:
    run = gate('r.hold("a"); r.start(); r.wanted("a"); sys.exit(6)', *TRACER, "ignore", *READER[1:])
    pid = int(run.line())
    assert run.wait() == 125
    assert run.process.stdout is not None
    assert run.process.stdout.read() == b""
    assert not alive(pid)
