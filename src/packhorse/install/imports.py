"""The import check: each module in a fresh interpreter of the worker, under the worker's environment.

Promises to name what failed: the exception, the signal, or the time that ran out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from packhorse.install import process
from packhorse.install.interpreter import Interpreter
from packhorse.install.log import Log

TIMEOUT = 600.0

_IMPORT = "import importlib, sys; importlib.import_module(sys.argv[1])"
_TRACEBACK = "Traceback (most recent call last):"


class ImportOutcome(msgspec.Struct, frozen=True):
    """How the import of a module went: wall seconds of its interpreter, and the error in one line."""

    module: str
    seconds: float
    ok: bool
    error: str = ""


def check(
    modules: Iterable[str],
    *,
    interpreter: Interpreter,
    environ: Mapping[str, str],
    directory: Path,
    log: Log,
    timeout: float = TIMEOUT,
    before: Callable[[str], None] = lambda module: None,
) -> list[ImportOutcome]:
    """Import each module under `environ`, in `directory`; all output goes to `log`. `timeout` is in seconds for
    each. `before` is called with the module's name."""
    outcomes = []
    for module in modules:
        before(module)
        command = [interpreter.path, "-c", _IMPORT, module]
        output: list[str] = []
        log.begin(command)
        started = time.monotonic()
        ended = process.run(
            command,
            environ=environ,
            directory=directory,
            on_line=lambda line: output.append(log.add(line)),  # noqa: B023 - called within this turn
            timeout=timeout,
        )
        seconds = time.monotonic() - started
        if ended.timed_out:
            error = f"not done after {timeout:g} seconds"
        elif ended.code < 0:
            error = process.signal_name(-ended.code)
        elif ended.code > 0:
            error = _error(output) or f"exit code {ended.code}"
        else:
            error = ""
        outcomes.append(ImportOutcome(module, round(seconds, 3), not error, error))
    return outcomes


def _error(output: list[str]) -> str:
    """The line of the exception: the first after the last traceback's frames, which are indented."""
    lines = [line for line in output if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith(_TRACEBACK):
            after = (line for line in lines[index + 1 :] if not line.startswith(" "))
            return next(after, lines[-1])
    return lines[-1] if lines else ""
