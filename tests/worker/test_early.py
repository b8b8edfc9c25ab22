"""`run` with start = "early" or "ready": the command runs while the root is being restored, whatever becomes of that."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.install.index import serve
from tests.snapshot.fatbins import Section, code, container, library
from tests.transfer.openings import killed
from tests.transfer.workers import Worker, persistent, settle
from tests.worker.conftest import Start, Started, alive, python, status, until

from packhorse import profile_name
from packhorse.config import Storage
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.order import Opened
from packhorse.snapshot.writer import placed_by
from packhorse.store import profiles, tags

MIB = 1 << 20
NOISE = random.Random(53)
LARGE = ("packages/data", "packages/program", "models/first", "models/second", "deps/tool")


@pytest.fixture
def environ(environ: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Early, with large files that come only when somebody opens them."""
    return {
        **environ,
        "PACKHORSE_STORAGE_URL": (tmp_path / "store").as_uri(),
        "PACKHORSE_RUN_START": "early",
        "PACKHORSE_RUN_ON_MISSING": "fail",
        "PACKHORSE_ARRIVALS": "asked",
    }


@pytest.fixture
def first(tmp_path: Path) -> Worker:
    """What was pushed."""
    worker = Worker(tmp_path / "first", Storage(url=(tmp_path / "store").as_uri()))
    assert worker.root
    worker.write("packages/module.py", "VALUE = 42\n")
    for name in LARGE:
        worker.write(name, NOISE.randbytes(2 * MIB))
    echo = Path(shutil.which("echo") or "").read_bytes()
    worker.write("packages/program", echo.ljust(2 * MIB, b"\0"))
    (worker.path / "packages/program").chmod(0o755)
    settle(*(worker.path / name for name in ("packages", "models", "deps")))
    worker.push()
    return worker


@pytest.fixture
def here(root_path: Path, first: Worker) -> Worker:
    """The worker that `run` restores."""
    return Worker(root_path, first.storage)


def _digest(worker: Worker, name: str) -> str:
    return hashlib.sha256((worker.path / name).read_bytes()).hexdigest()


READS = """
import hashlib
root = os.environ["PACKHORSE_ROOT"]
def read(name): say(hashlib.sha256(open(os.path.join(root, name), "rb").read()).hexdigest())
"""


def _restorer(run: Started) -> int:
    """The process that restores, while the command runs."""

    def find() -> int:
        for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            if b"\0boot\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        return 0

    return int(until(find, "a restorer"))


def _waiting(
    start: Start, store: Path | None = None, before: tuple[str, ...] = ()
) -> tuple[Started, int, int]:
    """A run whose command waits for a file, of a restorer that stands still, or of a `store` that does; also the ids of
    both."""
    program = f'{READS}taking(10); say(os.getpid()); take(10); say("opens"); read("models/first")'
    run = start("run", *python(program), before=before)
    child, restorer = int(run.line()), _restorer(run)
    if store is None:
        os.kill(restorer, signal.SIGSTOP)
    else:
        (store / "packs").rename(store / "kept")
        (store / "packs").mkdir()
        for pack in (store / "kept").iterdir():
            os.mkfifo(store / "packs" / pack.name)
    run.send(signal.SIGUSR1)
    assert run.line() == "opens"
    wchan = Path(f"/proc/{child}/wchan")
    until(lambda: "lease" in wchan.read_text() or wchan.read_text() == "0", "the command to wait")
    return run, child, restorer


def _said(run: Started) -> bytes:
    assert run.process.stdout is not None
    return run.process.stdout.read()


def _next_run_completes(start: Start, here: Worker, first: Worker) -> None:
    """By reading everything."""
    reads = "".join(f"read({name!r})\n" for name in LARGE)
    run = start("run", *python(f"{READS}taking(15)\n{reads}take(15)"))
    assert [run.line() for _ in LARGE] == [_digest(first, name) for name in LARGE]
    until(lambda: here.root.state().state == "complete")
    run.send(signal.SIGTERM)
    assert run.wait() == 0
    assert persistent(here.path) == persistent(first.path)
    assert here.push().pushed == []


def test_output_and_exit_code_are_the_commands_own(start: Start, here: Worker, first: Worker) -> None:
    program = f"{READS}import module; say(module.VALUE); read('models/second'); sys.exit(7)"
    run = start("run", *python(program))
    assert [run.line(), run.line()] == ["42", _digest(first, "models/second")]
    assert run.wait() == 7
    assert "restore failed" not in run.errors()
    assert here.root.state().state == "partial"
    assert (here.path / "models/second").read_bytes() == (first.path / "models/second").read_bytes()
    assert (here.path / "packages/data").read_bytes() == bytes(2 * MIB), "which nobody opened"
    _next_run_completes(start, here, first)


