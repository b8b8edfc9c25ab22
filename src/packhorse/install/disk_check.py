"""Whether the files of `packages/` are what its distributions say: by their RECORDs, and without any network.

Promises to read and never to change. Knows nothing of snapshots: `packhorse verify` holds files against those.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import msgspec
from packaging.utils import canonicalize_name

from packhorse.install import records
from packhorse.install.wheels import place
from packhorse.progress import Progress
from packhorse.snapshot.scan import readable

_BYTECODE = re.compile(r"(?:(.*)/)?__pycache__/([^./]+)\.[^/]+\.pyc")
_METADATA = re.compile(r"(.+?)-([^-]+)\.(?:dist|egg)-info")
_SIZE = re.compile(r"[0-9]+")
_SHEBANG = re.compile(rb"#!\s*(/\S+)")
_OURS = re.compile(rb"#!/bin/sh\n'''exec' ([^\n]+?) \"\$0\" \"\$@\"\n")
_SHOWN = 20
REINSTALL = "Run `packhorse install --reinstall`."


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong (`level` problem), or that a person should know (warning).

    `check` names what was looked at, `paths` are at most the first of those it is about, `count` is how many.
    """

    check: str
    level: Literal["problem", "warning"]
    what: str
    remedy: str
    paths: list[str] = []
    count: int = 0


class _Row(NamedTuple):
    """What a RECORD says of a file: a digest such as sha256=..., and the size, "" where it says nothing."""

    digest: str
    size: str


