"""Pulls beside which a command starts: what is there at the start, in which order the rest comes, and what becomes of
files whose bytes never came."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.servers import S3Server
from tests.snapshot.fatbins import Section, code, container, library
from tests.transfer.conftest import NewWorker
from tests.transfer.openings import Holder, killed, opened
from tests.transfer.relay import Relay
from tests.transfer.workers import LONG_AGO, Worker, persistent, settle

from packhorse.config import Storage
from packhorse.errors import IntegrityError, PackhorseError
from packhorse.progress import Silent
from packhorse.snapshot import frames
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.frames import LARGE_FILE
from packhorse.snapshot.manifest import File
from packhorse.snapshot.order import Opened, ranks
from packhorse.snapshot.writer import placed_by
from packhorse.store import tags
from packhorse.transfer.opening import Opening

MIB = 1 << 20
NOISE = random.Random(41)
SHARED = ("pip", "models", "deps")
WHOLE_SECOND = LONG_AGO // 10**9 * 10**9

SMALL = {"packages/module.py", "packages/package/data", "models/config.json", "deps/notes"}
LARGE = {
    "packages/a.so": 2 * MIB,
    "packages/b.so": 3 * MIB + 5,
    "packages/package/program": 2 * MIB,
    "packages/static.a": MIB,
    "models/first": 9 * MIB,
    "models/second": MIB,
    "deps/tool": 2 * MIB,
}
MEDIUM = {"packages/package/a.pyc": 64 << 10, "packages/package/b.pyc": 500_000, "models/tokens": 100_000}
"""These share frames, those of the packages one."""
HELD = LARGE | MEDIUM


def _fill(worker: Worker) -> None:
    """What makes it hard: read-only files, several names, equal files, and files of zeros."""
    assert worker.root
    for name in SMALL:
        worker.write(name, NOISE.randbytes(10_000))
    for name, size in HELD.items():
        worker.write(name, NOISE.randbytes(size))
    same = NOISE.randbytes(2 * MIB)
    for name in ("packages/equal1", "packages/equal2", "models/equal3"):
        worker.write(name, same)
    worker.write("packages/zeros", bytes(8 * MIB))
    worker.write("packages/some zeros", bytes(8 * MIB) + NOISE.randbytes(MIB))
    worker.write("models/zeros", bytes(3 * MIB))
    worker.write("packages/empty", b"")
    os.link(worker.path / "packages/a.so", worker.path / "packages/package/name of a.so")
    os.link(worker.path / "models/first", worker.path / "models/name of first")
    os.symlink("first", worker.path / "models/link")
    os.chmod(worker.path / "packages/b.so", 0o444)
    os.chmod(worker.path / "models/second", 0o444)
    os.chmod(worker.path / "packages/package/program", 0o755)
    settle(*(worker.path / name for name in ("packages", *SHARED)))


@pytest.fixture
def whole_seconds() -> bool:
    """Whether the files have times that prove nothing; parameters replace it."""
    return False


@pytest.fixture
def first(new_worker: NewWorker, whole_seconds: bool) -> Worker:
    """A worker that has pushed."""
    worker = new_worker("first")
    _fill(worker)
    for name in ("packages", *SHARED) if whole_seconds else ():
        for file in (worker.path / name).rglob("*"):
            os.utime(file, ns=(WHOLE_SECOND,) * 2, follow_symlinks=False)
    worker.push()
    return worker


@pytest.fixture
def here(first: Worker, new_worker: NewWorker) -> Worker:
    """An empty one."""
    worker = new_worker("second")
    assert worker.root
    return worker


def _facts(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mode, status.st_mtime_ns


def _complete(worker: Worker, as_in: Worker) -> None:
    """The root is whole, and knows it."""
    assert persistent(worker.path) == persistent(as_in.path)
    assert worker.root.state().state == "complete"
    assert not (worker.path / ".packhorse/arriving").exists()
    assert worker.push().pushed == []
    again = worker.pull()
    assert (again.pulled, again.kept, again.transferred_bytes) == ([], [], 0)


# --- what is there when ---


def test_an_early_start_is_once_and_finds_small_files_and_the_places_of_large_ones(
    first: Worker, here: Worker
) -> None:
    holder, starts = Holder("never"), []

    def start() -> None:
        starts.append(here.root.state().state)
        for name in SMALL:
            assert (here.path / name).read_bytes() == (first.path / name).read_bytes()
        for name, size in LARGE.items():
            assert _facts(here.path / name) == _facts(first.path / name)
            assert (here.path / name).read_bytes() == bytes(size)
        assert os.readlink(here.path / "models/link") == "first"
        assert os.path.samefile(here.path / "models/first", here.path / "models/name of first")
        assert (here.path / "packages/equal1").stat().st_nlink == 1
        assert holder.order == []
        holder.release()

    opened(here, holder, start)
    assert starts == ["partial"]
    assert len(holder.order) == len(set(holder.order)) == len(holder.held)
    assert {os.fsencode(name) for name in LARGE} <= holder.held.keys()
    assert {path for path, held in holder.held.items() if held.program} == {b"packages/package/program"}
    _complete(here, first)


class _Hurry(Silent):
    """Has whoever created small files wait until three held files have come, and tells who wrote those."""

    def __init__(self) -> None:
        self.small_are_there = False
        self.before: list[str] = []
        self._three = threading.Event()

    def advance(self, count: int) -> None:
        if count != 2 * MIB:
            assert self._three.wait(20)
            self.small_are_there = True
            return
        if not self.small_are_there:
            self.before.append(threading.current_thread().name)
            time.sleep(0.05)  # time for others, if there are others
        if len(self.before) == 3:
            self._three.set()


def test_what_is_held_is_on_its_way_before_the_start_but_only_one_thread_writes_it(
    new_worker: NewWorker,
) -> None:
    worker, other = new_worker("first"), new_worker("second")
    worker.write("models/small", NOISE.randbytes(10_000))
    for number in range(12):
        worker.write(f"models/large{number}", NOISE.randbytes(2 * MIB))
    settle(worker.path / "models")
    worker.push()
    progress = _Hurry()
    opened(other, Holder(), progress=progress, threads=3)
    assert len(progress.before) >= 3
    assert len(set(progress.before)) == 1
    assert persistent(other.path) == persistent(worker.path)


def test_files_that_cannot_be_held_are_there_at_the_start_and_the_others_come_later(
    first: Worker, here: Worker
) -> None:
    holder = Holder("never")
    refused = ["packages/a.so", "packages/equal1", "packages/some zeros", "models/first"]
    holder.refused = set(map(os.fsencode, refused))

    def start() -> None:
        for name in (*refused, "packages/equal2", "models/name of first"):
            assert (here.path / name).read_bytes() == (first.path / name).read_bytes()
            assert _facts(here.path / name) == _facts(first.path / name)
        assert not any((here.path / "packages/b.so").read_bytes())
        holder.release()

    opened(here, holder, start)
    assert not holder.refused & set(holder.order)
    _complete(here, first)


def test_a_ready_start_finds_everything(first: Worker, here: Worker) -> None:
    starts = []

    def start() -> None:
        starts.append(here.root.state().state)
        assert persistent(here.path) == persistent(first.path)

    opened(here, None, start)
    assert starts == ["partial"]
    _complete(here, first)


def test_with_everything_there_the_start_is_at_once(first: Worker, here: Worker) -> None:
    here.pull()
    for holder in (Holder("never"), None):
        starts: list[int] = []
        assert opened(here, holder, partial(starts.append, 1)).pulled == []
        assert starts == [1]


def test_an_upgrade_keeps_unchanged_files_and_holds_new_ones(first: Worker, here: Worker) -> None:
    here.pull()
    first.write("packages/new.so", NOISE.randbytes(2 * MIB), mtime=LONG_AGO)
    first.write("models/new", NOISE.randbytes(2 * MIB), mtime=LONG_AGO)
    first.write("models/second", NOISE.randbytes(2 * MIB), mtime=LONG_AGO)
    (first.path / "packages/a.so").unlink()
    first.push()
    holder = Holder("never")

    def start() -> None:
        assert (here.path / "packages/b.so").read_bytes() == (first.path / "packages/b.so").read_bytes()
        assert (here.path / "models/second").read_bytes() == (first.path / "models/second").read_bytes()
        assert not (here.path / "packages/a.so").exists()
        holder.release()

    opened(here, holder, start)
    assert holder.held.keys() == {b"packages/new.so", b"models/new"}
    _complete(here, first)


def test_where_not_all_can_be_held_back_the_largest_are(first: Worker, here: Worker) -> None:
    holder = Holder("never", most=2)

    def start() -> None:
        for name in LARGE.keys() - {"models/first"}:
            assert (here.path / name).read_bytes() == (first.path / name).read_bytes()
        holder.release()

    opened(here, holder, start)
    assert holder.held.keys() == {b"models/first", b"packages/some zeros"}
    _complete(here, first)


def test_files_are_held_from_each_kind_of_store(any_worker: NewWorker) -> None:
    """Also from one that sends whole packs whatever is asked for."""
    pusher, puller = any_worker("first"), any_worker("second")
    assert pusher.root
    assert puller.root
    for name in ("packages/small", "packages/a.so", "models/first"):
        pusher.write(name, NOISE.randbytes(LARGE.get(name, 100)))
    settle(pusher.path / "packages", pusher.path / "models")
    pusher.push()
    starts: list[bytes] = []
    holder = Holder()
    opened(puller, holder, lambda: starts.append((puller.path / "packages/small").read_bytes()))
    assert starts == [(pusher.path / "packages/small").read_bytes()]
    assert holder.held.keys() == {b"packages/a.so", b"models/first"}
    _complete(puller, pusher)


def test_files_that_share_a_frame_are_held_and_come_together(first: Worker, here: Worker) -> None:
    holder = Holder("never")

    def start() -> None:
        for name in MEDIUM:
            assert not any((here.path / name).read_bytes())
            assert _facts(here.path / name) == _facts(first.path / name)
        holder.want(b"packages/package/b.pyc")
        assert set(holder.order[-2:]) == {b"packages/package/a.pyc", b"packages/package/b.pyc"}
        holder.release()

    opened(here, holder, start)
    assert {os.fsencode(name) for name in HELD} <= holder.held.keys()
    _complete(here, first)


def test_files_whose_frame_has_small_ones_too_are_there_at_the_start(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As snapshots were cut before."""
    pusher, puller = new_worker("first"), new_worker("second")
    _fill(pusher)
    with monkeypatch.context() as patch:
        patch.setattr(frames, "MEDIUM_FILE", LARGE_FILE)
        pusher.push()
    holder = Holder("never")

    def start() -> None:
        for name in MEDIUM:
            assert (puller.path / name).read_bytes() == (pusher.path / name).read_bytes()
        holder.release()

    assert puller.root
    opened(puller, holder, start)
    assert persistent(puller.path) == persistent(pusher.path)
    assert puller.root.state().state == "complete"


