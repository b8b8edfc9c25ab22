"""The shared directories are a growing set: nobody's save undoes another's, and nothing that changed here is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from tests.conftest import unprivileged
from tests.transfer.conftest import NewWorker
from tests.transfer.workers import LONG_AGO, Worker, persistent

from packhorse.store import tags


@pytest.fixture
def pair(new_worker: NewWorker) -> tuple[Worker, Worker]:
    """Two workers that both hold models/a, version 1, and models/dir/b."""
    first, second = new_worker("first"), new_worker("second")
    first.write("models/a", "version 1", mtime=LONG_AGO) if first.root else None
    first.write("models/dir/b", "b", mtime=LONG_AGO)
    first.push()
    second.pull()
    return first, second


def test_the_newest_of_each_path_counts(pair: tuple[Worker, Worker], new_worker: NewWorker) -> None:
    first, second = pair
    first.write("models/a", "version 2")
    first.write("models/from first", "1")
    first.push()
    second.write("models/from second", "2")
    second.push()
    third = new_worker("third")
    third.pull()
    assert third.names() == ["a", "dir/b", "from first", "from second"]
    assert third.read("models/a") == "version 2"


def test_a_save_does_not_undo_what_another_worker_saved_meanwhile(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    first.write("models/a", "version 2")
    first.push()
    second.write("models/new", "new")
    assert second.push().files == 1
    second.pull()
    first.pull()
    assert first.read("models/a") == second.read("models/a") == "version 2"


def test_a_save_that_has_nothing_new_writes_no_entry(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    first.write("models/a", "version 2")
    first.push()
    assert second.push().pushed == []


def test_a_save_under_another_tag_saves_all_that_the_tag_has_not(
    pair: tuple[Worker, Worker], new_worker: NewWorker
) -> None:
    first, _ = pair
    other = new_worker("other", tag="experiment")
    other.write("models/a", "another version") if other.root else None
    other.push()
    elsewhere = Worker(first.path, other.storage)
    assert elsewhere.push().files == 2
    other.pull()
    assert other.read("models/a") == "version 1"


def test_an_older_snapshot_that_is_pushed_counts_again(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    older = first.push().snapshot
    first.write("models/a", "version 2")
    first.push()
    second.pull()
    assert second.read("models/a") == "version 2"
    assert second.pull(older).kept == []
    assert second.read("models/a") == "version 1"
    second.push()
    first.pull()
    assert first.read("models/a") == "version 1"


def test_a_push_never_deletes(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    (second.path / "models/a").unlink()
    second.write("models/new", "new")
    second.push()
    first.pull()
    assert first.names() == ["a", "dir/b", "new"]
    second.pull()
    assert second.names() == ["a", "dir/b", "new"]


def test_a_pull_never_deletes_what_was_not_pushed(pair: tuple[Worker, Worker]) -> None:
    _, second = pair
    second.write("models/mine", "mine")
    second.write("models/dir/mine", "mine")
    second.pull()
    assert second.names() == ["a", "dir/b", "dir/mine", "mine"]


def test_a_file_that_changed_here_is_left_alone_named_and_pushed_next(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    first.write("models/a", "version 2")
    first.push()
    second.write("models/a", "my version")
    assert second.pull().kept == ["models/a"]
    assert second.read("models/a") == "my version"
    assert second.pull().kept == ["models/a"]
    assert second.push().files == 1
    assert first.pull().kept == []
    assert first.read("models/a") == "my version"


def test_what_a_deadline_left_out_still_counts_as_changed_here(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    second.write("models/a", "versi0n 2")  # of the same length
    result = second.push(deadline=0.0)
    assert result.unsaved == ["models/a"]
    assert result.pushed == []
    assert second.pull().kept == ["models/a"]
    assert second.read("models/a") == "versi0n 2"
    second.push()
    first.pull()
    assert first.read("models/a") == "versi0n 2"


def test_only_the_mode_may_change_and_arrives_without_the_bytes(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    (first.path / "models/a").chmod(0o755)
    (first.path / "models/dir").chmod(0o700)
    first.push()
    assert second.push().pushed == []
    pulled = second.pull()
    assert pulled.transferred_bytes == 0
    assert (second.path / "models/a").stat().st_mode & 0o777 == 0o755
    assert (second.path / "models/dir").stat().st_mode & 0o777 == 0o700
    assert second.push().pushed == first.push().pushed == []
    (second.path / "models/a").chmod(0o600)
    assert second.pull().kept == ["models/a"]
    second.push()
    first.pull()
    assert (first.path / "models/a").stat().st_mode & 0o777 == 0o600


def test_the_mode_of_one_name_changes_no_other_name_of_the_file(new_worker: NewWorker) -> None:
    first, second = new_worker("first"), new_worker("second")
    first.root.models.joinpath("a").write_text("script")
    first.root.models.joinpath("b").hardlink_to(first.path / "models/a")
    first.push()
    second.pull()
    (second.path / "models/a").unlink()
    second.write("models/a", "script").chmod(0o755)
    second.push()
    first.pull()
    assert persistent(first.path) == persistent(second.path)
    assert first.push().pushed == []


def test_a_symbolic_link_that_changed_elsewhere_arrives(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    link = Path("models/link")
    (first.path / link).symlink_to("a")
    first.push()
    second.pull()
    (first.path / link).unlink()
    (first.path / link).symlink_to("dir/b")
    first.push()
    assert second.push().pushed == []
    assert second.pull().kept == []
    assert os.readlink(second.path / link) == "dir/b"


def test_a_file_that_became_a_directory_arrives(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    (first.path / "models/a").unlink()
    first.write("models/a/b", "below")
    first.push()
    assert second.push().pushed == []
    assert second.pull().kept == []
    assert second.read("models/a/b") == "below"


def test_a_directory_that_became_a_file_arrives(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    (first.path / "models/dir/b").unlink()
    (first.path / "models/dir").rmdir()
    first.write("models/dir", "a file")
    first.push()
    assert second.push().pushed == []
    assert second.pull().kept == []
    assert second.read("models/dir") == "a file"
    assert second.pull().transferred_bytes == 0


def test_a_directory_with_something_new_in_it_is_not_replaced_by_a_file(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    (first.path / "models/dir/b").unlink()
    (first.path / "models/dir").rmdir()
    first.write("models/dir", "a file")
    first.push()
    second.write("models/dir/new", "new")
    assert second.pull().kept == ["models/dir"]
    assert second.names() == ["a", "dir/b", "dir/new"]
    second.push()
    assert first.pull().kept == []
    assert first.names() == ["a", "dir/b", "dir/new"]


def test_a_file_that_changed_here_blocks_a_directory_and_all_below_it(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    (first.path / "models/a").unlink()
    first.write("models/a/b", os.urandom(3_000_000))
    first.push()
    second.write("models/a", "my version")
    for _ in range(2):
        pulled = second.pull()
        assert (pulled.kept, pulled.transferred_bytes) == (["models/a"], 0)
    assert second.read("models/a") == "my version"


def test_one_name_of_a_file_with_two_may_be_replaced(
    pair: tuple[Worker, Worker], new_worker: NewWorker
) -> None:
    first, _ = pair
    os.link(first.path / "models/a", first.path / "models/z")
    first.push()
    (first.path / "models/a").unlink()
    first.write("models/a", "version 2")
    first.push()
    third = new_worker("third")
    third.pull()
    assert (third.read("models/a"), third.read("models/z")) == ("version 2", "version 1")


def test_two_names_of_one_file_stay_one_file(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    os.link(first.path / "models/a", first.path / "models/z")
    first.push()
    second.pull()
    assert (second.path / "models/a").samefile(second.path / "models/z")


def test_directories_get_their_times_back_whatever_came_into_them(
    pair: tuple[Worker, Worker], new_worker: NewWorker
) -> None:
    first, _ = pair
    first.write("models/dir/c", "c", mtime=LONG_AGO)
    os.utime(first.path / "models/dir", ns=(LONG_AGO, LONG_AGO + 5))
    first.push()
    third = new_worker("third")
    third.pull()
    assert (third.path / "models/dir").stat().st_mtime_ns == LONG_AGO + 5


def test_a_file_without_its_bytes_is_brought_again_and_not_saved(pair: tuple[Worker, Worker]) -> None:
    _, second = pair
    for damage in (b"versiom 1", b""):  # a bad disk; a crash of the machine before the bytes were on the disk
        second.write("models/a", damage, mtime=LONG_AGO)
        assert second.push().pushed == []
        assert second.pull().kept == []
        assert second.read("models/a") == "version 1"


def test_a_user_link_in_the_place_of_a_directory_is_not_followed(
    pair: tuple[Worker, Worker], tmp_path: Path
) -> None:
    first, second = pair
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("dir", "new"):
        first.write(f"models/{name}/planted", "planted")
    first.push()
    (second.path / "models/dir/b").unlink()
    (second.path / "models/dir").rmdir()
    (second.path / "models/dir").symlink_to(outside)
    (second.path / "models/new").symlink_to(outside)
    assert second.pull().kept == ["models/dir", "models/new"]
    assert list(outside.iterdir()) == []


def test_a_whole_shared_directory_behind_a_link_is_left_alone_and_named(
    pair: tuple[Worker, Worker], tmp_path: Path
) -> None:
    first, second = pair
    first.write("deps/tool", "tool")
    first.push()
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    (second.path / "deps").rmdir()
    (second.path / "deps").symlink_to(outside)
    assert second.pull().kept == ["deps"]
    assert list(outside.iterdir()) == []
    second.push()
    assert any(warning.startswith("deps is no directory") for warning in second.warnings)


def test_what_changes_during_a_pull_is_not_overwritten(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    first.write("models/a", "version 2")
    first.push()

    class Meddling:
        def stage(self, name: str, total: int | None = None) -> None:
            if name == "restoring":
                second.write("models/a", "my version")

        def advance(self, count: int) -> None:
            pass

    assert second.pull(progress=Meddling()).kept == ["models/a"]
    assert second.read("models/a") == "my version"


def test_a_pull_killed_between_its_renames_leaves_nothing_that_looks_changed_here(
    pair: tuple[Worker, Worker],
) -> None:
    """Otherwise the next save would bring back what this worker only ever restored."""
    first, second = pair
    for name in ("a", "c", "d"):
        first.write(f"models/{name}", "version 2")
    first.push()
    killed_at_rename(second, "models/c")
    assert (second.read("models/a"), second.read("models/c")) == ("version 2", "version 2")
    first.write("models/a", "version 3")
    first.write("models/c", "version 3")
    first.push()
    assert second.pull().kept == []
    assert persistent(second.path) == persistent(first.path)


def _is_made_up_for(first: Worker, second: Worker) -> None:
    """What an interrupted pull left in `second` is nobody's change, and the next pull puts it right."""
    assert second.push(directories=("models",)).pushed == []
    assert second.pull().kept == []
    assert persistent(second.path) == persistent(first.path)


