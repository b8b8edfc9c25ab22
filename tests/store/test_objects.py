"""Objects on real stores: what is put comes back, and every failure is one of ours, without secrets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import unprivileged
from tests.servers import S3Server

from packhorse.config import Storage
from packhorse.errors import IntegrityError, StorageError
from packhorse.snapshot.frames import LARGEST_DOCUMENT
from packhorse.store.objects import NotFoundError, Store, UnreachableError


@pytest.fixture(params=["file", "seaweedfs", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "file":
        yield Store(Storage(url=(tmp_path / "a store with spaces %41").as_uri()), {})
        return
    server: S3Server = request.getfixturevalue("seaweedfs" if request.param == "seaweedfs" else "rclone_s3")
    yield Store(
        Storage(url=f"s3://{server.new_bucket()}/a/prefix", endpoint=server.endpoint), server.environ()
    )


def test_objects_come_back_and_are_listed_by_key(store: Store) -> None:
    for key in ("tags/b", "tags/a", "tags/c/d", "other"):
        store.put(key, key.encode())
    assert store.get("tags/a") == b"tags/a"
    assert [(item.key, item.size) for item in store.list("tags/")] == [
        ("tags/a", 6),
        ("tags/b", 6),
        ("tags/c/d", 8),
    ]
    assert store.list("nothing/") == []
    assert len(store.list("")) == 4
    assert store.list("other") == [] or store.list("other")[0].key == "other"
    assert abs(store.modified("other") - store.list("tags/")[0].modified) < 60_000
    store.delete(["tags/a", "other"])
    assert [item.key for item in store.list("")] == ["tags/b", "tags/c/d"]


def test_what_is_not_there_is_told(store: Store) -> None:
    store.put("something", b"")
    for ask in (lambda: store.get("nothing"), lambda: store.modified("nothing"),
                lambda: list(store.ranges("nothing", [(0, 1)]))):  # fmt: skip
        with pytest.raises(NotFoundError):
            ask()


@pytest.mark.parametrize(
    "wanted",
    [[(0, 10)], [(3, 4)], [(0, 1), (1, 1), (5, 5)], [(2, 3), (900_000, 100_000)], [(999_999, 1)]],
)
def test_ranges_are_those_asked_for(store: Store, wanted: list[tuple[int, int]]) -> None:
    content = os.urandom(1_000_000)
    store.put("packs/a", content)
    parts = [bytes(part) for part in store.ranges("packs/a", wanted)]
    assert parts == [content[offset : offset + length] for offset, length in wanted]


@pytest.mark.parametrize("wanted", [[(0, 11)], [(5, 6)], [(0, 1), (10, 1)], [(10, 1)], [(1 << 39, 1)]])
def test_an_object_that_is_cut_short_is_corrupt_not_out_of_reach(
    store: Store, wanted: list[tuple[int, int]]
) -> None:
    store.put("packs/a", b"0123456789")
    with pytest.raises(IntegrityError, match="shorter"):
        list(store.ranges("packs/a", wanted))


def test_a_directory_is_made_when_something_is_put_and_not_by_who_reads(tmp_path: Path) -> None:
    directory = tmp_path / "below" / "a store"
    reader, writer = (Store(Storage(url=directory.as_uri()), {}) for _ in range(2))
    assert reader.list("") == reader.list("tags/") == []
    assert not reader.has("nothing")
    for ask in (lambda: reader.get("nothing"), lambda: reader.modified("nothing"),
                lambda: list(reader.ranges("nothing", [(0, 1)]))):  # fmt: skip
        with pytest.raises(NotFoundError):
            ask()
    reader.delete(["one"])
    reader.delete(["one", "another"])
    reader.remove_unfinished(0)
    assert list(tmp_path.iterdir()) == []
    writer.put("tags/a", b"content")
    assert [item.key for item in reader.list("")] == ["tags/a"]
    assert (reader.get("tags/a"), reader.has("tags/a")) == (b"content", True)


def test_what_can_hold_no_store_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "link"):
        with pytest.raises(StorageError, match="cannot be opened"):
            Store(Storage(url=(tmp_path / name).as_uri()), {})
    store = Store(Storage(url=(tmp_path / "link/below").as_uri()), {})
    assert store.list("") == []
    with pytest.raises(StorageError, match="cannot be opened"):
        store.put("tags/a", b"content")


@pytest.mark.parametrize(
    ("scheme", "variable"),
    [("az", "AZURE_STORAGE_ACCOUNT_NAME"), ("gs", "GOOGLE_APPLICATION_CREDENTIALS")],
)
def test_credentials_that_open_no_store_are_told_with_their_variable(
    scheme: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    with pytest.raises(StorageError, match="cannot be opened") as refused:
        Store(Storage(url=f"{scheme}://bucket/prefix"), {})
    assert variable in refused.value.remedy


def test_a_document_of_any_size_is_not_read(tmp_path: Path) -> None:
    store = Store(Storage(url=tmp_path.as_uri()), {})
    with (tmp_path / "document").open("wb") as file:
        file.truncate(LARGEST_DOCUMENT + 1)
    with pytest.raises(IntegrityError, match="too long"):
        store.get("document")
    store.put("small", b"0123456789")
    assert store.get("small", 10) == b"0123456789"
    with pytest.raises(IntegrityError, match="too long"):
        store.get("small", 9)


def test_whether_a_store_keeps_ranges_is_found_out(seaweedfs: S3Server, rclone_s3: S3Server) -> None:
    for server, expected in ((seaweedfs, True), (rclone_s3, False)):
        store = Store(Storage(url=f"s3://{server.new_bucket()}", endpoint=server.endpoint), server.environ())
        store.put("a", b"content")
        assert store.keeps_ranges("a") is expected


@pytest.mark.parametrize("kind", ["seaweedfs", "rclone_s3"])
def test_wrong_secrets_and_unknown_buckets_are_told_apart_and_kept_secret(
    kind: str, request: pytest.FixtureRequest
) -> None:
    server: S3Server = request.getfixturevalue(kind)
    bucket = server.new_bucket()
    secret = "wrong-" + server.secret_key
    wrong = Store(
        Storage(url=f"s3://{bucket}", endpoint=server.endpoint),
        {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": secret},
    )
    unknown = Store(Storage(url="s3://no-such-bucket", endpoint=server.endpoint), server.environ())
    for store, said in ((wrong, "refuses the credentials"), (unknown, "does not exist")):
        with pytest.raises(StorageError, match=said) as refused:
            store.list("tags/")
        text = str(refused.value)
        assert refused.value.exit_code == 6
        assert not any(hidden in text for hidden in (secret, server.secret_key, "AWS4", "X-Amz"))


def test_a_full_disk_below_an_embedded_store_is_told_as_such(tmp_path: Path) -> None:
    from packhorse.errors import NoSpaceError
    from packhorse.store.objects import _translated

    # What obstore says for ENOSPC; a disk of its own would need privileges.
    error = _translated(
        "file:///store",
        "packs/a",
        OSError(
            "Generic LocalFileSystem error: Unable to copy data to file: No space left on device (os error 28)"
        ),
    )
    assert isinstance(error, NoSpaceError)


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:1", "Connection refused"),
        ("https://{plain}", "it does not speak TLS (an http:// endpoint?)"),
    ],
)
def test_why_a_store_cannot_be_reached_is_told(seaweedfs: S3Server, endpoint: str, reason: str) -> None:
    endpoint = endpoint.format(plain=seaweedfs.endpoint.partition("//")[2])
    store = Store(Storage(url="s3://bucket/prefix", endpoint=endpoint), seaweedfs.environ())
    with pytest.raises(UnreachableError) as raised:
        store.list("tags/")
    assert raised.value.what == f"The store s3://bucket/prefix cannot be reached: {reason}."


_TRIES = """
import os, sys
from packhorse.config import Storage
from packhorse.errors import PackhorseError
from packhorse.store.objects import Store
store = Store(Storage(url=sys.argv[1]), {})
for ask in (
    lambda: store.put("closed/b", b""),
    lambda: store.put("read-only/b", b""),
    lambda: store.get("read-only/a"),
    lambda: store.list("closed/"),
):
    try:
        ask()
    except PackhorseError as error:
        print(error.exit_code, error.what)
