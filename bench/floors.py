"""What no restore can be faster than: its parts alone. Each prints JSON with the seconds and CPU-seconds of that part.

write SOURCE TARGET: reads a tree into memory, then writes it to an empty directory; only the writing counts.
pack SOURCE FILE: compresses the files of a tree in pieces, as something to decompress.
decompress FILE: reads these pieces into memory, then decompresses them; only that counts.
fetch PREFIX BYTES: fetches objects of the store in the environment by ranges, and forgets them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import obstore
from obstore.store import S3Store

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE = 8 << 20
RANGE = 16 << 20
_LENGTHS = struct.Struct("<II")

Item = TypeVar("Item")


def main() -> None:
    """Do one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("write", "pack", "decompress", "fetch"))
    parser.add_argument("words", nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    parts: dict[str, Callable[..., dict[str, float]]] = {
        "write": write,
        "pack": pack,
        "decompress": decompress,
        "fetch": fetch,
    }
    print(json.dumps(parts[arguments.part](*arguments.words, threads=arguments.threads)))


def write(source: str, target: str, *, threads: int) -> dict[str, float]:
    """Write a tree from memory: directories first, then the files, the largest first."""
    directories: list[str] = []
    files: list[tuple[str, bytes]] = []
    for folder, _, names in os.walk(source):
        inside = os.path.relpath(folder, source)
        directories.append(inside)
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                with open(path, "rb") as file:
                    files.append((os.path.join(inside, name), file.read()))
    files.sort(key=lambda entry: -len(entry[1]))
    target_fd = os.open(target, os.O_RDONLY)

    def put(entry: tuple[str, bytes]) -> None:
        descriptor = os.open(entry[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=target_fd)
        view = memoryview(entry[1])
        while view:
            view = view[os.write(descriptor, view[:PIECE]) :]
        os.close(descriptor)

    with Timed() as timed:
        for inside in directories:
            if inside != ".":
                os.mkdir(inside, dir_fd=target_fd)
        in_threads(put, files, threads)
    return timed.told(files=len(files), bytes=sum(len(content) for _, content in files))


def pack(source: str, target: str, *, threads: int) -> dict[str, float]:
    """Cut what the files hold into pieces and compress each by itself, as zstd -3 does."""
    with open(target, "wb") as file, ThreadPoolExecutor(threads) as pool:
        waiting = []
        for piece in itertools.chain(_pieces(source), itertools.repeat(b"", threads * 2)):
            waiting.append((len(piece), pool.submit(zstd.compress, piece, 3)))
            if len(waiting) > threads * 2:
                raw, packed = waiting.pop(0)
                if raw:
                    file.write(_LENGTHS.pack(raw, len(packed.result())))
                    file.write(packed.result())
        return {"bytes": file.tell()}


def _pieces(source: str) -> Iterator[bytes]:
    held = bytearray()
    for folder, _, names in sorted(os.walk(source)):
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                continue
            with open(path, "rb") as file:
                while content := file.read(PIECE):
                    held += content
                    if len(held) >= PIECE:
                        yield bytes(held)
                        held.clear()
    yield bytes(held)


def decompress(source: str, *, threads: int) -> dict[str, float]:
    """Decompress all pieces but those that had not shrunk, which a store keeps as they are."""
    pieces: list[bytes] = []
    total = 0
    with open(source, "rb") as file:
        while lengths := file.read(_LENGTHS.size):
            raw, packed = _LENGTHS.unpack(lengths)
            content = file.read(packed)
            total += raw
            if packed < raw:
                pieces.append(content)
    with Timed() as timed:
        in_threads(zstd.decompress, pieces, threads)
    return timed.told(bytes=total)


def fetch(prefix: str, amount: str, *, threads: int) -> dict[str, float]:
    """Fetch `amount` bytes of the objects below a prefix (0: all)."""
    url, endpoint = os.environ["PACKHORSE_STORAGE_URL"], os.environ["PACKHORSE_STORAGE_ENDPOINT"]
    store = S3Store.from_url(
        f"{url}/{prefix}", endpoint=endpoint, client_options={"allow_http": True, "timeout": "10m"}
    )
    ranges: list[tuple[str, int, int]] = []
    asked, wanted = 0, int(amount) or sys.maxsize
    with Timed() as timed:
        for entry in itertools.chain.from_iterable(obstore.list(store)):
            for start in range(0, entry["size"], RANGE):
                end = min(start + RANGE, entry["size"], start + wanted - asked)
                if end > start:
                    ranges.append((entry["path"], start, end))
                    asked += end - start
        in_threads(
            lambda part: obstore.get_range(store, part[0], start=part[1], end=part[2]), ranges, threads
        )
    return timed.told(bytes=asked, requests=len(ranges))


def in_threads(work: Callable[[Item], object], items: Sequence[Item], threads: int) -> None:
    """Do the work for all items, in order, with so many threads. What one raises is raised here."""
    lock = threading.Lock()
    following: Iterable[Item] = iter(items)

    def take() -> None:
        while True:
            with lock:
                item = next(following, None)  # type: ignore[call-overload]
            if item is None:
                return
            work(item)

    with ThreadPoolExecutor(threads) as pool:
        for each in [pool.submit(take) for _ in range(threads)]:
            each.result()


class Timed:
    """`with Timed() as timed`: the seconds and CPU-seconds of what is inside."""

    def __enter__(self) -> Timed:
        self._started, self._cpu = time.perf_counter(), _cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds, self._used = time.perf_counter() - self._started, _cpu() - self._cpu

    def told(self, **facts: float) -> dict[str, float]:
        """What is printed."""
        return {"seconds": self._seconds, "cpu": self._used, **facts}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
