"""A pull brings exactly what was pushed or nothing: whatever the store sends, and whenever it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server
from tests.transfer.conftest import NewWorker
from tests.transfer.relay import Relay
from tests.transfer.workers import Worker, persistent, settle

from packhorse.config import Storage
from packhorse.errors import IntegrityError, PackhorseError
from packhorse.progress import Silent
from packhorse.snapshot import index
from packhorse.transfer.local import Local

MB = 1_000_000
NOISE = random.Random(3)


@pytest.fixture
def first(new_worker: NewWorker) -> Worker:
    """A worker with some packages of ten megabytes, and a model."""
    worker = new_worker("first")
    assert worker.root
    for number in range(40):
        worker.write(f"packages/package{number % 4}/module{number}.py", NOISE.randbytes(150_000))
    worker.write("packages/package1/library.so", NOISE.randbytes(4 * MB))
    worker.write("models/model", NOISE.randbytes(2 * MB))
    settle(worker.path / "packages", worker.path / "models")
    return worker


def _inodes(top: Path) -> dict[Path, tuple[int, int]]:
    return {
        file.relative_to(top): (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in top.rglob("*")
        if file.is_file()
    }


def test_unchanged_files_are_not_touched_and_an_upgrade_fetches_what_changed(
    first: Worker, new_worker: NewWorker
) -> None:
    second = new_worker("second")
    first.push()
    whole = second.pull().transferred_bytes
    before = _inodes(second.path / "packages")
    assert second.pull().transferred_bytes == 0
    assert _inodes(second.path / "packages") == before

    shutil.rmtree(first.path / "packages/package3")
    for number in range(3):
        first.write(f"packages/package4/module{number}.py", NOISE.randbytes(100_000))
    upgrade = first.push()
    assert 300_000 <= upgrade.transferred_bytes < 2 * MB
    pulled = second.pull()
    assert 300_000 <= pulled.transferred_bytes < 2 * MB < whole
    assert persistent(second.path) == persistent(first.path)
    after = _inodes(second.path / "packages")
    assert after.keys() - before.keys() == {Path(f"package4/module{number}.py") for number in range(3)}
    assert {path: after[path] for path in after if path in before} == {
        path: before[path] for path in after if path in before
    }


def test_a_pull_reads_no_file_that_the_index_vouches_for(first: Worker, new_worker: NewWorker) -> None:
    second = new_worker("second")
    first.push()
    second.pull()
    assert _bytes_read(second, "pull()") < 3 * MB < 12 * MB
    (second.path / ".packhorse/index").unlink()
    assert _bytes_read(second, "pull()") > 10 * MB


def _bytes_read(worker: Worker, call: str) -> int:
    """What a call reads from files (proc_pid_io(5)), in a process of its own."""
    program = f"""
import sys
sys.path.insert(0, ".")
from pathlib import Path
from typing import NamedTuple
from packhorse.config import Storage
from tests.transfer.workers import Worker
worker = Worker(Path({str(worker.path)!r}), Storage(url={worker.storage.url!r}))
def read():
    return int(open("/proc/self/io").read().split()[1])
