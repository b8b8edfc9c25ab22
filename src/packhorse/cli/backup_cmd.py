"""`packhorse backup` (hidden): the process in which `run` saves what changed."""

from __future__ import annotations

import os
from pathlib import Path

import click

from packhorse.cli import console, context


@click.command("backup", hidden=True)
@click.option("--result", "result_file", type=click.Path(path_type=Path), required=True)
@click.option("--deadline", type=float, default=None, help="Seconds until it must be over.")
@console.shared_options
def command(result_file: Path, deadline: float | None) -> None:
    """Save what changed in the directories of run.backup; write what was saved to --result."""
    import msgspec

    from packhorse import atomic
    from packhorse.errors import unless_full
    from packhorse.progress import Silent
    from packhorse.transfer.setup import Setup
    from packhorse.worker.backup import backup

    setup = Setup(context.load(), os.environ)
    saved = backup(setup, Silent(), console.warn, seconds=deadline)
    with unless_full():  # what was saved is saved
        atomic.write_file(result_file, msgspec.json.encode(saved))
    if saved.pushed:
        console.note(
            f"saved {console.counted(saved.files, 'file')}, {console.megabytes(saved.bytes)} "
            f"({console.megabytes(saved.transferred_bytes)} sent) to {saved.tag}"
        )
    if saved.unsaved:
        console.warn(
            f"not saved, since they changed, could not be read or time ran out: {console.counted(len(saved.unsaved), 'file')}, the first is {saved.unsaved[0]}"
        )