# --- order ---


def test_without_wishes_files_come_by_rank(first: Worker, here: Worker) -> None:
    holder = Holder()
    opened(here, holder, connections=1, threads=1)
    sizes = {path: (first.path / os.fsdecode(path)).stat().st_size for path in holder.held}
    order = list(ranks({path: size for path, size in sizes.items() if b"equal" not in path}))
    assert [path for path in holder.order if b"equal" not in path] == order
    assert order[-1] == b"packages/static.a"


def test_what_is_wanted_comes_next_and_nothing_else(first: Worker, here: Worker) -> None:
    holder = Holder("never")
    wishes = [b"models/first", b"packages/static.a", b"deps/tool", b"packages/b.so"]

    def start() -> None:
        for path in wishes:
            holder.want(path)
            name = os.fsdecode(path)
            assert (here.path / name).read_bytes() == (first.path / name).read_bytes()
            assert _facts(here.path / name) == _facts(first.path / name)
        assert [path for path in holder.order if path in wishes] == wishes
        holder.release()

    opened(here, holder, start, connections=1, threads=1)
    _complete(here, first)


def test_what_is_wanted_waits_for_nobody_who_has_stepped_back(new_worker: NewWorker) -> None:
    """Wherever it is by then: on its way, or not asked for yet."""
    worker, here = new_worker("first"), new_worker("second")
    assert worker.root
    assert here.root
    names = [b"models/%02d" % number for number in range(12)]
    for name in names:
        worker.write(os.fsdecode(name), NOISE.randbytes(9 * MIB))
    settle(worker.path / "models")
    worker.push()
    holder = Holder()
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    nice: dict[bytes, int] = {}

    def note(path: bytes) -> None:
        nice[path] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        behind = [each for each, value in nice.items() if value != usual]
        if path in behind and len(behind) == 2:
            # In the only thread that writes what nobody waits for, and it stays here until both have come.
            holder.want(names[5])
            holder.want(names[11])

    holder.on_arrival = note
    profile = [Opened(names[0], 0.0)]
    opening = Opening(lambda result: None, partial(ranks, profile=profile), holder)
    here.pull(opening=opening, threads=1, connections=1)  # so all come in their order
    assert {path for path, value in nice.items() if value == usual} >= {names[0], names[5], names[11]}
    assert nice[names[10]] == max(usual, 10)
    assert persistent(here.path) == persistent(worker.path)


