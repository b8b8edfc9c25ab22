"""Shared libraries with GPU code, made by hand: ELF files whose sections hold fatbin containers.

Code is named as NVIDIA's compiler names it: "sm_90", "sm_90a", "sm_100f" are cubins, "compute_90" is PTX.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from packhorse.snapshot import gpu
from packhorse.snapshot.gpu import Extent

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

VARIANTS = {"": 0, "a": 1 << 20, "f": 1 << 21}
LINUX, DEBUG, CUBIN_OF_100, LZ4, ZSTD = 0x11, 0x2, 1 << 24, 0x2000, 0x8000
"""Flags as the programs `fatbinary` of CUDA 11 to 13 write them; LINUX is with 64 bits."""


class Code(NamedTuple):
    """One entry of a container, its header and its payload as they lie in the file."""

    name: str
    header: bytes
    payload: bytes


def code(
    name: str,
    size: int = 2 * gpu.LEAST_COLD,
    *,
    kind: int | None = None,
    flags: int = LINUX,
    version: int = 0x0101,
    header_size: int = 64,
    says: int | None = None,
) -> Code:
    """An entry that holds `size` bytes of code (and says that they are `says`)."""
    match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name)
    assert match is not None
    architecture = int(match[2])
    if kind is None:
        kind = 2 if match[1] == "sm" else 1
    if kind == 2 and architecture >= 100:
        flags |= CUBIN_OF_100
    fields = (kind, version, header_size, size if says is None else says, 0, 0, 8, 1, architecture, 0, 0)
    header = struct.pack("<HHIQIIHHIIIQ", *fields, flags | VARIANTS[match[3]])
    return Code(name, header.ljust(header_size, b"\0"), (name.encode() + b" ").ljust(size, b".")[:size])


def container(*entries: Code, magic: int = 0xBA55ED50, version: int = 1, says: int | None = None) -> bytes:
    """A fatbin container, whose header says that its entries have `says` bytes."""
    body = b"".join(entry.header + entry.payload for entry in entries)
    return struct.pack("<IHHQ", magic, version, 16, len(body) if says is None else says) + body


class Section(NamedTuple):
    """A section of an ELF file; `says` is the size in its header where that is a lie."""

    name: bytes
    content: bytes
    kind: int = 1
    flags: int = 0
    says: int | None = None


def library(*sections: Section) -> bytes:
    """A 64-bit ELF file with these sections, the names and the table of the sections at its end."""
    names = b"\0" + b"".join(section.name + b"\0" for section in sections) + b".shstrtab\0"
    content, table = bytearray(64), [bytes(64)]
    for name, body, kind, flags, says in (*sections, Section(b".shstrtab", names, 3)):
        content += bytes(-len(content) % 16)
        length = len(body) if says is None else says
        header = struct.pack(
            "<IIQQQQIIQQ", names.index(name), kind, flags, 0, len(content), length, 0, 0, 8, 0
        )
        table.append(header)
        content += body
    content += bytes(-len(content) % 8)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    content[:64] = ident + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, len(content), 0, 64, 0, 0, 64, len(table), len(table) - 1
    )
    return bytes(content) + b"".join(table)


def extents_of(content: bytes, path: Path) -> list[Extent]:
    """The extents of a file with this content, which is written to `path`."""
    path.write_bytes(content)
    return extents_of_file(path)


def extents_of_file(path: Path) -> list[Extent]:
    """The extents of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return gpu.extents(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def check_cover(extents: list[Extent], size: int) -> None:
    """The extents cover the file in order and without gaps, none is empty, and neighbours differ."""
    position, last = 0, None
    for extent in extents:
        assert extent.offset == position
        assert extent.length > 0
        assert extent.gpus != last
        position, last = position + extent.length, extent.gpus
    assert position == size


def with_holes(source: Path, target: Path, capability: int) -> int:
    """A copy that lacks what a GPU does not need: its bytes are zeros. Returns how many."""
    holes = 0
    with source.open("rb") as whole, target.open("wb") as sparse:
        sparse.truncate(source.stat().st_size)
        for offset, length, gpus in extents_of_file(source):
            if not gpu.needed(gpus, capability):
                holes += length
                continue
            whole.seek(offset)
            sparse.seek(offset)
            sparse.write(whole.read(length))
    return holes


def says_itself(payload: bytes) -> tuple[str, int]:
    """What code says of itself, compressed or not: a cubin in the flags of its ELF header, PTX by its .target."""
    content = payload
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        content = bytes(zstd.ZstdDecompressor().decompress(payload, max_length=4096))
    if content.startswith(b"\x7fELF"):
        flags = struct.unpack_from("<I", content, 48)[0]
        return "cubin", (flags >> 8 if content[7] == 0x41 else flags) & 0xFF  # EI_OSABI: CUDA 13, or before
    match = re.search(rb"^\.target sm_(\d+)", content, re.MULTILINE)
    return ("ptx", int(match[1])) if match else ("unknown", 0)


def installed(distribution: str, name: str) -> Path:
    """The file of an installed distribution whose name begins with `name`. Raises FileNotFoundError."""
    for file in importlib.metadata.files(distribution) or ():
        if file.name.startswith(name):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{distribution} has no {name}")


def cuobjdump(*arguments: str | Path, cwd: Path) -> str:
    """What NVIDIA's reader of GPU code prints; it writes the code that it extracts to `cwd`."""
    program = installed("nvidia-cuda-cuobjdump", "cuobjdump")
    return subprocess.run([program, *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout
