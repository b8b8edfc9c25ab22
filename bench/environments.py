"""The environments that are saved and restored: wheels, and trees that pip installed from them.

Everything is prepared once in a work directory and used again by later runs there. Trees are read, never written:
what has to change is a tree of hard links with some files replaced.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@dataclass(frozen=True)
class Environment:
    """What is installed, and what of it the other steps use. All are lists of requirements, but for `upgraded`."""

    name: str
    requirements: Sequence[str]
    second: Sequence[str]
    """Another environment that shares its largest part."""
    worker: Sequence[str]
    """What many workers pull at once."""
    workers: int


REAL = Environment(
    "torch with CUDA",
    [
        "torch==2.14.1", "torchvision==0.29.1", "transformers", "accelerate", "safetensors", "soundfile", "scipy", "runpod",
    ],
    second=["torch==2.14.1", "pandas"],
    worker=["scipy", "transformers"],
    workers=32,
)  # fmt: skip
SMALL = Environment(
    "small",
    ["numpy", "pygments", "setuptools"],
    second=["numpy", "jinja2"],
    worker=["pygments", "setuptools"],
    workers=4,
)
STARTS = Environment(
    "small, with a web server",
    ["fastapi", "uvicorn", "pygments"],
    second=["pygments"],
    worker=["pygments"],
    workers=4,
)


class Prepared:
    """An environment on disk: `tree`, `second_tree` and `worker_tree` were installed from `wheels`."""

    def __init__(self, environment: Environment, work: Path, wheels: Path | None) -> None:
        self.environment = environment
        self.work = work
        self.wheels = work / "wheels"
        self.tree = work / "base" / "packages"
        self.second_tree = work / "second" / "packages"
        self.worker_tree = work / "worker" / "packages"
        self.requirements = work / "requirements.txt"
        note = work / "prepared.json"
        plan = [environment.requirements, environment.second, environment.worker]
        if note.exists():
            if json.loads(note.read_text()) != plan:
                raise SystemExit(f"{work} holds another environment: choose another --directory.")
            return
        self.wheels.mkdir(parents=True, exist_ok=True)
        for wheel in wheels.glob("*.whl") if wheels else ():
            if not (self.wheels / wheel.name).exists():
                (self.wheels / wheel.name).symlink_to(wheel.resolve())
        for requirements in plan:
            _pip(
                "download", "--only-binary=:all:", f"--find-links={self.wheels}", f"--dest={self.wheels}", *requirements
            )  # fmt: skip
        self.requirements.write_text("\n".join(environment.requirements) + "\n")
        for tree, requirements in zip((self.tree, self.second_tree, self.worker_tree), plan):
            if tree.exists():  # begun and not finished
                shutil.rmtree(tree)
            _pip("install", "--no-index", f"--find-links={self.wheels}", f"--target={tree}", *requirements)
        note.write_text(json.dumps(plan))


def _pip(*words: str) -> None:
    print(f"pip {words[0]} {' '.join(word for word in words[1:] if word[0] != '-')}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`pip {' '.join(words)}` failed:\n{done.stderr}")


def linked(tree: Path, root: Path) -> Path:
    """A tree of hard links to the files of another one, at `root`/packages."""
    target = root / "packages"
    root.mkdir(parents=True, mode=0o700)
    shutil.copytree(tree, target, copy_function=os.link, symlinks=True)
    return target


@dataclass(frozen=True)
class Change:
    """What changed: how many files, their bytes, and what these shrink to. `distribution` is "" where it is not one."""

    distribution: str
    files: int
    size: int
    compressed: int


def upgrade(tree: Path, size: int = 10_000_000) -> Change:
    """Replace the distribution whose size is nearest to `size` bytes, as another version of it would.

    Each byte becomes another one, always the same for the same one: nothing is as it was, and all shrinks as before.
    """
    sizes = {
        name: sum(os.path.getsize(file) for file in files) for name, files in _distributions(tree).items()
    }
    chosen = min(sizes, key=lambda name: abs(sizes[name] - size))
    other = bytes(value ^ 1 for value in range(256))
    files = _distributions(tree)[chosen]
    changed = bytearray()
    for file in files:
        content = file.read_bytes().translate(other)
        new = file.with_name(f"{file.name}.new")
        new.write_bytes(content)
        shutil.copymode(file, new)
        new.replace(file)
        changed += content
    return Change(chosen, len(files), len(changed), compressed_size(bytes(changed)))


def difference(tree: Path, other: Path) -> Change:
    """The files of `other` whose content no file of `tree` has, in the order of their paths."""
    known = {_digest(file) for file in regular_files(tree)}
    files = [file for file in sorted(regular_files(other)) if _digest(file) not in known]
    content = b"".join(file.read_bytes() for file in files)
    return Change("", len(files), len(content), compressed_size(content))


def _digest(file: Path) -> bytes:
    return blake3().update_mmap(file).digest()


def compressed_size(content: bytes) -> int:
    """Bytes that zstd -3 makes of it."""
    return len(zstd.compress(content, 3))


GROWTH = ("a sixth", "as it is", "twice", "ten times the small files")


def grown(tree: Path, root: Path, step: str) -> Path:
    """A tree of another size, one of GROWTH, at `root`/packages. What is there more than once differs in each byte."""
    if step == "as it is":
        return linked(tree, root)
    target = root / "packages"
    root.mkdir(parents=True, mode=0o700)
    files = sorted(regular_files(tree))
    if step == "a sixth":
        enough, held = size_of(tree)[1] / 6, 0
        for file in files:
            if held < enough:
                held += file.stat().st_size
                _put(file, target / file.relative_to(tree), 0)
        return target
    small = step == "ten times the small files"
    for number in range(10 if small else 2):
        for file in files:
            if not small or file.stat().st_size < 64 << 10:
                _put(file, target / f"copy-{number}" / file.relative_to(tree), number)
    return target


def _put(file: Path, copy: Path, number: int) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    if number == 0:
        os.link(file, copy)
    else:
        copy.write_bytes(file.read_bytes().translate(bytes(value ^ number for value in range(256))))


def _distributions(tree: Path) -> dict[str, list[Path]]:
    """The regular files of each distribution, its metadata left out."""
    found: dict[str, list[Path]] = {}
    for distribution in importlib.metadata.distributions(path=[str(tree)]):
        paths = [tree / str(file) for file in distribution.files or ()]
        found[distribution.name] = sorted(
            path
            for path in paths
            if not re.search(r"\.dist-info/|\.\.", str(path)) and path.is_file() and not path.is_symlink()
        )
    return found


def regular_files(tree: Path) -> Iterator[Path]:
    """All regular files of a tree."""
    for folder, _, names in os.walk(tree):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                yield path


def size_of(tree: Path) -> tuple[int, int]:
    """How many regular files a tree has, and their bytes."""
    sizes = [path.stat().st_size for path in regular_files(tree)]
    return len(sizes), sum(sizes)