def test_equal_files_that_are_wanted_come_together(first: Worker, here: Worker) -> None:
    holder = Holder("never")

    def start() -> None:
        holder.want(b"packages/equal2")
        assert {b"packages/equal1", b"packages/equal2"} <= set(holder.order)
        assert b"models/equal3" not in holder.order, "of another manifest, which has its own packs"
        holder.want(b"models/equal3")
        holder.release()

    opened(here, holder, start)
    _complete(here, first)


def test_an_order_against_that_of_the_packs_asks_for_each_frame(new_worker: NewWorker) -> None:
    """None of them is cut out of the bytes of another, and asked for once more when that shows."""
    pusher, puller = new_worker("first"), new_worker("second")
    assert pusher.root
    assert puller.root
    for number in range(12):
        pusher.write(f"packages/{number:02}", NOISE.randbytes(MIB + 100 * number))
    settle(pusher.path / "packages")
    stored = pusher.push().transferred_bytes

    def backwards(paths: Iterable[bytes]) -> dict[bytes, int]:
        return {path: rank for rank, path in enumerate(sorted(paths, reverse=True))}

    pulled = puller.pull(opening=Opening(lambda result: None, backwards, Holder()))
    assert stored * 0.99 < pulled.transferred_bytes <= stored
    assert persistent(puller.path) == persistent(pusher.path)


