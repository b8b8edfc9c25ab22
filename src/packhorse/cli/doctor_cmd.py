"""`packhorse doctor`: what is wrong with the root, and what to do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from packhorse.cli import console, context

if TYPE_CHECKING:
    from packhorse.doctor import Diagnosis

_PATHS = 5


@click.command("doctor")
@click.option("--digests", is_flag=True, help="Also read every file of the packages and compare its digest.")
@console.shared_options
def command(digests: bool) -> int:
    """Look for what is wrong: files of packages, the environment's state and variables, disks, the store.

    Ends with 1 where there is a problem; warnings alone end with 0.
    """
    from packhorse.doctor import diagnose
    from packhorse.transfer.setup import Setup

    with console.progress() as progress:
        found = diagnose(Setup(context.load(), os.environ), progress, digests=digests)
    console.result(found, _text(found))
    return 1 if found.problems else 0


def _text(found: Diagnosis) -> str:
    if not found.findings:
        return f"Nothing is wrong with {found.root}."
    lines = []
    for finding in sorted(found.findings, key=lambda each: each.level):
        lines.append(f"{finding.level:8} {finding.check:10} {finding.what}")
        lines += [f"{'':20}  {path}" for path in finding.paths[:_PATHS]]
        if finding.count > _PATHS:
            lines.append(f"{'':20}  and {finding.count - _PATHS:,} more")
        lines.append(f"{'':20}→ {finding.remedy}")
    lines.append(
        f"{console.counted(found.problems, 'problem')}, {console.counted(found.warnings, 'warning')} in {found.root}."
    )
    return "\n".join(lines)
