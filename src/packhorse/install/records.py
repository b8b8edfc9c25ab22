"""RECORD: what a distribution says of its files (PyPA, "Recording installed projects").

Promises that a RECORD which is corrected is replaced by a new file: the old one may have other hard links.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

from packhorse import atomic

_PIECE = 1 << 20


def correct(record: Path, changed: Callable[[str], bytes | None]) -> None:
    """Correct the lines of files that have a new content, which `changed` tells by the path in RECORD; None for others."""
    text = record.read_text(encoding="utf-8", errors="surrogateescape")
    rows = list(csv.reader(io.StringIO(text)))
    new = [_row(row, changed(row[0])) if row else row for row in rows]
    if new != rows:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(new)
        replace(record, lines.getvalue().encode(errors="surrogateescape"))


def _row(row: list[str], content: bytes | None) -> list[str]:
    if content is None:
        return row
    return [row[0], f"sha256={_encoded(hashlib.sha256(content).digest())}", str(len(content))]


def replace(path: Path, content: bytes) -> None:
    """Replace a file of a distribution by a new one, with its mode, and its times, so that two installations of the same
    wheels stay the same."""
    before = path.stat()
    atomic.write_file(path, content)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def fits(path: Path, digest: str) -> bool:
    """Whether a file has the digest of a RECORD; one by an unknown method is taken for right."""
    method, _, expected = digest.partition("=")
    if method not in hashlib.algorithms_available:
        return True
    made = hashlib.new(method, usedforsecurity=False)
    if not made.digest_size:  # shake_128 and shake_256: of any length
        return True
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            made.update(piece)
    return _encoded(made.digest()) == expected


def _encoded(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