class _Distribution(NamedTuple):
    """A distribution by its normalised name, with the directory of its metadata and the files of its RECORD."""

    name: str
    version: str
    directory: str
    files: dict[str, _Row] | None
    """None where there is no RECORD."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def check(
    packages: Path, environ: Mapping[str, str], progress: Progress, *, digests: bool = False
) -> list[Finding]:
    """All that is wrong below `packages`. `environ` is what commands start in, `digests` reads every file."""
    progress.stage("reading what the distributions say")
    closed: list[str] = []
    """Paths that this user may not read."""
    names = [name for name in sorted(os.listdir(packages)) if _METADATA.fullmatch(name)]
    found = [_read(packages, name, closed) for name in names]
    files = dict(_files(packages, closed))
    findings = list(_versions(each for each in found if not _is_below(f"{each.directory}/RECORD", closed)))
    findings += _overlaps(found)
    findings += _differences(found, packages, files, progress, digests, closed)
    if closed:  # what those distributions own is not known
        findings.append(
            _finding(
                "records",
                "problem",
                "Files may not be read by this user.",
                "Change their owner or their mode.",
                set(closed),
            )
        )
    else:
        findings += _unowned(found, files)
    findings += _commands(packages, files, environ)
    return findings


def _is_below(path: str, closed: Iterable[str]) -> bool:
    """Whether `path` is one of those that may not be read, or lies in one."""
    return any(path == each or path.startswith(f"{each}/") for each in closed)


def _read(packages: Path, directory: str, closed: list[str]) -> _Distribution:
    match = _METADATA.fullmatch(directory)
    assert match is not None
    rows: dict[str, _Row] | None = None
    try:
        with open(
            packages / directory / "RECORD", newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            rows = {}
            for row in csv.reader(file):
                if len(row) == 3 and (path := place(PurePosixPath(row[0]))) is not None:
                    rows[str(path)] = _Row(row[1], row[2])
    except PermissionError:
        closed.append(f"{directory}/RECORD")
    except (OSError, csv.Error):
        pass
    return _Distribution(canonicalize_name(match[1]), match[2], directory, rows)


def _files(packages: Path, closed: list[str]) -> Iterator[tuple[str, int]]:
    """The path of each file and link, and its size; what vanishes meanwhile, as bytecode may, is left out."""
    base = os.fspath(packages)
    pending = [base]
    while pending:
        directory = pending.pop()
        try:
            listing = os.scandir(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            closed.append(directory[len(base) + 1 :])
            continue
        with listing as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.path[len(base) + 1 :], entry.stat(follow_symlinks=False).st_size


def _finding(
    kind: str, level: Literal["problem", "warning"], what: str, remedy: str, paths: Iterable[str] = ()
) -> Finding:
    listed = sorted(paths)
    return Finding(kind, level, _shown(what), remedy, [_shown(path) for path in listed[:_SHOWN]], len(listed))


def _shown(text: str) -> str:
    return readable(os.fsencode(text))


# --- distributions ---


def _versions(found: Iterable[_Distribution]) -> Iterator[Finding]:
    """Leftovers: two versions of one distribution, or one that does not say which files are its own."""
    by_name: dict[str, list[_Distribution]] = {}
    for each in found:
        by_name.setdefault(each.name, []).append(each)
        if each.files is None and each.directory.endswith(".dist-info"):
            yield _finding(
                "leftovers",
                "problem",
                f"{each} has no RECORD: it was removed or installed in part.",
                REINSTALL,
                [each.directory],
            )
    for name, versions in by_name.items():
        if len(versions) > 1:
            listed = " and ".join(each.version for each in versions)
            yield _finding(
                "leftovers",
                "problem",
                f"{name} is there in the versions {listed}: one was not removed as a whole.",
                REINSTALL,
                [each.directory for each in versions],
            )


def _overlaps(found: Iterable[_Distribution]) -> Iterator[Finding]:
    """Files that two distributions brought with different content: the one installed last has won."""
    owners: dict[str, list[tuple[_Distribution, _Row]]] = {}
    for each in found:
        for path, row in (each.files or {}).items():
            owners.setdefault(path, []).append((each, row))
    pairs: dict[tuple[str, ...], list[str]] = {}
    for path, claims in owners.items():
        if len({row.digest for _, row in claims}) > 1 and not path.endswith(".pyc"):
            names = tuple(sorted({each.name for each, _ in claims}))
            if len(names) > 1:  # two versions of one are told as leftovers
                pairs.setdefault(names, []).append(path)
    for names, paths in pairs.items():
        yield _finding(
            "overlaps",
            "warning",
            f"{' and '.join(names)} wrote the same files with different content; the one installed last has won.",
            "Keep one of them, as with opencv-python and opencv-python-headless; or make sure that it is the right one.",
            paths,
        )


def _differences(
    found: Iterable[_Distribution],
    packages: Path,
    files: Mapping[str, int],
    progress: Progress,
    digests: bool,
    closed: list[str],
) -> Iterator[Finding]:
    """Files that are missing, or not what RECORD says: by size, and by content where that is asked for."""
    claimed: dict[str, int] = {}
    for each in found:
        for path in each.files or ():
            claimed[path] = claimed.get(path, 0) + 1
    if digests:
        progress.stage("reading every file", sum(files.get(path, 0) for path in claimed))
    for each in found:
        missing, changed = [], []
        for path, row in (each.files or {}).items():
            if path.endswith(".pyc"):
                continue  # Python writes and removes it as it likes
            if path not in files:
                if not _is_below(path, closed):
                    missing.append(path)
            elif claimed[path] > 1:
                continue  # told as an overlap, where the contents differ
            elif _SIZE.fullmatch(row.size) and row.size.lstrip("0") != str(files[path]).lstrip("0"):
                changed.append(path)
            elif digests:
                progress.advance(files[path])
                try:
                    if row.digest and not records.fits(packages / path, row.digest):
                        changed.append(path)
                except FileNotFoundError:
                    missing.append(path)
                except PermissionError:
                    closed.append(path)
        if missing:
            yield _finding("records", "problem", f"{each} lacks files.", REINSTALL, missing)
        if changed:
            yield _finding(
                "records",
                "problem",
                f"Files of {each} are not what it installed.",
                f"{REINSTALL} Changes that are meant belong into a package or a wheel of their own.",
                changed,
            )


def _unowned(found: Iterable[_Distribution], files: Mapping[str, int]) -> Iterator[Finding]:
    """Files of no distribution. Bytecode belongs to its source; an egg-info does not tell its files."""
    owned = {path for each in found for path in each.files or ()}
    silent = tuple(f"{each.directory}/" for each in found if each.files is None)
    temporary: list[str] = []
    groups: dict[str, list[str]] = {}
    for path in files:
        if path in owned or path.startswith(silent):
            continue
        top = path.partition("/")[0]
        if top.startswith("~"):
            temporary.append(path)
            continue
        if (cached := _BYTECODE.fullmatch(path)) is not None:
            source = f"{cached[1]}/{cached[2]}.py" if cached[1] else f"{cached[2]}.py"
            if source in files:
                continue
        groups.setdefault(top if "/" in path else "", []).append(path)
    if temporary:
        yield _finding(
            "leftovers", "problem", "pip was stopped while it removed a version.", REINSTALL, temporary
        )
    if groups:
        where = ", ".join(
            f"{name or 'single files'} ({len(paths):,})" for name, paths in sorted(groups.items())[:5]
        )
        more = f" and {len(groups) - 5:,} more" if len(groups) > 5 else ""
        yield _finding(
            "unowned",
            "warning",
            f"Files belong to no distribution: {where}{more}.",
            "What was put there by hand is lost with the next installation: make it a package, or keep it in deps/.",
            [path for paths in groups.values() for path in paths],
        )


# --- commands ---


def _commands(packages: Path, files: Mapping[str, int], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Commands whose interpreter is not there."""
    broken = []
    for path in files:
        if path.startswith("bin/") and path.count("/") == 1:
            interpreter = _interpreter(packages / path)
            if interpreter and shutil.which(interpreter, path=environ.get("PATH", os.defpath)) is None:
                broken.append(f"{path}: {interpreter}")
    if broken:
        yield _finding(
            "commands",
            "problem",
            "The interpreter of some commands is not here.",
            f"{REINSTALL} Or name the worker's Python by environment.python.",
            broken,
        )


def _interpreter(path: Path) -> str:
    """What starts a script, "" where it is none."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return ""
    if ours := _OURS.match(head):
        word = os.fsdecode(ours[1]).replace('"${0%/*}"', shlex.quote(str(path.parent)))
        try:
            return shlex.split(word)[0]
        except (ValueError, IndexError):
            return ""
    shebang = _SHEBANG.match(head)
    return os.fsdecode(shebang[1]) if shebang else ""
