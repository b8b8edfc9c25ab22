"""What an index looks like after the machine was started again."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec


def another_boot(index: Path) -> None:
    """Make an index one that was saved before the machine was started again."""
    content = index.read_bytes()
    end = 4 + int.from_bytes(content[:4], "little")
    version, _, *rest = msgspec.msgpack.decode(content[4:end])
    head = msgspec.msgpack.encode([version, f"before {time.monotonic_ns()}", *rest])
    index.write_bytes(len(head).to_bytes(4, "little") + head + content[end:])