worker.store.list("")
before = read()
worker.{call}
print(read() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_bytecode_that_appeared_does_not_stay_after_a_pull(first: Worker, new_worker: NewWorker) -> None:
    second = new_worker("second")
    first.push()
    second.pull()
    second.write("packages/package1/__pycache__/module.pyc", "bytecode")
    second.pull()
    assert persistent(second.path) == persistent(first.path)


# --- what the store may do ---


def _objects(worker: Worker, below: str) -> list[Path]:
    store = worker.storage.directory
    assert store is not None
    return sorted(file for file in (store / below).rglob("*") if file.is_file())


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("what", ["packs", "manifests", "placements"])
@pytest.mark.parametrize("damage", [_flip, _halve, Path.unlink, lambda file: os.truncate(file, 0)],
                         ids=["a wrong byte", "cut short", "missing", "empty"])  # fmt: skip
def test_a_store_that_lost_something_changes_nothing_here(
    first: Worker, new_worker: NewWorker, what: str, damage: Callable[[Path], None]
) -> None:
    second = new_worker("second")
    first.push()
    second.pull()
    before, state = persistent(second.path), second.root.state()
    for number in range(2):
        first.write(f"packages/package{number}/new.py", NOISE.randbytes(600_000))
        first.write(f"models/new{number}", NOISE.randbytes(2 * MB))
    known = set(_objects(first, ""))
    first.push()
    shutil.rmtree(second.path / ".packhorse/manifests")
    for file in set(_objects(first, what)) - known:
        damage(file)
    with pytest.raises(IntegrityError) as refused:
        second.pull()
    assert refused.value.exit_code == 4
    assert persistent(second.path) == before
    after = second.root.state()
    assert (after.state, after.manifest) == ("complete", state.manifest)


def test_a_fresh_worker_is_told_of_the_damage_and_ends_with_4(
    first: Worker, packhorse: Packhorse, tmp_path: Path
) -> None:
    first.push()
    for pack in _objects(first, "packs"):
        _flip(pack)
    done = packhorse("pull", "--json", "--root", tmp_path / "new", "--store", first.storage.url)
    assert done.returncode == 4
    facts = json.loads(done.stdout)
    assert facts["exit_code"] == 4
    assert "corrupt" in facts["error"]
    assert "Traceback" not in done.stderr
    assert persistent(tmp_path / "new") == {"packages": {}, "pip": {}, "models": {}, "deps": {}}


def test_a_placement_that_leads_elsewhere_is_refused(first: Worker, new_worker: NewWorker) -> None:
    """A hostile store cannot make other bytes of a manifest."""
    first.push()
    from packhorse.snapshot import manifest as documents

    for file in _objects(first, "placements"):
        placement = documents.decode_any_placement(file.read_bytes())
        turned = msgspec.structs.replace(placement, places=placement.places[::-1])
        file.write_bytes(documents.encode_placement(turned))
    second = new_worker("second")
    with pytest.raises(IntegrityError):
        second.pull()
    assert second.names("packages") == []


def test_a_byte_that_was_wrong_on_its_way_once_is_asked_for_again(
    first: Worker, seaweedfs: S3Server, tmp_path: Path
) -> None:
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}", endpoint=seaweedfs.endpoint)
    there = Worker(first.path, storage, seaweedfs.environ())
    there.push()
    with Relay(seaweedfs.endpoint, flip_after=5 * MB) as relay:
        here = Worker(tmp_path / "second", Storage(url=storage.url, endpoint=relay.endpoint), there.environ)
        here.pull()
    assert relay.flipped
    assert persistent(here.path) == persistent(first.path)


def test_a_store_without_ranges_is_asked_for_each_pack_once(
    first: Worker, rclone_s3: S3Server, tmp_path: Path
) -> None:
    for number in range(9):
        first.write(f"models/shard{number}", NOISE.randbytes(5 * MB))
    storage = Storage(url=f"s3://{rclone_s3.new_bucket()}", endpoint=rclone_s3.endpoint)
    there = Worker(first.path, storage, rclone_s3.environ())
    stored = there.push().transferred_bytes
    for wanted in (range(9), (0, 2, 4, 6, 8)):  # all of each pack, and parts that do not touch
        with Relay(rclone_s3.endpoint) as relay:
            here = Worker(
                tmp_path / "second", Storage(url=storage.url, endpoint=relay.endpoint), there.environ
            )
            assert here.root
            for number in wanted:
                (here.path / f"models/shard{number}").unlink(missing_ok=True)
            here.pull()
        assert persistent(here.path) == persistent(first.path)
        packs = [path for path in relay.requested if "/packs/" in path]
        assert len(packs) == len(set(packs)) + 1  # the first one is also what tells that ranges are ignored
        assert relay.received < stored + 20 * MB


@pytest.mark.parametrize("hold", ["/manifests/", "/placements/"])
def test_documents_of_shared_directories_are_asked_for_side_by_side(
    first: Worker, seaweedfs: S3Server, tmp_path: Path, hold: str
) -> None:
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}", endpoint=seaweedfs.endpoint)
    there = Worker(first.path, storage, seaweedfs.environ())
    for number in range(3):
        there.write(f"models/model{number}", NOISE.randbytes(MB))
        settle(there.path / "models")
        there.push(directories=["models"])
    with ThreadPoolExecutor(1) as pool, Relay(seaweedfs.endpoint, hold=hold) as relay:
        here = Worker(tmp_path / "second", Storage(url=storage.url, endpoint=relay.endpoint), there.environ)
        pulling = pool.submit(here.pull)
        with relay.news:
            assert relay.news.wait_for(lambda: relay.holding == 3, 60)
        relay.release()
        pulling.result()
    assert persistent(here.path)["models"] == persistent(first.path)["models"]


def test_the_placement_of_packages_is_asked_for_while_their_manifest_is_on_its_way(
    first: Worker, seaweedfs: S3Server, tmp_path: Path
) -> None:
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}", endpoint=seaweedfs.endpoint)
    there = Worker(first.path, storage, seaweedfs.environ())
    there.push(directories=["packages"])
    with ThreadPoolExecutor(1) as pool, Relay(seaweedfs.endpoint) as relay:
        relay.hold = there.root.state().manifest
        here = Worker(tmp_path / "second", Storage(url=storage.url, endpoint=relay.endpoint), there.environ)
        pulling = pool.submit(here.pull)
        with relay.news:  # the manifest, and the listing of its placements
            assert relay.news.wait_for(lambda: relay.holding == 2, 60)
        relay.release()
        pulling.result()
        asked = list(relay.asked)
        here.pull()
        assert len(relay.asked) == len(asked) + 1, "the tag alone, where nothing is to be brought"
    assert sum("/placements/" in path for path in asked) == 1
    assert persistent(here.path)["packages"] == persistent(first.path)["packages"]


# --- another Python, another child ---


def test_packages_made_for_another_python_are_refused(first: Worker, new_worker: NewWorker) -> None:
    first.interpreter = msgspec.structs.replace(first.interpreter, soabi="cpython-39-x86_64-linux-gnu")
    first.push()
    second = new_worker("second")
    with pytest.raises(PackhorseError, match="cpython-39") as refused:
        second.pull()
    assert "environment.python" in refused.value.remedy
    assert second.names("packages") == []