@pytest.mark.parametrize("seed", [1, 2])
def test_in_whatever_order_files_arrive_the_command_reads_what_was_pushed(
    start: Start, here: Worker, first: Worker, seed: int
) -> None:
    names = random.Random(seed).sample(LARGE, len(LARGE))
    program = f"{READS}taking(15)\nfor name in {names}: read(name)\ntake(15)"
    run = start("run", *python(program), env={"PACKHORSE_ARRIVALS": f"random:{seed}"})
    assert [run.line() for _ in names] == [_digest(first, name) for name in names]
    until(lambda: here.root.state().state == "complete")
    run.send(signal.SIGTERM)
    assert run.wait() == 0
    assert persistent(here.path) == persistent(first.path)


def test_a_large_program_of_the_environment_can_be_executed(start: Start, first: Worker) -> None:
    run = start("run", "--", "sh", "-c", '"$PACKHORSE_ROOT/packages/program" there')
    assert run.line() == "there"
    assert run.wait() == 0, run.errors()


def test_a_large_program_of_the_environment_can_be_the_command(
    start: Start, here: Worker, first: Worker
) -> None:
    run = start("run", "--", here.path / "packages/program", "there")
    assert run.line() == "there"
    assert run.wait() == 0, run.errors()


def test_a_file_that_somebody_has_open_comes_before_the_start_and_the_others_after_it(
    start: Start, here: Worker, first: Worker
) -> None:
    """Here one of those that a killed start left, which the next goes on with."""
    assert here.root
    killed(here, "held")
    program = f"{READS}say(*(name for name in {LARGE} if not os.stat(os.path.join(root, name)).st_blocks))"
    with (here.root.staging / "packages/data").open("rb"):
        run = start("run", *python(f"{program}\nread('packages/data'); read('models/first')"))
        assert run.line().split() == [name for name in LARGE if name != "packages/data"]
        assert [run.line(), run.line()] == [
            _digest(first, name) for name in ("packages/data", "models/first")
        ]
        assert run.wait() == 0
    assert (
        run.errors().count("packages/data cannot be held back until it is there (somebody has it open)") == 1
    )
    assert run.errors().count("warning") == 1
    _next_run_completes(start, here, first)


def test_the_status_file_tells_how_far_the_restore_is(
    start: Start, here: Worker, first: Worker, tmp_path: Path
) -> None:
    file = tmp_path / "status.json"
    program = f"{READS}taking(10, 15); say('up'); take(10)\nfor name in {LARGE}: read(name)\ntake(15)"
    run = start("run", "--status-file", file, *python(program))
    assert run.line() == "up"
    until(lambda: status(file).get("phase") == "running")
    assert (status(file)["restoring"], status(file)["boot"]["action"]) == (True, "pulling")
    run.send(signal.SIGUSR1)
    until(lambda: not status(file)["restoring"])
    assert status(file)["boot"]["action"] == "pulled"
    run.send(signal.SIGTERM)
    assert run.wait() == 0


STDERR = {
    "full": 'exec "$@" 2> /dev/full',
    "gone": 'exec 3> >(:); wait $!; exec "$@" 2>&3',
}


@pytest.mark.parametrize("mode", ["early", "ready"])
@pytest.mark.parametrize("stderr", STDERR)
def test_a_stderr_that_fails_ends_neither_command_nor_restore(
    start: Start, here: Worker, first: Worker, mode: str, stderr: str
) -> None:
    program = f"""{READS}taking(15)
try: os.write(2, b"x")
except OSError: say("fails here too")
for name in {LARGE}: read(name)
take(15)
"""
    before = ("bash", "-c", STDERR[stderr], "bash")
    run = start("run", *python(program), env={"PACKHORSE_RUN_START": mode}, before=before)
    assert run.line() == "fails here too"
    assert [run.line() for _ in LARGE] == [_digest(first, name) for name in LARGE]
    until(lambda: here.root.state().state == "complete")
    run.send(signal.SIGTERM)
    assert run.wait() == 0


# --- who is killed ---


