"""What supervision promises: signals arrive, nothing is left behind, waiting costs nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from tests.worker.conftest import PATIENT, Start, alive, ephemeral, python, until

OBEDIENT = """
numbers = (1, 2, 3, 10, 12, 15, 28)
taking(*numbers)
say("ready")
say("got", take(*numbers))
sys.exit(7)
"""

DEAF = """
signal.signal(15, signal.SIG_IGN)
signal.signal(2, signal.SIG_IGN)
say("ready")
while True: signal.pause()
"""


@pytest.mark.parametrize("command", ["run", "exec"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH"])
def test_a_signal_reaches_the_child_whose_code_wins(start: Start, command: str, name: str) -> None:
    supervisor = start(command, *python(OBEDIENT))
    assert supervisor.line() == "ready"
    supervisor.send(signal.Signals[name])
    assert supervisor.line() == f"got {name}"
    assert supervisor.wait() == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_that_ignores_the_signal_is_killed_after_the_stop_timeout(
    start: Start, number: signal.Signals, root_path: Path
) -> None:
    supervisor = start("run", *python(DEAF), env={"PACKHORSE_RUN_STOP_TIMEOUT": "0.5"})
    assert supervisor.line() == "ready"
    before = time.monotonic()
    supervisor.send(number)
    assert supervisor.wait() == 128 + signal.SIGKILL
    assert 0.5 <= time.monotonic() - before < 5
    assert ephemeral(root_path) == []


def test_a_grace_that_is_meant_as_forever_is_one(start: Start) -> None:
    env = {"PACKHORSE_RUN_GRACE": "99999999999", "PACKHORSE_RUN_STOP_TIMEOUT": "99999999998"}
    supervisor = start("run", *python("taking(15); say(); take(15); sys.exit(7)"), env=env)
    supervisor.line()
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait() == 7, supervisor.errors()


def test_signals_that_do_not_end_a_child_leave_it_its_time(start: Start) -> None:
    program = """
taking(10)
say("ready")
take(10)
say("usr1")
time.sleep(0.5)
say("still here")
"""
    supervisor = start("run", *python(program), env={"PACKHORSE_RUN_STOP_TIMEOUT": "0.1"})
    supervisor.line()
    supervisor.send(signal.SIGUSR1)
    assert [supervisor.line(), supervisor.line()] == ["usr1", "still here"]
    assert supervisor.wait() == 0


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(start: Start) -> None:
    program = """
say(signal.getsignal(1) == signal.SIG_IGN)
taking(1, 10)
say("ready")
while (name := take(1, 10)) != "SIGUSR1": say("got", name)
"""
    supervisor = start("run", *python(program), before=("nohup",))
    assert [supervisor.line(), supervisor.line()] == ["True", "ready"]
    supervisor.send(signal.SIGHUP)
    supervisor.send(signal.SIGUSR1)
    until(lambda: supervisor.process.poll() is not None)
    assert supervisor.process.stdout is not None
    assert supervisor.process.stdout.read() == b""
    assert supervisor.wait() == 0


def test_the_child_starts_with_the_signals_of_a_fresh_process(start: Start) -> None:
    supervisor = start("run", "--", "grep", "-E", "SigBlk|SigIgn", "/proc/self/status")
    for _ in range(2):
        mask = int(supervisor.line().split()[1], 16)
        assert mask & (1 << 31) - 1 == 0  # signals 32 and 33 are the C library's own


def test_a_variable_without_a_name_keeps_nothing_from_starting(start: Start) -> None:
    nameless = (
        "import ctypes, os, sys; ctypes.CDLL(None).putenv(b'=value'); os.execv(sys.argv[1], sys.argv[1:])"
    )
    supervisor = start("run", *python("say('up')"), before=(sys.executable, "-c", nameless))
    assert supervisor.line() == "up"
    assert supervisor.wait() == 0, supervisor.errors()


LEAVES_BEHIND = """
behind = subprocess.Popen(
    [sys.executable, "-c", "import os, signal, sys, time\\n"
     "signal.signal(15, {on_term})\\nos.write(2, b'ready\\\\n')\\nwhile True: time.sleep(0.01)"],
    start_new_session={own_session}, stderr=subprocess.PIPE)
behind.stderr.readline()
say(behind.pid)
"""


@pytest.mark.parametrize("own_session", [False, True])
@pytest.mark.parametrize("on_term", ["lambda *a: (print('bye', flush=True), sys.exit())", "signal.SIG_IGN"])
def test_a_grandchild_left_behind_is_asked_to_end_and_then_killed(
    start: Start, own_session: bool, on_term: str
) -> None:
    program = LEAVES_BEHIND.format(own_session=own_session, on_term=on_term)
    supervisor = start("run", *python(program), before=PATIENT if "bye" in on_term else ())
    pid = int(supervisor.line())
    if "bye" in on_term:
        assert supervisor.line() == "bye"
    assert supervisor.wait() == 0
    assert not alive(pid)


def test_a_grandchild_left_behind_does_not_outlast_the_grace(start: Start) -> None:
    program = (
        """
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(1000)"
subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
"""
        + DEAF
    )
    env = {"PACKHORSE_RUN_GRACE": "0.6", "PACKHORSE_RUN_STOP_TIMEOUT": "0.5"}
    supervisor = start("run", *python(program), env=env, before=PATIENT)
    assert {supervisor.line(), supervisor.line()} == {"1", "ready"}
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait() == 128 + signal.SIGKILL


def test_what_the_grandchildren_started_in_turn_is_ended_too(start: Start) -> None:
    program = """
