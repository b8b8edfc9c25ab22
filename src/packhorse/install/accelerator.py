"""The choice of a wheel that was built for one torch: flash-attn and its kind.

Such wheels name what they were built for in their local version (`+cu12torch2.6cxx11abiFALSE`), which pip does
not read. Promises that a wheel is chosen only if Python, platform, torch, CUDA and C++ ABI fit, and that where
none does every candidate and its wrong tag are told.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import packaging
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from packhorse.config import Wheel
from packhorse.errors import ConfigError, PackhorseError
from packhorse.install import torch_build
from packhorse.install.interpreter import Interpreter
from packhorse.install.links import Fetcher, Link
from packhorse.install.torch_build import Torch

COLUMNS = ("Python", "platform", "torch", "CUDA", "ABI")
_SHOWN = 12

# What a local version says, in lower case: cu12torch2.6cxx11abifalse, pt26cu124, torch260cu126, d20260310.cu130...
_TORCH = re.compile(r"(torch|pt)(\d+(?:\.\d+)*)")
_CUDA = re.compile(r"cu(?:da)?(\d+(?:\.\d+)?)")
_ROCM = re.compile(r"(?:rocm|hip)(\d+(?:\.\d+)*)")
_ABI = re.compile(r"cxx11abi(true|false|1|0)")
_CPU = re.compile(r"(?<![a-z])cpu")

_TAGS = """\
import sys
sys.path.insert(0, sys.argv[1])
from packaging.tags import sys_tags
print("\\n".join(map(str, sys_tags())))
"""


class Needs(NamedTuple):
    """What a wheel was built for, as far as its name tells: versions, "" where it says nothing."""

    torch: str = ""
    cuda: str = ""
    rocm: str = ""
    cpu: bool = False
    cxx11_abi: bool | None = None


class Candidate(NamedTuple):
    """A wheel that is offered."""

    link: Link
    version: Version
    build: tuple[int, str] | tuple[()]
    tags: frozenset[Tag]
    needs: Needs


class Worker:
    """What a wheel has to fit: the worker's Python and platform, and the torch beside it."""

    def __init__(self, interpreter: Interpreter, tags: Sequence[Tag], torch: Torch | None) -> None:
        """`tags` are those that the interpreter can install, best first."""
        self.interpreter, self.torch = interpreter, torch
        self.rank = {tag: index for index, tag in enumerate(tags)}

    @cached_property
    def _pythons(self) -> set[tuple[str, str]]:
        return {(tag.interpreter, tag.abi) for tag in self.rank}

    @cached_property
    def _platforms(self) -> set[str]:
        return {tag.platform for tag in self.rank}

    def wrong(self, candidate: Candidate) -> dict[str, str]:
        """What of a candidate does not fit: the names of COLUMNS, with what is said there instead."""
        found = {}
        if not any(tag in self.rank for tag in candidate.tags):
            if not any(tag.platform in self._platforms for tag in candidate.tags):
                found["platform"] = _joined(tag.platform for tag in candidate.tags)
            if not found or not any((tag.interpreter, tag.abi) in self._pythons for tag in candidate.tags):
                found["Python"] = _joined(_python(tag) for tag in candidate.tags)
        needs, torch = candidate.needs, self.torch
        if needs.torch and (torch is None or not _same_minor(needs.torch, torch.minor)):
            found["torch"] = needs.torch
        if torch is not None and not _runs_on(needs, torch):
            found["CUDA"] = _built_for(needs)
        known = torch is not None and None not in (needs.cxx11_abi, torch.cxx11_abi)
        if torch is not None and known and needs.cxx11_abi != torch.cxx11_abi:
            found["ABI"] = _truth(needs.cxx11_abi)
        return found

    def preference(self, candidate: Candidate) -> tuple[object, ...]:
        """Greater for what is to be taken first, among candidates that fit."""
        needs = candidate.needs
        torch = self.torch or Torch("")
        rank = min(self.rank[tag] for tag in candidate.tags if tag in self.rank)
        return (
            not candidate.version.is_prerelease,
            Version(candidate.version.public),
            bool(needs.torch),
            needs.torch == torch.version.partition("+")[0],
            needs.cxx11_abi is not None,
            _closeness(needs.cuda, torch.cuda),
            -rank,
            candidate.build,
            str(candidate.version),
        )

    def __str__(self) -> str:
        """ "Python 3.11 on linux-x86_64, torch 2.6.0, CUDA 12.4, C++11 ABI FALSE"."""
        said = f"Python {self.interpreter.minor} on {self.interpreter.platform}"
        if self.torch is None:
            return f"{said}, no torch"
        torch = self.torch
        runs_on = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.rocm}" if torch.rocm else "no CUDA"
        abi = "" if torch.cxx11_abi is None else f", C++11 ABI {_truth(torch.cxx11_abi)}"
        return f"{said}, torch {torch.version.partition('+')[0]}, {runs_on}{abi}"