"""


def test_a_directory_that_may_not_be_used_is_told_from_one_that_is_out_of_reach(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    store = Store(Storage(url=url), {})
    for key in ("closed/a", "read-only/a"):
        store.put(key, b"")
    (tmp_path / "store/read-only/a").chmod(0)
    (tmp_path / "store/read-only").chmod(0o555)
    (tmp_path / "store/closed").chmod(0)
    words = [*unprivileged(), sys.executable, "-c", _TRIES, url]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    finally:
        (tmp_path / "store/closed").chmod(0o755)
    assert done.stdout.splitlines() == [
        f"6 The store {url} cannot be used: permission denied for {key}."
        for key in ("closed/b", "read-only/b", "read-only/a", "closed/")
    ]


_ENDS = """
import asyncio, sys, time
from packhorse.config import Storage
from packhorse.store.objects import Store
class Slow:  # the interpreter flushes what it ends with
    closed = False
    def flush(self):
        time.sleep(0.4)
told = asyncio.BaseEventLoop.call_soon_threadsafe
def slowly(*words, **more):
    handle = told(*words, **more)
    time.sleep(0.2)  # in the client's thread, which waits for its turn of the interpreter
    return handle
asyncio.BaseEventLoop.call_soon_threadsafe = slowly
print(Store(Storage(url=sys.argv[1]), {}).get("a"), flush=True)
sys.stdout = Slow()
"""


def test_a_program_may_end_right_after_an_answer(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    Store(Storage(url=url), {}).put("a", b"content")
    done = subprocess.run([sys.executable, "-c", _ENDS, url], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'content'\n", "")
