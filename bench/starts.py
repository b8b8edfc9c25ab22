"""How soon a worker is of use that lost everything: milestones of a start, with packhorse and what people use instead.

Each contender brings the environment into a new file system and starts bench/milestones.py there: first a FastAPI app
that loads a model in the background, then a runpod handler. Prints one table of the seconds until each milestone, from
the start of the contender's command on. docs/guides/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parent.parent))
import contenders
import disks
import environments
import measure
import networks
from contenders import BIN, Place
from measure import BrokenError
from packhorse.root import Root
from results import add_json, report, spread, table
from setting import Setting, add_arguments, setting

MILESTONES = {
    "first": "the child's first line",
    "healthy": "FastAPI answers",
    "runpod": "runpod handler answers",
    "imported": "`import torch` is done",
    "answered": "a Llama model has answered",
    "everything": "everything is there and verified",
}
PROGRAM = str(Path(__file__).with_name("milestones.py"))
MB_ANSWERED = "MB moved until the model has answered"


@dataclass(frozen=True)
class Starter:
    """One way to start a worker in an empty directory."""

    name: str
    saver: str
    """Whose bucket it reads; "" for none."""
    command: Callable[[Path, str, str, Sequence[str]], list[str]]
    """The command for a directory, a bucket, the address of the wheels and the words of the worker's program."""
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def packhorse(self) -> bool:
        """Whether its root tells when everything is there."""
        return self.saver == "packhorse push"


def starters(requirements: Path) -> list[Starter]:
    """All contenders."""
    run = [str(BIN / "packhorse"), "run", "--quiet", "--tag", "base", "--root"]
    ours = [
        Starter(
            f"packhorse {start}, {gpu}",
            "packhorse push",
            lambda target, _, __, words: [*run, str(target / "root"), "--", *words],
            {"PACKHORSE_RUN_START": start, "PACKHORSE_RUN_GPU": gpu, "PACKHORSE_RUN_BACKUP": "[]"},
        )
        for start in ("complete", "ready", "early")
        for gpu in ("all", "sm_90")
    ]
    restore = next(each for each in contenders.RESTORERS if each.name == "s5cmd cat, zstd, tar").restore
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--quiet", "install"]
    return [
        *ours,
        Starter(
            "s5cmd cat, zstd, tar, then start",
            "tar, zstd -3, s5cmd pipe",
            lambda target, bucket, _, words: _then(
                " | ".join(map(shlex.join, restore(target, bucket))), target, words
            ),
        ),
        Starter(
            "pip install, then start",
            "",
            lambda target, _, wheels, words: _then(
                shlex.join(
                    [
                        *(*pip, "--no-index", f"--find-links={wheels}"),
                        f"--trusted-host={networks.SERVER}",
                        *("--target=.", f"--requirement={requirements}"),
                    ]
                ),
                target,
                words,
            ),
        ),
    ]


def _then(restore: str, target: Path, words: Sequence[str]) -> list[str]:
    """A script of an entry point: restore, say when, start."""
    said = shlex.join(
        [sys.executable, "-c", "import time; print('everything', time.monotonic(), flush=True)"]
    )
    started = f"PYTHONPATH={shlex.quote(str(target))} exec {shlex.join(words)}"
    return ["bash", "-c", f"set -eo pipefail; {restore}; {said}; {started}"]


