"""How much of the GPU code in a directory of libraries is cold, and what cutting by GPU does to the compression.

`--check` holds each library against NVIDIA's cuobjdump: it must extract the same code for a GPU from a copy in which
all that is cold for that GPU is missing, and no cold code may be one that names this GPU itself.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.snapshot.fatbins import cuobjdump, says_itself, with_holes

from packhorse.snapshot import frames, gpu
from packhorse.snapshot.gpu import Extent
from results import add_json, ran_on, report, table

Row = dict[str, float]
"""The figures of a library by column: bytes, but for the COUNTS and the seconds."""
COUNTS = ("extents", "frames", "plain cut")


def main() -> None:
    """Measure, check if asked to, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="where to look for libraries, links not followed")
    parser.add_argument(
        "--gpus", default="sm_86,sm_90,sm_120", help="the GPUs to count for (default: %(default)s)"
    )
    parser.add_argument(
        "--compress", action="store_true", help="compress the frames of both cuts with zstd -3"
    )
    parser.add_argument("--check", action="store_true", help="hold all against cuobjdump")
    add_json(parser)
    arguments = parser.parse_args()
    gpus = gpu.parse_gpus(arguments.gpus) or ()
    directory = arguments.directory.resolve()  # cuobjdump runs elsewhere

    libraries: dict[str, Row] = {}
    checks: Counter[str] = Counter()
    read, seconds = 0, 0.0
    for path in sorted(directory.rglob("*.so*")):
        if path.is_symlink() or not path.is_file():
            continue
        spent, row = _measured(path, gpus, compress=arguments.compress)
        read, seconds = read + 1, seconds + spent
        if row:
            name = str(path.relative_to(directory))
            print(f"{name}: {row['extents']} extents", file=sys.stderr)
            libraries[name] = row
            if arguments.check:
                checks.update(_checked(path, gpus))

    columns = ["size", *(f"cold sm_{number}" for number in gpus), *COUNTS, "seconds"]
    columns += ["stored", "stored, plain"] if arguments.compress else []
    together = {column: sum(row[column] for row in libraries.values()) for column in columns}
    rows = [[name, *_cells(row, columns)] for name, row in {**libraries, "together": together}.items()]
    heads = [column if column in {*COUNTS, "seconds"} else f"{column}, MB" for column in columns]
    report(
        arguments.json,
        {"libraries": libraries, "libraries_read": read, "read_seconds": seconds, "checks": checks},
        [table("GPU code", ["library", *heads], rows)],
        [
            f"{read:,} libraries read in {seconds:.3f} s; {len(libraries):,} have GPU code.",
            *(f"{what}: {count:,}." for what, count in sorted(checks.items())),
            ran_on(),
        ],
    )


def _measured(path: Path, gpus: Iterable[int], *, compress: bool) -> tuple[float, Row]:
    """The seconds that reading the headers took, and the row of the table; an empty one where there is no GPU code."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    started = time.perf_counter()
    extents = gpu.extents(descriptor, size)
    seconds = time.perf_counter() - started
    row: Row = {}
    if len(extents) > 1:
        ours = [frame.runs for frame in gpu.pieces(extents, frames.PIECE)]
        plain = [frame.runs for frame in gpu.pieces([Extent(0, size, "")], frames.PIECE)]
        row |= {"size": size, "extents": len(extents), "seconds": seconds}
        row |= {"frames": len(ours), "plain cut": len(plain)}
        for number in gpus:
            row[f"cold sm_{number}"] = sum(
                extent.length for extent in extents if not gpu.needed(extent.gpus, number)
            )
        if compress:
            row["stored"] = _stored(descriptor, ours)
            row["stored, plain"] = _stored(descriptor, plain)
    os.close(descriptor)
    return seconds, row


def _stored(descriptor: int, cut: Iterable[list[tuple[int, int]]]) -> int:
    stored = 0
    for runs in cut:
        raw = b"".join(os.pread(descriptor, length, offset) for offset, length in runs)
        stored += len(frames.compress(raw, frames.DEFAULT_LEVEL)[1])
    return stored


def _checked(path: Path, gpus: Iterable[int]) -> Counter[str]:
    """How much was checked; ends the program at the first difference."""
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        listed = {
            option: set(re.findall(r"\.sm_(\d+)", cuobjdump("-all", option, path, cwd=work)))
            for option in ("-lelf", "-lptx")
        }
        descriptor = os.open(path, os.O_RDONLY)
        for offset, length, label in gpu.extents(descriptor, path.stat().st_size):
            if label:
                kind, architecture = says_itself(os.pread(descriptor, length, offset))
                done[f"cold code checked by what it says of itself: {kind}"] += 1
                if kind == "cubin" and not gpu.needed(label, architecture):
                    sys.exit(f"{path}: the sm_{architecture} at {offset} is labelled {label}")
        os.close(descriptor)
        for number in gpus:
            if str(number) not in listed["-lelf"] - listed["-lptx"]:
                continue  # cuobjdump expands PTX of that architecture as well, which no GPU would
            sparse = work / path.name
            with_holes(path, sparse, number)
            extracted: list[dict[str, bytes]] = []
            for source in (path, sparse):
                target = work / f"extracted-{number}-{len(extracted)}"
                target.mkdir()
                cuobjdump("-all", "-arch", f"sm_{number}", "-xelf", "all", source, cwd=target)
                extracted.append({file.name: file.read_bytes() for file in target.iterdir()})
            if extracted[0] != extracted[1]:
                sys.exit(f"{path}: cuobjdump finds other code for sm_{number} where the rest is missing")
            done[f"cubins extracted from sparse copies for sm_{number}"] += len(extracted[0])
    return done


def _cells(row: Row, columns: Iterable[str]) -> list[str]:
    return [
        f"{row[column]:,}" if column in COUNTS
        else f"{row[column]:.3f}" if column == "seconds"
        else f"{row[column] / 1e6:,.1f}"
        for column in columns
    ]  # fmt: skip


if __name__ == "__main__":
    main()
