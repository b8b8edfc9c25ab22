"""`packhorse push`: save the root as a snapshot."""

from __future__ import annotations

import os

import click

from packhorse.cli import console, context


class _Level(click.IntRange):
    """A level of zstd, or the word for the one that takes longest."""

    name = "level"

    def __init__(self) -> None:
        super().__init__(1, 19)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return 19 if value == "best" else int(super().convert(value, param, ctx))  # type: ignore[arg-type]


@click.command("push")
@click.option(
    "--level",
    type=_Level(),
    default=3,
    show_default=True,
    metavar="N|best",
    help="Compression level of zstd, 1 to 19; `best` for what is pushed once and pulled often.",
)
@click.option(
    "--connections", type=click.IntRange(1, 64), help="Packs sent at a time; by default as many as pay."
)
@click.option(
    "--threads", type=click.IntRange(1, 64), help="Threads that read and compress; by default by processors."
)
@click.option(
    "--repair",
    is_flag=True,
    help="Send everything, also what the store seems to have: mends corrupt objects.",
)
@console.shared_options
def command(level: int, connections: int | None, threads: int | None, repair: bool) -> None:
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
            connections=connections,
            threads=threads,
            repair=repair,
        )
    for path in result.unsaved:
        console.warn(f"{path} could not be read, or changed meanwhile; the next push tries it again")
    if result.pushed:
        text = (
            f"Pushed {' and '.join(result.pushed)} to {result.tag}: {console.counted(result.files, 'file')}, "
            f"{console.megabytes(result.bytes)}, {console.megabytes(result.transferred_bytes)} sent "
            f"in {result.seconds:.1f} s.\nSnapshot {result.snapshot}"
        )
    elif result.transferred_bytes:  # --repair
        text = f"Sent again what {result.tag} holds: {console.megabytes(result.transferred_bytes)}.\nSnapshot {result.snapshot}"
    elif result.snapshot:
        text = f"Nothing has changed: {result.tag} already holds this.\nSnapshot {result.snapshot}"
    elif any((setup.root.path / name).is_dir() and os.listdir(setup.root.path / name) for name in PERSISTENT):
        text = f"There is nothing new to save in {setup.root.path}."
    else:
        text = (
            f"There is nothing to save: {setup.root.path} is empty. The tag {result.tag} keeps what it holds."
        )
    console.result(result, text)
