"""packhorse against what people use instead, on the same environment, the same store and the same machine.

Saves and restores an environment with each contender in turn, several rounds, and prints one table for each task:
seconds, the ratio to packhorse within each round, processor, memory, bytes and requests. Each run writes to a new
file system, and each save goes to a new server. docs/guides/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import servers

import contenders
import disks
import environments
import measure
import networks
from contenders import Place, Restorer, Saver
from measure import BrokenError, Cost, Pipeline
from results import FLOOR, Results, add_json, report
from setting import Setting, add_arguments, setting

GROUPS = ("restore", "save", "floors", "workers")


class Bench:
    """One run of the benchmark: a prepared environment, a store that keeps it, and what was measured so far."""

    def __init__(self, here: Setting, chosen: Sequence[str], results: Results) -> None:
        self.prepared, self.work, self.space, self.server, self.network = here
        self.chosen = chosen
        self.results = results
        self.size = disks.bytes_of(self.prepared.tree)
        self.files, self.bytes = environments.size_of(self.prepared.tree)
        self.places: dict[str, Place] = {}
        """Where each saver keeps the environment on the server that lives as long as this."""
        self.older: dict[str, str] = {}
        """The name of the state before the upgrade, for savers that have one."""
        self.stored = 0
        """Bytes that packhorse keeps of the environment."""
        self.change: environments.Change | None = None
        self.saved_second = False
        self.everywhere = self.network is not None
        self._roots = 0

    def takes_part(self, task: str, contender: Saver | Restorer) -> bool:
        """Whether a contender was chosen and is there; where it is not there that is written down."""
        if self.chosen and not any(word in contender.name for word in self.chosen):
            return False
        absent = contenders.missing(contender.needs)
        if absent:
            self.results.lacks(
                task, contender.name, "; ".join(contenders.HOW_TO_GET[name] for name in absent)
            )
        return not absent

    def run(
        self,
        task: str,
        name: str,
        pipeline: Pipeline,
        directory: Path,
        place: Place,
        scratch: Path,
        *,
        counts: bool,
    ) -> Cost | None:
        """Run commands at the end of the chosen line and write down what they cost, if it counts.

        Returns None where they failed on a line with faults, which is a result; elsewhere it is a BrokenError.
        """
        command = self.shown(pipeline, place)
        try:
            cost = self.on_the_line(pipeline, directory, place, scratch)
        except BrokenError as error:
            if self.network is None or not self.network.faulty:
                raise
            print(f"{task}: {name}: failed: {error}", file=sys.stderr)
            self.results.fail(task, name, command, str(error))
            return None
        print(f"{task}: {name}: {cost.seconds:.2f} s{'' if counts else ', not measured'}", file=sys.stderr)
        self.results.add(task, name, command, cost if counts else None)
        return cost

    def on_the_line(self, pipeline: Pipeline, directory: Path, place: Place, scratch: Path) -> Cost:
        """Run commands at the worker's end of a new line of the chosen network."""
        if self.network is None:
            return measure.run(
                pipeline, environ=place.environ(scratch), directory=directory, server=place.server
            )
        with networks.line(self.network, self.results.round) as line:
            there = replace(place.server, endpoint=line.endpoint(place.server.endpoint))
            return measure.run(
                [line.worker(words) for words in pipeline],
                environ=Place(there, place.bucket).environ(scratch),
                directory=directory,
                server=place.server,
                limit=120 + 5 * 8 * self.bytes / self.network.rate,
            )

    def shown(self, pipeline: Pipeline, place: Place) -> str:
        """Commands without the names that differ from run to run."""
        text = measure.shown(pipeline)
        for name, general in (
            (place.bucket, "BUCKET"),
            (str(self.work), "RUN"),
            (str(self.prepared.work), "WORK"),
        ):
            text = text.replace(name, general) if name else text
        return text

    # --- saving ---

    def fill(self, *, counts: bool) -> None:
        """Each saver in turn, to the server that stays: what is restored later. That goes over loopback."""
        network, self.network = self.network, None
        for saver in contenders.SAVERS:
            if self.takes_part("save", saver):
                self.places[saver.name] = Place(self.server, self.server.new_bucket())
                self._save(saver, self.places[saver.name], counts=counts and network is None)
        self.network = network

    def save_round(self, number: int, *, counts: bool) -> None:
        """Each saver in turn, to a new server each."""
        for saver in contenders.rotated(contenders.SAVERS, number):
            if saver.name in self.places:
                with (
                    self.space.fresh(self.bytes * 3 + (4 << 30)) as disk,
                    servers.seaweedfs(directory=disk, metrics=True, everywhere=self.everywhere) as server,
                ):
                    self._save(saver, Place(server, server.new_bucket()), counts=counts)

    def _save(self, saver: Saver, place: Place, *, counts: bool) -> None:
        root, scratch = self.new_root(self.prepared.tree), self.new_directory("scratch")
        tree = root / "packages"
        if saver.prepare:
            measure.run(saver.prepare, environ=place.environ(scratch), directory=tree)

        def save(task: str, pipeline: Pipeline, directory: Path) -> Cost | None:
            return self.run(task, saver.name, pipeline, directory, place, scratch, counts=counts)

        disks.read_all(environments.regular_files(tree))
        cost = save("save", saver.save(root, place.bucket), tree)
        if cost is None or not saver.again:
            return
        if saver.name.startswith("packhorse") and place.server is self.server:
            told = json.loads(cost.output)
            self.older[saver.name], self.stored = told["snapshot"], told["transferred_bytes"]
        save("save, nothing changed", saver.save(root, place.bucket), tree)
        self.change = environments.upgrade(tree)
        save("save an upgrade", saver.save(root, place.bucket), tree)
        if saver.second:
            other = self.new_root(self.prepared.second_tree)
            disks.read_all(environments.regular_files(other))
            save("save a second environment", saver.second(other, place.bucket), other / "packages")
            self.saved_second = self.saved_second or counts

    # --- restoring ---

    def restore_round(self, number: int, *, counts: bool) -> None:
        """Each restorer in turn, into a new file system each."""
        restorers = list(contenders.RESTORERS)
        if self.network is None:  # installing from the local disk needs none
            restorers += contenders.installers(self.prepared.wheels, self.prepared.requirements)
        for restorer in contenders.rotated(restorers, number):
            if self.takes_part("restore", restorer) and (not restorer.saver or restorer.saver in self.places):
                with self.space.fresh(self.size * 2 + (1 << 30)) as disk:
                    self._restore(restorer, disk, counts=counts)

    def _restore(self, restorer: Restorer, disk: Path, *, counts: bool) -> None:
        place = self.places[restorer.saver] if restorer.saver else Place(self.server, "")
        target, scratch = disk / "target", disk / "scratch"
        target.mkdir()
        scratch.mkdir()
        self.warm(place)

        def restore(task: str, pipeline: Pipeline) -> bool:
            done = self.run(task, restorer.name, pipeline, target, place, scratch, counts=counts)
            return done is not None

        older = self.older.get(restorer.saver)
        newest = restorer.restore(target, place.bucket)
        if restorer.older and older:
            done = restore("restore", restorer.older(target, older)) and restore("restore an upgrade", newest)
        else:
            done = restore("restore", newest)
        if done:
            self.check(restorer, target)
            if restorer.again:
                restore("restore, nothing changed", newest)

    def check(self, restorer: Restorer, target: Path) -> None:
        """Raise BrokenError unless the target has the files of the environment, in their sizes."""
        tree, expected = target / restorer.found, self.prepared.tree
        for path in environments.regular_files(expected):
            inside = path.relative_to(expected)
            if not restorer.exact and (
                path.suffix == ".pyc" or inside.parts[0] == "bin" or ".dist-info" in inside.parts[0]
            ):
                continue
            restored = tree / inside
            if not restored.is_file() or restored.stat().st_size != path.stat().st_size:
                raise BrokenError(f"{restorer.name} did not bring {inside} as it was.")

    def warm(self, place: Place) -> None:
        """Have the server's files of a bucket in the page cache: its disk is not what is measured."""
        files = self.work.glob(f"packhorse-server-*/data/{place.bucket}_*.dat")
        disks.read_all(files, alone=self.network is not None)

    # --- directories ---

    def new_root(self, tree: Path) -> Path:
        """A root whose packages/ is this tree, in hard links. It stays until the end."""
        root = self.new_directory("root")
        root.rmdir()
        environments.linked(tree, root)
        return root

    def new_directory(self, name: str) -> Path:
        """An empty directory that stays until the end."""
        self._roots += 1
        directory = self.work / f"{name}-{self._roots}"
        directory.mkdir(parents=True)
        return directory

    # --- what nothing can be faster than ---

    def floors_round(self, *, counts: bool) -> None:
        """The parts of a restore alone: writing, fetching, decompressing."""
        place = self.places["packhorse push"]
        self.warm(place)
        self._floor(
            "fetch to nowhere",
            place,
            self.work,
            "fetch",
            "packs",
            str(self.stored),
            "--threads=8",
            counts=counts,
        )
        if self.network is not None:
            return
        pieces = self.prepared.work / "pieces"
        if not pieces.exists():
            self._floor("", place, self.work, "pack", str(self.prepared.tree), str(pieces))
        if psutil.virtual_memory().available > self.bytes * 2.2:
            with self.space.fresh(self.size * 2 + (1 << 30)) as disk:
                self._floor(
                    "write from memory", place, disk, "write", str(self.prepared.tree), ".", counts=counts
                )
        elif counts:
            self.results.note(
                "Writing from memory is left out: there is not enough memory for the environment."
            )
        self._floor("decompress from memory", place, self.work, "decompress", str(pieces), counts=counts)

    def _floor(self, name: str, place: Place, directory: Path, *words: str, counts: bool = False) -> None:
        command = [sys.executable, str(Path(__file__).with_name("floors.py")), *words]
        try:
            cost = self.on_the_line([command], directory, place, self.work)
        except BrokenError as error:
            if self.network is None or not self.network.faulty:
                raise
            self.results.fail("restore", f"{FLOOR}{name}", words[0], str(error))
            return
        if not name:
            return
        told = json.loads(cost.output)
        print(f"floor: {name}: {told['seconds']:.2f} s", file=sys.stderr)
        fetches = words[0] == "fetch"
        # Reading into memory is not part of it.
        cost = replace(
            cost,
            seconds=told["seconds"],
            cpu=told["cpu"],
            server_cpu=cost.server_cpu if fetches else None,
            moved=cost.moved if fetches else None,
            requests=cost.requests if fetches else None,
            peak_memory=None,
            together=None,
        )
        self.results.add("restore", f"{FLOOR}{name}", self.shown([command], place), cost if counts else None)

    def cpu_floor(self) -> None:
        """Note what the processor alone allows, beside the pull."""
        parts = [
            self.results.median("restore", f"{FLOOR}{name}", figure)
            for name, figure in (
                ("write from memory", lambda cost: cost.cpu),
                ("decompress from memory", lambda cost: cost.cpu),
                ("fetch to nowhere", lambda cost: cost.cpu),
                ("fetch to nowhere", lambda cost: cost.server_cpu),
            )
        ]
        pull = self.results.median("restore", "packhorse pull", lambda cost: cost.seconds)
        known = [part for part in parts if part is not None]
        if pull is None or len(known) < len(parts):
            return
        cores = len(os.sched_getaffinity(0))
        floor = sum(known) / cores
        terms = " + ".join(f"{part:.1f}" for part in known)
        self.results.note(
            f"CPU floor: ({terms}) CPU-seconds of writing, decompressing, receiving and the server, on {cores} cores "
            f"= {floor:.1f} s. packhorse pull: {pull:.1f} s, {pull / floor:.2f} times that."
        )

    # --- many workers ---

    def workers(self, rounds: int, unmeasured: int) -> None:
        """One worker pulls a smaller environment, then many at once, each into a directory of its own."""
        place, scratch = Place(self.server, self.server.new_bucket()), self.new_directory("scratch")
        root = self.new_root(self.prepared.worker_tree)
        saver = contenders.SAVERS[0]
        measure.run(saver.save(root, place.bucket), environ=place.environ(scratch), directory=root)
        _, size = environments.size_of(root / "packages")
        used = disks.bytes_of(root)
        rates: dict[int, list[float]] = {}
        for number in range(rounds + unmeasured):
            for count in (1, self.prepared.environment.workers):
                with self.space.fresh(count * used * 2 + (1 << 30)) as disk:
                    self.warm(place)
                    pulls = [
                        contenders.packhorse("pull", "--root", str(disk / f"worker-{n}"), "--tag", "base")
                        for n in range(count)
                    ]
                    cost = measure.run(
                        pulls,
                        environ=place.environ(scratch),
                        directory=disk,
                        server=place.server,
                        at_once=True,
                    )
                    for n in range(count):
                        if environments.size_of(disk / f"worker-{n}" / "packages")[1] != size:
                            raise BrokenError(f"Worker {n} of {count} did not get the whole environment.")
                name = f"packhorse pull, {count} at once" if count > 1 else "packhorse pull, one worker"
                print(f"many workers: {name}: {cost.seconds:.2f} s", file=sys.stderr)
                self.results.round = number
                self.results.add(
                    "many workers", name, measure.shown(pulls[:1]), cost if number >= unmeasured else None
                )
                rates.setdefault(count, []).append(count * size / cost.seconds / 1e6)
        told = ", ".join(
            f"{statistics.median(found[unmeasured:]):,.0f} MB/s for {count}" for count, found in rates.items()
        )
        self.results.note(f"Many workers: {size / 1e6:,.0f} MB each; restored in total: {told}.")

    # --- growth ---

    def growth(self, number: int, *, counts: bool) -> None:
        """Save and restore less and more than the environment, with packhorse and the simplest peer."""
        savers = {saver.name: saver for saver in contenders.SAVERS}
        for step in environments.GROWTH:
            root = self.work / "growth" / step.replace(" ", "-")
            if not root.exists():
                environments.grown(self.prepared.tree, root, step)
            tree, scratch = root / "packages", self.new_directory("scratch")
            files, size = environments.size_of(tree)
            title = f"growth, {step}: {files:,} files, {size / 1e9:.2f} GB"
            for restorer in contenders.rotated(contenders.RESTORERS[:2], number):
                saver = savers[restorer.saver]
                if not self.takes_part(f"{title}, restore", restorer):
                    continue
                with (
                    self.space.fresh(size * 3 + (8 << 30)) as disk,
                    servers.seaweedfs(directory=disk, metrics=True, everywhere=self.everywhere) as server,
                    self.space.fresh(size * 2 + files * 8192 + (1 << 30)) as target,
                ):
                    place = Place(server, server.new_bucket())
                    shutil.rmtree(root / ".packhorse", ignore_errors=True)  # the index of the round before
                    disks.read_all(environments.regular_files(tree))
                    save, restore = saver.save(root, place.bucket), restorer.restore(target, place.bucket)
                    self.run(f"{title}, save", saver.name, save, tree, place, scratch, counts=counts)
                    if self.run(
                        f"{title}, restore", restorer.name, restore, target, place, scratch, counts=counts
                    ) and environments.size_of(target / restorer.found) != (files, size):
                        raise BrokenError(f"{restorer.name} did not bring everything of {root}.")