def test_a_killed_restorer_ends_a_command_that_waits(start: Start, here: Worker, first: Worker) -> None:
    run, child, restorer = _waiting(start)
    os.kill(restorer, signal.SIGKILL)
    assert run.wait() == 125
    assert _said(run) == b"", "nothing was read"
    assert run.errors().count("so the command was ended") == 1
    assert not alive(child)
    assert here.root.state().state == "partial"
    assert here.push(directories=["models", "deps", "pip"]).pushed == []
    _next_run_completes(start, here, first)


def test_a_killed_supervisor_takes_command_and_restorer_with_it(
    start: Start, here: Worker, first: Worker
) -> None:
    program = f'{READS}taking(10); say(os.getpid()); take(10); read("models/first")'
    run = start("run", *python(program))
    child, restorer = int(run.line()), _restorer(run)
    run.process.kill()
    until(lambda: not alive(child) and not alive(restorer))
    assert run.errors().count("supervisor of the command was killed") == 1
    assert _said(run) == b""
    _next_run_completes(start, here, first)


@pytest.mark.parametrize("stderr", ["read", "gone"])
def test_a_supervisor_that_is_killed_while_the_command_waits_takes_it_along(
    start: Start, here: Worker, first: Worker, tmp_path: Path, stderr: str
) -> None:
    os.mkfifo(tmp_path / "stderr")
    reader = os.open(tmp_path / "stderr", os.O_RDONLY | os.O_NONBLOCK)
    store = tmp_path / "store"
    run, child, restorer = _waiting(start, store, ("sh", "-c", 'exec "$@" 2> stderr', "sh"))
    if stderr == "gone":
        os.close(reader)
    run.process.kill()
    until(lambda: not alive(child) and not alive(restorer))
    assert _said(run) == b""
    shutil.rmtree(store / "packs")
    (store / "kept").rename(store / "packs")
    if stderr == "read":
        assert b"supervisor of the command was killed" in os.read(reader, 1 << 16)
        os.close(reader)
    _next_run_completes(start, here, first)


