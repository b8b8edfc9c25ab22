"""`packhorse bench`: what a start costs on this worker, restored, installed anew and by a plain pip."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from datetime import datetime, timezone
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from packhorse.cli import console, context, supervised

if TYPE_CHECKING:
    from packhorse.worker.bench import BenchResult, Step


@click.command("bench", context_settings=supervised.SETTINGS)
@click.option(
    "--rounds", type=click.IntRange(1, 100), default=1, show_default=True, help="How often each step is run."
)
@click.option("--no-install", is_flag=True, help="Leave out both installations.")
@click.option("--gpu-price", type=console.Finite(0), help="US dollars for an hour of this worker.")
@click.option(
    "--egress-price",
    type=console.Finite(0),
    help="US dollars for a GB out of the store; by default traffic costs nothing.",
)
@console.shared_options
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]")
def command(
    rounds: int, no_install: bool, gpu_price: float | None, egress_price: float | None, words: tuple[str, ...]
) -> None:
    """Measure a restore, a cold start (restore, then CMD), an installation (then CMD) and the same by a plain
    `pip install --target`, each on an empty root.

    Without CMD the first module of environment.verify is imported, if there is one. Everything is written below the
    root's tmp/ and removed in the end; the root's packages and the store stay as they are.
    """
    from packhorse.transfer.setup import Setup
    from packhorse.worker.bench import Prices, bench

    signal.signal(signal.SIGTERM, _stop)
    with console.progress() as progress:
        result = bench(
            Setup(context.load(), os.environ),
            context.repeated_flags(),
            words,
            progress,
            console.warn,
            rounds=rounds,
            install=not no_install,
            prices=Prices(gpu_price, egress_price),
        )
    console.result(result, _text(result, rounds))


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End by an exception, so that everything is removed."""
    sys.exit(128 + number)


_TITLES = {
    "pull": "restore",
    "start": "restore, then the command",
    "install": "install, then the command",
    "pip": "pip install --target, then the command",
}


def _text(result: BenchResult, rounds: int) -> str:
    priced = any(step.dollars is not None for step in result.steps)
    heads = ["ON AN EMPTY ROOT", "SECONDS", "LAST", "FETCHED", "ON DISK", *(["DOLLARS"] if priced else [])]
    rows = [heads, *(_row(step, priced) for step in result.steps)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    lines += ["", f"The command is {shlex.join(result.command)}"]
    for step in result.steps:
        if len(step.phases) > 1:
            parts = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in step.phases.items())
            lines.append(f"{_TITLES[step.step]}: {parts}")
    if rounds > 1:
        lines.append(f"Seconds are the median of {rounds} rounds.")
    if dates := {step.last.time for step in result.steps if step.last is not None}:
        when = datetime.fromtimestamp(max(dates), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        lines.append(f"LAST is an earlier run with this tag and command, the newest of {when}.")
    steps = {step.step: step for step in result.steps}
    for name, title in (("install", "Installing"), ("pip", "A plain pip")):
        if name in steps and steps["start"].seconds:
            times = steps[name].seconds / steps["start"].seconds
            lines.append(f"{title} takes {times:.1f} times as long as restoring, command included.")
    return "\n".join(lines)


def _row(step: Step, priced: bool) -> list[str]:
    row = [
        _TITLES[step.step],
        f"{step.seconds:.1f}",
        f"{step.last.seconds:.1f}" if step.last else "-",
        "-" if step.fetched_bytes is None else console.megabytes(step.fetched_bytes),
        console.megabytes(step.disk_bytes),
    ]
    return [*row, "-" if step.dollars is None else f"{step.dollars:.4f}"] if priced else row
