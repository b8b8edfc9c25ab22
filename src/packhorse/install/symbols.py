"""Whether the extension modules of a wheel can be loaded here, told from their symbols before anything is imported.

Promises to complain only about what must fail: a strong symbol that nothing installed defines, a library that
nothing provides, a version that a library lacks. What only an import can tell is left to the import check.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import Distribution
from pathlib import Path

import msgspec

from packhorse.install import elf, providers
from packhorse.install.elf import Library
from packhorse.install.interpreter import Interpreter

_SHARED = re.compile(r"\.so(\.\d+)*$")
_CACHED = re.compile(r"^\s*(\S+) \(.*\) => (.+)$", re.MULTILINE)  # ldconfig -p
_SYSTEM = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")
_NEW_STRING, _OLD_STRING = "NSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE", "Ss"
_NAMED = 3


class Finding(msgspec.Struct, frozen=True):
    """What an extension module lacks: `kind` is symbol, library or version; `missing` are their names.

    `file` is its path below `packages/`; `library` where the missing should be; `reason` a sentence on why it is
    not there, and `remedy` one on what to do.
    """

    file: str
    kind: str
    missing: list[str]
    library: str = ""
    reason: str = ""
    remedy: str = ""


class Scope:
    """All libraries that an extension module of one environment could be given by the loader (ld.so(8))."""

    def __init__(self, places: Sequence[Path], interpreter: Interpreter, environ: Mapping[str, str]) -> None:
        """`places` are directories of packages, the first being `packages/`."""
        self.places, self._interpreter, self._environ = places, interpreter, environ
        self._opened: dict[Path, Library | None] = {}

    def close(self) -> None:
        """Close all files."""
        for library in self._opened.values():
            if library is not None:
                library.close()
        self._opened.clear()

    def open(self, path: Path) -> Library | None:
        """The library at a path, kept open; None where there is none."""
        if path not in self._opened:
            self._opened[path] = elf.open_library(path)
        return self._opened[path]

    @cached_property
    def packaged(self) -> dict[str, list[Path]]:
        """The shared libraries of the packages by their file name."""
        found: dict[str, list[Path]] = {}
        for place in self.places:
            for folder, _, names in os.walk(place):
                for name in filter(_SHARED.search, names):
                    found.setdefault(name, []).append(Path(folder, name))
        return found

    @cached_property
    def _system(self) -> dict[str, list[Path]]:
        """The libraries of the system by their name, as ldconfig(8) knows them."""
        found: dict[str, list[Path]] = {}
        for program in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
            with contextlib.suppress(OSError):
                asked = subprocess.run(
                    [program, "-p"], env={}, capture_output=True, text=True, errors="replace", check=False
                )
                for name, path in _CACHED.findall(asked.stdout):
                    found.setdefault(name, []).append(Path(path))
                break
        return found

    @cached_property
    def interpreter(self) -> list[Library]:
        """The interpreter's executable and all that it loads: their symbols are there for every module."""
        executable = self.open(Path(os.path.realpath(self._interpreter.path)))
        return [executable, *self.closure(executable)[0]] if executable is not None else []

    def providers(self, name: str, wanting: Library, loaders: Sequence[Library] = ()) -> list[Library]:
        """Every library that could be loaded for the need `name` of `wanting`.

        By the search path of `wanting` it is a certain one. Otherwise it may be loaded already when the module is
        imported, as torch loads those of CUDA: so those of all packages count, and the system's.
        """
        paths = [Path(name)] if "/" in name else _searched(name, wanting, loaders)
        if certain := self._first(paths, wanting):
            return certain
        behind = [Path(part, name) for part in self._environ.get("LD_LIBRARY_PATH", "").split(":") if part]
        behind += self._system.get(name, [])
        behind += [Path(directory, name) for directory in _SYSTEM]
        packaged = [
            library for path in self.packaged.get(name, ()) for library in self._first([path], wanting)
        ]
        return [*packaged, *self._first(behind, wanting)]

    def _first(self, paths: Iterable[Path], wanting: Library) -> list[Library]:
        for path in paths:
            library = self.open(path)
            if library is not None and library.machine == wanting.machine:
                return [library]
        return []

    def closure(self, library: Library) -> tuple[list[Library], list[tuple[Library, str]]]:
        """All that is loaded with a library, and the needs (of whom, which) that nothing provides."""
        found: dict[Path, Library] = {}
        missing: list[tuple[Library, str]] = []
        pending: list[tuple[Library, tuple[Library, ...]]] = [(library, ())]
        while pending:
            wanting, loaders = pending.pop(0)
            for name in wanting.needed:
                provided = self.providers(name, wanting, loaders)
                if not provided:
                    missing.append((wanting, name))
                for each in provided:
                    if each.path not in found and each is not library:
                        found[each.path] = each
                        pending.append((each, (*loaders, wanting)))
        return list(found.values()), missing

    def shown(self, path: Path) -> str:
        """A path as messages have it: below the packages where it is there."""
        for place in self.places:
            if place in path.parents:
                return str(path.relative_to(place))
        return str(path)

    def undefined(self, symbols: Iterable[str]) -> list[str]:
        """Those that no library of the packages defines at all: what was loaded before may share its symbols."""
        left = list(symbols)
        for path in (path for paths in self.packaged.values() for path in paths):
            if not left:
                break
            library = elf.open_library(path)  # not kept: there may be more than files that can be open
            if library is not None:
                with library:
                    left = [symbol for symbol in left if symbol not in library.defined]
        return left


