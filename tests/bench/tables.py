"""What a table of a benchmark says."""

from __future__ import annotations


def table(text: str, title: str = "restore") -> dict[str, dict[str, str]]:
    """The rows of the table with this title by their first cell, each by column."""
    lines = text.split(f"**{title}**\n\n")[1].split("\n\n", maxsplit=1)[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}
