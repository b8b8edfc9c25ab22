"""The commands of `packages/bin`, made to start wherever the root and the interpreter lie.

Installers write the absolute path of the interpreter into the first line of each script. Promises that afterwards a
script starts the interpreter that `packhorse run` takes for the worker's, and that each RECORD tells its new digest.
"""

from __future__ import annotations

import ast
import io
import os
import re
import shlex
import tokenize
import warnings
from pathlib import Path

from packhorse.install import records

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
        new = head + _body(content, match.end())
        if new != content:
            records.replace(path, new)
            changed[entry.name] = new
    if changed:
        _record(packages, changed)
    return len(changed)


def _body(content: bytes, begin: int) -> bytes:
    """What comes from `begin` on, changed so that it means the same behind the head: that is a docstring, and an encoding can
    be declared in the first two lines only (PEP 263)."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content[begin:].decode(encoding)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statements = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # not for this Python
        return content[begin:]
    lines = text.encode().splitlines(keepends=True)
    if statements and _is_text(statements[0]):
        start, end = statements[0].lineno - 1, statements[0].end_lineno or 0
        # Imports from __future__ come before all but a docstring.
        after = max((each.end_lineno or 0 for each in statements if _is_future(each)), default=end)
        lines = [*lines[:start], *lines[end:after], b"__doc__ = ", *lines[start:end], *lines[after:]]
    return b"".join(lines)


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


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

    def content(path: str) -> bytes | None:
        found = re.fullmatch(r"(?:\./|(?:\.\./)+)?bin/([^/]+)", path)
        return changed.get(found[1]) if found else None

    for record in packages.glob("*.dist-info/RECORD"):
        records.correct(record, content)
