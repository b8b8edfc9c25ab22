"""`packhorse flush` (hidden): the process in which `run` and `exec` have the disk take what was restored."""

from __future__ import annotations

import os

import click

from packhorse.cli import console, context


@click.command("flush", hidden=True)
@console.shared_options
def command() -> None:
    """Flush the root's file system, and let the index know."""
    from packhorse.snapshot import index

    root = context.open_root(context.load())
    # It may outlive whoever started it: nobody who reads what that one says is to wait for it.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    index.flush(root.index)
