"""Workers for the tests of push and pull: a root, a store, a tag, and the library as the commands call it."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from tests.snapshot import stored_index
from tests.snapshot.trees import listing

from packhorse.config import Storage
from packhorse.install.interpreter import Interpreter, worker_interpreter
from packhorse.progress import Progress, Silent
from packhorse.root import PERSISTENT, Root
from packhorse.store.objects import Store
from packhorse.transfer.opening import PullResult
from packhorse.transfer.pull import find, pull
from packhorse.transfer.push import PushResult, push

LONG_AGO = 1_700_000_000_123_456_789
"""A time in nanoseconds that no test takes for just now."""
PYTHON = worker_interpreter(sys.executable, os.environ)


@dataclass
class Worker:
    """One root beside a store."""

    path: Path
    storage: Storage
    environ: Mapping[str, str] = field(default_factory=dict)
    interpreter: Interpreter = PYTHON
    warnings: list[str] = field(default_factory=list)

    @property
    def root(self) -> Root:
        """The root, created where it is not there."""
        return Root.open(self.path)

    @property
    def store(self) -> Store:
        """The store."""
        return Store(self.storage, self.environ)

    def push(self, *, progress: Progress | None = None, **options: Any) -> PushResult:
        """As `packhorse push` does it."""
        return push(
            self.root,
            self.store,
            self.storage.tag,
            interpreter=lambda: self.interpreter,
            progress=progress or Silent(),
            warn=self.warnings.append,
            **{"directories": PERSISTENT, **options},
        )

    def pull(self, snapshot: str = "", *, progress: Progress | None = None, **options: Any) -> PullResult:
        """As `packhorse pull` does it."""
        store = self.store
        return pull(
            self.root,
            store,
            find(store, self.storage.tag, lambda: self.interpreter, lambda: "", snapshot),
            interpreter=lambda: self.interpreter,
            progress=progress or Silent(),
            waiting=self.warnings.append,
            **options,
        )

    def write(self, path: str, content: bytes | str, *, mtime: int = 0) -> Path:
        """Create or replace a file of the root."""
        file = self.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        if mtime:
            os.utime(file, ns=(mtime, mtime))
        return file

    def read(self, path: str) -> str:
        """The text of a file of the root."""
        return (self.path / path).read_text()

    def names(self, directory: str = "models") -> list[str]:
        """The files below a directory."""
        top = self.path / directory
        return sorted(str(file.relative_to(top)) for file in top.rglob("*") if not file.is_dir())


def persistent(root: Path) -> dict[str, dict[bytes, tuple[Any, ...]]]:
    """All that a snapshot keeps of a root."""
    return {name: listing(root / name) for name in PERSISTENT}


def another_boot(root: Path) -> None:
    """Make what a root records what it recorded before the machine was started again."""
    index, state = root / ".packhorse/index", root / ".packhorse/state.json"
    stored_index.another_boot(index)
    state.write_bytes(msgspec.json.encode({**msgspec.json.decode(state.read_bytes()), "boot": "another"}))


def settle(*directories: Path) -> None:
    """Give all files and directories times that lie long ago."""
    for directory in directories:
        for top, below, files in os.walk(os.fsencode(directory), topdown=False):
            for name in (*files, *below):
                path = os.path.join(top, name)
                os.utime(path, ns=(LONG_AGO, LONG_AGO + len(name)), follow_symlinks=False)
        os.utime(directory, ns=(LONG_AGO, LONG_AGO))


def odd_tree(top: Path) -> None:
    """Everything that a file system allows and a snapshot promises to keep."""
    base = os.fsencode(top)
    names: Sequence[bytes] = (
        b"plain.py", b"\xff\xfe not utf-8", b"new\nline", b"tab\t'quote\"", "é ü 漢字".encode(), b"x" * 255,
        b" leading and trailing ", b"-rf", b"a.b", b"*", b"\\", b"\x01",
    )  # fmt: skip
    chance = random.Random(7)
    for number, name in enumerate(names):
        with open(os.path.join(base, name), "wb") as file:
            file.write(chance.randbytes(number * 100))
        os.chmod(os.path.join(base, name), (0o644, 0o755, 0o600, 0o444, 0o640)[number % 5])
    for name in (b"empty directory", b"deep/" + b"d" * 255 + b"/\xfe", b"a", b"a-b"):
        os.makedirs(os.path.join(base, name))
    (top / "a" / "b").write_bytes(b"below a")
    (top / "empty file").write_bytes(b"")
    (top / "large").write_bytes(chance.randbytes(9 << 20))
    (top / "medium").write_bytes(b"0123456789abcdef" * (1 << 16))
    (top / "zeros").write_bytes(bytes(17 << 20))
    os.symlink(b"a/b", os.path.join(base, b"link"))
    os.symlink(b"../\xff nowhere", os.path.join(base, b"dangling"))
    os.symlink(b"/etc", os.path.join(base, b"absolute"))
    os.symlink(b"a", os.path.join(base, b"link to directory"))
    os.link(top / "large", top / "another name of large")
    os.link(top / "a" / "b", top / "deep" / "another name")
    (top / "read-only").mkdir()
    (top / "read-only" / "file").write_bytes(b"read-only")
    os.chmod(top / "read-only" / "file", 0o444)
    os.chmod(top / "a", 0o750)
    settle(top)
    os.chmod(top / "read-only", 0o555)
