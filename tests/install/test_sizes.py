from __future__ import annotations

from pathlib import Path

import pytest
from tests.install.index import Index, wheel

from packhorse.config import Network
from packhorse.install.access import access
from packhorse.install.chosen import Chosen
from packhorse.install.downloads import Downloads
from packhorse.install.sizes import Sized, sized


def _sized(url: str) -> Sized:
    downloads = Downloads(access({}, [], {}), Network(), print)
    [found] = sized([Chosen("foo", "1.0", url)], downloads, lambda: None)
    return found


@pytest.fixture
def foo(index: Index) -> tuple[str, Path]:
    """A wheel whose directory is longer than the part that is read first, and its URL."""
    files: dict[str, str | bytes] = {f"foo/a-rather-long-name-{number}.txt": "x" for number in range(2000)}
    path = index.add("foo", "1.0", {**files, "foo/big.bin": bytes(100_000)})
    return f"http://{index.host}/files/{path.name}", path


def test_sizes_are_told_by_the_end_of_a_wheel(index: Index, foo: tuple[str, Path]) -> None:
    url, path = foo
    found = _sized(url)

    assert found.chosen.size == path.stat().st_size
    by_path = {file.path: file.bytes for file in found.files}
    assert len(by_path) == 2004
    assert by_path["foo/big.bin"] == 102_400  # whole blocks of 4096
    assert index.requests == []  # never the whole file


def test_sources_count_with_their_bytecode(index: Index) -> None:
    path = index.add("foo", "1.0", {"foo.py": "#" * 10_000})
    found = _sized(f"http://{index.host}/files/{path.name}")

    [source] = [file for file in found.files if file.path == "foo.py"]
    assert source.bytes > 2 * 10_000


def test_a_server_without_ranges_tells_the_size_of_the_wheel_alone(
    index: Index, foo: tuple[str, Path]
) -> None:
    index.ranges = False
    url, path = foo
    found = _sized(url)

    assert (found.chosen.size, found.files) == (path.stat().st_size, ())


def test_a_local_wheel_is_read_where_it_is(tmp_path: Path) -> None:
    path = wheel(tmp_path, "foo", "1.0")
    found = _sized(path.as_uri())

    assert found.chosen.size == path.stat().st_size
    assert {file.path for file in found.files} >= {"foo.py"}


@pytest.mark.parametrize("content", [b"", b"no zip at all" * 10_000, b"PK\x05\x06" + bytes(40)])
def test_what_cannot_be_told_is_left_unknown(index: Index, content: bytes) -> None:
    (index.directory / "foo-1.0-py3-none-any.whl").write_bytes(content)
    found = _sized(f"http://{index.host}/files/foo-1.0-py3-none-any.whl")
    gone = _sized(f"http://{index.host}/files/missing-1.0-py3-none-any.whl")

    assert not found.files
    assert not gone.files
    assert gone.chosen.size == 0