def check(distributions: Iterable[Distribution], scope: Scope) -> list[Finding]:
    """What the extension modules of distributions in the first place of `scope` lack."""
    found: list[Finding] = []
    packages = scope.places[0]
    for distribution in distributions:
        files = [str(file) for file in distribution.files or () if _SHARED.search(str(file))]
        own = {packages / file for file in files}
        for file in files:
            name = os.path.basename(file)
            # Libraries beside the modules may be there for other machines: bitsandbytes has one for each CUDA.
            if not name.endswith(".so") or name.startswith("lib"):
                continue
            module = elf.open_library(packages / file)
            if module is not None:
                with module:
                    found += _check(file, module, own, scope)
    return found


def explain(file: Path, symbol: str, scope: Scope) -> Finding | None:
    """Why the loader said `undefined symbol` of a library; None where the symbol is defined after all."""
    module = elf.open_library(file)
    if module is None:
        return None
    with module:
        loaded, _ = scope.closure(module)
        if any(symbol in library.defined for library in loaded):
            return None
        return _explained(scope.shown(file), [symbol], [*loaded, *scope.interpreter], scope)


def _check(file: str, module: Library, own: set[Path], scope: Scope) -> Iterator[Finding]:
    loaded, absent = scope.closure(module)
    lost = list(dict.fromkeys(name for _, name in absent if not providers.is_driver(name)))
    for name in lost:
        yield Finding(file, "library", [name], name, *providers.advice(name, scope.packaged))
    if lost:
        return  # what else is missing may be in there
    yield from _versions(file, module, loaded, scope)
    wanting = [module, *(library for library in loaded if library.path in own)]
    defining = [*loaded, *scope.interpreter, module]
    wanted = dict.fromkeys(
        symbol.name for library in wanting for symbol in library.wanted() if not symbol.weak
    )
    missing = [symbol for symbol in wanted if not any(symbol in library.defined for library in defining)]
    if absent:  # a driver is not here; its interface is one in C
        missing = [symbol for symbol in missing if symbol.startswith("_Z")]
    if missing := scope.undefined(missing):
        yield _explained(file, missing, defining, scope)


def _versions(file: str, module: Library, loaded: Sequence[Library], scope: Scope) -> Iterator[Finding]:
    by_name: dict[str, list[Library]] = {}
    for library in [*loaded, *scope.interpreter]:
        by_name.setdefault(library.soname, []).append(library)
    lacking: dict[str, list[str]] = {}
    for wanted in module.wanted_versions():
        offered = by_name.get(wanted.file, [])
        if offered and not any(wanted.version in each.versions or not each.versions for each in offered):
            lacking.setdefault(wanted.file, []).append(wanted.version)
    for name, versions in lacking.items():
        shown = scope.shown(by_name[name][0].path)
        yield Finding(
            file,
            "version",
            versions,
            shown,
            f"{shown} is older than the one that it was built with",
            "Take a wheel built on an older system (manylinux), or a newer image.",
        )


