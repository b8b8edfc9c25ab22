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


def main() -> None:
    """Measure, check if asked to, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="where to look for libraries, links not followed")
    parser.add_argument(
        "--gpus", default="sm_86,sm_90,sm_120", help="the GPUs to count for (default: %(default)s)"
    )
    parser.add_argument(
        "--compress", action="store_true", help="compress the frames of both cuts with zstd -3"
    )
    parser.add_argument("--check", action="store_true", help="hold all against cuobjdump")
    arguments = parser.parse_args()
    gpus = gpu.parse_gpus(arguments.gpus) or ()

    columns = ["size", *(f"cold sm_{number}" for number in gpus), "extents", "frames", "plain cut", "seconds"]
    columns += ["stored", "stored, plain"] if arguments.compress else []
    print("| library |", " | ".join(columns), "|")
    print("| --- |", " | ".join("---:" for _ in columns), "|")
    total: Counter[str] = Counter()
    for path in sorted(arguments.directory.rglob("*.so*")):
        if path.is_symlink() or not path.is_file():
            continue
        row = _measured(path, gpus, compress=arguments.compress)
        total["all libraries"] += 1
        total["seconds for all libraries"] += row.pop("seconds for all libraries", 0)
        if "size" in row:
            _print(path.name, row, columns)
            total.update(row)
            if arguments.check:
                total.update(_checked(path, gpus))
    _print("together", total, columns)
    for name in sorted(set(total) - set(columns)):
        value = total[name] / 1e6 if name.startswith("seconds") else total[name]
        print(f"{name}: {value:,.6g}", file=sys.stderr)


def _measured(path: Path, gpus: Iterable[int], *, compress: bool) -> Counter[str]:
    """One row of the table; sizes are bytes, seconds millionths."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    started = time.perf_counter()
    extents = gpu.extents(descriptor, size)
    spent = round((time.perf_counter() - started) * 1e6)
    row = Counter({"seconds for all libraries": spent})
    if len(extents) > 1:
        ours = [frame.runs for frame in gpu.pieces(extents, frames.PIECE)]
        plain = [frame.runs for frame in gpu.pieces([Extent(0, size, "")], frames.PIECE)]
        row.update({"size": size, "extents": len(extents), "seconds": spent})
        row.update({"frames": len(ours), "plain cut": len(plain)})
        for number in gpus:
            row[f"cold sm_{number}"] = sum(
                extent.length for extent in extents if not gpu.needed(extent.gpus, number)
            )
        if compress:
            row["stored"] = _stored(descriptor, ours)
            row["stored, plain"] = _stored(descriptor, plain)
    os.close(descriptor)
    return row


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


def _print(name: str, row: Counter[str], columns: Iterable[str]) -> None:
    cells = []
    for column in columns:
        value = row[column]
        if column in {"extents", "frames", "plain cut"}:
            cells.append(f"{value:,}")
        else:
            cells.append(f"{value / 1e6:,.3f}" if column == "seconds" else f"{value / 1e6:,.1f} MB")
    print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
