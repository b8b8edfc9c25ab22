"""Bench: what a start of this worker costs here, restored, installed anew and by a plain pip, in time and money.

Promises that nothing is written but below the root's tmp/, which is removed in the end, and one line of history; that
the root's packages and the store are left as they are; and that each step begins with an empty root.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from packhorse import atomic, redirect, session
from packhorse.errors import UNREADABLE, PackhorseError
from packhorse.install import lock, pip, process
from packhorse.install.log import without_credentials
from packhorse.progress import Progress
from packhorse.root import Root
from packhorse.session import Session
from packhorse.snapshot import manifest as documents
from packhorse.store import tags
from packhorse.transfer.pull import MARGIN, Target, find
from packhorse.transfer.setup import Setup
from packhorse.watch.disk import usage
from packhorse.worker.run import OWN

_HISTORY = "bench.jsonl"
_KEPT = 100
"""Runs that the history keeps."""
_SHOWN = 15
_LEFT_OUT = "the plain pip is left out"
# What the worker would do beside starting: nothing of it may reach the store, and nothing be installed unasked.
_RESTORE_ONLY = {
    "PACKHORSE_RUN_BACKUP": "[]",
    "PACKHORSE_RUN_BACKUP_EVERY": "off",
    "PACKHORSE_RUN_ON_MISSING": "fail",
    "PACKHORSE_RUN_ON_RESTORE_FAILURE": "fail",
}


class Prices(msgspec.Struct, frozen=True):
    """US dollars: for an hour of this worker, and for a GB (10^9 bytes) out of the store; None where unknown."""

    gpu_hour: float | None = None
    egress_gb: float | None = None

    def cost(self, seconds: float, fetched: int) -> float | None:
        """What a step costs; None where neither price is known."""
        if self.gpu_hour is None and self.egress_gb is None:
            return None
        return (self.gpu_hour or 0) * seconds / 3600 + (self.egress_gb or 0) * fetched / 1e9


class Last(msgspec.Struct, frozen=True):
    """The same step in an earlier run."""

    time: float
    """Seconds since the epoch."""
    seconds: float


class Step(msgspec.Struct):
    """One step. `seconds` is the median of `rounds`, and so is each phase."""

    step: str
    """`pull` (restore), `start` (restore, then the command), `install` (install, then the command) or `pip` (the same
    with a plain `pip install --target`)."""
    seconds: float
    rounds: list[float]
    phases: dict[str, float]
    fetched_bytes: int | None
    """Stored bytes fetched; None for an installation, which has them from elsewhere, and where that is not known."""
    disk_bytes: int
    dollars: float | None
    last: Last | None


class BenchResult(msgspec.Struct):
    """What a benchmark found."""

    snapshot: str
    tag: str
    store: str
    command: list[str]
    steps: list[Step]


class _Took(msgspec.Struct):
    """One step, once."""

    phases: dict[str, float]
    fetched: int | None
    disk: int


class _Record(msgspec.Struct):
    """One line of the history."""

    time: float
    store: str
    tag: str
    snapshot: str
    command: list[str]
    seconds: dict[str, float]


def bench(
    setup: Setup,
    flags: Sequence[str],
    command: Sequence[str],
    progress: Progress,
    warn: Callable[[str], None],
    *,
    rounds: int = 1,
    install: bool = True,
    prices: Prices | None = None,
) -> BenchResult:
    """Measure the steps, `rounds` times in turn. `flags` are those of this invocation, for packhorse's own processes;
    `command` is what a start ends with, by default the import of the first module of environment.verify.

    Raises NoSuchSnapshotError, NoSpaceError before anything is fetched, and PackhorseError where a step fails. Where the
    plain pip alone cannot do it, `warn` is told and that step left out.
    """
    config = setup.config
    target = find(setup.store, config.storage.tag, lambda: setup.interpreter, lambda: setup.fingerprint)
    install = install and config.environment.configured
    run = _Bench(setup, flags, command, progress)
    steps = {"pull": run.pull, "start": run.start}
    if install:
        steps["install"] = run.install
        if config.environment.wheels and not config.environment.lock:
            warn(
                f"{_LEFT_OUT}, which does not know how extra wheels are chosen; `packhorse lock` writes that down"
            )
        else:
            steps["pip"] = run.plain_pip
    session.clean(setup.root)
    keep = _require_space(setup, target, rounds, install=install)
    if not keep:
        warn(
            "the disk has no room for all steps at once, so each is removed before the next, which can slow that down"
        )
    took: dict[str, list[_Took]] = {name: [] for name in steps}
    with Session(setup.root) as own:
        for number in range(rounds):
            for name, step in list(steps.items()):
                base = own.tmp / f"{number}-{name}"
                progress.stage(f"round {number + 1} of {rounds}: {name}" if rounds > 1 else name)
                # Not the writes of the step before are measured. Removed is all at the end: ext4 is slow to create
                # files where many were removed in the last minutes.
                os.sync()
                try:
                    took[name].append(step(own, base))
                except PackhorseError as error:
                    if name != "pip":
                        raise
                    warn(f"{_LEFT_OUT}: {error.what}")
                    del steps[name]
                own.heartbeat()
                if not keep:
                    atomic.remove_tree(base)
        progress.stage("removing what was made")
        atomic.remove_tree(own.tmp)
    history = _history(setup.root)
    record = _Record(
        time=round(time.time(), 3),
        store=config.storage.url,
        tag=config.storage.tag,
        snapshot=target.snapshot.id,
        command=run.command,
        seconds={name: _median(sum(each.phases.values()) for each in took[name]) for name in steps},
    )
    result = BenchResult(
        snapshot=record.snapshot,
        tag=record.tag,
        store=record.store,
        command=run.command,
        steps=[_summary(name, took[name], record, history, prices or Prices()) for name in steps],
    )
    lines = [msgspec.json.encode(each) + b"\n" for each in [*history, record][-_KEPT:]]
    atomic.write_file(setup.root.private / _HISTORY, b"".join(lines))
    return result


class _Bench:
    """The steps; each is given an empty place."""

    def __init__(
        self, setup: Setup, flags: Sequence[str], command: Sequence[str], progress: Progress
    ) -> None:
        self.setup, self.progress = setup, progress
        self.flags = [*flags, "--quiet", "--store", setup.config.storage.url]
        self.environ = {**redirect.own(setup.environ), **_RESTORE_ONLY}
        self.command = list(command)
        if not command:
            module = next(iter(setup.config.environment.verify), "")
            self.command = [setup.interpreter.path, "-c", f"import {module}" if module else "pass"]

    def pull(self, own: Session, base: Path) -> _Took:
        """Restore the snapshot."""
        seconds, answer = self._packhorse(own, base, "pull", "--json")
        facts = msgspec.json.decode(answer)
        return _Took({"restore": seconds}, facts["transferred_bytes"], usage(base).bytes)

    def start(self, own: Session, base: Path) -> _Took:
        """Start the command as a worker does that has nothing."""
        status = own.build / "status.json"
        seconds, _ = self._packhorse(own, base, "run", "--status-file", str(status), command=self.command)
        facts = msgspec.json.decode(status.read_bytes())
        running = facts["seconds"]["running"]
        boot = facts["boot"] or {}
        # A command that ended before all was there ended the restore, which then does not tell what it fetched.
        fetched = (
            (boot.get("pull") or {}).get("transferred_bytes", 0) if boot.get("action") != "pulling" else None
        )
        return _Took({"restore": seconds - running, "command": running}, fetched, usage(base).bytes)

    def install(self, own: Session, base: Path) -> _Took:
        """Install and check as a worker does for which nothing was kept, then start the command."""
        installed, _ = self._packhorse(own, base, "install")
        ran, _ = self._packhorse(own, base, "exec", command=self.command)
        return _Took({"install": installed, "command": ran}, None, usage(base).bytes)

    def plain_pip(self, own: Session, base: Path) -> _Took:
        """Install as people do without packhorse, with pip's temporary files on the root's disk, then start the command."""
        setup, environment = self.setup, self.setup.config.environment
        place = Root.open(base)
        with Session(place) as inner:
            environ = pip.pip_environ(inner, setup.environ)
            words = [word for file in environment.requirements for word in ("--requirement", file)]
            lines = list(environment.dependencies)
            if environment.lock:
                chosen = lock.chosen_by(environment.lock, lock.target(setup.interpreter, environ))
                words, lines = ["--no-deps"], [each.requirement() for each in chosen]
            given = inner.build / "requirements.txt"
            given.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            said: list[str] = []
            command = [
                *(*pip.find(setup.interpreter, environ).words, "install", "--target", str(place.packages)),
                *("--no-cache-dir", "--no-input", "--disable-pip-version-check", "--no-warn-script-location"),
                *(*words, "--requirement", str(given)),
            ]
            started = time.monotonic()
            done = process.run(
                command,
                environ=environ,
                directory=setup.config.file.parent if setup.config.file else Path.cwd(),
                on_line=lambda line: said.append(without_credentials(line)),
                holding=own.descriptor,
            )
            installed = time.monotonic() - started
        if done.code:
            raise _failed("pip install", done.code, said)
        ran, _ = self._packhorse(own, base, "exec", command=self.command)
        return _Took({"install": installed, "command": ran}, None, usage(base).bytes)

    def _packhorse(
        self, own: Session, base: Path, *words: str, command: Sequence[str] = ()
    ) -> tuple[float, bytes]:
        """Run `packhorse words` on the root `base`; the seconds it took and what it printed. Raises PackhorseError."""
        output, errors = own.build / "stdout", own.build / "stderr"
        line = [sys.executable, "-c", OWN, *words, *self.flags, "--root", str(base)]
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            started = time.monotonic()
            with process.ended(
                subprocess.Popen(
                    [*line, "--", *command] if command else line,
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    pass_fds=(
                        own.descriptor,
                    ),  # what it writes stays until it has ended, should this be killed
                )
            ) as running:
                code = running.wait()
            seconds = time.monotonic() - started
        if code:
            shown = " ".join((f"packhorse {words[0]}", *(("--", shlex.join(command)) if command else ())))
            outputs = (errors, output) if command else (errors,)
            said = [each.read_text(errors="backslashreplace") for each in outputs]
            raise _failed(shown, code, "\n".join(said).splitlines())
        return seconds, output.read_bytes()


def _failed(shown: str, code: int, lines: Sequence[str]) -> PackhorseError:
    said = [line for line in lines if line.strip()][-_SHOWN:]
    told = (
        "\n".join(["Its last lines were:", *(f"    {line}" for line in said)]) if said else "It said nothing."
    )
    return PackhorseError(
        f"`{shown}` ended with exit code {code}. {told}",
        "Make that work first; the benchmark runs it on an empty root, without a terminal.",
    )


def _require_space(setup: Setup, target: Target, rounds: int, *, install: bool) -> bool:
    """Whether all steps find room at once. Raises NoSpaceError where the largest of them finds none."""
    snapshot = target.snapshot
    packages = (
        documents.decode_manifest(tags.get_manifest(setup.store, snapshot.packages), "packages").bytes
        if snapshot.packages
        else 0
    )
    whole = packages + sum(
        documents.decode_manifest(tags.get_manifest(setup.store, digest), "shared").bytes
        for _, digest in snapshot.shared
    )
    # A wheel lies beside its files, and one may be nearly all; pip has all of them beside what it unpacks.
    installed = 2 * packages if install else 0
    setup.root.require_space(max(whole, installed), "the largest step of the benchmark needs", margin=MARGIN)
    disk = os.statvfs(setup.root.path)
    return rounds * (2 * whole + 2 * installed) + MARGIN <= disk.f_bavail * disk.f_frsize


def _history(root: Root) -> list[_Record]:
    """The earlier runs, oldest first; a line that cannot be read is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in (root.private / _HISTORY).read_bytes().splitlines():
            with contextlib.suppress(*UNREADABLE):
                records.append(msgspec.json.decode(line, type=_Record))
    return records


def _summary(
    name: str, took: Sequence[_Took], record: _Record, history: Sequence[_Record], prices: Prices
) -> Step:
    alike = [
        Last(each.time, each.seconds[name])
        for each in history
        if name in each.seconds
        and (each.store, each.tag) == (record.store, record.tag)
        and (name == "pull" or each.command == record.command)
    ]
    seconds, fetched = record.seconds[name], took[-1].fetched
    unknown = name == "start" and fetched is None and prices.egress_gb is not None
    cost = None if unknown else prices.cost(seconds, fetched or 0)
    return Step(
        step=name,
        seconds=seconds,
        rounds=[round(sum(each.phases.values()), 3) for each in took],
        phases={phase: _median(each.phases[phase] for each in took) for phase in took[0].phases},
        fetched_bytes=fetched,
        disk_bytes=took[-1].disk,
        dollars=None if cost is None else round(cost, 6),
        last=alike[-1] if alike else None,
    )


def _median(numbers: Iterator[float]) -> float:
    return round(statistics.median(numbers), 3)
