"""The main job on real input: a CUDA environment of 6 GB is installed, checked, pushed to a real S3 server, lost,
pulled and run. Prints one table of the stages: seconds, bytes, peak memory, growth of the OS disk.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import servers

REQUIREMENTS = [
    "torch==2.14.1", "torchvision==0.29.1", "transformers", "accelerate", "safetensors", "soundfile", "scipy", "runpod",
]  # fmt: skip
VERIFY = ["torch", "torchvision", "transformers", "accelerate", "safetensors", "soundfile", "scipy", "runpod"]
PROGRAM = "import torch, torchvision, transformers; print(torch.ones(2) @ torch.ones(2))"


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
    """Run the stages and print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to work (needs 25 GB); default a temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="packhorse-e2e-", dir=arguments.directory) as name:
        directory = Path(name)
        os.environ["TMPDIR"] = tempfile.tempdir = name  # the server keeps its data here too
        with servers.seaweedfs() as server:
            bench = run(directory, server)
    if arguments.json:
        print(json.dumps([asdict(stage) for stage in bench.stages]))
    else:
        print(table(bench.stages))


def run(directory: Path, server: servers.S3Server) -> Bench:
    """All stages, one after another."""
    root = directory / "root"
    (directory / "packhorse.toml").write_text(
        f"root = {str(root)!r}\n[environment]\ndependencies = {REQUIREMENTS!r}\nverify = {VERIFY!r}\n"
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
    ran = bench.stage(
        "run -- python: restored root, import torch and transformers", "run", "--", "python", "-c", PROGRAM
    )
    assert ran["output"] == "tensor(2.)", ran
    root.rename(directory / "lost-again")
    ran = bench.stage("run -- python: the same on an empty root", "run", "--", "python", "-c", PROGRAM)
    assert ran["output"] == "tensor(2.)", ran
    bench.stage("verify, every byte", "verify", "--json")
    return bench


def table(stages: list[Stage]) -> str:
    """The stages as Markdown."""
    rows = [
        "| stage | seconds | GB moved | peak memory, MB | OS disk grew, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows += [
        f"| {stage.name} | {stage.seconds:.1f} | {stage.moved / 1e9:.2f} | {stage.peak_memory / 1e6:.0f} "
        f"| {stage.os_disk / 1e6:.1f} |"
        for stage in stages
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
