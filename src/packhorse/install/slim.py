"""The slim profile: takes out of a generation what no program needs at run time, by the rules of slim_rules.py.

Promises that metadata and licences stay, that each RECORD names what is there and nothing else, and that no
test suite goes which a module that stays imports. Knows the files of one directory, nothing of how they came.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import translate
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec
from blake3 import blake3

from packhorse import atomic
from packhorse.install import wheels
from packhorse.install.slim_rules import RULES

MARK = "packhorse-slim"
"""A file of a dist-info: this distribution is not whole, by which rules."""

_OWN_RULE = "slim-remove"
_SUITES = "test suites"
_METADATA = re.compile(r"[^/]+\.(?:dist|egg)-info/")
_BYTECODE = re.compile(r"(.*/)?__pycache__/([^./]+)\.[^/]*\.pyc")
_IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]*(\([^)]*\)|[^\n#]*)|import[ \t]+([.\w]+))", re.MULTILINE
)


class Saved(NamedTuple):
    """What a rule took out: files, and the bytes of disk that they used."""

    rule: str
    files: int
    bytes: int


def slim(directory: Path, keep: Sequence[str] = (), remove: Sequence[str] = ()) -> list[Saved]:
    """Take out of `directory` what the rules say; the patterns `keep`, and then `remove`, win over them.

    Bytecode goes with its source. Files are unlinked and never written to, so that their other hard links stay
    as they are. Returns what went, by rule.
    """
    chosen = _chosen(directory, keep, remove)
    saved = {rule: Saved(rule, 0, 0) for rule in (*(rule.name for rule in RULES), _OWN_RULE)}
    for path, rule in chosen.items():
        place = directory / path
        before = saved[rule]
        saved[rule] = Saved(rule, before.files + 1, before.bytes + place.lstat().st_blocks * 512)
        place.unlink()
    _remove_empty({parent for path in chosen for parent in PurePosixPath(path).parents}, directory)
    _correct_records(directory, chosen, mark(keep, remove))
    return [each for each in saved.values() if each.files]


def _chosen(directory: Path, keep: Sequence[str], remove: Sequence[str]) -> dict[str, str]:
    """The paths that go, each with the name of its rule."""
    kept, removed = _matcher(keep), _matcher(remove)
    rules = [(rule.name, _matcher(rule.remove), _matcher(rule.keep)) for rule in RULES]
    chosen: dict[str, str] = {}
    staying = []
    for path in _files(directory):
        names = (path, _source(path))
        if _METADATA.match(path) or any(map(kept, names)):
            rule = ""
        elif any(map(removed, names)):
            rule = _OWN_RULE
        else:
            fitting = (
                name for name, goes, stays in rules if any(map(goes, names)) and not any(map(stays, names))
            )
            rule = next(fitting, "")
        if rule:
            chosen[path] = rule
        else:
            staying.append(path)
    return _without_imported_suites(directory, chosen, staying)


def would_go(path: str) -> bool:
    """Whether the rules take a file, if nothing imports it."""
    return not _METADATA.match(path) and any(
        _matcher(rule.remove)(path) and not _matcher(rule.keep)(path) for rule in RULES
    )


def _files(directory: Path) -> Iterator[str]:
    for parent, _, names in os.walk(directory):
        below = os.path.relpath(parent, directory)
        yield from (name if below == "." else f"{below}/{name}" for name in names)


def _source(path: str) -> str:
    """Of bytecode the path of its source (PEP 3147), of other files their own."""
    cached = _BYTECODE.fullmatch(path)
    return f"{cached[1] or ''}{cached[2]}.py" if cached else path


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path or its last part fits one of `patterns`, as in run.exclude."""
    regular = _compiled(tuple(patterns))
    return lambda path: bool(regular.match(path) or regular.match(path.rpartition("/")[2]))


@lru_cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)) or "(?!)")


def _without_imported_suites(directory: Path, chosen: dict[str, str], staying: list[str]) -> dict[str, str]:
    """`chosen` without the test suites that a module that stays imports: some packages do, as tables does."""
    suites: dict[str, list[str]] = {}
    for path, rule in chosen.items():
        if rule == _SUITES:
            suites.setdefault(_suite(path.split("/")[:-1]), []).append(path)
    modules = [path for path in staying if path.endswith(".py")]
    while modules and suites:
        path = modules.pop()
        text = (directory / path).read_bytes()
        if b"tests" in text:
            for suite in _imported_suites(path, text):
                for each in suites.pop(suite, ()):
                    del chosen[each]
                    modules += [each] if each.endswith(".py") else []
    return chosen


def _suite(parts: Sequence[str]) -> str:
    """The path of the test suite that a directory belongs to."""
    return "/".join(parts[: parts.index("tests") + 1])


def _imported_suites(path: str, text: bytes) -> Iterator[str]:
    for match in _IMPORT.finditer(text):
        module = (match[1] or match[3]).decode("ascii", "replace")
        dots = len(module) - len(module.lstrip("."))
        parts = path.split("/")[:-dots] if dots else []
        parts += [part for part in module.split(".") if part]
        if "tests" not in parts and re.search(rb"\btests\b", match[2] or b""):
            parts.append("tests")
        if "tests" in parts:
            yield _suite(parts)


def _remove_empty(directories: Collection[PurePosixPath], base: Path) -> None:
    for below in sorted(directories, reverse=True):  # deepest first
        directory = base / below
        if directory != base and not any(os.scandir(directory)):
            directory.rmdir()


def mark(keep: Sequence[str], remove: Sequence[str]) -> str:
    """What the dist-info of a distribution says from which these rules took something."""
    rules = [sorted(keep), sorted(remove), RULES]
    return blake3(msgspec.json.encode(rules)).hexdigest()


def marked(info: Path) -> str:
    """The mark in a dist-info; "" where the distribution is whole."""
    try:
        return (info / MARK).read_text("ascii")
    except FileNotFoundError:
        return ""


def _correct_records(directory: Path, gone: Collection[str], mark: str) -> None:
    """Take what went out of each distribution's RECORD, by a new file, and leave the mark."""
    for record in directory.glob("*.dist-info/RECORD"):
        rows = [row for row in csv.reader(io.StringIO(record.read_text("utf-8"))) if row]
        left = [row for row in rows if str(wheels.place(PurePosixPath(row[0]))) not in gone]
        if len(left) < len(rows):
            marking = f"{record.parent.name}/{MARK}"
            atomic.write_file(directory / marking, mark.encode(), mode=0o644)
            left = [*(row for row in left if row[0] != marking), [marking, "", ""]]
            written = io.StringIO()
            csv.writer(written, lineterminator="\n").writerows(left)
            atomic.write_file(record, written.getvalue().encode(), mode=record.stat().st_mode & 0o777)