def test_what_is_wanted_is_in_the_very_next_request_however_much_is_to_be_asked_for(
    seaweedfs: S3Server, tmp_path: Path
) -> None:
    url, environ = f"s3://{seaweedfs.new_bucket()}", seaweedfs.environ()
    worker = Worker(tmp_path / "first", Storage(url=url, endpoint=seaweedfs.endpoint), environ)
    assert worker.root
    worker.write("packages/small", "small")  # so that something is asked for before the start
    names = [b"packages/%02d" % number for number in range(40)]
    for name in names:
        worker.write(os.fsdecode(name), NOISE.randbytes(2 * MIB))
    settle(worker.path / "packages")
    worker.push()
    digest = worker.root.state().manifest
    manifest = documents.decode_manifest(tags.get_manifest(worker.store, digest), "packages")
    placed = placed_by(tags.get_placement(worker.store, manifest, digest))
    [last] = [entry for entry in manifest.entries if b"packages/" + entry.path == names[-1]]
    assert isinstance(last, File)
    [number] = set(last.pieces[::3])
    at = placed[manifest.frames[number].digest]
    with Relay(seaweedfs.endpoint) as relay:
        here = Worker(tmp_path / "second", Storage(url=url, endpoint=relay.endpoint), environ)
        assert here.root
        holder = Holder("never")
        before: set[tuple[str, str]] = set()

        def start() -> None:
            relay.hold = "/packs/"
            holder.held[names[0]].want()
            with relay.news:
                assert relay.news.wait_for(lambda: relay.holding, 20)
            holder.release()  # all others may be asked for
            before.update(relay.ranges)
            holder.held[names[-1]].want()
            relay.release()

        opened(here, holder, start, connections=1)
    asked = [each for each in relay.ranges if each not in before]
    path, wanted = asked[0]
    first, end = map(int, wanted.removeprefix("bytes=").split("-"))
    assert path.endswith(at.pack)
    assert first <= at.offset <= at.offset + at.length - 1 <= end
    assert len(asked) > 5, "so there was much to be asked for"
    assert persistent(here.path) == persistent(worker.path)


