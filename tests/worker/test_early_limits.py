"""Early starts where something is short, refused or breaks: descriptors, privileges, leases, the disk, the store."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from tests import servers
from tests.servers import S3Server
from tests.snapshot.fatbins import Section, code, container, library
from tests.transfer.relay import Relay
from tests.transfer.workers import Worker, persistent, settle
from tests.worker import another_user, without
from tests.worker.conftest import Start, Started, alive, python, until

from packhorse.config import Storage
from packhorse.root import Root
from packhorse.snapshot.order import Opened
from packhorse.store import profiles

MIB = 1 << 20
NOISE = random.Random(59)
LARGE = tuple(f"{('packages', 'models', 'deps')[number % 3]}/{number}" for number in range(12))
"""Each larger than the one before."""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """One that every user may look into; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory(prefix="packhorse-tests-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def bucket(server: S3Server) -> str:
    """Where snapshots lie."""
    return server.new_bucket()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """The store; with the parameter "own" one that the test may kill."""
    if getattr(request, "param", "") == "own":
        with servers.seaweedfs() as own:
            yield own
    else:
        yield request.getfixturevalue("seaweedfs")


@pytest.fixture
def storage(server: S3Server, bucket: str) -> Storage:
    """The store as the configuration names it."""
    return Storage(url=f"s3://{bucket}", endpoint=server.endpoint)


@pytest.fixture
def environ(environ: dict[str, str], server: S3Server, storage: Storage) -> dict[str, str]:
    """Early, with large files that come only when somebody opens them."""
    return {
        **environ,
        **server.environ(),
        "PACKHORSE_STORAGE_URL": storage.url,
        "PACKHORSE_STORAGE_ENDPOINT": storage.endpoint,
        "PACKHORSE_RUN_START": "early",
        "PACKHORSE_RUN_ON_MISSING": "fail",
        "PACKHORSE_ARRIVALS": "asked",
    }


@pytest.fixture
def first(tmp_path: Path, storage: Storage, server: S3Server) -> Worker:
    """What was pushed."""
    worker = Worker(tmp_path / "first", storage, server.environ())
    assert worker.root
    worker.write("packages/module.py", "VALUE = 42\n")
    for number, name in enumerate(LARGE):
        worker.write(name, NOISE.randbytes(MIB + 4096 * number))
    settle(*(worker.path / name for name in ("packages", "models", "deps")))
    worker.push()
    return worker


@pytest.fixture
def here(root_path: Path, first: Worker) -> Worker:
    """The worker that `run` restores."""
    return Worker(root_path, first.storage, first.environ)


def _digest(worker: Worker, name: str) -> str:
    return hashlib.sha256((worker.path / name).read_bytes()).hexdigest()


READS = f"""
import hashlib
root = os.environ["PACKHORSE_ROOT"]
large = {LARGE}
def at(name): return os.path.join(root, name)
def read(name): say(hashlib.sha256(open(at(name), "rb").read()).hexdigest())
def held(): say(*(name for name in large if not os.stat(at(name)).st_blocks))
"""


def _said(run: Started) -> str:
    assert run.process.stdout is not None
    return run.process.stdout.read().decode()


def _tells_why(run: Started, cause: str, code: int) -> None:
    """stderr has the cause in one line, and what became of the command in another."""
    ended = f"(the process that restores ended with exit code {code}), so the command was ended"
    assert run.errors().count(cause) == 1
    assert run.errors().count(ended) == 1


def _reads_everything(start: Start, here: Worker, first: Worker, before: tuple[str, ...] = ()) -> list[str]:
    """Start a command that opens every large file; returns those that were held back when it started."""
    program = f"{READS}taking(15); held()\nfor name in large: read(name)\ntake(15)"
    run = start("run", *python(program), before=before)
    held = run.line().split()
    assert [run.line() for _ in LARGE] == [_digest(first, name) for name in LARGE], run.errors()
    until(lambda: Root(here.path).state().state == "complete")
    run.send(signal.SIGTERM)
    assert run.wait() == 0, run.errors()
    return held


# --- descriptors ---


@pytest.mark.parametrize(("limit", "most"), [(300, 12), (259, 3), (200, 0)])
def test_where_few_files_may_be_open_the_largest_are_held_and_the_others_are_there(
    start: Start, here: Worker, first: Worker, limit: int, most: int
) -> None:
    held = _reads_everything(start, here, first, before=("prlimit", f"--nofile={limit}:{limit}"))
    assert held == list(LARGE[len(LARGE) - most :])
    assert persistent(here.path) == persistent(first.path)


# --- leases ---


def test_where_no_file_system_has_leases_early_is_complete_and_says_so(
    start: Start, here: Worker, first: Worker
) -> None:
    held = _reads_everything(start, here, first, before=(sys.executable, without.__file__, "leases"))
    assert held == []


def test_where_orphans_are_handed_to_others_early_is_complete_and_says_so(
    start: Start, here: Worker, first: Worker
) -> None:
    before = (sys.executable, without.__file__, "adoption")
    run = start("run", *python(f"{READS}held(); read(large[3])"), before=before)
    assert [run.line(), run.line()] == ["", _digest(first, LARGE[3])]
    assert run.wait() == 0
    assert "does not hand over orphans" in run.errors()


# --- privileges ---


OTHER = 65534


@pytest.fixture
def as_other(tmp_path: Path) -> tuple[str, ...]:
    """What is put in front of a command that another user runs, without privileges."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return ("unshare", "--mount", sys.executable, another_user.__file__, str(OTHER), str(scratch))


def _give(path: Path) -> None:
    """A directory with all below it to the other user."""
    for top, below, files in os.walk(path):
        for name in (".", *below, *files):
            os.chown(os.path.join(top, name), OTHER, OTHER, follow_symlinks=False)


@pytest.mark.namespaces
def test_without_privileges_an_early_start_is_as_with_them(
    start: Start, here: Worker, first: Worker, as_other: tuple[str, ...], tmp_path: Path
) -> None:
    _give(tmp_path)
    held = _reads_everything(start, here, first, before=as_other)
    assert held == list(LARGE)
    assert (here.path / "models/1").stat().st_uid == OTHER
    _give(tmp_path / "first")
    assert persistent(here.path) == persistent(first.path)


@pytest.mark.namespaces
@pytest.mark.parametrize("content", ["the same", "another"])
def test_a_large_file_of_somebody_else_stays_as_it_is(
    start: Start, here: Worker, first: Worker, as_other: tuple[str, ...], tmp_path: Path, content: str
) -> None:
    assert here.root
    name = LARGE[-2]
    shutil.copy2(first.path / name, here.path / name)
    if content == "another":
        here.write(name, NOISE.randbytes(3 * MIB))
    _give(tmp_path)
    os.chown(here.path / name, 0, 0)
    before = (here.path / name).stat()
    run = start("run", *python(f"{READS}held(); read({name!r}); read({LARGE[-1]!r})"), before=as_other)
    assert run.line().split() == [each for each in LARGE if each != name]
    assert [run.line(), run.line()] == [_digest(here, name), _digest(first, LARGE[-1])]
    assert run.wait() == 0, run.errors()
    after = (here.path / name).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_uid) == (before.st_ino, before.st_mtime_ns, 0)


@pytest.mark.namespaces
@pytest.mark.parametrize("name", ["models/sub", "packages/0"])
def test_where_files_of_somebody_else_are_in_the_way_nothing_starts_and_whose_they_are_is_told(
    start: Start, here: Worker, first: Worker, as_other: tuple[str, ...], tmp_path: Path, name: str
) -> None:
    """A directory for a new file, and a file of packages/ that the next generation would share."""
    (first.path / "models/sub").mkdir()
    first.push()
    here.pull()
    for new in ("models/sub/new", "packages/new"):
        first.write(new, NOISE.randbytes(2 * MIB))
    first.push()
    _give(tmp_path)
    os.chown(here.path / name, 0, 0)
    run = start("run", "--", "echo", "no", before=as_other)
    assert (run.wait(), _said(run)) == (125, "")
    assert run.errors().count("belongs to user 0, not to you") == 1
    assert f"root/{name}" in run.errors()


# --- the disk ---


def _on_a_disk(size: int, root: Path) -> tuple[str, ...]:
    """What is put in front of a command whose root is a disk of its own, and which is begun once more after a 125."""
    root.mkdir(mode=0o700)
    script = 'mount -t tmpfs -o size=$1,mode=0700 tmpfs "$2"; shift 2; "$@"; [ $? != 125 ] || exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh", str(size), str(root))


FILL = """
def fill(leaving):
    disk, size = os.statvfs(root), 1 << 16
    with open(os.path.join(os.environ["TMPDIR"], "filler"), "wb", buffering=0) as file:
        try:
            for written in range(0, disk.f_bavail * disk.f_frsize - leaving, size): file.write(bytes(size))
            while not leaving: file.write(bytes(4096))
        except OSError as error: say(error.strerror)
"""


@pytest.mark.namespaces
def test_a_command_that_fills_the_disk_before_all_is_there_is_ended_and_the_next_start_completes(
    start: Start, root_path: Path, first: Worker, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    program = f"""{READS}{FILL}
if not os.path.exists({str(again)!r}):
    open({str(again)!r}, "w").close()
    fill(0)
    read(large[3])
for name in large: read(name)
"""
    run = start("run", *python(program), before=_on_a_disk(160 * MIB, root_path))
    assert run.line() == os.strerror(errno.ENOSPC)
    assert [run.line() for _ in LARGE] == [_digest(first, name) for name in LARGE], run.errors()
    assert run.wait() == 0
    _tells_why(run, "There is no space left", 5)


# --- the store ---


@pytest.mark.parametrize("server", ["own"], indirect=True)
def test_a_store_that_is_gone_for_good_ends_a_command_that_waits(
    start: Start, here: Worker, first: Worker, server: S3Server
) -> None:
    """When all attempts are used up, in a minute or so."""
    run = start("run", *python(f"{READS}taking(10); say(os.getpid()); take(10); read(large[3])"))
    child = int(run.line())
    os.killpg(server.pid, signal.SIGKILL)
    run.send(signal.SIGUSR1)
    assert run.process.wait(timeout=170) == 125
    assert _said(run) == ""
    _tells_why(run, "cannot be reached", 6)
    assert not alive(child)


def test_a_file_that_comes_corrupt_ends_the_command_that_waits_for_it(
    start: Start, here: Worker, first: Worker, server: S3Server, bucket: str
) -> None:
    run = start("run", *python(f"{READS}taking(10); say(os.getpid()); take(10); read(large[3])"))
    child = int(run.line())
    objects = server.store(bucket)
    for pack in obstore.list(objects, "packs/").collect():
        content = bytearray(obstore.get(objects, pack["path"]).bytes())
        for at in range(0, len(content), 4096):
            content[at] ^= 1
        obstore.put(objects, pack["path"], bytes(content))
    run.send(signal.SIGUSR1)
    assert run.wait() == 125
    assert _said(run) == ""
    _tells_why(run, "is corrupt", 4)
    assert not alive(child)
    assert not any((here.path / LARGE[3]).read_bytes())


# --- code for other GPUs ---


LAST = "deps/last"
"""More than one request brings, so that it does not come with another one."""
LAST_BUT_ONE = "taking(10, 15)\nfor name in (*large, 'packages/lib.so'): read(name)\n"
"""When the rest of the files is there the code for other GPUs comes."""


@pytest.fixture
def with_code(first: Worker) -> Worker:
    """There is a library with code for two GPUs too; that of sm_80 lies behind all that is needed."""
    codes = [
        container(code(name, 2 * MIB)._replace(payload=NOISE.randbytes(2 * MIB)))
        for name in (*["sm_90"] * 5, "sm_80", "sm_80")
    ]
    first.write("packages/lib.so", library(Section(b".nv_fatbin", b"".join(codes))))
    first.write(LAST, NOISE.randbytes(9 * MIB))
    settle(first.path / "packages", first.path / "deps")
    first.push()
    return first


NO_ROOM = "Code for other GPUs is still missing; the next start goes on."


@pytest.mark.namespaces
def test_where_only_code_for_other_gpus_finds_no_room_the_command_goes_on_with_what_is_left_of_the_disk(
    start: Start, root_path: Path, with_code: Worker
) -> None:
    program = (
        f"{READS}{FILL}{LAST_BUT_ONE}fill({40 * MIB}); say('left'); read({LAST!r}); take(15); say('end')"
    )
    run = start(
        "run", *python(program), env={"PACKHORSE_RUN_GPU": "sm_90"}, before=_on_a_disk(200 * MIB, root_path)
    )
    for _ in (*LARGE, LAST):
        run.line()
    assert [run.line(), run.line()] == ["left", _digest(with_code, LAST)]
    until(lambda: NO_ROOM in run.errors())
    assert "but code for other GPUs needs" in run.errors()
    os.kill(int((Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())[0]), signal.SIGTERM)
    assert run.line() == "end"
    assert run.wait() == 0


def test_where_only_code_for_other_gpus_cannot_be_written_the_command_goes_on(
    start: Start, here: Worker, with_code: Worker
) -> None:
    program = f"{READS}{LAST_BUT_ONE}say('waits'); take(10); read({LAST!r}); take(15); say('end')"
    run = start("run", *python(program), env={"PACKHORSE_RUN_GPU": "sm_90"})
    for _ in (*LARGE, LAST):
        run.line()
    assert run.line() == "waits"
    for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        if b"\0boot\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
            resource.prlimit(int(pid), resource.RLIMIT_FSIZE, (10 * MIB, 10 * MIB))
    run.send(signal.SIGUSR1)
    assert run.line() == _digest(with_code, LAST)
    until(lambda: NO_ROOM in run.errors())
    run.send(signal.SIGTERM)
    assert run.line() == "end"
    assert run.wait() == 0, run.errors()
    assert here.root.state().state == "sparse"
    run = start(
        "run", *python("say('up')"), env={"PACKHORSE_RUN_GPU": "sm_90", "PACKHORSE_RUN_START": "complete"}
    )
    assert run.line() == "up"
    assert run.wait() == 0, run.errors()
    assert persistent(here.path) == persistent(with_code.path)


# --- profiles ---


SERVER = "profiles/main/server/"
"""What the profile that is named lies below."""


@pytest.fixture
def profiled(first: Worker) -> Worker:
    """There is a profile, which one start alone would not give."""
    files = (Opened(b"models/of another command", 0.0),)
    profiles.write(first.store, "main", profiles.Profile(name="server", files=files))
    return first


@pytest.mark.parametrize("refuse", ["prefix=profiles/main/", f"/{SERVER}"], ids=["listed", "read"])
def test_a_profile_that_may_not_be_read_costs_an_order_and_not_the_boot(
    start: Start, here: Worker, profiled: Worker, server: S3Server, refuse: str
) -> None:
    before = profiled.store.list(SERVER)
    with Relay(server.endpoint, refuse=refuse) as relay:
        program = f"{READS}taking(15)\nfor name in large: read(name)\ntake(15)"
        env = {"PACKHORSE_STORAGE_ENDPOINT": relay.endpoint}
        run = start("run", "--profile", "server", *python(program), env=env)
        assert [run.line() for _ in LARGE] == [_digest(profiled, name) for name in LARGE], run.errors()
        until(lambda: here.root.state().state == "complete")
        run.send(signal.SIGTERM)
        assert run.wait() == 0, run.errors()
    assert run.errors().count("the profile server cannot be read") == 1
    assert run.errors().count("warning") == 1
    assert profiled.store.list(SERVER) == before, "what could not be read is not replaced"


@pytest.mark.parametrize("hold", ["prefix=profiles/main/", SERVER], ids=["read", "stored"])
def test_a_store_that_is_slow_with_a_profile_holds_up_nothing_else(
    start: Start, here: Worker, with_code: Worker, server: S3Server, hold: str
) -> None:
    with Relay(server.endpoint, hold=hold) as relay:
        env = {"PACKHORSE_STORAGE_ENDPOINT": relay.endpoint, "PACKHORSE_RUN_GPU": "sm_90"}
        run = start(
            "run", "--profile", "server", *python(f"{READS}{LAST_BUT_ONE}read({LAST!r}); take(15)"), env=env
        )
        for _ in (*LARGE, "packages/lib.so", LAST):
            run.line()
        until(lambda: here.root.state().state == "complete")
        until(lambda: relay.holding, "a request for the profile")
        assert not with_code.store.list(SERVER)
        relay.release()
        until(lambda: with_code.store.list(SERVER))
        run.send(signal.SIGTERM)
        assert run.wait() == 0, run.errors()
    assert persistent(here.path) == persistent(with_code.path)


def test_a_run_does_not_wait_for_a_store_that_is_slow_with_a_profile(
    start: Start, here: Worker, first: Worker, server: S3Server
) -> None:
    with Relay(server.endpoint, hold=SERVER) as relay:
        env = {"PACKHORSE_STORAGE_ENDPOINT": relay.endpoint}
        run = start("run", "--profile", "server", *python(f"{READS}read(large[3])"), env=env)
        assert run.line() == _digest(first, LARGE[3])
        assert run.wait() == 0, run.errors()
        until(lambda: relay.holding, "the profile that is to be stored")
        assert not first.store.list(SERVER)
    assert here.root.state().state == "partial"
