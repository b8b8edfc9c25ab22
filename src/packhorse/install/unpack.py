"""A wheel's file → an installed distribution in a directory, as `pip install --target` lays it out.

Promises that the same wheel gives the same files everywhere, times and bytecode included, so that snapshots of
two installations share their bytes; and that no file is written through a hard link that others hold.
"""

from __future__ import annotations

import calendar
import configparser
import contextlib
import csv
import os
import posixpath
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from packhorse.errors import PackhorseError
from packhorse.install import process, records, wheels
from packhorse.install.downloads import RefusedError
from packhorse.install.interpreter import Interpreter
from packhorse.install.log import Log, without_signature

if TYPE_CHECKING:
    from installer.destinations import SchemeDictionaryDestination
    from installer.records import RecordEntry
    from installer.utils import Scheme

_BYTECODE = re.compile(r"(.+?)\.[^.]+(?:\.opt-[^.]+)?\.pyc")
"""PEP 3147 and PEP 488; the names of sources may have dots."""
PROVENANCE = "provenance_url.json"
"""Which file a distribution was made from (PEP 710)."""

# Like pip: what cannot be compiled is no error. The times of sources decide, whatever SOURCE_DATE_EPOCH says.
_COMPILE = """\
import concurrent.futures, os, py_compile, sys, warnings
warnings.simplefilter("ignore")
base, final = sys.argv[1:3]
def compile(name):
    try:
        py_compile.compile(os.path.join(base, name), dfile=os.path.join(final, name), doraise=True,
                           invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    except Exception:
        pass
with open(sys.argv[3]) as file:
    names = file.read().splitlines()
workers = min(len(os.sched_getaffinity(0)), len(names) // 50 + 1)
if workers == 1:
    for name in names:
        compile(name)
else:
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for _ in pool.map(compile, names, chunksize=20):
            pass
"""


def unpack(
    wheel: Path,
    directory: Path,
    interpreter: Interpreter,
    metadata: Mapping[str, bytes],
    digest: str,
    before: Callable[[], None] = lambda: None,
    settle: Callable[[Path, Path], None] = os.replace,
) -> str:
    """Install the wheel's files, with `metadata` (name in its dist-info → content) besides, without bytecode.

    Returns the name of its dist-info. `digest` is the wheel's SHA-256. `before` is called before each file, and may
    raise; `settle` moves one that is written to its place. Raises PackhorseError where the file is no whole wheel,
    RefusedError where pip has to install it, OSError where it cannot be written.
    """
    import installer
    from installer.exceptions import InstallerError, InvalidWheelSource
    from installer.sources import WheelFile

    class Source(WheelFile):
        @cached_property
        def data_dir(self) -> str:
            # As pip: by its end. A wheel that was renamed has another version in its name.
            names = self._zipfile.namelist()
            parts = (name.partition("/") for name in names)
            found = {top for top, slash, _ in parts if slash and top.endswith(".data")}
            named = super().data_dir
            chosen = named if named in found else min(found, default=named)
            if chosen in names:  # installer would look for its directory without an end
                raise ValueError(f"{chosen} is a file")
            return chosen

    # It says so of each file of bytecode that it leaves out. All is compiled here.
    warnings.filterwarnings("ignore", r"Skip installing .*__pycache__", RuntimeWarning)
    try:
        with Source.open(wheel) as source:
            installer.install(
                source, _destination(wheel, directory, interpreter, digest, before, settle), dict(metadata)
            )
            return source.dist_info_dir
    except configparser.Error as error:  # nothing was written yet
        raise RefusedError(f"its entry points cannot be read here ({error})") from error
    except (
        InstallerError,
        ValueError,
        KeyError,
        AssertionError,  # installer's, without a word
        RuntimeError,  # zipfile's, for a password or a compression that it does not know
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        EOFError,
        csv.Error,  # of a RECORD whose quotes do not end
    ) as error:
        reason = "an entry point names no function" if isinstance(error, AssertionError) else error
        if isinstance(error, InvalidWheelSource):
            _, reason = error.args  # the source comes first
        raise PackhorseError(
            f"{wheel.name} is not a whole wheel: {reason}.", "Build or download it again, or choose another."
        ) from error


