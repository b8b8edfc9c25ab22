"""What a shared library offers and asks for: names, search paths, dynamic symbols and their versions.

Reads the dynamic section and what it points to, so that a library of 500 MB costs milliseconds. Knows no search
order and judges nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerDefSection, GNUVerNeedSection

_UNDEFINED = 0
_LOCAL, _WEAK = 0, 2
_OPTIONAL = 0x2
"""VER_FLG_WEAK: the loader does without this version."""


class Wanted(NamedTuple):
    """A symbol that a library takes from others; nothing fails where a weak one is missing."""

    name: str
    weak: bool


class WantedVersion(NamedTuple):
    """A version (such as GLIBCXX_3.4.32) that the library `file` must define."""

    file: str
    version: str


class Library:
    """A shared library or executable that is open for reading; use it as a context manager, or close it."""

    def __init__(self, path: Path, file: BinaryIO, elf: ELFFile, dynamic: DynamicSegment) -> None:
        self.path = path
        self._file, self._elf, self._dynamic = file, elf, dynamic
        self.machine = (elf.elfclass, str(elf["e_machine"]))
        """What a process can load together: the word size and the processor."""
        tags = {name: [getattr(tag, name[3:].lower()) for tag in dynamic.iter_tags(name)] for name in _NAMES}
        self.needed: list[str] = tags["DT_NEEDED"]
        self.soname: str = next(iter(tags["DT_SONAME"]), path.name)
        self.runpath = [part for value in tags["DT_RUNPATH"] for part in value.split(":") if part]
        """Searched for this library's own needs, after LD_LIBRARY_PATH."""
        self.rpath = [part for value in tags["DT_RPATH"] for part in value.split(":") if part]
        """Searched for the needs of what this library needs, too, before LD_LIBRARY_PATH."""

    @cached_property
    def defined(self) -> frozenset[str]:
        """The names of all symbols that others can take from here.

        Not looked up one by one: elftools loses its place in a hash table when two names nearly have the same hash.
        """
        return frozenset(
            name for name, binding, section in self._symbols() if section != _UNDEFINED and binding != _LOCAL
        )

    def wanted(self) -> Iterator[Wanted]:
        """The symbols that must come from others."""
        for name, binding, section in self._symbols():
            if section == _UNDEFINED and name:
                yield Wanted(name, binding == _WEAK)

    def wanted_versions(self) -> Iterator[WantedVersion]:
        """The versions that the libraries needed must define."""
        for section in self._elf.iter_sections("SHT_GNU_verneed"):
            assert isinstance(section, GNUVerNeedSection)
            for needed, versions in section.iter_versions():
                for version in versions:
                    if not version["vna_flags"] & _OPTIONAL:
                        yield WantedVersion(str(needed.name), version.name)

    @cached_property
    def versions(self) -> frozenset[str]:
        """The versions defined here; empty where the library has none, and then any is taken for granted."""
        names: set[str] = set()
        for section in self._elf.iter_sections("SHT_GNU_verdef"):
            assert isinstance(section, GNUVerDefSection)
            names.update(next(iter(auxiliaries)).name for _, auxiliaries in section.iter_versions())
        return frozenset(names)

    def _symbols(self) -> Iterator[tuple[str, int, int]]:
        """The name, binding and section index of each dynamic symbol.

        Unpacked at once: one by one, as elftools does it, the 76,000 symbols of libtorch_cpu.so take ten seconds.
        """
        names = self._read("DT_STRTAB", next(self._dynamic.iter_tags("DT_STRSZ"))["d_val"])
        order = "<" if self._elf.little_endian else ">"
        wide = self._elf.elfclass == 64
        entry = struct.Struct(order + ("IBBHQQ" if wide else "IIIBBH"))  # Elf64_Sym, Elf32_Sym
        for fields in entry.iter_unpack(self._read("DT_SYMTAB", self._dynamic.num_symbols() * entry.size)):
            start, flags, section = (fields[0], fields[1], fields[3]) if wide else (fields[0], *fields[3::2])
            yield names[start : names.index(b"\0", start)].decode(errors="replace"), flags >> 4, section

    def _read(self, table: str, size: int) -> bytes:
        _, offset = self._dynamic.get_table_offset(table)
        if offset is None:
            return b""
        self._file.seek(offset)
        return self._file.read(size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_NAMES = ("DT_NEEDED", "DT_SONAME", "DT_RUNPATH", "DT_RPATH")


def open_library(path: Path) -> Library | None:
    """The library at `path`; None where that is no dynamic ELF file, or is not there."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    try:
        if file.read(4) == b"\x7fELF":
            elf = ELFFile(file)
            for segment in elf.iter_segments("PT_DYNAMIC"):
                if isinstance(segment, DynamicSegment):
                    return Library(path, file, elf, segment)
    except (ELFError, OSError, UnicodeDecodeError):  # cut short, or not what it seems
        pass
    file.close()
    return None
