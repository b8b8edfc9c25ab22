"""`packhorse lock`: write down exactly what is to be installed."""

from __future__ import annotations

import os
import signal

import click

from packhorse.cli import console, context


@click.command("lock")
@click.option("--check", is_flag=True, help="Write nothing; fail where the requirements have changed since.")
@click.option(
    "--python-version", default="", metavar="3.N", help="Lock for this Python, not for the one here."
)
@click.option(
    "--platform", default="", metavar="TAG", help="Lock for this platform, such as manylinux_2_28_aarch64."
)
@console.shared_options
def command(check: bool, python_version: str, platform: str) -> None:
    """Resolve the requirements and write pylock.toml: versions, files, hashes and sizes.

    It holds for the worker's Python on this platform, or for what the options name. `environment.lock` names the
    file.
    """
    from packhorse.cli.install_cmd import stop
    from packhorse.install import elsewhere, fingerprint, locking
    from packhorse.install.interpreter import worker_interpreter

    loaded = context.load()
    if check:
        interpreter = worker_interpreter(loaded.environment.python, os.environ)
        if other := elsewhere.elsewhere(python_version, platform, interpreter):
            interpreter = other.interpreter
        fingerprint.check_lock(loaded.environment, interpreter)
        console.result({"lock": loaded.environment.lock}, f"{loaded.environment.lock} is up to date.")
        return
    root = context.open_root(loaded)
    signal.signal(signal.SIGTERM, stop)
    with console.progress() as progress:
        done = locking.make(
            root,
            loaded,
            os.environ,
            progress,
            console.note,
            python=python_version,
            platform=platform,
        )
    size = f"{console.counted(done.distributions, 'distribution')}, {console.megabytes(done.bytes)}"
    lines = [f"{'Wrote' if done.changed else 'Unchanged:'} {done.lock}: {size} to download."]
    if not loaded.environment.lock:
        lines.append(
            'Name it in packhorse.toml, so that it is used: lock = "pylock.toml" under [environment].'
        )
    console.result(done, "\n".join(lines))
