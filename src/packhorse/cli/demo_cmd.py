"""`packhorse demo`: the main job on a small environment, told step by step, in a directory of its own.

Drives the real command line; what it shows is what anybody gets who types the same.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from packhorse import atomic
from packhorse.cli import console, context
from packhorse.errors import ConfigError, PackhorseError
from packhorse.install.process import ended

_CONFIGURATION = """\
root = "root"

[environment]
dependencies = ["numpy", "humanize"]
verify = ["numpy", "humanize"]

[storage]
url = "store"
"""
_WORKER = """\
import os
from pathlib import Path

import humanize
import numpy

note = Path(os.environ["PACKHORSE_ROOT"], "models", "starts")
starts = int(note.read_text()) + 1 if note.exists() else 1
note.write_text(str(starts))
print(f"worker: my {humanize.ordinal(starts)} start, with numpy {numpy.__version__}")
"""
_RUN = "packhorse run -- python3 worker.py"


@console.without_places
@click.command("demo")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Work here, and leave everything; by default in a temporary directory that is removed.",
)
@console.shared_options
@click.pass_obj
def command(flags: dict[str, object], directory: Path | None) -> None:
    """Show the main job on a small environment and an embedded store: install, save, lose everything, be back.

    Fetches numpy and humanize from the package index that pip uses. Touches nothing outside its directory.
    """
    given = [name for name in ("config_file", "root", "store", "tag") if flags.get(name)]
    if given:
        raise ConfigError(
            f"demo takes no --{given[0].removesuffix('_file')}.",
            "It has a root and a store of its own; --directory says where.",
        )
    context.working_directory()
    signal.signal(signal.SIGTERM, _stop)
    started = time.monotonic()
    with _place(directory) as place:
        demo = _Demo(place, quiet=bool(flags.get("quiet")))
        demo.tell(
            f"Everything below happens in {place}{'' if directory else ', which is removed at the end'}."
        )
        demo.whole()
    facts = {
        "directory": str(place) if directory else None,
        "seconds": round(time.monotonic() - started, 3),
        "steps": [{"command": line, "seconds": round(seconds, 3)} for line, seconds in demo.steps],
    }
    console.result(facts, _summary(demo.steps, directory))


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End by an exception, so that the directory is removed."""
    sys.exit(128 + number)


