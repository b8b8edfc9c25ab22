"""The index vouches for a file only where nothing can have changed it unseen."""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
from pathlib import Path

import pytest
from tests.snapshot.stored_index import another_boot

from packhorse import atomic
from packhorse.snapshot.index import RACE, Index, Seen, flush, known_at, now
from packhorse.snapshot.scan import Signature, signature_of

CONTENT = (b"digest", 0o644)


def _signature(file: Path) -> Signature:
    return signature_of(os.stat(file))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index"


def _saved(path: Path, file: Path, *, age: int = RACE + 1) -> Index:
    index = Index(path)
    signature = _signature(file)
    index.add(b"models/a", signature, CONTENT, seen=signature.ctime + age)
    index.save()
    return index


def test_an_unchanged_file_is_vouched_for(path: Path, file: Path) -> None:
    for index in (_saved(path, file), Index(path)):
        assert index.digests(b"models/a", _signature(file)) == b"digest"
        assert index.digests(b"models/b", _signature(file)) is None


FIELDS = ("size", "mtime", "ctime", "device", "inode")


@pytest.mark.parametrize("field", FIELDS)
def test_whatever_differs_in_its_stat_a_file_is_read_again(path: Path, file: Path, field: str) -> None:
    _saved(path, file)
    signature = _signature(file)
    fields = dict(zip(FIELDS, (signature.size, signature.mtime, signature.ctime, *signature.identity)))
    assert Index(path).digests(b"models/a", Signature(**fields)) == b"digest"
    fields[field] += 1
    assert Index(path).digests(b"models/a", Signature(**fields)) is None


@pytest.mark.parametrize(("age", "trusted"), [(RACE + 1, True), (RACE, False), (0, False), (-RACE, False)])
def test_a_file_that_changed_shortly_before_it_was_looked_at_is_read_again(
    path: Path, file: Path, age: int, trusted: bool
) -> None:
    _saved(path, file, age=age)
    assert (Index(path).digests(b"models/a", _signature(file)) is not None) is trusted


def test_what_was_restored_here_is_vouched_for_at_once(path: Path, file: Path) -> None:
    index = Index(path)
    index.restored(b"models/a", _signature(file), CONTENT)
    assert index.digests(b"models/a", _signature(file)) == b"digest"


def _vouched_for(path: Path, file: Path) -> list[bytes]:
    names = (b"models/a", b"models/b")
    return [name for name in names if Index(path).digests(name, _signature(file)) == CONTENT[0]]


def test_after_another_boot_only_what_was_flushed_is_vouched_for(path: Path, file: Path) -> None:
    index = Index(path)
    index.restored(b"models/a", _signature(file), CONTENT)
    index.save()
    flush(path)
    index.restored(b"models/b", _signature(file), CONTENT)
    index.save()
    assert _vouched_for(path, file) == [b"models/a", b"models/b"]
    another_boot(path)
    assert _vouched_for(path, file) == [b"models/a"]


def test_what_is_flushed_stays_so_over_saves_and_boots(path: Path, file: Path) -> None:
    index = Index(path)
    index.restored(b"models/a", _signature(file), CONTENT)
    index.save()
    flush(path)
    for number in range(3):
        another_boot(path)
        index = Index(path)
        index.restored(b"models/b", _signature(file), (b"%d" % number, 0o644))
        index.save()
        another_boot(path)
        assert _vouched_for(path, file) == [b"models/a"]