class Bench:
    """One run of the benchmark."""

    def __init__(self, here: Setting, small: bool) -> None:
        self.prepared, self.work, self.space, self.server, self.network = here
        self.small = small
        self.port = _free_port()
        """The same in all starts: a profile belongs to the words of a command."""
        self.files, self.bytes = environments.size_of(self.prepared.tree)
        self.size = disks.bytes_of(self.prepared.tree)
        self.places: dict[str, Place] = {}
        self.seconds: dict[str, dict[str, list[float]]] = {}
        """By contender and milestone, one for each measured round."""
        self.shares: dict[str, list[float]] = {}
        """By contender: the model's answer as a share of the time to everything, within each round."""
        self.pulls: list[float] = []

    def fill(self, chosen: Sequence[Starter]) -> None:
        """Save with each saver that a contender needs, over loopback, from hard links to the tree."""
        root, scratch = self.work / "origin", self.work / "scratch"
        environments.linked(self.prepared.tree, root)
        scratch.mkdir()
        for saver in contenders.SAVERS:
            if any(starter.saver == saver.name for starter in chosen):
                place = self.places[saver.name] = Place(self.server, self.server.new_bucket())
                cost = measure.run(
                    saver.save(root, place.bucket),
                    environ=place.environ(scratch),
                    directory=root / "packages",
                )
                print(f"{saver.name}: {cost.seconds:.1f} s, not measured", file=sys.stderr)

    def profile(self, chosen: Sequence[Starter], wheels: int, programs: Sequence[str]) -> None:
        """Start early once with each program, unmeasured: that leaves the profile that all workers but the first have."""
        if early := next((starter for starter in chosen if starter.name.startswith("packhorse early")), None):
            for program in programs:
                self.start(early, program, 0, wheels)
            self.seconds.clear()

    def round(self, chosen: Sequence[Starter], number: int, wheels: int, programs: Sequence[str]) -> None:
        """Each contender once with each program, and once a plain pull."""
        for starter in contenders.rotated(chosen, number):
            for program in programs:
                found = self.start(starter, program, number, wheels)
                shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.items())
                print(f"{starter.name}: {program}: {shown}", file=sys.stderr, flush=True)
                kept = self.seconds.setdefault(starter.name, {})
                if program == "runpod":
                    found = {"runpod": found["healthy"]}
                for name, seconds in found.items():
                    kept.setdefault(name, []).append(seconds)
                if "everything" in found:
                    share = found["answered"] / found["everything"]
                    self.shares.setdefault(starter.name, []).append(share)
        if "packhorse push" in self.places:
            self.pulls.append(self.pull(number))
            print(f"packhorse pull: {self.pulls[-1]:.2f}", file=sys.stderr, flush=True)

    def pull(self, number: int) -> float:
        """Seconds of a plain pull over the same line."""
        place = self.places["packhorse push"]
        with self.space.fresh(self.size * 2 + (1 << 30)) as disk, self._line(number) as line:
            (disk / "scratch").mkdir()
            os.sync()
            command = [
                str(BIN / "packhorse"),
                "pull",
                "--quiet",
                "--tag",
                "base",
                "--root",
                str(disk / "root"),
            ]
            began = time.monotonic()
            done = subprocess.run(
                self._worker(line, command),
                env=self._environ(line, place, disk / "scratch"),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise BrokenError(f"packhorse pull ended with {done.returncode}: {done.stderr}")
            return time.monotonic() - began

    def start(self, starter: Starter, program: str, number: int, wheels: int) -> dict[str, float]:
        """Start a worker once, and end it when it has got as far as it can; seconds by milestone."""
        place = self.places.get(starter.saver) or Place(self.server, "")
        files = self.work.glob(f"packhorse-server-*/data/{place.bucket or 'none'}_*.dat")
        disks.read_all(files, alone=self.network is not None)
        awaited = (
            {"healthy"} if program == "runpod" else {"first", "healthy", "imported", "answered", "everything"}
        )
        with self.space.fresh(self.size * 2 + (1 << 30)) as disk, self._line(number) as line:
            target, scratch = disk / "target", disk / "scratch"
            target.mkdir()
            scratch.mkdir()
            words = [sys.executable, PROGRAM, program, str(self.port), *(["small"] if self.small else [])]
            address = f"http://{networks.SERVER if line else '127.0.0.1'}:{wheels}/"
            watcher = ["watch", str(self.port), *(["/"] if program == "runpod" else [])]
            command = starter.command(target, place.bucket, address, words)
            environ = self._environ(line, place, scratch) | starter.variables
            log, told = disk / "log", disk / "told"
            os.sync()
            before = measure.ServerCount.of(self.server)
            with contextlib.ExitStack() as stack:
                errors = stack.enter_context(log.open("wb"))
                output = stack.enter_context(told.open("wb"))
                watch = [sys.executable, "-I", "-S", PROGRAM, *watcher]
                stack.enter_context(_process(self._worker(line, watch), {}, target, output, errors))
                began = time.monotonic()
                worker = stack.enter_context(
                    _process(self._worker(line, command), environ, target, output, errors)
                )
                return self._follow(starter, worker, began, awaited, told, log, target / "root", before)

    def _follow(
        self,
        starter: Starter,
        worker: subprocess.Popen[bytes],
        began: float,
        awaited: set[str],
        told: Path,
        log: Path,
        root: Path,
        before: measure.ServerCount,
    ) -> dict[str, float]:
        """Look until all that is awaited has happened."""
        found: dict[str, float] = {}
        limit = began + 600 + (10 * 8 * self.bytes / self.network.rate if self.network else 0)
        while not awaited <= found.keys():
            if worker.poll() is not None or time.monotonic() > limit:
                raise BrokenError(
                    f"{starter.name} got no further than {', '.join(found) or 'nothing'} "
                    f"({worker.poll()}):\n{log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.02)
            # Programs say other things, too, and the last line may not be whole yet.
            for line in told.read_text().splitlines(keepends=True):
                name, _, when = line.rpartition(" ")
                if when.endswith("\n") and name in MILESTONES and name not in found:
                    found[name] = float(when) - began
                    if name == "answered":
                        moved = measure.ServerCount.of(self.server).moved - before.moved
                        self.seconds.setdefault(starter.name, {}).setdefault(MB_ANSWERED, []).append(
                            moved / 1e6
                        )
            if starter.packhorse and "everything" not in found and _is_complete(root):
                found["everything"] = time.monotonic() - began
        return found

    @contextlib.contextmanager
    def _line(self, number: int) -> Iterator[networks.Line | None]:
        if self.network is None:
            yield None
        else:
            with networks.line(self.network, number) as line:
                yield line

    def _worker(self, line: networks.Line | None, words: Sequence[str]) -> list[str]:
        return line.worker(words) if line else list(words)

    def _environ(self, line: networks.Line | None, place: Place, scratch: Path) -> dict[str, str]:
        server = (
            replace(place.server, endpoint=line.endpoint(place.server.endpoint)) if line else place.server
        )
        return Place(server, place.bucket).environ(scratch)

    def tables(self) -> list[str]:
        """Everything, and how that compares with what a start is meant to reach."""
        columns = {**MILESTONES, MB_ANSWERED: MB_ANSWERED}
        if self.small:
            columns.pop("runpod")
        rows = []
        for name, found in self.seconds.items():
            cells = [spread(found.get(key, []), ",.0f" if key == MB_ANSWERED else ".2f") for key in columns]
            rows.append([name, *cells, spread(self.shares.get(name, []), ".2f")])
        title = "start of a worker that lost everything, seconds from the start of the command on"
        starts = table(title, ["contender", *columns.values(), "answer / everything"], rows)
        return [starts] if self.small else [starts, self.targets()]

    def notes(self) -> list[str]:
        """What is to be known beside the tables."""
        notes = [f"The environment: {self.files:,} files, {self.bytes / 1e6:,.0f} MB."]
        if self.pulls:
            notes.append(f"`packhorse pull` of all of it: {spread(self.pulls, '.2f')} s.")
        notes.append(
            "Published elsewhere, not measured here: zerostart (gpu-cli/zerostart), on RunPod, first CUDA inference "
            "33 s against 55 s with uv, a health check answered at 1.8 s."
        )
        return notes

    def targets(self) -> str:
        """What a start is meant to reach at 1 Gbit/s, beside what it reached."""

        def middle(name: str, milestone: str) -> float | None:
            values = self.seconds.get(name, {}).get(milestone)
            return statistics.median(values) if values else None

        early = "packhorse early, sm_90"
        first, healthy, runpod = (middle(early, milestone) for milestone in ("first", "healthy", "runpod"))
        rows: list[tuple[str, float | None, float]] = [
            ("early, sm_90: the child's first line, seconds", first, 2.5),
            ("early, sm_90: FastAPI answers, seconds after that", _less(healthy, first), 1.0),
            ("early, sm_90: the runpod handler answers, seconds after that", _less(runpod, first), 1.0),
        ]
        for name, goal in ((early, 0.50), ("packhorse ready, sm_90", 0.70), ("packhorse early, all", 0.80)):
            shares = self.shares.get(name)
            rows.append(
                (
                    f"{name.removeprefix('packhorse ')}: the model's answer, share of the time to everything",
                    statistics.median(shares) if shares else None,
                    goal,
                )
            )
        pull = statistics.median(self.pulls) if self.pulls else None
        for name in self.seconds:
            everything = middle(name, "everything")
            if name.startswith("packhorse") and everything and pull:
                rows.append(
                    (
                        f"{name.removeprefix('packhorse ')}: everything, share of a plain pull",
                        everything / pull,
                        1.05,
                    )
                )
        return table(
            "what a start is meant to reach at 1 Gbit/s",
            ["target", "reached", "at most"],
            [
                [name, f"{value:.2f}{'' if value <= goal else ' (missed)'}", f"{goal:.2f}"]
                for name, value, goal in rows
                if value is not None
            ],
        )


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _is_complete(root: Path) -> bool:
    return (root / ".packhorse").is_dir() and Root(root).state().state == "complete"


@contextlib.contextmanager
def _process(
    words: Sequence[str], environ: dict[str, str], directory: Path, output: IO[bytes], errors: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is asked to end at last, and then killed with what it started."""
    process = subprocess.Popen(
        words,
        env=environ,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextlib.contextmanager
def wheels_served(directory: Path, everywhere: bool) -> Iterator[int]:
    """The wheels of a directory over HTTP; the port."""
    port = _free_port()
    address = "0.0.0.0" if everywhere else "127.0.0.1"
    command = [sys.executable, "-m", "http.server", "--protocol", "HTTP/1.1", "--bind", address, "--directory", str(directory), str(port)]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        yield port
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Prepare, measure and print."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(
            setting(arguments, environments.STARTS if arguments.small else environments.REAL)
        )
        wheels = stack.enter_context(wheels_served(here.prepared.wheels, everywhere=here.network is not None))
        bench = Bench(here, arguments.small)
        chosen = [
            starter
            for starter in starters(here.prepared.requirements)
            if not arguments.only or any(word in starter.name for word in arguments.only)
        ]
        programs = ["serve"] if arguments.small else arguments.programs
        try:
            bench.fill(chosen)
            bench.profile(chosen, wheels, programs)
            for number in range(arguments.rounds):
                bench.round(chosen, number, wheels, programs)
        except BrokenError as error:
            sys.exit(f"A contender broke, so there is no table: {error}")
        except KeyboardInterrupt:
            print("Ended early: what is missing was not measured.", file=sys.stderr)
        versions = contenders.versions()
        figures = {
            "disk": here.space.kind,
            "network": arguments.network,
            "rounds": arguments.rounds,
            "versions": versions,
            "seconds": bench.seconds,
            "shares": bench.shares,
            "pull_seconds": bench.pulls,
        }
        notes = [*bench.notes(), contenders.told(versions), here.described()]
        report(arguments.json, figures, bench.tables(), notes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add_arguments(parser, ["1g", "200m"])
    add("--rounds", type=int, default=2, help="rounds; 2 by default")
    add("--only", type=_words, default=(), help="contenders with one of these words in their names")
    add("--programs", type=_words, default=("serve", "runpod"), help="of serve,runpod; both by default")
    add_json(parser)
    return parser.parse_args()


def _words(text: str) -> tuple[str, ...]:
    # Names of contenders have commas: words are divided by +, or by commas where there are none.
    return tuple(text.split("+" if "+" in text else ","))


if __name__ == "__main__":
    main()
