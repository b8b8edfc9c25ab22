"""What `packhorse run` adds to the start of a command: `run -- true` with nothing to restore, against `python -c pass`.

The two take turns, so that whatever else this machine does hits both; the first turn of each is not measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import add_json, ran_on, report, spread, table

BIN = Path(sys.executable).parent
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "packhorse run -- true": [str(BIN / "packhorse"), "run", "--", "true"],
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30, help="measured turns of each command")
    add_json(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        seconds = measure(arguments.rounds, Path(directory))
    rows = [[f"`{name}`", spread(times, ".3f")] for name, times in seconds.items()]
    report(
        arguments.json,
        {"rounds": arguments.rounds, "seconds": seconds},
        [table("start of a command", ["command", "seconds"], rows)],
        [f"{arguments.rounds} rounds: the median (the fastest..the slowest).", ran_on()],
    )


def measure(rounds: int, directory: Path) -> dict[str, list[float]]:
    """Seconds that each command took in each round, with an empty root and store inside `directory`."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PACKHORSE_")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages have their bytecode
    environ["PACKHORSE_ROOT"] = str(directory / "root")
    environ["PACKHORSE_STORAGE_URL"] = (directory / "store").as_uri()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            done = subprocess.run(command, cwd=directory, env=environ, capture_output=True, check=False)
            elapsed = time.perf_counter() - started
            if done.returncode:
                sys.exit(f"`{name}` ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
            if turn:
                seconds[name].append(elapsed)
    return seconds


if __name__ == "__main__":
    main()
