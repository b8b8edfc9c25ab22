"""The pip engine: runs pip so that all it writes lies inside the root, and tells why it failed.

Promises that indexes, certificates and credentials of the user's own pip configuration keep working, that
nothing in it can lead the installation elsewhere, and that no credentials reach the log or an error.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec

from packhorse import redirect
from packhorse.config import Network
from packhorse.errors import IntegrityError, NoSpaceError, PackhorseError
from packhorse.install import access, network, process
from packhorse.install.chosen import Chosen, from_report
from packhorse.install.interpreter import Interpreter
from packhorse.install.log import Log, without_credentials
from packhorse.progress import Progress
from packhorse.session import Session
from packhorse.watch.disk import Watch

_SHOWN = 10_000_000
"""Bytes from which a download is a stage of its own in the progress."""
NEARLY_FULL = 8 << 20
"""Free bytes below which a disk is taken for the reason of a failure."""
_LAZILY = "Obtaining dependency information from"
_EXPERIMENT = "WARNING: pip is using lazily downloaded wheels"
"""Said whenever it is asked to, which packhorse does: where that fails it asks otherwise."""
_RESUMING = re.compile(r"Attempting to resume incomplete download \(([^/]+)/([^,]+),")

# pip reads every option from PIP_<OPTION> too. What would install elsewhere, or nothing, or more:
_REMOVED = (
    *("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_LOG", "PIP_LOG_FILE"),
    *("PIP_REQUIREMENT", "PIP_EDITABLE", "PIP_GROUP", "PIP_REQUIREMENTS_FROM_SCRIPT"),
    *("PIP_PLATFORM", "PIP_PYTHON_VERSION", "PIP_IMPLEMENTATION", "PIP_ABI"),
    "PACKHORSE_PACKAGES",
)
# Those that a pip.conf may turn on, where only a value turns them off:
_OFF = (
    *("PIP_USER", "PIP_DRY_RUN", "PIP_REQUIRE_VIRTUALENV", "PIP_NO_CLEAN", "PIP_VERBOSE", "PIP_QUIET"),
    *("PIP_UPGRADE", "PIP_DEBUG"),
)


class Command(NamedTuple):
    """The words that start a pip for an interpreter, and pip's version."""

    words: tuple[str, ...]
    version: tuple[int, int]
    lazily: bool = False
    """Whether it can read a wheel's metadata by range requests."""

    @property
    def python(self) -> tuple[str, ...]:
        """The words that start the Python that it runs in: the interpreter's, which pip's --python starts by itself."""
        return self.words[-1:] if "--python" in self.words else self.words[:2]

    @property
    def reports(self) -> bool:
        """Whether it tells what it would install without downloading it (pip's changelog, 23.3)."""
        return self.version >= (23, 3)


def find(interpreter: Interpreter, environ: Mapping[str, str]) -> Command:
    """The interpreter's own pip, else that of packhorse's Python; the first that reports, if one does.

    Raises PackhorseError where there is none.
    """
    found = []
    for path, more, oldest in (
        (interpreter.path, (), (9, 0)),
        (sys.executable, ("--python", interpreter.path), (22, 3)),
    ):
        version, lazily = _version(path, environ)
        if version is not None and version >= oldest:
            found.append(Command((path, "-I", "-m", "pip", *more), version, lazily))
            if found[-1].reports:
                return found[-1]
    if found:
        return found[0]
    raise PackhorseError(
        f"There is no pip for {interpreter.path} (Python {interpreter.version}).",
        f"Run `{shlex.quote(interpreter.path)} -m ensurepip`, or install pip beside packhorse.",
    )


_VERSION = """\
import os, pip
with open(os.path.join(os.path.dirname(pip.__file__), "_internal", "cli", "cmdoptions.py")) as file:
    print(pip.__version__, "fast-deps" in file.read())
"""


