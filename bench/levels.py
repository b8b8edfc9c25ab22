"""What levels of compression buy: a share of the frames that a tree is cut into, compressed with each, on one processor.

Prints a table: bytes as they would be stored, and CPU-seconds to compress them and to decompress and check them, as a push
and a pull do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from packhorse.snapshot import frames, gpu
from packhorse.snapshot.frames import Cut
from packhorse.snapshot.scan import scan
from results import add_json, ran_on, report, table


def main() -> None:
    """Cut, choose, compress and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tree", type=Path, help="a directory, as a root's packages/")
    parser.add_argument("--every", type=int, default=8, help="take every such frame (default: %(default)s)")
    parser.add_argument(
        "--levels", default="1,3,9,19", help="divided by commas (default: %(default)s; 19 is `best`)"
    )
    add_json(parser)
    arguments = parser.parse_args()
    files, cuts = cut(arguments.tree)
    chosen = cuts[:: arguments.every]
    length = sum(each.length for each in chosen)
    levels = []
    for level in map(int, arguments.levels.split(",")):
        levels.append(measured(files, chosen, level))
        print(f"level {level}: {levels[-1].compress_cpu:.1f} CPU s", file=sys.stderr)
    report(
        arguments.json,
        {
            "frames": len(cuts),
            "chosen_frames": len(chosen),
            "bytes": length,
            "levels": [each._asdict() for each in levels],
        },
        [
            table(
                "levels of compression",
                ["level", "stored, MB", "CPU s to compress", "CPU s to decompress and check"],
                [
                    [str(level), f"{stored / 1e6:,.1f}", f"{packing:.1f}", f"{unpacking:.2f}"]
                    for level, stored, packing, unpacking in levels
                ],
            )
        ],
        [f"{len(chosen):,} of {len(cuts):,} frames, {length / 1e6:,.0f} MB, on one processor.", ran_on()],
    )


def cut(tree: Path) -> tuple[list[Path], list[Cut]]:
    """The regular files of a tree, and its frames."""
    found = [item for item in scan(os.fsencode(tree)) if item.kind == "file"]
    files = [tree / os.fsdecode(item.path) for item in found]

    def pieces(number: int) -> list[gpu.Gathered]:
        with files[number].open("rb") as file:
            return gpu.pieces(gpu.extents(file.fileno(), found[number].signature.size), frames.PIECE)

    return files, list(frames.cut([(item.path, item.signature.size) for item in found], pieces))


class Level(NamedTuple):
    """Bytes stored, and CPU-seconds to compress them and to decompress and check them."""

    level: int
    stored: int
    compress_cpu: float
    decompress_cpu: float


def measured(files: Sequence[Path], chosen: Sequence[Cut], level: int) -> Level:
    """Compress the frames and decompress them again."""
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
    return Level(level, size, packing, unpacking)


def read(files: Sequence[Path], frame: Cut) -> bytes:
    """The raw bytes of a frame."""
    return b"".join(_runs(files, frame))


def _runs(files: Sequence[Path], frame: Cut) -> Iterator[bytes]:
    for span in frame.spans:
        with contextlib.closing(files[span.file].open("rb", buffering=0)) as file:
            yield os.pread(file.fileno(), span.length, span.offset)


if __name__ == "__main__":
    main()
