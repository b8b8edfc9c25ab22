"""`packhorse prune`: forget old snapshots if asked to, and give back what no tag needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packhorse.cli import console, context

if TYPE_CHECKING:
    from packhorse.transfer.prune import PruneResult


@click.command("prune")
@click.option(
    "--keep",
    type=click.IntRange(1),
    metavar="N",
    help="Forget all but the N newest of each tag and fingerprint.",
)
@click.option(
    "--keep-within",
    default="",
    metavar="TIME",
    help="Forget what is older, such as 30d; with --keep what is neither.",
)
@click.option(
    "--live-share",
    type=console.Finite(0, 1),
    default=0.5,
    show_default=True,
    help="Repack packs of which a smaller part is in use.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@console.shared_options
def command(keep: int | None, keep_within: str, live_share: float, dry_run: bool) -> None:
    """Condemn what no tag needs any more, and delete what was condemned two days ago and is still not needed.

    Nothing is forgotten unless --keep or --keep-within asks for it, with --tag of that tag only. Workers may restore
    and push meanwhile.
    """
    from packhorse import config_values
    from packhorse.store import tags
    from packhorse.transfer.prune import prune
    from packhorse.transfer.retention import Keep
    from packhorse.transfer.setup import Setup

    seconds = 0.0
    if keep_within:
        place = config_values.Place("--keep-within", Path.cwd(), os.environ, text=True)
        seconds = config_values.seconds(keep_within, place)
        if not keep_within.rstrip()[-1].isalpha():  # 30 would be half a minute, and history gone
            place.refuse("a number and its unit", keep_within, "Write the unit, such as 30d or 12h.")
    setup = Setup(context.load(), os.environ)
    chosen = (click.get_current_context().obj or {}).get("tag", "")
    if chosen:
        tags.require_tag(setup.store, chosen)
    with console.progress() as progress:
        done = prune(
            setup.store,
            progress,
            keep=Keep(keep or 0, seconds, chosen),
            live_share=live_share,
            dry_run=dry_run,
        )
    console.result(done, _text(done))


def _text(done: PruneResult) -> str:
    size, would = console.megabytes, "Would have " if done.dry_run else ""

    def line(verb: str, rest: str) -> str:
        return f"{would}{verb.lower() if would else verb} {rest}."

    lines = []
    if done.forgotten:
        lines.append(line("Forgotten", f"{_entries(done.forgotten)} of tags; {done.kept:,} are left"))
    if done.folded:
        lines.append(line("Folded", f"{_entries(done.folded)} of shared directories"))
    if done.repacked:
        lines.append(
            line("Repacked", f"{console.counted(done.repacked, 'pack')}: {size(done.copied_bytes)} copied")
        )
    if done.spared:
        lines.append(line("Spared", f"{console.counted(done.spared, 'object')}, which are in use again"))
    if done.condemned:
        lines.append(
            line("Condemned", f"{console.counted(done.condemned, 'object')}, {size(done.condemned_bytes)}")
        )
    if done.deleted:
        lines.append(
            line("Deleted", f"{console.counted(done.deleted, 'object')}, {size(done.deleted_bytes)}")
        )
    if done.profiles:
        lines.append(line("Deleted", console.counted(done.profiles, "profile")))
    lines = lines or ["There is nothing to do."]
    lines.append(f"In use: {size(done.live_bytes)}.")
    if done.waiting:
        lines.append(
            f"Condemned: {size(done.waiting_bytes)}. A prune deletes it 48 hours after it was condemned."
        )
    return "\n".join(lines)


def _entries(number: int) -> str:
    return f"{number:,} entry" if number == 1 else f"{number:,} entries"