def _version(path: str, environ: Mapping[str, str]) -> tuple[tuple[int, int] | None, bool]:
    answer = subprocess.run(
        [path, "-I", "-c", _VERSION],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    version, _, lazily = answer.stdout.strip().partition(" ")
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    found = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return found, lazily == "True"


@dataclass(frozen=True)
class Engine:
    """pip, for one installation."""

    interpreter: Interpreter
    environ: Mapping[str, str]
    """The environment of the caller; the engine makes pip's out of it."""
    directory: Path
    """Where relative paths in requirements files lead from."""
    settings: Network
    session: Session
    log: Log
    watch: Watch
    progress: Progress
    note: Callable[[str], None]
    holding: int | None = None
    """A descriptor that pip inherits: the lock it holds is free when no pip writes any more."""
    keep_downloads: bool = False
    sleep: Callable[[float], None] = time.sleep

    def install(self, requirements: Sequence[str], lines: Sequence[str], target: Path, *options: str) -> None:
        """Install into `target` what the files `requirements` and the `lines` of another such file say.

        Raises PackhorseError with pip's last lines, NoSpaceError where a full disk was the reason.
        """
        self._run(self.command, requirements, lines, target, *options)

    def resolve(
        self, requirements: Sequence[str], lines: Sequence[str], target: Path, *more: str
    ) -> list[Chosen] | None:
        """What `install` would bring, by exact files; None where this pip does not tell it. Raises as `install`."""
        command = self.command
        if not command.reports:
            return None
        self.progress.stage("resolving")
        report = self.session.tmp / "chosen.json"
        options = ("--dry-run", "--report", str(report), *more)
        lazily = ("--use-feature", "fast-deps") if command.lazily else ()
        try:
            self._run(command, requirements, lines, target, *options, *lazily)
        except PackhorseError:
            # Some servers refuse the questions that this asks (HEAD of a signed URL), and pip ends there.
            if not lazily or _LAZILY not in self.log.last_lines:
                raise
            self._run(command, requirements, lines, target, *options)
        return list(from_report(msgspec.json.decode(report.read_bytes())))

    @cached_property
    def pip_environ(self) -> dict[str, str]:
        """The environment that pip runs in."""
        return pip_environ(self.session, self.environ, keep_downloads=self.keep_downloads)

    @cached_property
    def pip_settings(self) -> dict[str, str]:
        """What pip takes from its configuration, by the name of the option."""
        return access.pip_settings(self.command.words, self.pip_environ)

    @cached_property
    def command(self) -> Command:
        """The pip that is used. Raises PackhorseError where there is none."""
        return find(self.interpreter, self.pip_environ)

    def _run(
        self, command: Command, requirements: Sequence[str], lines: Sequence[str], target: Path, *options: str
    ) -> None:
        # Hashes are asked for by options: not for wheels, whose hashes packhorse checks itself.
        environ = {**self.pip_environ, "PIP_REQUIRE_HASHES": "0"}
        files = list(requirements)
        if lines:
            # A file, not arguments: what stands in URLs is nobody's who lists processes.
            path = self.session.tmp / "dependencies.txt"
            path.touch(mode=0o600)
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            files.append(str(path))
        arguments = [
            *("install", "--target", str(target), "--cache-dir", environ["PIP_CACHE_DIR"], "--retries", "0"),
            *("--no-input", "--disable-pip-version-check", "--no-warn-script-location"),
            *("--progress-bar", "raw" if command.version >= (24, 1) else "on"),
            *("--prefix", "", "--root", "/"),  # what these are without a pip.conf
            *options,
            *(word for file in files for word in ("--requirement", file)),
        ]
        attempts = network.Attempts(self.settings, self.note, self.sleep)
        attempts.run(lambda timeout: self._attempt([*command.words, *arguments], environ, timeout))

    def _attempt(self, command: Sequence[str], environ: Mapping[str, str], timeout: float) -> None:
        details = self.session.tmp / "pip-details.log"
        details.unlink(missing_ok=True)
        command = [*command, "--timeout", f"{timeout:g}", "--log", str(details)]
        self.log.begin(command)
        self.watch.reset_lowest()
        reader = _Reader(self)
        ended = process.run(
            command,
            environ=environ,
            directory=self.directory,
            on_line=reader.line,
            holding=self.holding,
        )
        skipped = network.skipped_pages(_lines(details))
        if ended.code == 0:
            for line in skipped:
                self.note(f"warning: pip went on without an index that did not answer. {line}")
            return
        self.watch.look()
        what = "resolve the requirements" if "--dry-run" in command else "install the environment"
        raise self._error(
            network.judge(reader.output, _lines(details), reader.unfinished),
            ended.code,
            reader.too_large,
            what,
        )

    def _error(self, failure: network.Failure, code: int, too_large: bool, what: str) -> PackhorseError:
        """What to raise. A full disk is looked for first: pip words it as a network that broke."""
        said = f"pip's last lines were:\n{self.log.last_lines}"
        whole = f"Its whole output is in {self.log.path}."
        full = self.watch.lowest_free < NEARLY_FULL
        if full or failure.kind == "space" or (failure.kind == "network" and too_large):
            return NoSpaceError(
                f"The disk of {self.session.root.path} was full while pip worked. {said}",
                f"Free some space, or choose a root on a larger disk with --root. {whole}",
            )
        if failure.kind == "network":
            file = f" ({failure.file})" if failure.file else ""
            return network.NetworkError(
                failure,
                f"pip could not download all it needs: {failure.reason}{file}. {said}",
                f"Check the network, and try again. {whole}",
            )
        if failure.kind == "hash":
            return IntegrityError(
                f"pip found a file with another hash than was announced. {said}",
                f"Somebody or something changed it. Find out what before you install it. {whole}",
            )
        how = f"exit code {code}" if code >= 0 else process.signal_name(-code)
        return PackhorseError(
            f"pip could not {what} ({how}). {said}",
            f"Correct the requirements, or what pip complains about, and try again. {whole}",
        )


class _Reader:
    """Follows the output of one pip: into the log and the progress, and keeps it for the judgement."""

    def __init__(self, engine: Engine) -> None:
        self._log, self._watch, self._session = engine.log, engine.watch, engine.session
        self._progress, self._note = engine.progress, engine.note
        self.output: list[str] = []
        self.too_large = False
        """A file was larger than what was free when its download began."""
        self._file = network.Download("", 0)
        self.unfinished: network.Download | None = None
        """A file of which not all has arrived, by the last that pip said about it."""
        self._shown = -1

    def line(self, text: str) -> None:
        """Take the next line; pip says something at least every minute, so that the session stays alive."""
        self._session.heartbeat()
        free = self._watch.look()  # at errors too: before pip removes what filled the disk
        if (arrived := network.progress(text)) is not None:
            self._advance(*arrived)
            return
        if text.startswith(_EXPERIMENT):
            return
        line = self._log.add(text)
        self.output.append(line)
        if started := network.download(line):
            if started.file != self._file.file:
                self._shown = -1
            self._file = started
            self.unfinished = None
            self.too_large = self.too_large or started.size > free
        elif resuming := _RESUMING.search(line):
            self._note(
                f"{self._file.file}: the connection broke at {resuming[1]} of {resuming[2]}, going on from there"
            )
        elif line.startswith("Installing collected packages:"):
            self._progress.stage("installing")

    def _advance(self, arrived: float, total: float) -> None:
        self.unfinished = self._file if arrived < total else None
        if total < _SHOWN:
            return
        if self._shown < 0:
            self._progress.stage(f"downloading {self._file.file}", int(total))
            self._shown = 0
        if arrived > self._shown:  # not so at first where pip had to begin again
            self._progress.advance(int(arrived) - self._shown)
            self._shown = int(arrived)


def pip_environ(
    session: Session, inherited: Mapping[str, str], *, keep_downloads: bool = False
) -> dict[str, str]:
    """The environment of pip: under the redirect table, but out of sight of the worker's packages."""
    root = session.root
    changed = redirect.changes(
        root, inherited, tmp=session.tmp, build=session.build, keep_downloads=keep_downloads
    )
    changed |= {"PYTHONPATH": _without_root(inherited.get("PYTHONPATH", ""), root.path)}
    changed |= {"PATH": _without_root(inherited.get("PATH", os.defpath), root.path)}
    changed |= dict.fromkeys(_REMOVED) | dict.fromkeys(_OFF, "0")
    # COLUMNS: pip breaks its messages at the width of a terminal, through the names of files too.
    changed |= {"PIP_ROOT_USER_ACTION": "ignore", "COLUMNS": "1000"}
    changed |= {"PIP_SRC": str(root.deps / "src"), "PIP_REPORT": str(session.tmp / "pip-report.json")}
    return redirect.environment(inherited, changed)


def _without_root(path_list: str, root: Path) -> str | None:
    kept = [part for part in path_list.split(os.pathsep) if part and root not in Path(part).parents]
    return os.pathsep.join(kept) or None


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from (without_credentials(line.rstrip("\n")) for line in file)
    except FileNotFoundError:
        return