class Choice(NamedTuple):
    """The wheel to install and why, in one sentence."""

    candidate: Candidate
    why: str


class Selection:
    """Chooses the wheels of one installation, for the torch that is or will be in `packages`."""

    def __init__(
        self,
        interpreter: Interpreter,
        environ: Mapping[str, str],
        packages: Path,
        root: Path,
        fetcher: Fetcher,
        torch: Callable[[], Torch | None] | None = None,
        tags: Sequence[Tag] | None = None,
    ) -> None:
        """`environ` is the environment of the caller, in which the interpreter may have a torch of its own;
        what lies in `root` is left out there. `torch` tells it where it is not in `packages` yet; `tags` are those of an interpreter that is not here."""
        self._told, self._known_tags = torch, tags
        self._interpreter, self._fetcher = interpreter, fetcher
        self._packages, self._root = packages, root
        behind = environ.get("PYTHONPATH", "")
        self._environ = {
            **environ,
            "PYTHONPATH": f"{packages}{os.pathsep}{behind}" if behind else str(packages),
        }

    def from_links(self, wheel: Wheel) -> Choice:
        """The best of what the pages and directories of `wheel.find_links` offer.

        Raises PackhorseError where a page cannot be read or nothing fits, NetworkError.
        """
        links = [link for place in wheel.find_links for link in self._fetcher.offered(place)]
        built_for_torch = any(each.needs != Needs() for each in candidates(wheel.name, wheel.version, links))
        return choose(wheel.name, wheel.version, links, self._worker(built_for_torch))

    def doubt(self, file: str) -> str:
        """What speaks against a wheel that was named by path or URL, as the end of a warning; "" for nothing.

        Its name may be wrong about torch; that of a wheel for another Python or platform raises PackhorseError.
        """
        try:
            name, version, build, tags = parse_wheel_filename(file)
        except InvalidWheelFilename:
            return ""  # who installs it says what is wrong with the name
        candidate = Candidate(Link(file, ""), version, build, tags, needs(version))
        worker = self._worker(candidate.needs != Needs())
        wrong = worker.wrong(candidate)
        if wrong.keys() & {"Python", "platform"}:
            raise PackhorseError(
                f"The wheel of {name} does not fit {worker}:\n{table([(candidate, wrong)], worker)}",
                "Name one that does in [[environment.wheels]].",
            )
        said = ", ".join(f"{column} {text}" for column, text in wrong.items())
        return f"{file} was built for {said}, and here is {worker}" if wrong else ""

    def _worker(self, built_for_torch: bool) -> Worker:
        torch = None
        if built_for_torch and self._told is not None:
            torch = self._told()
        elif built_for_torch:
            torch = torch_build.find([self._packages], self._interpreter, self._environ)
            torch = torch or torch_build.find(self.search_path, self._interpreter, self._environ)
        return Worker(self._interpreter, self._tags, torch)

    @cached_property
    def _tags(self) -> list[Tag]:
        return list(self._known_tags) if self._known_tags is not None else worker_tags(self._interpreter)

    @cached_property
    def search_path(self) -> list[Path]:
        """Where the interpreter itself would look: a container's image may bring torch along."""
        asked = subprocess.run(
            [self._interpreter.path, "-c", "import sys; print(*sys.path[1:], sep='\\n')"],
            env=self._environ,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        places = map(Path, filter(None, asked.stdout.splitlines()))
        return [place for place in places if self._root not in place.parents]


def worker_tags(interpreter: Interpreter) -> list[Tag]:
    """The tags of wheels that an interpreter can install, best first, as `packaging` says them under it.

    Raises ConfigError where it does not answer.
    """
    if os.path.realpath(interpreter.path) == os.path.realpath(sys.executable):
        return list(sys_tags())
    # Under the interpreter itself: only it knows its debug flags, its threading and its C library.
    place = str(Path(packaging.__file__).parent.parent)
    asked = subprocess.run(
        [interpreter.path, "-I", "-S", "-c", _TAGS, place],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    tags = [Tag(*line.split("-", 2)) for line in asked.stdout.splitlines() if line.count("-") == 2]
    if not tags:
        raise ConfigError(
            f"{interpreter.path} does not tell which wheels it can install.",
            "Name the worker's Python by environment.python in the configuration.",
        )
    return tags


def needs(version: Version) -> Needs:
    """What the local part of a version says about torch, CUDA and ABI."""
    local = (version.local or "").lower()
    torch, cuda, rocm, abi = (each.search(local) for each in (_TORCH, _CUDA, _ROCM, _ABI))
    return Needs(
        torch=_torch_version(*torch.groups()) if torch else "",
        cuda=_cuda_version(cuda[1]) if cuda else "",
        rocm=rocm[1] if rocm else "",
        cpu=_CPU.search(local) is not None,
        cxx11_abi=abi[1] in ("true", "1") if abi else None,
    )


def candidates(name: str, version: str, links: Iterable[Link]) -> list[Candidate]:
    """The wheels of `name` among `links`; only those of `version` (public or with its local part), if given."""
    wanted = canonicalize_name(name)
    allowed = SpecifierSet(f"=={version}" if version else "", prereleases=True)
    found: dict[str, Candidate] = {}
    for link in links:
        try:
            named, its_version, build, tags = parse_wheel_filename(link.file)
        except InvalidWheelFilename:
            continue
        if named == wanted and its_version in allowed:
            found.setdefault(link.file, Candidate(link, its_version, build, tags, needs(its_version)))
    return list(found.values())


def choose(name: str, version: str, links: Sequence[Link], worker: Worker) -> Choice:
    """The candidate that fits `worker`, the newest of several. Raises PackhorseError with a table if none does."""
    offered = candidates(name, version, links)
    judged = [(candidate, worker.wrong(candidate)) for candidate in offered]
    fitting = [candidate for candidate, wrong in judged if not wrong]
    if not fitting:
        raise _none_fits(name, version, links, judged, worker)
    best = max(fitting, key=worker.preference)
    others = f"; {len(fitting)} of {len(offered)} fit" if len(offered) > 1 else ""
    return Choice(best, f"{best.link.file} for {worker}{others}")


def table(judged: Iterable[tuple[Candidate, Mapping[str, str]]], worker: Worker) -> str:
    """One line a candidate, its wrong tags marked, under a line with what they should be."""
    torch = worker.torch
    asked = {
        "Python": f"cp{worker.interpreter.minor.replace('.', '')}",
        "platform": worker.interpreter.platform.replace("-", "_"),
        "torch": torch.minor if torch else "none",
        "CUDA": (torch.cuda or (f"rocm{torch.rocm}" if torch.rocm else "cpu")) if torch else "",
        "ABI": _truth(torch.cxx11_abi) if torch else "",
    }
    rows = [["", *COLUMNS], ["needed here", *(asked[column] for column in COLUMNS)]]
    for candidate, wrong in judged:
        said = _said(candidate)
        cells = [f"{said[column]} ✗" if column in wrong else said[column] for column in COLUMNS]
        rows.append([candidate.link.file, *cells])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join(
        "    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def _none_fits(
    name: str,
    version: str,
    links: Sequence[Link],
    judged: Sequence[tuple[Candidate, dict[str, str]]],
    worker: Worker,
) -> PackhorseError:
    called = f"{name} {version}".strip()
    if not judged:
        versions = sorted({each.version for each in candidates(name, "", links)})
        has = ", ".join(dict.fromkeys(each.public for each in versions)) or "none at all"
        return PackhorseError(
            f"No wheel of {called} is offered; of {name} there is: {has}.",
            "Correct find-links, or the version, in [[environment.wheels]].",
        )
    nearest = sorted(judged, key=lambda pair: (len(pair[1]), _distance(pair[0], pair[1], worker)))
    left = len(nearest) - _SHOWN
    more = f"\n    and {left:,} that fit less" if left > 0 else ""
    return PackhorseError(
        f"No wheel of {called} fits {worker}. The nearest of {len(judged):,}, wrong tags marked:\n"
        f"{table(nearest[:_SHOWN], worker)}{more}",
        _remedy(judged),
    )


def _remedy(judged: Iterable[tuple[Candidate, dict[str, str]]]) -> str:
    """What to change so that one would fit: from those of which one tag only is wrong."""
    single: dict[str, set[str]] = {}
    for _, wrong in judged:
        if len(wrong) == 1:
            [(column, said)] = wrong.items()
            single.setdefault(column, set()).add(said)
    changes = {
        "torch": "with torch {} (pin it in the requirements)",
        "Python": "with {} (environment.python)",
        "CUDA": "with a torch for {}",
        "ABI": "with a torch of the C++11 ABI {}",
        "platform": "on {}",
    }
    possible = [
        text.format(" or ".join(sorted(single[column], key=_natural)))
        for column, text in changes.items()
        if column in single
    ]
    if possible:
        return f"There is one {', or '.join(possible)}; or name another version or another page of wheels."
    return "Name another version or another page of wheels, or build one for this torch and name it by path."


def _distance(candidate: Candidate, wrong: Mapping[str, str], worker: Worker) -> tuple[object, ...]:
    """Smaller for what a change is most easily made to fit: other torch, then CUDA, ABI, Python, platform."""
    order = {"torch": 0, "CUDA": 1, "ABI": 2, "Python": 3, "platform": 4}
    torch = worker.torch
    away = 0.0
    if candidate.needs.torch and torch is not None:
        away = abs(_number(candidate.needs.torch) - _number(torch.minor))
    newness = tuple(-part for part in Version(candidate.version.public).release)
    return (max((order[column] for column in wrong), default=0), newness, away, candidate.link.file)


# --- what names say ---


def _torch_version(prefix: str, digits: str) -> str:
    """ "26" behind pt is 2.6 and "210" is 2.10 (PyG); behind torch "260" is 2.6.0 and "2100" 2.10.0 (NATTEN)."""
    if "." in digits or len(digits) == 1:
        return digits
    if prefix == "torch" and len(digits) > 2:
        return f"{digits[0]}.{digits[1:-1]}.{digits[-1]}"
    return f"{digits[0]}.{digits[1:]}"


def _cuda_version(digits: str) -> str:
    """ "12" is any CUDA 12, "118" is 11.8, "92" is 9.2."""
    if "." in digits or len(digits) == 1 or (len(digits) == 2 and digits[0] == "1"):
        return digits
    return f"{digits[:-1]}.{digits[-1]}"


def _same_minor(told: str, minor: str) -> bool:
    return told.split(".")[:2] == minor.split(".")[: len(told.split("."))]


def _runs_on(needs: Needs, torch: Torch) -> bool:
    """Whether the GPU code fits: the same major CUDA, by whose promise minor versions go together; for ROCm
    the minor, too."""
    if needs.cuda:
        return torch.cuda.split(".")[0] == needs.cuda.split(".")[0]
    if needs.rocm:
        return torch.rocm.split(".")[:2] == needs.rocm.split(".")[:2]
    return not (needs.cpu and (torch.cuda or torch.rocm))


def _closeness(told: str, cuda: str) -> tuple[int, float]:
    """Best the same minor, then a wheel for the whole major, then the nearest older and the nearest newer."""
    if not told:
        return (0, 0)
    if told == cuda:
        return (4, 0)
    if "." not in told:
        return (3, 0)
    away = _number(told) - _number(cuda)
    return (2, away) if away < 0 else (1, -away)


def _number(version: str) -> float:
    """2.10 after 2.9."""
    major, _, minor = version.partition(".")
    return int(major or 0) * 1000 + int(minor.partition(".")[0] or 0)


def _natural(text: str) -> list[object]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _said(candidate: Candidate) -> dict[str, str]:
    needs = candidate.needs
    return {
        "Python": _joined(_python(tag) for tag in candidate.tags),
        "platform": _joined(tag.platform for tag in candidate.tags),
        "torch": needs.torch,
        "CUDA": _built_for(needs),
        "ABI": _truth(needs.cxx11_abi),
    }


def _built_for(needs: Needs) -> str:
    if needs.cuda:
        return needs.cuda
    return f"rocm{needs.rocm}" if needs.rocm else "cpu" if needs.cpu else ""


def _python(tag: Tag) -> str:
    return tag.interpreter if tag.abi in (tag.interpreter, "none") else f"{tag.interpreter}-{tag.abi}"


def _truth(value: bool | None) -> str:
    return "" if value is None else str(value).upper()


def _joined(words: Iterable[str]) -> str:
    return ".".join(sorted(set(words)))