behind = subprocess.Popen(["setsid", "sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE)
say(behind.stdout.readline().decode().strip())
"""
    supervisor = start("run", *python(program))
    pid = int(supervisor.line())
    assert supervisor.wait() == 0
    assert not alive(pid)


def test_a_stopped_grandchild_is_ended_too(start: Start) -> None:
    program = """
behind = subprocess.Popen(["sh", "-c", "trap 'echo bye; exit' TERM; kill -STOP $$; wait"], start_new_session=True)
os.waitid(os.P_PID, behind.pid, os.WSTOPPED)
say(behind.pid)
"""
    supervisor = start("run", *python(program), before=PATIENT)
    pid = int(supervisor.line())
    assert supervisor.line() == "bye"
    assert supervisor.wait() == 0
    assert not alive(pid)


ORPHANS = """
for _ in range(3):
    subprocess.run(["sh", "-c", "sleep 0 & exec true"])
def zombies():
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try: state, parent = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[:2]
        except OSError: continue
        if state == "Z" and int(parent) == os.getppid(): found.append(name)
    return found
orphan = int(subprocess.run(["sh", "-c", "sleep 1000 >&2 & echo $!"], stdout=-1).stdout)
parent = open(f"/proc/{orphan}/stat").read().rpartition(")")[2].split()[1]
say(parent == str(os.getppid()))
os.kill(orphan, signal.SIGKILL)
while os.path.exists(f"/proc/{orphan}"): time.sleep(0.01)
while zombies(): time.sleep(0.01)
say("reaped")
"""


def test_orphans_are_adopted_and_reaped(start: Start) -> None:
    supervisor = start("run", *python(ORPHANS))
    assert [supervisor.line(), supervisor.line()] == ["True", "reaped"]
    assert supervisor.wait() == 0


def test_the_background_jobs_of_a_script_that_made_way_for_packhorse_are_not_touched(start: Start) -> None:
    supervisor = start("run", "--", "true", before=("sh", "-c", 'sleep 1000 >&2 & echo $!; exec "$@"', "sh"))
    sidecar = int(supervisor.line())
    assert supervisor.wait() == 0
    assert alive(sidecar)
    os.kill(sidecar, signal.SIGKILL)


NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.mark.namespaces
class TestAsProcessOne:
    """A container's entry point: signals without a handler are not delivered, orphans are handed to it."""

    def test_orphans_are_reaped(self, start: Start) -> None:
        supervisor = start("run", *python(f"assert os.getppid() == 1\n{ORPHANS}"), before=NAMESPACE)
        assert [supervisor.line(), supervisor.line()] == ["True", "reaped"]
        assert supervisor.wait() == 0

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
    def test_signals_are_forwarded(self, start: Start, name: str) -> None:
        supervisor = start("run", *python(OBEDIENT), before=NAMESPACE)
        assert supervisor.line() == "ready"
        outside = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text()
        os.kill(int(outside), signal.Signals[name])
        assert supervisor.line() == f"got {name}"
        assert supervisor.wait() == 7

    def test_a_deaf_child_and_a_grandchild_are_killed(self, start: Start, root_path: Path) -> None:
        program = f"subprocess.Popen(['sleep', '1000'], start_new_session=True)\n{DEAF}"
        supervisor = start(
            "run", *python(program), before=NAMESPACE, env={"PACKHORSE_RUN_STOP_TIMEOUT": "0.2"}
        )
        assert supervisor.line() == "ready"
        outside = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text()
        os.kill(int(outside), signal.SIGTERM)
        assert supervisor.wait() == 128 + signal.SIGKILL
        assert ephemeral(root_path) == []


def test_a_waiting_supervisor_uses_no_cpu(start: Start) -> None:
    program = """
def switches():
    lines = open(f"/proc/{os.getppid()}/status").read().splitlines()
    return [line for line in lines if "ctxt_switches" in line]
while open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[0] != "S": time.sleep(0.01)
before = switches()
time.sleep(0.5)
say(before == switches())
"""
    assert start("run", *python(program)).line() == "True"


def test_a_waiting_supervisor_is_small_and_has_loaded_no_store(start: Start) -> None:
    program = """
parent = f"/proc/{os.getppid()}"
rss = [line for line in open(f"{parent}/status") if line.startswith("VmRSS")][0].split()[1]
heavy = [name for name in ("obstore", "psutil", "rich", "zstd") if name in open(f"{parent}/maps").read()]
say(rss, *heavy)
"""
    kilobytes, *heavy = start("run", *python(program)).line().split()
    assert int(kilobytes) < 40_000
    assert heavy == []


def test_a_killed_supervisors_child_keeps_its_tmpdir_and_its_packages(start: Start, root_path: Path) -> None:
    from packhorse.root import Root

    program = """
open(os.path.join(os.environ["TMPDIR"], "file"), "w").close()
say(os.getpid(), os.environ["TMPDIR"])
signal.pause()
"""
    supervisor = start("run", *python(program))
    pid, tmp = supervisor.line().split()
    supervisor.send(signal.SIGKILL)
    supervisor.wait()
    assert start("run", "--", "true").wait() == 0
    assert (Path(tmp) / "file").exists()
    with Root.open(root_path).packages_unused() as unused:
        assert not unused
    os.kill(int(pid), signal.SIGKILL)
    until(lambda: not alive(int(pid)))
    assert start("run", "--", "true").wait() == 0
    assert ephemeral(root_path) == []
    with Root.open(root_path).packages_unused() as unused:
        assert unused


def test_the_locks_a_child_inherits_lie_where_no_shell_script_uses_descriptors(start: Start) -> None:
    program = "say(*sorted(int(n) for n in os.listdir('/proc/self/fd') if int(n) > 2))"
    _, *inherited = start("run", *python(program)).line().split()  # the first is that of listdir
    assert len(inherited) == 2
    assert all(int(number) >= 100 for number in inherited)
