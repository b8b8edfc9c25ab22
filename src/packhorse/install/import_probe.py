"""Imports one module and tells how it went: run under the worker's interpreter by `python -c`, never imported.

    python -c SOURCE MODULE REPORT PACKAGES

Writes JSON to REPORT: `seconds`, `peak_rss_bytes`, the `files` of PACKAGES that Python opened or the process mapped, the
`bytes` that they have, and the chain of exceptions. Needs the standard library of Python 3.8 or newer, nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

module, report, packages = sys.argv[1:]
sys.argv = sys.argv[:1]
opened: set[str] = set()


def note(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook (PEP 578) that keeps the name of every file that Python opens."""
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.add(os.fsdecode(arguments[0]))


def mapped() -> set[str]:
    """The libraries that were loaded, by Python or by one another (proc_pid_maps(5))."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            return {line.rstrip("\n").split(None, 5)[5] for line in file if "/" in line}
    except OSError:
        return set()


def peak() -> int:
    """The most bytes in memory (VmHWM of proc_pid_status(5)); 0 where the kernel does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), 0)
    except OSError:
        return 0


def needed() -> dict[str, int]:
    """The size of each file below PACKAGES that was opened or mapped."""
    found = {}
    below = os.path.realpath(packages) + os.sep
    for path in map(os.path.realpath, opened | mapped()):
        if path.startswith(below) and os.path.isfile(path):
            found[path] = os.path.getsize(path)
    return found


def chain(error: BaseException | None) -> list[dict[str, object]]:
    """The exception, then what it came from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [
        {"type": type(each).__name__, "text": str(each), "name": getattr(each, "name", None) or ""}
        for each in seen
    ]


def tell(seconds: float, error: BaseException | None) -> None:
    """Write the report."""
    memory, files = peak(), needed()
    told = {"seconds": seconds, "peak_rss_bytes": memory, "files": len(files), "bytes": sum(files.values())}
    with open(report, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump({**told, "errors": chain(error)}, file)


sys.addaudithook(note)
started = time.perf_counter()
try:
    importlib.import_module(module)
except BaseException as failure:
    tell(time.perf_counter() - started, failure)
    raise
tell(time.perf_counter() - started, None)