class _Taking(Silent):
    """Starts to use the packages when the pull begins to bring them."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.descriptor = worker, -1

    def stage(self, name: str, total: int | None = None) -> None:
        self.descriptor = self.worker.root.use_packages()


def test_packages_in_use_stay_and_what_was_fetched_is_kept_for_the_next_pull(
    first: Worker, new_worker: NewWorker
) -> None:
    second = new_worker("second")
    first.push()
    second.pull()
    before = persistent(second.path)
    first.write("packages/package1/library.so", NOISE.randbytes(4 * MB))
    first.push()
    child = _Taking(second)
    with pytest.raises(PackhorseError, match="in use") as refused:
        second.pull(progress=child)
    assert refused.value.exit_code == 1
    assert persistent(second.path) == before
    assert second.root.state().state == "complete"
    with pytest.raises(PackhorseError, match="in use"):
        second.pull()
    os.close(child.descriptor)
    assert second.pull().transferred_bytes == 0
    assert persistent(second.path) == persistent(first.path)
    assert not second.root.staging.exists()


def test_a_pull_that_fails_leaves_no_file_open(first: Worker, new_worker: NewWorker) -> None:
    first.push()
    for file in _objects(first, "packs"):
        file.write_bytes(bytes(file.stat().st_size))
    second = new_worker("second")
    for _ in range(2):
        with pytest.raises(IntegrityError):
            second.pull()
        assert [path for path in _opened() if path.startswith(str(second.path))] == []


def _opened() -> list[str]:
    """The paths of all that this process has open."""
    paths = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(f"/proc/self/fd/{name}"))
    return paths


# --- kills ---


def _start(packhorse: Packhorse, worker: Worker, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*packhorse.command, *command, "--root", worker.path, "--store", worker.storage.url],
        cwd=packhorse.directory,
        env=packhorse.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_pull_killed_at_any_moment_is_resumed(
    first: Worker, new_worker: NewWorker, packhorse: Packhorse
) -> None:
    for number in range(3):
        first.write(f"packages/large{number}", NOISE.randbytes(20 * MB))
    settle(first.path / "packages", first.path / "models")
    whole = first.push().transferred_bytes
    expected = persistent(first.path)
    resumed = 0
    for attempt in range(5):
        second = new_worker(f"second{attempt}")
        assert second.root
        staging = second.root.staging
        for kill in range(1, 4):
            process = _start(packhorse, second, "pull", "--threads", "1")
            _killed_once(process, partial(_has_staged, staging, kill * (attempt + 1)))
            packages = second.names("packages")
            assert packages == [] or persistent(second.path)["packages"] == expected["packages"]
        result = second.pull()
        resumed += result.transferred_bytes < whole
        assert persistent(second.path) == expected
        assert second.root.state().state == "complete"
        assert not staging.exists()
        assert second.pull().transferred_bytes == 0
    assert resumed == 5


def _has_staged(staging: Path, count: int) -> bool:
    """Whether the journals of a pull name at least `count` frames."""
    journals = (file.read_bytes() for file in staging.glob("*.journal"))
    return sum(len(journal.partition(b"\n")[2]) // 4 for journal in journals) >= count


def _killed_once(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """SIGKILL a process as soon as a condition holds, if it is not done before."""
    end = time.monotonic() + 60
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _staged(first: Worker, second: Worker) -> Path:
    """The journal of a pull that fetched all and could not put it in force."""
    first.push()
    child = _Taking(second)
    with pytest.raises(PackhorseError, match="in use"):
        second.pull(progress=child)
    os.close(child.descriptor)
    return second.root.staging / "packages.journal"


def test_after_another_boot_what_was_staged_is_proven_before_it_counts(
    first: Worker, new_worker: NewWorker
) -> None:
    second = new_worker("second")
    journal = _staged(first, second)
    header, _, body = journal.read_bytes().partition(b"\n")
    facts = json.loads(header)
    journal.write_bytes(json.dumps({**facts, "boot": "another"}).encode() + b"\n" + body)
    library = second.root.staging / "packages/package1/library.so"
    content = bytearray(library.read_bytes())
    content[100] ^= 1
    library.write_bytes(content)
    (second.root.staging / "packages/package0/module0.py").unlink()
    os.truncate(second.root.staging / "packages/package2/module2.py", 0)
    pulled = second.pull()
    assert 4 * MB < pulled.transferred_bytes < 10 * MB
    assert persistent(second.path) == persistent(first.path)


def test_of_equal_files_that_were_staged_before_another_boot_each_is_proven(
    first: Worker, new_worker: NewWorker
) -> None:
    second = new_worker("second")
    content = NOISE.randbytes(3 * MB)
    for name in ("equal", "twin"):
        first.write(f"packages/{name}", content)
    settle(first.path / "packages")
    journal = _staged(first, second)
    header, _, body = journal.read_bytes().partition(b"\n")
    journal.write_bytes(json.dumps({**json.loads(header), "boot": "another"}).encode() + b"\n" + body)
    damaged = second.root.staging / "packages/equal"
    damaged.write_bytes(bytes(3 * MB))
    second.pull()
    assert persistent(second.path) == persistent(first.path)


def test_a_journal_of_something_else_is_not_believed(first: Worker, new_worker: NewWorker) -> None:
    second = new_worker("second")
    journal = _staged(first, second)
    whole = journal.read_bytes()
    other = whole.replace(b'"manifest":"', b'"manifest":"0')
    for content in (b"", b"garbage", other, other.replace(b'"0', b'"\xff')):
        journal.write_bytes(content)
        leftover = second.root.staging / "packages/leftover"
        leftover.write_bytes(b"leftover")
        shutil.rmtree(second.path / "packages")
        assert second.pull().transferred_bytes > 9 * MB
        assert persistent(second.path) == persistent(first.path)
        shutil.rmtree(second.path / "packages")
        _staged(first, second)


def test_records_that_are_damaged_count_as_none(first: Worker, new_worker: NewWorker) -> None:
    second = new_worker("second")
    first.push()
    second.pull()
    record = msgspec.msgpack.encode(("\0", []))
    damaged = {
        "synced": b'{"source":"\xff"}',
        "index.flushed": b'{"name":"\xff"}',
        "arriving": len(record).to_bytes(4, "little") + record.replace(b"\0", b"\xff"),
    }
    for name, content in damaged.items():
        (second.path / ".packhorse" / name).write_bytes(content)
    assert not Local(second.root).synced().manifests
    shutil.rmtree(second.path / "packages")
    second.pull()
    index.flush(second.root.index)
    assert persistent(second.path) == persistent(first.path)


def test_a_file_that_a_killed_pull_had_linked_is_linked_anew(first: Worker, new_worker: NewWorker) -> None:
    """What it linked may have been changed in place since, and replaced by what it was."""
    second = new_worker("second")
    first.push()
    second.pull()
    first.write("packages/new.py", "new")
    _staged(first, second)
    module = second.path / "packages/package0/module0.py"
    content = module.read_bytes()
    with module.open("r+b") as file:
        file.write(b"changed in place")
    module.unlink()
    second.write(
        "packages/package0/module0.py", content, mtime=first_mtime(first, "packages/package0/module0.py")
    )
    second.pull()
    assert persistent(second.path) == persistent(first.path)


def first_mtime(worker: Worker, path: str) -> int:
    """When a file of a worker was last changed, in nanoseconds."""
    return (worker.path / path).stat().st_mtime_ns


# --- disks ---

SMALL_DISK = """
import ctypes, json, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
mount, options, commands = sys.argv[1:]
assert libc.mount(b"none", b"/", None, 1 << 14 | 1 << 18, None) == 0  # MS_REC | MS_PRIVATE
assert libc.mount(b"tmpfs", mount.encode(), b"tmpfs", 0, f"{options},mode=0700".encode()) == 0
for command in json.loads(commands):
    done = subprocess.run(command, capture_output=True, text=True)
    names = sorted(os.listdir(mount + "/root/packages"))
    print(json.dumps([done.returncode, done.stdout, done.stderr, names]))