def main() -> None:
    """Prepare, measure and print."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is printed
    with setting(arguments, environments.SMALL if arguments.small else environments.REAL) as here:
        results = Results()
        ended_early = ""
        try:
            _measure(arguments, here, results)
        except BrokenError as error:
            sys.exit(f"A contender broke, so there is no table: {error}")
        except KeyboardInterrupt:
            ended_early = "Ended early: what is missing below was not measured."
            results.note(ended_early)
        _report(arguments, here, results)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left is to remove the files
    if ended_early:
        sys.exit(130)


def _report(arguments: argparse.Namespace, here: Setting, results: Results) -> None:
    line, versions = here.network is not None, contenders.versions()
    figures = {
        "disk": here.space.kind,
        "network": here.network.title if here.network else "loopback",
        "line": line,
        "rounds": arguments.rounds,
        "versions": versions,
        **results.document(),
    }
    notes = [*results.notes, contenders.told(versions), here.described()]
    report(arguments.json, figures, results.tables(line=line), notes)


def _measure(arguments: argparse.Namespace, here: Setting, results: Results) -> None:
    rounds, unmeasured = arguments.rounds, arguments.warm_up
    bench = Bench(here, arguments.only, results)
    if arguments.growth:
        for number in range(rounds + unmeasured):
            bench.results.round = number
            bench.growth(number, counts=number >= unmeasured)
        return
    bench.results.note(f"The environment: {bench.files:,} files, {bench.bytes / 1e6:,.0f} MB.")
    bench.fill(counts=not unmeasured and "save" in arguments.groups)
    for number in range(rounds + unmeasured):
        bench.results.round = number
        if "restore" in arguments.groups:
            bench.restore_round(number, counts=number >= unmeasured)
        if "floors" in arguments.groups:
            bench.floors_round(counts=number >= unmeasured)
        if "save" in arguments.groups and (number or here.network):
            bench.save_round(number, counts=number >= unmeasured)
    bench.cpu_floor()
    if change := bench.change:
        bench.results.note(
            f"The upgrade replaced {change.files:,} files of {change.distribution}, {change.size / 1e6:.1f} MB; "
            f"zstd -3 makes {change.compressed / 1e6:.2f} MB of them."
        )
    if bench.saved_second:
        more = environments.difference(bench.prepared.tree, bench.prepared.second_tree)
        bench.results.note(
            f"The second environment has {more.files:,} files that the first has nowhere, {more.size / 1e6:.1f} MB; "
            f"zstd -3 makes {more.compressed / 1e6:.2f} MB of them."
        )
    if "workers" in arguments.groups:
        bench.workers(rounds, unmeasured)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add_arguments(parser, list(networks.NETWORKS))
    add("--rounds", type=int, default=5, help="measured rounds; 5 by default")
    add("--warm-up", type=int, default=1, help="rounds before them that are not measured; 1 by default")
    add("--groups", type=_words, help=f"of {','.join(GROUPS)}; all by default, restore and floors on a line")
    add(
        "--growth",
        action="store_true",
        help="instead of all that: a sixth of it, twice it, ten times the small files",
    )
    add("--only", type=_words, default=(), help="contenders with one of these words in their names")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.groups is None:
        arguments.groups = GROUPS if arguments.network == "loopback" else ("restore", "floors")
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"--groups: {', '.join(sorted(unknown))}: not one of {', '.join(GROUPS)}")
    return arguments


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
