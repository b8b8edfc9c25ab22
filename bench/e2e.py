"""The main job on real input: a CUDA environment of 6 GB is installed, checked, pushed to a real S3 server, lost,
pulled and run. Prints one table of the stages: seconds, bytes, peak memory, growth of the OS disk. `--small` is the same
on a small environment: for the harness, not for figures.

The lost root is moved aside and removed at the end: ext4 makes the first files after a big removal slow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import servers

import contenders
import environments
from environments import Environment
from results import add_json, ran_on, report, table


@dataclass(frozen=True)
class Job:
    """What is installed and imported, and a program with what it prints."""

    environment: Environment
    verify: Sequence[str]
    program: str
    answer: str


REAL = Job(
    environments.REAL,
    ["torch", "torchvision", "transformers", "accelerate", "safetensors", "soundfile", "scipy", "runpod"],
    "import torch, torchvision, transformers; print(torch.ones(2) @ torch.ones(2))",
    "tensor(2.)",
)
SMALL = Job(
    environments.SMALL,
    ["numpy", "pygments", "setuptools"],
    "import numpy; print(numpy.ones(2) @ numpy.ones(2))",
    "2.0",
)


@dataclass
class Stage:
    """One row of the table; sizes are bytes."""

    name: str
    seconds: float
    moved: int
    """Bytes sent or fetched; for the installation the size of what was installed."""
    peak_memory: int
    """The largest process of packhorse's own and below it, by getrusage(2)."""
    os_disk: int
    """Growth of the OS disk outside the work directory."""


class Bench:
    """One run: a work directory, a server, and the stages so far."""

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        self.directory = directory
        self.environ = environ
        self.stages: list[Stage] = []

    def stage(self, name: str, *words: str) -> dict[str, Any]:
        """Run `packhorse words`, add a row, return its JSON (none for `run`)."""
        os.sync()
        before = self._outside()
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "packhorse", *words],
            cwd=self.directory,
            env=self.environ,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"`packhorse {' '.join(words)}` ended with {process.returncode}")
        facts: dict[str, Any] = (
            json.loads(output) if "--json" in words else {"output": output.decode().strip()}
        )
        moved = facts.get("transferred_bytes", facts.get("bytes", 0))
        peak = max(usage.ru_maxrss * 1024, facts.get("peak_rss_bytes", 0))
        grown = facts["os_disk_bytes"] if "os_disk_bytes" in facts else max(self._outside() - before, 0)
        self.stages.append(Stage(name, seconds, moved, peak, grown))
        print(f"{name}: {seconds:.1f} s", file=sys.stderr)
        return facts

    def _outside(self) -> int:
        """Bytes of the OS disk in use beside the work directory."""
        disk = os.statvfs("/")
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        if os.stat(self.directory).st_dev != os.stat("/").st_dev:
            return used
        own = subprocess.run(["du", "-sk", str(self.directory)], capture_output=True, text=True, check=True)
        return used - int(own.stdout.split()[0]) * 1024


def main() -> None:
    """Run the stages and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="a small environment: for the harness, not for figures"
    )
    parser.add_argument("--directory", type=Path, help="where to work (needs 25 GB); default a temporary one")
    add_json(parser)
    arguments = parser.parse_args()
    job = SMALL if arguments.small else REAL
    contenders.compile_packhorse()
    with tempfile.TemporaryDirectory(prefix="packhorse-e2e-", dir=arguments.directory) as name:
        directory = Path(name)
        os.environ["TMPDIR"] = tempfile.tempdir = name  # the server keeps its data here too
        with servers.seaweedfs() as server:
            stages = run(job, directory, server)
        files, size = environments.size_of(directory / "root" / "packages")
    versions = contenders.versions("packhorse", "pip", "uv")
    figures = {
        "environment": job.environment.name,
        "files": files,
        "bytes": size,
        "versions": versions,
        "stages": [asdict(stage) for stage in stages],
    }
    notes = [
        f"The environment: {job.environment.name}, {files:,} files, {size / 1e6:,.0f} MB.",
        contenders.told(versions),
        ran_on(),
    ]
    report(arguments.json, figures, [shown(stages)], notes)


def run(job: Job, directory: Path, server: servers.S3Server) -> list[Stage]:
    """All stages, one after another."""
    root = directory / "root"
    (directory / "packhorse.toml").write_text(
        f"root = {str(root)!r}\n[environment]\ndependencies = {list(job.environment.requirements)!r}\n"
        f"verify = {list(job.verify)!r}\n"
        f"[storage]\nurl = 's3://{server.new_bucket()}/e2e'\nendpoint = {server.endpoint!r}\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PACKHORSE_", "AWS_"))}
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    bench = Bench(directory, {**clean, **server.environ(), "PATH": search})
    installed = bench.stage("install and import check", "install", "--json")
    checked = sum(outcome["seconds"] for outcome in installed["imports"])
    bench.stages[-1].name += f" ({checked:.1f} s of it)"
    bench.stage("push", "push", "--json")
    bench.stage("push, nothing changed", "push", "--json")
    root.rename(directory / "lost")
    bench.stage("pull into an empty root", "pull", "--json")
    bench.stage("pull, nothing changed", "pull", "--json")
    program = ("run", "--", "python", "-c", job.program)
    ran = bench.stage("run -- python: restored root, import and compute", *program)
    assert ran["output"] == job.answer, ran
    root.rename(directory / "lost-again")
    ran = bench.stage("run -- python: the same on an empty root", *program)
    assert ran["output"] == job.answer, ran
    bench.stage("verify, every byte", "verify", "--json")
    return bench.stages


def shown(stages: Sequence[Stage]) -> str:
    """The stages as Markdown."""
    return table(
        "install, push, wipe, pull and run",
        ["stage", "seconds", "MB moved", "peak memory, MB", "OS disk grew, MB"],
        [
            [
                stage.name,
                f"{stage.seconds:.1f}",
                f"{stage.moved / 1e6:,.1f}",
                f"{stage.peak_memory / 1e6:,.0f}",
                f"{stage.os_disk / 1e6:,.1f}",
            ]
            for stage in stages
        ],
    )


if __name__ == "__main__":
    main()
