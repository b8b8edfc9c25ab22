"""Checks the symbols of every package of a directory with a real torch, and measures how long that takes.

python bench/accelerator.py DIRECTORY      a directory with torch, as `pip install --target` fills it
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import msgspec

from packhorse.install import symbols, torch_build, wheels
from packhorse.install.interpreter import worker_interpreter
from results import add_json, ran_on, report, table


def main() -> None:
    """Check, and print what was found; ends with 1 where something was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    add_json(parser)
    arguments = parser.parse_args()
    packages = arguments.directory.resolve()
    interpreter = worker_interpreter(sys.executable, os.environ)

    started = time.perf_counter()
    torch = torch_build.find([packages], interpreter, os.environ)
    if torch is None:
        sys.exit(f"{packages} has no torch")
    read = time.perf_counter() - started

    started = time.perf_counter()
    with contextlib.closing(symbols.Scope([packages], interpreter, os.environ)) as scope:
        findings = symbols.check((each.distribution for each in wheels.distributions(packages)), scope)
    checked = time.perf_counter() - started
    report(
        arguments.json,
        {
            "torch": msgspec.to_builtins(torch),
            "read_seconds": read,
            "check_seconds": checked,
            "findings": msgspec.to_builtins(findings),
        },
        [
            table(
                "check of symbols",
                ["step", "seconds"],
                [["how torch was built", f"{read:.3f}"], ["all packages", f"{checked:.2f}"]],
            )
        ],
        [str(torch), f"{len(findings)} findings.", *map(symbols.sentence, findings), ran_on()],
    )
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