def _explained(file: str, missing: list[str], defining: Sequence[Library], scope: Scope) -> Finding:
    """Why symbols are missing, by what the libraries define of the same name, or else of the same namespace."""
    for symbol in missing[:_NAMED]:
        for level, name in enumerate(_qualified(symbol)):
            alike = {
                library: [each for each in library.defined if each.startswith(name)] for library in defining
            }
            library = max(alike, key=lambda each: len(alike[each]))
            if not alike[library]:
                continue
            shown = scope.shown(library.path)
            abi = _other_abi(symbol, alike[library]) if level == 0 else None
            if abi is not None:
                wanted, here = ("TRUE", "FALSE") if abi else ("FALSE", "TRUE")
                return Finding(
                    file,
                    "symbol",
                    missing,
                    shown,
                    f"it was built with the C++11 ABI {wanted}, and {shown} with {here}",
                    f"Take the wheel for cxx11abi{here}; where that is what its name says, the name is wrong: "
                    "take another build.",
                )
            return Finding(
                file,
                "symbol",
                missing,
                shown,
                f"{shown} should have it, so that is not the version or build which the wheel was made for",
                "Take a wheel made for this very version and build of torch, or install the torch that it was "
                "made for.",
            )
    return Finding(
        file,
        "symbol",
        missing,
        reason="no library that it loads has anything of that kind",
        remedy="Take a wheel for the versions installed here, or install those that it was made for.",
    )


def _other_abi(symbol: str, alike: Iterable[str]) -> bool | None:
    """Whether `symbol` is of the C++11 ABI and those alike are of the other, or the other way round."""
    new = _NEW_STRING in symbol
    old = re.search(r"Ss(?![a-z0-9_]{2})", symbol) is not None and not new
    if not new and not old:
        return None
    theirs = [_NEW_STRING in each for each in alike]
    if new and not any(theirs):
        return True
    return False if old and any(theirs) else None


def _qualified(symbol: str) -> list[str]:
    """What a mangled name begins with, without its parameters, and then without its last parts:
    _ZN3c105ErrorC2E... → _ZN3c105Error, _ZN3c10.

    From the Itanium C++ ABI, section 5.1.
    """
    match = re.match(r"_ZN[rVK]*", symbol)
    if match is None:
        return []
    end, names = match.end(), []
    while length := re.match(r"\d+", symbol[end:]):
        end += length.end() + int(length[0])
        names.append(symbol[:end])
    return names[::-1]


def demangled(symbol: str) -> str:
    """A C++ name as people write it; `symbol` itself where that is not one or libstdc++ is not here."""
    import ctypes

    if not symbol.startswith("_Z"):
        return symbol
    try:
        demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
        free = ctypes.CDLL(None)["free"]
    except (OSError, AttributeError):
        return symbol
    demangle.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    status = ctypes.c_int()
    text = demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    try:
        return ctypes.string_at(text).decode(errors="replace").replace(_LONG_STRING, "std::string")
    finally:
        free(text)


_LONG_STRING = "std::__cxx11::basic_string<char, std::char_traits<char>, std::allocator<char> >"


def sentence(finding: Finding) -> str:
    """A finding for people, without a full stop."""
    if finding.kind == "symbol":
        first = finding.missing[0]
        plain = demangled(first)
        shown = f"{plain} ({first})" if plain != first else first
        more = len(finding.missing) - 1
        others = f" and {more:,} more symbol{'s' if more > 1 else ''}" if more else ""
        return f"{finding.file} needs {shown}{others}, which nothing here defines: {finding.reason}"
    if finding.kind == "library":
        return f"{finding.file} needs {finding.library}: {finding.reason}"
    return f"{finding.file} needs {', '.join(finding.missing)}: {finding.reason}"


def _searched(name: str, wanting: Library, loaders: Sequence[Library]) -> Iterator[Path]:
    """Where the library's own search path leads. RPATH counts where there is no RUNPATH, with that of the loaders."""
    if wanting.runpath:
        directories = [(wanting, part) for part in wanting.runpath]
    else:
        chain = [wanting, *(each for each in reversed(loaders) if not each.runpath)]
        directories = [(each, part) for each in chain for part in each.rpath]
    for owner, part in directories:
        origin = str(owner.path.parent)
        yield Path(part.replace("$ORIGIN", origin).replace("${ORIGIN}", origin), name)