@pytest.mark.parametrize("gpus", [(), (90,)], ids=["", "code for other GPUs comes last"])
def test_that_all_is_there_is_recorded_before_it_is_told(
    first: Worker, here: Worker, gpus: tuple[int, ...]
) -> None:
    """Who is told asks the store for a profile, which may take long."""
    codes = b"".join(container(code(name, 2 * MIB)) for name in ("sm_80", "sm_90"))
    first.write("packages/lib.so", library(Section(b".nv_fatbin", codes)))
    first.push()
    told: list[str] = []
    opening = Opening(lambda result: None, ranks, Holder(), lambda: told.append(here.root.state().state))
    here.pull(opening=opening, gpus=gpus)
    assert told == (["sparse", "complete"] if gpus else ["complete"])
    here.pull(opening=opening, gpus=gpus)
    assert told[2:] == [], "nothing had to be brought"
    _complete(here, first)


# --- shared files ---


def test_what_changed_here_is_never_replaced_by_a_file_without_bytes(first: Worker, here: Worker) -> None:
    here.write("models/first", b"mine")
    holder = Holder("never")

    def start() -> None:
        assert here.read("models/first") == "mine"
        holder.release()

    assert opened(here, holder, start).kept == ["models/first"]
    assert here.read("models/first") == "mine"
    assert b"models/first" not in holder.held
    assert here.push().pushed == ["shared"]


def test_a_file_that_appeared_meanwhile_is_kept(first: Worker, here: Worker) -> None:
    holder = Holder()
    hold = holder.hold

    def appears(files: Any) -> set[bytes]:
        here.write("models/first", b"mine")
        return hold(files)

    holder.hold = appears  # type: ignore[method-assign]
    assert "models/first" in opened(here, holder).kept
    assert here.read("models/first") == "mine"
    assert here.root.state().state == "complete"


# --- what the command does meanwhile ---


def _disturb(root: Path, top: str) -> None:
    """What a command may do to files by their names alone."""
    names = [f"{top}/{number}" for number in range(6)]
    (root / names[0]).unlink()
    (root / names[1]).rename(root / f"{top}/renamed")
    (root / "replacement").write_bytes(b"new")
    (root / "replacement").replace(root / names[2])
    (root / names[3]).chmod(0o600)
    os.utime(root / names[4], ns=(WHOLE_SECOND + 10**9,) * 2)
    os.link(root / names[5], root / f"{top}/linked")


@pytest.fixture
def disturbed(new_worker: NewWorker) -> tuple[Worker, Worker]:
    """A worker that pushed files to be disturbed, and an empty one."""
    pusher, puller = new_worker("first"), new_worker("second")
    assert pusher.root
    assert puller.root
    for top in ("packages", "models"):
        for number in range(6):
            pusher.write(f"{top}/{number}", NOISE.randbytes(MIB + number))
    for top in ("packages", "models"):
        settle(pusher.path / top)
        for file in (pusher.path / top).iterdir():
            os.utime(file, ns=(WHOLE_SECOND,) * 2)
    pusher.push()
    return pusher, puller


