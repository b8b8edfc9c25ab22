"""The commands of `packages/bin`, made to start wherever the root and the interpreter lie.

Installers write the absolute path of the interpreter into the first line of each script. Promises that afterwards a
script starts the interpreter that `packhorse run` takes for the worker's, and that each RECORD tells its new digest.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shlex
import stat
from pathlib import Path

from packhorse import atomic

_PYTHON = re.compile(
    # The first line, or what distlib and installer write where that would be too long or hold a space (execve(2)).
    rb"#!\s*/[^\r\n]*/(?:python|pypy)[\d.]*[a-z]?(?P<options>[ \t][^\r\n]*)?\r?\n"
    rb"|#!/bin/sh\r?\n'''exec' (?:\"[^\"\n]*\"|'[^'\n]*'|[^\s\"'])+(?P<more>[^\n]*?) \"\$0\" \"\$@\"\r?\n' '''\r?\n"
)
_ENV = re.compile(rb"#!\s*/usr/bin/env (?:-S )?(?:python|pypy)[\d.]*(?P<options>[^\r\n]*)\r?\n")
_OURS = re.compile(rb"#!/bin/sh\n'''exec' [^\n]*\n' '''  # packhorse(?P<options>[^\n]*)\n")
"""A script that came from the generation before, perhaps of another interpreter."""


def make_relocatable(packages: Path, configured: str, root: Path) -> int:
    """Rewrite the scripts in `packages/bin` that a Python runs; returns how many.

    `configured` is environment.python: a path, a name, or "" for the first python3 on the PATH of the worker. An
    interpreter inside `root` is found from the script's own place.
    """
    directory = packages / "bin"
    start = _start(configured, root)
    changed: dict[str, bytes] = {}
    for entry in sorted(os.scandir(directory), key=lambda each: each.name) if directory.is_dir() else ():
        if not entry.is_file(follow_symlinks=False):
            continue
        path = directory / entry.name
        content = path.read_bytes()
        match = _OURS.match(content) or _ENV.match(content) or _PYTHON.match(content)
        if match is None:
            continue
        said = filter(None, (each and each.strip() for each in match.groupdict().values()))
        options = b"".join(b" " + each for each in said)
        # A command for the shell, a text for Python.
        head = b"#!/bin/sh\n'''exec' %s%s \"$0\" \"$@\"\n' '''  # packhorse%s\n" % (start, options, options)
        new = head + content[match.end() :]
        if new != content:
            _replace(path, new)
            changed[entry.name] = new
    if changed:
        _record(packages, changed)
    return len(changed)


def _replace(path: Path, content: bytes) -> None:
    """By a new file, since the old one may have other hard links; with its mode, and its times, so that two
    installations of the same wheels stay the same."""
    before = path.stat()
    atomic.write_file(path, content)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _start(configured: str, root: Path) -> bytes:
    """The interpreter as a word for the shell."""
    if "/" not in configured:
        return os.fsencode(shlex.quote(configured or "python3"))
    path = Path(configured)
    if root in path.parents:
        below = shlex.quote(f"/../../{path.relative_to(root)}")
        return b'"${0%/*}"' + os.fsencode(below)
    return os.fsencode(shlex.quote(configured))


def _record(packages: Path, changed: dict[str, bytes]) -> None:
    """Correct the lines about changed scripts: below `packages` a script is named as `../../bin/NAME`."""
    for record in packages.glob("*.dist-info/RECORD"):
        text = record.read_text(encoding="utf-8", errors="surrogateescape")
        rows = list(csv.reader(io.StringIO(text)))
        new = [_row(row, changed) for row in rows]
        if new != rows:
            lines = io.StringIO()
            csv.writer(lines, lineterminator="\n").writerows(new)
            _replace(record, lines.getvalue().encode(errors="surrogateescape"))


def _row(row: list[str], changed: dict[str, bytes]) -> list[str]:
    path = re.fullmatch(r"(?:\./|(?:\.\./)+)?bin/([^/]+)", row[0]) if row else None
    if path is None or path[1] not in changed:
        return row
    content = changed[path[1]]
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [row[0], f"sha256={digest}", str(len(content))]