"""


class Ended(NamedTuple):
    """How a command on a small disk ended, and what `packages/` held then."""

    code: int
    output: str
    errors: str
    packages: list[str]


SmallDisk = Callable[..., list[Ended]]


@pytest.fixture
def on_small_disk(packhorse: Packhorse, first: Worker, tmp_path: Path) -> SmallDisk:
    """Runs commands, one after the other, whose root is on a disk (tmpfs) of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    environ = {
        **packhorse.environ,
        "PACKHORSE_ROOT": f"{mount}/root",
        "PACKHORSE_STORAGE_URL": first.storage.url,
    }

    def run(options: str, *commands: Sequence[str]) -> list[Ended]:
        script = ["unshare", "--mount", sys.executable, "-c", SMALL_DISK, str(mount), options]
        done = subprocess.run(
            [*script, json.dumps(commands)],
            cwd=packhorse.directory, env=environ, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [Ended(*json.loads(line)) for line in done.stdout.splitlines()]

    return run


@pytest.mark.namespaces
def test_too_small_a_disk_is_found_out_before_anything_is_written(
    first: Worker, packhorse: Packhorse, on_small_disk: SmallDisk
) -> None:
    first.push()
    [done] = on_small_disk(f"size={70 * MB}", [*packhorse.command, "pull", "--json"])
    assert done.code == 5
    assert re.fullmatch(
        r"\S+ has 70 MB free, but the snapshot needs 12 MB, and 67 MB are kept free\.",
        json.loads(done.output)["error"],
    )
    assert done.packages == []


@pytest.mark.namespaces
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (f"size={500 * MB},nr_inodes=4000", "more files, but the snapshot needs"),
        (f"size={90 * MB}", "MB free, but the snapshot needs"),
    ],
    ids=["inodes", "blocks"],
)
def test_many_small_files_need_more_than_their_bytes(
    first: Worker, packhorse: Packhorse, on_small_disk: SmallDisk, options: str, why: str
) -> None:
    for number in range(5000):
        first.write(f"packages/small/{number}", "1")
    first.push()
    [done] = on_small_disk(options, [*packhorse.command, "pull", "--json"])
    assert done.code == 5
    assert why in json.loads(done.output)["error"]
    assert done.packages == []


