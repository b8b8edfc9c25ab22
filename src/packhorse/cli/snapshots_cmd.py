"""`packhorse snapshots`: what the store holds."""

from __future__ import annotations

import os
from datetime import datetime, timezone

import click

from packhorse.cli import console, context


@click.command("snapshots")
@click.option(
    "-n", "--number", type=click.IntRange(1), default=20, show_default=True, help="How many of each tag."
)
@console.shared_options
def command(number: int) -> None:
    """List the snapshots of the store, newest first; with --tag those of one tag."""
    from packhorse.store import tags
    from packhorse.transfer.setup import Setup

    setup = Setup(context.load(), os.environ)
    chosen = click.get_current_context().obj.get("tag")

    def read() -> list[tuple[tags.TagEntry, tags.EntryFacts]]:
        entries = tags.read_tag(setup.store, chosen) if chosen else tags.read_tags(setup.store)
        shown: list[tags.TagEntry] = []
        count: dict[str, int] = {}
        for entry in entries:
            count[entry.tag] = count.get(entry.tag, 0) + 1
            if count[entry.tag] <= number:
                shown.append(entry)
        return list(zip(shown, tags.entry_facts(setup.store, shown)))

    rows = [
        {
            "snapshot": facts.snapshot,
            "tag": entry.tag,
            "time": datetime.fromtimestamp(entry.time, timezone.utc).isoformat(timespec="seconds"),
            "part": entry.part,
            "files": facts.files,
            "bytes": facts.bytes,
            "soabi": facts.soabi,
            "platform": facts.platform,
            "partial": facts.partial,
        }
        for entry, facts in tags.steady(read)
    ]
    if not rows:
        if chosen:
            tags.require_tag(setup.store, chosen)
        console.result({"snapshots": []}, f"There are no snapshots in {setup.store.url}.")
        return
    width = max(10, *(len(str(row["tag"])) for row in rows)) + 2
    lines = [f"{'SNAPSHOT':14}{'TAG':{width}}{'TIME (UTC)':21}{'PART':10}{'FILES':>9}{'SIZE':>10}  MADE FOR"]
    for row in rows:
        notes = "(cut short)" if row["partial"] else "" if row["snapshot"] else "(entry is corrupt)"
        made_for = " ".join(filter(None, (str(row["soabi"]), notes)))
        lines.append(
            f"{str(row['snapshot'])[:12]:14}{row['tag']:{width}}{str(row['time'])[:19].replace('T', ' '):21}"
            f"{row['part']:10}{row['files']:>9,}{console.megabytes(int(str(row['bytes']))):>10}  {made_for}"
        )
    console.result({"snapshots": rows}, "\n".join(line.rstrip() for line in lines))
