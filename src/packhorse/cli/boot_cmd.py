"""`packhorse boot` (hidden): the process in which `run` brings the root up."""

from __future__ import annotations

import os
from pathlib import Path

import click

from packhorse.cli import console, context

ARRIVALS = "PACKHORSE_ARRIVALS"
"""For tests: see `worker.boot.Early`."""


@click.command("boot", hidden=True)
@click.option("--result", "result_file", type=click.Path(path_type=Path), required=True)
@click.option("--snapshot", default="")
@click.option(
    "--link", type=int, default=None, help="The descriptor by which `run` hears that the child may start."
)
@click.option(
    "--profile", "profile", nargs=2, default=("", ""), help="Name and command of the child's profile."
)
@console.shared_options
def command(result_file: Path, snapshot: str, link: int | None, profile: tuple[str, str]) -> None:
    """Make the root hold the environment; write how to --result."""
    import msgspec

    from packhorse import atomic
    from packhorse.transfer.setup import Setup
    from packhorse.worker.boot import Boot, BootFacts, Early

    def report(facts: BootFacts) -> None:
        atomic.write_file(result_file, msgspec.json.encode(facts))

    setup = Setup(context.load(), os.environ)
    early = None
    if link is not None:
        from packhorse.worker.link import Link
        from packhorse.worker.restorer import Restorer

        arrivals = setup.environ.get(ARRIVALS, "")
        patient = {"asked": "never", "once": "once", "random": "slowly"}.get(arrivals.partition(":")[0], "")
        restorer = Restorer(Link.inherited(link), console.warn, patient)
        early = Early(restorer, *profile, report, arrivals)
    context.mind_default_store(setup.config)
    with console.progress() as progress:
        boot = Boot(setup, progress, console.note, console.warn, early)
        facts = boot.bring_up(snapshot)
    try:
        report(facts)
    except OSError:  # the root's disk is full: no reason to end a child for which everything is there
        if not boot.started:
            raise