@pytest.mark.namespaces
@pytest.mark.parametrize("limit", ["nr_inodes=0", "nr_inodes=400"])
def test_a_disk_with_inodes_enough_or_without_a_limit_takes_a_snapshot(
    first: Worker, packhorse: Packhorse, on_small_disk: SmallDisk, limit: str
) -> None:
    first.push()
    [done] = on_small_disk(f"size={500 * MB},{limit}", [*packhorse.command, "pull"])
    assert done.code == 0, done.errors
    assert done.packages


@pytest.mark.namespaces
@pytest.mark.parametrize("name", ["packages", "models"])
def test_a_directory_that_lies_on_another_disk_is_told_before_anything_is_fetched(
    first: Worker, new_worker: NewWorker, packhorse: Packhorse, name: str
) -> None:
    first.push()
    for pack in _objects(first, "packs"):
        pack.unlink()
    second = new_worker("second")
    assert second.root
    script = 'mount -t tmpfs -o mode=0700 tmpfs "$1" && shift && exec "$@"'
    pull = [*packhorse.command, "pull", "--root", second.path, "--store", second.storage.url]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", second.path / name, *pull],
        cwd=packhorse.directory, env=packhorse.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"{second.path}/{name} lies on another disk than the root." in done.stderr
    assert second.names() == second.names("packages") == []


FILLS_UP = """
import contextlib, os, sys
from packhorse.cli import main
root, opened = os.environ["PACKHORSE_ROOT"], 0

def fill(event, arguments):
    global opened
    if event == "open" and str(arguments[0]).startswith(f"b'{root}/.packhorse/next/packages/"):
        opened += 1
        if opened == 1000:
            with contextlib.suppress(OSError), open(root + "-filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

sys.addaudithook(fill)
main()
"""
"""packhorse, but when it writes its thousandth file of a new generation somebody else takes all there is of the disk."""


@pytest.mark.namespaces
def test_a_disk_that_fills_up_meanwhile_is_told_and_the_environment_before_stays_in_use(
    first: Worker, packhorse: Packhorse, on_small_disk: SmallDisk
) -> None:
    before = first.push().snapshot
    for number in range(3000):
        first.write(f"packages/small/{number}", f"{number}")
    first.push()
    tool = packhorse.command
    pulled, full, pushed, used = on_small_disk(
        f"size={100 * MB}",
        [*tool, "pull", before],
        [sys.executable, "-c", FILLS_UP, "pull", "--json"],
        [*tool, "push"],
        [*tool, "exec", "--", "true"],
    )
    assert pulled.code == 0, pulled.errors
    assert full.code == 5, full.errors
    assert json.loads(full.output)["exit_code"] == 5
    assert "There is no space left" in full.errors
    assert "Traceback" not in full.errors
    assert "small" not in full.packages
    assert full.packages == pulled.packages
    assert (pushed.code, used.code) == (0, 0), pushed.errors + used.errors


def test_a_resumed_pull_asks_only_for_the_space_that_is_missing(
    first: Worker, new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = new_worker("second")
    _staged(first, second)
    from packhorse.transfer import pull as module

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        module.Root,
        "require_space",
        lambda self, needed, *_, margin: asked.append((needed, margin)),
    )
    second.pull()
    assert asked[0][0] < 3 * MB
    assert asked[0][1] == module.MARGIN


def test_holes_need_no_space(new_worker: NewWorker) -> None:
    first, second = new_worker("first"), new_worker("second")
    hole = first.write("models/hole", "") if first.root else None
    assert hole is not None
    os.truncate(hole, 1 << 32)
    first.push()
    assert second.pull().transferred_bytes == 0
    restored = (second.path / "models/hole").stat()
    assert (restored.st_size, restored.st_blocks) == (1 << 32, 0)
