"""`packhorse push`: save the root as a snapshot."""

from __future__ import annotations

import os

import click

from packhorse.cli import console, context


@click.command("push")
@click.option(
    "--level", type=click.IntRange(1, 19), default=3, show_default=True, help="Compression level of zstd."
)
@click.option(
    "--repair",
    is_flag=True,
    help="Send everything, also what the store seems to have: mends corrupt objects.",
)
@console.shared_options
def command(level: int, repair: bool) -> None:
    """Save the packages, models and other persistent files of the root under the tag.

    What the store already has is not sent again.
    """
    from packhorse.root import PERSISTENT
    from packhorse.transfer.push import push
    from packhorse.transfer.setup import Setup

    setup = Setup(context.load(), os.environ)
    context.mind_default_store(setup.config)
    with console.progress() as progress:
        result = push(
            setup.root,
            setup.store,
            setup.config.storage.tag,
            interpreter=lambda: setup.interpreter,
            progress=progress,
            warn=console.warn,
            directories=PERSISTENT,
            exclude=setup.config.run.exclude,
            level=level,
            repair=repair,
        )
    for path in result.unsaved:
        console.warn(f"{path} changed while it was read; the next push saves it")
    if result.pushed:
        text = (
            f"Pushed {' and '.join(result.pushed)} to {result.tag}: {console.counted(result.files, 'file')}, "
            f"{console.megabytes(result.bytes)}, {console.megabytes(result.transferred_bytes)} sent "
            f"in {result.seconds:.1f} s.\nSnapshot {result.snapshot}"
        )
    elif not result.snapshot:
        text = f"There is nothing to save: {setup.root.path} is empty, and so is the tag {result.tag}."
    else:
        text = f"Nothing has changed: {result.tag} already holds this.\nSnapshot {result.snapshot}"
    console.result(result, text)
