import os
from pathlib import Path

from packhorse.watch.disk import Watch, usage


def _allocate(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def test_usage_counts_hard_links_once_and_links_as_files(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").write_bytes(b"x" * 100_000)
    alone = usage(tmp_path)
    os.link(tmp_path / "directory" / "file", tmp_path / "again")
    os.symlink("directory", tmp_path / "link")

    both = usage(tmp_path)

    assert (alone.files, both.files) == (1, 3)
    assert 100_000 <= alone.bytes <= both.bytes < 150_000


def test_usage_counts_what_is_allocated_not_what_files_seem_to_hold(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 30)

    assert usage(tmp_path).bytes < 1 << 20


def test_usage_of_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert usage(tmp_path / "nothing") == (0, 0)


def test_a_peak_is_remembered_after_it_is_gone(tmp_path: Path) -> None:
    with Watch(tmp_path) as watch:
        _allocate(tmp_path / "large", 200_000_000)
        watch.look()
        (tmp_path / "large").unlink()
        now, peak, _ = watch.summary()

    assert now < 1_000_000
    assert peak > 150_000_000


def test_the_lowest_free_space_is_that_since_the_last_reset(tmp_path: Path) -> None:
    with Watch(tmp_path) as watch:
        _allocate(tmp_path / "large", 200_000_000)
        low = watch.look()
        (tmp_path / "large").unlink()
        assert watch.lowest_free <= low
        watch.reset_lowest()

        assert watch.lowest_free > low + 50_000_000
