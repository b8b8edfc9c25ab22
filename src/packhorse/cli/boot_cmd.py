"""`packhorse boot` (hidden): the process in which `run` brings the root up."""

from __future__ import annotations

import os
from pathlib import Path

import click

from packhorse.cli import console, context


@click.command("boot", hidden=True)
@click.option("--result", "result_file", type=click.Path(path_type=Path), required=True)
@click.option("--snapshot", default="")
@console.shared_options
def command(result_file: Path, snapshot: str) -> None:
    """Make the root hold the environment; write how to --result."""
    import msgspec

    from packhorse import atomic
    from packhorse.transfer.setup import Setup
    from packhorse.worker.boot import Boot

    setup = Setup(context.load(), os.environ)
    context.mind_default_store(setup.config)
    with console.progress() as progress:
        facts = Boot(setup, progress, console.note, console.warn).bring_up(snapshot)
    atomic.write_file(result_file, msgspec.json.encode(facts))
