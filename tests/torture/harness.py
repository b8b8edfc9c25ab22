"""Saves an environment once, and runs programs in it, each time restored anew into an empty root.

What a program prints and how it ends must not depend on how late its files came: `complete` tells what is right, the
other modes have to give the same.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.servers import S3Server
from tests.torture.programs import Program

HERE = Path(__file__).parent
LIMIT = 150.0
"""Seconds that a program may take, with the restore before it."""
EAGER_LIMIT = 600.0
"""The same where all code of CUDA's libraries is loaded: three programs at once took 130 seconds for that on an H100."""
INTERPRETER = str(Path(sys.executable).parent)
_BLOB = 9 << 20


@dataclass(frozen=True)
class Mode:
    """How files come: `start` and `gpu` of [run], and when large ones arrive."""

    name: str
    start: str = "complete"
    gpu: str = "all"
    arrivals: str = ""
    """`asked`: when somebody opens them. `random:SEED`: late and in random order."""
    eager: bool = False
    """Whether CUDA loads all code of a library with the library, not each part when it is first called."""
    wrong: bool = False
    """Whether code is missing that is needed: programs have to fail, or what they compare says nothing."""

    def environ(self) -> dict[str, str]:
        """The variables that bring it about."""
        found = {"PACKHORSE_RUN_START": self.start, "PACKHORSE_RUN_GPU": self.gpu}
        if self.arrivals:
            found["PACKHORSE_ARRIVALS"] = self.arrivals
        if self.eager:
            found["CUDA_MODULE_LOADING"] = "EAGER"
        return found


COMPLETE = Mode("complete")
MODES = [
    Mode("asked", "early", "all", "asked"),
    Mode("random 1", "early", "all", "random:1"),
    Mode("random 2", "early", "all", "random:2"),
    Mode("asked, sm_90", "early", "sm_90", "asked"),
    Mode("early", "early"),
    Mode("ready, sm_90", "ready", "sm_90"),
]
QUICK_MODES = MODES[:2]


def gpu_modes(capabilities: Sequence[int]) -> list[Mode]:
    """The modes for programs that use the GPUs of this machine, of these compute capabilities."""
    other = next(
        each for each in (80, 90, 100, 120) if all(each // 10 != ours // 10 for ours in capabilities)
    )
    return [
        Mode("again"),
        Mode("only", gpu="only"),
        Mode("only, all code loaded", gpu="only", eager=True),
        Mode("early, auto", "early", "auto"),
        Mode(f"only sm_{other}", gpu=f"only:sm_{other}", wrong=True),
    ]


def mode(name: str) -> Mode:
    """The mode of this name; "random N" may have any number. Raises ArgumentTypeError."""
    kind, _, seed = name.partition(" ")
    if kind == "random" and seed.isdecimal():
        return Mode(name, "early", "all", f"random:{seed}")
    for each in MODES:
        if each.name == name:
            return each
    raise argparse.ArgumentTypeError(f"there is no mode {name!r}")


@dataclass(frozen=True)
class Outcome:
    """What a program printed and how it ended."""

    code: int
    output: str
    errors: str
    arrived: int
    """Bytes of large files that were on disk when the program ended."""

    def same(self, other: Outcome) -> bool:
        """Whether output and exit code are equal."""
        return (self.code, self.output) == (other.code, other.output)

    @property
    def early(self) -> bool:
        """Whether it started early where that was asked for."""
        return "cannot work here" not in self.errors

    def difference(self, other: Outcome) -> str:
        """What to look at where they are not the same; `other` is what is right."""
        return (
            f"exit code {self.code}, not {other.code}\n--- printed:\n{self.output[-3000:]}\n--- instead of:\n"
            f"{other.output[-3000:]}\n--- stderr:\n{self.errors[-3000:]}"
        )


class Environment:
    """An environment in a store of its own, and the variables to reach it."""

    def __init__(self, server: S3Server, work: Path) -> None:
        self.work = work
        self._runs = 0
        foreign = ("PACKHORSE_", "AWS_", "PYTHON", "PIP_", "XDG_")
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
            **server.environ(),
            "PATH": os.pathsep.join((INTERPRETER, os.environ.get("PATH", os.defpath))),
            "HOME": str(work),
            "LANG": "C.UTF-8",
            "PACKHORSE_STORAGE_URL": f"s3://{server.new_bucket()}/torture",
            "PACKHORSE_STORAGE_ENDPOINT": server.endpoint,
            "PACKHORSE_RUN_BACKUP": "[]",
            "PYTHONDONTWRITEBYTECODE": "1",  # the trees that are compared stay as they were
        }

    def save(self, root: Path) -> None:
        """Push the root whose packages/ was installed, with a static program in deps/ and a large file in models/."""
        for directory in ("deps", "models"):
            (root / directory).mkdir(exist_ok=True)
        if not (reader := root / "deps" / "reader").exists():
            command = [
                os.environ.get("CC", "cc"),
                "-O1",
                "-static",
                "-o",
                str(reader),
                str(HERE / "reader.c"),
            ]
            subprocess.run(command, check=True)
            (root / "models" / "blob").write_bytes(random.Random(7).randbytes(_BLOB))
            (root / "models" / "link").symlink_to("blob")
            os.link(root / "models" / "blob", root / "models" / "another name")
        command = [sys.executable, "-m", "packhorse", "push", "--quiet", "--root", str(root)]
        subprocess.run(command, env=self.environ, check=True)

    def run(self, program: Program, mode: Mode, root: Path) -> Outcome:
        """Run a program in a new worker whose root is there or is not. The worker's directory does not stay."""
        self._runs += 1
        directory, note = root.with_name(f"{root.name}-work"), self.work / f"arrived-{self._runs}"
        directory.mkdir()
        (directory / "program.py").write_text(program.source)
        watched = ["python3", "-I", "-S", str(HERE / "arrived.py"), str(note), str(root), *program.command]
        variables = {**self.environ, **mode.environ(), "PACKHORSE_ROOT": str(root)}
        limit = EAGER_LIMIT if mode.eager else LIMIT
        try:
            done = subprocess.run(
                [sys.executable, "-m", "packhorse", "run", "--quiet", "--", *watched],
                cwd=directory,
                env=variables,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="backslashreplace",
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = [part.decode(errors="replace") if part else "" for part in (error.stdout, error.stderr)]
            return Outcome(-1, f"{said[0]}\nnot ended after {limit:.0f} s", said[1], 0)
        finally:
            shutil.rmtree(directory)
        return Outcome(
            done.returncode, done.stdout, done.stderr, int(note.read_text()) if note.exists() else 0
        )


def install(requirements: Sequence[str], packages: Path, environ: Mapping[str, str] = os.environ) -> None:
    """`pip install --target` from the package index."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*command, f"--target={packages}", *requirements], env=dict(environ), check=True)


def link(packages: Path, target: Path) -> None:
    """The same tree in hard links."""
    target.parent.mkdir(parents=True)
    shutil.copytree(packages, target, copy_function=os.link, symlinks=True)


def table(rows: Mapping[str, Mapping[str, str]], columns: Iterable[str]) -> str:
    """Outcomes by program and column, as Markdown."""
    columns = list(columns)
    lines = [f"| program | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [
        f"| {name} | {' | '.join(row.get(each, '') for each in columns)} |" for name, row in rows.items()
    ]
    return "\n".join(lines)
