"""`packhorse pull`: restore a snapshot into the root."""

from __future__ import annotations

import os

import click

from packhorse.cli import console, context


@click.command("pull")
@click.argument("snapshot", default="")
@click.option(
    "--connections", type=click.IntRange(1, 64), help="Requests at a time; by default as many as pay."
)
@click.option(
    "--threads", type=click.IntRange(1, 64), help="Threads that unpack and write; by default by processors."
)
@console.shared_options
def command(snapshot: str, connections: int | None, threads: int | None) -> None:
    """Make the root hold what the tag points to, or SNAPSHOT (an id, or at least eight digits of it).

    A pull that was interrupted goes on where it was. Files of models/, deps/ and pip/ that changed here are
    left alone.
    """
    from packhorse import session
    from packhorse.transfer.pull import find, pull
    from packhorse.transfer.setup import Setup

    setup = Setup(context.load(), os.environ)
    session.clean(setup.root)
    target = find(
        setup.store,
        setup.config.storage.tag,
        lambda: setup.interpreter,
        lambda: setup.fingerprint,
        snapshot,
    )
    with console.progress() as progress:
        result = pull(
            setup.root,
            setup.store,
            target,
            interpreter=lambda: setup.interpreter,
            progress=progress,
            waiting=context.waiting,
            connections=connections,
            threads=threads,
        )
    for path in result.kept:
        console.warn(f"{path} changed here and was left alone; the next push or backup saves it")
    if result.pulled:
        text = (
            f"Pulled {' and '.join(result.pulled)}: {console.counted(result.files, 'file')}, {console.megabytes(result.bytes)}, "
            f"{console.megabytes(result.transferred_bytes)} fetched in {result.seconds:.1f} s.\n"
            f"Snapshot {result.snapshot}"
        )
    else:
        text = f"The root already holds this.\nSnapshot {result.snapshot}"
    console.result(result, text)
