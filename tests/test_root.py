"""What a root promises: private, one writer, packages exchanged whole, whatever interrupts it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import msgspec
import pytest

from packhorse import atomic
from packhorse.errors import ConfigError, NoSpaceError
from packhorse.root import EPHEMERAL, PERSISTENT, Root, State

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="only root can chown")


def test_a_new_root_has_the_six_directories_and_is_private(root_path: Path) -> None:
    old = os.umask(0)
    try:
        Root.open(root_path)
    finally:
        os.umask(old)
    for directory in (root_path, *(root_path / name for name in (*PERSISTENT, *EPHEMERAL))):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@as_root
def test_a_root_of_another_user_is_refused(root_path: Path) -> None:
    root_path.mkdir(mode=0o700)
    os.chown(root_path, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
        Root.open(root_path)


@as_root
def test_a_root_behind_another_users_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to("real")
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    for path in (link, link / "root"):
        with pytest.raises(ConfigError, match="symbolic link"):
            Root.open(path)
    assert not (tmp_path / "real" / "packages").exists()


def test_a_root_behind_ones_own_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    Root.open(tmp_path / "link")
    assert (tmp_path / "real" / "packages").is_dir()


def test_a_root_that_others_can_write_to_is_refused(root_path: Path) -> None:
    root_path.mkdir()
    root_path.chmod(0o777)
    with pytest.raises(ConfigError, match="written by other users"):
        Root.open(root_path)


def test_a_file_in_the_place_of_a_root_is_refused(root_path: Path) -> None:
    root_path.write_text("not a directory")
    with pytest.raises(ConfigError):
        Root.open(root_path)


def test_two_writers_exclude_each_other(root_path: Path) -> None:
    root = Root.open(root_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import sys
                from pathlib import Path
                from packhorse.root import Root
                with Root.open(Path(sys.argv[1])).writing():
                    print("held", flush=True)
                    sys.stdin.read()
                (Path(sys.argv[1]) / "released").touch()
                """
            ),
            root_path,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    told: list[str] = []

    def waiting(by: str) -> None:
        told.append(by)
        assert holder.stdin is not None
        holder.stdin.close()

    with root.writing(on_wait=waiting):
        assert told == [f"process {holder.pid}"]
    assert holder.wait(timeout=20) == 0
    assert (root_path / "released").exists()


def test_packages_in_use_are_not_exchanged(root_path: Path) -> None:
    root = Root.open(root_path)
    user = root.use_packages()
    with root.packages_unused() as unused:
        assert not unused
    os.close(user)
    with root.packages_unused() as unused:
        assert unused


def test_who_only_looks_whether_packages_are_in_use_is_taken_for_no_user(root_path: Path) -> None:
    """As when several workers start on one root at the same moment."""
    root = Root.open(root_path)
    found: list[bool] = []

    def look() -> None:
        with root.packages_unused() as unused:
            found.append(unused)

    other = threading.Thread(target=look)
    with root.packages_unused():
        other.start()
        while not found and f" {os.getpid()} " not in _waiting_for_locks():
            pass
    other.join()
    assert found == [True]


def _waiting_for_locks() -> str:
    return "".join(line for line in Path("/proc/locks").read_text().splitlines(True) if "-> FLOCK" in line)


def _generations(root: Root) -> None:
    (root.packages / "old.py").touch()
    root.staging.mkdir()
    (root.staging / "new.py").touch()


def test_packages_are_exchanged_whole_and_the_old_ones_kept_until_the_caller_says_so(root_path: Path) -> None:
    root = Root.open(root_path)
    _generations(root)
    root.exchange_packages(root.staging)
    assert os.listdir(root.packages) == ["new.py"]
    assert os.listdir(root.retired) == ["old.py"]
    assert not root.staging.exists()
    root.remove_retired()
    assert not root.retired.exists()


def test_where_the_kernel_refuses_an_exchange_two_renames_do_it(
    root_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root.open(root_path)
    _generations(root)
    monkeypatch.setattr(atomic, "RENAME_EXCHANGE", 1 << 30)  # a flag no kernel knows: it answers EINVAL
    root.exchange_packages(root.staging)
    assert os.listdir(root.packages) == ["new.py"]
    assert os.listdir(root.retired) == ["old.py"]
    assert not (root.private / "exchange").exists()


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("opened_in_between", [False, True])
def test_a_crash_between_the_two_renames_is_put_right(
    root_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, opened_in_between: bool
) -> None:
    """`renames`: how many were done. Somebody who opens the root in between creates what is missing."""
    root = Root.open(root_path)
    _generations(root)
    (root.private / "exchange").write_bytes(os.fsencode(root.staging.relative_to(root.path)))
    if renames >= 1:
        root.packages.rename(root.retired)
        if opened_in_between:
            root.packages.mkdir()
    if renames >= 2:
        root.staging.rename(root.packages)
    reopened = Root.open(root_path)
    assert os.listdir(reopened.packages) == (["new.py"] if renames else ["old.py"])
    assert not (root.private / "exchange").exists()


def test_the_old_packages_come_back_where_the_new_ones_are_gone(root_path: Path) -> None:
    root = Root.open(root_path)
    _generations(root)
    (root.private / "exchange").write_bytes(os.fsencode(root.staging.relative_to(root.path)))
    root.packages.rename(root.retired)
    atomic.remove_tree(root.staging)
    assert os.listdir(Root.open(root_path).packages) == ["old.py"]


def test_what_is_recorded_waits_for_whoever_reads_it_to_change_it(root_path: Path) -> None:
    """Else a backup that ends when a pull begins would say of a root in between that it is complete."""
    root = Root.open(root_path)
    root.record(State(state="complete"))
    with ThreadPoolExecutor(1) as beside:
        with root.recording() as record:
            pulling = beside.submit(root.record, State(state="partial"))
            assert not wait([pulling], timeout=0.3).done
            record(msgspec.structs.replace(root.state(), shared=("saved",)))
        pulling.result()
    assert root.state().state == "partial"


def test_the_recorded_state_survives_and_an_unreadable_one_counts_as_empty(root_path: Path) -> None:
    root = Root.open(root_path)
    assert root.state() == State()
    root.record(State(state="complete", fingerprint="f", shared=("a", "b")))
    state = Root.open(root_path).state()
    assert (state.state, state.fingerprint, state.shared) == ("complete", "f", ("a", "b"))
    assert state.boot
    for content in (b'{"state": ', b'{"state":"complete","fingerprint":"\xff"}'):
        (root.private / "state.json").write_bytes(content)
        assert root.state() == State()


def test_too_little_space_is_an_error_before_anything_is_written(root_path: Path) -> None:
    root = Root.open(root_path)
    with pytest.raises(NoSpaceError, match=r"MB free, but the test needs 1,152,921,504,607 MB\."):
        root.require_space(1 << 60, "the test needs")


def test_what_is_kept_free_is_told_apart_from_what_is_needed(root_path: Path) -> None:
    root = Root.open(root_path)
    with pytest.raises(NoSpaceError, match=r"the test needs 2 MB, and 1,152,921,504,607 MB are kept free\."):
        root.require_space(2_000_000, "the test needs", margin=1 << 60)
    root.require_space(2_000_000, "the test needs", margin=1)