def test_what_was_saved_while_the_disk_was_flushed_is_not_taken_for_flushed(
    path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(path, file)
    real = atomic.flush

    def meanwhile(directory: Path) -> None:
        real(directory)
        index = Index(path)
        index.restored(b"models/b", _signature(file), CONTENT)
        index.save()

    monkeypatch.setattr(atomic, "flush", meanwhile)
    flush(path)
    another_boot(path)
    assert _vouched_for(path, file) == [b"models/a"]


def test_a_flush_says_nothing_of_what_was_saved_before_the_machine_was_started(
    path: Path, file: Path
) -> None:
    _saved(path, file)
    another_boot(path)
    flush(path)
    assert _vouched_for(path, file) == []
    index = Index(path)
    index.restored(b"models/b", _signature(file), CONTENT)
    index.save()
    flush(path)
    another_boot(path)
    assert _vouched_for(path, file) == [b"models/b"]


def test_a_flush_says_nothing_of_an_index_that_was_begun_anew(path: Path, file: Path) -> None:
    _saved(path, file)
    flush(path)
    path.unlink()
    _saved(path, file)
    another_boot(path)
    assert _vouched_for(path, file) == []


def test_what_was_read_again_after_another_boot_came_from_the_disk(path: Path, file: Path) -> None:
    _saved(path, file)
    another_boot(path)
    index = Index(path)
    signature = _signature(file)
    index.add(b"models/a", signature, CONTENT, seen=signature.ctime + RACE + 1)
    changed = Signature(signature.size, signature.mtime, signature.ctime + 1, *signature.identity)
    index.add(b"models/b", changed, CONTENT, seen=changed.ctime + RACE + 1)
    index.save()
    another_boot(path)
    assert _vouched_for(path, file) == [b"models/a"]
    assert Index(path).digests(b"models/b", changed) is None


def test_without_an_index_nothing_is_flushed(path: Path) -> None:
    flush(path)
    path.write_bytes(b"garbage")
    flush(path)
    assert list(path.parent.iterdir()) == [path]


def test_after_another_boot_it_still_tells_what_was_restored(path: Path, file: Path) -> None:
    _saved(path, file)
    another_boot(path)
    assert Index(path).synced(b"models/a", CONTENT)
    index = Index(path)
    index.restored(b"models/b", _signature(file), CONTENT)
    index.save()
    assert _vouched_for(path, file) == [b"models/b"], "saving makes nothing durable"


def test_content_counts_as_restored_with_its_mode(path: Path, file: Path) -> None:
    index = _saved(path, file)
    assert index.synced(b"models/a", CONTENT)
    assert not index.synced(b"models/a", (b"digest", 0o755))
    assert not index.synced(b"models/a", (b"other", 0o644))
    assert not index.synced(b"models/b", CONTENT)


def test_while_a_file_is_restored_old_and_new_count(path: Path, file: Path) -> None:
    index = _saved(path, file)
    index.coming(b"models/a", (b"second", 0o644))
    index.coming(b"models/a", (b"third", 0o644))
    index.coming(b"models/new", (b"new", 0o644))
    index.save()
    for known in (b"digest", b"second", b"third"):
        assert Index(path).synced(b"models/a", (known, 0o644))
    assert Index(path).synced(b"models/new", (b"new", 0o644))
    assert not Index(path).synced(b"models/new", (b"", 0o644))
    index.restored(b"models/a", _signature(file), (b"third", 0o644))
    assert not index.synced(b"models/a", CONTENT)


PATHS = (b"packages/a", b"packages/b", b"packages/c", b"models/a")


def _synced(index: Index) -> list[bytes]:
    return [name for name in PATHS if index.synced(name, CONTENT)]


def test_what_is_replaced_leaves_nothing_else_below_its_prefix(path: Path, file: Path) -> None:
    index = Index(path)
    for name in (b"packages/a", b"packages/b", b"models/a"):
        index.restored(name, _signature(file), CONTENT)
    index.save()
    index.restored(b"packages/b", _signature(file), CONTENT)
    signature = _signature(file)
    index.replace(
        b"packages/",
        [Seen(name, signature, CONTENT, known_at(signature)) for name in (b"packages/a", b"packages/c")],
    )
    for each in (index, Index(path)):
        assert _synced(each) == [b"packages/a", b"packages/c", b"models/a"]
        assert each.digests(b"packages/c", signature) == CONTENT[0]


def test_an_index_goes_on_after_nothing_was_left_of_it(path: Path, file: Path) -> None:
    index = Index(path)
    for _ in range(2):
        index.replace(b"", [])
    index.coming(b"models/a", CONTENT)
    index.save()
    assert Index(path).synced(b"models/a", CONTENT)


def test_what_is_replaced_stays_as_it_is_vouched_for(path: Path, file: Path) -> None:
    index = _saved(path, file)
    signature = _signature(file)
    flush(path)
    index.replace(b"models/", [Seen(b"models/a", signature, CONTENT, signature.ctime)])
    another_boot(path)
    assert _vouched_for(path, file) == [b"models/a"], "it was on the disk before"


def test_what_is_added_and_replaced_is_of_one_save(path: Path, file: Path) -> None:
    """Whatever another process saves between, a flush before it says nothing of it."""
    index, signature = _saved(path, file), _signature(file)
    other = Index(path)
    other.restored(b"models/c", signature, CONTENT)
    other.save()
    flush(path)
    index.restored(b"models/b", signature, CONTENT)
    index.replace(b"packages/", [Seen(b"packages/a", signature, CONTENT, known_at(signature))])
    index.restored(b"packages/b", signature, CONTENT)
    assert index.synced(b"models/c", CONTENT), "what the other one saved is kept"
    index.save()
    another_boot(path)
    known = [name for name in (*PATHS, b"models/b") if Index(path).digests(name, signature) is not None]
    assert known == [b"models/a"]


def test_what_another_process_saved_meanwhile_is_kept(path: Path, file: Path) -> None:
    first, second = Index(path), Index(path)
    first.restored(b"models/a", _signature(file), CONTENT)
    second.restored(b"models/b", _signature(file), CONTENT)
    first.save()
    second.save()
    for name in (b"models/a", b"models/b"):
        assert Index(path).synced(name, CONTENT)
        assert second.synced(name, CONTENT)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x94\x02\xa2\xff\xfe\xc2\x80", b"\x94\x01\xa1b\xc2\x80"]
)
def test_an_index_that_cannot_be_read_is_empty(path: Path, file: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert Index(path).digests(b"models/a", _signature(file)) is None
    _saved(path, file)
    assert Index(path).synced(b"models/a", CONTENT)


def test_times_are_compared_by_the_clock_of_files() -> None:
    assert abs(now() - time.time_ns()) < RACE


def test_replacing_takes_no_memory_for_what_is_replaced(path: Path) -> None:
    signature = Signature(1, 2, 3, 4, 5)
    index = Index(path)
    tracemalloc.start()
    try:
        index.replace(
            b"packages/",
            (
                Seen(b"packages/module%d.py" % number, signature, (number.to_bytes(32, "little"), 0o644), 1)
                for number in range(60_000)
            ),
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000, "a part of them"
    assert Index(path).synced(b"packages/module59999.py", ((59_999).to_bytes(32, "little"), 0o644))


def test_saving_holds_the_records_in_memory_once(path: Path) -> None:
    many = Index(path)
    signature = Signature(1, 2, 3, 4, 5)
    for number in range(60_000):
        many.add(
            b"packages/module%d.py" % number, signature, (number.to_bytes(32, "little"), 0o644), seen=number
        )
    many.save()
    del many
    gc.collect()
    tracemalloc.start()
    try:
        index = Index(path)
        loaded, _ = tracemalloc.get_traced_memory()
        index.add(b"packages/module1.py", signature, CONTENT, seen=1)
        tracemalloc.reset_peak()
        index.save()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.3 * loaded, "one copy, and what is read and written"
