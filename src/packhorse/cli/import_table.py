"""The outcomes of the import check as a table, for `install` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence

from packhorse.cli import console
from packhorse.install.imports import SLOW, ImportOutcome


def lines(outcomes: Sequence[ImportOutcome]) -> list[str]:
    """One line a module: seconds, memory, files; what was slow or could not be checked is pointed out."""
    width = max((len(outcome.module) for outcome in outcomes), default=0)
    return [f"import {outcome.module:{width}}  {_figures(outcome)}" for outcome in outcomes]


def _figures(outcome: ImportOutcome) -> str:
    if not outcome.ok:
        return f"not checkable here: {outcome.error}. {outcome.remedy}"
    memory, size = console.megabytes(outcome.peak_rss_bytes), console.megabytes(outcome.bytes)
    files = console.counted(outcome.files, "file")
    slow = f"  slow: over {SLOW:.0f} s" if outcome.slow else ""
    return f"{outcome.seconds:7.2f} s  {memory:>7} of memory  {files} ({size}){slow}"