def _destination(
    wheel: Path,
    directory: Path,
    interpreter: Interpreter,
    digest: str,
    before: Callable[[], None],
    settle: Callable[[Path, Path], None],
) -> SchemeDictionaryDestination:
    from installer.destinations import SchemeDictionaryDestination
    from installer.records import RecordEntry

    time, temporary = _time(wheel, digest), f".{digest[:16]}"

    class Destination(SchemeDictionaryDestination):
        def write_to_fs(
            self, scheme: Scheme, path: str, stream: BinaryIO, is_executable: bool
        ) -> RecordEntry:
            before()
            place = self._path_with_destdir(scheme, path)
            os.makedirs(place.parent, exist_ok=True)
            # Renamed into its place: another wheel may bring the same file at the same moment, and what lies there
            # may be a hard link.
            own = posixpath.join(posixpath.dirname(path), temporary)
            entry = super().write_to_fs(scheme, own, stream, is_executable)
            written = self._path_with_destdir(scheme, own)
            os.utime(written, (time, time))
            settle(written, place)
            return RecordEntry(path, entry.hash_, entry.size)

    base = os.fspath(directory)
    name = wheel.name.partition("-")[0]
    return Destination(
        {
            "purelib": base,
            "platlib": base,
            "scripts": os.path.join(base, "bin"),
            "data": base,
            "headers": os.path.join(base, "include", f"python{interpreter.minor}", name),
        },
        interpreter=interpreter.path,
        script_kind="posix",
    )


def _time(wheel: Path, digest: str) -> int:
    """The time that a wheel's files get, in seconds: that of its newest file, less up to a day by its digest.

    Many wheels have the same time in all versions; what is cached by time and size must not outlive a version.
    """
    with zipfile.ZipFile(wheel) as archive:
        newest = max((_seconds(*each.date_time) for each in archive.infolist()), default=86400)
    return newest - int(digest[:8], 16) % 86400


def _seconds(year: int, month: int, day: int, *time: int) -> int:
    """Since 1970; a month and a day of 0 are what writers put there that know no time."""
    return calendar.timegm((year, min(max(month, 1), 12), max(day, 1), *time, 0, 0, 0))


def compile_sources(
    directory: Path,
    infos: Iterable[str],
    final: Path,
    interpreter: Interpreter,
    *,
    environ: Mapping[str, str],
    scratch: Path,
    log: Log,
) -> None:
    """Write the bytecode of distributions in `directory`, named by their dist-info, and add it to their RECORD.

    The worker's Python does it, on all cores. Tracebacks will say that the sources lie in `final`. `scratch` is an
    empty directory.
    """
    listed = scratch / "sources.txt"
    sources = {info: [name for name in recorded(directory / info) if name.endswith(".py")] for info in infos}
    names = [name for each in sources.values() for name in each if "\n" not in name]
    listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    command = [
        interpreter.path,
        "-I",
        "-S",
        "-X",
        "utf8",
        "-c",
        _COMPILE,
        str(directory),
        str(final),
        str(listed),
    ]

    def on_line(line: str) -> None:
        log.add(line)

    process.run(command, environ=environ, directory=scratch, on_line=on_line)
    for info, each in sources.items():
        _record_bytecode(directory, info, each)


def recorded(info: Path) -> Iterator[str]:
    """The paths that a distribution's RECORD names, from the directory in which its files lie."""
    with open(info / "RECORD", encoding="utf-8", newline="") as record:
        for row in csv.reader(record):
            below = wheels.place(PurePosixPath(row[0])) if row else None
            if below is not None:
                yield str(below)


def hide_signatures(directory: Path) -> None:
    """Take the signing parameters of URLs out of what pip notes of where a distribution came from."""
    for file in directory.glob("*.dist-info/direct_url.json"):
        told = file.read_text(encoding="utf-8")
        hidden = without_signature(told)
        if hidden != told:
            file.write_text(hidden, encoding="utf-8")
            changed = {f"{file.parent.name}/{file.name}": hidden.encode()}
            records.correct(file.with_name("RECORD"), changed.get)


def as_recorded(info: Path, which: Collection[str]) -> bool:
    """Whether those of a distribution's files that are among `which` are the ones of its RECORD."""
    with open(info / "RECORD", encoding="utf-8", newline="") as record:
        for path, digest, *_ in filter(None, csv.reader(record)):
            below = str(wheels.place(PurePosixPath(path)))
            known = below in which and digest.startswith("sha256=")
            if known and not records.fits(info.parent / below, digest):
                return False
    return True


def _record_bytecode(directory: Path, info: str, sources: Sequence[str]) -> None:
    stems: dict[str, set[str]] = {}
    for source in sources:
        parent, _, name = source.rpartition("/")
        stems.setdefault(parent, set()).add(name.removesuffix(".py"))
    with open(directory / info / "RECORD", "a", encoding="utf-8", newline="") as record:
        rows = csv.writer(record, lineterminator="\n")
        for parent, names in sorted(stems.items()):
            cache = f"{parent}/__pycache__" if parent else "__pycache__"
            with contextlib.suppress(FileNotFoundError):
                for file in sorted(os.listdir(directory / cache)):
                    made = _BYTECODE.fullmatch(file)
                    if made is not None and made[1] in names:
                        rows.writerow([f"{cache}/{file}", "", ""])