def test_sigterm_while_a_file_is_on_its_way_ends_all_in_time(
    start: Start, here: Worker, first: Worker
) -> None:
    run, child, restorer = _waiting(start)
    run.send(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert _said(run) == b""
    assert not alive(child)
    assert not alive(restorer)
    _next_run_completes(start, here, first)


def test_a_store_that_fails_under_the_command_ends_it(
    start: Start, here: Worker, first: Worker, tmp_path: Path
) -> None:
    program = f'{READS}taking(10); say("up"); take(10); read("models/first")'
    run = start("run", *python(program))
    assert run.line() == "up"
    (tmp_path / "store/packs").rename(tmp_path / "away")
    run.send(signal.SIGUSR1)
    assert run.wait() == 125
    assert _said(run) == b""
    (tmp_path / "away").rename(tmp_path / "store/packs")
    _next_run_completes(start, here, first)


# --- installing instead ---


CONFIG = '[environment]\ndependencies = ["tiny==1.0"]\n[run]\non-restore-failure = "install"\non-missing = "install"\n'


@pytest.mark.parametrize("store", ["there", "gone"])
def test_after_a_restore_that_failed_the_command_starts_in_a_whole_environment(
    packhorse: Packhorse, start: Start, here: Worker, tmp_path: Path, first: Worker, store: str
) -> None:
    """Restored, or installed where it still cannot be; a file that never arrived is there whole or not at all."""
    directory = tmp_path / "index"
    directory.mkdir()
    (tmp_path / "packhorse.toml").write_text(CONFIG)
    with serve(directory) as index:
        index.add("tiny", "1.0", {"tiny.py": "VERSION = '1.0'\n", "tiny_data.py": "#" * (2 * MIB)})
        env = {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": index.url,
            "PACKHORSE_RUN_ON_MISSING": "install",
        }
        made = packhorse("run", "--", "true", env=env)
        assert made.returncode == 0, made.stderr
        shutil.rmtree(here.path)
        program = f"""
taking(10)
import tiny
path = os.path.join(os.environ["PACKHORSE_ROOT"], "models/first")
say(tiny.VERSION, os.path.exists(path))
if not os.path.exists({str(tmp_path / "again")!r}):
    take(10)
    open(path).read()
say(os.path.exists(path) and any(open(path, "rb").read()))
"""
        run = start("run", *python(program), env=env)
        assert run.line() == "1.0 True"
        (tmp_path / "store/packs").rename(tmp_path / "away")
        (tmp_path / "again").touch()
        if store == "there":
            os.kill(_restorer(run), signal.SIGSTOP)
            (tmp_path / "away").rename(tmp_path / "store/packs")
            os.kill(_restorer(run), signal.SIGKILL)
        else:
            run.send(signal.SIGUSR1)
        there = store == "there"
        assert [run.line(), run.line()] == [f"1.0 {there}", str(there)], run.errors()
        assert run.wait() == 0
        assert "starting once more" in run.errors()


def test_a_tag_that_lacks_the_packages_starts_nothing_before_they_are_installed(
    start: Start, tmp_path: Path
) -> None:
    worker = Worker(tmp_path / "first", Storage(url=(tmp_path / "store").as_uri()))
    assert worker.root
    worker.write("models/first", NOISE.randbytes(2 * MIB))
    worker.push()
    directory = tmp_path / "index"
    directory.mkdir()
    (tmp_path / "packhorse.toml").write_text(CONFIG)
    with serve(directory) as index:
        index.add("tiny", "1.0", {"tiny.py": "VERSION = '1.0'\n"})
        env = {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": index.url,
            "PACKHORSE_RUN_ON_MISSING": "install",
        }
        run = start("run", *python(f'{READS}import tiny; say(tiny.VERSION); read("models/first")'), env=env)
        assert [run.line(), run.line()] == ["1.0", _digest(worker, "models/first")], run.errors()
        assert run.wait() == 0


# --- others on the same root ---


def test_a_second_worker_waits_for_the_restore(start: Start, here: Worker, first: Worker) -> None:
    one = start("run", *python('taking(15); say("up"); take(15)'))
    assert one.line() == "up"
    two = start("run", *python(f'{READS}read("models/first")'))
    until(lambda: "which restores this root" in two.errors() or "which is changing" in two.errors())
    one.send(signal.SIGTERM)
    assert one.wait() == 0
    assert two.line() == _digest(first, "models/first")
    assert two.wait() == 0, two.errors()


def test_status_waits_for_no_file_that_is_on_its_way(
    start: Start, packhorse: Packhorse, here: Worker, first: Worker
) -> None:
    run = start("run", *python('taking(15); say("up"); take(15)'))
    assert run.line() == "up"
    told = packhorse("status", "--json")
    assert told.returncode == 0, told.stderr
    facts = json.loads(told.stdout)
    assert facts["state"] == "partial"
    tag = facts["store"]["tag"]
    assert (tag["equal"], tag["unsaved"], tag["missing"]) == (False, 0, 3)
    run.send(signal.SIGTERM)
    assert run.wait() == 0
    for name in LARGE:
        assert not any((here.path / name).read_bytes()), "nothing was asked for"


def test_in_a_partial_root_other_commands_say_so_and_a_pull_finishes_it(
    packhorse: Packhorse, here: Worker, first: Worker, tmp_path: Path
) -> None:
    assert packhorse("run", "--", "true").returncode == 0
    (tmp_path / "requirements.txt").write_text("")
    env = {"PACKHORSE_ENVIRONMENT_REQUIREMENTS": "requirements.txt"}
    for words, code_ in (
        (("exec", "--", "cat", str(here.path / "models/first")), 125),
        (("push",), 1),
        (("verify",), 1),
        (("install",), 1),
    ):
        done = packhorse(*words, env=env if words == ("install",) else None)
        assert (done.returncode, done.stdout) == (code_, ""), words
        assert "packhorse pull" in done.stderr
    assert packhorse("pull").returncode == 0
    assert persistent(here.path) == persistent(first.path)
    assert packhorse("exec", "--", "true").returncode == 0


def test_an_installation_in_a_partial_root_leaves_no_file_without_its_bytes(
    packhorse: Packhorse, here: Worker, first: Worker, tmp_path: Path
) -> None:
    assert packhorse("run", "--", "true").returncode == 0
    assert not any((here.path / "models/first").read_bytes())
    directory = tmp_path / "index"
    directory.mkdir()
    (tmp_path / "packhorse.toml").write_text(CONFIG)
    with serve(directory) as index:
        index.add("tiny", "1.0", {"tiny.py": ""})
        env = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": index.url}
        done = packhorse("install", "--reinstall", env=env)
    assert done.returncode == 0, done.stderr
    assert here.names() == []
    assert packhorse("exec", "--", "python3", "-c", "import tiny").returncode == 0


def test_what_the_command_saved_while_files_were_on_their_way_is_backed_up_alone(
    start: Start, here: Worker, first: Worker, tmp_path: Path
) -> None:
    program = f'{READS}open(os.path.join(root, "models/new"), "w").write("new"); read("models/second")'
    run = start("run", *python(program), env={"PACKHORSE_RUN_BACKUP": '["models", "deps"]'})
    assert run.line() == _digest(first, "models/second")
    assert run.wait() == 0, run.errors()
    other = Worker(tmp_path / "third", first.storage)
    assert other.root
    other.pull()
    assert (other.path / "models/new").read_text() == "new"
    for name in LARGE:
        assert _digest(other, name) == _digest(first, name)


# --- profiles ---


def test_what_was_waited_for_comes_first_the_next_time(start: Start, here: Worker, first: Worker) -> None:
    names = ["models/second", "packages/data", "deps/tool", "models/first"]
    for name in names:  # more than one request brings
        first.write(name, NOISE.randbytes(9 * MIB))
    first.push()
    program = f"{READS}taking(15)\nfor name in {[*names, 'packages/program']}: read(name)\ntake(15)"
    command = python(program)
    run = start("run", *command)
    for _ in names:
        run.line()
    name = profile_name.name_of(command[1:])
    stored = until(lambda: profiles.read(first.store, "main", name, lambda text: None), "a profile")
    run.send(signal.SIGTERM)
    assert run.wait() == 0
    assert [os.fsdecode(opened.path) for opened in stored.files if b"program" not in opened.path] == names
    assert [opened.seconds for opened in stored.files] == sorted(opened.seconds for opened in stored.files)
    shutil.rmtree(here.path)
    again = start("run", *command)
    for _ in names:
        again.line()
    until(lambda: here.root.state().state == "complete")
    again.send(signal.SIGTERM)
    assert again.wait() == 0
    kept = profiles.read(first.store, "main", name, lambda text: None)
    assert kept is not None
    assert [opened.path for opened in kept.files] == [opened.path for opened in stored.files]


def test_a_command_that_ends_before_all_is_there_is_known_the_next_time(
    start: Start, here: Worker, first: Worker
) -> None:
    """What it waited for is kept within the little time that the restore is then given, so not surely at the first try."""

    def known_after(*names: str) -> set[str]:
        shutil.rmtree(here.path, ignore_errors=True)
        run = start("run", "--profile", "short", *python(f"{READS}\nfor name in {names}: read(name)"))
        assert [run.line() for _ in names] == [_digest(first, name) for name in names]
        assert run.wait() == 0, run.errors()
        assert here.root.state().state == "partial"
        profile = profiles.read(first.store, "main", "short", pytest.fail)
        return {os.fsdecode(opened.path) for opened in profile.files} if profile is not None else set()

    until(lambda: known_after("models/second", "deps/tool") == {"models/second", "deps/tool"})
    until(lambda: known_after("packages/data") == {"models/second", "deps/tool", "packages/data"})


def test_a_command_goes_by_the_profile_that_is_named_and_adds_to_that(
    start: Start, here: Worker, first: Worker
) -> None:
    of_others = (Opened(b"models/of another command", 0.0),)
    profiles.write(first.store, "main", profiles.Profile(name="server", command="another", files=of_others))
    command = python(f"{READS}taking(15)\nfor name in {LARGE}: read(name)\ntake(15)")
    run = start("run", "--profile", "server", *command)
    for _ in LARGE:
        run.line()
    until(lambda: here.root.state().state == "complete")
    run.send(signal.SIGTERM)
    assert run.wait() == 0
    profile = profiles.read(first.store, "main", "server", pytest.fail)
    assert profile is not None
    assert [opened.path for opened in profile.files[:2]] == [of_others[0].path, os.fsencode(LARGE[0])]
    assert profiles.read(first.store, "main", profile_name.name_of(command[1:]), pytest.fail) is None


def test_beside_a_command_that_keeps_all_processors_busy_what_its_profile_does_not_name_arrives_as_well(
    start: Start, here: Worker, first: Worker
) -> None:
    parts = [f"packages/part{number}" for number in range(6)]
    for name in parts:
        first.write(name, NOISE.randbytes(9 * MIB))
    settle(first.path / "packages")
    first.push()
    opened = (Opened(b"models/first", 0.0),)
    profiles.write(first.store, "main", profiles.Profile(name="busy", command="python3", files=opened))
    program = f"""{READS}
taking(15)
burn = [sys.executable, "-I", "-S", "-c", "while True: pass"]
burning = [subprocess.Popen(burn) for _ in os.sched_getaffinity(0)]
for name in {["models/first", parts[4], *LARGE]}: read(name)
take(15)
say(*(each.poll() for each in burning))
for each in burning: each.kill()
for each in burning: each.wait()
"""
    run = start("run", "--profile", "busy", *python(program), env={"PACKHORSE_ARRIVALS": "once"})
    for name in ["models/first", parts[4], *LARGE]:
        assert run.line() == _digest(first, name)
    until(lambda: here.root.state().state == "complete")
    run.send(signal.SIGTERM)
    assert set(run.line().split()) == {"None"}, "they were busy all the time"
    assert run.wait() == 0, run.errors()
    assert persistent(here.path) == persistent(first.path)
    assert here.push().pushed == []


def test_a_profile_is_named_by_letters_and_digits(packhorse: Packhorse, first: Worker) -> None:
    done = packhorse("run", "--profile", "../x", "--", "echo", "no")
    assert (done.returncode, done.stdout) == (125, "")
    assert "'--profile'" in done.stderr


# --- GPU code ---


@pytest.fixture
def with_code(first: Worker) -> Worker:
    """There is a library with code for two GPUs too."""
    codes = [
        container(code(name, 2 * MIB)._replace(payload=NOISE.randbytes(2 * MIB)))
        for name in ("sm_80", "sm_90") * 2
    ]
    first.write("packages/lib.so", library(Section(b".nv_fatbin", b"".join(codes))))
    settle(first.path / "packages")
    first.push()
    return first


@pytest.mark.parametrize(
    ("mode", "gpu"),
    [
        ("early", "sm_90"),
        ("early", "only:sm_90"),
        ("early", "all"),
        ("ready", "auto"),
        ("ready", "only:sm_90"),
    ],
)
def test_code_for_other_gpus_comes_last_or_never(
    start: Start, here: Worker, with_code: Worker, mode: str, gpu: str
) -> None:
    env = {"PACKHORSE_RUN_START": mode, "PACKHORSE_RUN_GPU": gpu, "PACKHORSE_ARRIVALS": ""}
    file = here.path.with_name("status.json")
    run = start("run", "--status-file", file, *python('taking(15); say("up"); take(15)'), env=env)
    assert run.line() == "up"
    wanted = "sparse" if gpu.startswith("only") else "complete"
    until(lambda: here.root.state().state == wanted and here.root.state().snapshot)
    until(lambda: not status(file)["restoring"])
    run.send(signal.SIGTERM)
    assert run.wait() == 0, run.errors()
    pulled = status(file)["boot"]["pull"]
    if wanted == "complete":
        assert persistent(here.path) == persistent(with_code.path)
        assert (pulled["cold_bytes"], pulled["cold_stored_bytes"]) == (0, 0)
        assert "left out" not in run.errors()
    else:
        lib = (here.path / "packages/lib.so").stat()
        assert lib.st_blocks * 512 < lib.st_size - 3 * MIB
        assert (pulled["cold_bytes"], pulled["cold_stored_bytes"]) == (4 * MIB, 4 * MIB)
        assert run.errors().count("left out, which saves 4 MB of the disk and 4 MB of the network") == 1


def test_a_command_goes_on_where_only_code_for_other_gpus_cannot_be_had(
    start: Start, here: Worker, with_code: Worker, tmp_path: Path
) -> None:
    digest = with_code.root.state().manifest
    manifest = documents.decode_manifest(tags.get_manifest(with_code.store, digest), "packages")
    placed = placed_by(tags.get_placement(with_code.store, manifest, digest))
    at = placed[next(frame.digest for frame in manifest.frames if frame.gpus == "80-89")]
    with (tmp_path / "store/packs" / at.pack).open("r+b") as pack:
        pack.seek(at.offset + at.length // 2)
        byte = pack.read(1)
        pack.seek(-1, os.SEEK_CUR)
        pack.write(bytes((byte[0] ^ 1,)))
    env = {"PACKHORSE_RUN_START": "ready", "PACKHORSE_RUN_GPU": "sm_90"}
    file = tmp_path / "status.json"
    run = start("run", "--status-file", file, *python('taking(15); say("up"); take(15); say("end")'), env=env)
    assert run.line() == "up"
    until(lambda: "Code for other GPUs is still missing" in run.errors())
    until(lambda: status(file)["restoring"] is False)
    run.send(signal.SIGTERM)
    assert run.line() == "end"
    assert run.wait() == 0, run.errors()
    assert here.root.state().state == "sparse"
    assert json.loads(file.read_text())["exit_code"] == 0
