"""Manifests and trees out of thin air, for property tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from packhorse.snapshot import frames, gpu
from packhorse.snapshot.frames import LARGE_FILE, PIECE
from packhorse.snapshot.manifest import Directory, Entry, File, Frame, Hardlink, Manifest, Symlink

names = st.binary(min_size=1, max_size=20).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
modes = st.integers(0, 0o777)
times = st.integers(0, 2**61)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A manifest as a well-meaning writer makes it, of packages or of shared directories."""
    kind = draw(st.sampled_from(["packages", "shared"]))
    directories = [b""] if kind == "packages" else draw(
        st.lists(st.sampled_from([b"models", b"deps", b"pip"]), min_size=1, unique=True)
    )  # fmt: skip
    entries: dict[bytes, Entry] = {
        path: Directory(path, draw(modes), draw(times)) for path in directories if path
    }
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(directories))
        name = draw(names)
        path = parent + b"/" + name if parent else name
        if path in entries:
            continue
        which = draw(st.sampled_from(["directory", "file", "large", "symlink", "link"]))
        if which == "directory":
            entries[path] = Directory(path, draw(modes), draw(times))
            directories.append(path)
        elif which == "symlink":
            entries[path] = Symlink(path, draw(times), draw(names))
        elif which == "link":
            targets = [each for each, entry in entries.items() if isinstance(entry, File) and each < path]
            if targets:
                entries[path] = Hardlink(path, draw(st.sampled_from(targets)))
        else:
            size = draw(st.integers(LARGE_FILE, 2 * PIECE) if which == "large" else st.integers(0, 2000))
            entries[path] = File(path, draw(modes), draw(times), size, b"", ())
    labels = ["", draw(st.sampled_from(["", "80-89", "90-"])), ""]
    return _with_frames(kind, [entries[path] for path in sorted(entries)], labels)


def _with_frames(kind: Any, entries: list[Entry], labels: list[str]) -> Manifest:
    files = [entry for entry in entries if isinstance(entry, File)]
    pieces: list[list[tuple[int, int, int, int]]] = [[] for _ in files]

    def gathered(number: int) -> list[gpu.Gathered]:
        size = files[number].size
        third = size // 3
        sizes = [third, third, size - 2 * third]
        extents = [gpu.Extent(part * third, sizes[part], label) for part, label in enumerate(labels)]
        return gpu.pieces(extents, PIECE)

    cut: list[Frame] = []
    for number, each in enumerate(frames.cut([(file.path, file.size) for file in files], gathered)):
        cut.append(Frame(number.to_bytes(32, "big"), each.length, each.gpus))
        offset = 0
        for span in each.spans:
            pieces[span.file].append((span.offset, number, offset, span.length))
            offset += span.length
    whole: dict[bytes, Entry] = {
        file.path: File(
            file.path,
            file.mode,
            file.mtime,
            file.size,
            b"" if file.size >= LARGE_FILE else frames.digest_of(file.path),
            tuple(part for _, *piece in sorted(own) for part in piece),
        )
        for file, own in zip(files, pieces)
    }
    return Manifest(
        kind=kind, frames=tuple(cut), entries=tuple(whole.get(entry.path, entry) for entry in entries)
    )


def listing(base: Path) -> dict[bytes, tuple[Any, ...]]:
    """All that a snapshot promises to bring back of a tree, by path: type, mode, mtime, content, and which names
    are one file."""
    found: dict[bytes, tuple[Any, ...]] = {}
    inodes: dict[int, list[bytes]] = {}
    top = os.fsencode(base)
    pending = [b""]
    while pending:
        below = pending.pop()
        for name in os.listdir(os.path.join(top, below)):
            path = os.path.join(below, name)
            whole = os.path.join(top, path)
            status = os.lstat(whole)
            if os.path.islink(whole):
                found[path] = ("symlink", 0, status.st_mtime_ns, os.readlink(whole))
            elif os.path.isdir(whole):
                found[path] = ("directory", status.st_mode & 0o7777, status.st_mtime_ns)
                pending.append(path)
            else:
                inodes.setdefault(status.st_ino, []).append(path)
                with open(whole, "rb") as file:
                    found[path] = ("file", status.st_mode & 0o7777, status.st_mtime_ns, file.read())
    for paths in inodes.values():
        for path in paths:
            found[path] += (sorted(paths),)
    return found
