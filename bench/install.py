"""Installing from wheels on the local disk: `packhorse install` with either engine, `pip install --target` and uv, in turn.

Prints one table: seconds, CPU, the size of what is there at the end, and the most that was on the disk meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import contenders
import disks
import measure
from contenders import BIN
from results import add_json, ran_on, report, table


@dataclass(frozen=True)
class Contender:
    """A command that installs into `root` of its own directory, and what it needs in its environment."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One line of the table; sizes are bytes of disk in use."""

    name: str
    seconds: float
    cpu: float | None
    size: int
    peak: int
    said_peak: int | None
    """`peak_root_bytes`, as packhorse itself says it."""


def main() -> None:
    """Install with each contender and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--wheels", type=Path, required=True, help="a directory with all wheels that are needed"
    )
    parser.add_argument("--requirements", type=Path, required=True, help="a requirements file")
    parser.add_argument("--directory", type=Path, help="where to work; default a temporary one")
    parser.add_argument("--size", type=float, default=20, help="GB that one installation may take")
    add_json(parser)
    arguments = parser.parse_args()
    disks.enter()
    wheels, requirements = arguments.wheels.resolve(), arguments.requirements.resolve()
    disks.read_all(wheels.glob("*.whl"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="packhorse-install-", dir=arguments.directory) as name:
        space = disks.Disks(disks.best_kind(), Path(name))
        for contender in installers(wheels, requirements):
            with space.fresh(int(arguments.size * 1e9)) as directory:
                try:
                    rows.append(_install(contender, directory))
                except measure.BrokenError as error:
                    print(f"{contender.name} failed: {error}", file=sys.stderr)
    versions = contenders.versions("packhorse", "pip", "uv")
    figures = {"disk": space.kind, "versions": versions, "contenders": [asdict(row) for row in rows]}
    notes = [contenders.told(versions), ran_on(f"a new {space.kind} for each run")]
    report(arguments.json, figures, [shown(rows)], notes)


def installers(wheels: Path, requirements: Path) -> list[Contender]:
    """Those that are there. They run in their own directory."""
    packhorse = [sys.executable, "-m", "packhorse", "install", "--json", "--config", "packhorse.toml"]
    for_pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    for_uv = {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(wheels), "UV_CACHE_DIR": "tmp/uv-cache"}
    ours = {"PACKHORSE_ENVIRONMENT_REQUIREMENTS": str(requirements), "PACKHORSE_ROOT": "root"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--target=root"]
    uv = [str(BIN / "uv"), "pip", "install", "--quiet", f"--python={sys.executable}", "--target=root"]
    found = [
        Contender(
            "packhorse install, pip resolves",
            packhorse,
            {**for_pip, **ours, "PACKHORSE_ENVIRONMENT_ENGINE": "pip"},
        ),
        Contender("pip install --target", [*pip, f"--requirement={requirements}"], for_pip),
    ]
    if shutil.which("uv", path=str(BIN)):
        found += [
            Contender(
                "packhorse install, uv resolves",
                packhorse,
                {**for_pip, **for_uv, **ours, "PACKHORSE_ENVIRONMENT_ENGINE": "uv"},
            ),
            Contender(
                "uv pip install --target --compile-bytecode",
                [*uv, "--compile-bytecode", f"--requirement={requirements}"],
                for_uv,
            ),
        ]
    return found


def _install(contender: Contender, directory: Path) -> Row:
    temporary = directory / "tmp"
    temporary.mkdir(parents=True)
    (directory / "packhorse.toml").write_text(f'[environment]\npython = "{sys.executable}"\n')
    foreign = ("PACKHORSE_", "PIP_", "UV_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environ |= {"TMPDIR": str(temporary), "HOME": str(directory), "PATH": f"{BIN}:{environ['PATH']}"}
    environ |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **contender.environ}
    watch = _Disk(directory)
    cost = measure.run([list(contender.command)], environ=environ, directory=directory)
    size, peak = watch.stop()
    said = json.loads(cost.output)["peak_root_bytes"] if "packhorse" in contender.command else None
    print(f"{contender.name}: {cost.seconds:.1f} s", file=sys.stderr)
    return Row(contender.name, cost.seconds, cost.cpu, size, peak, said)


class _Disk:
    """Follows how much of the disk of a directory is in use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before = self._peak = self._used()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        """Bytes more than at the start: now, and at most."""
        self._ended.set()
        self._thread.join()
        os.sync()
        now = self._used()
        return now - self._before, max(self._peak, now) - self._before

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self._peak = max(self._peak, self._used())

    def _used(self) -> int:
        disk = os.statvfs(self._directory)
        return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def shown(rows: Sequence[Row]) -> str:
    """In Markdown."""
    return table(
        "install from local wheels",
        [
            "contender",
            "seconds",
            "CPU s",
            "MB at the end",
            "MB at most",
            "ratio",
            "packhorse's peak_root_bytes, MB",
        ],
        [
            [
                f"`{row.name}`",
                f"{row.seconds:.1f}",
                "" if row.cpu is None else f"{row.cpu:.1f}",
                f"{row.size / 1e6:,.0f}",
                f"{row.peak / 1e6:,.0f}",
                f"{row.peak / row.size:.2f}",
                "" if row.said_peak is None else f"{row.said_peak / 1e6:,.0f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