@contextlib.contextmanager
def _place(directory: Path | None) -> Iterator[Path]:
    """`directory`, created, or a temporary one that is removed in the end."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ConfigError(
                f"{directory} is not empty.", "Name an empty directory, or one that is not there yet."
            )
        yield directory.resolve()
        return
    temporary = Path(tempfile.mkdtemp(prefix="packhorse-demo-")).resolve()
    try:
        yield temporary
    finally:
        atomic.remove_tree(temporary)


class _Demo:
    """The steps. `steps` are the commands that were run, and the seconds each took."""

    def __init__(self, place: Path, *, quiet: bool) -> None:
        self.place, self.quiet = place, quiet
        self.steps: list[tuple[str, float]] = []
        self._number = 0
        self._environ = _environ(os.environ)

    def whole(self) -> None:
        self.step(
            "Say what the worker needs",
            "packhorse.toml names the packages, the root (the directory that will hold all that is installed or "
            "downloaded) and the store (where snapshots of it are kept: here a directory, in earnest a bucket). "
            "worker.py stands for your program. It counts its starts in the root's models/, where downloaded models "
            "would lie.",
        )
        self.write("packhorse.toml", _CONFIGURATION)
        self.write("worker.py", _WORKER)

        self.step(
            "Install",
            "pip does the work, but downloads, temporary files and packages all go to the root, which is usually on a "
            "larger disk than the system. The new environment counts only when the modules of `verify` could be "
            "imported.",
        )
        self.run("packhorse install")

        self.step(
            "Save it",
            "The root's files go to the store, compressed and with a digest each, under the tag `main`. What the store "
            "has already is not sent again.",
        )
        self.run("packhorse push")
        self.run("packhorse status")

        self.step(
            "Lose everything", "The worker is stopped, and its disk is gone. The store is somewhere else."
        )
        self.wipe()

        self.step(
            "Be back",
            "The one command that a worker starts with. It finds the root empty, restores the newest snapshot made of "
            "the same requirements, and starts the program. When that ends, it saves what changed in models/.",
        )
        self.run(_RUN, said="my 1st start")
        self.run("packhorse snapshots")

        self.step(
            "Lose everything again",
            "The program's own file was saved when it ended. So the next worker finds it, and counts on.",
        )
        self.wipe()
        self.run(_RUN, said="my 2nd start")

    def step(self, title: str, why: str) -> None:
        self._number += 1
        self._echo("\n\n" + click.style(f"{self._number}. {title}", bold=True))
        self.tell(why)

    def tell(self, text: str) -> None:
        self._echo(_wrapped(text))

    def write(self, name: str, content: str) -> None:
        self._show(f"cat {name}")
        self._echo(textwrap.indent(content.rstrip(), "    "))
        (self.place / name).write_text(content, encoding="utf-8")

    def wipe(self) -> None:
        self._show("rm -rf root")
        atomic.remove_tree(self.place / "root")

    def run(self, line: str, *, said: str = "") -> None:
        """Run a command line of packhorse. Raises PackhorseError if it fails, or its output lacks `said`."""
        self._show(line)
        words = shlex.split(line)[1:]
        if self.quiet:
            words.insert(1, "--quiet")
        output = []
        started = time.monotonic()
        # Waited for also when interrupted: nothing may still write into the directory that is removed. The
        # working directory, which -m puts on sys.path, is ours: it holds nothing that could be imported.
        with ended(
            subprocess.Popen(
                [sys.executable, "-m", "packhorse", *words],
                cwd=self.place,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
            )
        ) as process:
            assert process.stdout is not None
            for printed in process.stdout:
                output.append(printed)
                self._echo(printed.rstrip("\n"))
        if process.returncode:
            raise PackhorseError(
                f"The demo stopped: `{line}` ended with exit code {process.returncode}.",
                "What it said stands above; docs/guides/troubleshooting.md explains exit codes and messages.",
            )
        if said not in "".join(output):
            raise PackhorseError(
                f"The demo stopped: `{line}` should have printed `{said}`.",
                "Keep its files with --directory, and report what happened.",
            )
        self.steps.append((line, time.monotonic() - started))

    def _show(self, line: str) -> None:
        self._echo("\n" + click.style(f"$ {line}", fg="cyan"))

    def _echo(self, text: str) -> None:
        """stdout, unless that carries the JSON object."""
        if not self.quiet:
            click.echo(text, err=console.wants_json())


def _environ(inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of the commands: no setting leaks in, and python3 is the Python that runs packhorse."""
    from packhorse import redirect

    own = redirect.own(inherited)
    kept = {name: value for name, value in own.items() if not name.startswith("PACKHORSE_")}
    search = [os.path.dirname(sys.executable), inherited.get("PATH", os.defpath)]
    return {**kept, "PATH": os.pathsep.join(search)}


def _summary(steps: list[tuple[str, float]], directory: Path | None) -> str:
    seconds = [(line, took) for line, took in steps if line in ("packhorse install", "packhorse push", _RUN)]
    width = max(len(line) for line, _ in seconds)
    lines = [f"  {line:{width}}{took:7.1f} s" for line, took in seconds]
    after = (
        "Both runs began with an empty root: each restored it, ran the program and saved. A restore resolves nothing and "
        "asks no package index."
    )
    left = f" The files are in {directory}." if directory else ""
    onward = "`packhorse init` writes a packhorse.toml for your project; docs/getting-started.md goes on from there."
    return "\n".join(["", "", *lines, "", _wrapped(after + left), "", _wrapped(f"Next: {onward}")])


def _wrapped(text: str) -> str:
    width = min(shutil.get_terminal_size().columns, 88)
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