def _with_new_directory(first: Worker) -> None:
    for name in ("a", "b"):
        first.write(f"models/hub/{name}", name)
    (first.path / "models/hub").chmod(0o755)
    first.push()


def test_a_new_directory_that_a_killed_pull_left_closed_is_opened_by_the_next(
    pair: tuple[Worker, Worker],
) -> None:
    first, second = pair
    _with_new_directory(first)
    killed_at_rename(second, "models/hub/a")
    assert _mode(second, "models/hub") == 0o700
    _is_made_up_for(first, second)
    assert _mode(second, "models/hub") == 0o755


def test_a_new_directory_that_a_failed_pull_left_closed_is_opened_by_the_next(
    pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    _with_new_directory(first)
    rename = os.rename

    def fails(source: bytes, target: bytes) -> None:
        if os.fsencode(target).endswith(b"models/hub/b"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="Input/output error"):
            second.pull()
    assert second.names() == ["a", "dir/b", "hub/a"]
    _is_made_up_for(first, second)


def test_a_read_only_directory_that_a_killed_pull_left_open_is_closed_by_the_next(
    pair: tuple[Worker, Worker],
) -> None:
    first, second = pair
    directory = first.path / "models/dir"
    for version in ("version 1", "version 2"):
        directory.chmod(0o755)
        for name in ("b", "c"):
            first.write(f"models/dir/{name}", version)
        directory.chmod(0o555)
        first.push()
        if version == "version 1":
            second.pull()
    killed_at_rename(second, "models/dir/b", before=unprivileged())
    assert _mode(second, "models/dir") == 0o700
    _is_made_up_for(first, second)
    assert _mode(second, "models/dir") == 0o555


def test_a_directory_that_was_made_read_only_here_stays_so_when_something_comes_into_it(
    pair: tuple[Worker, Worker],
) -> None:
    first, second = pair
    first.write("models/dir/new", "new")
    first.push()
    (second.path / "models/dir").chmod(0o555)
    assert _pull(second, before=unprivileged()) == 0
    assert second.read("models/dir/new") == "new"
    assert second.pull().kept == ["models/dir"]
    assert _mode(second, "models/dir") == 0o555
    second.push()
    first.pull()
    assert _mode(first, "models/dir") == 0o555


def test_a_read_only_directory_stays_so_when_a_file_replaces_a_directory_in_it(
    pair: tuple[Worker, Worker],
) -> None:
    first, second = pair
    first.write("models/dir/below/c", "c")
    (first.path / "models/dir").chmod(0o555)
    first.push()
    second.pull()
    (first.path / "models/dir").chmod(0o755)
    shutil.rmtree(first.path / "models/dir/below")
    first.write("models/dir/below", "a file")
    (first.path / "models/dir").chmod(0o555)
    first.push()
    assert _pull(second, before=unprivileged()) == 0
    assert second.read("models/dir/below") == "a file"
    assert _mode(second, "models/dir") == 0o555
    assert second.pull().pulled == []


def _mode(worker: Worker, path: str) -> int:
    return (worker.path / path).stat().st_mode & 0o777


def killed_at_rename(worker: Worker, path: str, *, before: Sequence[str] = ()) -> None:
    """A pull in a process of its own that is killed right after the rename of `path` to its place."""
    program = f"""
import os, signal
rename = os.rename
def and_die(source, target):
    rename(source, target)
    if os.fsencode(target).endswith({path.encode()!r}):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = and_die
"""
    assert _pull(worker, program, before) == -9


def _pull(worker: Worker, first: str = "", before: Sequence[str] = ()) -> int:
    """How a pull in a process of its own ends, with `first` before it and `before` in front of the command."""
    program = f"""{first}
import sys
sys.path.insert(0, ".")
from pathlib import Path
from packhorse.config import Storage
from tests.transfer.workers import Worker
Worker(Path({str(worker.path)!r}), Storage(url={worker.storage.url!r})).pull()
"""
    words = [*before, sys.executable, "-c", program]
    return subprocess.run(words, cwd=Path(__file__).parents[2], check=False).returncode


def test_an_entry_sorts_after_the_newest_listed_whatever_the_clocks_say(
    pair: tuple[Worker, Worker], tmp_path: Path
) -> None:
    first, second = pair
    [newest] = tags.read_tag(first.store, "main")
    future = newest._replace(stamp=f"{int(newest.stamp) - 10**9:014d}", nonce="00000000")  # eleven days ahead
    body = first.store.get(newest.key)
    first.store.put(future.key, body)
    first.write("models/a", "version 2")
    first.push()
    assert tags.read_tag(first.store, "main")[0].stamp < future.stamp
    second.pull()
    assert second.read("models/a") == "version 2"


def test_an_index_that_is_lost_or_unreadable_breaks_nothing(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    index = second.path / ".packhorse" / "index"
    for content in (None, b"garbage", b"", msgspec.msgpack.encode([1, "boot", False, {}])):
        index.unlink()
        if content is not None:
            index.write_bytes(content)
        assert second.push().pushed == []
        assert second.pull().kept == []
        second.write("models/a", f"{content!r}")
        assert second.push().files == 1
        assert first.pull().kept == []
        assert first.read("models/a") == f"{content!r}"


def test_more_entries_than_anyone_wants_to_list_become_one(new_worker: NewWorker) -> None:
    first, second = new_worker("first"), new_worker("second")
    first.root  # noqa: B018 - creates it
    for number in range(66):
        first.write(f"models/{number % 50}", f"{number}")
        first.push()
    kinds = [entry.kind for entry in tags.read_tag(first.store, "main")]
    assert kinds.count("fold") == 1
    assert len(kinds) < 5
    second.pull()
    assert persistent(first.path)["models"] == persistent(second.path)["models"]
    second.write("models/0", "newer than the fold")
    assert second.push().files == 1
    first.pull()
    assert first.read("models/0") == "newer than the fold"
