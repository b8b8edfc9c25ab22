"""What levels of compression buy: a share of the frames that a tree is cut into, compressed with each, on one processor.

Prints a table: bytes as they would be stored, and CPU-seconds to compress them and to decompress and check them, as a push
and a pull do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from packhorse.snapshot import frames, gpu
from packhorse.snapshot.frames import Cut
from packhorse.snapshot.scan import scan


def main() -> None:
    """Cut, choose, compress and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tree", type=Path, help="a directory, as a root's packages/")
    parser.add_argument("--every", type=int, default=8, help="take every such frame (default: %(default)s)")
    parser.add_argument(
        "--levels", default="1,3,9,19", help="divided by commas (default: %(default)s; 19 is `best`)"
    )
    arguments = parser.parse_args()
    files, cuts = cut(arguments.tree)
    chosen = cuts[:: arguments.every]
    length = sum(each.length for each in chosen)
    print(f"{len(chosen):,} of {len(cuts):,} frames, {length / 1e6:,.0f} MB\n", flush=True)
    print("| level | stored | CPU s to compress | CPU s to decompress |\n| --- | ---: | ---: | ---: |")
    for level in map(int, arguments.levels.split(",")):
        stored, packing, unpacking = measured(files, chosen, level)
        print(f"| {level} | {stored / 1e6:,.1f} MB | {packing:.1f} | {unpacking:.2f} |", flush=True)


def cut(tree: Path) -> tuple[list[Path], list[Cut]]:
    """The regular files of a tree, and its frames."""
    found = [item for item in scan(os.fsencode(tree)) if item.kind == "file"]
    files = [tree / os.fsdecode(item.path) for item in found]

    def pieces(number: int) -> list[gpu.Gathered]:
        with files[number].open("rb") as file:
            return gpu.pieces(gpu.extents(file.fileno(), found[number].signature.size), frames.PIECE)

    return files, list(frames.cut([(item.path, item.signature.size) for item in found], pieces))


def measured(files: Sequence[Path], chosen: Sequence[Cut], level: int) -> tuple[int, float, float]:
    """Bytes stored, and CPU-seconds to compress and to decompress."""
    size, packing, unpacking = 0, 0.0, 0.0
    for raw in map(read, itertools.repeat(files), chosen):
        digest = frames.digest_of(raw)
        began = time.process_time()
        codec, stored = frames.compress(raw, level)
        packed = time.process_time()
        proof = frames.digest_of(stored)
        given = time.process_time()
        for _ in frames.decompress(stored, codec, proof, digest, len(raw)):
            pass
        unpacking += time.process_time() - given
        packing += packed - began
        size += len(stored)
    return size, packing, unpacking


def read(files: Sequence[Path], frame: Cut) -> bytes:
    """The raw bytes of a frame."""
    return b"".join(_runs(files, frame))


def _runs(files: Sequence[Path], frame: Cut) -> Iterator[bytes]:
    for span in frame.spans:
        with contextlib.closing(files[span.file].open("rb", buffering=0)) as file:
            yield os.pread(file.fileno(), span.length, span.offset)


if __name__ == "__main__":
    main()
