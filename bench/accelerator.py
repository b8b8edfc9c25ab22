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

from packhorse.install import symbols, torch_build, wheels
from packhorse.install.interpreter import worker_interpreter


def main() -> None:
    """Check, and print what was found; ends with 1 where something was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    packages = parser.parse_args().directory.resolve()
    interpreter = worker_interpreter(sys.executable, os.environ)

    started = time.perf_counter()
    torch = torch_build.find([packages], interpreter, os.environ)
    if torch is None:
        sys.exit(f"{packages} has no torch")
    print(f"read in {time.perf_counter() - started:.3f} s: {torch}")

    started = time.perf_counter()
    with contextlib.closing(symbols.Scope([packages], interpreter, os.environ)) as scope:
        findings = symbols.check((each.distribution for each in wheels.distributions(packages)), scope)
    seconds = time.perf_counter() - started
    print(f"all packages, checked in {seconds:.2f} s, with {len(findings)} findings")
    for finding in findings:
        print(f"  {symbols.sentence(finding)}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
