"""`packhorse diff`: what changed between two snapshots, by distribution, and what it costs to fetch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from packhorse.cli import console, context

if TYPE_CHECKING:
    from packhorse.transfer.diff import Change, Difference, Side


@click.command("diff")
@click.argument("a")
@click.argument("b", default="")
@console.shared_options
def command(a: str, b: str) -> None:
    """Show what changed from A to B: snapshots (an id, or at least eight digits of it) or tags. Without B, what
    changed from A to what the root holds now.

    Distributions by name and version, other files by directory; what a worker that has A fetches for B.
    """
    from packhorse.transfer.diff import diff
    from packhorse.transfer.setup import Setup

    setup = Setup(context.load(), os.environ)
    with console.progress() as progress:
        found = diff(setup, a, b, progress)
    console.result(found, _text(found))


def _text(found: Difference) -> str:
    lines = [_side("A", found.a), _side("B", found.b)]
    if (found.a.soabi, found.a.platform) != (found.b.soabi, found.b.platform):
        for letter, side in (("A", found.a), ("B", found.b)):
            lines.append(
                f"{letter} is made for {side.soabi or 'no particular Python'} {side.platform}".rstrip()
            )
    if found.equal:
        return "\n".join([*lines, "Nothing differs but, perhaps, times.", *_costs(found)])
    rows = [(each.name, each.old or "-", each.new or "-", *_numbers(each)) for each in found.distributions]
    rows += [(each.path, "", "", *_numbers(each)) for each in found.paths]
    heads = ("NAME", "OLD", "NEW", "ADDED", "REMOVED", "CHANGED", "NEW BYTES", "ON DISK")
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines.append("")
    for row in [heads, *rows]:
        cells = [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *_costs(found)])


def _side(letter: str, side: Side) -> str:
    what = f"snapshot {side.snapshot[:12]}" if side.snapshot else "the root"
    name = "" if side.snapshot.startswith(side.name.lower()) else f", {side.name}"
    return f"{letter}  {what}{name}: {console.counted(side.files, 'file')}, {console.megabytes(side.bytes)}"


def _numbers(change: Change) -> tuple[str, str, str, str, str]:
    counts = tuple(
        f"{number:,}" if number else "" for number in (change.added, change.removed, change.changed)
    )
    return (*counts, console.megabytes(change.bytes), _signed(change.disk_bytes))  # type: ignore[return-value]


def _signed(size: int) -> str:
    return f"{'-' if size < 0 else '+'}{console.megabytes(abs(size))}"


def _costs(found: Difference) -> list[str]:
    more = f"{_signed(found.disk_bytes)} compared with A" if found.disk_bytes else "as much as A"
    lines = [f"On disk B takes {more}."]
    if found.fetch_bytes is not None and found.whole_bytes is not None:
        lines.append(
            f"A worker that has A fetches {console.megabytes(found.fetch_bytes)} for B, one that has nothing "
            f"{console.megabytes(found.whole_bytes)}."
        )
    return lines
