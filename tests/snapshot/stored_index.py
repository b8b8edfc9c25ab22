"""Stored indexes as another machine start or another version of packhorse left them."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec


def another_boot(index: Path) -> None:
    """Make an index one that was saved before the machine was started again."""
    _change_head(index, 1, f"before {time.monotonic_ns()}")


def another_version(index: Path, version: int) -> None:
    """Make an index one of a version."""
    _change_head(index, 0, version)


def _change_head(index: Path, field: int, value: object) -> None:
    content = index.read_bytes()
    end = 4 + int.from_bytes(content[:4], "little")
    head = msgspec.msgpack.decode(content[4:end])
    head[field] = value
    encoded = msgspec.msgpack.encode(head)
    index.write_bytes(len(encoded).to_bytes(4, "little") + encoded + content[end:])