def test_files_disturbed_while_they_are_on_their_way_get_their_bytes_under_the_names_they_have(
    disturbed: tuple[Worker, Worker],
) -> None:
    pusher, puller = disturbed
    holder = Holder("never")

    def start() -> None:
        for top in ("packages", "models"):
            _disturb(puller.path, top)
        holder.release()

    opened(puller, holder, start)
    assert puller.root.state().state == "complete"
    for top in ("packages", "models"):
        assert puller.names(top) == [
            "1" if False else name for name in ["2", "3", "4", "5", "linked", "renamed"]
        ]
        assert (puller.path / top / "2").read_bytes() == b"new"
        for name, number in (("renamed", 1), ("3", 3), ("4", 4), ("5", 5), ("linked", 5)):
            assert (puller.path / top / name).read_bytes() == (pusher.path / top / str(number)).read_bytes()
        assert (puller.path / top / "3").stat().st_mode & 0o777 == 0o600
    puller.push()
    third = Worker(puller.path.with_name("third"), puller.storage)
    assert third.root
    third.pull()
    assert persistent(third.path)["packages"] == persistent(puller.path)["packages"]
    assert (third.path / "models/renamed").read_bytes() == (pusher.path / "models/1").read_bytes()


def test_what_never_arrived_is_not_saved_under_any_name(disturbed: tuple[Worker, Worker]) -> None:
    pusher, puller = disturbed
    holder = Holder("never")
    packs = Path(puller.storage.url.removeprefix("file://")) / "packs"

    def start() -> None:
        _disturb(puller.path, "models")
        packs.rename(packs.with_name("away"))
        holder.release()

    with pytest.raises(IntegrityError):
        opened(puller, holder, start)
    packs.with_name("away").rename(packs)
    assert puller.root.state().state == "partial"
    puller.write("models/mine", b"mine")
    saved = puller.push(directories=SHARED)
    assert saved.files == 2, "what replaced a file, and the new one"
    third = Worker(puller.path.with_name("third"), puller.storage)
    assert third.root
    third.pull()
    assert third.names() == ["0", "1", "2", "3", "4", "5", "mine"]
    for number in (0, 1, 3, 4, 5):
        assert (third.path / f"models/{number}").read_bytes() == (
            pusher.path / f"models/{number}"
        ).read_bytes()
    puller.pull()
    assert puller.names() == third.names()
    assert persistent(puller.path) == persistent(third.path)


# --- the end of it all ---


MOMENTS = ["held", "started", "arrived"]


@pytest.mark.parametrize("whole_seconds", [False, True], ids=["nanoseconds", "whole seconds"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pull_killed_at_any_moment_is_finished_by_the_next(
    first: Worker, here: Worker, moment: str
) -> None:
    assert killed(here, moment) == -signal.SIGKILL
    assert here.root.state().state == "partial"
    with pytest.raises(PackhorseError, match="not finished"):
        here.push()
    assert here.push(directories=SHARED).pushed == [], "nothing of it counts as changed here"
    assert killed(here, moment) == -signal.SIGKILL
    assert here.pull().kept == []
    _complete(here, first)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_pull_is_finished_by_an_early_one(first: Worker, here: Worker, moment: str) -> None:
    killed(here, moment)
    holder = Holder("never")
    opened(here, holder, holder.release)
    _complete(here, first)


def test_what_was_staged_before_the_start_is_not_brought_again(first: Worker, here: Worker) -> None:
    killed(here, "held")
    before = here.pull().transferred_bytes
    other = Worker(here.path.with_name("third"), here.storage)
    assert other.root
    assert before <= other.pull().transferred_bytes
    _complete(here, first)


@pytest.mark.parametrize("whole_seconds", [True])
def test_after_another_boot_files_that_had_arrived_are_brought_again(first: Worker, here: Worker) -> None:
    """A crash of the machine may have taken bytes that were never flushed."""
    killed(here, "arrived")
    record = here.path / ".packhorse/arriving"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().encode()
    content = record.read_bytes()
    assert boot in content
    record.write_bytes(content.replace(boot, boot[::-1]))
    for name in ("models/first", "models/second"):
        file = here.path / name
        size = file.stat().st_size
        os.truncate(file, 0)
        os.truncate(file, size)
        os.utime(file, ns=(WHOLE_SECOND,) * 2)
    assert here.push(directories=SHARED).pushed == []
    assert here.pull().kept == []
    _complete(here, first)


def _lost(worker: Worker) -> Callable[[], None]:
    packs = Path(worker.storage.url.removeprefix("file://")) / "packs"

    def lose() -> None:
        packs.rename(packs.with_name("away"))

    return lose


def _found(worker: Worker) -> None:
    packs = Path(worker.storage.url.removeprefix("file://")) / "packs"
    packs.with_name("away").rename(packs)


def test_a_store_that_fails_before_the_start_leaves_what_was_there(first: Worker, here: Worker) -> None:
    here.pull()
    before, state = persistent(here.path), here.root.state()
    first.write("packages/new.so", NOISE.randbytes(2 * MIB))
    first.write("models/new", NOISE.randbytes(2 * MIB))
    first.write("packages/module.py", b"new")
    first.push()
    _lost(here)()
    starts: list[int] = []
    with pytest.raises(IntegrityError) as failed:
        opened(here, Holder(), lambda: starts.append(1))
    assert failed.value.exit_code == 4
    assert starts == []
    assert here.root.state() == state
    assert persistent(here.path) == before
    _found(here)
    here.pull()
    _complete(here, first)


@pytest.mark.parametrize("what", ["packages", "models"])
def test_a_store_that_fails_after_the_start_leaves_a_partial_root(new_worker: NewWorker, what: str) -> None:
    pusher, puller = new_worker("first"), new_worker("second")
    assert pusher.root
    assert puller.root
    pusher.write("packages/module.py", "old")
    pusher.write(f"{what}/small", "small")
    settle(pusher.path / "packages")
    pusher.push()
    puller.pull()
    pusher.write(f"{what}/large", NOISE.randbytes(2 * MIB), mtime=WHOLE_SECOND)
    pusher.push()
    holder = Holder("never")

    def start() -> None:
        _lost(puller)()
        holder.release()

    with pytest.raises(IntegrityError) as failed:
        opened(puller, holder, start)
    assert failed.value.exit_code == 4
    assert puller.root.state().state == "partial"
    _found(puller)
    assert puller.push(directories=SHARED).pushed == []
    puller.pull()
    _complete(puller, pusher)


@pytest.mark.parametrize("what", ["packages", "models"])
def test_a_frame_that_is_corrupt_when_its_file_is_full_leaves_nothing_that_looks_whole_or_changed_here(
    new_worker: NewWorker, what: str
) -> None:
    """A hostile placement: the stored bytes are those it promises, what they hold belongs to another file."""
    pusher, puller = new_worker("first"), new_worker("second")
    assert pusher.root
    assert puller.root
    for name in ("one", "two"):
        pusher.write(f"{what}/{name}", name.encode() * MIB)  # in a frame each, which zstd shrinks
    settle(pusher.path / what)
    pusher.push()
    state = pusher.root.state()
    [placement] = tags.get_placements(pusher.store, [*filter(None, [state.manifest]), *state.shared])
    tags.put_placement(pusher.store, msgspec.structs.replace(placement, places=placement.places[::-1]))
    holder = Holder("never")
    with pytest.raises(IntegrityError) as failed:
        opened(puller, holder, holder.release)
    assert failed.value.exit_code == 4
    assert holder.order == []
    assert puller.push(directories=SHARED).pushed == []
    tags.put_placement(pusher.store, placement)
    assert puller.pull().kept == []
    _complete(puller, pusher)


def test_an_error_of_the_start_stops_what_is_on_its_way(first: Worker, here: Worker) -> None:
    def start() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        opened(here, Holder("never"), start)
    assert here.root.state().state == "partial"
    shutil.rmtree(here.path / "packages")
    here.pull()
    _complete(here, first)
